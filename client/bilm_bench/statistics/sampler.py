"""What a run looks like over time: samples at even distances, never more than a few hundred."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from bilm_bench.resources import ReadResources, of_process
from bilm_bench.statistics.counters import SampleCounters
from bilm_bench.statistics.metrics import Sample, window_metrics


class Sampler:
    """Takes a sample at the beginning, then every so often, and at the end; an asynchronous context manager.

    Args:
        every_s: Seconds between samples.
        read_server: Reads the server's resources.
        in_flight: Returns the number of calls under way.

    Attributes:
        window: Counters of what ends until the next sample.
        samples: The samples so far.
        on_sample: Takes each sample.
    """

    MOST_SAMPLES = 600

    def __init__(self, every_s: float, read_server: ReadResources, in_flight: Callable[[], int]) -> None:
        self.window = SampleCounters()
        self.samples: list[Sample] = []
        self.on_sample: Callable[[Sample], object] = lambda sample: None
        self._every_s, self._read_server, self._in_flight = every_s, read_server, in_flight
        self._begun_s = self._since_s = 0.0
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.window = SampleCounters()
        self._begun_s = self._since_s = time.monotonic()
        await self._sample()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None  # noqa: S101 - for the type checker
        self._ended.set()
        await self._task

    async def _run(self) -> None:
        due_s = self._begun_s
        while not self._ended.is_set():
            due_s += self._every_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), max(0.0, due_s - time.monotonic()))
            await self._sample()

    async def _sample(self) -> None:
        now_s = time.monotonic()
        window, self.window = self.window, SampleCounters()
        length_s, self._since_s = now_s - self._since_s, now_s
        # In a thread: a page may take a while, and so may a folder of ten thousand descriptors.
        bench, server = await asyncio.to_thread(lambda: (of_process(), self._read_server()))
        counts = {
            "sentences": window.sentences,
            "tokens": window.tokens,
            "accepted": window.accepted.count,
            "refused": window.refused,
            "failed": window.failed,
        }
        metrics = window_metrics(window.accepted, counts, length_s)
        self.samples.append(Sample(now_s - self._begun_s, metrics, self._in_flight(), bench, server))
        self.on_sample(self.samples[-1])
