import asyncio
import random

import pytest
from bilm_server.admission import Cost
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata
from bilm_server.stream_room import Share, StreamRoom


def tokens(count: int) -> Cost:
    return Cost(count, 0)


async def waiting(share: Share, cost: Cost) -> "asyncio.Task[None]":
    task = asyncio.create_task(share.acquire(cost))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_a_stream_that_holds_something_leaves_half_of_the_room_to_others() -> None:
    room = StreamRoom(100, 1000)
    greedy = room.share()
    for _ in range(5):
        await greedy.acquire(tokens(10))
    further = await waiting(greedy, tokens(10))
    assert not further.done()
    others = [room.share() for _ in range(5)]
    for other in others:
        await other.acquire(tokens(10))
    assert room.used == tokens(100)
    late = await waiting(room.share(), tokens(10))
    assert not late.done()
    greedy.release(tokens(10))
    await late  # who holds nothing goes first
    assert not further.done()
    for _ in range(4):
        greedy.release(tokens(10))
    await further  # it holds nothing now
    assert room.used == tokens(70)


async def test_the_bytes_of_answers_are_shared_likewise() -> None:
    room = StreamRoom(1000, 100)
    greedy, other = room.share(), room.share()
    await greedy.acquire(Cost(1, 50))
    further = await waiting(greedy, Cost(1, 1))
    assert not further.done()
    await other.acquire(Cost(1, 50))
    other.release(Cost(1, 50))
    greedy.release(Cost(1, 50))
    await further
    assert room.used == Cost(1, 1)


async def test_an_item_larger_than_half_goes_in_once_its_stream_holds_nothing() -> None:
    room = StreamRoom(100, 1000)
    share = room.share()
    await share.acquire(tokens(10))
    large = await waiting(share, tokens(100))
    assert not large.done()
    share.release(tokens(10))
    await large
    assert room.used == tokens(100)


async def test_streams_that_hold_nothing_take_turns() -> None:
    room = StreamRoom(10, 100)
    holder = room.share()
    await holder.acquire(tokens(8))
    order: list[str] = []

    async def enter(name: str, count: int) -> None:
        await room.share().acquire(tokens(count))
        order.append(name)

    large = asyncio.create_task(enter("large", 9))
    small = asyncio.create_task(enter("small", 1))
    await asyncio.sleep(0)
    assert order == []  # the small one would fit, but it came later
    holder.release(tokens(8))
    await asyncio.gather(large, small)
    assert order == ["large", "small"]


async def test_an_item_that_gives_up_takes_no_room_and_holds_up_nobody() -> None:
    room = StreamRoom(10, 100)
    await room.share().acquire(tokens(8))
    large = await waiting(room.share(), tokens(9))
    small = await waiting(room.share(), tokens(1))
    large.cancel()
    await small
    assert room.used == tokens(9)
    with pytest.raises(asyncio.CancelledError):
        await large


async def test_an_item_that_gives_up_as_it_is_let_in_gives_its_room_back() -> None:
    room = StreamRoom(10, 100)
    holder = room.share()
    await holder.acquire(tokens(10))
    late = await waiting(room.share(), tokens(5))
    holder.release(tokens(10))
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert room.used == tokens(0)


async def test_what_never_fits_is_refused_for_good() -> None:
    with pytest.raises(RefusalError) as refusal:
        await StreamRoom(10, 100).share().acquire(Cost(1, 101))
    assert ("grpc-retry-pushback-ms", "-1") in trailing_metadata(refusal.value)


@pytest.mark.parametrize("seed", range(20))
async def test_streams_read_in_turns_all_get_on(seed: int) -> None:
    """Each result is held until its stream's turn to be read, and the reader waits for one stream at a time."""
    numbers = random.Random(seed)
    room = StreamRoom(1000, 10_000)
    n_streams, n_items = numbers.randint(2, 10), 20
    results: list[asyncio.Queue[Cost]] = [asyncio.Queue() for _ in range(n_streams)]
    shares = [room.share() for _ in range(n_streams)]

    async def compute(share: Share, queue: "asyncio.Queue[Cost]") -> None:
        for _ in range(n_items):
            cost = Cost(numbers.randint(1, 100), numbers.randint(1, 1000))
            await share.acquire(cost)
            queue.put_nowait(cost)

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        for share, queue in zip(shares, results, strict=True):
            tasks.create_task(compute(share, queue))
        for _ in range(n_items):
            for share, queue in zip(shares, results, strict=True):
                share.release(await queue.get())
    assert room.used == Cost(0, 0)
