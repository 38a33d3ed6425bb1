"""What a terminal shows of a run."""

from collections.abc import Iterator, Sequence
from typing import Any

from bilm_bench.reporting.numbers import short
from bilm_bench.reporting.report import Report
from bilm_bench.statistics.counters import StepCounters
from bilm_bench.statistics.metrics import step_metrics
from bilm_bench.workload.schedule import Step

_LATE_MS = 20.0
_BUSY_CORES = 0.9
_COLUMNS = (
    "offered/s", "answered/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "refused", "failed",
)  # fmt: skip
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")


def summary(report: Report) -> str:
    """Return a run as a page of text."""
    return "\n".join((*_head(report), "", *_table(report), "", *_rest(report["figures"]), *_verdict(report)))


def step_line(step: Step, counters: StepCounters, loop: str) -> str:
    """Return a step that has just ended as a line."""
    found = step_metrics(counters)
    accepted, refused = found["accepted"], found["refused"]
    return (
        f"{load_name(step.load, loop)}: {short(found['sentences_per_s'])} sentences/s answered, "
        f"p50 {short(accepted['p50_ms'])} ms, p99 {short(accepted['p99_ms'])} ms, "
        f"{refused['calls']:,} refused, {found['failed']:,} failed"
    )


def load_name(load: float, loop: str) -> str:
    """Return what a step's load is called."""
    return f"{short(load)} sentences/s" if loop == "open" else f"{load:.0f} callers"


def describe_load(report: Report) -> str:
    """Return the kind of load, in words."""
    choices = report["choices"]
    if choices["loop"] == "open":
        return "open loop (Poisson)"
    return "closed loop" if choices["ramp"] else f"closed loop, {choices['callers']} callers"


def describe_calls(report: Report) -> str:
    """Return what the calls ask for, in words."""
    choices, text = report["choices"], report["text"]
    per_call = choices["sentences_per_call"]
    return (
        f"{per_call} sentence{'s' if per_call > 1 else ''} a call, layers {choices['layers']}, pool {choices['pool']}, "
        f"{choices['dtype']}; priority {choices['priority']}; {choices['connections']} connections; "
        f"deadline {choices['timeout_s']:g} s; "
        f"retry {'as the client does' if choices['retry'] else 'off'}; {text['sentences']:,} sentences of "
        f"{text['median_tokens']:g} tokens (median), {text['longest_tokens']:,} at most"
    )


def _head(report: Report) -> Iterator[str]:
    model = report["model"]
    interrupted = ", interrupted" if report["interrupted"] else ""
    yield f"{report['choices']['target']}: {model['name']} {model['version'][:12]}, {model['backend']}"
    yield f"{describe_load(report)}, {report['figures']['length_s']:.0f} s under load{interrupted}"
    yield describe_calls(report)


def _table(report: Report) -> Iterator[str]:
    """Yield a line for each step and, of several, their sum; latencies are of accepted calls."""
    rows = [_row(step) for step in report["steps"]]
    if len(rows) != 1:
        rows.append(_row(report["figures"]))
    closed = report["choices"]["loop"] == "closed"
    names = [load_name(step["load"], "closed") if closed else "" for step in report["steps"]]
    if len(rows) > len(names):
        names.append("all")
    yield from _aligned([("", *_COLUMNS), *((name, *row) for name, row in zip(names, rows, strict=True))])


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    rates = (found["offered_sentences_per_s"], found["sentences_per_s"], found["tokens_per_s"])
    latencies = (found["accepted"][name] for name in _PERCENTILES)
    return (*map(short, (*rates, *latencies)), f"{found['refused']['calls']:,}", f"{found['failed']:,}")


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True) if width)
        yield "  ".join(cells)


def _rest(found: dict[str, Any]) -> Iterator[str]:
    refused, health, bench = found["refused"], found["health"], found["bench"]
    yield f"since sent   {_latencies(found['accepted']['since_sent'])}"
    if refused["calls"]:
        yield (
            f"refused      {_latencies(refused)}; with a pushback {refused['with_pushback']:,} "
            f"(p50 {short(refused['pushback_p50_ms'])} ms), retrying can't help {refused['never_retry']:,}, "
            f"without {refused['without_pushback']:,}"
        )
    for error in found["errors"]:
        reason = f" {error['reason']}" if error["reason"] else ""
        text = f": {error['message']}" if error["message"] else ""
        yield f"  {error['calls']:,} × {error['status']}{reason}{text}"
    for reason, count in found["sentence_errors"].items():
        yield f"  {count:,} sentences × {reason}"
    if found["checked_answers"]:
        yield f"verified     {found['checked_answers']:,} answers, {found['wrong_answers']:,} wrong"
    if found["overdue"] or found["unfinished"]:
        yield f"deadlines    {found['overdue']:,} calls ended a second or more late; {found['unfinished']:,} given up"
    answers = f"{health['checks']:,} checks, {health['not_serving']:,} not SERVING, {health['unanswered']:,} unanswered"
    yield f"health       {_latencies(health)}; {answers}"
    yield _resources("server", found["server"])
    yield _resources("bench", bench)
    yield f"generator    {bench['cores']:.2f} cores, sends {short(found['late_p99_ms'])} ms late at p99"
    if bench["cores"] > _BUSY_CORES or (found["late_p99_ms"] or 0) > _LATE_MS:
        yield "             It was late or busy itself: the latencies are in part its own."


def _latencies(found: dict[str, Any]) -> str:
    return f"p50 {short(found['p50_ms'])}, p99 {short(found['p99_ms'])}, max {short(found['max_ms'])} ms"


def _resources(name: str, found: dict[str, Any]) -> str:
    if found["memory_mib_last"] is None and found["descriptors_last"] is None:
        return f"{name:<12} memory and descriptors not read (--server-pid, --metrics-url)"
    parts = []
    for key, unit in (("memory_mib", "MiB"), ("descriptors", "descriptors")):
        slope = found[f"{key}_per_hour"]
        an_hour = "" if slope is None else f", {slope:+,.1f} an hour"
        first, last, most = (short(found[f"{key}_{when}"]) for when in ("first", "last", "max"))
        parts.append(f"{first} → {last} {unit} (at most {most}{an_hour})")
    return f"{name:<12} {'; '.join(parts)}"


def _verdict(report: Report) -> Iterator[str]:
    for condition in report["conditions"]:
        verdict = "VIOLATED" if condition["violated"] else "fine"
        yield f"{verdict:<12} not {condition['condition']}: {short(condition['value'])}"
