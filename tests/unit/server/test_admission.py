from contextlib import suppress

import pytest
from bilm_api.constants import Priority, Reason
from bilm_server.embedding.admission import NOTHING, Admission, Cost, Reservation
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata
from hypothesis import given
from hypothesis import strategies as st


def test_room_comes_back() -> None:
    admission = Admission(10, 100)
    first = admission.reserve(Cost(6, 10), lambda: 250)
    for cost in (Cost(5, 1), Cost(1, 91)):
        with pytest.raises(RefusalError) as refusal:
            admission.reserve(cost, lambda: 250)
        assert refusal.value.reason == Reason.OVERLOADED
        assert ("grpc-retry-pushback-ms", "250") in trailing_metadata(refusal.value)
    second = admission.reserve(Cost(4, 90), lambda: 250)
    assert admission.used == Cost(10, 100)
    admission.resize(first, Cost(0, 10))  # computed …
    admission.resize(second, Cost(0, 90))
    with admission.reserve(Cost(10, 0), lambda: 250):
        assert admission.used == Cost(10, 100)
    first.release()  # … and sent
    second.release()
    assert admission.used == NOTHING


def test_a_reservation_gives_itself_back_once() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(4, 10), lambda: 250)
    with suppress(ZeroDivisionError), room:
        assert admission.used == room.cost == Cost(4, 10)
        raise ZeroDivisionError
    assert room.released
    room.release()
    assert admission.used == room.cost == NOTHING


def test_a_reservation_follows_the_cost() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(4, 0), lambda: 250)
    with pytest.raises(RefusalError) as refusal:
        admission.reserve(Cost(7, 0), lambda: 250)
    assert refusal.value.retry_after_ms == 250
    admission.resize(room, Cost(9, 60), lambda: 250)  # more than was thought
    assert admission.used == Cost(9, 60)
    admission.resize(room, Cost(2, 60), lambda: 250)  # less
    assert admission.used == Cost(2, 60)
    admission.resize(room, Cost(0, 60))
    other = admission.reserve(Cost(10, 40), lambda: 250)
    room.release()
    assert admission.used == other.cost == Cost(10, 40)


def test_a_reservation_that_cannot_grow_is_refused_for_now_and_stays_as_it_was() -> None:
    admission = Admission(10, 100)
    admission.reserve(Cost(6, 0), lambda: 250)
    room = admission.reserve(Cost(3, 0), lambda: 250)
    for cost in (Cost(5, 0), Cost(1, 101)):
        with pytest.raises(RefusalError) as refusal:
            admission.resize(room, cost, lambda: 300)
        assert (refusal.value.reason, refusal.value.retry_after_ms) == (Reason.OVERLOADED, 300)
        assert admission.used == Cost(9, 0)
    admission.resize(room, Cost(4, 100), lambda: 250)
    assert admission.used == Cost(10, 100)


def test_what_has_been_released_takes_nothing_again() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(3, 0), lambda: 250)
    room.release()
    admission.resize(room, Cost(5, 5), lambda: 250)
    assert admission.used == NOTHING


def refused(admission: Admission, cost: Cost, priority: Priority) -> bool:
    with suppress(RefusalError):
        admission.reserve(cost, lambda: 250, priority).release()
        return False
    return True


@pytest.mark.parametrize("more", [Cost(1, 0), Cost(0, 1)])
def test_batch_calls_hold_three_quarters_and_the_rest_is_for_interactive_ones(more: Cost) -> None:
    admission = Admission(100, 1000)
    first = admission.reserve(Cost(70, 700), lambda: 250, Priority.BATCH)
    admission.resize(first, Cost(75, 750), lambda: 250)
    assert admission.batch_tokens == 75
    assert refused(admission, more, Priority.BATCH)
    with pytest.raises(RefusalError), admission.reserve(Cost(0, 0), lambda: 250, Priority.BATCH) as second:
        admission.resize(second, more, lambda: 250)
    assert not refused(admission, Cost(25, 250), Priority.INTERACTIVE)
    admission.resize(first, Cost(0, 750))  # it was computed
    assert refused(admission, Cost(0, 1), Priority.BATCH)
    first.release()
    assert admission.batch_tokens == 0
    assert admission.used == NOTHING


def test_a_batch_call_that_is_larger_comes_in_as_the_only_one() -> None:
    admission = Admission(100, 1000)
    with admission.reserve(Cost(1, 1), lambda: 250, Priority.BATCH):
        assert refused(admission, Cost(90, 0), Priority.BATCH)
    with (
        admission.reserve(Cost(5, 0), lambda: 250),
        admission.reserve(Cost(90, 0), lambda: 250, Priority.BATCH) as room,
    ):
        admission.resize(room, Cost(95, 1000), lambda: 250)  # alone it may grow, too
        assert refused(admission, Cost(0, 1), Priority.BATCH)


@given(st.randoms(use_true_random=False))
def test_batch_never_holds_more_and_everything_comes_back(chance: object) -> None:
    admission, rooms = Admission(100, 1000), list[Reservation]()
    for _ in range(50):
        cost = Cost(chance.randrange(40), chance.randrange(400))  # type: ignore[attr-defined]
        priority = chance.choice(list(Priority))  # type: ignore[attr-defined]
        with suppress(RefusalError):
            if rooms and chance.random() < 0.3:  # type: ignore[attr-defined]
                admission.resize(chance.choice(rooms), cost, lambda: 250)  # type: ignore[attr-defined]
            else:
                rooms.append(admission.reserve(cost, lambda: 250, priority))
        if rooms and chance.random() < 0.4:  # type: ignore[attr-defined]
            rooms.pop(chance.randrange(len(rooms))).release()  # type: ignore[attr-defined]
        batch = sum((room.cost for room in rooms if room.priority is Priority.BATCH), NOTHING)
        assert admission.capacity.for_batch().fits(batch)
        assert admission.used == sum((room.cost for room in rooms), NOTHING)
        assert admission.batch_tokens == batch.tokens
