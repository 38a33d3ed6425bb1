"""The engine of recurrent models: a cellular batch that returns what each sentence asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from bilm_model.engine.backends import new_collector
from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.result_groups import NUMPY_TYPES, shape_of
from bilm_model.engine.results import Collected, Collector
from bilm_model.engine.sentences import steps_of
from bilm_model.engine.state import LstmState
from bilm_model.engine.state_transfer import ArrivingStates
from bilm_model.engine.types import Capacity, EngineDescription, EngineResult, EngineStats, S, StateCodec


class RecurrentEngine(Generic[S]):
    """`Engine` on a cellular batch."""

    def __init__(self, batch: CellularBatch, state_codec: StateCodec, collector: Collector | None = None) -> None:
        """Take a batch over.

        Args:
            batch: Nothing else uses it.
            state_codec: Of its model.
            collector: Makes the results; None: the fastest that works.
        """
        self._batch, self._state_codec = batch, state_codec
        self._collector = collector or new_collector(batch.memory)
        self._sentences: dict[int, S] = {}
        self._numbers: dict[S, int] = {}
        self._without_tokens: dict[S, None] = {}
        self._arriving: list[_Arriving[S]] = []

    @property
    def capacity(self) -> Capacity:
        """What may be in flight."""
        return Capacity(self._batch.max_rows, self._batch.max_tokens)

    @property
    def ahead(self) -> int:
        """Sentences that may join beyond the rows of `capacity`; they begin in the tick after others end."""
        return self._batch.n_waiting

    @property
    def max_steps(self) -> int:
        """Steps of the longest sentence that can be computed."""
        return self._batch.max_tokens

    @property
    def state_codec(self) -> StateCodec:
        """For the states of its sentences."""
        return self._state_codec

    @property
    def in_flight(self) -> int:
        """Sentences that have joined and whose results have not been returned."""
        arriving = sum(len(each.sentences) - len(each.dropped) for each in self._arriving)
        return len(self._numbers) + len(self._without_tokens) + arriving

    @property
    def used(self) -> Capacity:
        """What they take up; a result on its way to the host takes nothing."""
        return Capacity(self._batch.n_in_flight, self._batch.max_tokens - self._batch.free_tokens)

    @property
    def stats(self) -> EngineStats:
        """Counters of the batch."""
        return self._batch.stats

    @property
    def description(self) -> EngineDescription:
        """What computes; paths may change with the warm-up."""
        paths = {**self._batch.paths, "results": self._collector.path}
        return EngineDescription(self._batch.backend, str(self._batch.device), paths)

    def need(self, n_tokens: int) -> Capacity:
        """Return what a sentence of so many tokens takes up."""
        return Capacity(1 if n_tokens else 0, steps_of(n_tokens))

    def join(self, sentences: Sequence[S]) -> None:
        """Take sentences in that fit the free capacity, `ahead` included; see `Engine.join`."""
        with_tokens = [sentence for sentence in sentences if sentence.tokens]
        without = [] if len(with_tokens) == len(sentences) else [each for each in sentences if not each.tokens]
        for sentence in without:
            self._batch.check_state(sentence.state)
        if with_tokens:
            numbers = self._batch.join(with_tokens)
            self._sentences.update(zip(numbers, with_tokens, strict=True))
            self._numbers.update(zip(with_tokens, numbers, strict=True))
        if without:
            self._without_tokens |= dict.fromkeys(without)

    def drop(self, sentences: Iterable[S]) -> None:
        """Take sentences out; see `Engine.drop`."""
        dropped = []
        for sentence in sentences:
            self._without_tokens.pop(sentence, None)
            number = self._numbers.pop(sentence, None)
            if number is not None:
                del self._sentences[number]
                dropped.append(number)
            for arriving in self._arriving:
                if sentence in arriving.sentences:
                    arriving.dropped.add(sentence)
        if dropped:
            self._batch.drop(dropped)

    def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[S]]:
        """Execute a round; return the results that have ended and arrived on the host. See `Engine.advance`."""
        ended = self._batch.advance(leave_out=leave_out, max_steps=max_steps)
        if ended:
            self._arriving.append(self._collect(ended))
        found = self._pass_through() if self._without_tokens else []
        # With nothing left to compute there is nothing better to do than to wait
        while self._arriving and (not self._numbers or self._arriving[0].done()):
            found += self._arriving.pop(0).results()
        return found

    def reset(self) -> None:
        """Drop everything in flight."""
        self._drop_all()
        self._batch.reset()

    def warm_up(self) -> None:
        """Reset, and compute a real batch; see `Engine.warm_up`."""
        self._drop_all()
        self._batch.warm_up()

    def check(self) -> None:
        """Compute a sentence of known vectors; see `Engine.check`."""
        self._batch.check()

    def _collect(self, ended: Sequence[tuple[int, int]]) -> "_Arriving[S]":
        """Make the results of what ended in a round and free what it held."""
        numbers = [number for number, _ in ended]
        sentences = [self._sentences[number] for number in numbers]
        choices = {position: each.choice for position, each in enumerate(sentences) if each.choice is not None}
        outputs = [sentence.output for sentence in sentences]
        collected = self._collector.collect(self._batch.steps(numbers), outputs, choices)
        wanted = [position for position, sentence in enumerate(sentences) if sentence.return_state]
        states = self._batch.read_states([ended[position][1] for position in wanted]) if wanted else None
        for number, sentence in zip(numbers, sentences, strict=True):  # first, so that none leaves twice
            del self._sentences[number], self._numbers[sentence]
        self._batch.leave(numbers)
        return _Arriving(sentences, collected, wanted, states, set())

    def _pass_through(self) -> list[EngineResult[S]]:
        """Return the results of sentences without tokens, which have no vectors and leave their states as they are.

        No device is asked for anything.
        """
        sentences, self._without_tokens = self._without_tokens, {}
        found = []
        for sentence in sentences:
            assert not sentence.output.pooled  # noqa: S101 - there is nothing to pool: the caller refuses it
            shape = shape_of(0, self._batch.config.layer_count, self._batch.config.width, sentence.output)
            vectors = np.zeros(shape, NUMPY_TYPES[sentence.output.data_type])
            state = self._batch.state_after_nothing(sentence.state) if sentence.return_state else None
            found.append(EngineResult(sentence, vectors, state))
        return found

    def _drop_all(self) -> None:
        for each in (self._sentences, self._numbers, self._without_tokens, self._arriving):
            each.clear()


@dataclass(eq=False, slots=True)
class _Arriving(Generic[S]):
    """The results of a round on their way to the host.

    Attributes:
        sentences: That ended.
        collected: Their vectors.
        with_state: The positions of those whose states are returned.
        states: Of these.
        dropped: Sentences whose results nothing waits for any more.
    """

    sentences: Sequence[S]
    collected: Collected
    with_state: Sequence[int]
    states: ArrivingStates | None
    dropped: set[S]

    def done(self) -> bool:
        """Return whether everything has arrived."""
        return self.collected.done() and (self.states is None or self.states.done())

    def results(self) -> list[EngineResult[S]]:
        """Return them; waits for what has not arrived."""
        vectors = self.collected.vectors()
        if self.states is None and not self.dropped:
            return [EngineResult(*each, None) for each in zip(self.sentences, vectors, strict=True)]
        states: dict[int, LstmState] = {}
        if self.states is not None:
            states.update(zip(self.with_state, self.states.states(), strict=True))
        return [
            EngineResult(sentence, found, states.get(position))
            for position, (sentence, found) in enumerate(zip(self.sentences, vectors, strict=True))
            if sentence not in self.dropped
        ]
