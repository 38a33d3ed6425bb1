"""A report as one HTML page that needs nothing else."""

import html
from typing import Any

from bilm_bench.reporting import plots
from bilm_bench.reporting.report import Report
from bilm_bench.reporting.summary import describe_calls, describe_load, load_name, short

_PLOTS = (
    ("throughput_against_load", "Throughput against load", "What was answered while the step went on."),
    ("latency_against_load", "Latency against load", "Of accepted calls, from the moment for which each was meant."),
    ("calls_over_time", "Calls over time", "By when they ended."),
    ("latency_over_time", "Latency over time", "Of accepted calls that ended since the sample before."),
    ("resources_over_time", "Memory and descriptors", "Of the server, and of the bench itself."),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #37352f; --soft: #6b6b6b; --paper: #ffffff; --grid: #e6e6e3;
  --blue: #0b6e99; --orange: #c2620a; --red: #c4352b; --grey: #8a8a86; --good: #1d7a46; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e2df; --soft: #a3a29e; --paper: #1b1c1e; --grid: #38393c;
  --blue: #5db6e0; --orange: #f0a050; --red: #f2766c; --grey: #93938f; --good: #5cc48c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { border-bottom: 1px solid var(--grid); padding: .25rem .5rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; white-space: pre-wrap; }
.good { color: var(--good); } .bad { color: var(--red); font-weight: 600; }
svg { max-width: 100%; height: auto; }
"""

_STEP_HEAD = (
    "load", "offered/s", "answered/s", "tokens/s", "p50 ms", "p90", "p99", "p99.9", "max",
    "refused", "p99 ms", "failed",
)  # fmt: skip
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms")


def page(report: Report) -> str:
    """The page's text."""
    parts = [_head(report), _conditions(report)]
    for name, title, words in _PLOTS:
        if (svg := getattr(plots, name)(report)) is not None:
            parts.append(f"<h2>{title}</h2><p class=soft>{words}</p>{svg}")
    parts += [_steps(report), _errors(report["figures"]), _beside(report["figures"]), _choices(report)]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>bilm-bench</title><style>{_STYLE}</style><h1>bilm-bench</h1>\n{''.join(parts)}\n</html>\n"
    )


def _head(report: Report) -> str:
    model, figures = report["model"], report["figures"]
    interrupted = " <span class=bad>Interrupted.</span>" if report["interrupted"] else ""
    server = f"{report['choices']['target']}: {model['name']} {model['version'][:12]}, {model['backend']}"
    load = f"{describe_load(report)}, {figures['length_s']:.0f} s under load from {report['begun']}"
    return (
        f"<p><b>{_text(server)}</b><br>{_text(load)}.{interrupted}<br>"
        f"<span class=soft>{_text(describe_calls(report))}</span></p>"
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
    return _table("Conditions", ("condition", "found", ""), rows)


def _steps(report: Report) -> str:
    loop = report["choices"]["loop"]
    rows = [(load_name(step["load"], loop), *_step(step)) for step in report["steps"]]
    if len(rows) != 1:
        rows.append(("all", *_step(report["figures"])))
    note = (
        "Latencies are of accepted calls, from the moment for which each was meant; beside the refused calls, theirs."
    )
    return _table("Steps", _STEP_HEAD, rows, note)


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
    return _table("Refusals and errors", ("status, reason", "calls", "first message"), rows)


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
    return _table("Beside the load", ("", ""), rows)


def _choices(report: Report) -> str:
    given = {name: value for name, value in report["choices"].items() if value not in (None, "", False, [])}
    listed = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"<h2>Choices</h2><p class=soft>{_text(listed)}</p>"


def _table(title: str, head: tuple[str, ...], rows: list[Any], note: str = "") -> str:
    """Cells are text, or text and a class."""
    if not rows:
        return ""
    names = "".join(f"<th>{_text(name)}" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}\n" for row in rows)
    soft = f"<p class=soft>{_text(note)}</p>" if note else ""
    return f"<h2>{_text(title)}</h2>{soft}<div class=wide><table><tr>{names}\n{body}</table></div>"


def _cell(cell: str | tuple[str, str]) -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    return f"<td class={kind}>{_text(text)}" if kind else f"<td>{_text(text)}"


def _text(value: str) -> str:
    return html.escape(value)
