"""What a caller waits for: the service's own share, pauses, and other callers' long sentences."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import repeat

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.percentiles import percentile
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client import Client
from bilm_client.errors import BilmError
from bilm_client.testing.server import ServerProcess
from bilm_model.config import SIZES
from bilm_model.engine.options import EngineOptions

from benchmarks.experiments.in_process import Effort
from benchmarks.experiments.served import response_of
from benchmarks.load.engine_process import EngineProcess
from benchmarks.load.engines import POOLED_TOP, engine_of, new_batch, show_all_words
from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import sentence_of
from benchmarks.load.steady import SteadyLoad, Work
from benchmarks.references.bare_server import BareServer

ADDED_LATENCY_TARGET_MS = 1.0
ADDED_ROUND_TRIPS_TARGET = 1.6
PACED_TARGET = 1.4
SHORT_AMONG_LONG_TARGET = 1.2
PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_QUIET = ("--log-level", "warning")
_SPARE_TICKS = 3
_BOUNDARIES = 2
_SERVER_STREAM_TOKENS = 65536  # its default
_CROWD_GATHERS_S = 2.0

Sentences = Sequence[Sequence[str]]


def added_latency(report: Findings, source: str, sentences: Sentences, effort: Effort) -> None:
    """Measure one sentence at a time, in process, through the server and through a bare handler, in turns."""
    name, n = source.rpartition(":")[2] or "default", len(sentences)
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(source, _QUIET))
        bare = stack.enter_context(BareServer(response_of(server, sentences, 1)))
        engine = stack.enter_context(EngineProcess(n, model=source, layers="all"))
        calls = {
            "in process": engine.singles,
            "served": stack.enter_context(LoadGenerator(server.target, n)).singles,
            "bare": stack.enter_context(LoadGenerator(bare.target, n)).singles,
        }
        p50 = {way: partial(_p50_ms, singles, effort.singles) for way, singles in calls.items()}
        interleave(p50, 1)  # the words are new
        found = interleave(p50, effort.rounds)
    report.detail(f"added latency {name}", {f"{way} p50_ms": values for way, values in found.items()})
    added = [served - alone for served, alone in zip(found["served"], found["in process"], strict=True)]
    what = f"{name} float32, one sentence at a time, p50"
    target_ms = None if source == "" else ADDED_LATENCY_TARGET_MS
    target = ADDED_ROUND_TRIPS_TARGET if source == "" else None
    round_trips = ratio(added, found["bare"])
    report.add(
        Finding(f"added/{name}/in_process", f"{what} in process", Spread.of(found["in process"]), "ms"),
        Finding(f"added/{name}/served", f"{what} served", Spread.of(found["served"]), "ms"),
        Finding(f"added/{name}/bare", "  a bare grpc.aio handler, p50", Spread.of(found["bare"]), "ms"),
        Finding(f"added/{name}", "  added", Spread.of(added), "ms", target_ms, at_least=False),
        Finding(f"added/{name}/round_trips", "  added, in bare calls", round_trips, "×", target, at_least=False),
    )


def _p50_ms(singles: Callable[[int, int], list[float]], count: int) -> float:
    return percentile(singles(0, count), 50)


def paced(report: Findings, sentences: Sentences, effort: Effort, pace: "Pace") -> None:
    """Measure the model that ships, in process, on a sentence of known words that comes after pauses."""
    with EngineProcess(len(sentences)) as engine:
        contestants: dict[str, Contestant] = {
            "paced": lambda: percentile(engine.paced(pace.tokens, pace.calls, pace.pause_s), 50),
            "back to back": lambda: percentile(engine.paced(pace.tokens, pace.calls * pace.more, 0.0), 50),
        }
        interleave(contestants, 1)
        found = interleave(contestants, effort.rounds)
    report.detail("paced", {f"{name} p50_ms": values for name, values in found.items()})
    what = f"the model that ships, {pace.tokens} known words in process"
    report.add(
        Finding("paced/back_to_back", f"{what}, back to back: p50", Spread.of(found["back to back"]), "ms"),
        Finding("paced/paced", f"  every {pace.pause_s:g} s: p50", Spread.of(found["paced"]), "ms"),
        Finding(
            "paced", "  against back to back", ratio(found["paced"], found["back to back"]), "×", PACED_TARGET,
            at_least=False,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """A sentence that comes after pauses.

    Attributes:
        tokens: of the sentence.
        pause_s: before each time.
        calls: of a round.
        more: times as many back to back.
    """

    tokens: int = 25
    pause_s: float = 0.25
    calls: int = 15
    more: int = 5


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
    def max_tokens(self) -> int:
        """In flight: rows are what is scarce, not tokens."""
        return max(_SERVER_STREAM_TOKENS, 4 * self.rows * self.long_tokens)

    @property
    def arguments(self) -> tuple[str, ...]:
        """For the server; nor is memory for responses scarce."""
        tokens = str(self.max_tokens)
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
    batch = new_batch(crowd.size, EngineOptions(max_rows=crowd.rows, max_tokens=crowd.max_tokens))
    show_all_words(batch, sentences)
    long = [sentence_of(crowd.long_tokens, sentences)] * crowd.rows
    load = SteadyLoad(engine_of(batch, SIZES[crowd.size]), long, crowd.rows, POOLED_TOP)
    load.measure(crowd.full_s / 4)
    return load.measure(crowd.full_s)


def _one(values: Sequence[float], percent: float) -> Spread:
    """Return a percentile of a single run."""
    return Spread.of([percentile(values, percent)])
