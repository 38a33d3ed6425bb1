"""`make bench-memory`: a server's memory from its start through mixed requests; ten minutes, or `--minutes 60`.

Callers send single sentences and batches, pooled and whole, in all number formats, streams, long documents and words
that nobody has seen. What counts is the private memory (RssAnon) of the server with its default settings.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.metrics import slope_per_hour
from bilm_bench.statistics.rounds import Spread
from bilm_client import Client
from bilm_model.engine.options import EngineOptions
from bilm_system.terminal import run_command

from benchmarks.experiments.start import SETTLE_S, StartedServer
from benchmarks.load.sentences import read_sentences
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.process_usage import memory_mib

OVER_CACHES_MIB_TARGET = 120.0
PRIVATE_MIB_TARGET, RESIDENT_MIB_TARGET = 230.0, 420.0
GROWTH_MIB_TARGET = 20.0
"""An hour, in the second half of the run: less than the samples' own changes."""

_SENTENCES = 8000
_LAYERS, _POOLS, _DTYPES = ("all", "top", "average"), ("none", "mean", "max"), ("float32", "float16", "bfloat16")
_MOST_PER_CALL, _STREAMED, _LONGEST = 48, 200, 4000
_NEW_WORDS = 30

Memory = dict[str, float]


class MixedRequests:
    """Threads that send all kinds of requests until they are stopped, as a context manager.

    Args:
        target: of the server.
        callers: threads, each with a client of its own.
    """

    def __init__(self, target: str, callers: int) -> None:
        self._target, self._sentences = target, read_sentences(_SENTENCES)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(callers)]
        self._failures: list[BaseException] = []
        self._counting = threading.Lock()
        self.sentences = 0

    def __enter__(self) -> "MixedRequests":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    @property
    def failed(self) -> bool:
        """Whether a request has failed."""
        return bool(self._failures)

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        kinds: tuple[tuple[Callable[[Client, random.Random], int], int], ...] = (
            (self._single, 50), (self._batch, 30), (self._new_words, 10), (self._stream, 5), (self._document, 5),
        )  # fmt: skip
        try:
            with Client(self._target, timeout_s=600.0) as client:
                while not self._stopped.is_set():
                    (kind,) = draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
                    done = kind(client, draw)
                    with self._counting:
                        self.sentences += done
        except BaseException as error:
            self._failures.append(error)

    def _single(self, client: Client, draw: random.Random) -> int:
        return self._embed(client, draw, [draw.choice(self._sentences)])

    def _batch(self, client: Client, draw: random.Random) -> int:
        return self._embed(client, draw, draw.choices(self._sentences, k=draw.randint(2, _MOST_PER_CALL)))

    def _new_words(self, client: Client, draw: random.Random) -> int:
        words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(3, 14))) for _ in range(_NEW_WORDS)]
        return self._embed(client, draw, [words])

    def _stream(self, client: Client, draw: random.Random) -> int:
        part = draw.choices(self._sentences, k=draw.randint(1, _STREAMED))
        return sum(1 for _ in client.embed_stream(part, **_options(draw)))

    def _document(self, client: Client, draw: random.Random) -> int:
        n_tokens, words = draw.randint(500, _LONGEST), list[str]()
        while len(words) < n_tokens:
            words += draw.choice(self._sentences)
        return sum(1 for _ in client.embed_stream([words[:n_tokens]], **_options(draw)))

    def _embed(self, client: Client, draw: random.Random, sentences: list[list[str]]) -> int:
        return len(client.embed(sentences, **_options(draw)))


def _options(draw: random.Random) -> dict[str, Any]:
    return {"layers": draw.choice(_LAYERS), "pool": draw.choice(_POOLS), "dtype": draw.choice(_DTYPES)}


def mixed_requests(report: Findings, model: str, minutes: float, sample_s: float, callers: int) -> None:
    """Measure a server's memory after its start and while it gets mixed requests."""
    with ExitStack() as stack:
        caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bilm-bench-")))
        with StartedServer(model, caches):
            pass  # compiles the kernels
        server = stack.enter_context(StartedServer(model, caches))
        time.sleep(SETTLE_S)
        at_start = memory_mib(server.process_id)
        requests = stack.enter_context(MixedRequests(server.target, callers))
        samples = list(_samples(server.process_id, requests, 60 * minutes, sample_s))
    report.detail("mixed requests", {"start": at_start, "sentences": requests.sentences, "samples": samples})
    _report(report, at_start, samples)


def _samples(
    process_id: int, requests: MixedRequests, seconds: float, sample_s: float
) -> Iterator[tuple[float, Memory]]:
    begun_s = time.perf_counter()
    while (at_s := time.perf_counter() - begun_s) < seconds and not requests.failed:
        time.sleep(min(sample_s, seconds - at_s))
        found = memory_mib(process_id)
        at_s = time.perf_counter() - begun_s
        print(f"  {at_s:6.0f} s: {json.dumps(found)}, {requests.sentences:,} sentences", flush=True)
        yield at_s, found


def _report(report: Findings, at_start: Memory, samples: list[tuple[float, Memory]]) -> None:
    options = EngineOptions().resolved(torch.device("cpu"))
    caches_mib = float(options.token_cache_mib + (options.input_cache_mib or 0))
    second_half = [(at_s, found["RssAnon"]) for at_s, found in samples if at_s >= samples[-1][0] / 2]
    peak = max(found["RssAnon"] for _, found in samples)
    bound = at_start["RssAnon"] + caches_mib + OVER_CACHES_MIB_TARGET
    growth = slope_per_hour(second_half)
    report.add(
        _one("memory/start/private", "private memory after the start", at_start["RssAnon"], PRIVATE_MIB_TARGET),
        _one("memory/start/resident", "resident memory after the start", at_start["VmRSS"], RESIDENT_MIB_TARGET),
        _one("memory/mixed/private", "private memory, most during mixed requests", peak, bound),
        _one("memory/mixed/over", "  beyond start and caches", peak - at_start["RssAnon"] - caches_mib, None),
        _one("memory/mixed/last", "  at the end", samples[-1][1]["RssAnon"], None),
    )
    if growth is not None:
        what = "  growth in the second half"
        report.add(
            Finding("memory/mixed/growth", what, Spread.of([growth]), "MiB/h", GROWTH_MIB_TARGET, at_least=False)
        )


def _one(key: str, what: str, mib: float, target: float | None) -> Finding:
    return Finding(key, what, Spread.of([mib]), "MiB", target, at_least=False)


def main() -> None:
    """Run it."""
    arguments = _arguments()
    settings = {name: getattr(arguments, name) for name in ("model", "minutes", "sample_s", "callers")}
    report = new_report("memory", "benchmarks.experiments.memory", settings)
    mixed_requests(report, arguments.model, arguments.minutes, arguments.sample_s, arguments.callers)
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="as bilm-serve's --model (the one that ships)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of mixed requests (%(default)s)")
    parser.add_argument("--sample-s", type=float, default=10.0, help="between samples (%(default)s)")
    parser.add_argument("--callers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.memory", main))
