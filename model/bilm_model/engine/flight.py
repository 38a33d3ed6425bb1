"""Which sentences are in flight, and which slots and places are free. Pure: no torch operator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bilm_model.engine.planner import Indices, Row
from bilm_model.engine.sentences import EmbeddedSentence


@dataclass(eq=False)
class Ticket(Row):
    """A sentence in flight, as its owner knows it; the fields are the engine's.

    Attributes:
        entries: (T,) of its tokens and boundaries in the table of vectors.
    """

    entries: Indices = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass(eq=False)
class Flight:
    """The sentences in flight, and what is free.

    Attributes:
        n_slots: for sentences.
        n_places: for outputs, one a token or boundary.
        tickets: of sentences with tokens, in the order in which they joined.
        waiting_to_leave: sentences without tokens, with their results.
    """

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
        """Raise ValueError unless a sentence of so many steps can enter."""
        if not self.slots or n_steps > self.n_free:
            raise ValueError(f"{n_steps} tokens and boundaries don't fit: {len(self.slots)} rows, {self.n_free} free")

    def enter(self, entries: Indices) -> Ticket:
        """Take a sentence in, whose tokens and boundaries have these entries in the table of vectors."""
        n_steps = len(entries)
        self.n_free -= n_steps
        places = self.places[self.n_free : self.n_free + n_steps].copy()
        self.entry_of_place[places] = entries
        ticket = Ticket(self.slots.pop(), places, entries=entries)
        self.tickets.append(ticket)
        return ticket

    def leave(self, tickets: Sequence[Ticket]) -> None:
        """Take sentences out; their slots and places are free again."""
        for ticket in tickets:
            self.tickets.remove(ticket)
            self.slots.append(ticket.slot)
            n_steps = len(ticket.places)
            self.places[self.n_free : self.n_free + n_steps] = ticket.places
            self.n_free += n_steps
