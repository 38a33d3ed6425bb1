"""Limits of single callers, on a clock that the test moves."""

import asyncio
from collections.abc import Callable

import pytest
from bilm_api.constants import Reason
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.errors import RefusalError
from bilm_server.protocols.grpc.status import trailing_metadata


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self._sleepers.append((self.now_s + seconds, event := asyncio.Event()))
        await event.wait()

    async def move(self, seconds: float) -> None:
        """Past every sleep that ends until then, one after another."""
        end_s = self.now_s + seconds
        await _settle()
        while due := [sleeper for sleeper in self._sleepers if sleeper[0] <= end_s]:
            first = min(due, key=lambda sleeper: sleeper[0])
            self._sleepers.remove(first)
            self.now_s = first[0]
            first[1].set()
            await _settle()
        self.now_s = end_s


async def _settle() -> None:
    for _ in range(10):  # tasks that wake each other up
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> CallerLimits:
    """100 tokens/s, two calls at a time, requests of up to 500 tokens: so a bucket of 1,000."""
    return CallerLimits(100, 2, 500, clock=clock, sleep=clock.sleep, max_callers=3)


def refused(function: Callable[[], object]) -> int:
    """The pushback of a refusal."""
    with pytest.raises(RefusalError) as error:
        function()
    assert error.value.reason is Reason.CALLER_LIMIT
    assert ("grpc-retry-pushback-ms", str(error.value.retry_after_ms)) in trailing_metadata(error.value)
    return error.value.retry_after_ms


def enter(limits: CallerLimits, caller: str) -> None:
    with limits.call(caller):
        pass


def charged(limits: CallerLimits, caller: str, tokens: int) -> bool:
    try:
        limits.charge(caller, tokens)
    except RefusalError:
        return False
    return True


def test_the_bucket_holds_two_of_the_largest_requests_and_fills_at_the_rate(limits: CallerLimits, clock: Clock) -> None:
    limits.charge("a", 500)
    limits.charge("a", 500)
    assert refused(lambda: limits.charge("a", 250)) == 2501
    clock.now_s += 1.5
    assert refused(lambda: limits.charge("a", 250)) == 1001
    assert refused(lambda: limits.charge("a", 151)) == 20  # never less: a client hangs on 0
    limits.charge("a", 150)
    clock.now_s += 3600
    assert [charged(limits, "a", 500) for _ in range(3)] == [True, True, False]  # it holds no more for that


def test_when_the_pushback_is_over_there_is_room(limits: CallerLimits, clock: Clock) -> None:
    limits.charge("a", 500)
    limits.charge("a", 433)
    clock.now_s += refused(lambda: limits.charge("a", 481)) / 1000
    limits.charge("a", 481)


def test_a_refused_request_costs_nothing_and_other_callers_nothing_at_all(limits: CallerLimits) -> None:
    limits.charge("a", 500)
    limits.charge("a", 400)
    refused(lambda: limits.charge("a", 101))
    limits.charge("a", 100)
    limits.charge("b", 500)


def test_a_second_of_a_high_rate_is_in_the_bucket(clock: Clock) -> None:
    limits = CallerLimits(10_000, 0, 500, clock=clock)
    assert sum(charged(limits, "a", 500) for _ in range(30)) == 20


def test_over_a_long_time_the_rate_holds(limits: CallerLimits, clock: Clock) -> None:
    taken = 0
    for step in range(6000):
        clock.now_s += 0.05
        n_tokens = 1 + step * 7919 % 500
        taken += n_tokens if charged(limits, "a", n_tokens) else 0
    assert 100 * 300 <= taken <= 100 * 300 + 1000


async def test_a_stream_waits_where_a_call_is_refused(limits: CallerLimits, clock: Clock) -> None:
    sent: list[float] = []

    async def stream() -> None:
        for _ in range(20):
            await limits.acquire("a", 100)
            sent.append(clock.now_s - 1000)

    task = asyncio.create_task(stream())
    await clock.move(60)
    await task
    # at once down to half of the bucket and one item beyond, then at the rate
    assert sent == pytest.approx([0] * 6 + [float(second) for second in range(1, 15)], abs=0.01)


async def test_a_stream_leaves_room_for_other_calls_of_its_caller(limits: CallerLimits, clock: Clock) -> None:
    async def stream() -> None:
        while True:
            await limits.acquire("a", 30)

    task = asyncio.create_task(stream())
    await clock.move(100)
    limits.charge("a", 450)  # the stream alone leaves so much
    await clock.move(100)
    limits.charge("a", 450)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_item_of_any_size_gets_its_turn_and_is_paid_for(limits: CallerLimits, clock: Clock) -> None:
    await limits.acquire("a", 5000)
    assert refused(lambda: limits.charge("a", 1)) == 40_011
    following = asyncio.create_task(limits.acquire("a", 1))
    await clock.move(44.9)
    assert not following.done()
    await clock.move(0.2)
    assert following.done()


async def test_items_of_one_caller_get_their_turns_in_order_and_who_gives_up_holds_up_nobody(
    limits: CallerLimits, clock: Clock
) -> None:
    await limits.acquire("a", 1000)
    order: list[str] = []

    async def item(name: str) -> None:
        await limits.acquire("a", 10)
        order.append(name)

    first, second, third = (asyncio.create_task(item(name)) for name in ("first", "second", "third"))
    await clock.move(1)
    first.cancel()
    await clock.move(3.9)
    assert order == []
    await clock.move(1)
    assert order == ["second", "third"]
    assert first.cancelled()
    await asyncio.gather(second, third)


def test_calls_at_a_time(limits: CallerLimits, clock: Clock) -> None:
    with limits.call("a"), limits.call("a"):
        assert refused(lambda: enter(limits, "a")) == 20  # nothing is known yet
        enter(limits, "b")
        clock.now_s += 4
    with limits.call("a"), limits.call("a"):
        # calls took 4 s lately: 1.44 s in the mean that forgets, two are under way
        assert refused(lambda: enter(limits, "a")) == pytest.approx(720, abs=1)
    with limits.call("a"):
        clock.now_s += 36_000
    with limits.call("a"), limits.call("a"):
        assert refused(lambda: enter(limits, "a")) == 10_000


def test_a_call_that_fails_makes_room(limits: CallerLimits) -> None:
    for _ in range(5):
        with pytest.raises(KeyError), limits.call("a"):
            raise KeyError
    with limits.call("a"), limits.call("a"):
        pass


async def test_without_limits_nothing_is_kept(clock: Clock) -> None:
    limits = CallerLimits(0, 0, 500, clock=clock)
    with limits.call("a"):
        limits.charge("a", 10**9)
        await limits.acquire("a", 10**9)
    assert len(limits) == 0


def test_callers_without_calls_are_forgotten_the_least_recently_used_first(limits: CallerLimits) -> None:
    with limits.call("busy"):
        limits.charge("old", 500)
        limits.charge("old", 500)
        limits.charge("recent", 500)
        limits.charge("recent", 500)
        for number in range(100):
            limits.charge(f"other-{number}", 1)
            assert not charged(limits, "recent", 500)  # remembered, as it is used
            assert len(limits) == 3
        with limits.call("busy"):
            refused(lambda: enter(limits, "busy"))
    assert charged(limits, "old", 500)


async def test_more_callers_than_that_are_remembered_while_they_have_calls(limits: CallerLimits, clock: Clock) -> None:
    async def stream(caller: str) -> None:
        await limits.acquire(caller, 1000)
        await limits.acquire(caller, 1)

    waiting = [asyncio.create_task(stream(f"waits-{number}")) for number in range(10)]
    await clock.move(1)
    assert len(limits) == 10
    limits.charge("new", 500)
    limits.charge("new", 500)
    assert not charged(limits, "new", 1)  # remembered, although nobody else can be forgotten
    await clock.move(10)
    assert all(task.done() for task in waiting)
    for number in range(10):
        limits.charge(f"new-{number}", 1)
    assert len(limits) == 3


def test_what_has_been_charged_can_be_corrected_both_ways(clock: Clock, limits: CallerLimits) -> None:
    limits.charge("a", 500)
    limits.correct("a", -400)  # it was less than was thought: 900 left
    limits.charge("a", 500)
    limits.charge("a", 400)
    assert refused(lambda: limits.charge("a", 100)) >= 1000
    clock.now_s += 1
    limits.charge("a", 100)
    limits.correct("a", 200)  # it was more: 200 below zero
    assert refused(lambda: limits.charge("a", 1)) > 2000


def test_a_correction_never_fills_the_bucket_beyond_its_size(limits: CallerLimits) -> None:
    limits.correct("a", -10_000)
    limits.charge("a", 500)
    limits.charge("a", 500)
    refused(lambda: limits.charge("a", 10))
