"""The choice of the arithmetic on a CPU: compiled kernels where they work, torch's operators otherwise."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bilm_model.config import BilmConfig
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.backend import Memory
from bilm_model.engine.planner import SentenceSteps
from bilm_model.engine.results import Collector, TorchCollector
from bilm_model.engine.types import OutputSpec, TokenChoice
from bilm_model.kernels.elementwise import Elementwise, TorchElementwise
from bilm_model.kernels.fallbacks import note_fallback
from bilm_model.kernels.product_paths import ProductPath
from bilm_model.scalar_mix import LayerMix, Selection

if TYPE_CHECKING:
    from bilm_model.engine.cpu.recurrence import Recurrence

_TYPICAL_CACHE_BYTES = 16 * 2**20

_MAX_PANEL_BYTES = 32 * 2**20
"""Of the cells that panels compute, whatever the processor says of its cache: in a virtual machine that is the host's,
shared with others. On a Xeon that shows 300 MiB, panels against products took 1.14 times the time for tokens at full
rows and 0.57 times for a lone sentence at 21 MB (`medium`), 1.36 and 0.80 times at 84 MB (`original`)."""

_MAX_TILED_BYTES = 8 * 2**20
"""Of the cells that tiles compute: on a Xeon with AMX they took 1.5 times products' rate at 2.6 MB (`small`), 1.03 at
10.5 (`medium`), 0.9 to 0.98 at 42 (`original`)."""

NewRecurrence = Callable[[ClippedProjectedLstm, BilmConfig], "Recurrence | None"]
"""Makes a layer's kernel for all ticks; None where products are faster."""


def fastest_elementwise(dtype: torch.dtype) -> Elementwise:
    """Return the fastest arithmetic between products that works here."""
    try:
        # Not at the top: Numba, or what it needs of the platform, may be missing
        from bilm_model.engine.cpu.fused_elementwise import FusedElementwise  # noqa: PLC0415

        fused = FusedElementwise(dtype)
        _compare(fused, dtype)
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        note_fallback("elementwise", "fused kernels unavailable, falling back to torch", error)
        return TorchElementwise()
    return fused


def stands_in_for(products: ProductPath, dtype: torch.dtype) -> bool:
    """Return whether a kernel for all ticks may stand in for these products of `dtype`.

    In float32 it repeats the order of prepacked products' sums. In bfloat16 it has an order of its own, and is used for
    all rows of an engine; where bfloat16 products are float32 ones of rounded factors, it would take longer than these.
    """
    steady = (ProductPath.PREPACKED, ProductPath.PREPACKED_BLOCKS)
    return products in (steady if dtype == torch.bfloat16 else steady[:1])


def new_recurrence(lstm: ClippedProjectedLstm, config: BilmConfig) -> "Recurrence | None":
    """Return a layer's kernel for all ticks; None where products are faster.

    Raises:
        Exception: whatever keeps a kernel from being compiled.
    """
    if lstm.recurrent.weight.dtype == torch.bfloat16:
        from bilm_model.engine.cpu.tiles import has_tiles  # noqa: PLC0415 - as above

        if not (has_tiles() and suits_tiles(config, last_level_cache_bytes())):
            return None
        from bilm_model.engine.cpu.tile_recurrence import TileRecurrence  # noqa: PLC0415 - compiled for tiles when imported

        return TileRecurrence(lstm, config)
    if not suits_panels(config, last_level_cache_bytes()):
        return None
    from bilm_model.engine.cpu.recurrence import PanelRecurrence  # noqa: PLC0415 - as above

    return PanelRecurrence.of(lstm, config)


def recurrences_or_none(
    lstms: Sequence[Sequence[ClippedProjectedLstm]], config: BilmConfig, new: NewRecurrence
) -> "list[list[Recurrence]] | None":
    """Return what `new` makes of each direction's layers; None if that isn't all, with a warning if it fails."""
    found: list[list[Recurrence]] = []
    for direction in lstms:
        found.append([])
        for lstm in direction:
            try:
                recurrence = new(lstm, config)
            except Exception as error:  # whatever keeps a kernel from being compiled
                note_fallback("recurrence", "one kernel for all ticks unavailable, products do the work", error)
                return None
            if recurrence is None:
                return None
            found[-1].append(recurrence)
    return found


def fits_cache(config: BilmConfig, cache_bytes: int, weight_bytes: int = 4) -> bool:
    """Return whether both directions' cells of a layer, so many bytes a weight, fit a last-level cache.

    Larger ones are read from memory for each group of rows: products, for which a weight is read once for all rows and
    threads, are faster then, and the weights would be in memory twice for a few rows' sake.
    """
    multiplies = config.projection_dim * config.cell_dim * (5 if config.has_lstm_projection else 4)
    return 2 * weight_bytes * multiplies <= cache_bytes


def suits_panels(config: BilmConfig, cache_bytes: int) -> bool:
    """Return whether float32 cells are computed in panels, given a last-level cache."""
    return fits_cache(config, min(cache_bytes, _MAX_PANEL_BYTES))


def suits_tiles(config: BilmConfig, cache_bytes: int) -> bool:
    """Return whether tiles compute both directions' cells of a layer faster than products do, given a last-level cache.

    So fast that reading the weights again for each group of rows decides.
    """
    return fits_cache(config, min(cache_bytes, _MAX_TILED_BYTES), weight_bytes=2)


@functools.cache
def last_level_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache that the first core reaches; 16 MiB where that can't be found out."""
    try:
        sizes = [path.read_text(encoding="ascii").strip() for path in caches.glob("index*/size")]
        return max(int(size.removesuffix("K")) * 2**10 for size in sizes)
    except (OSError, ValueError):  # no such folder here, or other units
        return _TYPICAL_CACHE_BYTES


def fastest_collector(memory: Memory) -> Collector:
    """Return the fastest way to make results that works here."""
    try:
        from bilm_model.engine.cpu.fused_results import FusedCollector  # noqa: PLC0415 - as above

        _compare_collectors(FusedCollector, TorchCollector)
        return FusedCollector(memory)
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        note_fallback("results", "fused results unavailable, falling back to torch", error)
        return TorchCollector(memory)


def _compare_collectors(*kinds: Callable[[Memory], Collector]) -> None:
    """Make a few results in both ways.

    Raises:
        RuntimeError: if they differ.
    """
    generator = torch.Generator().manual_seed(0)
    vectors, outputs = torch.randn(6, 5, generator=generator), torch.randn(1, 2, 6, 5, generator=generator)
    memory = Memory(vectors, outputs, h=torch.empty(0), c=torch.empty(0))
    steps = SentenceSteps(np.array([4, 3]), np.array([5, 4, 3, 2, 0, 1, 5]), np.array([0, 1, 2, 3, 0, 4, 3]))
    selections = (Selection("all", "max"), Selection(LayerMix((0.5, -0.5), 2.0, layer_norm=True), "mean", True))
    specs = [OutputSpec(selection) for selection in selections]
    choices = {1: TokenChoice(np.array([0, 0]), np.array([1, 1]))}
    found, expected = (kind(memory).collect(steps, specs, choices).vectors() for kind in kinds)
    if not all(np.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)):
        raise RuntimeError("they don't compute what they should")


def _compare(fused: Elementwise, dtype: torch.dtype) -> None:
    """Try the kernel that matters most on a few numbers.

    Raises:
        RuntimeError: if it computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    gates_h, gates_x = (torch.randn(3, 4 * 40, generator=generator).to(dtype) for _ in range(2))
    index, fresh = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])
    found, expected = torch.zeros(2, 3, 40, dtype=dtype)
    for elementwise, out in ((fused, found), (TorchElementwise(), expected)):
        elementwise.lstm(gates_h, gates_x, index, torch.ones(3, 40), index, fresh=fresh, clip=3.0, out=out)
    if not torch.allclose(found.float(), expected.float(), atol=1e-2 if dtype == torch.bfloat16 else 1e-5):
        raise RuntimeError("they don't compute what they should")
