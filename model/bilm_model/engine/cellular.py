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
from bilm_model.characters import bytes_ids, check_ids
from bilm_model.engine.backend import Memory
from bilm_model.engine.backends import MAX_TICKS, NewBackend, new_backend
from bilm_model.engine.fastest_loops import Bind, fastest_bind, path_of
from bilm_model.engine.lanes import Lanes
from bilm_model.engine.loops import BROUGHT, DEFERRABLE, RETURNED
from bilm_model.engine.options import EngineOptions
from bilm_model.engine.planner import Round, SentenceSteps
from bilm_model.engine.results import LayerReader
from bilm_model.engine.sentences import EmbeddedSentence, PlainSentence, steps_of
from bilm_model.engine.state import LstmState
from bilm_model.engine.state_transfer import ArrivingStates, StateTransfer
from bilm_model.engine.token_table import TokenTable
from bilm_model.engine.transfer import to_device
from bilm_model.engine.types import EngineSentence, EngineStats
from bilm_model.errors import ModelError

_SAME = 0.05
"""Relative distance of vectors that count as the same: beyond rounding in bfloat16, below anything that went wrong."""

_WAITING_SHARE = 8
"""One sentence may wait for a lane for so many steps of a full round: shorter ones are rare."""

_WARM_UP = (("The", "engine", "warms", "up", "."), ("Twice",))

_DEFAULTS = EngineOptions()


class CellularBatch:
    """The sentences in flight through a biLM, each of at least one token. Not safe for several threads at once.

    Attributes:
        config: Structure of the model.
        max_rows: Sentences that advance at a time.
        max_tokens: Tokens and boundaries of all that are in flight.
        n_waiting: Sentences that may wait in the batch for one of those to end.
        stats: Counters.
    """

    def __init__(
        self,
        bilm: Bilm,
        device: torch.device,
        options: EngineOptions = _DEFAULTS,
        new_backend: NewBackend = new_backend,
        bind: Bind | None = None,
    ) -> None:
        """Take a float32 biLM over; it is moved and rounded in place.

        Args:
            bilm: to run.
            device: where it computes.
            options: what can be chosen.
            new_backend: makes what executes rounds.
            bind: how the planner's loops run; None: the fastest way that works here.

        Raises:
            ConfigError: if a cache is too small to be of use.
        """
        self._device, self.config = device, bilm.config
        options = options.resolved(device)
        assert options.max_rows is not None  # noqa: S101 - resolved
        self.max_rows, self.max_tokens = options.max_rows, options.max_tokens
        if options.precision == "bfloat16":
            bilm.to_bfloat16_products()
        self._n_cached = options.n_cached(bilm.config)
        memory = options.memory(bilm.config, device)
        self._backend = new_backend(bilm, memory, options)
        self._reader, self._state_transfer = LayerReader(memory), StateTransfer(device)
        self._bind = bind or fastest_bind()
        full_round = max(self.max_rows, min(self._backend.block_rows, MAX_TICKS * self.max_rows))
        self.n_waiting = -(-full_round // _WAITING_SHARE)
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
        return {**self._backend.paths, "planner": path_of(self._bind)}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def memory(self) -> Memory:
        """What the back end keeps between rounds."""
        return self._backend.memory

    @property
    def free_rows(self) -> int:
        """Sentences that can join, those that will wait included."""
        return self._lanes.n_free

    @property
    def free_tokens(self) -> int:
        """Tokens and boundaries that joining sentences may have together."""
        return self._lanes.n_free_places

    @property
    def free_entries(self) -> int:
        """Different tokens that joining sentences may bring and that no sentence in flight has."""
        return self._table.n_available + self._lanes.n_cached

    @property
    def n_in_flight(self) -> int:
        """Sentences that have joined and not left."""
        return self._lanes.n_in_flight

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
        results: dict[int, EmbeddedSentence] = {}
        running: dict[int, int] = {}
        try:
            for position, sentence in enumerate(sentences):
                if not sentence.tokens:
                    self.check_state(sentence.state)
                    results[position] = self._unchanged(sentence)
                    continue
                while running and not (self.free_rows and steps_of(len(sentence.tokens)) <= self.free_tokens):
                    self._advance_run(running, results)
                running[self._join([sentence], keeps_states=True)[0]] = position
            while running:
                self._advance_run(running, results)
        except BaseException:
            self.reset()
            raise
        return [results[position] for position in range(len(sentences))]

    def join(self, sentences: Sequence[EngineSentence]) -> list[int]:
        """Take sentences in, in this order; return their numbers, by which `advance` says that they have ended.

        Raises:
            CharacterError: if a token is empty or not valid Unicode.
            ValueError: if they don't fit, see `free_rows` and `free_tokens`, or if a state has another shape. After
                this or any other error none has joined.
        """
        return self._join(sentences, keeps_states=False)

    @torch.inference_mode()
    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> Sequence[tuple[int, int]]:
        """Execute a round: advance all sentences in flight.

        Args:
            leave_out: Leave deferrable sentences out, if there are others.
            max_steps: Steps after which the round ends; None: as many as fill a block of input projections.

        Returns:
            Sentences that have ended, with the slots of `memory` that hold their states, as far as those are returned.
            What they left in memory stays until `leave`, and in the slots until the next round.

        After an exception the vectors of what is in flight are undefined: drop each sentence by `drop`, or all of them
        by `reset`.
        """
        block_rows = self._backend.block_rows
        found = self._lanes.plan(block_rows if max_steps is None else min(block_rows, max_steps), leave_out=leave_out)
        if found is None:
            return []
        try:
            self._encode_new()
            self._write_states(found)
            self._backend.run(found.plan, found.entries)
        except BaseException:
            self._backend.forget(found.entries.ravel())  # layer 1's input projections may be noted and not computed
            raise
        finally:
            for sentence, _ in found.brought:
                self._states.pop(sentence, None)
        self._counters.ticks += len(found.plan.sizes)
        self._counters.steps += found.plan.places.shape[1]
        return found.ended

    def steps(self, sentences: Sequence[int]) -> SentenceSteps:
        """Return where in memory the vectors of sentences are that have ended."""
        return self._lanes.steps(sentences)

    def read_states(self, slots: Sequence[int]) -> ArrivingStates:
        """Return the states in slots of `memory`, on their way to the host."""
        return self._state_transfer.read(self.memory, slots)

    def leave(self, sentences: Sequence[int]) -> None:
        """Free what sentences hold that have ended."""
        self._forget(self._lanes.leave(sentences))

    def drop(self, sentences: Sequence[int]) -> None:
        """Take sentences out, wherever they are."""
        for sentence in sentences:
            self._states.pop(sentence, None)
        self._forget(self._lanes.drop(sentences))

    def reset(self) -> None:
        """Drop everything in flight and all cached vectors; the counters continue."""
        self._backend.forget(self._table.entries)
        self._start_empty()

    def check_state(self, state: LstmState | None) -> None:
        """Make sure that a state has the model's shape.

        Raises:
            ValueError: if it hasn't.
        """
        if state is None:
            return
        sizes = (self.config.projection_dim, self.config.cell_dim)
        for name, part, size in zip(("h", "c"), state, sizes, strict=True):
            expected = (self.config.n_layers, 2, size)
            if part.shape != expected:
                raise ValueError(f"state: {name} has shape {part.shape} (expected {expected})")

    def _start_empty(self) -> None:
        self._table = TokenTable(self.max_tokens + self._n_cached)
        self._lanes = Lanes(
            self._table,
            n_lanes=self.max_rows,
            n_waiting=self.n_waiting,
            n_places=self.max_tokens,
            n_cached=self._n_cached,
            max_ticks=MAX_TICKS,
            bind=self._bind,
        )
        self._states: dict[int, LstmState] = {}

    def _join(self, sentences: Sequence[EngineSentence], *, keeps_states: bool) -> list[int]:
        tokens = [sentence.tokens for sentence in sentences]
        n_steps = [len(each) + 2 for each in tokens]
        for sentence in sentences:
            self.check_state(sentence.state)
        self._check_fits(n_steps)
        # Before anything is taken, as reading what callers bring may fail
        states = [_copied(sentence.state) for sentence in sentences]
        flags = [_flags(sentence, keeps_states=keeps_states) for sentence in sentences]
        n_new = len(self._table.unknown)
        entries = self._table.entries_of(tokens)
        cache, n_misses = self._counters.cache, len(self._table.unknown) - n_new
        cache.misses += n_misses
        cache.hits += len(entries) - n_misses
        numbers = self._lanes.enter(entries, n_steps, flags)
        self._states |= {number: state for number, state in zip(numbers, states, strict=True) if state is not None}
        return numbers

    def _check_fits(self, n_steps: Sequence[int]) -> None:
        if len(n_steps) > self.free_rows or sum(n_steps) > self.free_tokens:
            raise ValueError(
                f"{len(n_steps)} sentences of {sum(n_steps)} tokens and boundaries don't fit: "
                f"{self.free_rows} rows, {self.free_tokens} free"
            )

    def _encode_new(self) -> None:
        if not self._table.unknown:
            return
        entries = self._lanes.unknown()
        if entries:
            ids = bytes_ids([self._table.read(entry) for entry in entries])
            check_ids(ids)
            self._backend.encode(np.array(entries), ids)
        self._lanes.know(entries)

    def _write_states(self, found: Round) -> None:
        if found.brought:
            sentences, lanes = zip(*found.brought, strict=True)
            self._state_transfer.write(self.memory, lanes, [self._states[sentence] for sentence in sentences])

    def _forget(self, entries: Sequence[int]) -> None:
        if entries:
            self._backend.forget(np.array(entries))

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Count into nothing: metrics are read from another thread at any time, so what isn't to count never shows."""
        self._counters = EngineStats()
        try:
            yield
        finally:
            self._counters = self.stats

    # ---- raw layers, for use without a server -----------------------------------------------------------------------

    def _advance_run(self, running: dict[int, int], results: dict[int, EmbeddedSentence]) -> None:
        ended = self.advance()
        if not ended:
            return
        numbers = [sentence for sentence, _ in ended]
        slots = to_device(np.array([slot for _, slot in ended]), self._device)
        steps = self.steps(numbers)
        places, entries = (to_device(each, self._device) for each in (steps.places, steps.entries))
        layers = self._reader.read(places, entries)
        parts = layers.split(steps.counts.tolist(), dim=1)
        h, c = (states[:, :, slots].unbind(2) for states in (self.memory.h, self.memory.c))
        for sentence, *found in zip(numbers, parts, h, c, strict=True):
            results[running.pop(sentence)] = EmbeddedSentence(*found)
        self.leave(numbers)

    def _unchanged(self, sentence: EngineSentence) -> EmbeddedSentence:
        """A sentence without tokens has no vectors, and leaves the state as it is."""
        layers = torch.zeros(self.config.layer_count, 0, self.config.width)
        state = map(torch.from_numpy, self.state_after_nothing(sentence.state))
        return EmbeddedSentence(*(tensor.to(self._device) for tensor in (layers, *state)))

    def state_after_nothing(self, state: LstmState | None) -> LstmState:
        """Return a copy of a state, or the zero state."""
        config = self.config
        if state is not None:
            return state[0].copy(), state[1].copy()
        h, c = (
            np.zeros((config.n_layers, 2, size), dtype=np.float32) for size in (config.projection_dim, config.cell_dim)
        )
        return h, c


def _copied(state: LstmState | None) -> LstmState | None:
    """Return a state of one's own: the owner may change it, or it may be read-only."""
    return None if state is None else (state[0].copy(), state[1].copy())


def _flags(sentence: EngineSentence, *, keeps_states: bool) -> int:
    returned = RETURNED if keeps_states or sentence.return_state else 0
    brought = 0 if sentence.state is None else BROUGHT
    return returned | brought | (DEFERRABLE if sentence.deferrable else 0)
