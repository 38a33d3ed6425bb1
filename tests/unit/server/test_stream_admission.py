import asyncio
import random

import pytest
from bilm_api.constants import Priority
from bilm_server.embedding.admission import NOTHING, Cost, Reservation, StreamAdmission, StreamShare
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata

MANY = 1000


def tokens(count: int) -> Cost:
    return Cost(count, 0)


def share(priority: Priority = Priority.INTERACTIVE) -> StreamShare:
    return StreamShare(MANY, priority)


async def waiting(room: StreamAdmission, share: StreamShare, cost: Cost) -> "asyncio.Task[Reservation]":
    task = asyncio.create_task(room.reserve(share, cost))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_a_stream_that_holds_something_leaves_half_of_the_room_to_others() -> None:
    room, greedy = StreamAdmission(100, 1000), share()
    held = [await room.reserve(greedy, tokens(10)) for _ in range(5)]
    further = await waiting(room, greedy, tokens(10))
    assert not further.done()
    others = [await room.reserve(share(), tokens(10)) for _ in range(5)]
    assert room.used == tokens(100)
    late = await waiting(room, share(), tokens(10))
    assert not late.done()
    assert room.waiting == 2
    held.pop().release()
    await late  # what holds nothing goes first
    assert not further.done()
    for each in held:
        each.release()
    await further  # it holds nothing now
    assert room.used == tokens(70)
    assert len(others) == 5


async def test_the_bytes_of_responses_are_shared_in_the_same_way() -> None:
    room, greedy = StreamAdmission(1000, 100), share()
    held = await room.reserve(greedy, Cost(1, 50))
    further = await waiting(room, greedy, Cost(1, 1))
    assert not further.done()
    with await room.reserve(share(), Cost(1, 50)):
        assert room.used == Cost(2, 100)
    held.release()
    await further
    assert room.used == Cost(1, 1)


async def test_an_item_larger_than_half_goes_in_once_its_stream_holds_nothing() -> None:
    room, own = StreamAdmission(100, 1000), share()
    small = await room.reserve(own, tokens(10))
    large = await waiting(room, own, tokens(100))
    assert not large.done()
    small.release()
    await large
    assert room.used == tokens(100)


async def test_streams_that_hold_nothing_take_turns() -> None:
    room = StreamAdmission(10, 100)
    holder = await room.reserve(share(), tokens(8))
    order: list[str] = []

    async def enter(name: str, count: int) -> None:
        await room.reserve(share(), tokens(count))
        order.append(name)

    large = asyncio.create_task(enter("large", 9))
    small = asyncio.create_task(enter("small", 1))
    await asyncio.sleep(0)
    assert order == []  # the small one would fit, but it came later
    holder.release()
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_an_item_that_is_cancelled_takes_no_room_and_holds_up_nobody() -> None:
    room = StreamAdmission(10, 100)
    await room.reserve(share(), tokens(8))
    large = await waiting(room, share(), tokens(9))
    small = await waiting(room, share(), tokens(1))
    large.cancel()
    await small
    assert room.used == tokens(9)
    with pytest.raises(asyncio.CancelledError):
        await large
    assert room.waiting == 0


async def test_an_item_that_is_cancelled_as_it_is_let_in_gives_its_room_back() -> None:
    room = StreamAdmission(10, 100)
    holder = await room.reserve(share(), tokens(10))
    late = await waiting(room, share(), tokens(5))
    holder.release()
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert room.used == NOTHING


async def test_what_never_fits_is_refused_for_good() -> None:
    with pytest.raises(RefusalError) as refusal:
        await StreamAdmission(10, 100).reserve(share(), Cost(1, 101))
    assert ("grpc-retry-pushback-ms", "-1") in trailing_metadata(refusal.value)


async def test_a_stream_has_so_many_items_in_flight_and_no_more() -> None:
    own = StreamShare(2)
    first, _ = await own.place(), await own.place()
    third = asyncio.create_task(own.place())
    await asyncio.sleep(0)
    assert not third.done()
    first.release()
    first.release()
    with await third:
        fourth = asyncio.create_task(own.place())
        await asyncio.sleep(0)
        assert not fourth.done()
    await fourth


@pytest.mark.parametrize("seed", range(20))
async def test_streams_read_in_turns_all_get_on(seed: int) -> None:
    """Each result is held until its stream's turn to be read, and the reader waits for one stream at a time."""
    numbers = random.Random(seed)
    room = StreamAdmission(1000, 10_000)
    n_streams, n_items = numbers.randint(2, 10), 20
    results: list[asyncio.Queue[Reservation]] = [asyncio.Queue() for _ in range(n_streams)]

    async def compute(own: StreamShare, queue: "asyncio.Queue[Reservation]") -> None:
        for _ in range(n_items):
            cost = Cost(numbers.randint(1, 100), numbers.randint(1, 1000))
            queue.put_nowait(await room.reserve(own, cost))

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for queue in results:
            tasks.create_task(compute(share(), queue))
        for _ in range(n_items):
            for queue in results:
                (await queue.get()).release()
    assert room.used == NOTHING


# ---- two priorities ----


async def test_batch_streams_leave_a_quarter_to_interactive_ones() -> None:
    room = StreamAdmission(100, 1000)
    held = [await room.reserve(share(Priority.BATCH), tokens(25)) for _ in range(3)]
    late = await waiting(room, share(Priority.BATCH), tokens(1))
    assert not late.done()
    assert room.batch_tokens == 75
    with await room.reserve(share(), tokens(25)):
        held.pop().release()
        await asyncio.sleep(0)
        assert not late.done()  # all together hold three quarters still
    await late
    assert room.batch_tokens == 51


async def test_a_batch_stream_that_holds_something_leaves_half_of_that_to_others() -> None:
    room, greedy = StreamAdmission(80, 800), share(Priority.BATCH)
    first = await room.reserve(greedy, tokens(30))
    further = await waiting(room, greedy, tokens(1))
    assert not further.done()
    first.release()
    await further


async def test_interactive_streams_go_first_and_none_waits_behind_batch() -> None:
    room, own = StreamAdmission(100, 1000), share()
    held = await room.reserve(own, tokens(60))
    batch = [await waiting(room, share(Priority.BATCH), tokens(20)) for _ in range(2)]
    assert not any(each.done() for each in batch)
    further, first = await waiting(room, own, tokens(50)), await waiting(room, share(), tokens(50))
    assert not any(each.done() for each in (further, first))
    held.release()
    await first
    await further  # its stream holds nothing any more
    assert not any(each.done() for each in batch)
    (await first).release()
    await batch[0]
    assert not batch[1].done()


async def test_a_batch_item_that_is_larger_comes_in_as_the_only_one_of_batch() -> None:
    room = StreamAdmission(100, 1000)
    small, interactive = await room.reserve(share(Priority.BATCH), tokens(1)), await room.reserve(share(), tokens(10))
    large = await waiting(room, share(Priority.BATCH), tokens(90))
    assert not large.done()
    small.release()
    await large
    assert room.used == tokens(100)
    interactive.release()


@pytest.mark.parametrize("seed", range(10))
async def test_streams_of_both_priorities_all_get_on(seed: int) -> None:
    numbers = random.Random(seed)
    room = StreamAdmission(300, 3000)

    async def stream(own: StreamShare) -> None:
        for _ in range(10):
            with await room.reserve(own, Cost(numbers.randint(1, 260), numbers.randint(1, 2600))):
                for _ in range(numbers.randrange(3)):
                    await asyncio.sleep(0)
                assert room.used.tokens <= 300

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for _ in range(10):
            tasks.create_task(stream(share(numbers.choice(list(Priority)))))
    assert room.used == NOTHING
    assert room.batch_tokens == 0
