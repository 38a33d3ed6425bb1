"""A cell's recurrence in one kernel whose products have bfloat16 factors; see `tile_kernel`."""

import ctypes

import torch
from torch import Tensor

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.cpu.panels import PANEL, PANEL_CELLS, packed, packed_gates
from bilm_model.engine.cpu.recurrence import Grouping, LaneWork, array
from bilm_model.engine.cpu.tile_kernel import KERNELS, MAX_TILED_GROUP
from bilm_model.engine.cpu.tiles import TILE_BYTES, TILE_ROWS, n_tiles, paired, tile_configuration

_N_WORK = 9
"""Arguments of the kernel that say what to do in a round; those behind them are a cell's own."""


class TileRecurrence:
    """A cell's ticks (`Recurrence`). Only what products read is rounded to bfloat16."""

    kernels = KERNELS
    description = "for tiles and without an input cache"
    reads_projections = False

    def __init__(self, lstm: ClippedProjectedLstm, config: BilmConfig) -> None:
        """Lay out a layer's weights for a biLM with this structure."""
        self._recurrent = paired(packed_gates(lstm.recurrent.weight))
        self._weight_x = paired(packed_gates(lstm.input.weight))
        self._projection = None if lstm.projection is None else paired(packed(lstm.projection.weight))
        self._bias = packed_gates(lstm.folded_input_bias().detach().float()[:, None])
        self._clips = torch.tensor([config.cell_clip, config.proj_clip])
        self._configuration, self._zeros = tile_configuration(), torch.zeros(PANEL)
        self._arguments = array(
            *[0] * _N_WORK,
            config.cell_dim,
            self._recurrent.data_ptr(),
            0 if self._projection is None else self._projection.data_ptr(),
            *(each.data_ptr() for each in (self._weight_x, self._bias, self._clips, self._configuration, self._zeros)),
        )
        self._address = ctypes.addressof(self._arguments)
        n_panels, size = -(-config.cell_dim // PANEL_CELLS), config.projection_dim
        rounded_bytes = TILE_BYTES * (2 * n_tiles(size) + n_tiles(config.cell_dim))
        # A panel more than are projected: tiles are read as a whole, beyond the last row that counts
        float32_bytes = 4 * PANEL * (-(-size // PANEL) + 1 + n_panels + 1)
        self.grouping = Grouping(MAX_TILED_GROUP, TILE_ROWS, rounded_bytes + float32_bytes)

    def arguments(self, work: LaneWork, outputs: Tensor) -> int:
        """See `Recurrence`; the inputs aren't projected yet."""
        assert work.index is None  # noqa: S101 - no input cache is made for such cells
        self._arguments[:_N_WORK] = [
            work.ticks.shape[0], work.ticks.data_ptr(), work.x.data_ptr(), work.slots.data_ptr(), work.c.data_ptr(),
            work.fresh.data_ptr(), work.h.data_ptr(), outputs.data_ptr(), outputs.shape[1],
        ]  # fmt: skip
        return self._address
