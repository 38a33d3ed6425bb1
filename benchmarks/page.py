"""`make bench-page`: the results as one HTML page that needs nothing else."""

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

from bilm_bench.reporting.numbers import short
from bilm_system.files import write_text
from bilm_system.terminal import run_command

_RESULTS = Path(__file__).parent / "results"
_BENCHMARKS = ("bench", "full")

_PLOTS = (
    ("speedups", "Against the baseline", "The published order of work at its own best batch size and thread layout."),
    ("tokens_per_s", "Tokens a second, in process", "All rows full; random weights, real sentences."),
    ("roofline", "Share of the roofline", "Multiply-adds of the LSTM cells, 128 rows in flight, words in the cache; "
     "the roofline is the fastest product of the same shapes in the same round."),
    ("in_flight", "Few sentences in flight", "An engine with so many rows, all of them full."),
    ("served", "Through the server", "64 callers, each with one call under way."),
    ("short_among_long", "Short sentences with long ones in flight", "While more 2,000-token sentences are queued than "
     "the server has rows."),
    ("throughput_against_load", "Throughput against offered load", "Small, float32, mean-pooled."),
    ("latency_against_load", "Latency against offered load", "From the moment for which each call was meant."),
)  # fmt: skip

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #37352f; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; } .soft { color: #6b6b6b; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { border-bottom: 1px solid #e6e6e3; padding: .25rem .5rem; text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
td:first-child, th:first-child { text-align: left; white-space: pre-wrap; }
.met { color: #1d7a46; } .missed { color: #c4352b; font-weight: 600; }
svg { max-width: 100%; height: auto; }
"""


def write_page(folder: Path = _RESULTS) -> None:
    """Makes `index.html` of the results in a folder; without matplotlib, only says so."""
    try:
        from benchmarks import plots  # noqa: PLC0415
    except ModuleNotFoundError as error:
        print(f"no page: {error}; pip install '.[train]'")
        return
    paths = {name: folder / f"{name}.json" for name in _BENCHMARKS}
    found = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    merged: dict[str, Any] = {"figures": [], "details": {}}
    for results in found.values():
        merged["figures"] += results["figures"]
        merged["details"] |= results["details"]
    parts = [_head(results) for results in found.values()]
    for name, title, words in _PLOTS:
        if (svg := getattr(plots, name)(merged)) is not None:
            parts.append(f"<h2>{html.escape(title)}</h2><p class=soft>{html.escape(words)}</p>{svg}")
    parts += [_table(results) for results in found.values()]
    path = folder / "index.html"
    write_text(path, _document("\n".join(parts)))
    print(f"written to {path}")


def _document(body: str) -> str:
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>bilm-serve, measured</title><style>{_STYLE}</style><h1>bilm-serve, measured</h1>\n{body}\n</html>\n"
    )


def _head(results: dict[str, Any]) -> str:
    machine = results["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores ({machine['capability']}), torch {machine['torch']}"
    lines = (
        f"<b>{html.escape(results['benchmark'])}</b>: {html.escape(where)}, Python {html.escape(machine['python'])}; "
        f"commit {html.escape(machine['commit'])}; {html.escape(results['date'])}",
        f"<span class=soft><code>{html.escape(results['command'])}</code>; {html.escape(settings)}</span>",
    )
    return f"<p>{'<br>'.join(lines)}</p>"


def _table(results: dict[str, Any]) -> str:
    rows = "".join(_row(figure) for figure in results["figures"])
    head = "<tr><th>what<th>median<th>rounds<th>unit<th>target<th></tr>"
    return f"<h2>All figures of {html.escape(results['benchmark'])}</h2><table>{head}{rows}</table>"


def _row(figure: dict[str, Any]) -> str:
    found, target = figure["found"], figure["target"]
    sign = "≥" if figure["at_least"] else "≤"
    verdict = {None: "", True: "<span class=met>met</span>", False: "<span class=missed>not met</span>"}[figure["met"]]
    cells = (
        html.escape(figure["what"]),
        short(found["median"]),
        f"{short(found['minimum'])} … {short(found['maximum'])}",
        html.escape(figure["unit"]),
        "" if target is None else f"{sign} {target:g}",
        verdict,
    )
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>\n"


def main() -> None:
    """Makes the page anew of the results that lie there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=_RESULTS, help="of the results (%(default)s)")
    write_page(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.page", main))
