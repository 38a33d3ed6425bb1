"""The results of experiments as one HTML page: `python -m bilm_bench.reporting.experiment_page FOLDER`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bilm_system.files import write_text
from bilm_system.terminal import run_command

from bilm_bench.reporting.numbers import short
from bilm_bench.reporting.page import Cell, document, escaped, plot_section, table

_EXPERIMENTS = ("bench", "original", "full")

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

_HEAD = ("what", "median", "rounds", "unit", "target", "")
_VERDICTS: dict[bool | None, Cell] = {None: "", True: ("met", "good"), False: ("not met", "bad")}


def write_page(folder: Path) -> None:
    """Write `index.html` from the results in a folder; without matplotlib, only print so."""
    try:
        from bilm_bench.reporting import experiment_plots  # noqa: PLC0415
    except ModuleNotFoundError as error:
        print(f"no page: {error}; pip install '.[bench]'")
        return
    paths = [folder / f"{name}.json" for name in _EXPERIMENTS]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    merged: dict[str, Any] = {"figures": [], "details": {}}
    for results in found:
        merged["figures"] += results["figures"]
        merged["details"] |= results["details"]
    parts = [_head(results) for results in found]
    for name, title, words in _PLOTS:
        if (svg := getattr(experiment_plots, name)(merged)) is not None:
            parts.append(plot_section(title, words, svg))
    parts += [_measurements(results) for results in found]
    path = folder / "index.html"
    write_text(path, document("bilm-serve, measured", parts))
    print(f"written to {path}")


def _head(results: dict[str, Any]) -> str:
    machine = results["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores ({machine['capability']}), torch {machine['torch']}"
    lines = (
        f"<b>{escaped(results['benchmark'])}</b>: {escaped(where)}, Python {escaped(machine['python'])}; "
        f"commit {escaped(machine['commit'])}; {escaped(results['date'])}",
        f"<span class=soft><code>{escaped(results['command'])}</code>; {escaped(settings)}</span>",
    )
    return f"<p>{'<br>'.join(lines)}</p>"


def _measurements(results: dict[str, Any]) -> str:
    return table(f"All measurements of {results['benchmark']}", _HEAD, [_row(one) for one in results["figures"]])


def _row(one: dict[str, Any]) -> tuple[Cell, ...]:
    found, target = one["found"], one["target"]
    return (
        one["what"],
        short(found["median"]),
        f"{short(found['minimum'])} … {short(found['maximum'])}",
        one["unit"],
        "" if target is None else f"{'≥' if one['at_least'] else '≤'} {target:g}",
        _VERDICTS[one["met"]],
    )


def main() -> None:
    """Write the page from the results that are there."""
    parser = argparse.ArgumentParser(prog="python -m bilm_bench.reporting.experiment_page", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the results")
    write_page(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(run_command("bilm_bench.reporting.experiment_page", main))
