"""`make bench-full`: bilm-serve against the same weights behind NVIDIA Triton, under open load of mixed lengths.

Needs a Python with pytriton (see `make bench-full`). Triton is run with the published order of work and with this
engine inside, each at the best of several settings. Calls come as they come (Poisson) and a latency counts from the
moment for which the call was meant, so that a slow server can't slow its load down.
"""

import argparse
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.reporting.experiment_page import write_page
from bilm_bench.statistics.rounds import Spread, interleave, ratio
from bilm_client.testing.server import ServerProcess
from bilm_system.terminal import run_command

from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import read_sentences
from benchmarks.load.sustained import CALLERS, P99_LIMIT_MS, Generators, Step, bounds, capacity, sustained, sweep
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.triton.servers import TritonServer, TritonSetting, best_setting, settings_to_try

OURS = "bilm-serve"
PEERS = {"Triton, published order": "published", "Triton, this engine": "engine"}
TARGETS = {"Triton, published order": 18.0, "Triton, this engine": 1.4}
MAX_DIFFERENCE = 1e-4


def main() -> None:
    """Run everything."""
    arguments = _arguments()
    size, n_sentences = arguments.size, 64 if arguments.size == "tiny" else 1024
    sentences, cores = read_sentences(n_sentences), torch.get_num_threads()
    lengths = sorted(map(len, sentences))
    settings = {"size": size, "sentences": n_sentences, "longest": lengths[-1], "median": lengths[n_sentences // 2]}
    settings |= {"step_s": arguments.step_s, "rounds": arguments.rounds, "threads": cores, "p99_limit_ms": P99_LIMIT_MS}
    report = new_report("full", "benchmarks.experiments.full", settings)

    def start_triton(setting: TritonSetting) -> TritonServer:
        return TritonServer(setting, size, n_sentences, arguments.triton_python)

    with ExitStack() as stack:
        generators: dict[str, LoadGenerator] = {}
        for name, order in PEERS.items():
            tries = settings_to_try(order, cores)
            best, tried = best_setting(tries, start_triton, CALLERS, arguments.step_s / 3)
            report.detail(f"{name}, settings", {"sentences_per_s": tried, "best": str(best)})
            generators[name] = stack.enter_context(start_triton(best))
        server = stack.enter_context(ServerProcess(f"random:{size}", ("--log-level", "warning")))
        generators[OURS] = stack.enter_context(LoadGenerator(server.target, n_sentences))
        report.detail("largest_difference", _check(generators))
        compare(report, generators, arguments.step_s, arguments.rounds)
    report.write(arguments.out)
    report.print_summary()
    write_page(arguments.out.parent)


def compare(report: Findings, generators: Generators, step_s: float, rounds: int) -> None:
    """Measure capacity, load by load, and what each contestant sustains."""
    capacities = {name: capacity(generator, step_s) for name, generator in generators.items()}
    swept = sweep(generators, capacities, step_s)
    report.detail("capacity_sentences_per_s", capacities)
    report.detail("sweep", swept)
    searched: dict[str, list[Step]] = {name: [] for name in generators}
    searches = {
        name: partial(sustained, generators[name], bounds(swept[name]), step_s, searched[name]) for name in generators
    }
    found = interleave(searches, rounds)
    report.detail("sustained_per_s", found)
    report.detail("generator_cores_at_the_search", {name: _generator_cores(steps) for name, steps in searched.items()})
    for name, rates in found.items():
        what = f"{report.settings['size']} float32, mean-pooled: sentences/s at p99 ≤ {P99_LIMIT_MS:g} ms, {name}"
        report.add(Finding(f"sustained/{name}", what, Spread.of(rates), "/s"))
    for name, target in TARGETS.items():
        advantage = ratio(found[OURS], found[name])
        report.add(Finding(f"sustained/{name}/ratio", f"  {OURS} against {name}", advantage, "×", target))


def _check(generators: Generators) -> float:
    """Check that all contestants return the same vectors; return the largest difference to ours."""
    largest = 0.0
    for index in range(3):
        vectors = {name: generator.ask("show", index=index)["vectors"] for name, generator in generators.items()}
        for name, found in vectors.items():
            difference = max(abs(a - b) for a, b in zip(found, vectors[OURS], strict=True))
            assert difference <= MAX_DIFFERENCE, f"{name} differs by {difference}"
            largest = max(largest, difference)
    return largest


def _generator_cores(steps: list[Step]) -> float:
    return max((step["generator_cores"] for step in steps), default=0.0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton-python", required=True, help="a Python that has pytriton, torch and bilm-serve")
    parser.add_argument("--size", default="small", help="of the model (%(default)s)")
    parser.add_argument("--step-s", type=float, default=15.0, help="of each load (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the search for the highest load (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "full.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.full", main))
