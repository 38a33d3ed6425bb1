"""Runs the baseline in processes of its own, in several layouts, and finds its best.

A process computes with a number of threads that it is given at its start; so a layout is processes × threads, and the
processes share the batches of the work between them.
"""

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from torch import Tensor

from benchmarks.load.engines import as_engine_sentences
from benchmarks.references.published_order import PublishedOrder

MAX_DIFFERENCE = 1e-4
_PROBE_SENTENCES = 64
_CHECKED_SENTENCES = 5

Sentences = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Layout:
    """How the baseline runs.

    Attributes:
        processes: with weights of their own.
        threads: of each process.
        batch: sentences padded to one length.
    """

    processes: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.processes} × {self.threads} threads, batch {self.batch}"

    @property
    def sentences_at_a_time(self) -> int:
        """So many keep all processes busy."""
        return self.processes * self.batch


class Baseline:
    """A team of processes that compute the baseline, as a context manager."""

    def __init__(self, size: str, processes: int, threads: int) -> None:
        self._size, self._processes, self._threads = size, processes, threads
        self._workers: list[Any] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        for _ in range(self._processes):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, self._size, self._threads), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()  # ready
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # ends the worker
        for worker in self._workers:
            worker.join()

    def seconds(self, sentences: Sentences, batch: int) -> float:
        """Return how long the team takes, in batches in order of arrival."""
        batches = [sentences[first : first + batch] for first in range(0, len(sentences), batch)]
        begun_s = time.perf_counter()
        for number, pipe in enumerate(self._pipes):
            pipe.send(("time", batches[number :: len(self._pipes)]))
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - begun_s

    def layers(self, sentences: Sentences) -> list[Tensor]:
        """Return the layers, computed as one batch."""
        self._pipes[0].send(("show", [sentences]))
        return [torch.from_numpy(layers) for layers in self._pipes[0].recv()]


class BaselineAtItsBest:
    """The layout that was fastest in a short try, kept running."""

    def __init__(self, size: str, batches: Sequence[int], sentences: Sentences, cores: int) -> None:
        self._size, self._batches, self._sentences = size, batches, sentences
        self._layouts = dict.fromkeys([(1, cores), (cores, 1)])  # one core: one layout
        self._team: Baseline | None = None
        self._position = 0
        self.tried: dict[Layout, float] = {}

    def __enter__(self) -> Self:
        for processes, threads in self._layouts:
            with Baseline(self._size, processes, threads) as team:
                self._try(team, processes, threads)
        self._team = Baseline(self._size, self.best.processes, self.best.threads).__enter__()
        self._team.seconds(self._sentences[: self.best.processes], 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._team is not None:
            self._team.__exit__(kind, error, traceback)

    @property
    def best(self) -> Layout:
        """The fastest layout."""
        return max(self.tried, key=self.tried.__getitem__)

    @property
    def team(self) -> Baseline:
        """The processes in the best layout."""
        assert self._team is not None
        return self._team

    def tokens_per_s(self) -> float:
        """Measure the best layout on the next sentences."""
        count = max(_PROBE_SENTENCES, self.best.sentences_at_a_time)
        part = [self._sentences[(self._position + i) % len(self._sentences)] for i in range(count)]
        self._position += count
        return sum(map(len, part)) / self.team.seconds(part, self.best.batch)

    def _try(self, team: Baseline, processes: int, threads: int) -> None:
        team.seconds(self._sentences[: 2 * processes], 1)
        for batch in self._batches:
            layout = Layout(processes, threads, batch)
            part = self._sentences[: max(_PROBE_SENTENCES, layout.sentences_at_a_time)]
            self.tried[layout] = sum(map(len, part)) / team.seconds(part, batch)
            print(f"  baseline {self._size}, {layout}: {self.tried[layout]:,.0f} tokens/s", flush=True)


def check_against(engine: CellularBatch, team: Baseline, sentences: Sentences) -> float:
    """Check that the baseline computes what the engine does; return the largest difference."""
    part = sentences[:_CHECKED_SENTENCES]
    embedded = engine.run(as_engine_sentences(part))
    largest = 0.0
    for ours, theirs in zip(embedded, team.layers(part), strict=True):
        assert ours.layers.shape == theirs.shape, (ours.layers.shape, theirs.shape)
        largest = max(largest, float((ours.layers - theirs).abs().max()))
    assert largest <= MAX_DIFFERENCE, f"the baseline differs from the engine by {largest}"
    return largest


def _work(pipe: Any, size: str, threads: int) -> None:
    """Run a process of a team until the other end closes the pipe."""
    torch.set_num_threads(threads)
    network = PublishedOrder(random_bilm(SIZES[size]))
    pipe.send("ready")
    while True:
        try:
            wish, batches = pipe.recv()
        except EOFError:
            return
        results = [network.run(batch) for batch in batches]
        pipe.send([layers.numpy() for layers in results[0]] if wish == "show" else None)
