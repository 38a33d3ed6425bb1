"""The sentences in flight: who waits, which lane each one has, which places and entries they hold. Pure: no torch.

A sentence is a number below S; everything about it stands in arrays.
"""

from collections.abc import Sequence

import numpy as np

from bilm_model.engine import loops
from bilm_model.engine.fastest_loops import Bind
from bilm_model.engine.planner import Indices, Round, RoundPlan, SentenceSteps
from bilm_model.engine.token_table import TokenTable


class Lanes:
    """Lanes, the sentences in them, and those that wait for one.

    Attributes:
        n_lanes: Sentences that advance at a time.
        n_sentences: Sentences that may be in flight, waiting ones included.
        n_places: Steps of all of them.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        n_lanes: int,
        n_waiting: int,
        n_places: int,
        n_cached: int,
        max_ticks: int,
        bind: Bind,
    ) -> None:
        """Start with nothing in flight.

        Args:
            table: Of tokens; it has room for `n_places + n_cached` entries.
            n_lanes: Sentences that advance at a time.
            n_waiting: Sentences that may wait beside those.
            n_places: Steps of all sentences in flight, at most.
            n_cached: Entries that stay although no sentence in flight has them.
            max_ticks: Of a round.
            bind: How loops run.
        """
        self.n_lanes, self.n_sentences, self.n_places = n_lanes, n_lanes + n_waiting, n_places
        self._table = table
        self._free = list(range(self.n_sentences))[::-1]
        self._numbers = numbers = np.zeros(22, dtype=np.int64)
        self._half = max_ticks * n_lanes
        numbers[[loops.N_LANES, loops.N_SENTENCES, loops.N_CACHED]] = n_lanes, self.n_sentences, n_cached
        numbers[[loops.MAX_STEPS, loops.MAX_TICKS, loops.N_FREE_PLACES]] = self._half, max_ticks, n_places
        numbers[[loops.FREE_PLACE, loops.OLDEST, loops.NEWEST]] = loops.NONE
        self._bind_loops(bind, max_ticks)

    def _bind_loops(self, bind: Bind, max_ticks: int) -> None:
        numbers = self._numbers

        def arrays(count: int, size: int) -> Indices:
            found: Indices = np.zeros((count, size), dtype=np.int64)  # pages that nothing writes to cost nothing
            return found

        n_steps, flags, first, last, lane_of, queue, following = arrays(7, self.n_sentences)
        first[:], lane_of[:] = loops.NONE, loops.ENDED
        self._given, self._ended, self._brought = (arrays(n, self.n_sentences) for n in (3, 2, 2))
        sentence_of, forward, backward, left, ticks_of, end_of, self._slots, self._last = arrays(8, self.n_lanes)
        sentence_of[:] = loops.NONE
        self._sizes, begins = arrays(2, max_ticks + 1)
        self._entries_given, after, before, entry_of, self._victims = arrays(5, self.n_places)
        self._read = arrays(2, self.n_places)
        self._pins, older, newer, idle, self._known = arrays(5, self._table.capacity)
        self._places, self._entries = (arrays(2, self._half) for _ in range(2))
        self._fresh = arrays(1, self._half)[0]
        pinned = (self._pins, older, newer, idle)
        given = self._given.ravel()  # a view, as below
        self._enter = bind(
            loops.enter,
            (numbers, given, self._entries_given, first, last, n_steps, flags, lane_of, queue,
             after, before, entry_of, *pinned),
        )  # fmt: skip
        self._withdraw = bind(loops.withdraw, (numbers, given, lane_of, queue, sentence_of))
        self._leave = bind(
            loops.leave, (numbers, given, first, last, after, entry_of, *pinned, self._known, self._victims)
        )
        self._read_steps = bind(loops.read_steps, (numbers, given, first, n_steps, after, entry_of, *self._read))
        self._plan = bind(
            loops.plan,
            (numbers, queue, first, last, n_steps, flags, lane_of, following,
             sentence_of, forward, backward, left, ticks_of, end_of, after, before, entry_of,
             self._sizes, begins, self._slots, self._last, self._places.ravel(), self._entries.ravel(), self._fresh,
             self._ended.ravel(), self._brought.ravel()),
        )  # fmt: skip

    @property
    def n_free(self) -> int:
        """Sentences that can enter."""
        return len(self._free)

    @property
    def n_free_places(self) -> int:
        """Steps that entering sentences may have together."""
        return int(self._numbers[loops.N_FREE_PLACES])

    @property
    def n_in_flight(self) -> int:
        """Sentences that have entered and not left."""
        return self.n_sentences - len(self._free)

    @property
    def n_cached(self) -> int:
        """Entries of tokens that no sentence in flight has."""
        return int(self._numbers[loops.N_IDLE])

    def enter(self, entries: Sequence[int], n_steps: Sequence[int], flags: Sequence[int]) -> list[int]:
        """Take sentences in that fit; they wait for lanes in this order.

        Args:
            entries: Of their steps, one sentence after another.
            n_steps: Of each; at least 1.
            flags: Of each, see `loops`.

        Returns:
            Their numbers.
        """
        n_left = len(self._free) - len(n_steps)
        sentences = self._free[n_left:]
        del self._free[n_left:]
        self._given[:, : len(sentences)] = sentences, n_steps, flags
        self._numbers[loops.N_GIVEN] = len(sentences)
        self._entries_given[: len(entries)] = entries
        self._enter()
        return sentences

    def drop(self, sentences: Sequence[int]) -> list[int]:
        """Take sentences out, wherever they are, as `leave` does."""
        self._give(sentences)
        self._withdraw()
        return self.leave(sentences)

    def leave(self, sentences: Sequence[int]) -> list[int]:
        """Free what sentences hold that have ended; return the entries that stand for nothing any more.

        Those that have left already are ignored.
        """
        self._give(sentences)
        self._leave()
        n_left, *_, n_victims = self._numbers[loops.N_GIVEN :].tolist()
        # All of them, unless some had left already
        self._free += sentences if n_left == len(sentences) else self._given[0, :n_left].tolist()
        victims: list[int] = self._victims[:n_victims].tolist() if n_victims else []
        self._table.give_up(victims)
        if not self.n_in_flight:
            self._table.unknown.clear()
        return victims

    def unknown(self) -> list[int]:
        """Return the different entries in use that have no vectors: compute them, then call `know`."""
        return [entry for entry in dict.fromkeys(self._table.unknown) if self._pins[entry] and not self._known[entry]]

    def know(self, entries: Sequence[int]) -> None:
        """Note that these entries have their vectors, and that no other one in use lacks it."""
        self._known[entries] = 1
        self._table.unknown.clear()

    def plan(self, block_rows: int, *, leave_out: bool = False) -> Round | None:
        """Return the next round, which counts as done; None if no lane runs. The next one overwrites its arrays.

        Args:
            block_rows: Steps of a round after which it ends, one of each lane that runs at least.
            leave_out: Only sentences that aren't deferrable run, if there are such; others keep their lanes, and may
                take free ones.
        """
        numbers = self._numbers
        numbers[[loops.BLOCK_ROWS, loops.LEAVE_OUT]] = block_rows, leave_out
        self._plan()
        _, n_rows, n_ticks, n_steps, n_ended, n_brought, _ = numbers[loops.N_GIVEN :].tolist()
        if n_rows == 0:
            return None
        plan = RoundPlan(
            slots=self._slots[:n_rows],
            sizes=tuple(self._sizes[:n_ticks].tolist()),
            places=self._places[:, :n_steps],
            last=self._last[:n_rows],
            fresh=self._fresh[:n_steps].astype(bool),
        )
        return Round(
            plan=plan,
            entries=self._entries[:, :n_steps],
            brought=_pairs(self._brought, n_brought),
            ended=_pairs(self._ended, n_ended),
        )

    def steps(self, sentences: Sequence[int]) -> SentenceSteps:
        """Return the steps of sentences, one sentence after another; the next call overwrites them."""
        self._give(sentences)
        self._read_steps()
        n_steps = int(self._numbers[loops.N_STEPS])
        places, entries = self._read[:, :n_steps]
        return SentenceSteps(self._given[1, : len(sentences)], places, entries)

    def _give(self, sentences: Sequence[int]) -> None:
        self._given[0, : len(sentences)] = sentences
        self._numbers[loops.N_GIVEN] = len(sentences)


def _pairs(array: Indices, count: int) -> list[tuple[int, int]]:
    """Return the first sentences of an array of a round, with their lanes."""
    return list(zip(*array[:, :count].tolist(), strict=True)) if count else []
