"""Single sentences beside a batch run on the same server: what they wait for, and what both compute together."""

import re
import socket
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Spread, ratio
from bilm_client.testing.server import ServerProcess

from benchmarks.experiments.served import SERVER_ARGUMENTS
from benchmarks.load.load import LoadGenerator

ROUNDS_TARGET = 3.0
"""Rounds of the batch run that may be added to the p99 of single sentences."""
TOGETHER_TARGET = 75.0
"""Per cent of the peak that both compute together."""

_SEED, _MOST_IN_FLIGHT = 0, 4096
_ROUNDS = re.compile(r'^bilm_rounds_total\{[^}]*result="ok"[^}]*\} (\S+)', re.MULTILINE)
_PAGE_TIMEOUT_S = 10.0

Sentences = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Company:
    """Single sentences beside a batch run.

    Attributes:
        share: of the server's peak that single sentences make up (Poisson).
        callers: of the batch run.
        per_call: sentences of each of its calls; with all callers more than the server has rows.
        warm_s: from the begin of a closed loop until it counts.
        seconds: of a round, alone and beside it.
    """

    share: float = 0.3
    callers: int = 4
    per_call: int = 64
    warm_s: float = 1.0
    seconds: float = 6.0


@dataclass(frozen=True)
class _Round:
    """What one round has found.

    Attributes:
        peak: tokens/s of interactive callers that saturate the server.
        alone: what single sentences found alone.
        beside: what they found beside the batch run.
        batch: what the batch run did meanwhile.
        batch_round_ms: length of a round of the batch run with nothing beside it.
    """

    peak: float
    alone: dict[str, Any]
    beside: dict[str, Any]
    batch: dict[str, Any]
    batch_round_ms: float

    @property
    def added_rounds(self) -> float:
        return float(self.beside["p99_ms"] - self.alone["p99_ms"]) / self.batch_round_ms

    @property
    def together(self) -> float:
        """Tokens/s of both."""
        return float(self.beside["tokens_per_s"] + _tokens_per_s(self.batch))


class _Server:
    """A server with two load generators."""

    def __init__(self, source: str, n_sentences: int, company: Company) -> None:
        self._source, self._n, self._company = source, n_sentences, company
        self._stack = ExitStack()
        self.rate = 0.0
        """Single sentences a second."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            port = _free_port()
            self._page = f"http://127.0.0.1:{port}/metrics"
            arguments = (*SERVER_ARGUMENTS, "--metrics-listen", f"127.0.0.1:{port}")
            server = stack.enter_context(ServerProcess(self._source, arguments))
            self._interactive = stack.enter_context(LoadGenerator(server.target, self._n))
            self._batch = stack.enter_context(LoadGenerator(server.target, self._n, priority="batch"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def round(self) -> _Round:
        """Measure everything once."""
        beside, batch = self.beside()
        return _Round(_tokens_per_s(self.peak()), self.alone(), beside, batch, self.batch_round_ms())

    def peak(self) -> dict[str, Any]:
        """Return what interactive callers get that saturate the server."""
        return self._closed(self._interactive)

    def alone(self) -> dict[str, Any]:
        """Return what single sentences find."""
        return self._interactive.open(self.rate, self._company.seconds, _SEED, _MOST_IN_FLIGHT)

    def beside(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what single sentences find beside a batch run, and what that does meanwhile."""
        with ThreadPoolExecutor(1) as running:
            batch = running.submit(self._closed, self._batch)
            time.sleep(self._company.warm_s)
            return self.alone(), batch.result()

    def batch_round_ms(self) -> float:
        """Return the length of the rounds of a batch run, which leaves no time between them."""
        with ThreadPoolExecutor(1) as running:
            batch = running.submit(self._closed, self._batch)
            time.sleep(self._company.warm_s)
            begun_s, before = time.perf_counter(), self._rounds()
            time.sleep(self._company.seconds / 2)
            took_s, rounds = time.perf_counter() - begun_s, self._rounds() - before
            batch.result()
        return 1e3 * took_s / rounds

    def _closed(self, generator: LoadGenerator) -> dict[str, Any]:
        company = self._company
        return generator.closed(company.callers, company.per_call, company.warm_s, company.seconds)

    def _rounds(self) -> float:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self._page, timeout=_PAGE_TIMEOUT_S) as response:
            found = _ROUNDS.search(response.read().decode())
        assert found is not None  # the server has one model
        return float(found[1])


def beside_batch_run(report: Findings, source: str, sentences: Sentences, rounds: int, company: Company) -> None:
    """Measure single sentences alone and beside a batch run, that run, and the server's peak, in turns."""
    with _Server(source, len(sentences), company) as server:
        server.peak()  # the words are new
        tokens = sum(map(len, sentences)) / len(sentences)
        server.rate = company.share * _tokens_per_s(server.peak()) / tokens
        found = [server.round() for _ in range(rounds + 1)][1:]  # the first one warms up
    _report(report, company, server.rate, found)


def _report(report: Findings, company: Company, rate: float, found: Sequence[_Round]) -> None:
    alone = [float(each.alone["p99_ms"]) for each in found]
    beside = [float(each.beside["p99_ms"]) for each in found]
    refused = [float(each.beside["failed"]) for each in found]
    together = ratio([100 * each.together for each in found], [each.peak for each in found])
    report.detail(
        "beside a batch run",
        {
            "rate_per_s": rate,
            "alone p99_ms": alone,
            "beside p99_ms": beside,
            "batch_round_ms": [each.batch_round_ms for each in found],
            "peak_tokens_per_s": [each.peak for each in found],
            "interactive_tokens_per_s": [each.beside["tokens_per_s"] for each in found],
            "batch_tokens_per_s": [_tokens_per_s(each.batch) for each in found],
            "errors": [each.beside["errors"] for each in found],
        },
    )
    what = f"{rate:.0f} single sentences/s, {100 * company.share:.0f} % of the peak"
    three = Spread.of([ROUNDS_TARGET * each.batch_round_ms for each in found])
    added = Spread.of([each.added_rounds for each in found])
    report.add(
        Finding("beside/alone", f"{what}: alone, p99", Spread.of(alone), "ms"),
        Finding(
            "beside/beside", f"  beside a batch run of {company.callers} × {company.per_call}, p99",
            Spread.of(beside), "ms",
        ),
        Finding("beside/three_rounds", f"  {ROUNDS_TARGET:g} rounds of the batch run", three, "ms"),
        Finding("beside/rounds", "  added by it, in its rounds", added, "rounds", ROUNDS_TARGET, at_least=False),
        Finding("beside/refused", "  refused or failed beside it", Spread.of(refused), "calls", 0.0, at_least=False),
        Finding("beside/together", "  both together, of the peak's tokens/s", together, "%", TOGETHER_TARGET),
    )  # fmt: skip


def _tokens_per_s(closed: dict[str, Any]) -> float:
    return float(closed["tokens"] / closed["seconds"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
