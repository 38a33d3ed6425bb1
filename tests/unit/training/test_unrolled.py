from dataclasses import replace

import pytest
import torch
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.kernels.product_paths import ProductPath, training_path
from bilm_training.network.cells import CellArithmetic, TorchCell, cell_arithmetic
from bilm_training.network.fused_cells import FusedCell
from bilm_training.network.unrolled import unrolled
from torch import Tensor

from tests.unit.training.training_support import TINY

CELL_CLIP, PROJ_CLIP = 0.4, 0.3


def new_layer(n_in: int, n_cells: int, dtype: torch.dtype) -> ClippedProjectedLstm:
    config = replace(TINY, projection_dim=n_in, cell_dim=n_cells, cell_clip=CELL_CLIP, proj_clip=PROJ_CLIP)
    layer = ClippedProjectedLstm(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return layer


def inputs(layer: ClippedProjectedLstm, n_steps: int, n_streams: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    n_in, n_cells = layer.recurrent.weight.shape[1], layer.recurrent.weight.shape[0] // 4
    shapes = ((n_steps, n_streams, n_in), (n_streams, n_in), (n_streams, n_cells))
    x, h, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    dtype = layer.recurrent.weight.dtype
    return x.to(dtype).requires_grad_(), (h * 0.1).to(dtype), (c * 0.2).to(dtype)


def by_autograd(
    layer: ClippedProjectedLstm, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The reference network's layer, step by step; the cells of every step beside."""
    outputs, cells = [], []
    for gates in layer.input(x):
        h, c = layer.step(gates, h, c)
        outputs.append(h)
        cells.append(c)
    return torch.stack(outputs), h, c, cells


def gradients(layer: ClippedProjectedLstm, x: Tensor, y: Tensor) -> list[Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def share(values: Tensor) -> float:
    return float(values.double().mean())


@pytest.mark.parametrize(("n_steps", "n_streams"), [(1, 1), (7, 1), (6, 5)])
@pytest.mark.parametrize("n_cells", [6, 11], ids=["without projection", "with projection"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_numbers_and_gradients_are_the_reference_networks(
    n_steps: int, n_streams: int, n_cells: int, dtype: torch.dtype, bound: float
) -> None:
    layer = new_layer(6, n_cells, torch.float64)
    x, h, c = inputs(layer, n_steps, n_streams)
    y, h_end, c_end, cells = by_autograd(layer, x, h, c)
    if n_steps > 1:  # both bounds are reached by some and not by others
        assert 0.1 < share(torch.stack(cells).abs() == CELL_CLIP) < 0.9
        assert (layer.projection is None) or 0.1 < share(y.abs() == PROJ_CLIP) < 0.9
    expected = [y, h_end, c_end, *gradients(layer, x, y)]

    layer = new_layer(6, n_cells, dtype)
    x, h, c = inputs(layer, n_steps, n_streams)
    y, h_end, c_end = unrolled(layer, x, h, c)
    found = [y, h_end, c_end, *gradients(layer, x, y)]
    assert len(found) == len(expected) == (7 if n_cells == 6 else 8)
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == dtype
        assert distance(a, b) < bound * max(1.0, float(a.detach().abs().max()))


@pytest.mark.parametrize("path", [training_path(torch.bfloat16, "cpu"), ProductPath.ROUNDED_PLAIN])
def test_products_in_bfloat16_change_little(path: ProductPath) -> None:
    layer = new_layer(6, 11, torch.float32)
    x, h, c = inputs(layer, 6, 5)
    exact, rounded = (unrolled(layer, x, h, c, each) for each in (None, path))
    expected, found = ([*made, *gradients(layer, x, made[0])] for made in (exact, rounded))
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32
        assert 0 < float((a - b).detach().norm() / a.detach().norm()) < 0.05


def test_no_gradient_reaches_the_state() -> None:
    layer = new_layer(6, 11, torch.float64)
    x, h, c = inputs(layer, 4, 2)
    h.requires_grad_()
    c.requires_grad_()
    y, h_end, c_end = unrolled(layer, x, h, c)
    assert not h_end.requires_grad
    assert not c_end.requires_grad
    torch.autograd.backward(y.sum())
    assert h.grad is None
    assert c.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_backward_is_refused(dtype: torch.dtype) -> None:
    """The first one leaves gradients where the gates were."""
    layer = new_layer(6, 11, dtype)
    y, *_ = unrolled(layer, *inputs(layer, 4, 2))
    loss = y.sum()
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_a_window_in_two_parts_is_the_window() -> None:
    layer = new_layer(6, 11, torch.float64)
    x, h, c = inputs(layer, 7, 3)
    y, *end = unrolled(layer, x, h, c)
    first, h, c = unrolled(layer, x[:3], h, c)
    second, h, c = unrolled(layer, x[3:], h, c)
    for a, b in zip([y, *end], [torch.cat([first, second]), h, c], strict=True):
        assert distance(a, b) < 1e-15


# ---- the arithmetic of a cell ----------------------------------------------------------------------------------------


def test_the_fused_kernels_are_in_use_where_they_can_be() -> None:
    assert isinstance(cell_arithmetic("cpu", torch.float32), FusedCell)
    assert isinstance(cell_arithmetic("cpu", torch.float64), TorchCell)
    assert isinstance(cell_arithmetic("cuda", torch.float32), TorchCell)


def test_training_goes_on_without_fused_kernels_whatever_is_wrong_with_them(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(FusedCell):
        def forward(self, *tensors: Tensor, clip: float) -> None:
            super().forward(*tensors, clip=2 * clip)

    def broken() -> CellArithmetic:
        raise RuntimeError("LLVM can't select an instruction")

    for new, reason in ((broken, "can't select"), (Wrong, "don't compute what they should")):
        assert isinstance(cell_arithmetic("cpu", torch.float32, new), TorchCell)
        assert reason in caplog.text


def tick(cell: CellArithmetic, n_rows: int, n_cells: int, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Forward and backward from the same numbers; everything that is written."""
    generator = torch.Generator().manual_seed(4)

    def random(width: int, size: float) -> Tensor:
        return (torch.randn(n_rows, width, generator=generator) * size).to(dtype)

    gates, recurrent = random(4 * n_cells, scale), random(4 * n_cells, scale)
    c_before, dm, dc = random(n_cells, 0.3), random(n_cells, 1.0), random(n_cells, 1.0)
    c, m = torch.empty_like(c_before), torch.empty_like(c_before)
    cell.forward(gates, recurrent, c_before, c, m, clip=CELL_CLIP)
    written = [gates.clone(), c.clone(), m.clone()]
    cell.backward(gates, c_before, c, dm, dc, clip=CELL_CLIP)
    return [*written, gates, dc]


@pytest.mark.parametrize(("n_rows", "n_cells"), [(1, 1), (3, 5), (2, 512), (3, 1025)])
@pytest.mark.parametrize("scale", [0.5, 60.0], ids=["ordinary", "saturated"])
def test_the_fused_kernels_are_the_plain_arithmetic(n_rows: int, n_cells: int, scale: float) -> None:
    plain = tick(TorchCell(), n_rows, n_cells, scale, torch.float64)
    fused = tick(FusedCell(), n_rows, n_cells, scale, torch.float32)
    if n_rows * n_cells > 1:
        assert 0 < share(plain[1].abs() == CELL_CLIP) < 1
        assert ((fused[1].abs() == torch.tensor(CELL_CLIP)) == (plain[1].abs() == CELL_CLIP)).all()
    for a, b in zip(plain, fused, strict=True):
        assert distance(a, b) < 2e-6
