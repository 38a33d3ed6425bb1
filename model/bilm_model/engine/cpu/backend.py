"""The engine's CPU back end: one cell after another, each for all ticks of the round.

A cell's weights stay in the caches from tick to tick that way, as far as they fit.

Legend: R rows, N steps of the round, P projection, C cells, U different tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bilm_model.bilm import Bilm
from bilm_model.characters import CharacterIds
from bilm_model.contexts.lstm import ClippedProjectedLstm
from bilm_model.engine.backend import Memory
from bilm_model.engine.cpu.fastest import (
    NewRecurrence,
    fastest_elementwise,
    new_recurrence,
    recurrences_or_none,
    stands_in_for,
)
from bilm_model.engine.cpu.input_cache import InputCache
from bilm_model.engine.encoder import WindowEncoder
from bilm_model.engine.planner import Indices, RoundPlan
from bilm_model.kernels.elementwise import CellWork, TorchElementwise
from bilm_model.kernels.product_paths import ProductPath, cpu_path
from bilm_model.kernels.products import NewProduct, Product, padded_rows

if TYPE_CHECKING:
    from bilm_model.engine.cpu.recurrence import LaneWork, RecurrenceTeam, Threads

_WITH_HELPER = 2
"""Threads with which a helper always runs the cells; with more, OpenMP's do where there are many rows."""
_MIN_PARALLEL = 2**20
"""Multiply-adds of a product below which one thread does it. Threads that wait for one another at every small product
gain little, and lose a lot when something else runs on one of their cores. The bits are the same."""

_MIN_BESIDE_HELPER = 2**25
"""The same where a helper runs cells beside the caller: OpenMP's threads spin for milliseconds after a product, and
would keep it from its core, so only what takes about as long is worth it."""

_BLOCK_BYTES, _BLOCK_ROWS = 8 * 2**20, 256
"""Of a block of input projections at most: it should still be in the last-level cache when the ticks read it, and more
rows would make sentences that join wait longer without making products faster."""


@dataclass(frozen=True, eq=False)
class _TickProducts:
    """What a tick of one layer of one direction multiplies, where its ticks are not one kernel.

    Attributes:
        recurrent: h (R, P) -> its half of the gates (R, 4·C).
        projection: (R, C) -> h (R, P), clipped; None where the cells' output is h.
    """

    recurrent: Product
    projection: Product | None

    @classmethod
    def of(cls, lstm: ClippedProjectedLstm, clip: float, new: NewProduct) -> "_TickProducts":
        return cls(
            recurrent=new(lstm.recurrent.weight),
            projection=None if lstm.projection is None else new(lstm.projection.weight, clip=clip),
        )


@dataclass(eq=False, slots=True)
class _Steps:
    """A round's plan as tensors, made once a round.

    Attributes:
        sizes: rows at each tick.
        ticks: (K,) the same.
        slots: (R,) see `RoundPlan`.
        last: (R,) see `RoundPlan`.
        fresh: (N,) see `RoundPlan`.
        places: (N,) of each direction.
    """

    sizes: tuple[int, ...]
    ticks: Tensor
    slots: Tensor
    last: Tensor
    fresh: Tensor
    places: Sequence[Tensor]

    @classmethod
    def of(cls, plan: RoundPlan) -> "_Steps":
        ticks = torch.from_numpy(np.array(plan.sizes))
        slots, last, fresh = (torch.from_numpy(each) for each in (plan.slots, plan.last, plan.fresh))
        return cls(plan.sizes, ticks, slots, last, fresh, [torch.from_numpy(each) for each in plan.places])


class CpuBackend:
    """See `backend.Backend`.

    Attributes:
        input_cache: layer 1's input projections of the most recently used tokens; None: none are kept.
    """

    def __init__(
        self,
        bilm: Bilm,
        memory: Memory,
        max_rows: int,
        input_cache_bytes: int,
        products: ProductPath | None = None,
        *,
        new_recurrence: NewRecurrence = new_recurrence,
    ) -> None:
        """Lay the weights out; the biLM isn't needed any more after that.

        Args:
            bilm: its products in the format that they are to be computed in.
            memory: on the CPU.
            max_rows: rows of a round at most.
            input_cache_bytes: for layer 1's input projections; 0: none are kept, nor for cells that project themselves.
            products: how products are computed; None: the fastest way that works here.
            new_recurrence: makes a cell's kernel for all ticks.

        Raises:
            ConfigError: if the cache isn't enough for one round.
        """
        config = self._config = bilm.config
        self.memory = memory
        self._h, self._c, self._returned = (_by_cell(states) for states in (memory.h, memory.c, memory.outputs))
        self._dtype = bilm.product_dtype
        self._products = products or cpu_path(self._dtype)
        self._elementwise = fastest_elementwise(self._dtype)
        one_kernel = stands_in_for(self._products, self._dtype) and not isinstance(self._elementwise, TorchElementwise)
        lstms = [list(bilm.lstms(direction)) for direction in range(2)]
        self._recurrences = recurrences_or_none(lstms, config, new_recurrence) if one_kernel else None
        if self._recurrences is not None and not self._recurrences[0][0].reads_projections:
            input_cache_bytes = 0
        n_projected = config.n_layers if self._recurrences is None else int(input_cache_bytes > 0)
        self._inputs = [
            [self._products.new_product(lstm.input.weight, lstm.folded_input_bias()) for lstm in each[:n_projected]]
            for each in lstms
        ]
        self._ticks = [
            [_TickProducts.of(lstm, config.proj_clip, self._products.new_product) for lstm in each]
            for each in (lstms if self._recurrences is None else ())
        ]
        # What the kernel gives is in float32
        self._after_cells = self._elementwise if self._recurrences is None else fastest_elementwise(torch.float32)
        self._encoder = WindowEncoder(bilm.encoder, config, self._products.new_product, self._elementwise)
        gate_bytes = 4 * config.cell_dim * self._dtype.itemsize
        self.block_rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // gate_bytes))
        # Rows that only fill up are computed, too: they must be finite, and not so small that they are slow
        self._cells_out = torch.zeros(padded_rows(max_rows), config.cell_dim, dtype=self._dtype)
        self._n_threads = torch.get_num_threads()
        self._team = self._new_team()
        self.input_cache: InputCache | None = None
        if input_cache_bytes:
            round_rows, n_gates = max(self.block_rows, max_rows), 4 * config.cell_dim
            n_entries = len(memory.vectors)
            self.input_cache = InputCache.of(n_entries, n_gates, self._dtype, input_cache_bytes, round_rows)

    @property
    def name(self) -> str:
        """See `Backend`."""
        parts = [f"torch {torch.__version__}", self._products.description, self._elementwise.name]
        if self._team is not None:
            parts.append(self._team.description)
        return f"cpu ({', '.join(parts)}, {self._n_threads} threads)"

    @property
    def paths(self) -> dict[str, str]:
        """See `Backend`."""
        return {
            "products": self._products.value,
            "elementwise": self._elementwise.path,
            "recurrence": "products" if self._team is None else "one_kernel",
        }

    def prepare(self) -> None:
        """See `Backend`."""
        # Torch hands the process's number of threads to OpenMP in each thread only when asked for it there; oneDNN,
        # which doesn't ask, would use all cores.
        torch.get_num_threads()

    def encode(self, entries: Indices, ids: CharacterIds) -> None:
        """See `Backend`."""
        with self._threads(len(entries), self._config.n_filters):
            self.memory.vectors[torch.from_numpy(entries)] = self._encoder(ids)

    def forget(self, entries: Indices) -> None:
        """See `Backend`."""
        if self.input_cache is not None:
            self.input_cache.places.forget(entries)

    def run(self, plan: RoundPlan, entries: Indices) -> None:
        """See `Backend`."""
        n_rows = plan.sizes[0] if self._team is None else 0  # whose products want threads
        with self._threads(n_rows, 4 * self._config.cell_dim):
            self._run(plan, entries)

    def _run(self, plan: RoundPlan, entries: Indices) -> None:
        if self.input_cache is not None:
            self.input_cache.fill(entries, self._input_projections)
        steps = _Steps.of(plan)
        xs: list[Tensor | None] = [None, None]
        for layer in range(self._config.n_layers):
            for d, y in enumerate(self._run_layer(layer, steps, entries, xs)):
                xs[d] = self._outputs(y, self._added(xs[d], entries[d]), self._returned[layer][d], steps.places[d])

    def _added(self, x: Tensor | None, entries: Indices) -> Tensor | None:
        """Return what is added to a layer's cells' output, of which the recurrence sees nothing; None: nothing."""
        if self._config.residual == "none":
            return None
        if self._config.residual == "input_to_input" and x is None:
            return self.memory.vectors.index_select(0, torch.from_numpy(entries))
        return x

    def _outputs(self, y: Tensor, added: Tensor | None, returned: Tensor, places: Tensor) -> Tensor:
        """Write what a layer returns to its places; return what the next layer reads, (padded N, P)."""
        n_steps, width = y.shape
        following, returns_sum = torch.empty(padded_rows(n_steps), width), self._config.residual == "published"
        self._after_cells.outputs(y, added, places, returns_sum=returns_sum, returned=returned, following=following)
        return following

    def _run_layer(self, layer: int, steps: _Steps, entries: Indices, xs: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Return what both directions' cells give, (N, P), for what they read; None: the tokens."""
        if self._team is None or self._recurrences is None:
            for d, x in enumerate(xs):  # one after the other: see the module
                y = self._run_cell(self._ticks[d][layer], self._work(layer, d, steps, entries[d], x))
                self._elementwise.keep(y, steps.last, self._h[layer][d], steps.slots)
                yield y
            return
        cells, works = (each[layer] for each in self._recurrences), self._lane_works(layer, steps, entries, xs)
        yield from self._team.run(list(zip(cells, works, strict=True)), self._threads_of_cells(steps))

    def _work(self, layer: int, direction: int, steps: _Steps, entries: Indices, x: Tensor | None) -> CellWork:
        if x is None:
            gates_x, index = self._first_inputs(direction, entries)
        else:
            gates_x, index = self._inputs[direction][layer](x.to(self._dtype)), torch.arange(len(entries))
        return CellWork(
            gates_x=gates_x,
            index=index,
            h=self._h[layer][direction].index_select(0, torch.from_numpy(_padded(steps.slots.numpy()))),
            c=self._c[layer][direction],
            slots=steps.slots,
            fresh=steps.fresh,
            sizes=steps.sizes,
        )

    def _lane_works(
        self, layer: int, steps: _Steps, entries: Indices, xs: Sequence[Tensor | None]
    ) -> "Iterator[LaneWork]":
        from bilm_model.engine.cpu.recurrence import LaneWork  # noqa: PLC0415 - there is Numba, or there were no such cells

        for d, x in enumerate(xs):
            inputs, index = self._first_inputs_of_lanes(d, entries[d]) if x is None else (x, None)
            h, c = self._h[layer][d], self._c[layer][d]
            yield LaneWork(inputs, index, h, c, steps.slots, steps.fresh, steps.ticks)

    def _threads_of_cells(self, steps: _Steps) -> "Threads":
        """Return who runs cells: as many threads as there are jobs for, OpenMP's only where one helper isn't enough."""
        width = 4 * self._config.cell_dim
        if self._n_threads == 1 or not self._is_parallel(2 * sum(steps.sizes), width):
            return "caller"
        return "helper" if self._n_threads == _WITH_HELPER or not self._is_parallel(steps.sizes[0], width) else "team"

    def _is_parallel(self, n_rows: int, width: int) -> bool:
        """Return whether all threads compute cells of so many rows, as wide as that on their wider side."""
        return self._multiply_adds(n_rows, width) >= _MIN_PARALLEL

    def _multiply_adds(self, n_rows: int, width: int) -> int:
        return n_rows * width * self._config.projection_dim

    @contextmanager
    def _threads(self, n_rows: int, width: int) -> Iterator[None]:
        """Decide how many threads products of so many rows get, as wide as that on their wider side.

        Products in blocks always get as many: with AMX, oneDNN cuts sums by the number of threads, too.
        """
        before, n_rows = torch.get_num_threads(), n_rows and (self._products.block_rows or n_rows)
        least = _MIN_BESIDE_HELPER if self._team is not None and self._n_threads == _WITH_HELPER else _MIN_PARALLEL
        torch.set_num_threads(self._n_threads if self._multiply_adds(n_rows, width) >= least else 1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _new_team(self) -> "RecurrenceTeam | None":
        if self._recurrences is None:
            return None
        from bilm_model.engine.cpu.recurrence import RecurrenceTeam  # noqa: PLC0415 - as above

        return RecurrenceTeam(self._recurrences[0][0], self._n_threads)

    def _run_cell(self, products: _TickProducts, work: CellWork) -> Tensor:
        """Execute all ticks of a cell; return what it gives, (N, P)."""
        outputs, first, h = [], 0, work.h.to(self._dtype)
        for n_rows in work.sizes:
            n_padded = padded_rows(n_rows)
            gates_h, m = products.recurrent(h[:n_padded]), self._cells_out[:n_padded]
            steps, slots = slice(first, first + n_rows), work.slots[:n_rows]
            gates, c, fresh = (gates_h, work.gates_x, work.index[steps]), work.c, work.fresh[steps]
            self._elementwise.lstm(*gates, c, slots, fresh=fresh, clip=self._config.cell_clip, out=m)
            h = m.clone() if products.projection is None else products.projection(m)
            outputs.append(h[:n_rows])
            first += n_rows
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _first_inputs(self, direction: int, entries: Indices) -> tuple[Tensor, Tensor]:
        """Layer 1's input projections, each different token's once, and the index (N,) of each step's."""
        if self.input_cache is not None:
            return self.input_cache.projections[direction], torch.from_numpy(self.input_cache.places.places(entries))
        distinct, index = np.unique(entries, return_inverse=True)
        return self._input_projections(direction, distinct), torch.from_numpy(index)

    def _first_inputs_of_lanes(self, direction: int, entries: Indices) -> tuple[Tensor, Tensor | None]:
        """Layer 1's input projections from their cache, with their index; without a cache the tokens' vectors (N, P).

        The kernel projects those itself. A product would wake OpenMP's threads, which keep its helper waiting.
        """
        if self.input_cache is not None:
            return self._first_inputs(direction, entries)
        return self.memory.vectors.index_select(0, torch.from_numpy(entries)), None

    def _input_projections(self, direction: int, entries: Indices) -> Tensor:
        """Layer 1's input projections (padded U, 4·C) of these tokens."""
        x = self.memory.vectors[torch.from_numpy(_padded(entries))]
        with self._threads(len(entries), 4 * self._config.cell_dim):
            return self._inputs[direction][0](x.to(self._dtype))


def _by_cell(states: Tensor) -> list[list[Tensor]]:
    """Return a view of each layer's and direction's part (L, 2, …): to take one of a tensor costs microseconds."""
    return [list(directions) for directions in states]


def _padded(indices: Indices) -> Indices:
    """Filled up to the number of rows that are computed; what comes of the others is left."""
    n_more = padded_rows(len(indices)) - len(indices)
    return np.concatenate([indices, np.repeat(indices[-1:], n_more)]) if n_more else indices
