import pytest
from bilm_api.constants import Reason
from bilm_server.admission import Admission, Cost
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata


def test_room_comes_back() -> None:
    admission = Admission(10, 100)
    admission.take(Cost(6, 10), 250)
    for cost in (Cost(5, 1), Cost(1, 91)):
        with pytest.raises(RefusalError) as refusal:
            admission.take(cost, 250)
        assert refusal.value.reason == Reason.OVERLOADED
        assert ("grpc-retry-pushback-ms", "250") in trailing_metadata(refusal.value)
    admission.take(Cost(4, 90), 250)
    assert admission.used == Cost(10, 100)
    admission.release(Cost(10, 0))  # computed …
    admission.take(Cost(10, 0), 250)
    admission.release(Cost(10, 100))  # … and sent
    assert admission.used == Cost(0, 0)


def test_a_reservation_follows_the_cost_and_ends_once() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(4, 0), 250)
    with pytest.raises(RefusalError) as refusal:
        admission.reserve(Cost(7, 0), 250)
    assert refusal.value.retry_after_ms == 250
    room.resize(Cost(9, 60), 250)  # more than was thought
    assert admission.used == Cost(9, 60)
    room.resize(Cost(2, 60), 250)  # less
    assert admission.used == Cost(2, 60)
    room.shrink(Cost(0, 60))
    admission.take(Cost(10, 40), 250)
    room.release()
    room.release()
    assert admission.used == Cost(10, 40)


def test_a_reservation_that_cannot_grow_is_refused_for_now_and_stays_as_it_was() -> None:
    admission = Admission(10, 100)
    admission.take(Cost(6, 0), 250)
    room = admission.reserve(Cost(3, 0), 250)
    for cost in (Cost(5, 0), Cost(1, 101)):
        with pytest.raises(RefusalError) as refusal:
            room.resize(cost, 300)
        assert (refusal.value.reason, refusal.value.retry_after_ms) == (Reason.OVERLOADED, 300)
        assert admission.used == Cost(9, 0)
    room.resize(Cost(4, 100), 250)
    assert admission.used == Cost(10, 100)


def test_what_has_been_released_takes_nothing_again() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(3, 0), 250)
    room.release()
    room.resize(Cost(5, 5), 250)
    assert admission.used == Cost(0, 0)
