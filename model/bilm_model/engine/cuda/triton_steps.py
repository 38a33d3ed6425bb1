"""The same as `steps.TorchSteps` by Triton kernels.

A kernel is compiled once for each format, tile and number of slices, not for each bucket: other numbers that differ
from bucket to bucket are ordinary arguments, for which Triton is told not to specialize.
"""

from types import ModuleType
from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from bilm_model.config import Residual
from bilm_model.engine.cuda import triton_kernels
from bilm_model.engine.cuda.schedule import FRESH, N_COLUMNS, PLACES, Schedule

Fused = Literal["auto", "on", "off"]

_BLOCK = 256
"""Cells of a program: for one warp, 16 bytes of bfloat16 a thread, the widest access there is."""


class Tile(NamedTuple):
    """What a program of `cells_kernel` computes, and how: with so many components at a time, in so many stages."""

    rows: int
    cells: int
    depth: int
    n_stages: int
    n_warps: int


_FEW_ROWS = 16
_TILES = {
    torch.bfloat16: (Tile(16, 32, 128, 3, 4), Tile(128, 32, 64, 3, 4)),
    torch.float32: (Tile(16, 32, 64, 3, 4), Tile(64, 32, 32, 3, 8)),
}
"""For few rows, whose time is that of reading weights, and for many. Those of bfloat16 let a multiprocessor of sm_90
hold two programs: 65,536 registers, 227 KiB of shared memory."""


def fuses(fused: Fused, dtype: torch.dtype) -> bool:
    """Return whether the recurrent product and the gates are one kernel, for products in a format.

    By default in bfloat16 only: an exact product in float32 doesn't use tensor cores, and Triton's is expected to lose
    more to cuBLAS's than the traffic of the gates is worth. Neither has been measured.
    """
    return fused == "on" or (fused == "auto" and dtype == torch.bfloat16)


def tile_of(n_rows: int, dtype: torch.dtype) -> Tile:
    """Return the tile of `cells_kernel` for a bucket's rows."""
    few, many = _TILES[dtype]
    return few if n_rows <= _FEW_ROWS else many


class TritonSteps:
    """See `steps.Steps`. All tensors are contiguous, but for `h` and `weights` of `cells`, see there."""

    path = "triton"

    def __init__(
        self, fused: Fused = "auto", *, kernels: ModuleType = triton_kernels, hardware_tanh: bool = True
    ) -> None:
        """Set how cells are computed.

        Args:
            fused: whether the recurrent product and the gates are one kernel, see `fuses`.
            kernels: `triton_kernels`, or as the interpreter executes it.
            hardware_tanh: whether gates in formats other than float32 are computed by the processor's tanh.
        """
        self._fused, self._kernels, self._hardware_tanh = fused, kernels, hardware_tanh

    @property
    def name(self) -> str:
        """See `Steps`."""
        return f"Triton {triton.__version__} kernels, fused recurrent product {self._fused}"

    def cells(
        self,
        schedule: Schedule,
        column: int,
        h: Tensor,
        weights: Tensor,
        gates_x: Tensor,
        *,
        c: Tensor,
        clip: float,
        m: Tensor,
    ) -> None:
        """See `Steps`."""
        (_, n_slots, n_cells), (n_parts, n_bucket, n_slice_cells) = c.shape, m.shape
        sizes = (n_bucket, n_parts // 2, n_slots, n_cells, n_slice_cells)
        exact = not self._hardware_tanh or gates_x.dtype == torch.float32
        if not fuses(self._fused, h.dtype):
            self._kernels.gates_kernel[(n_bucket, n_parts, triton.cdiv(n_slice_cells, _BLOCK))](
                *(*_of(schedule), torch.bmm(h, weights), gates_x, c, m, clip, column, *sizes),
                FRESH=FRESH,
                N_COLUMNS=N_COLUMNS,
                BLOCK=_BLOCK,
                EXACT=exact,
                num_warps=1,
                enable_fp_fusion=True,
            )
            return
        n_components, tile = h.shape[2], tile_of(n_bucket, h.dtype)
        if h.stride()[1:] != (n_components, 1) or weights.stride()[1:] != (1, n_components):
            raise ValueError(f"weights: expected contiguous columns, found strides {weights.stride()}")
        n_blocks = n_parts // 2 * triton.cdiv(n_slice_cells, tile.cells)
        self._kernels.cells_kernel[(triton.cdiv(n_bucket, tile.rows), n_blocks, 2)](
            *(*_of(schedule), h, weights, gates_x, c, m, clip, column, h.stride(0) // n_components, *sizes),
            N_COMPONENTS=n_components,
            FRESH=FRESH,
            N_COLUMNS=N_COLUMNS,
            ROWS=tile.rows,
            CELLS=tile.cells,
            DEPTH=tile.depth,
            EXACT=exact,
            num_warps=tile.n_warps,
            num_stages=tile.n_stages,
            enable_fp_fusion=True,
        )

    def outputs(
        self,
        schedule: Schedule,
        parts: Tensor,
        *,
        clip: float,
        residual: Residual,
        h: Tensor,
        h_next: Tensor,
        x: Tensor,
        outputs: Tensor,
    ) -> None:
        """See `Steps`."""
        n_parts, n_bucket, n_components = parts.shape
        self._kernels.outputs_kernel[(n_bucket, 2, triton.cdiv(n_components, _BLOCK))](
            *_of(schedule),
            *(parts, h, h_next, x, outputs, clip),
            *(int(residual != "none"), int(residual == "published"), n_bucket),
            *(h.shape[1], h_next.shape[1], x.shape[1], outputs.shape[1], n_components),
            N_SLICES=n_parts // 2,
            PLACES=PLACES,
            N_COLUMNS=N_COLUMNS,
            BLOCK=_BLOCK,
            num_warps=1,
            enable_fp_fusion=True,
        )


def _of(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return schedule.clock, schedule.begins, schedule.slots, schedule.steps
