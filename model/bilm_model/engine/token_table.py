"""Which token's vector is where: a table with room for the tokens in flight and a bounded cache. Pure: no torch."""

from collections.abc import Sequence

import numpy as np

from bilm_model.characters import read_bytes
from bilm_model.engine.planner import Indices
from bilm_model.engine.types import CacheStats

# Of a full cache, this share is given up together: finding the oldest takes a look at all.
_EVICTED_SHARE = 16


class TokenTable:
    """Entries by the bytes of a token that the model reads.

    Entries of tokens in flight are pinned. Of the others, the most recently used stay, at most `n_cached`. An entry
    costs nothing before its first use: a table may have room for millions.
    """

    def __init__(self, n_in_flight: int, n_cached: int, stats: CacheStats | None = None) -> None:
        """Create an empty table.

        Args:
            n_in_flight: tokens of the sentences in flight at most.
            n_cached: of the cache at most.
            stats: counters to continue; None: new ones.
        """
        self.capacity = n_in_flight + n_cached
        self.stats = CacheStats() if stats is None else stats
        self._n_cached = n_cached
        self._entry_of: dict[bytes, int] = {}
        self._keys: list[bytes] = []  # of the entries that have been used
        self._free: list[int] = []  # of those
        self._pins = np.zeros(self.capacity, dtype=np.int32)
        self._known = np.zeros(self.capacity, dtype=bool)
        self._used = np.zeros(self.capacity, dtype=np.int64)
        self._idle = np.zeros(self.capacity, dtype=bool)
        self._clock = 0

    @property
    def n_cached(self) -> int:
        """Tokens kept although no sentence in flight has them."""
        return int(self._idle[: len(self._keys)].sum())

    @property
    def n_available(self) -> int:
        """Entries that new tokens can have: free ones, and those of cached tokens."""
        return self._n_free + self.n_cached

    @property
    def entries(self) -> Indices:
        """All entries that have ever been used."""
        return np.arange(len(self._keys))

    @property
    def _n_free(self) -> int:
        return self.capacity - len(self._keys) + len(self._free)

    def enter(self, tokens: Sequence[str]) -> Indices:
        """Return the entries (T,) of a sentence's tokens, pinned until `leave`.

        Raises:
            CharacterError: if a token is empty or not valid Unicode.
            ValueError: if there are more new tokens than free entries. After either error nothing has changed.
        """
        keys = [read_bytes(token) for token in tokens]
        n_new = len({key for key in keys if key not in self._entry_of})
        if n_new > self._n_free:
            raise ValueError(f"{n_new} new tokens don't fit: {self._n_free} entries free")
        entries = np.array([self._find(key) for key in keys], dtype=np.int64)
        self.stats.misses += n_new
        self.stats.hits += len(keys) - n_new
        self._clock += 1
        np.add.at(self._pins, entries, 1)
        self._used[entries] = self._clock
        self._idle[entries] = False
        return entries

    def leave(self, entries: Indices) -> Indices:
        """Unpin what `enter` gave; return the entries that stand for nothing any more."""
        np.subtract.at(self._pins, entries, 1)
        self._used[entries] = self._clock
        self._idle[entries] = self._pins[entries] == 0
        return self._evict()

    def missing(self, entries: Indices) -> Indices:
        """Return the different ones of these entries that have no vector: compute them, then call `encoded`."""
        distinct = np.unique(entries)
        return distinct[~self._known[distinct]]

    def encoded(self, entries: Indices) -> None:
        """Note that these entries have their vectors."""
        self._known[entries] = True

    def key(self, entry: int) -> bytes:
        """Return the bytes of an entry's token, as many as the model reads."""
        return self._keys[entry]

    def _find(self, key: bytes) -> int:
        entry = self._entry_of.get(key)
        if entry is not None:
            return entry
        if self._free:
            entry = self._free.pop()
            self._keys[entry] = key
        else:
            entry = len(self._keys)
            self._keys.append(key)
        self._entry_of[key] = entry
        return entry

    def _evict(self) -> Indices:
        idle = np.flatnonzero(self._idle[: len(self._keys)])
        if len(idle) <= self._n_cached:
            return idle[:0]
        n_evicted = len(idle) - self._n_cached + self._n_cached // _EVICTED_SHARE
        victims = idle[np.argpartition(self._used[idle], n_evicted - 1)[:n_evicted]]
        for entry in victims.tolist():
            del self._entry_of[self._keys[entry]]
            self._free.append(entry)
        self._known[victims] = self._idle[victims] = False
        return victims


class InputPlaces:
    """Which entries' input projections are kept, and where: the most recently used, at most `capacity`.

    A place costs nothing before its first use, as an entry of a table.
    """

    def __init__(self, n_entries: int, capacity: int) -> None:
        self.capacity = capacity
        self._place_after = np.zeros(n_entries, dtype=np.int64)  # one more than an entry's place; 0: it has none
        self._entry = np.zeros(capacity, dtype=np.int64)
        self._used = np.zeros(capacity, dtype=np.int64)
        self._free: list[int] = []  # of the places that have been used
        self._n_touched = 0
        self._clock = 0

    def take(self, entries: Indices) -> tuple[Indices, Indices]:
        """Make room for different entries, at most `capacity`.

        Returns:
            Those that are to be computed, and their places.
        """
        self._clock += 1
        places = self.places(entries)
        self._used[places[places >= 0]] = self._clock
        missing = entries[places < 0]
        if len(missing) == 0:
            return missing, missing
        taken = self._take_free(len(missing))
        n_more = len(missing) - len(taken)
        if n_more:
            oldest = np.argpartition(self._used, n_more - 1)[:n_more]
            self._place_after[self._entry[oldest]] = 0
            taken = np.concatenate([taken, oldest])
        self._entry[taken], self._place_after[missing], self._used[taken] = missing, taken + 1, self._clock
        return missing, taken

    def _take_free(self, n: int) -> Indices:
        """Return up to n places that no entry has, marked as used now."""
        n_new = min(max(0, n - len(self._free)), self.capacity - self._n_touched)
        new = np.arange(self._n_touched, self._n_touched + n_new)
        self._n_touched += n_new
        freed, self._free = self._free[:n], self._free[n:]
        taken = np.concatenate([np.array(freed, dtype=np.int64), new])
        self._used[taken] = self._clock
        return taken

    def places(self, entries: Indices) -> Indices:
        """Return where these entries' projections are, taken before; −1: nowhere."""
        places: Indices = self._place_after[entries] - 1
        return places

    def forget(self, entries: Indices) -> None:
        """Give up the places of entries that will stand for something else."""
        places = np.unique(self.places(entries))
        self._free += places[places >= 0].tolist()
        self._place_after[entries] = 0
