"""`make bench`: the engine against the baseline, the roofline and the service around it; under ten minutes.

Prints each figure with its target as it comes; writes them, with the machine, as JSON, and makes the page anew.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bilm_bench.reporting.experiment_page import write_page
from bilm_system.terminal import run_command

from benchmarks.experiments.in_process import Effort, default_model_singles, in_flight, throughput
from benchmarks.experiments.latency import Crowd, added_latency, client_import, short_among_long, start_to_serving
from benchmarks.experiments.served import CASES, ServedCase, served_throughput
from benchmarks.load.sentences import read_sentences
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS

# Enough for every batch of the baseline, few enough that all their words fit the caches.
SENTENCES = 512
# Nothing real: shows in a minute that every section runs.
_SMOKE_CASES = (
    ServedCase("tiny", "mean", "float32", 1, None, 0.5),
    ServedCase("tiny", "none", "float16", 32, None, 0.5),
)
_SMOKE_CROWD = Crowd(size="tiny", rows=4, long_tokens=200, calls=10, full_s=0.3)


def main() -> None:
    """Run the sections."""
    arguments = _arguments()
    sentences = read_sentences(32 if arguments.smoke else SENTENCES)
    effort = Effort(arguments.rounds, arguments.window_s, arguments.singles)
    cores = torch.get_num_threads()
    settings = {"sentences": len(sentences), "tokens": sum(map(len, sentences)), **vars(effort), "threads": cores}
    report = new_report("bench", "benchmarks.bench", settings)

    def few(rounds: int) -> Effort:
        return Effort(min(rounds, effort.rounds), effort.window_s, effort.singles)

    sections: dict[str, Callable[[], None]] = {
        "small": lambda: throughput(report, "small", sentences, effort, cores),
        "original": lambda: throughput(report, "original", sentences, few(3), cores),
        "in-flight": lambda: in_flight(report, sentences, few(3)),
        "default": lambda: default_model_singles(report, sentences, effort),
        "added": lambda: added_latency(report, "", sentences, effort),
        "added-small": lambda: added_latency(report, "random:small", sentences, effort),
        "short": lambda: short_among_long(report, sentences, Crowd()),
        "served": lambda: served_throughput(report, sentences, few(3), CASES),
        "start": lambda: start_to_serving(report, few(3)),
        "import": lambda: client_import(report, effort),
    }
    if arguments.smoke:
        sections = {
            "small": lambda: throughput(report, "tiny", sentences, effort, cores),
            "default": lambda: default_model_singles(report, sentences, effort),
            "added": lambda: added_latency(report, "random:tiny", sentences, effort),
            "short": lambda: short_among_long(report, sentences, _SMOKE_CROWD),
            "served": lambda: served_throughput(report, sentences, effort, _SMOKE_CASES),
            "start": lambda: start_to_serving(report, effort, ("default",)),
            "import": lambda: client_import(report, effort),
        }
    _run({name: section for name, section in sections.items() if name in (arguments.only or sections)})
    report.write(arguments.out)
    report.print_summary()
    write_page(arguments.out.parent)


def _run(sections: dict[str, Callable[[], None]]) -> None:
    begun_s = time.perf_counter()
    for name, section in sections.items():
        print(f"\n-- {name}", flush=True)
        section_begun_s = time.perf_counter()
        section()
        now_s = time.perf_counter()
        print(f"-- {name}: {now_s - section_begun_s:.0f} s, {now_s - begun_s:.0f} s in all", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    parser.add_argument("--window-s", type=float, default=2.0, help="of each throughput measurement (%(default)s)")
    parser.add_argument("--singles", type=int, default=50, help="sentences one at a time, a round (%(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        help="sections: small original in-flight default added added-small short served start import",
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.bench", main))
