"""The bookkeeping of sentences in flight as loops over arrays, for all sentences of a call or a round together.

Plain Python, which Numba compiles (`compiled_loops`): so arrays are indexed by numbers only, and everything else is an
integer. A sentence's places form a list that is linked both ways, so that places need not be neighbours, and nothing is
moved when a sentence leaves.

Legend: S sentences, R lanes, A places, E entries, K ticks of a round at most, N steps of a round at most.
"""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def loop(function: F) -> F:
    """Let compiled loops call a function."""
    try:
        # Numba, or what it needs of the platform, may be missing
        from numba.extending import register_jitable  # noqa: PLC0415

        register_jitable(function)
    except Exception:  # noqa: S110 - then all are interpreted, see `fastest_loops`
        pass
    return function


NONE = -1
WAITING, ENDED = -1, -2
"""In place of a lane."""
BROUGHT, RETURNED, DEFERRABLE = 1, 2, 4
"""Flags of a sentence: it brings a state, its state is returned, a round may leave it out."""
FEW_LANES = 32
"""So many lanes or fewer end a round with the first sentence that ends and that none can follow before: its result
needn't wait, nor what brings a state."""

# ---- places in the array `numbers` ----------------------------------------------------------------------------------

(
    N_LANES,
    N_SENTENCES,
    N_CACHED,
    MAX_STEPS,
    MAX_TICKS,
    BLOCK_ROWS,
    LEAVE_OUT,
    FREE_PLACE,
    N_TOUCHED,
    N_FREE_PLACES,
    QUEUE_FIRST,
    N_QUEUED,
    OLDEST,
    NEWEST,
    N_IDLE,
    N_GIVEN,
    N_ROWS,
    N_TICKS,
    N_STEPS,
    N_ENDED,
    N_BROUGHT,
    N_VICTIMS,
) = range(22)
"""Sizes and limits, then what changes: heads of lists and counters, what a loop is given, and what it has found."""


# ---- lists from the least to the most recently used -----------------------------------------------------------------


@loop
def link_newest(numbers, oldest, newest, older, newer, item):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Append an item to a list whose ends stand at `oldest` and `newest` in `numbers`."""
    last = numbers[newest]
    older[item], newer[item] = last, NONE
    if last == NONE:
        numbers[oldest] = item
    else:
        newer[last] = item
    numbers[newest] = item


@loop
def unlink(numbers, oldest, newest, older, newer, item):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Take an item out of such a list."""
    before, behind = older[item], newer[item]
    if before == NONE:
        numbers[oldest] = behind
    else:
        newer[before] = behind
    if behind == NONE:
        numbers[newest] = before
    else:
        older[behind] = before


# ---- sentences come and go ------------------------------------------------------------------------------------------


@loop
def enter(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, given, entries, first, last, n_steps, flags, lane_of, queue,
    after, before, entry_of, pins, older, newer, idle,
):  # fmt: skip
    """Take sentences in: each gets its places and waits for a lane; the entries of its tokens are pinned.

    Args:
        numbers: N_GIVEN sentences.
        given: (3·S,) which from 0, the steps of each from S, the flags of each from 2·S.
        entries: of their steps, sentence after sentence.
        first: (S,) gets each one's first place; NONE of those that hold nothing.
        last: (S,) gets each one's last place.
        n_steps: (S,) gets those of each.
        flags: (S,) gets those of each.
        lane_of: (S,) gets WAITING.
        queue: (S,) ring of waiting sentences.
        after: (A,) the next place of the same sentence, or the next free one.
        before: (A,) the place before.
        entry_of: (A,) the entry that stands at a place.
        pins: (E,) steps in flight that read an entry.
        older: (E,) of entries that nothing in flight reads.
        newer: (E,) of entries that nothing in flight reads.
        idle: (E,) whether an entry is one of them.
    """
    step, size = 0, numbers[N_SENTENCES]
    for number in range(numbers[N_GIVEN]):
        sentence, previous = given[number], NONE
        n_steps[sentence], flags[sentence] = given[size + number], given[2 * size + number]
        for _ in range(n_steps[sentence]):
            place = numbers[FREE_PLACE]
            if place == NONE:
                place = numbers[N_TOUCHED]
                numbers[N_TOUCHED] = place + 1
            else:
                numbers[FREE_PLACE] = after[place]
            before[place] = previous
            if previous == NONE:
                first[sentence] = place
            else:
                after[previous] = place
            entry = entries[step]
            entry_of[place] = entry
            if idle[entry]:
                unlink(numbers, OLDEST, NEWEST, older, newer, entry)
                numbers[N_IDLE] -= 1
                idle[entry] = 0
            pins[entry] += 1
            previous = place
            step += 1
        after[previous] = NONE
        last[sentence] = previous
        lane_of[sentence] = WAITING
        queue[(numbers[QUEUE_FIRST] + numbers[N_QUEUED]) % size] = sentence
        numbers[N_QUEUED] += 1
    numbers[N_FREE_PLACES] -= step


@loop
def withdraw(numbers, given, lane_of, queue, sentence_of):  # type: ignore[no-untyped-def]
    """Take N_GIVEN sentences out of their lanes and out of the queue; others keep their order."""
    size, first = numbers[N_SENTENCES], numbers[QUEUE_FIRST]
    for number in range(numbers[N_GIVEN]):
        sentence = given[number]
        lane = lane_of[sentence]
        if lane >= 0:
            sentence_of[lane] = NONE
        if lane == WAITING:
            kept = 0
            for position in range(numbers[N_QUEUED]):
                waiting = queue[(first + position) % size]
                if waiting != sentence:
                    queue[(first + kept) % size] = waiting
                    kept += 1
            numbers[N_QUEUED] = kept
        lane_of[sentence] = ENDED


@loop
def leave(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, given, first, last, after, entry_of, pins, older, newer, idle, known, victims
):
    """Free what N_GIVEN sentences hold. Entries that nothing reads any more become idle; the oldest are given up.

    What holds nothing, as it has left already, is ignored: to free a place twice would make a ring of the free ones.

    Args:
        numbers: gets N_VICTIMS, and N_GIVEN sentences that have left now.
        given: (S,) which sentences; gets those that have left now.
        first: (S,) of each; gets NONE.
        last: (S,) of each.
        after: (A,) see `enter`.
        entry_of: (A,) see `enter`.
        pins: (E,) see `enter`.
        older: (E,) see `enter`.
        newer: (E,) see `enter`.
        idle: (E,) see `enter`.
        known: (E,) whether an entry has its vector; one that has none is given up.
        victims: (A,) gets the entries that are given up.
    """
    n_victims, n_freed, n_left = 0, 0, 0
    for number in range(numbers[N_GIVEN]):
        sentence = given[number]
        place = first[sentence]
        if place == NONE:
            continue
        given[n_left] = sentence
        n_left += 1
        while place != NONE:
            entry = entry_of[place]
            pins[entry] -= 1
            if pins[entry] == 0:
                if known[entry]:
                    link_newest(numbers, OLDEST, NEWEST, older, newer, entry)
                    numbers[N_IDLE] += 1
                    idle[entry] = 1
                else:
                    victims[n_victims] = entry
                    n_victims += 1
            place = after[place]
            n_freed += 1
        after[last[sentence]] = numbers[FREE_PLACE]
        numbers[FREE_PLACE], first[sentence] = first[sentence], NONE
    while numbers[N_IDLE] > numbers[N_CACHED]:
        entry = numbers[OLDEST]
        unlink(numbers, OLDEST, NEWEST, older, newer, entry)
        numbers[N_IDLE] -= 1
        idle[entry], known[entry] = 0, 0
        victims[n_victims] = entry
        n_victims += 1
    numbers[N_FREE_PLACES] += n_freed
    numbers[N_VICTIMS], numbers[N_GIVEN] = n_victims, n_left


@loop
def read_steps(numbers, given, first, n_steps, after, entry_of, places, entries):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Write the steps of N_GIVEN sentences into `given` from S, and their places and entries, one after another."""
    step = 0
    for number in range(numbers[N_GIVEN]):
        given[numbers[N_SENTENCES] + number] = n_steps[given[number]]
        place = first[given[number]]
        while place != NONE:
            places[step], entries[step] = place, entry_of[place]
            place = after[place]
            step += 1
    numbers[N_STEPS] = step


# ---- a round --------------------------------------------------------------------------------------------------------


@loop
def take_waiting(numbers, queue):  # type: ignore[no-untyped-def]
    """Return the sentence that has waited longest, taken out of the queue."""
    first = numbers[QUEUE_FIRST]
    numbers[QUEUE_FIRST] = (first + 1) % numbers[N_SENTENCES]
    numbers[N_QUEUED] -= 1
    return queue[first]


@loop
def fill_lanes(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, queue, first, last, n_steps, flags, lane_of, sentence_of, forward, backward, left, brought
):
    """Let waiting sentences take the free lanes; clear LEAVE_OUT where no lane would run."""
    n_brought, n_running = 0, 0
    for lane in range(numbers[N_LANES]):
        if sentence_of[lane] == NONE and numbers[N_QUEUED] > 0:
            sentence = take_waiting(numbers, queue)
            sentence_of[lane], lane_of[sentence] = sentence, lane
            forward[lane], backward[lane], left[lane] = first[sentence], last[sentence], n_steps[sentence]
            if flags[sentence] & BROUGHT:
                brought[n_brought], brought[numbers[N_SENTENCES] + n_brought] = sentence, lane
                n_brought += 1
        if sentence_of[lane] != NONE and not flags[sentence_of[lane]] & DEFERRABLE:
            n_running += 1
    numbers[N_BROUGHT] = n_brought
    if n_running == 0:
        numbers[LEAVE_OUT] = 0


@loop
def left_out(numbers, flags, sentence):  # type: ignore[no-untyped-def]
    """Return whether the round leaves a sentence out: it may have a lane, which stays as it is."""
    return numbers[LEAVE_OUT] != 0 and flags[sentence] & DEFERRABLE != 0


@loop
def running_lanes(numbers, flags, sentence_of, left):  # type: ignore[no-untyped-def]
    """Return how many lanes run, the fewest steps left in one, and in one that keeps its state to the round's end."""
    n_running, shortest, kept = 0, numbers[MAX_STEPS], numbers[MAX_STEPS]
    for lane in range(numbers[N_LANES]):
        sentence = sentence_of[lane]
        if sentence != NONE and not left_out(numbers, flags, sentence):
            n_running += 1
            shortest = min(shortest, left[lane])
            if flags[sentence] & RETURNED:
                kept = min(kept, left[lane])
    return n_running, shortest, kept


@loop
def can_follow(numbers, queue, flags):  # type: ignore[no-untyped-def]
    """Return whether the sentence that has waited longest, if any, may begin within the round.

    A state is written between rounds, so a sentence that brings one begins with a round, and none passes it meanwhile.
    """
    if numbers[N_QUEUED] == 0:
        return False
    sentence = queue[numbers[QUEUE_FIRST]]
    return flags[sentence] & BROUGHT == 0 and not left_out(numbers, flags, sentence)


@loop
def ticks_of_round(numbers, queue, flags, n_running, shortest, kept):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Return how many ticks to do together: many for few lanes, few for many.

    The input projections of a round are computed in one block: with few lanes it takes many ticks to fill a block, and
    only a full one makes up for reading the weights; with many lanes, more ticks would only keep waiting sentences
    waiting.
    """
    n_ticks = max(1, min(numbers[MAX_TICKS], numbers[BLOCK_ROWS] // n_running))
    if n_running <= FEW_LANES:
        n_ticks = min(n_ticks, kept if can_follow(numbers, queue, flags) else shortest)
    return n_ticks


@loop
def hand_over_lanes(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, n_ticks, queue, n_steps, flags, sentence_of, left, ticks_of, end_of, following
):
    """Decide which waiting sentences take a lane in the tick after its last one ends.

    A lane whose sentence's state is returned keeps it to the round's end; one that is left out has no ticks.

    Args:
        numbers: see the module.
        n_ticks: of the round.
        queue: (S,) ring of waiting sentences.
        n_steps: (S,) of each.
        flags: (S,) of each.
        sentence_of: (R,) the sentence in each lane.
        left: (R,) its steps left.
        ticks_of: (R,) gets the ticks after which each lane is free.
        end_of: (R,) gets the last sentence of each lane.
        following: (S,) gets the sentence that follows each in its lane, or NONE.
    """
    for lane in range(numbers[N_LANES]):
        sentence = sentence_of[lane]
        end_of[lane], ticks_of[lane] = sentence, 0
        if sentence != NONE and not left_out(numbers, flags, sentence):
            ticks_of[lane], following[sentence] = left[lane], NONE
    for tick in range(1, n_ticks):
        for lane in range(numbers[N_LANES]):
            if ticks_of[lane] == tick and can_follow(numbers, queue, flags):
                ended = end_of[lane]
                if flags[ended] & RETURNED:
                    continue
                sentence = take_waiting(numbers, queue)
                following[ended], following[sentence], end_of[lane] = sentence, NONE, sentence
                ticks_of[lane] = tick + n_steps[sentence]


@loop
def sort_lanes(numbers, n_ticks, ticks_of, sizes, begins, slots):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Order the lanes that run by their ticks, the most first, so that the first ones run at each tick.

    Args:
        numbers: gets N_ROWS, N_TICKS and N_STEPS.
        n_ticks: of the round at most.
        ticks_of: (R,) for how many each lane runs; more than the round has count as all.
        sizes: (K + 1,) gets the rows at each tick.
        begins: (K + 1,) gets each tick's first step.
        slots: (R,) gets the lane of each row.
    """
    for tick in range(n_ticks + 1):
        sizes[tick] = 0
    for lane in range(numbers[N_LANES]):
        sizes[min(ticks_of[lane], n_ticks)] += 1
    n_rows = 0
    for tick in range(n_ticks, -1, -1):  # where the rows begin that run for so many ticks
        n_lanes = sizes[tick]
        begins[tick] = n_rows
        n_rows += n_lanes
    n_rows = begins[0]
    for lane in range(numbers[N_LANES]):
        ticks = min(ticks_of[lane], n_ticks)
        if ticks > 0:
            slots[begins[ticks]] = lane
            begins[ticks] += 1
    running, step, n_done = n_rows, 0, 0
    for tick in range(n_ticks):
        running -= sizes[tick] if tick else 0
        sizes[tick], begins[tick] = running, step
        step += running
        n_done += 1 if running else 0
    numbers[N_ROWS], numbers[N_TICKS], numbers[N_STEPS] = n_rows, n_done, step


@loop
def plan(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, queue, first, last, n_steps, flags, lane_of, following, sentence_of, forward, backward, left,
    ticks_of, end_of, after, before, entry_of, sizes, begins, slots, last_step, places, entries, fresh, ended, brought,
):  # fmt: skip
    """Plan a round and note it as done.

    Args:
        numbers: gets N_ROWS, N_TICKS, N_STEPS, N_ENDED and N_BROUGHT; loses LEAVE_OUT.
        queue: (S,) ring of waiting sentences.
        first: (S,) of each sentence.
        last: (S,) of each sentence.
        n_steps: (S,) of each sentence.
        flags: (S,) of each sentence.
        lane_of: (S,) of each sentence.
        following: (S,) scratch.
        sentence_of: (R,) in each lane, or NONE.
        forward: (R,) the next place of the forward direction.
        backward: (R,) the next place of the backward direction.
        left: (R,) steps left of the lane's sentence.
        ticks_of: (R,) scratch.
        end_of: (R,) scratch.
        after: (A,) see `enter`.
        before: (A,) see `enter`.
        entry_of: (A,) see `enter`.
        sizes: (K + 1,) gets the rows at each tick.
        begins: (K + 1,) gets each tick's first step.
        slots: (R,) gets the lane of each row.
        last_step: (R,) gets each row's last step.
        places: (2·N,) gets the place of each step's output, forward from 0 and backward from N.
        entries: (2·N,) gets the entry that each step reads, laid out as the places.
        fresh: (N,) gets whether a step begins a sentence from the zero state.
        ended: (2·S,) gets the sentences that end in the round from 0, and each one's lane from S.
        brought: (2·S,) gets the sentences that begin with a state that they bring from 0, and each one's lane from S.
    """
    fill_lanes(numbers, queue, first, last, n_steps, flags, lane_of, sentence_of, forward, backward, left, brought)
    n_running, shortest, kept = running_lanes(numbers, flags, sentence_of, left)
    numbers[N_ROWS], numbers[N_TICKS], numbers[N_STEPS], numbers[N_ENDED] = 0, 0, 0, 0
    if n_running == 0:
        return
    n_ticks = ticks_of_round(numbers, queue, flags, n_running, shortest, kept)
    hand_over_lanes(numbers, n_ticks, queue, n_steps, flags, sentence_of, left, ticks_of, end_of, following)
    sort_lanes(numbers, n_ticks, ticks_of, sizes, begins, slots)
    n_ended, half = 0, numbers[MAX_STEPS]
    for row in range(numbers[N_ROWS]):
        lane = slots[row]
        sentence, there, back, n_left = sentence_of[lane], forward[lane], backward[lane], left[lane]
        begins_here = n_left == n_steps[sentence] and not flags[sentence] & BROUGHT
        step = 0
        for tick in range(min(ticks_of[lane], n_ticks)):
            step = begins[tick] + row
            places[step], places[half + step] = there, back
            entries[step], entries[half + step] = entry_of[there], entry_of[back]
            fresh[step], begins_here = begins_here, False
            there, back, n_left = after[there], before[back], n_left - 1
            if n_left == 0:
                ended[n_ended], ended[numbers[N_SENTENCES] + n_ended] = sentence, lane
                n_ended += 1
                lane_of[sentence] = ENDED
                sentence = following[sentence]
                if sentence != NONE:
                    lane_of[sentence] = lane
                    there, back, n_left, begins_here = first[sentence], last[sentence], n_steps[sentence], True
        last_step[row] = step
        sentence_of[lane], forward[lane], backward[lane], left[lane] = sentence, there, back, n_left
    numbers[N_ENDED] = n_ended


# ---- the cache of input projections ---------------------------------------------------------------------------------

(
    N_CACHE_PLACES,
    FREE_CACHE_PLACE,
    N_CACHE_TOUCHED,
    CACHE_OLDEST,
    CACHE_NEWEST,
    CACHE_ROUND,
    N_CACHE_GIVEN,
    N_CACHE_MISSING,
) = range(8)


@loop
def take_cache_places(  # type: ignore[no-untyped-def] # noqa: PLR0917
    numbers, given, place_after, entry_at, older, newer, used, missing, taken
):
    """Find the places of N_CACHE_GIVEN entries, which may repeat; give places to those that have none.

    Args:
        numbers: gets N_CACHE_MISSING.
        given: the entries.
        place_after: (E,) one more than an entry's place; 0: it has none.
        entry_at: the entry at each place.
        older: of places, from the least to the most recently used.
        newer: of places; of a free one the next free one.
        used: the round in which each place was used last.
        missing: gets the entries that are to be computed.
        taken: gets their places.
    """
    numbers[CACHE_ROUND] += 1
    n_missing, pending = 0, -1
    for number in range(numbers[N_CACHE_GIVEN]):
        entry = given[number]
        place = place_after[entry] - 1
        if place >= 0:
            if used[place] != numbers[CACHE_ROUND]:
                used[place] = numbers[CACHE_ROUND]
                unlink(numbers, CACHE_OLDEST, CACHE_NEWEST, older, newer, place)
                link_newest(numbers, CACHE_OLDEST, CACHE_NEWEST, older, newer, place)
        elif place_after[entry] != pending:
            place_after[entry] = pending
            missing[n_missing] = entry
            n_missing += 1
    for number in range(n_missing):
        place = numbers[FREE_CACHE_PLACE]
        if place != NONE:
            numbers[FREE_CACHE_PLACE] = newer[place]
        elif numbers[N_CACHE_TOUCHED] < numbers[N_CACHE_PLACES]:
            place = numbers[N_CACHE_TOUCHED]
            numbers[N_CACHE_TOUCHED] += 1
        else:
            place = numbers[CACHE_OLDEST]
            unlink(numbers, CACHE_OLDEST, CACHE_NEWEST, older, newer, place)
            place_after[entry_at[place]] = 0
        link_newest(numbers, CACHE_OLDEST, CACHE_NEWEST, older, newer, place)
        entry_at[place], place_after[missing[number]] = missing[number], place + 1
        used[place], taken[number] = numbers[CACHE_ROUND], place
    numbers[N_CACHE_MISSING] = n_missing


@loop
def forget_cache_places(numbers, given, place_after, older, newer):  # type: ignore[no-untyped-def]
    """Give up the places of N_CACHE_GIVEN entries, which may repeat."""
    for number in range(numbers[N_CACHE_GIVEN]):
        place = place_after[given[number]] - 1
        place_after[given[number]] = 0
        if place >= 0:
            unlink(numbers, CACHE_OLDEST, CACHE_NEWEST, older, newer, place)
            newer[place] = numbers[FREE_CACHE_PLACE]
            numbers[FREE_CACHE_PLACE] = place
