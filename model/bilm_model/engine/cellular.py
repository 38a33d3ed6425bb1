"""Cellular batching: sentences join at any round, all that are in flight advance together, each leaves when it ends.

An LSTM cell does the same work for every sentence, whatever the position, so sentences of any length and age share a
tick, and none waits for another one or pays for padding (BatchMaker: Gao et al., EuroSys 2018).

Legend: L layers with the token layer, T tokens, D width, P projection, C cells.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from bilm_model.bilm import Bilm
from bilm_model.characters import bytes_ids, check_ids, with_boundaries
from bilm_model.config import BilmConfig
from bilm_model.engine.backend import Backend, Memory
from bilm_model.engine.cpu.backend import CpuBackend
from bilm_model.engine.planner import Indices, Round, Row, ticks_of_round
from bilm_model.engine.state import LstmState
from bilm_model.engine.token_table import TokenTable
from bilm_model.engine.transfer import to_device
from bilm_model.engine.types import EngineSentence, EngineStats, OutputSpec
from bilm_model.errors import ModelError
from bilm_model.kernels.product_paths import Precision, ProductPath
from bilm_model.scalar_mix import Selection

_MAX_TICKS = 32
"""Of a round: a newcomer waits for one to end, and more would save little, as each tick reads the weights anyway."""

_ROWS_ON_A_CPU, _ROWS_ON_A_GPU = 128, 1024
_INPUT_CACHE_MIB_ON_A_CPU = 256

_COLLECTED_STEPS = 2048
"""Steps of the results that one round copies out beside one sentence's: bounds the memory for it, and the time."""

_MIB = 2**20
_SAME = 0.05
"""Relative distance of vectors that count as the same: beyond rounding in bfloat16, below anything that went wrong."""

_WARM_UP = (("The", "engine", "warms", "up", "."), ("Twice",))


@dataclass(frozen=True)
class EngineOptions:
    """What can be chosen.

    Attributes:
        precision: of the products; everything else is in float32.
        max_rows: sentences computed at a time; None: 128 on a CPU, 1024 on a GPU.
        max_tokens: tokens and boundaries of the sentences in flight; each takes (L - 1)·D·4 bytes for its outputs.
        token_cache_mib: for vectors of tokens that no sentence in flight has; 0: none are kept.
        input_cache_mib: for layer 1's input halves of the gates; 0: none are kept; None: 256 on a CPU, 0 on a GPU,
            where computing them again is as fast as looking them up.
        products: how a CPU computes products; None: the fastest way that works here, see `cpu_path`.
    """

    precision: Precision = "float32"
    max_rows: int | None = None
    max_tokens: int = 65_536
    token_cache_mib: int = 64
    input_cache_mib: int | None = None
    products: ProductPath | None = None

    def resolved(self, device: torch.device) -> "EngineOptions":
        """Return these options with what is None replaced by what it means on a device."""
        on_gpu = device.type == "cuda"
        input_cache_mib = 0 if on_gpu else _INPUT_CACHE_MIB_ON_A_CPU
        return replace(
            self,
            max_rows=self.max_rows or (_ROWS_ON_A_GPU if on_gpu else _ROWS_ON_A_CPU),
            input_cache_mib=input_cache_mib if self.input_cache_mib is None else self.input_cache_mib,
        )

    def n_cached(self, config: BilmConfig) -> int:
        """Return how many vectors of tokens are kept that no sentence in flight has."""
        return self.token_cache_mib * _MIB // (4 * config.projection_dim)

    def memory(self, config: BilmConfig, device: torch.device) -> Memory:
        """Allocate what outlives a round; on the device "meta" there are shapes only."""
        n_rows = self.max_rows or 0
        return Memory.of(config, device, n_rows, self.max_tokens, self.max_tokens + self.n_cached(config))

    def memory_bytes(self, config: BilmConfig, device: torch.device) -> int:
        """Return how much that is on a device, without allocating it."""
        memory = self.resolved(device).memory(config, torch.device("meta"))
        return sum(tensor.nbytes for tensor in (memory.vectors, memory.outputs, memory.h, memory.c))


ALL_LAYERS = OutputSpec(Selection())
"""Every layer of every token, in float32."""


@dataclass(frozen=True, eq=False)
class PlainSentence:
    """A sentence by itself, for use without a server (`EngineSentence`).

    Attributes:
        tokens: None empty, without boundaries.
        state: h (L - 1, 2, P) and c (L - 1, 2, C) to continue from; None: zero.
        output: What an engine returns for it; a batch by itself returns all layers with the boundaries.
        return_state: Whether an engine returns the state after it.
    """

    tokens: Sequence[str]
    state: LstmState | None = None
    output: OutputSpec = ALL_LAYERS
    return_state: bool = False


def steps_of(n_tokens: int) -> int:
    """Return the tokens and boundaries of a sentence; one without tokens has no boundaries either."""
    return n_tokens + 2 if n_tokens else 0


@dataclass(frozen=True, eq=False)
class EmbeddedSentence:
    """What came of it.

    Attributes:
        layers: (L, T + 2, D) with the boundaries, on the engine's device; (L, 0, D) without tokens.
        h: (L - 1, 2, P) after the sentence, on the engine's device.
        c: (L - 1, 2, C) likewise.
    """

    layers: Tensor
    h: Tensor
    c: Tensor


@dataclass(eq=False)
class Ticket(Row):
    """A sentence in flight, as its owner knows it; the fields are the engine's.

    Attributes:
        entries: (T,) of its tokens and boundaries in the table of vectors.
    """

    entries: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(eq=False)
class _Flight:
    """Who is in flight, and what is free."""

    n_slots: int
    n_places: int
    tickets: list[Ticket] = field(default_factory=list)
    waiting_to_leave: list[tuple[Ticket, EmbeddedSentence]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = list(range(self.n_slots))[::-1]
        # As a stack, so that the same few places are used again and again: memory follows what is in flight
        self.places: Indices = np.arange(self.n_places, dtype=np.int64)[::-1].copy()
        self.n_free = self.n_places
        self.entry_of_place = np.zeros(self.n_places, dtype=np.int64)

    def check_fits(self, n_steps: int) -> None:
        if not self.slots or n_steps > self.n_free:
            raise ValueError(f"{n_steps} tokens and boundaries don't fit: {len(self.slots)} rows, {self.n_free} free")

    def enter(self, entries: Indices) -> Ticket:
        n_steps = len(entries)
        self.n_free -= n_steps
        places = self.places[self.n_free : self.n_free + n_steps].copy()
        self.entry_of_place[places] = entries
        ticket = Ticket(self.slots.pop(), places, entries=entries)
        self.tickets.append(ticket)
        return ticket

    def leave(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self.tickets.remove(ticket)
            self.slots.append(ticket.slot)
            n_steps = len(ticket.places)
            self.places[self.n_free : self.n_free + n_steps] = ticket.places
            self.n_free += n_steps


class CellularBatch:
    """The sentences in flight through a biLM. Not safe for several threads at once."""

    def __init__(self, bilm: Bilm, device: torch.device, options: EngineOptions = EngineOptions()) -> None:
        """Takes a float32 biLM over; it is moved and rounded in place.

        Raises:
            ConfigError: if a cache is too small to be of use.
        """
        self._device, self._config = device, bilm.config
        options = options.resolved(device)
        assert options.max_rows is not None  # noqa: S101 - resolved
        assert options.input_cache_mib is not None  # noqa: S101 - resolved
        self.max_rows, self.max_tokens = options.max_rows, options.max_tokens
        if options.precision == "bfloat16":
            bilm.to_bfloat16_products()
        self._n_cached = options.n_cached(bilm.config)
        memory = options.memory(bilm.config, device)
        self._backend = _new_backend(bilm, memory, self.max_rows, options.input_cache_mib * _MIB, options.products)
        self._known: Tensor | None = None
        self.stats = EngineStats()
        self._counters = self.stats
        self.reset()

    @property
    def backend(self) -> str:
        """Device and implementation, for people to read."""
        return self._backend.name

    @property
    def paths(self) -> Mapping[str, str]:
        """Which of several implementations each part runs on, see `Backend.paths`."""
        return self._backend.paths

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def free_rows(self) -> int:
        """Sentences that can join."""
        return len(self._flight.slots)

    @property
    def free_tokens(self) -> int:
        """Tokens and boundaries that joining sentences may have."""
        return self._flight.n_free

    @property
    def n_in_flight(self) -> int:
        """Sentences that have joined and not come back."""
        return len(self._flight.tickets) + len(self._flight.waiting_to_leave)

    def warm_up(self) -> None:
        """Runs a real batch, so that the first caller doesn't pay for what is done once.

        To be called first in the thread that will use the engine, while nothing is in flight; what an error left
        there is dropped.

        Raises:
            ModelError: if the results are not finite numbers.
        """
        self.reset()
        self._backend.prepare()
        with self._uncounted():
            known = [embedded.layers.cpu() for embedded in self.run([PlainSentence(tokens) for tokens in _WARM_UP])]
        if not all(bool(torch.isfinite(layers).all()) for layers in known):
            raise ModelError("the warm-up pass gave values that are not finite numbers")
        if self._known is None:
            self._known = known[0]
        self.check()
        self.reset()

    def check(self) -> None:
        """Runs a sentence whose vectors are known from the first warm-up, while nothing else is in flight.

        Raises:
            ModelError: if other vectors come out than came then, beyond rounding.
        """
        with self._uncounted():
            found = self.run([PlainSentence(_WARM_UP[0])])[0].layers.cpu()
        assert self._known is not None  # noqa: S101 - warm_up() comes first
        if not float((found - self._known).norm()) <= _SAME * float(self._known.norm()):  # nan compares as False
            raise ModelError("a sentence has other vectors than it had at the start")

    def run(self, sentences: Sequence[EngineSentence]) -> list[EmbeddedSentence]:
        """Embeds sentences, any number of them, while nothing else is in flight.

        Raises:
            CharacterError: if a token is empty or not valid Unicode.
            ValueError: if a sentence has more than `max_tokens` tokens and boundaries, or a state of another shape.
                After this or any other error nothing is in flight.
        """
        results: dict[Ticket, EmbeddedSentence] = {}
        order: list[Ticket] = []
        try:
            for sentence in sentences:
                while self.n_in_flight and not (self.free_rows and steps_of(len(sentence.tokens)) <= self.free_tokens):
                    results.update(self.advance())
                order.append(self.join(sentence))
            while self.n_in_flight:
                results.update(self.advance())
        except BaseException:
            self.reset()
            raise
        return [results[ticket] for ticket in order]

    @torch.inference_mode()
    def join(self, sentence: EngineSentence) -> Ticket:
        """Take a sentence in; `advance` will bring it back.

        Raises:
            CharacterError: if a token is empty or not valid Unicode.
            ValueError: if it doesn't fit, see `free_rows` and `free_tokens`, or if its state has another shape. After
                this or any other error the engine is as it was.
        """
        self._check_state(sentence)
        if not sentence.tokens:
            return self._pass_through(sentence)
        self._flight.check_fits(steps_of(len(sentence.tokens)))
        h, c = self._state_of(sentence)
        ticket = self._flight.enter(self._table.enter(with_boundaries(sentence.tokens)))
        try:
            self._backend.memory.h[:, :, ticket.slot] = h
            self._backend.memory.c[:, :, ticket.slot] = c
        except BaseException:
            self._leave([ticket])
            raise
        return ticket

    @torch.inference_mode()
    def advance(self) -> list[tuple[Ticket, EmbeddedSentence]]:
        """Execute a round: all sentences in flight go on; return those that have ended.

        After an exception the vectors of what is in flight are undefined: drop each sentence by `leave`, or all of them
        by `warm_up`.
        """
        running = [ticket for ticket in self._flight.tickets if ticket.remaining]
        if running:
            self._run_round(running)
        done = _to_collect([ticket for ticket in self._flight.tickets if not ticket.remaining])
        ended = self._collect(done) if done else []
        self._leave(done)
        without_tokens, self._flight.waiting_to_leave = self._flight.waiting_to_leave, []
        return without_tokens + ended

    def leave(self, ticket: Ticket) -> None:
        """Drop a sentence in flight.

        Raises:
            ValueError: if it has left, or was dropped by `warm_up`.
        """
        without_tokens = [waiting for waiting, _ in self._flight.waiting_to_leave]
        if ticket in self._flight.tickets:
            self._leave([ticket])
        elif ticket in without_tokens:
            self._flight.waiting_to_leave.pop(without_tokens.index(ticket))
        else:
            raise ValueError("the sentence is not in flight")

    def reset(self) -> None:
        """Drop everything in flight and all cached vectors; the counters continue."""
        self._flight = _Flight(self.max_rows, self.max_tokens)
        self._table = TokenTable(self.max_tokens, self._n_cached, self._counters.cache)
        self._backend.forget(np.arange(self._table.capacity))

    def _run_round(self, tickets: Sequence[Ticket]) -> None:
        remaining = [ticket.remaining for ticket in tickets]
        plan = Round.of(tickets, ticks_of_round(remaining, self._backend.block_rows, _MAX_TICKS))
        entries = self._flight.entry_of_place[plan.places]
        try:
            self._encode(self._table.missing(entries))
            self._backend.run(plan, entries)
        except BaseException:
            self._backend.forget(np.unique(entries))  # layer 1's input halves may be noted and not computed
            raise
        self._counters.ticks += len(plan.sizes)
        self._counters.steps += sum(plan.sizes)
        for ticket in tickets:
            ticket.done = min(ticket.done + len(plan.sizes), len(ticket.places))

    def _leave(self, tickets: Sequence[Ticket]) -> None:
        if tickets:
            self._flight.leave(tickets)
            self._backend.forget(self._table.leave(np.concatenate([ticket.entries for ticket in tickets])))

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Count into nothing: metrics are read from another thread at any time, so what isn't to count never shows."""
        self._count_into(EngineStats())
        try:
            yield
        finally:
            self._count_into(self.stats)

    def _count_into(self, counters: EngineStats) -> None:
        self._counters, self._table.stats = counters, counters.cache

    def _encode(self, entries: Indices) -> None:
        if len(entries):
            ids = np.stack([bytes_ids(self._table.key(entry)) for entry in entries.tolist()])
            check_ids(ids)
            self._backend.encode(entries, ids)
            self._table.encoded(entries)

    def _check_state(self, sentence: EngineSentence) -> None:
        if sentence.state is None:
            return
        sizes = (self._config.projection_dim, self._config.cell_dim)
        for name, part, size in zip(("h", "c"), sentence.state, sizes, strict=True):
            expected = (self._config.n_layers, 2, size)
            if part.shape != expected:
                raise ValueError(f"state: {name} has shape {part.shape} (expected {expected})")

    def _state_of(self, sentence: EngineSentence) -> tuple[Tensor | float, Tensor | float]:
        """What to write into a slot: h and c, or zeros."""
        if sentence.state is None:
            return 0.0, 0.0
        h, c = (to_device(part.copy(), self._device) for part in sentence.state)  # they may be read-only
        return h, c

    def _collect(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, EmbeddedSentence]]:
        """The results of sentences that have just ended, copied out of the engine's memory."""
        memory, P = self._backend.memory, self._config.projection_dim
        places, entries, slots = (
            to_device(array, self._device)
            for array in (
                np.concatenate([ticket.places for ticket in tickets]),
                np.concatenate([ticket.entries for ticket in tickets]),
                np.array([ticket.slot for ticket in tickets]),
            )
        )
        layers = torch.empty(self._config.layer_count, len(places), 2 * P, device=self._device)
        for d, half in enumerate(layers.split(P, dim=-1)):
            half[0] = memory.vectors.index_select(0, entries)
            # A step's outputs lie at the place of the token it read: both directions of a token at the same place
            for layer, outputs in enumerate(memory.outputs[:, d]):
                half[1 + layer] = outputs.index_select(0, places)
        parts = layers.split([len(ticket.places) for ticket in tickets], dim=1)
        h, c = (states[:, :, slots].unbind(2) for states in (memory.h, memory.c))
        return [(ticket, EmbeddedSentence(*found)) for ticket, *found in zip(tickets, parts, h, c, strict=True)]

    def _pass_through(self, sentence: EngineSentence) -> Ticket:
        """A sentence without tokens has no vectors, and leaves the state as it is."""
        config, none = self._config, np.zeros(0, dtype=np.int64)
        ticket = Ticket(-1, none)
        sizes = (config.projection_dim, config.cell_dim)
        state = [
            torch.zeros(config.n_layers, 2, size) if part is None else torch.tensor(part)
            for size, part in zip(sizes, sentence.state or (None, None), strict=True)
        ]
        layers = torch.zeros(config.layer_count, 0, config.width)
        layers, h, c = (tensor.to(self._device) for tensor in (layers, *state))
        self._flight.waiting_to_leave.append((ticket, EmbeddedSentence(layers, h, c)))
        return ticket


def _to_collect(done: Sequence[Ticket]) -> list[Ticket]:
    """Whose results to copy out now: the first's to have joined, and short ones' as long as they are few."""
    if not done:
        return []
    first, *others = done
    others.sort(key=lambda ticket: len(ticket.places))
    n_steps = np.cumsum([len(ticket.places) for ticket in others])
    return [first, *others[: int(np.searchsorted(n_steps, _COLLECTED_STEPS, side="right"))]]


def _new_backend(
    bilm: Bilm, memory: Memory, max_rows: int, input_cache_bytes: int, products: ProductPath | None
) -> Backend:
    if memory.vectors.is_cuda:
        # Not at the top: it loads Triton, which a machine without a GPU needn't have
        from bilm_model.engine.cuda.backend import CudaBackend  # noqa: PLC0415

        return CudaBackend(bilm, memory, max_rows, _MAX_TICKS, input_cache_bytes=input_cache_bytes)
    return CpuBackend(bilm, memory, max_rows, input_cache_bytes, products)
