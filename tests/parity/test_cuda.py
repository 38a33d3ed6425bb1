"""The CUDA back end against the reference on CPU tensors: everything but the graphs, see `test_gpu`."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from bilm_model.bilm import Bilm, random_bilm
from bilm_model.characters import character_ids, with_boundaries
from bilm_model.config import BilmConfig
from bilm_model.device import compute_exactly, resolve_device
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import MAX_TICKS
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.cuda.backend import CudaBackend, n_slices, row_bucket
from bilm_model.engine.cuda.fastest import fastest_steps, missing_for_triton, triton_steps
from bilm_model.engine.cuda.inputs import distinct
from bilm_model.engine.cuda.schedule import Schedule
from bilm_model.engine.cuda.steps import Steps, TorchSteps
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence
from bilm_model.errors import ConfigError
from bilm_model.kernels.fallbacks import fallback_counts
from torch import Tensor

from tests.parity.interpreted import interpreted_steps
from tests.parity.test_oracle import CONFIGS
from tests.support.fake_engine import DEVICE_ASSERT, device_error
from tests.support.plans import plan_of

# of torch's own way to find the peaks, once in a process
pytestmark = pytest.mark.filterwarnings("ignore:index_reduce")

CPU, GPU = torch.device("cpu"), resolve_device("cuda") if torch.cuda.is_available() else torch.device("cuda:0")
TOLERANCE = 1e-5
SLICED = BilmConfig(char_dim=4, filters=((1, 6), (3, 10)), projection_dim=16, cell_dim=1024)
"""Its projection is a product of several slices of the cells."""
WIDE = BilmConfig(char_dim=8, filters=((1, 64), (3, 192)), projection_dim=64, cell_dim=512, n_highway=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks of these sizes take longest to wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bilm_of(config: BilmConfig) -> Bilm:
    """Random weights and biases, as small as trained ones: larger weights would make every rounding grow."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.dim() == 1 else tensor
        for name, tensor in random_bilm(config).state_dict().items()
    }
    return Bilm.from_tensors(config, tensors)


def engine_of(
    config: BilmConfig,
    device: torch.device = CPU,
    options: EngineOptions | None = None,
    *,
    steps: Steps | None = None,
    bilm: Bilm | None = None,
    prepare: bool = True,
    block_rows: int | None = None,
) -> CellularBatch:
    """An engine on this back end, whatever the device."""
    options = options or EngineOptions()
    options = replace(options, input_cache_mib=options.input_cache_mib or 0)  # as on a GPU
    made: list[CudaBackend] = []

    def new_backend(bilm: Bilm, memory: Memory, options: EngineOptions) -> CudaBackend:
        assert options.max_rows is not None
        cache_bytes, n_rows = options.input_cache_bytes, options.max_rows
        backend = CudaBackend(
            bilm, memory, n_rows, MAX_TICKS, input_cache_bytes=cache_bytes, steps=steps, block_rows=block_rows
        )
        made.append(backend)
        return backend

    engine = CellularBatch(bilm or bilm_of(config), device, options, new_backend)
    BACKENDS[engine] = made[0]
    if prepare:
        made[0].prepare()
    return engine


BACKENDS: WeakKeyDictionary[CellularBatch, CudaBackend] = WeakKeyDictionary()


def random_sentences(n: int, config: BilmConfig, max_tokens: int = 40, seed: int = 3) -> list[PlainSentence]:
    """Of all lengths, every third with a state to continue from."""
    shuffler, numbers = random.Random(seed), np.random.default_rng(seed)
    words = [f"{'w' * shuffler.randrange(9)}{i}" for i in range(50)] + ["<S>", "대한민국", "x" * 60]

    def state() -> tuple[Any, Any]:
        # No further than the clips, as the states of a service are
        h = numbers.uniform(-1, 1, (config.n_layers, 2, config.projection_dim)) * min(config.proj_clip, 0.9)
        c = numbers.uniform(-1, 1, (config.n_layers, 2, config.cell_dim)) * min(config.cell_clip, 2)
        return h.astype(np.float32), c.astype(np.float32)

    return [
        PlainSentence(shuffler.choices(words, k=shuffler.randrange(max_tokens + 1)), None if i % 3 else state())
        for i in range(n)
    ]


def references(bilm: Bilm, sentences: Sequence[PlainSentence]) -> list[EmbeddedSentence]:
    """By the plain network in float64."""
    tokens = [with_boundaries(sentence.tokens) for sentence in sentences]
    state = bilm.zero_state(len(sentences))
    for n, sentence in enumerate(sentences):
        if sentence.state is not None:
            state.h[:, :, n], state.c[:, :, n] = map(torch.from_numpy, sentence.state)
    ids = torch.from_numpy(character_ids([token for each in tokens for token in each])).long()
    lengths = [len(each) for each in tokens]
    layers, after = bilm(ids, lengths, state)
    return [
        EmbeddedSentence(found, after.h[:, :, n], after.c[:, :, n]) for n, found in enumerate(layers.split(lengths, 1))
    ]


def error(found: EmbeddedSentence, expected: EmbeddedSentence) -> float:
    pairs = ((found.layers, expected.layers), (found.h, expected.h), (found.c, expected.c))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.cpu() - b.cpu()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def worst_error(engine: CellularBatch, config: BilmConfig, sentences: Sequence[PlainSentence]) -> float:
    bilm = bilm_of(config).double()
    found = engine.run(sentences)
    return max(error(*pair) for pair in zip(found, references(bilm, sentences), strict=True))


def worst_cosine(found: Sequence[EmbeddedSentence], expected: Sequence[EmbeddedSentence]) -> float:
    pairs = [(a.layers.cpu().double(), b.layers.cpu().double()) for a, b in zip(found, expected, strict=True)]
    return min(float(torch.cosine_similarity(a, b, dim=-1).min()) for a, b in pairs if a.numel())


ROUNDS = pytest.mark.parametrize("block_rows", [None, 7, 40], ids=["long rounds", "a tick a round", "short rounds"])


@ROUNDS
@pytest.mark.parametrize("config", [*CONFIGS.values(), SLICED], ids=[*CONFIGS.keys(), "sliced"])
def test_agrees_with_the_reference(config: BilmConfig, block_rows: int | None) -> None:
    engine = engine_of(config, options=EngineOptions(max_rows=7), block_rows=block_rows)
    assert worst_error(engine, config, random_sentences(30, config)) < TOLERANCE


QUICK = ("as published", "input to input", "no LSTM projection")
INTERPRETED = [
    # The interpreter takes many seconds for the others: their kernels are held by themselves in test_triton_steps.py
    *(
        pytest.param(config, "off", id=f"{name}-off", marks=[pytest.mark.slow] * (name not in QUICK))
        for name, config in {**CONFIGS, "sliced": SLICED}.items()
    ),
    *(pytest.param(config, "on", id=f"{name}-on") for name, config in CONFIGS.items()),
    pytest.param(SLICED, "on", id="sliced-on", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("config", "fused"), INTERPRETED)
def test_the_kernels_agree_with_the_reference(config: BilmConfig, fused: str) -> None:
    engine = engine_of(config, options=EngineOptions(max_rows=5), steps=interpreted_steps(fused))
    assert "Triton" in engine.backend
    # Few sentences fused: the interpreter takes as long for an empty row of a tile as for another
    sentences = (
        random_sentences(8, config, max_tokens=8) if fused == "off" else random_sentences(3, config, max_tokens=3)
    )
    assert worst_error(engine, config, sentences) < TOLERANCE


def test_agrees_with_the_other_back_end() -> None:
    config = CONFIGS["as published"]
    sentences = random_sentences(40, config)
    found, expected = (
        engine.run(sentences)
        for engine in (engine_of(config, options=EngineOptions(max_rows=9)), CellularBatch(bilm_of(config), CPU))
    )
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < TOLERANCE


@pytest.mark.parametrize("kind", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_bfloat16_products_stay_close(kind: str) -> None:
    steps = TorchSteps() if kind == "torch" else interpreted_steps()
    options = EngineOptions("bfloat16", max_rows=4)
    sentences = random_sentences(8, SLICED, max_tokens=8)
    found = engine_of(SLICED, options=options, steps=steps).run(sentences)
    assert worst_cosine(found, CellularBatch(bilm_of(SLICED), CPU).run(sentences)) > 0.999
    assert all(part.dtype == torch.float32 for each in found for part in (each.layers, each.h, each.c))


def test_those_who_are_not_in_flight_are_left_alone() -> None:
    """Rows of a bucket that nobody has, and rows that have ended, keep their state: 5 rows are computed as 8."""
    engine = engine_of(SLICED, options=EngineOptions(max_rows=8))
    memory = BACKENDS[engine].memory
    memory.c.fill_(7.0)
    memory.h.fill_(7.0)
    engine.join([PlainSentence(["a"] * n) for n in (1, 1, 3, 4, 5)])
    slots: set[int] = set()
    while engine.n_in_flight:
        ended = engine.advance()
        slots.update(slot for _, slot in ended)
        engine.leave([sentence for sentence, _ in ended])
    free = sorted(set(range(8)) - slots)
    assert (memory.c[:, :, free] == 7.0).all()
    assert (memory.h[:, :, free] == 7.0).all()


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_lanes_that_a_round_leaves_out_keep_their_states(kind: str) -> None:
    """Three rows of eight run, computed as four, behind a round in which the others ran."""
    steps = TorchSteps() if kind == "torch" else interpreted_steps("off")
    engine = engine_of(CONFIGS["as published"], options=EngineOptions(max_rows=8), steps=steps)
    memory = BACKENDS[engine].memory
    engine.join([PlainSentence(["a"] * n, deferrable=True) for n in (2, 3, 4, 5)])
    engine.advance(max_steps=1)
    left_out = [memory.h[:, :, :4].clone(), memory.c[:, :, :4].clone()]
    assert all(state.any() for state in left_out)
    engine.join([PlainSentence(["b"] * n) for n in (1, 1, 1)])
    n_ended = 0
    while n_ended < 3:
        ended = engine.advance(leave_out=True)
        n_ended += len(ended)
        assert torch.equal(memory.h[:, :, :4], left_out[0])
        assert torch.equal(memory.c[:, :, :4], left_out[1])
    engine.advance(leave_out=True, max_steps=1)  # there is nothing else
    assert not torch.equal(memory.h[:, :, :4], left_out[0])


def test_a_stretch_of_ticks_is_put_together_from_graphs() -> None:
    config, sentences = CONFIGS["as published"], random_sentences(30, CONFIGS["as published"])
    engine = engine_of(config, options=EngineOptions(max_rows=7))
    backend, replayed = BACKENDS[engine], set()

    class FakeGraph:
        def __init__(self, layer: int, bucket: int, n_ticks: int) -> None:
            self.key = (layer, bucket, n_ticks)

        def replay(self) -> None:
            layer, bucket, n_ticks = self.key
            replayed.add(self.key)
            for _ in range(n_ticks):
                backend.tick(layer, bucket)

    keys = list(itertools.product(range(2), (1, 2, 4, 7), (1, 4, 16)))
    backend.graphs = {key: FakeGraph(*key) for key in keys}
    assert worst_error(engine, config, sentences) < TOLERANCE
    assert len(replayed) > len(keys) // 2


@ROUNDS
@pytest.mark.parametrize("name", ["as published", "three layers, input to input"])
def test_input_projections_can_be_kept(name: str, block_rows: int | None) -> None:
    config = CONFIGS[name]
    # So few entries that they are given up all the time
    options = EngineOptions(max_rows=3, max_tokens=100, token_cache_mib=0, input_cache_mib=1)
    engine = engine_of(config, options=options, block_rows=block_rows)
    for seed in range(3):
        assert worst_error(engine, config, random_sentences(20, config, seed=seed)) < TOLERANCE
    with pytest.raises(ConfigError, match="input_cache_mib: expected 0 or at least 20 for this model, found 1"):
        engine_of(config, options=replace(options, max_tokens=65_536))


def test_a_round_that_is_too_large_is_refused() -> None:
    schedule = Schedule(CPU, max_ticks=2, max_rows=2, max_steps=8)
    none = np.zeros(0, dtype=np.int64)
    for n_rows, n_ticks in ((3, 1), (1, 3)):
        plan = plan_of([[n_ticks]] * n_rows)
        with pytest.raises(ValueError, match="too large"):
            schedule.send(plan, plan.places, none)


def test_buckets() -> None:
    for n in range(1, 5000):
        assert n <= row_bucket(n) <= max(2 * n - 1, 1)
        assert n <= 64 or row_bucket(n) <= 1.25 * n
        assert row_bucket(row_bucket(n)) == row_bucket(n)
    assert len({row_bucket(n) for n in range(1, 1025)}) == 23


def test_slices() -> None:
    original = {rows: n_slices(rows, 4096, 512, 132) for rows in (1, 128, 256, 512, 1024, 4096)}
    assert original == {1: 16, 128: 16, 256: 8, 512: 4, 1024: 2, 4096: 1}
    assert n_slices(1, 4096 - 256, 512, 132) == 1 << 3
    assert n_slices(1, 257, 8, 132) == 1


def test_distinct() -> None:
    generator = np.random.default_rng(1)
    scratch = generator.integers(0, 9, 60)
    for n in (1, 2, 10, 100):
        entries = generator.integers(0, 60, n)
        different, index = distinct(entries, scratch)
        assert sorted(different.tolist()) == sorted(set(entries.tolist()))
        assert (different[index] == entries).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and so the kernels work")
def test_without_triton_torch_does(caplog: pytest.LogCaptureFixture) -> None:
    before = fallback_counts().get("elementwise", 0)
    assert isinstance(fastest_steps(GPU, [torch.float32], triton_steps), TorchSteps)
    assert "Triton kernels unavailable, falling back to torch" in caplog.text
    assert fallback_counts()["elementwise"] == before + 1


class Failing(TorchSteps):
    """Fail in one format, or give other numbers there."""

    def __init__(self, dtype: torch.dtype, error: Exception | None) -> None:
        super().__init__()
        self._dtype, self._error = dtype, error

    def outputs(self, schedule: Schedule, parts: Tensor, **others: Any) -> None:
        super().outputs(schedule, parts, **others)
        if others["h_next"].dtype == self._dtype:
            if self._error is not None:
                raise self._error
            others["h_next"].zero_()


FORMATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("error", [RuntimeError("no such architecture"), None])
@pytest.mark.parametrize("dtype", FORMATS)
def test_kernels_are_tried_in_each_format_that_serves(
    dtype: torch.dtype, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = fastest_steps(CPU, FORMATS, lambda: Failing(dtype, error))
    assert type(found) is TorchSteps
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert Path(record.pathname).name == "fastest.py"
    others = [each for each in FORMATS if each != dtype]
    assert isinstance(fastest_steps(CPU, others, lambda: Failing(dtype, error)), Failing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), device_error(DEVICE_ASSERT)])
def test_a_device_that_fails_is_no_reason_to_compute_more_slowly(error: Exception) -> None:
    with pytest.raises(type(error)):
        fastest_steps(CPU, FORMATS, lambda: Failing(torch.bfloat16, error))


_START = """
import logging, torch
from bilm_model.engine.cuda.fastest import fastest_steps, triton_steps
from bilm_model.kernels.fallbacks import fallback_counts
logging.basicConfig(format="%(levelname)s %(filename)s %(message)s")
print(type(fastest_steps(torch.device("cpu"), [torch.float32], triton_steps)).__name__, fallback_counts())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and so the kernels work")
def test_a_start_without_home_and_path_says_what_is_missing() -> None:
    environment = {"HOME": "/nonexistent", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", _START], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "TorchSteps {'elementwise': 1}"
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("ERROR fastest.py Triton kernels unavailable, falling back to torch: ")
    assert "there is no C compiler (cc, gcc, clang) on PATH" in line


def test_float32_is_float32_on_a_gpu(request: pytest.FixtureRequest) -> None:
    flags = (
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    )
    for where, name in flags:
        request.addfinalizer(partial(setattr, where, name, getattr(where, name)))
        setattr(where, name, True)
    compute_exactly()
    assert not any(getattr(where, name) for where, name in flags)


def test_what_triton_needs_is_named(tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    compiler = tmp_path / "cc"
    compiler.touch(0o755)
    whole = {"PATH": str(tmp_path), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    assert missing_for_triton(whole, tmp_path) == []
    (other,) = missing_for_triton({**whole, "CC": "no-such-cc"}, tmp_path)
    assert other == "there is no C compiler (no-such-cc) on PATH"
    found = missing_for_triton({"PATH": "", "HOME": str(tmp_path / "Python.h" / "home")}, tmp_path / "include")
    assert [each.split()[:3] for each in found] == [
        ["there", "is", "no"], ["Python's", "headers", "are"], ["its", "cache", "can't"],
    ]  # fmt: skip
