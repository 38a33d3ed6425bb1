"""What came of a chaos run: a table for people, the same as JSON, and what of it is a failure."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fault.chaos_records import VERDICTS, Record, Verdict, Window, judge
from tests.fault.chaos_supervisor import End

_MAX_MORE_DESCRIPTORS = 2
_MAX_MORE_MIB = {"server": 128.0, "callers": 96.0}
_SHOWN = 10


@dataclass(frozen=True)
class Holdings:
    """What a process held before the faults and after them, with no connection open."""

    descriptors_before: int
    descriptors_after: int
    mib_before: float
    mib_after: float


@dataclass
class Outcome:
    """All that a run has found.

    Attributes:
        seed: Of the schedule.
        seconds: How long it took.
        exact: Whether answers were compared bit by bit.
        skipped: Faults that couldn't be injected, with the reason.
        windows: The faults.
        records: The calls.
        ends: How server processes ended.
        start_s: How long their starts took.
        holdings: Of both sides.
        hung: Callers that never came back.
        log_errors: Lines of the server's log that say ERROR.
        log_lines: How many lines it has.
        broken: What broke the run itself.
    """

    seed: int
    seconds: float = 0.0
    exact: bool = True
    skipped: str = ""
    windows: list[Window] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    holdings: dict[str, Holdings] = field(default_factory=dict)
    hung: list[str] = field(default_factory=list)
    log_errors: list[str] = field(default_factory=list)
    log_lines: int = 0
    broken: str = ""

    def judged(self) -> list[tuple[Record, Verdict]]:
        """The calls with what they mean."""
        return [(record, judge(record, self.windows)) for record in self.records]


def failures(outcome: Outcome) -> list[str]:
    """Everything that must not be; empty: the run has passed."""
    found = [f"{verdict}: {_line(record)}" for record, verdict in outcome.judged() if verdict in VERDICTS[3:]]
    found += [f"callers that never came back: {', '.join(outcome.hung)}"] if outcome.hung else []
    found += [f"the server ended with {end.code}, not {end.expected}" for end in outcome.ends if _is_bad(end)]
    found += [f"in the server's log: {line}" for line in outcome.log_errors]
    for side, held in outcome.holdings.items():
        if held.descriptors_after > held.descriptors_before + _MAX_MORE_DESCRIPTORS:
            found.append(f"{side}: {held.descriptors_before} descriptors became {held.descriptors_after}")
        if held.mib_after > held.mib_before + _MAX_MORE_MIB[side]:
            found.append(f"{side}: {held.mib_before:.0f} MiB became {held.mib_after:.0f}")
    if not any(verdict == "right" for _, verdict in outcome.judged()):
        found.append("no call was answered")
    return found + ([outcome.broken] if outcome.broken else [])


def write_json(outcome: Outcome, path: Path) -> None:
    """Writes all but the calls that went as they should."""
    judged = outcome.judged()
    report = {
        "seed": outcome.seed,
        "seconds": round(outcome.seconds, 1),
        "exact": outcome.exact,
        "skipped": outcome.skipped,
        "passed": not failures(outcome),
        "failures": failures(outcome),
        "calls": {f"{caller} {verdict}": n for (caller, verdict), n in sorted(_by_caller(judged).items())},
        "excused": dict(_excused(judged)),
        "faults": dict(Counter(window.kind for window in outcome.windows)),
        "windows": [asdict(window) for window in outcome.windows],
        "ends": [asdict(end) for end in outcome.ends],
        "start_s": [round(seconds, 2) for seconds in outcome.start_s],
        "holdings": {side: asdict(held) for side, held in outcome.holdings.items()},
        "log_lines": outcome.log_lines,
        "bad_calls": [{**asdict(record), "verdict": verdict} for record, verdict in judged if verdict in VERDICTS[2:]],
    }
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(outcome: Outcome) -> str:
    """The report for people."""
    return "\n".join(
        [*_head(outcome), "", *_calls(outcome), "", *_faults(outcome), "", *_sides(outcome), "", *_end(outcome)]
    )


def _head(outcome: Outcome) -> Iterator[str]:
    how = "bit by bit" if outcome.exact else "within the tolerance that this machine's arithmetic allows"
    yield f"Chaos, seed {outcome.seed}: {outcome.seconds:.0f} s, answers compared {how}"
    if outcome.skipped:
        yield f"left out: {outcome.skipped}"


def _calls(outcome: Outcome) -> Iterator[str]:
    judged = outcome.judged()
    counts = _by_caller(judged)
    yield f"{'calls':<18}" + "".join(f"{verdict:>12}" for verdict in VERDICTS)
    for caller in sorted({record.caller for record in outcome.records}):
        yield f"{caller:<18}" + "".join(f"{counts[caller, verdict]:>12,}" for verdict in VERDICTS)
    totals = Counter(verdict for _, verdict in judged)
    yield f"{'all':<18}" + "".join(f"{totals[verdict]:>12,}" for verdict in VERDICTS)
    if excused := _excused(judged):
        yield "excused: " + ", ".join(f"{n} × {status}" for status, n in excused.most_common())


def _faults(outcome: Outcome) -> Iterator[str]:
    yield f"{'faults':<18}{'times':>12}{'seconds':>12}"
    for kind, times in sorted(Counter(window.kind for window in outcome.windows).items()):
        seconds = sum(window.ended_s - window.begun_s for window in outcome.windows if window.kind == kind)
        yield f"{kind:<18}{times:>12}{seconds:>12.1f}"
    codes = Counter(end.code for end in outcome.ends)
    ended = ", ".join(f"{times} × exit code {code}" for code, times in sorted(codes.items()))
    starts = f"; starts took {min(outcome.start_s):.1f} to {max(outcome.start_s):.1f} s" if outcome.start_s else ""
    yield f"server processes: {ended}{starts}"


def _sides(outcome: Outcome) -> Iterator[str]:
    yield f"{'held, no calls':<18}{'descriptors':>16}{'MiB':>18}"
    for side, held in outcome.holdings.items():
        fds = f"{held.descriptors_before} → {held.descriptors_after}"
        yield f"{side:<18}{fds:>16}{f'{held.mib_before:.0f} → {held.mib_after:.0f}':>18}"
    yield f"server's log: {outcome.log_lines:,} lines, {len(outcome.log_errors)} of them errors"


def _end(outcome: Outcome) -> Iterator[str]:
    found = failures(outcome)
    yield from (f"  {line}" for line in found[:_SHOWN])
    if len(found) > _SHOWN:
        yield f"  … and {len(found) - _SHOWN} more"
    yield "passed" if not found else f"FAILED: {len(found)} failures"


def _by_caller(judged: Sequence[tuple[Record, Verdict]]) -> Counter[tuple[str, str]]:
    return Counter((record.caller, str(verdict)) for record, verdict in judged)


def _excused(judged: Sequence[tuple[Record, Verdict]]) -> Counter[str]:
    return Counter(record.status for record, verdict in judged if verdict == "excused")


def _is_bad(end: End) -> bool:
    return end.code != end.expected


def _line(record: Record) -> str:
    took_s = record.ended_s - record.begun_s
    return f"{record.caller} ({record.path}), {took_s:.1f} s: {record.status}, not {record.expected}; {record.detail}"
