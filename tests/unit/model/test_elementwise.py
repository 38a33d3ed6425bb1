"""The fused kernels against torch's operators."""

import math

import pytest
import torch
from bilm_model.engine.cpu.fused_elementwise import FusedElementwise
from bilm_model.kernels.elementwise import Elementwise, TorchElementwise

DTYPES = [torch.float32, torch.bfloat16]
TORCH = TorchElementwise()
FUSED = {dtype: FusedElementwise(dtype) for dtype in DTYPES}


def rows_from(n_rows: int, *fresh: int) -> torch.Tensor:
    """Which rows start from the zero state."""
    return torch.isin(torch.arange(n_rows), torch.tensor(fresh))


def numbers(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_cells"), [(1, 1), (2, 37), (5, 512), (3, 1100), (130, 64)])
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_lstm(dtype: torch.dtype, n_rows: int, n_cells: int, scale: float) -> None:
    gates_h, gates_x = (numbers(n, 4 * n_cells, scale=scale).to(dtype) for n in (n_rows + 1, n_rows + 3))
    index = torch.arange(n_rows).flip(0) + 3
    slots = torch.randperm(n_rows + 2, generator=torch.Generator().manual_seed(0))[:n_rows]
    index[-1] = index[0]
    cells = [numbers(n_rows + 2, n_cells) for _ in range(2)]
    outs = [torch.full((n_rows + 1, n_cells), 7.0, dtype=dtype) for _ in range(2)]
    both: tuple[Elementwise, ...] = (TORCH, FUSED[dtype])
    for elementwise, c, out in zip(both, cells, outs, strict=True):
        elementwise.lstm(gates_h.clone(), gates_x, index, c, slots, fresh=rows_from(n_rows, 1), clip=1.5, out=out)
    assert torch.allclose(cells[0], cells[1], atol=2e-6)
    assert float(cells[1][slots].abs().max()) <= 1.5
    assert torch.allclose(outs[0].float(), outs[1].float(), atol=3e-6 if dtype == torch.float32 else 0.008)
    assert (outs[1][n_rows:] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["fused", "torch"])
@pytest.mark.parametrize("n_cells", [1, 37, 1100])
def test_a_fresh_row_has_the_bits_of_a_zero_state(dtype: torch.dtype, kind: str, n_cells: int) -> None:
    elementwise: Elementwise = FUSED[dtype] if kind == "fused" else TORCH
    gates_h, gates_x = (numbers(n, 4 * n_cells).to(dtype) for n in (5, 6))
    c, index, slots = numbers(7, n_cells), torch.tensor([5, 0, 2, 2, 1]), torch.tensor([6, 0, 3, 1, 4])
    fresh = rows_from(5, 1, 2)
    zeros_h, zeros_c = gates_h.clone(), c.clone()
    zeros_h[fresh], zeros_c[slots[fresh]] = 0.0, 0.0
    gates_h[fresh], c[slots[fresh]] = math.nan, math.nan
    found, expected = torch.zeros(2, 5, n_cells, dtype=dtype)
    elementwise.lstm(gates_h, gates_x, index, c, slots, fresh=fresh, clip=1.5, out=found)
    elementwise.lstm(zeros_h, gates_x, index, zeros_c, slots, fresh=rows_from(5), clip=1.5, out=expected)
    assert torch.equal(found, expected)
    assert torch.equal(c, zeros_c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_a_cell_stands(dtype: torch.dtype) -> None:
    """In a vector of any number of them, or alone: each of 100 cells stands in two places."""
    n_cells = 100
    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(0))
    gates_h, gates_x, c = numbers(1, 4 * n_cells).to(dtype), numbers(1, 4 * n_cells).to(dtype), numbers(1, n_cells)
    moved_h, moved_x = (gates.view(4, n_cells)[:, order].reshape(1, -1) for gates in (gates_h, gates_x))
    moved_c, row, outs = c[:, order], torch.zeros(1, dtype=torch.int64), torch.zeros(2, 1, n_cells, dtype=dtype)
    FUSED[dtype].lstm(gates_h, gates_x, row, c, row, fresh=rows_from(1), clip=1.5, out=outs[0])
    FUSED[dtype].lstm(moved_h, moved_x, row, moved_c, row, fresh=rows_from(1), clip=1.5, out=outs[1])
    assert torch.equal(c[:, order], moved_c)
    assert torch.equal(outs[0][:, order], outs[1])


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_the_activations_are_exact(function: str) -> None:
    """σ(o)·tanh(c) with one of the factors 1, over all that a gate can be."""
    values = torch.cat([torch.linspace(-30, 30, 60001), torch.tensor([-math.inf, -1e-30, 0.0, 1e-30, 1e30, math.inf])])
    n, is_tanh = len(values), function == "tanh"
    gates_h, c, out, row = torch.zeros(1, 4 * n), torch.full((1, n), 30.0), torch.zeros(1, n), torch.zeros(1).long()
    i, j, f, o = gates_h.chunk(4, dim=-1)
    i[:], j[:], f[:], o[:] = (100.0, values, -100.0, 100.0) if is_tanh else (0.0, 0.0, 100.0, values)
    FUSED[torch.float32].lstm(gates_h, torch.zeros_like(gates_h), row, c, row, fresh=rows_from(1), clip=30.0, out=out)
    found, expected = (c, values.double().tanh()) if is_tanh else (out, values.double().sigmoid())
    assert (found - expected).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_cells", [8, 48])
def test_what_is_not_a_number_stays_one(dtype: torch.dtype, n_cells: int) -> None:
    gates_h = torch.zeros(2, 4 * n_cells, dtype=dtype)
    gates_h[1, 3] = math.nan
    rows, c, out = torch.arange(2), torch.zeros(2, n_cells), torch.zeros(2, n_cells, dtype=dtype)
    FUSED[dtype].lstm(gates_h, torch.zeros_like(gates_h), rows, c, rows, fresh=rows_from(2), clip=3.0, out=out)
    assert c[1, 3].isnan()
    assert out[1, 3].isnan()
    assert int(out.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_steps", [1, 7, 100])
@pytest.mark.parametrize("kind", ["added and returned", "added", "nothing added"])
def test_outputs(dtype: torch.dtype, n_steps: int, kind: str) -> None:
    y, x = numbers(n_steps, 70).to(dtype), None if kind == "nothing added" else numbers(n_steps + 3, 70)
    places = torch.randperm(n_steps + 5, generator=torch.Generator().manual_seed(0))[:n_steps]
    returned, following = torch.full((2, n_steps + 5, 70), 7.0), torch.full((2, n_steps + 2, 70), 7.0)
    each: tuple[Elementwise, ...] = (FUSED[dtype], TORCH)
    for elementwise, *outs in zip(each, returned, following, strict=True):
        returns_sum = kind == "added and returned"
        elementwise.outputs(y, x, places, returns_sum=returns_sum, returned=outs[0], following=outs[1])
    total = y.float() if x is None else y.float() + x[:n_steps]
    assert torch.equal(following[0], following[1])
    assert torch.equal(following[0], torch.cat([total, torch.zeros(2, 70)]))
    assert torch.equal(returned[0], returned[1])
    assert torch.equal(returned[0][places], total if kind == "added and returned" else y.float())
    assert (returned[0].sum(1) == 490.0).sum() == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 90])
def test_keep(dtype: torch.dtype, n_rows: int) -> None:
    y, h = numbers(n_rows + 20, 70).to(dtype), torch.full((2, n_rows + 4, 70), 7.0)
    last = torch.randint(0, n_rows + 20, (n_rows,), generator=torch.Generator().manual_seed(0))
    slots = torch.randperm(n_rows + 4, generator=torch.Generator().manual_seed(0))[:n_rows]
    each: tuple[Elementwise, ...] = (FUSED[dtype], TORCH)
    for elementwise, target in zip(each, h, strict=True):
        elementwise.keep(y, last, target, slots)
    assert torch.equal(h[0], h[1])
    assert torch.equal(h[0][slots], y.float()[last])
    assert int((h[0] == 7.0).all(1).sum()) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_highway(dtype: torch.dtype) -> None:
    x, z = numbers(9, 70), numbers(9, 140, scale=5.0).to(dtype)
    assert torch.allclose(FUSED[dtype].highway(x, z), TORCH.highway(x, z), atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("n_windows", [1, 7, 50])
def test_peaks(dtype: torch.dtype, activation: str, n_windows: int) -> None:
    n_tokens, n_filters = 6, 83
    responses = numbers(n_tokens * n_windows + 2, n_filters).to(dtype)
    floor, bias = numbers(n_filters), numbers(n_filters, scale=0.5)
    floor[::2] = -math.inf
    found, expected = torch.zeros(2, n_tokens, n_filters)
    both: tuple[Elementwise, ...] = (FUSED[dtype], TORCH)
    for elementwise, out in zip(both, (found, expected), strict=True):
        elementwise.peaks(responses, n_windows, floor, bias, activation, out=out)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("elementwise", [FUSED[torch.float32], TORCH], ids=["fused", "torch"])
def test_a_peak_that_is_not_a_number_stays_one(elementwise: Elementwise) -> None:
    responses, out = torch.ones(6, 4), torch.zeros(2, 4)
    responses[1, 2] = math.nan
    floor = torch.tensor([math.nan, 0.0, 0.0, 0.0])
    elementwise.peaks(responses, 3, floor, torch.zeros(4), "relu", out=out)
    assert out.isnan().tolist() == [[True, False, True, False], [True, False, False, False]]


@pytest.mark.parametrize("n_rows", [130, 600], ids=["with Python's lock", "without it"])
def test_without_openmp_one_thread_does_it(n_rows: int) -> None:
    alone = FusedElementwise(torch.float32, one_thread=True)
    assert (alone.name, alone.path) == ("fused kernels on one thread", "fused_one_thread")
    rows, gates, fresh = torch.arange(n_rows), numbers(n_rows, 256), rows_from(n_rows)
    outs, cells = torch.zeros(2, n_rows, 64), torch.zeros(2, n_rows, 64)
    for elementwise, c, out in zip((alone, FUSED[torch.float32]), cells, outs, strict=True):
        elementwise.lstm(gates.clone(), gates, rows, c, rows, fresh=fresh, clip=1.5, out=out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(cells[0], cells[1])
