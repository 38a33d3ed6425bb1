"""The engine in this process: throughput, share of the roofline, a sentence alone, few sentences in flight.

bfloat16 is left out where its products aren't native.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_model.config import SIZES
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import PlainSentence
from bilm_model.kernels.product_paths import Precision, cpu_path

from benchmarks.load.engines import (
    POOLED_TOP,
    engine_of,
    input_cache_mib,
    new_batch,
    show_all_words,
    token_cache_mib,
)
from benchmarks.load.sentences import distinct_words, sentence_of
from benchmarks.load.steady import SteadyLoad
from benchmarks.references.baseline import Baseline, BaselineAtItsBest, check_against
from benchmarks.references.roofline import ROWS, Roofline, multiply_adds

CACHES = ("off", "warm", "warm with inputs")
PRECISIONS: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASELINE_BATCHES = {"tiny": (1, 4), "small": (1, 4, 16, 64), "medium": (4, 16, 64), "original": (64, 128)}

# (size, precision, cache) -> times the baseline
SPEEDUP_TARGETS = {
    ("original", "float32", "off"): 6.0,
    ("original", "float32", "warm"): 8.0,
    ("original", "float32", "warm with inputs"): 10.0,
    ("original", "bfloat16", "best"): 16.0,
    ("small", "float32", "warm"): 15.0,
    ("small", "bfloat16", "warm"): 20.0,
}
# (size, precision) -> per cent
ROOFLINE_TARGETS = {
    ("original", "float32"): 88.0,
    ("original", "bfloat16"): 80.0,
    ("small", "float32"): 85.0,
    ("small", "bfloat16"): 75.0,
}
# sentences in flight -> per cent of the tokens/s with 32
IN_FLIGHT_TARGETS = {2: 40.0, 8: 75.0}
ALONE_TARGET = 1 / 6
ALONE_TOKENS = 20

Sentences = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: that each contestant has.
        window_s: of throughput measurements.
        singles: sentences taken one at a time, a round.
    """

    rounds: int
    window_s: float
    singles: int


def native_precisions(report: Findings) -> tuple[Precision, ...]:
    """Return the formats whose products are native here; say which are left out."""
    native: list[Precision] = [precision for precision, dtype in PRECISIONS.items() if not cpu_path(dtype).rounded]
    left_out = [precision for precision in PRECISIONS if precision not in native]
    if left_out:
        report.detail("left out", dict.fromkeys(left_out, "its products aren't native on this processor"))
        print(f"left out, because their products aren't native here: {', '.join(left_out)}", flush=True)
    return tuple(native)


def throughput(report: Findings, size: str, sentences: Sentences, effort: Effort, cores: int) -> None:
    """Measure the engine against baseline and roofline, in every precision, with every cache; a sentence alone."""
    config, precisions = SIZES[size], native_precisions(report)
    variants = [(precision, cache) for precision in precisions for cache in CACHES]
    with BaselineAtItsBest(size, BASELINE_BATCHES[size], sentences, cores) as baseline:
        engines = {(precision, cache): _engine(size, precision, cache, sentences) for precision, cache in variants}
        difference = check_against(engines["float32", "off"], baseline.team, sentences)
        if size == "original":
            alone(report, {cache: engines["float32", cache] for cache in ("warm", "off")}, sentences, effort, cores)
        loads = {
            key: SteadyLoad(engine_of(engine, config), sentences, None, POOLED_TOP) for key, engine in engines.items()
        }
        steps_per_s: dict[tuple[Precision, str], list[float]] = {key: [] for key in loads}
        roofs = {precision: Roofline(config, PRECISIONS[precision]) for precision in precisions}

        def tokens_per_s(key: tuple[Precision, str]) -> float:
            work = loads[key].measure(effort.window_s)
            steps_per_s[key].append(work.steps_per_s)
            return work.tokens_per_s

        contestants: dict[str, Contestant] = {"baseline": baseline.tokens_per_s}
        contestants |= {f"roof {precision}": roof.multiply_adds_per_s for precision, roof in roofs.items()}
        contestants |= {f"{precision} {cache}": partial(tokens_per_s, (precision, cache)) for precision, cache in loads}
        for load in loads.values():
            load.measure(effort.window_s / 4)  # the rows are full, the kernels compiled
        steps_per_s |= {key: [] for key in loads}
        found = interleave(contestants, effort.rounds)
    report.detail(
        f"throughput {size}",
        {
            "baseline_layouts_tokens_per_s": {str(layout): rate for layout, rate in baseline.tried.items()},
            "baseline_best": str(baseline.best),
            "largest_difference_to_the_engine": difference,
            "tokens_per_s": {name: rates for name, rates in found.items() if not name.startswith("roof")},
            "products_gflop_per_s": {precision: roof.found for precision, roof in roofs.items()},
            "backend": engines["float32", "off"].backend,
            "distinct_words": len(distinct_words(sentences)),
        },
    )
    _report_speedups(report, size, found, precisions)
    for precision in precisions:
        _report_roofline(
            report, size, precision, steps_per_s[precision, "warm with inputs"], found[f"roof {precision}"]
        )


def alone(
    report: Findings, engines: dict[str, CellularBatch], sentences: Sentences, effort: Effort, cores: int
) -> None:
    """Measure one sentence alone against the baseline: one process with all cores, a batch of one."""
    sentence = sentence_of(ALONE_TOKENS, sentences)
    with Baseline("original", 1, cores) as team:
        contestants: dict[str, Contestant] = {
            "baseline": lambda: _median_of(3, lambda: team.seconds([sentence], 1)),
            "warm": lambda: _median_of(5, lambda: run_seconds(engines["warm"], sentence)),
            "off": lambda: _median_of(5, lambda: run_seconds(engines["off"], sentence)),
        }
        interleave(contestants, 1)
        found = interleave(contestants, effort.rounds)
    report.detail("alone original", {f"{name}_ms": [1e3 * s for s in seconds] for name, seconds in found.items()})
    what = f"original float32, one {ALONE_TOKENS}-token sentence alone"
    for name, words in (("warm", "known words"), ("off", "cache off")):
        share = ratio(found[name], found["baseline"])
        report.add(Finding(f"alone/{name}", f"{what}, {words}: latency", Spread.of(found[name]).times(1e3), "ms"))
        report.add(
            Finding(f"alone/{name}/ratio", "  against the baseline", share, "×", round(ALONE_TARGET, 4), at_least=False)
        )


def in_flight(report: Findings, sentences: Sentences, effort: Effort) -> None:
    """Measure how much of the throughput is left with few sentences in flight."""
    counts = (*IN_FLIGHT_TARGETS, 32)
    loads = {}
    for count in counts:
        batch = new_batch("original", EngineOptions(max_rows=count))
        show_all_words(batch, sentences)
        loads[count] = SteadyLoad(engine_of(batch, SIZES["original"]), sentences, count, POOLED_TOP)
        loads[count].measure(effort.window_s / 4)

    def tokens_per_s(count: int) -> float:
        return loads[count].measure(effort.window_s).tokens_per_s

    found = interleave({str(count): partial(tokens_per_s, count) for count in counts}, effort.rounds)
    report.detail("in flight original", found)
    for count in counts:
        what = f"original float32, {count} sentences in flight"
        report.add(Finding(f"in_flight/{count}", what, Spread.of(found[str(count)]), "tokens/s"))
    for count, target in IN_FLIGHT_TARGETS.items():
        share = ratio(found[str(count)], found["32"]).times(100)
        report.add(Finding(f"in_flight/{count}/share", f"  {count} against 32 in flight", share, "%", target))


def run_seconds(engine: CellularBatch, sentence: Sequence[str]) -> float:
    """Return the seconds of one sentence from tokens to layers."""
    begun_s = time.perf_counter()
    engine.run([PlainSentence(tuple(sentence))])
    return time.perf_counter() - begun_s


def _median_of(count: int, contestant: Contestant) -> float:
    return Spread.of([contestant() for _ in range(count)]).median


def _engine(size: str, precision: Precision, cache: str, sentences: Sentences) -> CellularBatch:
    config, n_words = SIZES[size], len(distinct_words(sentences))
    options = EngineOptions(
        precision=precision,
        max_rows=ROWS,
        token_cache_mib=0 if cache == "off" else token_cache_mib(config, n_words),
        input_cache_mib=input_cache_mib(config, n_words) if cache == "warm with inputs" else 0,
    )
    engine = new_batch(size, options)
    if cache != "off":
        show_all_words(engine, sentences)
    return engine


def _report_speedups(
    report: Findings, size: str, found: dict[str, list[float]], precisions: Sequence[Precision]
) -> None:
    report.add(Finding(f"tokens_per_s/{size}/baseline", f"{size}, baseline", Spread.of(found["baseline"]), "tokens/s"))
    for precision in precisions:
        names = {cache: f"{precision} {cache}" for cache in CACHES}
        if (size, precision, "best") in SPEEDUP_TARGETS:
            names["best"] = max(names.values(), key=lambda name: Spread.of(found[name]).median)
        for cache, name in names.items():
            speedup, what = ratio(found[name], found["baseline"]), f"{size} {precision}, cache {cache}"
            if cache != "best":
                key = f"tokens_per_s/{size}/{precision}/{cache}"
                report.add(Finding(key, what, Spread.of(found[name]), "tokens/s"))
            target = SPEEDUP_TARGETS.get((size, precision, cache))
            what = f"{size} {precision}, best of these against the baseline" if cache == "best" else ""
            key = f"speedup/{size}/{precision}/{cache}"
            report.add(Finding(key, what or "  against the baseline", speedup, "×", target))


def _report_roofline(report: Findings, size: str, precision: str, steps_per_s: list[float], roof: list[float]) -> None:
    """Report the engine with warm caches: the cells' products are all that it multiplies then, less layer 1's input."""
    per_row = multiply_adds(SIZES[size], without_first_input=True)
    share = ratio([per_row * rate for rate in steps_per_s], roof).times(100)
    what = f"{size} {precision}, {ROWS} rows in flight: share of the roofline"
    report.add(
        Finding(f"roof/{size}/{precision}", f"{size} {precision}, roofline", Spread.of(roof).times(2e-9), "GFLOP/s")
    )
    key = f"roofline/{size}/{precision}"
    report.add(Finding(key, what, share, "%", ROOFLINE_TARGETS.get((size, precision))))
