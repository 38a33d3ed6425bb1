"""The report of `bilm-bench` as an HTML page."""

from typing import Any

from bilm_bench.reporting import plots
from bilm_bench.reporting.numbers import short
from bilm_bench.reporting.page import document, escaped, plot_section, table
from bilm_bench.reporting.report import Report
from bilm_bench.reporting.summary import describe_calls, describe_load, load_name

_PLOTS = (
    ("throughput_against_load", "Throughput against load", "What was answered while the step went on."),
    ("latency_against_load", "Latency against load", "Of accepted calls, from the moment for which each was meant."),
    ("calls_over_time", "Calls over time", "By when they ended."),
    ("latency_over_time", "Latency over time", "Of accepted calls that ended since the sample before."),
    ("resources_over_time", "Memory and descriptors", "Of the server, and of the bench itself."),
)

_STEP_HEAD = (
    "load", "offered/s", "answered/s", "tokens/s", "p50 ms", "p90", "p99", "p99.9", "max",
    "refused", "p99 ms", "failed",
)  # fmt: skip
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")


def load_page(report: Report) -> str:
    """Return the page's text."""
    parts = [_head(report), _conditions(report)]
    for name, title, words in _PLOTS:
        if (svg := getattr(plots, name)(report)) is not None:
            parts.append(plot_section(title, words, svg))
    parts += [_steps(report), _errors(report["figures"]), _beside(report["figures"]), _settings(report)]
    return document("bilm-bench", parts)


def _head(report: Report) -> str:
    model, figures = report["model"], report["figures"]
    interrupted = " <span class=bad>Interrupted.</span>" if report["interrupted"] else ""
    server = f"{report['choices']['target']}: {model['name']} {model['version'][:12]}, {model['backend']}"
    load = f"{describe_load(report)}, {figures['length_s']:.0f} s under load from {report['begun']}"
    return (
        f"<p><b>{escaped(server)}</b><br>{escaped(load)}.{interrupted}<br>"
        f"<span class=soft>{escaped(describe_calls(report))}</span></p>"
    )


def _conditions(report: Report) -> str:
    rows = [
        (
            f"not {condition['condition']}",
            short(condition["value"]),
            ("violated", "bad") if condition["violated"] else ("fine", "good"),
        )
        for condition in report["conditions"]
    ]
    return table("Conditions", ("condition", "found", ""), rows)


def _steps(report: Report) -> str:
    loop = report["choices"]["loop"]
    rows = [(load_name(step["load"], loop), *_step(step)) for step in report["steps"]]
    if len(rows) != 1:
        rows.append(("all", *_step(report["figures"])))
    note = (
        "Latencies are of accepted calls, from the moment for which each was meant; beside the refused calls, theirs."
    )
    return table("Steps", _STEP_HEAD, rows, note)


def _step(found: dict[str, Any]) -> tuple[str, ...]:
    rates = (found["offered_sentences_per_s"], found["sentences_per_s"], found["tokens_per_s"])
    latencies = (found["accepted"][name] for name in _PERCENTILES)
    refused = (f"{found['refused']['calls']:,}", short(found["refused"]["p99_ms"]))
    return (*map(short, (*rates, *latencies)), *refused, f"{found['failed']:,}")


def _errors(found: dict[str, Any]) -> str:
    rows = [
        (f"{error['status']} {error['reason']}", f"{error['calls']:,}", error["message"]) for error in found["errors"]
    ]
    rows += [(f"sentences: {reason}", f"{count:,}", "") for reason, count in found["sentence_errors"].items()]
    return table("Refusals and errors", ("status, reason", "calls", "first message"), rows)


def _beside(found: dict[str, Any]) -> str:
    health, refused = found["health"], found["refused"]
    rows: list[tuple[str, str]] = [
        ("health checks", f"{health['checks']:,}"),
        ("health: p50 / p99 / max, ms", " / ".join(short(health[name]) for name in ("p50_ms", "p99_ms", "max_ms"))),
        ("health: not SERVING / unanswered", f"{health['not_serving']:,} / {health['unanswered']:,}"),
        ("refused: p50 / p99, ms", f"{short(refused['p50_ms'])} / {short(refused['p99_ms'])}"),
        ("refused with / without a pushback", f"{refused['with_pushback']:,} / {refused['without_pushback']:,}"),
        ("answers compared / wrong", f"{found['checked_answers']:,} / {found['wrong_answers']:,}"),
        ("calls past their deadline", f"{found['overdue']:,}"),
        ("generator: cores / late at p99, ms", f"{short(found['bench']['cores'])} / {short(found['late_p99_ms'])}"),
    ]
    for name in ("server", "bench"):
        for key, unit in (("memory_mib", "memory, MiB"), ("descriptors", "descriptors")):
            values = (short(found[name][f"{key}_{when}"]) for when in ("first", "last", "max", "per_hour"))
            rows.append((f"{name}: {unit}: first / last / most / change an hour", " / ".join(values)))
    return table("Beside the load", ("", ""), rows)


def _settings(report: Report) -> str:
    given = {name: value for name, value in report["choices"].items() if value not in (None, "", False, [])}
    listed = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"<h2>Settings</h2><p class=soft>{escaped(listed)}</p>"
