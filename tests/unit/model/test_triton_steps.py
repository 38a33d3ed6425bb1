"""The kernels' numbers, by Triton's interpreter.

Legend: see `steps`.

The interpreter cuts float32 off where it makes bfloat16 of it; a GPU rounds. So bfloat16 may be off by one in the last
of its 8 bits here.
"""

import itertools
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from bilm_model.config import Residual
from bilm_model.engine.cuda.schedule import FIRST_INPUTS, FRESH, LATER_INPUTS, Schedule
from bilm_model.engine.cuda.steps import Steps, TorchSteps, check_steps
from bilm_model.engine.planner import RoundPlan
from bilm_model.kernels.elementwise import TorchElementwise
from numpy.typing import NDArray
from torch import Tensor

from tests.parity.interpreted import interpreted_steps

CPU = torch.device("cpu")
SIZES = ((3, 2), (1, 1), (5, 4))
"""Rows at the first and at the second tick, which is the one that is looked at."""


@pytest.fixture(params=["triton", "torch"])
def steps(request: pytest.FixtureRequest) -> Steps:
    return interpreted_steps() if request.param == "triton" else TorchSteps()


WAYS = pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *itertools.product(("torch", "product and gates"), (torch.float32, torch.bfloat16)),
        ("fused", torch.float32),  # the interpreter's bfloat16 dot is wrong
    ],
)
"""How cells are computed, and in which formats."""


def steps_of(way: str) -> Steps:
    return TorchSteps() if way == "torch" else interpreted_steps("on" if way == "fused" else "off")


class Setting:
    """Random numbers for a step."""

    def __init__(self, sizes: Sequence[int], n_bucket: int, n_slots: int = 6, n_places: int = 30) -> None:
        self.random = np.random.default_rng(len(sizes) + n_bucket)
        self.generator = torch.Generator().manual_seed(n_bucket)
        self.n_rows, self.first, self.n_bucket = sizes[1], sizes[0], n_bucket
        n_steps = sum(sizes)
        self.plan = RoundPlan(
            slots=self.random.permutation(n_slots)[: sizes[0]],
            sizes=tuple(sizes),
            places=np.stack([self.random.permutation(n_places)[:n_steps] for _ in range(2)]),
            last=np.zeros(sizes[0], dtype=np.int64),
            fresh=np.arange(n_steps) % 4 == 2,
        )
        self.index = self.random.integers(0, 4, (2, n_steps))  # with repeats
        self.schedule = Schedule(CPU, max_ticks=3, max_rows=n_slots, max_steps=n_steps + 5)
        self.schedule.send(self.plan, self.index, np.zeros(0, dtype=np.int64))

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (2 * torch.randn(shape, generator=self.generator)).to(dtype)


def part_of_a_buffer(h: Tensor) -> Tensor:
    """Return h (2, R, P) as the first rows of more, as the engine passes it."""
    return torch.cat([h, torch.full_like(h, torch.nan)], dim=1)[:, : h.shape[1]]


def with_contiguous_columns(weights: Tensor) -> Tensor:
    return weights.transpose(1, 2).contiguous().transpose(1, 2)


def compute_gates(
    steps: Steps, schedule: Schedule, column: int, gates_h: Tensor, gates_x: Tensor, **others: Any
) -> None:
    """Have `gates_h` (2, R, 4·C) as the recurrent product: that of the unit matrix."""
    unit = torch.eye(gates_h.shape[1], dtype=gates_h.dtype).repeat(2, 1, 1)
    weights = with_contiguous_columns(gates_h)
    steps.cells(schedule, column, part_of_a_buffer(unit), weights, gates_x, **others)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    relative = 2**-7 if dtype == torch.bfloat16 else 0.0
    return torch.allclose(found.float(), expected.float(), rtol=relative, atol=1e-6, equal_nan=True)


@WAYS
@pytest.mark.parametrize(("n_cells", "n_slices"), [(1, 1), (40, 1), (40, 4), (256, 2), (300, 1), (1040, 4)])
@pytest.mark.parametrize("sizes", SIZES)
def test_gates(way: str, dtype: torch.dtype, n_cells: int, n_slices: int, sizes: tuple[int, int]) -> None:
    s = Setting(sizes, n_bucket=6)
    gates_h, gates_x = s.numbers(2, 6, 4 * n_cells, dtype=dtype), s.numbers(4, 4 * n_cells, dtype=dtype)
    gates_h[1, 0] *= 100  # far where the exponential overflows
    c = s.numbers(2, 6, n_cells)
    c[0, s.plan.slots[0], 0] = torch.nan
    expected_c = c.clone()
    m = torch.full((2 * n_slices, 6, n_cells // n_slices), 7.0, dtype=dtype)
    s.schedule.clock[0] = 1
    compute_gates(steps_of(way), s.schedule, FIRST_INPUTS, gates_h, gates_x, c=c, clip=0.75, m=m)
    found = m.view(2, n_slices, 6, -1).transpose(1, 2).reshape(2, 6, n_cells)
    for d in range(2):
        slots = torch.from_numpy(s.plan.slots)[: s.n_rows]
        index = torch.from_numpy(s.index[d, s.first :])
        expected = torch.zeros(s.n_rows, n_cells, dtype=dtype)
        of_rows = (gates_h[d], gates_x, index, expected_c[d], slots)
        fresh = torch.from_numpy(s.plan.fresh)[s.first :]
        TorchElementwise().lstm(*of_rows, fresh=fresh, clip=0.75, out=expected)
        assert close(found[d, : s.n_rows], expected, dtype)
    assert close(c, expected_c, torch.float32)
    assert c[0, s.plan.slots[0], 0].isnan()
    assert found[0, 0, 0].isnan()
    assert s.schedule.clock.tolist() == [1, 1]


ROWS = (1, 3, 16, 40, 130)


@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize(("n_components", "n_cells", "n_slices"), [(64, 64, 1), (20, 40, 1), (72, 80, 2)])
@pytest.mark.parametrize("fresh", ["none", "some", "all"])
def test_the_fused_kernel_computes_what_torch_does(
    n_rows: int, n_components: int, n_cells: int, n_slices: int, fresh: str
) -> None:
    """Sizes that are multiples of a tile's, and others, which leave a part of each tile unused."""
    n_bucket, found = n_rows + 2, []
    for way in ("fused", "torch"):
        s = Setting((n_rows, n_rows), n_bucket, n_slots=n_rows + 3, n_places=2 * n_rows)
        s.schedule.steps[:, FRESH] = torch.arange(len(s.schedule.steps)) % 3 == 1 if fresh == "some" else fresh == "all"
        h, weights = s.numbers(2, n_bucket, n_components) / 4, s.numbers(2, n_components, 4 * n_cells)
        weights /= 2 * n_components**0.5
        gates_x, c = s.numbers(4, 4 * n_cells), s.numbers(2, n_rows + 3, n_cells)
        m = torch.zeros(2 * n_slices, n_bucket, n_cells // n_slices)
        s.schedule.clock[0] = 1
        of_rows = (part_of_a_buffer(h), with_contiguous_columns(weights), gates_x)
        steps_of(way).cells(s.schedule, FIRST_INPUTS, *of_rows, c=c, clip=3.0, m=m)
        found.append((c, m[:, :n_rows], s.schedule.clock))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-6


def test_few_and_many_rows_have_tiles_of_their_own() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from bilm_model.engine.cuda.triton_steps import tile_of

    for dtype in (torch.float32, torch.bfloat16):
        assert len({tile_of(n_rows, dtype) for n_rows in ROWS}) == 2
        assert tile_of(16, dtype).rows == 16


def test_products_are_fused_by_default_where_they_use_tensor_cores() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from bilm_model.engine.cuda.triton_steps import fuses

    assert [fuses("auto", dtype) for dtype in (torch.float32, torch.bfloat16)] == [False, True]
    assert fuses("on", torch.float32)
    assert not fuses("off", torch.bfloat16)


def test_weights_in_another_order_are_refused() -> None:
    s = Setting((1, 1), n_bucket=1)
    h, weights, gates_x = torch.zeros(2, 1, 4), torch.zeros(2, 4, 12), torch.zeros(4, 12)
    with pytest.raises(ValueError, match="weights: expected contiguous columns"):
        steps_of("fused").cells(
            s.schedule, FIRST_INPUTS, h, weights, gates_x, c=torch.zeros(2, 6, 3), clip=1.0, m=torch.zeros(2, 1, 3)
        )


@WAYS
def test_a_fresh_step_has_the_bits_of_a_zero_state(way: str, dtype: torch.dtype) -> None:
    s = Setting((5, 4), n_bucket=6)
    n_cells, n_components, (row,) = 300, 24, np.flatnonzero(s.plan.fresh[5:])
    h, c = s.numbers(2, 6, n_components, dtype=dtype), s.numbers(2, 6, n_cells)
    weights = with_contiguous_columns(s.numbers(2, n_components, 4 * n_cells, dtype=dtype))
    gates_x = s.numbers(4, 4 * n_cells, dtype=dtype)
    zeros_h, zeros_c = h.clone(), c.clone()
    zeros_h[:, row], zeros_c[:, s.plan.slots[row]] = 0.0, 0.0
    h[:, row], c[:, s.plan.slots[row]] = torch.nan, torch.nan
    found, expected = torch.zeros(2, 2, 6, n_cells, dtype=dtype)
    for before, cells, m in ((h, c, found), (zeros_h, zeros_c, expected)):
        s.schedule.clock[0] = 1
        steps_of(way).cells(s.schedule, FIRST_INPUTS, before, weights, gates_x, c=cells, clip=0.75, m=m)
        s.schedule.steps[:, FRESH] = 0
    assert torch.equal(found[:, :4], expected[:, :4])
    assert torch.equal(c, zeros_c)


@pytest.mark.parametrize("way", ["torch", "product and gates", "fused"])
@pytest.mark.parametrize("column", [FIRST_INPUTS, LATER_INPUTS])
def test_each_direction_reads_its_own_input_projections(way: str, column: int) -> None:
    s = Setting((2, 2), n_bucket=2)
    gates_x = s.numbers(2 * 4, 4 * 3)
    c, m = torch.zeros(2, 6, 3), torch.zeros(2, 2, 3)
    s.schedule.clock[0] = 1
    compute_gates(steps_of(way), s.schedule, column, torch.zeros(2, 2, 12), gates_x, c=c, clip=3.0, m=m)
    rows = s.schedule.steps[2:4, column : column + 2].T
    i, j, _, o = gates_x[rows].chunk(4, dim=-1)
    assert close(m, torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(j)), torch.float32)
    if column == LATER_INPUTS:
        assert rows.tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_components", "n_slices"), [(1, 1), (12, 2), (256, 1), (300, 3)])
@pytest.mark.parametrize("residual", get_args(Residual))
@pytest.mark.parametrize("sizes", SIZES)
def test_outputs(  # noqa: PLR0917
    steps: Steps, dtype: torch.dtype, n_components: int, n_slices: int, residual: Residual, sizes: tuple[int, int]
) -> None:
    s = Setting(sizes, n_bucket=5)
    parts = s.numbers(2 * n_slices, 5, n_components)
    parts[0, 0, 0] = torch.nan
    h, x, outputs = s.numbers(2, 6, n_components), s.numbers(2, 14, n_components), s.numbers(2, 30, n_components)
    h_next = s.numbers(2, 6, n_components, dtype=dtype)
    before = {"h": h.clone(), "x": x.clone(), "outputs": outputs.clone()}
    s.schedule.clock[1] = 1
    steps.outputs(s.schedule, parts, clip=0.5, residual=residual, h=h, h_next=h_next, x=x, outputs=outputs)
    n, steps_of_tick = s.n_rows, slice(s.first, sum(sizes))
    y = parts.view(2, n_slices, 5, n_components).sum(1).clamp(-0.5, 0.5)[:, :n]
    before["h"][:, s.plan.slots[:n]] = y
    total = y + before["x"][:, steps_of_tick]
    before["x"][:, steps_of_tick] = y if residual == "none" else total
    for d in range(2):
        before["outputs"][d, s.plan.places[d, steps_of_tick]] = (total if residual == "published" else y)[d]
    for name, found in (("h", h), ("x", x), ("outputs", outputs)):
        assert close(found, before[name], torch.float32), name
    assert close(h_next[:, :n], y, dtype)
    assert h[0, s.plan.slots[0], 0].isnan()
    assert int(s.schedule.clock[0]) == 2


def gate_functions(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return σ and tanh as the interpreted kernel computes them: as outputs of cells whose other factor is 1."""
    n, steps, found = len(values), interpreted_steps(), []
    s = Setting((1, 1), n_bucket=1)
    for i, j, f, o in ((0.0, 0.0, 100.0, values), (100.0, values, -torch.inf, 0.0)):
        gates_h, c, m = torch.zeros(2, 1, 4 * n), torch.zeros(2, 6, n), torch.zeros(2, 1, n)
        for gate, value in zip(gates_h.chunk(4, dim=-1), (i, j, f, o), strict=True):
            gate[:] = value
        # Where the forget gate is 1, it stays 30, whose tanh is 1; where it is 0, the cell becomes the candidate
        c[:] = 30.0
        s.schedule.clock[0] = 1
        compute_gates(steps, s.schedule, FIRST_INPUTS, gates_h, torch.zeros(4, 4 * n), c=c, clip=30.0, m=m)
        found.append((m[0, 0], c[0, s.plan.slots[0]]))
    return found[0][0], found[1][1]


def ulps(found: Tensor, expected: Tensor) -> Tensor:
    """Return the errors against float64, in units of the last place that float32 has there."""
    size = expected.abs().clamp(min=2.0**-126)
    return (found.double() - expected).abs() / torch.exp2(size.log2().floor() - 23)


def inexact_power(exponents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 2^x as far off as PTX's ex2.approx may be: by 2^-22.5 of it, up or down."""
    errors = np.where(np.arange(exponents.size) % 2, 2.0**-22.5, -(2.0**-22.5)).reshape(exponents.shape)
    powers: NDArray[np.float32] = (np.exp2(exponents.astype(np.float64)) * (1 + errors)).astype(np.float32)
    return powers


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of the exponent of 1e38, which is meant to
@pytest.mark.parametrize(("as_on_a_gpu", "of_sigmoid"), [(False, 2), (True, 6)])
def test_the_functions_are_within_a_few_units_in_the_last_place(
    as_on_a_gpu: bool, of_sigmoid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64, over all that float32 can be: a dense grid where they bend, and all exponents."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    if as_on_a_gpu:
        builder = interpreter.InterpreterBuilder
        monkeypatch.setattr(builder, "create_exp2", lambda self, x: self.unary_op(x, inexact_power))
    grid, sizes = torch.linspace(-20, 20, 4_001), torch.logspace(-126, 127.9, 1_000, base=2)
    values = torch.cat([grid, grid / 32, sizes, -sizes])
    sigmoid, tanh = gate_functions(values)
    # Below 2^-126 the error is that of a number which a GPU may cut off to 0
    assert ulps(sigmoid, values.double().sigmoid()).max() <= of_sigmoid
    assert ulps(tanh, values.double().tanh()).max() <= 2


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_functions_of_special_numbers() -> None:
    special = torch.tensor(
        [-torch.inf, torch.inf, torch.nan, 0.0, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, -104.0, -88.0]
    )
    sigmoid, tanh = gate_functions(special)
    assert sigmoid[:2].tolist() == [0.0, 1.0]
    assert tanh[:2].tolist() == [-1.0, 1.0]
    assert sigmoid[2].isnan()
    assert tanh[2].isnan()
    assert torch.equal(tanh[3:7], special[3:7])  # tanh(x) is x there, denormals included
    assert (sigmoid[3:7] == 0.5).all()
    assert tanh[7:].tolist() == [1.0, -1.0, -1.0, -1.0]
    assert sigmoid[7:9].tolist() == [1.0, 0.0]
    assert torch.allclose(sigmoid[9:].double(), special[9:].double().sigmoid(), rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_at_the_start(dtype: torch.dtype) -> None:
    check_steps(interpreted_steps(), CPU, dtype)
    if dtype == torch.float32:
        check_steps(interpreted_steps("on"), CPU, dtype)

    class Wrong(TorchSteps):
        def cells(self, *of_rows: Any, clip: float, **others: Any) -> None:
            super().cells(*of_rows, clip=2 * clip, **others)

    with pytest.raises(RuntimeError, match="don't compute"):
        check_steps(Wrong(), CPU, dtype)
