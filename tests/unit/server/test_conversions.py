import asyncio
import threading

import pytest
from bilm_api.constants import Priority, Reason
from bilm_server.embedding.conversions import INLINE_BYTES, INLINE_RESPONSE_BYTES, Conversions, request_weight
from bilm_server.errors import RefusalError

LARGE = INLINE_BYTES + 1
LARGEST = 4 * 2**20


class Slow:
    """Conversions that wait until they may go on, and a count of those that began and of those at a time."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.begun = 0
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
        self.go_on.wait()
        with self._lock:
            self.running -= 1
        return "converted"


@pytest.fixture
def slow() -> Slow:
    return Slow()


async def settled(conversions: Conversions, slow: Slow, *tasks: "asyncio.Task[str]") -> list[str | BaseException]:
    slow.go_on.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert conversions.waiting_bytes == 0
    conversions.stop()
    return found


async def begun(slow: Slow, n: int) -> None:
    async with asyncio.timeout(10):
        while slow.begun < n:  # noqa: ASYNC110 - told by another thread
            await asyncio.sleep(0.001)


async def test_a_request_is_refused_when_too_many_bytes_wait(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=3 * LARGE)
    tasks = [asyncio.create_task(conversions.request(LARGE, slow)) for _ in range(3)]
    await begun(slow, 2)
    with pytest.raises(RefusalError) as refusal:
        await conversions.request(LARGE, slow)
    assert refusal.value.reason is Reason.OVERLOADED
    assert 20 <= refusal.value.retry_after_ms <= 10_000
    assert await settled(conversions, slow, *tasks) == ["converted"] * 3


async def test_small_requests_do_not_keep_a_large_one_out(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=2 * LARGE)
    tasks = [asyncio.create_task(conversions.request(n_bytes, slow)) for n_bytes in (LARGE, LARGEST)]
    await begun(slow, 2)
    assert await settled(conversions, slow, *tasks) == ["converted"] * 2


async def test_a_request_of_any_size_is_converted_when_nothing_waits(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=1)
    task = asyncio.create_task(conversions.request(LARGEST, slow))
    await begun(slow, 1)
    with pytest.raises(RefusalError):
        await conversions.request(LARGE, slow)
    assert await settled(conversions, slow, task) == ["converted"]


async def test_what_is_small_is_converted_at_once_however_much_waits(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=1)
    task = asyncio.create_task(conversions.request(LARGE, slow))
    await begun(slow, 1)
    assert await conversions.request(INLINE_BYTES, lambda: "at once") == "at once"
    assert await conversions.item(INLINE_BYTES, lambda: "at once") == "at once"
    assert await conversions.response(INLINE_RESPONSE_BYTES, lambda: "at once") == "at once"
    await settled(conversions, slow, task)


async def test_a_response_is_never_refused_and_counts(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=2**20)
    tasks = [asyncio.create_task(conversions.response(16 * 2**20, slow)) for _ in range(10)]
    await begun(slow, 2)
    assert conversions.waiting_bytes > 2**20
    with pytest.raises(RefusalError):
        await conversions.request(LARGE, slow)
    assert await settled(conversions, slow, *tasks) == ["converted"] * 10


async def test_items_of_streams_wait_for_their_turn_and_take_nothing_from_requests(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=1)
    tasks = [asyncio.create_task(conversions.item(LARGEST, slow)) for _ in range(20)]
    await begun(slow, 2)
    assert conversions.waiting_bytes == 0
    tasks.append(asyncio.create_task(conversions.request(LARGE, slow)))
    await asyncio.sleep(0)
    assert conversions.waiting_bytes > 0  # it was let in, behind two items at most
    assert await settled(conversions, slow, *tasks) == ["converted"] * 21
    assert slow.most == 2


@pytest.mark.parametrize("kind", ["request", "item"])
async def test_what_waits_for_a_caller_that_has_gone_is_dropped(slow: Slow, kind: str) -> None:
    conversions = Conversions()
    convert = getattr(conversions, kind)
    running = [asyncio.create_task(convert(LARGE, slow)) for _ in range(2)]
    await begun(slow, 2)
    gone, stays = (asyncio.create_task(convert(LARGE, slow)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    found = await settled(conversions, slow, *running, gone, stays)
    assert isinstance(found[2], asyncio.CancelledError)
    assert slow.begun == 3


async def test_a_conversion_that_fails_counts_no_longer() -> None:
    conversions = Conversions()
    with pytest.raises(ZeroDivisionError):
        await conversions.request(LARGE, lambda: 1 // 0)
    assert conversions.waiting_bytes == 0
    conversions.stop()


def test_text_weighs_more_than_tokens() -> None:
    kib = 1024
    assert request_weight(kib, kib) == INLINE_BYTES < request_weight(kib + 1, kib + 1)
    assert request_weight(32 * kib, 0) == INLINE_BYTES < request_weight(33 * kib, 0)
    assert request_weight(33 * kib, 1) == request_weight(33 * kib, 0)  # a word of text among many tokens


async def test_batch_takes_one_thread_so_that_interactive_work_never_waits_behind_its_queue(slow: Slow) -> None:
    conversions = Conversions()
    batch = [asyncio.create_task(conversions.request(LARGE, slow, Priority.BATCH)) for _ in range(3)]
    batch += [asyncio.create_task(conversions.item(LARGE, slow, Priority.BATCH)) for _ in range(3)]
    batch += [asyncio.create_task(conversions.response(2**20, slow, Priority.BATCH)) for _ in range(3)]
    await begun(slow, 1)
    interactive = asyncio.create_task(conversions.request(LARGE, slow))
    await begun(slow, 2)  # in the other thread, at once
    assert slow.most == 2
    assert await settled(conversions, slow, *batch, interactive) == ["converted"] * 10


async def test_batch_requests_are_refused_at_three_quarters_and_interactive_ones_are_not(slow: Slow) -> None:
    conversions = Conversions(max_waiting_bytes=4 * LARGE)
    tasks = [asyncio.create_task(conversions.request(LARGE, slow, Priority.BATCH)) for _ in range(3)]
    await begun(slow, 1)
    with pytest.raises(RefusalError) as refusal:
        await conversions.request(LARGE, slow, Priority.BATCH)
    assert refusal.value.reason is Reason.OVERLOADED
    tasks.append(asyncio.create_task(conversions.request(LARGE, slow)))
    assert await settled(conversions, slow, *tasks) == ["converted"] * 4
    assert await conversions.request(1, lambda: "at once", Priority.BATCH) == "at once"
