import asyncio

import pytest
from bilm_server.admission import Admission, Cost
from bilm_server.errors import Reason, RefusalError


def test_room_comes_back() -> None:
    admission = Admission(10, 100)
    admission.take(Cost(6, 10), 250)
    for cost in (Cost(5, 1), Cost(1, 91)):
        with pytest.raises(RefusalError) as refusal:
            admission.take(cost, 250)
        assert refusal.value.reason == Reason.OVERLOADED
        assert ("grpc-retry-pushback-ms", "250") in refusal.value.trailing_metadata()
    admission.take(Cost(4, 90), 250)
    assert admission.used == Cost(10, 100)
    admission.release(Cost(10, 0))  # computed …
    admission.take(Cost(10, 0), 250)
    admission.release(Cost(10, 100))  # … and sent
    assert admission.used == Cost(0, 0)


async def test_waiting_is_first_come_first_served() -> None:
    admission = Admission(10, 100)
    await admission.acquire(Cost(8, 0))
    order: list[str] = []

    async def enter(name: str, tokens: int) -> None:
        await admission.acquire(Cost(tokens, 0))
        order.append(name)

    large = asyncio.create_task(enter("large", 9))
    small = asyncio.create_task(enter("small", 1))
    await asyncio.sleep(0)
    assert order == []  # the small one would fit, but it came later
    with pytest.raises(RefusalError):
        admission.take(Cost(1, 0), 1)  # and nobody else slips in either
    admission.release(Cost(8, 0))
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_who_gives_up_while_waiting_takes_no_room_and_holds_up_nobody() -> None:
    admission = Admission(10, 100)
    await admission.acquire(Cost(8, 0))
    large = asyncio.create_task(admission.acquire(Cost(9, 0)))
    small = asyncio.create_task(admission.acquire(Cost(1, 0)))
    await asyncio.sleep(0)
    large.cancel()
    await small
    assert admission.used == Cost(9, 0)
    with pytest.raises(asyncio.CancelledError):
        await large


async def test_who_gives_up_at_the_moment_of_being_let_in_gives_the_room_back() -> None:
    admission = Admission(10, 100)
    await admission.acquire(Cost(10, 0))
    waiting = asyncio.create_task(admission.acquire(Cost(5, 0)))
    await asyncio.sleep(0)
    admission.release(Cost(10, 0))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert admission.used == Cost(0, 0)


async def test_what_never_fits_is_refused_for_good() -> None:
    with pytest.raises(RefusalError) as refusal:
        await Admission(10, 100).acquire(Cost(1, 101))
    assert ("grpc-retry-pushback-ms", "-1") in refusal.value.trailing_metadata()


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


async def test_a_reservation_that_shrinks_lets_others_in() -> None:
    admission = Admission(10, 100)
    room = admission.reserve(Cost(10, 0), 250)
    waiting = asyncio.create_task(admission.acquire(Cost(5, 0)))
    await asyncio.sleep(0)
    room.shrink(Cost(5, 0))
    await waiting
    assert admission.used == Cost(10, 0)
