"""A run: connect, fetch the expected results, warm up, then send one step's calls after another's."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random

from bilm_api.constants import Feature
from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.inputs import WholeSentence
from bilm_client._core.options import Options, PriorityName
from bilm_client._core.settings import Settings
from bilm_client._transport.grpc_async import GrpcAsyncTransport
from bilm_client.aio import AsyncTransportClient
from bilm_client.errors import BilmError
from bilm_client.policy import DEFAULT_RETRY
from bilm_client.results import ModelInfo
from tqdm import tqdm

from bilm_bench.resources import ReadResources, Resources, of_page, of_process
from bilm_bench.settings import BenchSettings
from bilm_bench.statistics.counters import HealthCounters, StepCounters
from bilm_bench.statistics.metrics import Sample
from bilm_bench.statistics.sampler import Sampler
from bilm_bench.workload.calls import (
    ONE_ATTEMPT,
    CallKind,
    CallResult,
    Connections,
    Request,
    client_settings,
    fetch_expected,
    make_call,
    make_requests,
)
from bilm_bench.workload.expected import ExpectedResults
from bilm_bench.workload.probe import HealthProbe
from bilm_bench.workload.schedule import Step, arrivals_s, in_rounds

_CONNECT_TIMEOUT_S = 10.0
_GRACE_S = 5.0  # beyond the deadline; after that a call counts as one without an end
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Measured:
    """What a run has measured.

    Attributes:
        begun: When the first step began.
        model: The server's model.
        steps: Loads and counters of their calls; an interrupted run has fewer than were planned.
        health: Counters of the health checks.
        samples: What the run looked like over time.
        cores: Processor time of this process, in seconds a second.
        interrupted: Whether Ctrl-C ended the run.
    """

    begun: datetime
    model: ModelInfo
    steps: tuple[tuple[Step, StepCounters], ...]
    health: HealthCounters
    samples: tuple[Sample, ...]
    cores: float
    interrupted: bool

    @property
    def total(self) -> StepCounters:
        """The counters of all steps together."""
        total = StepCounters()
        for _, counters in self.steps:
            total.merge(counters)
        return total


OnStep = Callable[[Step, StepCounters], None]


async def measure(settings: BenchSettings, sentences: Sequence[WholeSentence], on_step: OnStep) -> Measured:
    """Run the load. Ctrl-C (a cancelled task) ends its load early.

    Args:
        settings: The run's.
        sentences: What is sent.
        on_step: Takes each step that has ended.

    Raises:
        BilmError: The server can't be reached at the beginning, or fails while expected results are fetched.
    """
    options = Options(settings.layers, settings.pool, settings.dtype, None, False, "return")
    common = pb.EmbedRequest(model=settings.model, options=options.to_proto(omit_tokens=not settings.raw))
    credentials, token = settings.credentials()
    connection = client_settings(
        settings.target,
        balance=settings.balance,
        model=settings.model,
        timeout_s=settings.timeout_s,
        retry=DEFAULT_RETRY if settings.retry else ONE_ATTEMPT,
        credentials=credentials,
        token=token,
        metadata=settings.call_metadata(),
        proxy=settings.proxy,
    )
    if connection.watches_model:
        async with AsyncTransportClient(connection, GrpcAsyncTransport) as client:
            await client.model_info()  # where no server has the model, this says so
    async with Connections(connection, settings.connections) as connections:
        model = await connections.open(min(settings.timeout_s, _CONNECT_TIMEOUT_S))
        expected = ExpectedResults(options, settings.tolerance) if settings.verify else None
        if expected is not None:
            alone = tqdm(make_requests(sentences, 1, common), "asking alone", unit="", disable=None, leave=False)
            await fetch_expected(connections, alone, expected)
        common.priority = wire_priority(settings.priority, model)
        requests = make_requests(sentences, settings.sentences_per_call, common)
        call = partial(make_call, connections, expected)
        run = LoadRun(settings, requests, call, connection, on_step)
        return await run.measure(model)


def wire_priority(priority: PriorityName, model: ModelInfo) -> pb.Priority:
    """Return a priority as calls state it.

    Raises:
        BilmError: The server doesn't know it, and would treat all calls alike.
    """
    if priority == "interactive":
        return pb.PRIORITY_UNSPECIFIED
    if Feature.PRIORITY not in model.features:
        raise BilmError(f"priority: the server ({model.server_version}) doesn't know it")
    return pb.PRIORITY_BATCH


def server_reader(settings: BenchSettings) -> ReadResources | None:
    """Return how the server's resources are read; None if that wasn't asked for."""
    if settings.metrics_url:
        return partial(of_page, settings.metrics_url, proxy=settings.proxy)
    return None if settings.server_pid is None else partial(of_process, settings.server_pid)


class LoadRun:
    """The load of a run, once everything is ready.

    Args:
        settings: The run's.
        requests: What is sent, in rounds.
        call: Sends a request; never raises.
        connection: How health checks connect.
        on_step: Takes each step that has ended.
    """

    def __init__(
        self,
        settings: BenchSettings,
        requests: Sequence[Request],
        call: Callable[[Request], Awaitable[CallResult]],
        connection: Settings,
        on_step: OnStep,
    ) -> None:
        self._settings, self._make_call, self._on_step = settings, call, on_step
        self._health = HealthCounters()
        self._probe = HealthProbe(connection, self._health.add)
        self._planned = settings.steps()
        self._length_s = sum(step.length_s for step in self._planned)
        self._moments = Random(settings.seed)  # noqa: S311 - the same load each time, nothing to hide
        self._requests = in_rounds(requests, Random(settings.seed))  # noqa: S311 - the same
        self._in_flight = 0
        every_s = max(settings.sample_s, self._length_s / Sampler.MOST_SAMPLES)
        self._sampler = Sampler(every_s, server_reader(settings) or Resources, lambda: self._in_flight)

    async def measure(self, model: ModelInfo) -> Measured:
        """Warm up, and send one step after another."""
        steps: list[tuple[Step, StepCounters]] = []
        interrupted = False
        if self._settings.warm_up_s:
            await self._do(Step(self._planned[0].load, self._settings.warm_up_s), StepCounters())
        begun, begun_s, cpu_s = datetime.now(UTC), time.monotonic(), time.process_time()
        try:
            async with self._observed():
                for step in self._planned:
                    steps.append((step, StepCounters()))
                    await self._do(*steps[-1])
                    self._on_step(*steps[-1])
        except asyncio.CancelledError:
            interrupted = True
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        cores = (time.process_time() - cpu_s) / (time.monotonic() - begun_s)
        samples = tuple(self._sampler.samples)
        return Measured(begun, model, tuple(steps), self._health, samples, cores, interrupted)

    @asynccontextmanager
    async def _observed(self) -> AsyncIterator[None]:
        """Take samples and check the health meanwhile."""
        total_s = round(self._length_s)
        with tqdm(total=total_s, unit="s", disable=None, leave=False) as bar, self._probe:
            self._sampler.on_sample = lambda sample: bar.update(min(round(sample.at_s), total_s) - bar.n)
            async with self._sampler:
                yield

    async def _do(self, step: Step, counters: StepCounters) -> None:
        """Send a step's calls, and wait for their ends."""
        begun_s = time.monotonic()
        send = self._open if self._settings.loop == "open" else self._closed
        async with asyncio.TaskGroup() as group:
            try:
                await send(group, step, begun_s, counters)
                await asyncio.sleep(max(0.0, begun_s + step.length_s - time.monotonic()))
            finally:
                counters.length_s = min(step.length_s, time.monotonic() - begun_s)

    async def _open(self, group: asyncio.TaskGroup, step: Step, begun_s: float, counters: StepCounters) -> None:
        """Send calls when they are due; one that is late is sent at once, and its wait is part of its latency."""
        per_s = step.load / self._settings.sentences_per_call
        for at_s in arrivals_s(per_s, step.length_s, self._moments):
            await asyncio.sleep(max(0.0, begun_s + at_s - time.monotonic()))
            request = next(self._requests)
            counters.meant(request)
            if self._in_flight >= self._settings.max_in_flight:
                counters.not_sendable()
                self._sampler.window.failed += 1
            else:
                self._in_flight += 1
                group.create_task(self._call(request, begun_s + at_s, begun_s + step.length_s, counters))

    async def _closed(self, group: asyncio.TaskGroup, step: Step, begun_s: float, counters: StepCounters) -> None:
        """Start clients that call again once the response is there."""
        for _ in range(round(step.load)):
            group.create_task(self._caller(begun_s + step.length_s, counters))

    async def _caller(self, end_s: float, counters: StepCounters) -> None:
        while (now_s := time.monotonic()) < end_s:
            request = next(self._requests)
            counters.meant(request)
            self._in_flight += 1
            result = await self._call(request, now_s, end_s, counters)
            if result is None or result.kind is not CallKind.ACCEPTED:
                # Calling again at once would measure nothing but how fast the server refuses.
                asked_ms = 0 if result is None else result.pushback_ms or 0
                pause_s = max(_PAUSE_S, asked_ms / 1000)
                await asyncio.sleep(max(0.0, min(pause_s, end_s - time.monotonic())))

    async def _call(self, request: Request, meant_s: float, end_s: float, counters: StepCounters) -> CallResult | None:
        """Send a call and count its result; return None if it has none in time."""
        sent_s = time.monotonic()
        counters.lateness.record(sent_s - meant_s)
        try:
            async with asyncio.timeout(self._settings.timeout_s + _GRACE_S):
                result = await self._make_call(request)
        except TimeoutError:
            counters.no_end()
            self._sampler.window.failed += 1
            return None
        except asyncio.CancelledError:
            counters.unfinished += 1
            raise
        finally:
            self._in_flight -= 1
        ended_s = time.monotonic()
        counters.ended(result, ended_s - meant_s, ended_s - sent_s, self._settings.timeout_s)
        if ended_s <= end_s:
            counters.in_time(result)
        self._sampler.window.ended(result, ended_s - meant_s)
        return result
