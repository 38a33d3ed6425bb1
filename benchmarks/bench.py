"""`make bench`: the engine against the baseline and the roofline, and the service around it; under ten minutes.

`make bench-original` measures the original size: six minutes. Prints each figure with its target as it comes; writes
them, with the machine, as JSON, and makes the page anew.
"""

import argparse
import sys
from pathlib import Path

import torch
from bilm_bench.reporting.experiment_page import write_page
from bilm_system.terminal import run_command

from benchmarks.experiments.beside import Company, beside_batch_run
from benchmarks.experiments.coalescing import coalesced_calls
from benchmarks.experiments.doors import other_protocols
from benchmarks.experiments.in_process import Effort, in_flight, throughput
from benchmarks.experiments.latency import (
    Crowd,
    Pace,
    added_latency,
    paced,
    short_among_long,
)
from benchmarks.experiments.memory import mixed_requests
from benchmarks.experiments.planning import planning
from benchmarks.experiments.served import CASES, ORIGINAL_CASES, ServedCase, event_loop_time, served_throughput
from benchmarks.experiments.start import client_import, start_to_serving
from benchmarks.load.sentences import read_sentences
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.sections import Sections, run_sections

# Enough for every batch of the baseline, few enough that all their words fit the caches.
SENTENCES = 512
# Nothing real: shows in a minute that every section runs.
_SMOKE_CASES = (
    ServedCase("tiny", "mean", "float32", 1, None, 0.5, of_what_is_left=True),
    ServedCase("tiny", "none", "float16", 32, None, 0.5),
)
_SMOKE_CROWD = Crowd(size="tiny", rows=4, long_tokens=200, calls=10, full_s=0.3)
_SMOKE_PACE = Pace(tokens=5, pause_s=0.05, calls=3, more=2)
_SMOKE_COMPANY = Company(callers=2, per_call=8, warm_s=0.2, seconds=0.5)


def main() -> None:
    """Run the sections."""
    arguments = _arguments()
    sentences = read_sentences(32 if arguments.smoke else SENTENCES)
    effort = Effort(arguments.rounds, arguments.window_s, arguments.singles)
    cores = torch.get_num_threads()
    settings = {"sentences": len(sentences), "tokens": sum(map(len, sentences)), **vars(effort), "threads": cores}
    name = "original" if arguments.original else "bench"
    report = new_report(name, "benchmarks.bench", settings)

    def few(rounds: int) -> Effort:
        return Effort(min(rounds, effort.rounds), effort.window_s, effort.singles)

    sections: Sections = {
        "small": lambda: throughput(report, "small", sentences, effort, cores),
        "planning": lambda: planning(report, effort),
        "added": lambda: added_latency(report, "", sentences, effort),
        "added-small": lambda: added_latency(report, "random:small", sentences, effort),
        "paced": lambda: paced(report, sentences, few(3), Pace()),
        "short": lambda: short_among_long(report, sentences, Crowd()),
        "beside": lambda: beside_batch_run(report, "", sentences, few(3).rounds, Company()),
        "served": lambda: served_throughput(report, sentences, few(3), CASES),
        "event-loop": lambda: event_loop_time(report, "", sentences, few(3)),
        "coalescing": lambda: coalesced_calls(report, "", len(sentences), few(2)),
        "start": lambda: start_to_serving(report, effort),
        "memory": lambda: mixed_requests(report, "", minutes=0.3, sample_s=6.0, callers=8),
    }
    original: Sections = {
        "original": lambda: throughput(report, "original", sentences, few(3), cores),
        "in-flight": lambda: in_flight(report, sentences, few(3)),
        "served-original": lambda: served_throughput(report, sentences, few(3), ORIGINAL_CASES),
        "doors": lambda: other_protocols(report, "random:small", sentences, effort),
        "import": lambda: client_import(report, effort),
    }
    if arguments.original:
        sections = original
    if arguments.smoke:
        sections = {
            "small": lambda: throughput(report, "tiny", sentences, effort, cores),
            "planning": lambda: planning(report, effort, len(sentences)),
            "added": lambda: added_latency(report, "random:tiny", sentences, effort),
            "paced": lambda: paced(report, sentences, effort, _SMOKE_PACE),
            "short": lambda: short_among_long(report, sentences, _SMOKE_CROWD),
            "beside": lambda: beside_batch_run(report, "random:tiny", sentences, effort.rounds, _SMOKE_COMPANY),
            "served": lambda: served_throughput(report, sentences, effort, _SMOKE_CASES),
            "event-loop": lambda: event_loop_time(report, "random:tiny", sentences, effort),
            "doors": lambda: other_protocols(report, "random:tiny", sentences, effort),
            "coalescing": lambda: coalesced_calls(report, "random:tiny", len(sentences), effort),
            "start": lambda: start_to_serving(report, effort, ("default",)),
            "memory": lambda: mixed_requests(report, "random:tiny", minutes=0.05, sample_s=1.0, callers=2),
            "import": lambda: client_import(report, effort),
        }
    run_sections(sections, arguments.only)
    report.write(arguments.out or RESULTS / f"{name}.json")
    report.print_summary()
    write_page((arguments.out or RESULTS / name).parent)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--window-s", type=float, default=2.0, help="of each throughput measurement (%(default)s)")
    parser.add_argument("--singles", type=int, default=50, help="sentences one at a time, a round (%(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        help="sections: small planning added added-small paced short beside served event-loop coalescing start memory "
        "import; with --original: original in-flight served-original doors",
    )
    parser.add_argument("--original", action="store_true", help="the original size: `make bench-original`")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--out", type=Path, help="(bench.json, or original.json, among the results)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.bench", main))
