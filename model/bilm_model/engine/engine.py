"""The engine of recurrent models: a cellular batch that returns what each sentence asked for."""

from collections.abc import Iterable, Sequence
from typing import Generic

from bilm_model.engine.cellular import CellularBatch
from bilm_model.engine.flight import Ticket
from bilm_model.engine.results import Transfer
from bilm_model.engine.sentences import steps_of
from bilm_model.engine.types import Capacity, EngineDescription, EngineResult, EngineStats, S, StateCodec


class RecurrentEngine(Generic[S]):
    """`Engine` on a cellular batch."""

    def __init__(self, batch: CellularBatch, state_codec: StateCodec) -> None:
        """Take a batch over.

        Args:
            batch: Nothing else uses it.
            state_codec: Of its model.
        """
        self._batch, self._state_codec = batch, state_codec
        self._sentences: dict[Ticket, S] = {}
        self._tickets: dict[S, Ticket] = {}
        self._arriving: dict[S, Transfer[S]] = {}

    @property
    def capacity(self) -> Capacity:
        """What may be in flight."""
        return Capacity(self._batch.max_rows, self._batch.max_tokens)

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
        return len(self._tickets) + len(self._arriving)

    @property
    def used(self) -> Capacity:
        """What they take up; a result on its way to the host takes nothing."""
        return self.capacity - Capacity(self._batch.free_rows, self._batch.free_tokens)

    @property
    def stats(self) -> EngineStats:
        """Counters of the batch."""
        return self._batch.stats

    @property
    def description(self) -> EngineDescription:
        """What computes; paths may change with the warm-up."""
        return EngineDescription(self._batch.backend, str(self._batch.device), self._batch.paths)

    def need(self, n_tokens: int) -> Capacity:
        """Return what a sentence of so many tokens takes up."""
        return Capacity(1 if n_tokens else 0, steps_of(n_tokens))

    def join(self, sentences: Sequence[S]) -> None:
        """Take sentences in that fit the free capacity; see `Engine.join`."""
        joined: list[Ticket] = []
        try:
            for sentence in sentences:
                joined.append(self._batch.join(sentence))
        except BaseException:
            for ticket in joined:
                self._batch.leave(ticket)
            raise
        for sentence, ticket in zip(sentences, joined, strict=True):
            self._sentences[ticket], self._tickets[sentence] = sentence, ticket

    def drop(self, sentences: Iterable[S]) -> None:
        """Take sentences out; see `Engine.drop`."""
        for sentence in sentences:
            self._arriving.pop(sentence, None)
            ticket = self._tickets.pop(sentence, None)
            if ticket is not None:
                del self._sentences[ticket]
                self._batch.leave(ticket)

    def advance(self) -> list[EngineResult[S]]:
        """Execute a round; return the results that have ended and arrived on the host."""
        for ticket, embedded in self._batch.advance():
            sentence = self._sentences.pop(ticket)
            del self._tickets[sentence]
            self._arriving[sentence] = Transfer.of(sentence, embedded)
        # With nothing left to compute there is nothing better to do than to wait
        arrived = [transfer for transfer in self._arriving.values() if transfer.done or not self._tickets]
        for transfer in arrived:
            del self._arriving[transfer.sentence]
        return [transfer.result() for transfer in arrived]

    def reset(self) -> None:
        """Drop everything in flight."""
        self._forget()
        self._batch.reset()

    def warm_up(self) -> None:
        """Reset, and compute a real batch; see `Engine.warm_up`."""
        self._forget()
        self._batch.warm_up()

    def check(self) -> None:
        """Compute a sentence of known vectors; see `Engine.check`."""
        self._batch.check()

    def _forget(self) -> None:
        for sentences in (self._sentences, self._tickets, self._arriving):
            sentences.clear()
