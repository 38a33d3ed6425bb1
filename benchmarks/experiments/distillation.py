"""A student against its teacher, in process and served: speed and size. `bilm-train eval` measures what either knows.

python -m benchmarks.experiments.distillation TEACHER STUDENT
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.statistics.percentiles import percentile
from bilm_bench.statistics.rounds import Contestant, Spread, interleave, ratio
from bilm_client.testing.server import ServerProcess
from bilm_model.bilm import Bilm
from bilm_model.device import default_threads, resolve_device
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.options import EngineOptions
from bilm_model.kernels.product_paths import Precision
from bilm_model.weights.loading import load as load_model
from bilm_system.terminal import run_command

from benchmarks.experiments.in_process import Effort, Sentences, run_seconds
from benchmarks.experiments.served import CALLERS, SERVER_ARGUMENTS
from benchmarks.load.engines import POOLED_TOP, batch_of, engine_of, show_all_words
from benchmarks.load.load import LoadGenerator
from benchmarks.load.sentences import DATA, read_sentences
from benchmarks.load.steady import SteadyLoad
from benchmarks.machine import new_report
from benchmarks.paths import RESULTS
from benchmarks.references.roofline import multiply_adds

_MEGA, _MIB = 1e6, 2**20
_BYTES_OF_A_FLOAT = 4
_PER_CALL, _WARM_S = 32, 4.0


def compare_speed(
    report: Findings, models: Mapping[str, Bilm], sentences: Sentences, effort: Effort, options: EngineOptions
) -> None:
    """Measure each model's engine with all rows taken, and on one sentence at a time; caches know the words.

    Args:
        report: receives the figures.
        models: "teacher" and "student", on the device to measure on; they are taken over.
        sentences: that both embed.
        effort: how long to measure.
        options: of both engines.
    """
    sizes = {name: _sizes(bilm) for name, bilm in models.items()}
    configs = {name: bilm.config for name, bilm in models.items()}
    engines = {name: _engine(bilm, sentences, options) for name, bilm in models.items()}
    report.detail("engines", {name: engine.backend for name, engine in engines.items()})
    loads = {
        name: SteadyLoad(engine_of(engine, configs[name]), sentences, None, POOLED_TOP)
        for name, engine in engines.items()
    }
    full: dict[str, Contestant] = {name: partial(_tokens_per_s, load, effort) for name, load in loads.items()}
    singles = sentences[: effort.singles]
    alone: dict[str, Contestant] = {name: partial(_median_ms, engine, singles) for name, engine in engines.items()}
    interleave(alone, 1)  # before the rows are full: nothing else may be in flight
    alone_ms = interleave(alone, effort.rounds)
    for load in loads.values():
        load.measure(effort.window_s / 4)
    tokens_per_s = interleave(full, effort.rounds)
    _add(report, "tokens_per_s", "all rows taken", tokens_per_s, "tokens/s")
    _add(report, "alone", "one sentence at a time, median", alone_ms, "ms")
    for key, unit in (("parameters", "million"), ("weights", "MiB"), ("multiply_adds", "million")):
        _add(report, key, _SIZES[key], {name: [found[key]] for name, found in sizes.items()}, unit)


def compare_service(
    report: Findings, models: Mapping[str, str], n_sentences: int, effort: Effort, arguments: tuple[str, ...]
) -> None:
    """Measure each model behind its own server: many callers, and one sentence at a time; mean-pooled.

    Args:
        report: receives the figures.
        models: "teacher" and "student", as bilm-serve's --model.
        n_sentences: of WikiText-2's test part.
        effort: how long to measure.
        arguments: of both servers.
    """
    with ExitStack() as stack:
        full: dict[str, Contestant] = {}
        alone: dict[str, Contestant] = {}
        for name, source in models.items():
            server = stack.enter_context(ServerProcess(source, (*SERVER_ARGUMENTS, *arguments)))
            generator = stack.enter_context(LoadGenerator(server.target, n_sentences))
            full[name] = partial(_served_tokens_per_s, generator, effort)
            alone[name] = partial(_served_median_ms, generator, effort)
        interleave(full, 1)  # every word is known, every kernel compiled
        tokens_per_s = interleave(full, effort.rounds)
        alone_ms = interleave(alone, effort.rounds)
    what = f"served, {CALLERS} callers of {_PER_CALL} sentences"
    _add(report, "served_tokens_per_s", what, tokens_per_s, "tokens/s")
    _add(report, "served_alone", "served, one sentence at a time, median", alone_ms, "ms")


def _served_tokens_per_s(generator: LoadGenerator, effort: Effort) -> float:
    answer = generator.closed(CALLERS, _PER_CALL, _WARM_S, effort.window_s)
    return float(answer["tokens"] / answer["seconds"])


def _served_median_ms(generator: LoadGenerator, effort: Effort) -> float:
    return percentile(generator.singles(0, effort.singles), 50)


_SIZES = {
    "parameters": "parameters",
    "weights": "parameters in float32",
    "multiply_adds": "multiply-adds of a known word",
}


def _sizes(bilm: Bilm) -> dict[str, float]:
    return {
        "parameters": bilm.parameter_count / _MEGA,
        "weights": bilm.parameter_count * _BYTES_OF_A_FLOAT / _MIB,
        "multiply_adds": multiply_adds(bilm.config) / _MEGA,
    }


def _engine(bilm: Bilm, sentences: Sentences, options: EngineOptions) -> CellularBatch:
    batch = batch_of(bilm, options)
    show_all_words(batch, sentences)
    return batch


def _tokens_per_s(load: SteadyLoad, effort: Effort) -> float:
    return load.measure(effort.window_s).tokens_per_s


def _median_ms(engine: CellularBatch, sentences: Sentences) -> float:
    return 1e3 * percentile([run_seconds(engine, sentence) for sentence in sentences], 50)


def _add(report: Findings, key: str, what: str, found: Mapping[str, Sequence[float]], unit: str) -> None:
    report.detail(key, dict(found))
    for name in ("teacher", "student"):
        report.add(Finding(f"{key}/{name}", f"{name}: {what}", Spread.of(found[name]), unit))
    report.add(Finding(f"{key}/ratio", "  student / teacher", ratio(found["student"], found["teacher"]), "×"))


def main() -> None:
    """Measures, prints and writes."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads or default_threads())
    device = resolve_device(arguments.device)
    sentences = read_sentences(arguments.sentences)
    effort = Effort(arguments.rounds, arguments.window_s, arguments.singles)
    loaded = {name: load_model(str(getattr(arguments, name))) for name in ("teacher", "student")}
    settings = {
        **{name: f"{model.name}, version {model.version}" for name, model in loaded.items()},
        "text": DATA.name,
        "sentences": len(sentences),
        "tokens": sum(map(len, sentences)),
        **vars(effort),
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
    }
    report = new_report("distillation", "benchmarks.experiments.distillation", settings)
    precision: Precision = arguments.precision
    models = {name: model.bilm.to(device) for name, model in loaded.items()}
    compare_speed(report, models, sentences, effort, EngineOptions(precision=precision))
    sources = {name: str(getattr(arguments, name)) for name in ("teacher", "student")}
    flags = ("--device", str(device), "--threads", str(torch.get_num_threads()), "--precision", precision)
    compare_service(report, sources, arguments.sentences, effort, flags)
    report.write(arguments.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", metavar="TEACHER", help="as bilm-serve's --model")
    parser.add_argument("student", metavar="STUDENT", help="as bilm-serve's --model")
    parser.add_argument("--sentences", type=int, default=512, help="of WikiText-2's test part, the first (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="that each of them has (%(default)s)")
    parser.add_argument("--window-s", type=float, default=2.0, help="of each throughput measurement (%(default)s)")
    parser.add_argument("--singles", type=int, default=50, help="sentences one at a time, a round (%(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (one for each core that this process may use)")
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.json", help="(%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.experiments.distillation", main))
