"""The CUDA back end against the reference on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from bilm_model.characters import character_ids
from bilm_model.config import BilmConfig, Residual
from bilm_model.engine.cuda.steps import Steps, TorchSteps
from bilm_model.engine.host_ring import HostRing
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.results import TorchCollector
from bilm_model.engine.sentences import PlainSentence
from bilm_model.engine.state_transfer import StateTransfer
from bilm_model.engine.transfer import CudaTransfers, Sender
from bilm_model.engine.types import DataType, OutputSpec, TokenChoice
from bilm_model.kernels.product_paths import Precision
from bilm_model.scalar_mix import LayerMix, Pooling, Selection
from bilm_model.weights.loading import load

from tests.parity.test_cuda import (
    BACKENDS,
    GPU,
    SLICED,
    TOLERANCE,
    WIDE,
    engine_of,
    error,
    random_sentences,
    references,
    worst_cosine,
    worst_error,
)
from tests.parity.test_golden import Golden
from tests.parity.test_oracle import CONFIGS
from tests.support.plans import plan_of

pytestmark = [
    pytest.mark.gpu,
    # of torch's own way to find the peaks, once in a process
    pytest.mark.filterwarnings("ignore:index_reduce"),
]

TEXTS = (
    "The house by the river was built in 1897 , and nobody has lived there since .",
    "A tyypo , an unknwon word and <unk> don't stop a model that reads bytes .",
    "대한민국 is written with three bytes a syllable ; naïve café too .",
    "Why ?",
    "In 1948 the band toured @-@ wide , playing " + "on and on " * 30 + ".",
)


def steps_by_triton(fused: Literal["on", "off"]) -> Steps:
    """Not at the top: Triton may be missing where no GPU is."""
    from bilm_model.engine.cuda.triton_steps import TritonSteps

    return TritonSteps(fused)


@pytest.mark.parametrize("kind", ["triton", "fused triton", "torch"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), SLICED], ids=[*CONFIGS.keys(), "sliced"])
def test_gpu_agrees_with_the_reference(config: BilmConfig, kind: str) -> None:
    steps = TorchSteps() if kind == "torch" else steps_by_triton("on") if kind == "fused triton" else None
    engine = engine_of(config, GPU, EngineOptions(max_rows=24), steps=steps)
    assert "captured graphs" in engine.backend
    assert ("Triton" in engine.backend) == (kind != "torch")
    assert ("fused recurrent product on" in engine.backend) == (kind == "fused triton")
    assert worst_error(engine, config, random_sentences(100, config)) < TOLERANCE


def test_gpu_golden_vectors(golden: Path) -> None:
    vectors, bilm = Golden(golden), load(str(golden)).bilm
    engine = engine_of(bilm.config, GPU, bilm=bilm)
    found = engine.run([PlainSentence(tokens) for tokens in vectors.sentences])
    for each, expected in zip(found, vectors.stateless, strict=True):
        assert np.abs(each.layers[:, 1:-1].cpu().numpy() - expected).max(initial=0.0) < TOLERANCE


@pytest.mark.parametrize(("precision", "bound"), [("float32", TOLERANCE), ("bfloat16", None)])
def test_gpu_the_model_that_ships(precision: Precision, bound: float | None) -> None:
    """Of the README's bounds: 1e-5 in float32, a cosine of 0.9995 in bfloat16, both against float64."""
    bilm = load("").bilm
    sentences = [PlainSentence(tokens) for tokens in map(str.split, TEXTS)]
    expected = references(load("").bilm.double(), sentences)
    found = engine_of(bilm.config, GPU, EngineOptions(precision), bilm=bilm).run(sentences)
    assert worst_cosine(found, expected) > 0.9995
    if bound is not None:
        assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < bound


def test_gpu_graphs_change_nothing() -> None:
    sentences = random_sentences(60, WIDE)
    found, expected = (engine_of(WIDE, GPU, prepare=prepare).run(sentences) for prepare in (True, False))
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


def test_gpu_company_changes_little() -> None:
    """The bound that is stated for GPUs: 1e-5 in float32, a cosine of 0.9999 in bfloat16."""
    sentences = random_sentences(300, WIDE)
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        engine = engine_of(WIDE, GPU, EngineOptions(precision, max_rows=256))
        together = engine.run(sentences)
        alone = [engine.run([sentence])[0] for sentence in sentences]
        if precision == "float32":
            assert max(error(a, b) for a, b in zip(together, alone, strict=True)) < TOLERANCE
        assert worst_cosine(together, alone) > 0.9999


@pytest.mark.parametrize("fused", ["on", "off"])
def test_gpu_bfloat16_products_stay_close(fused: Literal["on", "off"]) -> None:
    sentences = random_sentences(100, WIDE)
    found = engine_of(WIDE, GPU, EngineOptions("bfloat16"), steps=steps_by_triton(fused)).run(sentences)
    expected = engine_of(WIDE, GPU).run(sentences)
    assert worst_cosine(found, expected) > 0.9995


@pytest.mark.parametrize("name", ["as published", "three layers, input to input"])
def test_gpu_input_projections_can_be_kept(name: str) -> None:
    config = CONFIGS[name]
    options = EngineOptions(max_rows=9, max_tokens=1000, token_cache_mib=0, input_cache_mib=16)
    engine = engine_of(config, GPU, options)
    for seed in range(3):
        assert worst_error(engine, config, random_sentences(50, config, seed=seed)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("residual", get_args(Residual))
def test_gpu_a_round_waits_for_nothing(residual: Residual) -> None:
    engine = engine_of(replace(SLICED, residual=residual), GPU)
    backend = BACKENDS[engine]
    with torch.inference_mode():
        backend.encode(np.arange(3), character_ids(["a", "b", "c"]))
        torch.cuda.synchronize()
        plan = plan_of([[5]] * 4)
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(4):
                backend.run(plan, np.zeros_like(plan.places))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
def test_gpu_results_and_states_wait_for_nothing() -> None:
    engine = engine_of(SLICED, GPU)
    memory, mix = engine.memory, LayerMix((0.1, 0.2, 0.3), 1.0, True)
    selections = [
        Selection(layers, pooling, True) for layers in ("all", "top", "average", mix) for pooling in get_args(Pooling)
    ]
    asked = [OutputSpec(each, data_type) for each in selections for data_type in get_args(DataType)]
    choices = {
        number: TokenChoice(np.array([2, 0, 2]), np.array([1, 2]) if asked[number].pooled else None)
        for number in range(0, len(asked), 2)
    }
    numbers = np.arange(5 * len(asked))
    steps = SentenceSteps(np.full(len(asked), 5), numbers, np.zeros_like(numbers))
    collector, transfer = TorchCollector(memory), StateTransfer(GPU)
    lanes = range(20)
    states = [(memory.h[:, :, lane].cpu().numpy(), memory.c[:, :, lane].cpu().numpy() + lane) for lane in lanes]
    memory.vectors.zero_()
    memory.outputs.zero_()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(4):
            collected = collector.collect(steps, asked, choices)
            transfer.write(memory, lanes, states)
            found = transfer.read(memory, lanes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(not vectors.any() for vectors in collected.vectors())
    for (h, c), expected in zip(found.states(), states, strict=True):
        assert np.array_equal(h, expected[0])
        assert np.array_equal(c, expected[1])


def test_gpu_transfers() -> None:
    """Through a ring that three copies fill, so that it grows, and then has its oldest bytes moved."""
    ring = HostRing(CudaTransfers(GPU), first_bytes=2**22, max_bytes=2**23)
    sender = Sender(GPU)
    arrays = [np.arange(300_000, dtype=np.float32) * i for i in range(12)]
    arrivals = []
    for i, array in enumerate(arrays):
        sent, number = sender.send([array, np.array([i])])
        arrivals.append(ring.receive((sent + number).view(torch.uint8)))
    for i, (array, arrival) in enumerate(zip(arrays, arrivals, strict=True)):
        assert (arrival.bytes().view(np.float32) == array + i).all()
        assert arrival.done()
