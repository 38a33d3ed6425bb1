"""What a caller waits for: the service's own share, long sentences of others, the start."""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.percentiles import percentile
from bilm_bench.statistics.rounds import Spread
from bilm_client import Client
from bilm_client.errors import BilmError
from bilm_client.testing.server import ServerProcess
from bilm_model.bilm import random_bilm
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence
from bilm_model.weights import single_file
from bilm_model.weights.loading import load as load_model

from benchmarks.experiments.in_process import Effort
from benchmarks.experiments.served import finish
from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import sentence_of
from benchmarks.load.steady import SteadyLoad, Work, new_engine, show_all_words

ADDED_LATENCY_TARGET_MS = 1.0
SHORT_AMONG_LONG_TARGET = 1.5
START_TARGETS_S = {"default": 4.0, "original": 8.0}
IMPORT_TARGET_S = 0.3
PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)

_SETTLE_S = 0.1
_QUIET = ("--log-level", "warning")
_IMPORT = """
import time
begun_s = time.process_time()
from bilm_client import AsyncClient, Client
print(time.process_time() - begun_s)
"""
_SPARE_TICKS = 3
_BOUNDARIES = 2
_SERVER_STREAM_TOKENS = 65536  # its default
_CROWD_GATHERS_S = 2.0

Sentences = Sequence[Sequence[str]]


def added_latency(report: Findings, source: str, sentences: Sentences, effort: Effort) -> None:
    """Measure one sentence at a time, in process and through the server, in turns."""
    name = source.rpartition(":")[2] or "default"
    engine = CellularBatch(load_model(source).bilm, torch.device("cpu"))
    engine.warm_up()
    make_bytes = finish("mean", "float32")

    def in_process(first: int) -> list[float]:
        return [_timed_ms(engine, tokens, make_bytes) for tokens in sentences[first : first + effort.singles]]

    added, p50 = [], {"in process": list[float](), "served": list[float]()}
    with ServerProcess(source, _QUIET) as server, LoadGenerator(server.target, len(sentences)) as generator:
        for number in range(effort.rounds + 1):
            time.sleep(_SETTLE_S)
            alone = in_process(0)
            time.sleep(_SETTLE_S)
            served = generator.singles(0, len(alone))
            if number:  # in the first round the words are new
                p50["in process"].append(percentile(alone, 50))
                p50["served"].append(percentile(served, 50))
                added.append(p50["served"][-1] - p50["in process"][-1])
    report.detail(f"added latency {name}", {f"{way} p50_ms": found for way, found in p50.items()})
    what = f"{name} float32, one sentence at a time, p50"
    report.add(
        Finding(f"added/{name}/in_process", f"{what} in process", Spread.of(p50["in process"]), "ms"),
        Finding(f"added/{name}/served", f"{what} served", Spread.of(p50["served"]), "ms"),
        Finding(f"added/{name}", "  added", Spread.of(added), "ms", ADDED_LATENCY_TARGET_MS, at_least=False),
    )


@dataclass(frozen=True)
class Crowd:
    """Long sentences in the way of short ones.

    Attributes:
        size: of the model.
        rows: of the server; twice as many long sentences are in it.
        long_tokens: of each long one.
        short_tokens: of each short one.
        calls: with short ones.
        pause_s: between them.
        full_s: for which the engine is measured with all rows in flight.
    """

    size: str = "small"
    rows: int = 32
    long_tokens: int = 2000
    short_tokens: int = 10
    calls: int = 150
    pause_s: float = 0.03
    full_s: float = 2.0

    @property
    def arguments(self) -> tuple[str, ...]:
        """For the server: rows are what is scarce, not tokens or memory for answers."""
        tokens = str(max(_SERVER_STREAM_TOKENS, 4 * self.rows * self.long_tokens))
        return (
            *_QUIET,
            *("--max-rows", str(self.rows), "--max-tokens-in-flight", tokens, "--max-stream-tokens", tokens),
            *("--max-stream-items-in-flight", str(2 * self.rows)),
        )


def short_among_long(report: Findings, sentences: Sentences, crowd: Crowd) -> None:
    """Measure short sentences that arrive while more long ones are queued than there are rows."""
    full = [_full(crowd, sentences)]
    with ServerProcess(f"random:{crowd.size}", crowd.arguments) as server, Client(server.target) as client:
        short = [[sentence_of(crowd.short_tokens, sentences[number % len(sentences) :])] for number in range(50)]
        for one in short:
            client.embed(one)  # words known
        alone = _short_calls(client, short, crowd)
        with _Long(server.target, sentence_of(crowd.long_tokens, sentences), 2 * crowd.rows) as long:
            crowded = _short_calls(client, short, crowd)
            ended = long.ended
    full.append(_full(crowd, sentences))
    _report_short(report, crowd, full, alone, crowded)
    report.details["short among long"]["long_ended_meanwhile"] = ended


def _report_short(report: Findings, crowd: Crowd, full: list[Work], alone: list[float], crowded: list[float]) -> None:
    tick_ms = [1e3 * work.seconds / work.ticks for work in full]
    chunk_ticks = round(full[0].ticks / full[0].rounds)
    ticks = crowd.short_tokens + _BOUNDARIES + chunk_ticks + _SPARE_TICKS
    report.detail(
        "short among long",
        {
            "percents": PERCENTS,
            "alone_ms": [percentile(alone, percent) for percent in PERCENTS],
            "among_long_ms": [percentile(crowded, percent) for percent in PERCENTS],
            "tick_ms_before_and_after": tick_ms,
            "ticks": ticks,
            "chunk_ticks": chunk_ticks,
            "rows": crowd.rows,
        },
    )
    p99 = percentile(crowded, 99)
    what = f"{crowd.size}, {crowd.rows} rows: {crowd.short_tokens}-token sentence among {crowd.long_tokens}-token ones"
    report.add(
        Finding("short/alone", f"{what[: what.index(':')]}: the same with nothing else, p99", _one(alone, 99), "ms"),
        Finding("short/p50", f"{what}, p50", _one(crowded, 50), "ms"),
        Finding("short/p99", f"{what}, p99", _one(crowded, 99), "ms"),
        Finding("short/bound", f"  {ticks} ticks at the row limit, in process", Spread.of(tick_ms).times(ticks), "ms"),
        Finding(
            "short/ratio",
            "  p99 against these ticks",
            Spread.of([p99 / (ticks * ms) for ms in tick_ms]),
            "×",
            SHORT_AMONG_LONG_TARGET,
            at_least=False,
        ),
    )


def start_to_serving(report: Findings, effort: Effort, sizes: Sequence[str] = ("default", "original")) -> None:
    """Measure from the process's start until it is SERVING; the weights are a file in the page cache."""
    with tempfile.TemporaryDirectory(prefix="bilm-bench-") as folder:
        sources = {size: _weights(size, Path(folder)) for size in sizes}
        found: dict[str, list[float]] = {size: [] for size in sizes}
        for number in range(effort.rounds):
            for size in reversed(sizes) if number % 2 else sizes:
                begun_s = time.perf_counter()
                with ServerProcess(sources[size], _QUIET):
                    found[size].append(time.perf_counter() - begun_s)
    report.detail("start", found)
    for size, seconds in found.items():
        what = f"start to SERVING, {size} {'model' if size == 'default' else 'size'}"
        report.add(Finding(f"start/{size}", what, Spread.of(seconds), "s", START_TARGETS_S.get(size), at_least=False))


def client_import(report: Findings, effort: Effort) -> None:
    """Measure the processor time of the client's import, in a new process each round."""
    seconds = [_import_s() for _ in range(effort.rounds)]
    report.detail("import", seconds)
    report.add(
        Finding("import/client", "import of the client", Spread.of(seconds), "s", IMPORT_TARGET_S, at_least=False)
    )


def _import_s() -> float:
    done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
    return float(done.stdout)


class _Long:
    """A caller who streams long sentences, ever so many of them, until he leaves."""

    def __init__(self, target: str, tokens: list[str], window: int) -> None:
        self._client = Client(target, timeout_s=600.0)
        self._stream = self._client.embed_stream(repeat(tokens), layers="top", pool="mean", window=window)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._left = False
        self._failure: BilmError | None = None
        self.ended = 0

    def __enter__(self) -> "_Long":
        self._thread.start()
        time.sleep(_CROWD_GATHERS_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._client.close()
        self._thread.join()
        if self._failure is not None:  # then the short sentences had the server to themselves
            raise self._failure

    def _read(self) -> None:
        try:
            for _ in self._stream:
                self.ended += 1
        except BilmError as error:
            self._failure = None if self._left else error


def _short_calls(client: Client, short: list[list[list[str]]], crowd: Crowd) -> list[float]:
    latencies_ms = []
    for number in range(crowd.calls):
        time.sleep(crowd.pause_s)
        begun_s = time.perf_counter()
        client.embed(short[number % len(short)], layers="top", pool="mean")
        latencies_ms.append(1e3 * (time.perf_counter() - begun_s))
    return latencies_ms


def _full(crowd: Crowd, sentences: Sentences) -> Work:
    """Return the engine of the server with all rows taken by long sentences, in process."""
    engine = new_engine(crowd.size, EngineOptions(max_rows=crowd.rows))
    show_all_words(engine, sentences)
    load = SteadyLoad(engine, [sentence_of(crowd.long_tokens, sentences)] * crowd.rows, crowd.rows)
    load.measure(crowd.full_s / 4)
    return load.measure(crowd.full_s)


def _one(values: Sequence[float], percent: float) -> Spread:
    """Return a percentile of a single run."""
    return Spread.of([percentile(values, percent)])


def _timed_ms(engine: CellularBatch, tokens: Sequence[str], make_bytes: Callable[[EmbeddedSentence], bytes]) -> float:
    begun_s = time.perf_counter()
    for embedded in engine.run([PlainSentence(tuple(tokens))]):
        make_bytes(embedded)
    return 1e3 * (time.perf_counter() - begun_s)


def _weights(size: str, folder: Path) -> str:
    """Return the model as --model takes it."""
    if size == "default":
        return ""
    path = folder / f"{size}.safetensors"
    bilm = random_bilm(SIZES[size])
    single_file.write(path, bilm.config, bilm.state_dict())
    return str(path)
