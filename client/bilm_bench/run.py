"""A run: connects, learns the known answers, warms up, then sends one step's calls after another's."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random

from bilm_client._core.inputs import Sentence
from bilm_client._core.options import Options
from bilm_client.policy import DEFAULT_RETRY
from bilm_client.results import ModelInfo
from tqdm import tqdm

from bilm_bench.resources import ReadResources, Resources, of_page, of_process
from bilm_bench.settings import BenchSettings
from bilm_bench.statistics.counters import Tally
from bilm_bench.statistics.metrics import Sample
from bilm_bench.statistics.sampler import Sampler
from bilm_bench.workload.calls import (
    ONE_ATTEMPT,
    Answer,
    Connections,
    Kind,
    Request,
    client_settings,
    learn,
    make_call,
    make_requests,
)
from bilm_bench.workload.expected import KnownAnswers
from bilm_bench.workload.probe import HealthProbe, HealthTally
from bilm_bench.workload.schedule import Step, arrivals_s, in_rounds

_CONNECT_TIMEOUT_S = 10.0
_GRACE_S = 5.0  # beyond the deadline; after that a call counts as one without an end
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Measured:
    """What a run has found.

    Attributes:
        begun: when the first step did.
        model: what the server said of it.
        steps: loads and what became of their calls; an interrupted run has fewer than were planned.
        health: of the checks beside the load.
        samples: over time.
        cores: processor time of this process, in seconds a second.
        interrupted: whether Ctrl-C ended it.
    """

    begun: datetime
    model: ModelInfo
    steps: tuple[tuple[Step, Tally], ...]
    health: HealthTally
    samples: tuple[Sample, ...]
    cores: float
    interrupted: bool

    @property
    def total(self) -> Tally:
        """Of all steps."""
        total = Tally()
        for _, tally in self.steps:
            total.merge(tally)
        return total


Tell = Callable[[Step, Tally], None]


async def measure(settings: BenchSettings, sentences: Sequence[Sentence], tell: Tell) -> Measured:
    """Does a run. Ctrl-C (a cancelled task) ends its load early.

    Args:
        settings: the choices.
        sentences: that are sent.
        tell: called at the end of each step.

    Raises:
        BilmError: if the server can't be reached at the beginning, or doesn't answer while answers are learnt.
    """
    options = Options(settings.layers, settings.pool, settings.dtype, None, False, "return")
    wire_options = options.to_proto(omit_tokens=not settings.raw)
    credentials, token = settings.credentials()
    connection = client_settings(
        settings.target,
        timeout_s=settings.timeout_s,
        retry=DEFAULT_RETRY if settings.retry else ONE_ATTEMPT,
        credentials=credentials,
        token=token,
        metadata=settings.call_metadata(),
        proxy=settings.proxy,
    )
    async with Connections(connection, settings.connections) as connections:
        model = await connections.open(min(settings.timeout_s, _CONNECT_TIMEOUT_S))
        known = KnownAnswers(options, settings.tolerance) if settings.verify else None
        if known is not None:
            alone = tqdm(make_requests(sentences, 1, wire_options), "asking alone", unit="", disable=None, leave=False)
            await learn(connections, alone, known)
        requests = make_requests(sentences, settings.sentences_per_call, wire_options)
        call = partial(make_call, connections, known)
        run = _Run(settings, requests, call, HealthProbe(connection), tell)
        return await run.measure(model)


def server_reader(settings: BenchSettings) -> ReadResources | None:
    """How the server's resources are read; None if that wasn't chosen."""
    if settings.metrics_url:
        return partial(of_page, settings.metrics_url, proxy=settings.proxy)
    return None if settings.server_pid is None else partial(of_process, settings.server_pid)


class _Run:
    """The load of a run, once everything is ready."""

    def __init__(
        self,
        settings: BenchSettings,
        requests: Sequence[Request],
        call: Callable[[Request], Awaitable[Answer]],
        probe: HealthProbe,
        tell: Tell,
    ) -> None:
        self._settings, self._make_call, self._probe, self._tell = settings, call, probe, tell
        self._planned = settings.steps()
        self._length_s = sum(step.length_s for step in self._planned)
        self._moments = Random(settings.seed)  # noqa: S311 - the same load each time, nothing to hide
        self._requests = in_rounds(requests, Random(settings.seed))  # noqa: S311 - likewise
        self._in_flight = 0
        every_s = max(settings.sample_s, self._length_s / Sampler.MOST_SAMPLES)
        self._sampler = Sampler(every_s, server_reader(settings) or Resources, lambda: self._in_flight)

    async def measure(self, model: ModelInfo) -> Measured:
        """Warms up, and does one step after another."""
        steps: list[tuple[Step, Tally]] = []
        interrupted = False
        if self._settings.warm_up_s:
            await self._do(Step(self._planned[0].load, self._settings.warm_up_s), Tally())
        begun, begun_s, cpu_s = datetime.now(UTC), time.monotonic(), time.process_time()
        try:
            async with self._observed():
                for step in self._planned:
                    steps.append((step, Tally()))
                    await self._do(*steps[-1])
                    self._tell(*steps[-1])
        except asyncio.CancelledError:
            interrupted = True
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        cores = (time.process_time() - cpu_s) / (time.monotonic() - begun_s)
        samples = tuple(self._sampler.samples)
        return Measured(begun, model, tuple(steps), self._probe.tally, samples, cores, interrupted)

    @asynccontextmanager
    async def _observed(self) -> AsyncIterator[None]:
        """Samples and health checks go on meanwhile."""
        total_s = round(self._length_s)
        with tqdm(total=total_s, unit="s", disable=None, leave=False) as bar, self._probe:
            self._sampler.on_sample = lambda sample: bar.update(min(round(sample.at_s), total_s) - bar.n)
            async with self._sampler:
                yield

    async def _do(self, step: Step, tally: Tally) -> None:
        """Sends a step's calls, and waits for their ends."""
        begun_s = time.monotonic()
        send = self._open if self._settings.loop == "open" else self._closed
        async with asyncio.TaskGroup() as group:
            try:
                await send(group, step, begun_s, tally)
                await asyncio.sleep(max(0.0, begun_s + step.length_s - time.monotonic()))
            finally:
                tally.length_s = min(step.length_s, time.monotonic() - begun_s)

    async def _open(self, group: asyncio.TaskGroup, step: Step, begun_s: float, tally: Tally) -> None:
        """Calls when they come; one that is late is sent at once, and what it waited is part of its latency."""
        per_s = step.load / self._settings.sentences_per_call
        for at_s in arrivals_s(per_s, step.length_s, self._moments):
            await asyncio.sleep(max(0.0, begun_s + at_s - time.monotonic()))
            request = next(self._requests)
            tally.meant(request)
            if self._in_flight >= self._settings.max_in_flight:
                tally.not_sendable()
                self._sampler.window.failed += 1
            else:
                self._in_flight += 1
                group.create_task(self._call(request, begun_s + at_s, begun_s + step.length_s, tally))

    async def _closed(self, group: asyncio.TaskGroup, step: Step, begun_s: float, tally: Tally) -> None:
        """Callers who call again once the answer is there."""
        for _ in range(round(step.load)):
            group.create_task(self._caller(begun_s + step.length_s, tally))

    async def _caller(self, end_s: float, tally: Tally) -> None:
        while (now_s := time.monotonic()) < end_s:
            request = next(self._requests)
            tally.meant(request)
            self._in_flight += 1
            answer = await self._call(request, now_s, end_s, tally)
            if answer is None or answer.kind is not Kind.ACCEPTED:
                # A caller who calls again at once would measure nothing but how fast it can be refused.
                asked_ms = 0 if answer is None else answer.pushback_ms or 0
                pause_s = max(_PAUSE_S, asked_ms / 1000)
                await asyncio.sleep(max(0.0, min(pause_s, end_s - time.monotonic())))

    async def _call(self, request: Request, meant_s: float, end_s: float, tally: Tally) -> Answer | None:
        """Counts what comes of a call; None if nothing does."""
        sent_s = time.monotonic()
        tally.lateness.record(sent_s - meant_s)
        try:
            async with asyncio.timeout(self._settings.timeout_s + _GRACE_S):
                answer = await self._make_call(request)
        except TimeoutError:
            tally.no_end()
            self._sampler.window.failed += 1
            return None
        except asyncio.CancelledError:
            tally.unfinished += 1
            raise
        finally:
            self._in_flight -= 1
        ended_s = time.monotonic()
        tally.ended(answer, ended_s - meant_s, ended_s - sent_s, self._settings.timeout_s)
        if ended_s <= end_s:
            tally.in_time(answer)
        self._sampler.window.ended(answer, ended_s - meant_s)
        return answer
