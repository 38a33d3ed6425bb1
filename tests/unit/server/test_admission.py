from contextlib import suppress

import pytest
from bilm_api.constants import Reason
from bilm_server.embedding.admission import NOTHING, Admission, Cost
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata


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
