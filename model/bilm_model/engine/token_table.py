"""Which token's vector is where: entries by token, for the tokens in flight and a bounded cache. Pure: no torch."""

from collections.abc import Iterable, Sequence

import numpy as np

from bilm_model.alphabet import MAX_TOKEN_BYTES
from bilm_model.characters import BEGIN_TOKEN, END_TOKEN, read_bytes
from bilm_model.engine import loops
from bilm_model.engine.fastest_loops import Bind, fastest_bind
from bilm_model.engine.planner import Indices

Key = str | bytes
"""A token; the bytes that are read of one that is longer, where they end within a character."""


class TokenTable(dict[Key, int]):
    """Entries by token: a look-up is a dictionary's, and only a token without an entry costs more.

    `Lanes` counts which entries are in use and says which are given up. An entry costs nothing before its first use: a
    table may have room for millions.

    Attributes:
        capacity: Entries.
        unknown: Entries that may have no vector yet, in the order in which they were made.
    """

    def __init__(self, capacity: int) -> None:
        """Create an empty table with room for so many entries."""
        super().__init__()
        self.capacity = capacity
        self.unknown: list[int] = []
        self._keys: list[Key] = []  # of the entries that have been used
        self._free: list[int] = []  # of those

    def __missing__(self, token: str) -> int:
        """Return a new entry, or that of another token that reads the same.

        Raises:
            CharacterError: If the token is empty or not valid Unicode.
        """
        key = _key(token)
        found = self.get(key)
        if found is None:
            found = self[key] = self._new(key)
            self.unknown.append(found)
        return found

    @property
    def entries(self) -> Indices:
        """All entries that have ever been used."""
        return np.arange(len(self._keys))

    @property
    def n_available(self) -> int:
        """Entries that stand for no token."""
        return self.capacity - len(self)

    def entries_of(self, sentences: Sequence[Sequence[str]]) -> list[int]:
        """Return the entries of the tokens and boundaries of some sentences, one after another; some may be new.

        Raises:
            CharacterError: If a token is empty or not valid Unicode. After this or any other error nothing has changed.
        """
        n_unknown, entries, find = len(self.unknown), list[int](), self.__getitem__
        try:
            begin, end = (find(BEGIN_TOKEN), find(END_TOKEN)) if sentences else (0, 0)
            for tokens in sentences:
                entries.append(begin)
                entries.extend(map(find, tokens))
                entries.append(end)
        except BaseException:
            self.give_up(self.unknown[n_unknown:])
            del self.unknown[n_unknown:]
            raise
        return entries

    def give_up(self, entries: Iterable[int]) -> None:
        """Let entries stand for nothing any more."""
        for entry in entries:
            del self[self._keys[entry]]
            self._free.append(entry)

    def read(self, entry: int) -> bytes:
        """Return the bytes of an entry's token, as many as the model reads."""
        key = self._keys[entry]
        return key if isinstance(key, bytes) else key.encode()

    def _new(self, key: Key) -> int:
        if self._free:
            entry = self._free.pop()
            self._keys[entry] = key
        else:
            entry = len(self._keys)
            self._keys.append(key)
        return entry


def _key(token: str) -> Key:
    data = read_bytes(token)
    if len(data) < MAX_TOKEN_BYTES:
        return token
    try:
        return data.decode()  # what is read of a longer token is a token, too
    except UnicodeDecodeError:
        return data


class InputPlaces:
    """Which entries' input projections are kept, and where: the most recently used, at most `capacity`.

    A place costs nothing before its first use, as an entry of a table.
    """

    def __init__(self, n_entries: int, capacity: int, bind: Bind | None = None) -> None:
        """Create an empty cache.

        Args:
            n_entries: Of the table of tokens.
            capacity: Places.
            bind: How loops run; None: the fastest way that works here.
        """
        self.capacity = capacity
        self._bind = bind or fastest_bind()
        self._numbers = np.zeros(8, dtype=np.int64)
        self._numbers[loops.N_CACHE_PLACES] = capacity
        self._numbers[[loops.FREE_CACHE_PLACE, loops.CACHE_OLDEST, loops.CACHE_NEWEST]] = loops.NONE
        self._place_after = np.zeros(n_entries, dtype=np.int64)
        self._of_places = np.zeros((4, capacity), dtype=np.int64)
        self._make_room(1024)

    def _make_room(self, n_given: int) -> None:
        """Let a call have so many entries."""
        self._given, self._missing, self._taken = np.zeros((3, n_given), dtype=np.int64)
        entry_at, older, newer, used = self._of_places
        given = (self._numbers, self._given, self._place_after)
        self._take = self._bind(
            loops.take_cache_places, (*given, entry_at, older, newer, used, self._missing, self._taken)
        )
        self._forget = self._bind(loops.forget_cache_places, (*given, older, newer))

    def take(self, entries: Indices) -> tuple[Indices, Indices]:
        """Make room for entries of any shape, which may repeat; at most `capacity` different ones.

        Returns:
            Those that are to be computed, each once, and their places.
        """
        self._give(entries)
        self._take()
        n_missing = int(self._numbers[loops.N_CACHE_MISSING])
        return self._missing[:n_missing].copy(), self._taken[:n_missing].copy()

    def places(self, entries: Indices) -> Indices:
        """Return where these entries' projections are, taken before; −1: nowhere."""
        places: Indices = self._place_after[entries] - 1
        return places

    def forget(self, entries: Indices) -> None:
        """Give up the places of entries that will stand for something else; they may repeat."""
        self._give(entries)
        self._forget()

    def _give(self, entries: Indices) -> None:
        if entries.size > len(self._given):
            self._make_room(2 * entries.size)
        self._given[: entries.size] = entries.ravel()
        self._numbers[loops.N_CACHE_GIVEN] = entries.size
