"""`make bench-before`: this tree against the commit before it, in processes of their own that take turns.

The other commit is checked out into a work tree that is removed at the end. Each throughput window, and each round of
single sentences, alternates between the two; medians and quartiles are of the rounds' ratios.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.percentiles import percentile
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import ServerProcess
from bilm_model.kernels.product_paths import Precision
from bilm_system.terminal import run_command

from benchmarks.experiments.in_process import native_precisions
from benchmarks.experiments.latency import Pace
from benchmarks.experiments.served import SERVER_ARGUMENTS
from benchmarks.load.engine_process import EngineProcess
from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import read_sentences
from benchmarks.load.sustained import P99_LIMIT_MS, Step, bounds, capacity, in_words, sustained, sweep, take_step
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.sections import run_sections
from benchmarks.trees import BEFORE, PRESENT, Tree, work_tree

SHIPPED_TARGET = 1.6
ORIGINAL_TARGET = 0.97
SINGLE_TARGETS = {"AVX512": 0.8}
_SINGLE_TARGET = 0.6
OPEN_LOOP_TARGET = 3.0
SLOW_RATE, SLOW_TARGET = 20.0, 0.5
_SEED = 7

Trees = Mapping[str, Tree]


class Comparison:
    """Both trees, and how long to measure.

    Args:
        report: receives the findings.
        trees: "present" and "before".
        n_sentences: of WikiText-2's test part.
        rounds: that each of them has.
        window_s: of a throughput measurement.
        singles: sentences one at a time, a round.
        step_s: of each load of an open loop.
    """

    def __init__(
        self, report: Findings, trees: Trees, n_sentences: int, *, rounds: int, window_s: float, singles: int,
        step_s: float,
    ) -> None:  # fmt: skip
        self._report, self._trees, self._n = report, trees, n_sentences
        self._rounds, self._window_s, self._singles, self._step_s = rounds, window_s, singles, step_s

    def throughput(self, model: str, key: str, precision: Precision = "float32", target: float | None = None) -> None:
        """Compare tokens a second in process, all rows taken."""
        found = self._in_process(lambda engine: engine.tokens_per_s(self._window_s), model=model, precision=precision)
        what = f"{key}, {precision}, all rows taken, in process"
        self._add(f"{key}/{precision}", what, found, "tokens/s", target)

    def planning(self) -> None:
        """Compare an engine on one core whose back end computes nothing."""
        for rows in (128, 1024):
            found = self._in_process(
                lambda engine: float(engine.full(self._window_s)["steps_per_cpu_s"]),
                rows=rows, one_core=True, idle=True,
            )  # fmt: skip
            self._add(f"planning/{rows}", f"back end that computes nothing, {rows} rows, one core", found, "steps/s")

    def singles(self) -> None:
        """Compare one sentence at a time, in process, with the model that ships."""
        found = self._in_process(lambda engine: percentile(engine.singles(0, self._singles), 50))
        target = SINGLE_TARGETS.get(torch.backends.cpu.get_cpu_capability(), _SINGLE_TARGET)
        what = "the model that ships, one sentence at a time in process, p50"
        self._add("singles", what, found, "ms", target, at_least=False)

    def paced(self, pace: Pace) -> None:
        """Compare a sentence of known words that comes after pauses."""
        found = self._in_process(lambda engine: percentile(engine.paced(pace.tokens, pace.calls, pace.pause_s), 50))
        what = f"the model that ships, {pace.tokens} known words every {pace.pause_s:g} s in process, p50"
        self._add("paced", what, found, "ms")

    def open_loop(self, model: str) -> None:
        """Compare single sentences of all lengths that a Poisson process sends: sustained, saturated, and slow."""
        with ExitStack() as stack:
            generators = {name: self._served(tree, model, stack) for name, tree in self._trees.items()}
            capacities = {name: capacity(generator, self._step_s) for name, generator in generators.items()}
            swept = sweep(generators, capacities, self._step_s)
            searched: dict[str, list[Step]] = {name: [] for name in generators}
            saturated = {name: partial(capacity, generator, self._step_s) for name, generator in generators.items()}
            slow = {name: partial(_slow_p50_ms, generator, self._step_s) for name, generator in generators.items()}
            searches = {
                name: partial(sustained, generator, bounds(swept[name]), self._step_s, searched[name])
                for name, generator in generators.items()
            }
            found = {
                "saturated": interleave(saturated, self._rounds),
                "slow": interleave(slow, self._rounds),
                "sustained": interleave(searches, self._rounds),
            }
        self._report.detail("open loop", {"sweep": swept, "searched": searched})
        what = "the model that ships, mean-pooled, single sentences"
        self._add("saturated", f"{what}, saturated", found["saturated"], "/s", OPEN_LOOP_TARGET)
        limit = f"p99 ≤ {P99_LIMIT_MS:g} ms"
        self._add("sustained", f"{what}, open loop, {limit}", found["sustained"], "/s", OPEN_LOOP_TARGET)
        self._add("slow", f"{what}, {SLOW_RATE:g}/s, p50", found["slow"], "ms", SLOW_TARGET, at_least=False)

    def _served(self, tree: Tree, model: str, stack: ExitStack) -> LoadGenerator:
        server = stack.enter_context(ServerProcess(model, SERVER_ARGUMENTS, environment=tree.environment))
        return stack.enter_context(LoadGenerator(server.target, self._n))

    def _in_process(self, measure: Callable[[EngineProcess], float], **flags: Any) -> dict[str, list[float]]:
        """Measure an engine of each tree in turns, after a round that doesn't count."""
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(EngineProcess(self._n, tree, **flags)) for name, tree in self._trees.items()
            }
            self._report.detail(f"engines {flags}", {name: engine.backend() for name, engine in engines.items()})
            contestants: dict[str, Contestant] = {name: partial(measure, engine) for name, engine in engines.items()}
            interleave(contestants, 1)
            return interleave(contestants, self._rounds)

    def _add(
        self,
        key: str,
        what: str,
        found: Mapping[str, Sequence[float]],
        unit: str,
        target: float | None = None,
        *,
        at_least: bool = True,
    ) -> None:
        self._report.detail(key, dict(found))
        times = ratio(found["present"], found["before"])
        self._report.add(
            Finding(f"{key}/before", f"{what}: before", Spread.of(found["before"]), unit),
            Finding(f"{key}/present", "  present", Spread.of(found["present"]), unit),
            Finding(f"{key}/ratio", "  present against before", times, "×", target, at_least=at_least),
        )


def _slow_p50_ms(generator: LoadGenerator, step_s: float) -> float:
    step = take_step(generator, SLOW_RATE, step_s, _SEED)
    print(f"  {in_words(step)}", flush=True)
    return float(step["p50_ms"])


def main() -> None:
    """Run the sections."""
    arguments = _arguments()
    n_sentences = 32 if arguments.smoke else 1024
    settings = {"sentences": len(read_sentences(n_sentences)), "threads": torch.get_num_threads(), "before": BEFORE}
    settings |= {name: getattr(arguments, name) for name in ("rounds", "window_s", "singles", "step_s")}
    report = new_report("before", "benchmarks.experiments.before", settings)
    with work_tree(arguments.before) as before:
        comparison = Comparison(
            report,
            {"before": before, "present": PRESENT},
            n_sentences,
            rounds=arguments.rounds,
            window_s=arguments.window_s,
            singles=arguments.singles,
            step_s=arguments.step_s,
        )
        run_sections(_sections(report, comparison, smoke=arguments.smoke), arguments.only)
    report.write(arguments.out)
    report.print_summary()


def _sections(report: Findings, comparison: Comparison, *, smoke: bool) -> dict[str, Callable[[], None]]:
    if smoke:
        return {
            "planning": comparison.planning,
            "shipped": lambda: comparison.throughput("random:tiny", "shipped"),
            "singles": comparison.singles,
            "open": lambda: comparison.open_loop("random:tiny"),
        }

    def original() -> None:
        for precision in native_precisions(report):
            comparison.throughput("random:original", "original", precision, ORIGINAL_TARGET)

    return {
        "planning": comparison.planning,
        "shipped": lambda: comparison.throughput("", "shipped", target=SHIPPED_TARGET),
        "original": original,
        "singles": comparison.singles,
        "paced": lambda: comparison.paced(Pace()),
        "open": lambda: comparison.open_loop(""),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="that each of them has (%(default)s)")
    parser.add_argument("--window-s", type=float, default=5.0, help="of each throughput measurement (%(default)s)")
    parser.add_argument("--singles", type=int, default=200, help="sentences one at a time, a round (%(default)s)")
    parser.add_argument("--step-s", type=float, default=6.0, help="of each load of the open loop (%(default)s)")
    parser.add_argument("--only", nargs="+", help="sections: planning shipped original singles paced open")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that everything runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "before.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.before", main))
