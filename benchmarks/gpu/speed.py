"""Stages 5 to 7: the engine on the device under a steady load, on a sentence alone, and with other arithmetic."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from bilm_bench.statistics.percentiles import percentile
from bilm_bench.statistics.rounds import interleave, ratio
from bilm_model.config import SIZES
from bilm_model.engine.cuda.steps import Steps, TorchSteps
from bilm_model.engine.engine import RecurrentEngine
from bilm_model.engine.options import EngineOptions
from bilm_model.kernels.product_paths import Precision
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import PRECISIONS, Facts, Setting
from benchmarks.load.engines import POOLED_TOP, engine_of, show_all_words
from benchmarks.load.sentences import sentence_of
from benchmarks.load.steady import LoadSentence, SteadyLoad

_SENTENCES = 2000
_ROWS, _FEW_ROWS = (512, 1024, 2048), (8,)
_WINDOW_S, _SHORT_WINDOW_S = 3.0, 0.2
_PROFILED_S, _MOST_KERNELS = 0.3, 20
_ALONE_TOKENS, _ALONE_CALLS, _FEW_CALLS = 20, 300, 5
_ROUNDS = 3


def steady(setting: Setting) -> Facts:
    """Return tokens a second with all rows taken, by size, precision and rows; and a profile by kernel."""
    facts: Facts = {}
    for size in setting.sizes:
        for precision in PRECISIONS:
            for rows in _ROWS if setting.on_gpu else _FEW_ROWS:
                load = _load(setting, size, precision, rows)
                load.measure(_window_s(setting) / 4)
                work = load.measure(_window_s(setting))
                name = f"{size} {precision} {rows} rows"
                facts[name] = {
                    "tokens_per_s": work.tokens_per_s,
                    "steps_per_s": work.steps_per_s,
                    "python_share": work.cpu_s / work.seconds,
                    "round_ms": 1e3 * work.seconds / work.rounds,
                }
                print(name, facts[name], flush=True)
    facts["kernels"] = _kernels(setting)
    return facts


def alone(setting: Setting) -> Facts:
    """Return the latencies of one sentence of known words, from joining to the vectors on the host."""
    facts: Facts = {"tokens": _ALONE_TOKENS}
    for size in setting.sizes:
        for precision in PRECISIONS:
            engine = _engine(setting, size, precision, 64)
            sentence = sentence_of(_ALONE_TOKENS, setting.sentences(50))
            latencies_ms = [
                _latency_ms(engine, sentence) for _ in range(_ALONE_CALLS if setting.on_gpu else _FEW_CALLS)
            ]
            facts[f"{size} {precision}"] = {f"p{n}_ms": percentile(latencies_ms, n) for n in (50, 90, 99)}
    return facts


def ways(setting: Setting) -> Facts:
    """Return tokens a second with each arithmetic of a tick, in turns, and against torch's operators."""
    rows, size = (1024 if setting.on_gpu else 8), setting.sizes[0]
    makers: dict[str, Callable[[], Steps]] = {"torch": TorchSteps}
    if setting.on_gpu:
        from bilm_model.engine.cuda.triton_steps import TritonSteps  # noqa: PLC0415 - not on every machine

        makers |= {"product and gates": partial(TritonSteps, "off"), "fused": partial(TritonSteps, "on")}
    facts: Facts = {}
    for precision in PRECISIONS:
        loads = {name: _load(setting, size, precision, rows, make()) for name, make in makers.items()}
        for load in loads.values():
            load.measure(_window_s(setting) / 4)
        found = interleave({name: _measured(setting, load) for name, load in loads.items()}, _ROUNDS)
        for name, rates in found.items():
            median = ratio(rates, found["torch"]).median
            facts[f"{size} {precision} {name}"] = {"tokens_per_s": rates, "against_torch": median}
    return facts


def _measured(setting: Setting, load: SteadyLoad) -> Callable[[], float]:
    return lambda: load.measure(_window_s(setting) / 2).tokens_per_s


def _window_s(setting: Setting) -> float:
    return _WINDOW_S if setting.on_gpu else _SHORT_WINDOW_S


def _engine(
    setting: Setting, size: str, precision: Precision, rows: int, steps: Steps | None = None
) -> RecurrentEngine[LoadSentence]:
    """Return an engine that knows all words."""
    options = replace(EngineOptions(), precision=precision, max_rows=rows, max_tokens=256 * rows, input_cache_mib=0)
    batch = setting.batch(setting.bilm(size), options, steps=steps)
    show_all_words(batch, setting.sentences(_SENTENCES))
    return engine_of(batch, SIZES[size])


def _load(setting: Setting, size: str, precision: Precision, rows: int, steps: Steps | None = None) -> SteadyLoad:
    engine = _engine(setting, size, precision, rows, steps)
    return SteadyLoad(engine, setting.sentences(_SENTENCES), None, POOLED_TOP)


def _latency_ms(engine: RecurrentEngine[LoadSentence], tokens: list[str]) -> float:
    begun_s = time.perf_counter()
    engine.join([LoadSentence(tokens, POOLED_TOP)])
    while not engine.advance():
        pass
    return 1e3 * (time.perf_counter() - begun_s)


def _kernels(setting: Setting) -> list[Facts]:
    """Return where the device's time goes in a steady load: kernels by their time."""
    load = _load(setting, setting.sizes[0], "bfloat16", 1024 if setting.on_gpu else 8)
    load.measure(_window_s(setting) / 4)
    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        load.measure(_PROFILED_S if setting.on_gpu else _SHORT_WINDOW_S)
        setting.synchronize()
    averages = profiled.key_averages()

    def microseconds(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
        return float(event.self_device_time_total if setting.on_gpu else event.self_cpu_time_total)

    ordered = sorted(averages, key=microseconds, reverse=True)[:_MOST_KERNELS]
    return [{"name": event.key[:120], "calls": event.count, "us": microseconds(event)} for event in ordered]
