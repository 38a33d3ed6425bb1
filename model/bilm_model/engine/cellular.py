"""Cellular batching: sentences join at any round, all that are in flight advance together, each leaves when it ends.

An LSTM cell does the same work for every sentence, whatever the position, so sentences of any length and age share a
tick, and none waits for another one or pays for padding (BatchMaker: Gao et al., EuroSys 2018).

Legend: L layers with the token layer, T tokens, D width, P projection, C cells.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from bilm_model.bilm import Bilm
from bilm_model.characters import bytes_ids, check_ids, with_boundaries
from bilm_model.engine.backends import MAX_TICKS, NewBackend, new_backend
from bilm_model.engine.flight import Flight, Ticket
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.planner import Indices, RoundPlan, ticks_of_round
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence, steps_of
from bilm_model.engine.token_table import TokenTable
from bilm_model.engine.transfer import to_device
from bilm_model.engine.types import EngineSentence, EngineStats
from bilm_model.errors import ModelError

_COLLECTED_STEPS = 2048
"""Steps of the results that one round copies out beside one sentence's: bounds the memory for it, and the time."""

_SAME = 0.05
"""Relative distance of vectors that count as the same: beyond rounding in bfloat16, below anything that went wrong."""

_WARM_UP = (("The", "engine", "warms", "up", "."), ("Twice",))


_DEFAULTS = EngineOptions()


class CellularBatch:
    """The sentences in flight through a biLM. Not safe for several threads at once."""

    def __init__(
        self,
        bilm: Bilm,
        device: torch.device,
        options: EngineOptions = _DEFAULTS,
        new_backend: NewBackend = new_backend,
    ) -> None:
        """Take a float32 biLM over; it is moved and rounded in place.

        Args:
            bilm: to run.
            device: where it computes.
            options: what can be chosen.
            new_backend: makes what executes rounds.

        Raises:
            ConfigError: if a cache is too small to be of use.
        """
        self._device, self._config = device, bilm.config
        options = options.resolved(device)
        assert options.max_rows is not None  # noqa: S101 - resolved
        self.max_rows, self.max_tokens = options.max_rows, options.max_tokens
        if options.precision == "bfloat16":
            bilm.to_bfloat16_products()
        self._n_cached = options.n_cached(bilm.config)
        memory = options.memory(bilm.config, device)
        self._backend = new_backend(bilm, memory, options)
        self._known: Tensor | None = None
        self.stats = EngineStats()
        self._counters = self.stats
        self._start_empty()

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
    def free_entries(self) -> int:
        """Different tokens that joining sentences may bring and that no sentence in flight has."""
        return self._table.n_available

    @property
    def n_in_flight(self) -> int:
        """Sentences that have joined and not come back."""
        return len(self._flight.tickets) + len(self._flight.waiting_to_leave)

    def warm_up(self) -> None:
        """Run a real batch, so that the first request doesn't pay for what is done once.

        To be called first in the thread that will use the engine, while nothing is in flight; what an error left
        there is dropped.

        Raises:
            ModelError: if the vectors are not finite numbers, or differ from the first warm-up's beyond rounding.
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
        """Run a sentence whose vectors are known from the first warm-up, while nothing else is in flight.

        Raises:
            ModelError: if other vectors come out than came then, beyond rounding.
        """
        with self._uncounted():
            found = self.run([PlainSentence(_WARM_UP[0])])[0].layers.cpu()
        assert self._known is not None  # noqa: S101 - warm_up() comes first
        if not float((found - self._known).norm()) <= _SAME * float(self._known.norm()):  # nan compares as False
            raise ModelError("a sentence has other vectors than it had at the start")

    def run(self, sentences: Sequence[EngineSentence]) -> list[EmbeddedSentence]:
        """Embed sentences, any number of them, while nothing else is in flight.

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
        state = self._state_of(sentence)
        ticket = self._flight.enter(self._table.enter(with_boundaries(sentence.tokens)))
        if state is None:
            return ticket
        ticket.brings_state = True
        try:
            for part, states in zip(state, (self._backend.memory.h, self._backend.memory.c), strict=True):
                states[:, :, ticket.slot] = part
        except BaseException:
            self._leave([ticket])
            raise
        return ticket

    @torch.inference_mode()
    def advance(self) -> list[tuple[Ticket, EmbeddedSentence]]:
        """Execute a round: advance all sentences in flight; return those that have ended.

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
        self._backend.forget(self._table.entries)
        self._start_empty()

    def _start_empty(self) -> None:
        self._flight = Flight(self.max_rows, self.max_tokens)
        self._table = TokenTable(self.max_tokens, self._n_cached, self._counters.cache)

    def _run_round(self, tickets: Sequence[Ticket]) -> None:
        remaining = [ticket.remaining for ticket in tickets]
        plan = RoundPlan.of(tickets, ticks_of_round(remaining, self._backend.block_rows, MAX_TICKS))
        entries = self._flight.entry_of_place[plan.places]
        try:
            self._encode(self._table.missing(entries))
            self._backend.run(plan, entries)
        except BaseException:
            self._backend.forget(np.unique(entries))  # layer 1's input projections may be noted and not computed
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

    def _state_of(self, sentence: EngineSentence) -> tuple[Tensor, Tensor] | None:
        """Return what to write into a slot: h and c; None where the sentence starts from zeros."""
        if sentence.state is None:
            return None
        h, c = (to_device(part.copy(), self._device) for part in sentence.state)  # they may be read-only
        return h, c

    def _collect(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, EmbeddedSentence]]:
        """Return the results of sentences that have just ended, copied out of the engine's memory."""
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
    """Return whose results to copy out now: the first's to have joined, and short ones' as long as they are few."""
    if not done:
        return []
    first, *others = done
    others.sort(key=lambda ticket: len(ticket.places))
    n_steps = np.cumsum([len(ticket.places) for ticket in others])
    return [first, *others[: int(np.searchsorted(n_steps, _COLLECTED_STEPS, side="right"))]]
