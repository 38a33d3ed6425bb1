"""Every sentence ends exactly once, in a result, a refusal or a cancellation, and leaves nothing behind."""

import gc
import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity, EngineResult
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Result, RoundReport, Sentence

from tests.support.fake_engine import DEVICE_ASSERT, FakeEngine, device_error
from tests.support.sentences import DrivenWorker, delivered, reasons, result

ROUNDS = 3


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Freeze what was there before: it can't be garbage of these tests, and looking through torch takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # a record with a traceback keeps the sentence alive


def driven(rows: int = 64, steps: int = 10_000, rounds: int = 0) -> DrivenWorker:
    return DrivenWorker(FakeEngine(Capacity(rows, steps), rounds))


def health(found: DrivenWorker) -> bool:
    return found.worker.healthy


# ---- the engine fails ----


@pytest.mark.parametrize("n_others", [0, 1, 2, 6, 63])
async def test_a_poisoned_sentence_costs_the_others_nothing(n_others: int) -> None:
    found = driven(rounds=ROUNDS)
    others = [found.submit(Call(), chr(65 + number)) for number in range(n_others)]
    poisoned = found.submit(Call(), "poison")
    await found.settle()
    assert reasons([poisoned]) == {Reason.INTERNAL}
    assert [result(future).vectors[0, 0, 0] for future in others] == [65 + number for number in range(n_others)]
    assert health(found)
    assert len(found.engine.groups) < 16 * (ROUNDS + 7)  # halves, not one by one
    fresh = found.submit(Call(), "z")  # the capacity that the suspects had has come back
    await found.settle()
    assert reasons([fresh]) == {None}
    found.check_nothing_is_left()


@pytest.mark.parametrize("code", [46, 214, 220, 700, 702, 709, 710, *range(714, 720)])
async def test_an_error_that_breaks_the_device_is_not_tried_again(code: int) -> None:
    found = driven(rounds=ROUNDS)
    futures = [found.submit(Call(), name) for name in ("a", "b")]
    await found.step()
    found.engine.error = device_error(code)
    await found.step()
    assert found.worker.lost
    assert not health(found)
    assert reasons(futures) == {Reason.MODEL_FAILING}
    await found.step()  # a probe would find an engine that works
    assert not health(found)
    assert found.worker.idle


@pytest.mark.parametrize("where", ["joining", "a check"])
async def test_a_device_can_break_outside_of_a_round(where: str) -> None:
    found = driven(rounds=ROUNDS)
    found.engine.error = device_error(DEVICE_ASSERT)
    futures = [found.submit(Call(), "a")] if where == "joining" else []
    await found.step()
    assert found.worker.lost
    assert not health(found)
    assert reasons(futures) <= {Reason.MODEL_FAILING}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), device_error(2), device_error(999)])
async def test_other_errors_of_a_device_heal(error: Exception) -> None:
    found = driven(rounds=ROUNDS)
    futures = [found.submit(Call(), name) for name in ("a", "b", "c")]
    await found.step()
    found.engine.error = error
    await found.settle()
    assert reasons(futures) == {None}
    assert not found.worker.lost
    assert health(found)
    found.check_nothing_is_left()


async def test_suspects_are_computed_from_their_beginnings() -> None:
    found = driven(rounds=ROUNDS)
    early = found.submit(Call(), "a")
    await found.step(ROUNDS - 1)
    poisoned = found.submit(Call(), "poison")
    await found.step()  # fails
    await found.step(ROUNDS - 1)
    assert not early.done()
    await found.settle()
    assert (reasons([early]), reasons([poisoned])) == ({None}, {Reason.INTERNAL})
    found.check_nothing_is_left()


async def test_two_poisoned_sentences_are_both_found() -> None:
    found = driven(rounds=ROUNDS)
    names = ["a", "poison", "b", "c", "poison", "d"]
    futures = [found.submit(Call(), name) for name in names]
    await found.settle()
    assert [name for name, future in zip(names, futures, strict=True) if reasons([future]) != {None}] == [
        "poison",
        "poison",
    ]
    found.check_nothing_is_left()


async def test_a_cancelled_suspect_is_not_computed_again() -> None:
    found = driven(rounds=ROUNDS)
    poisoned, other = found.submit(Call(), "poison"), found.submit(Call(), "a")
    await found.step()
    assert found.worker.waiting == 2
    poisoned.cancel()
    await found.settle()
    assert reasons([other]) == {None}
    assert found.engine.groups == [2, 1, 1, 1]
    found.check_nothing_is_left()


async def test_a_culprit_that_is_cancelled_in_its_last_round_is_not_taken_for_another() -> None:
    class Cancelling(FakeEngine[Sentence]):
        def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[Sentence]]:
            poison.cancel()
            return super().advance(leave_out=leave_out, max_steps=max_steps)

    found = DrivenWorker(Cancelling())
    poison, good = found.submit(Call(), "poison"), found.submit(Call(), "a")
    await found.settle()
    assert reasons([good]) == {None}
    found.check_nothing_is_left()


async def test_when_the_engine_fails_everything_is_refused_and_later_it_may_recover() -> None:
    found = driven(rounds=ROUNDS)
    futures = [found.submit(Call(), "a") for _ in range(3)]
    found.engine.broken = 2
    await found.step()
    assert reasons(futures) == {Reason.MODEL_FAILING}
    assert not health(found)
    refused = found.submit(Call(), "a")
    assert reasons([refused]) == {Reason.MODEL_FAILING}
    await found.step()
    assert not health(found)
    await found.step()
    assert health(found)
    fresh = found.submit(Call(), "a")
    await found.settle()
    assert reasons([fresh]) == {None}
    found.check_nothing_is_left()


async def test_an_engine_without_work_is_checked() -> None:
    found = driven()
    await found.step(3)
    assert found.engine.checks == 3
    assert health(found)
    found.engine.broken = 1
    await found.step()
    assert not health(found)
    await found.step()
    assert health(found)


async def test_every_round_is_reported() -> None:
    reports: list[RoundReport] = []
    found = DrivenWorker(FakeEngine(rounds=ROUNDS), on_round=reports.append)
    found.submit(Call(), "a")
    await found.settle()
    found.submit(Call(), "poison")
    await found.settle()
    assert [(each.rows, each.steps, each.failed) for each in reports] == [(1, 1, False)] * 3 + [(1, 0, True)]


async def test_what_runs_ahead_of_the_rows_is_not_counted_as_computed() -> None:
    reports: list[RoundReport] = []
    found = DrivenWorker(FakeEngine(Capacity(2, 100), ROUNDS, ahead=1), on_round=reports.append)
    futures = [found.submit(Call(), "abc") for _ in range(5)]
    found.worker.step()
    assert (found.worker.in_flight, found.worker.rows, found.worker.waiting) == (3, 2, 2)
    await found.settle()
    assert reasons(futures) == {None}
    assert {report.rows for report in reports} == {2}
    found.check_nothing_is_left()


async def test_the_speed_is_that_of_the_steps_and_not_of_sentences_that_ended() -> None:
    """Long sentences: none ends for a thousand rounds, each of which advances two of them by 25 steps in 0.5 s."""
    now_s = [0.0]

    class SlowEngine(FakeEngine[Sentence]):
        def advance(self, *, leave_out: bool = False, max_steps: int | None = None) -> list[EngineResult[Sentence]]:
            now_s[0] += 0.5
            found = super().advance(leave_out=leave_out, max_steps=max_steps)
            self.stats.steps += 24 * self.groups[-1]
            return found

    found = DrivenWorker(SlowEngine(rounds=1000), lambda: now_s[0])
    futures = [found.submit(Call(), "a") for _ in range(2)]
    for _ in range(900):
        found.worker.step()
    assert found.worker.steps_per_s == pytest.approx(100, rel=0.05)
    await found.settle()
    assert reasons(futures) == {None}
    assert found.worker.steps_per_s > 0


# ---- sentences that are submitted together ----


async def test_sentences_of_one_call_end_together_in_their_order() -> None:
    found = driven(rows=2, rounds=0)
    future = found.submit_all(Call(), [["a", "b", "c"], ["poison"], ["d"], ["e", "f"]])
    await found.step()
    assert not future.done()
    await found.settle()
    first, second, third, fourth = future.result()
    assert isinstance(second, RefusalError)
    assert second.reason is Reason.INTERNAL
    codes = [each.vectors[0, 0, 0] for each in (first, third, fourth) if isinstance(each, Result)]
    assert codes == [ord("a"), ord("d"), ord("e")]
    found.check_nothing_is_left()


async def test_a_refusal_that_is_not_a_sentences_own_takes_the_others_out_at_once() -> None:
    now_s = [0.0]
    found = DrivenWorker(FakeEngine(Capacity(1, 100)), lambda: now_s[0])
    future = found.submit_all(Call(deadline_s=1.0), [["a", "b", "c"], ["d"], ["e"]])
    stays = found.submit(Call(), "f")
    await found.step()
    now_s[0] = 2.0
    await found.settle()
    assert (reasons([future]), reasons([stays])) == ({Reason.DEADLINE_EXCEEDED}, {None})
    assert found.engine.stats.steps < 3 + 2
    found.check_nothing_is_left()


async def test_of_sentences_one_of_which_never_fits_none_is_computed() -> None:
    found = driven(rows=2, steps=10)
    future = found.submit_all(Call(), [["a"], ["a"] * 9])
    await found.settle()
    assert reasons([future]) == {Reason.SENTENCE_TOO_LONG}
    assert found.engine.groups == []
    found.check_nothing_is_left()


# ---- sentences that can't join or leave ----


@pytest.mark.parametrize("n_others", [0, 3])
async def test_a_sentence_that_cannot_join_is_refused_alone(n_others: int) -> None:
    found = driven(rows=8)
    good = [found.submit(Call(), "a", "b") for _ in range(n_others)]
    unfit = found.submit(Call(), "unfit")
    await found.settle()
    assert reasons([unfit]) == {Reason.INTERNAL}
    assert reasons(good) <= {None}
    found.check_nothing_is_left()


async def test_when_no_sentence_can_join_the_engine_is_probed_and_everything_refused() -> None:
    found = driven(rows=8)
    futures = [found.submit(Call(), "unfit") for _ in range(3)]
    found.engine.broken = 1
    await found.settle()
    assert reasons(futures) == {Reason.MODEL_FAILING}
    found.check_nothing_is_left()


async def test_a_sentence_that_cannot_leave_costs_the_others_nothing() -> None:
    found = driven(rows=8)
    stuck = found.submit(Call(), "stuck", "b", "c")
    good = [found.submit(Call(), "a", "b", "c") for _ in range(3)]
    await found.step()
    stuck.cancel()
    await found.settle()
    assert reasons(good) == {None}
    found.check_nothing_is_left()


async def test_an_engine_that_takes_what_it_refuses_computes_nothing_twice() -> None:
    """It breaks its contract: after the error of `join` it holds the sentences."""

    class Forgetful(FakeEngine[Sentence]):
        fails = 2

        def join(self, sentences: Sequence[Sentence]) -> None:
            super().join(sentences)
            if self.fails:
                self.fails -= 1
                raise MemoryError

    found = DrivenWorker(Forgetful())
    futures = [found.submit(Call(), "a") for _ in range(2)]
    await found.settle()
    assert sorted(map(str, reasons(futures))) == ["INTERNAL", "None"]
    found.check_nothing_is_left()


async def test_a_sentence_that_never_fits_is_refused_and_holds_nothing_up() -> None:
    found = driven(rows=2, steps=10)
    large, small = found.submit(Call(), *["a"] * 9), found.submit(Call(), "a")
    await found.settle()
    assert (reasons([large]), reasons([small])) == ({Reason.SENTENCE_TOO_LONG}, {None})
    found.check_nothing_is_left()


# ---- sentences that nothing waits for ----


async def test_late_sentences_end_in_the_queue() -> None:
    found = DrivenWorker(FakeEngine(Capacity(4, 100)), lambda: 100.0)
    for _ in range(60):
        call = Call(deadline_s=99.0)
        for _ in range(6):
            found.submit(call, "a", "b")
    futures = list(found.futures)
    await found.settle()
    assert reasons(futures) == {Reason.DEADLINE_EXCEEDED}
    assert found.engine.groups == []
    futures.clear()
    found.check_nothing_is_left()


async def test_what_is_computed_when_its_deadline_passes_gets_its_result() -> None:
    now_s = [0.0]
    found = DrivenWorker(FakeEngine(Capacity(1, 100)), lambda: now_s[0])
    call = Call(deadline_s=1.0)
    first, second = found.submit(call, "a", "b"), found.submit(call, "a", "b")
    await found.step()
    now_s[0] = 2.0
    await found.settle()
    assert (reasons([first]), reasons([second])) == ({None}, {Reason.DEADLINE_EXCEEDED})
    found.check_nothing_is_left()


async def test_a_cancelled_future_takes_its_sentence_out_wherever_it_is() -> None:
    found = driven(rows=1, steps=100)
    computed, waits, stays = (found.submit(Call(), "a", "b", "c") for _ in range(3))
    await found.step()
    computed.cancel()
    waits.cancel()
    await delivered()
    assert (found.worker.in_flight, found.worker.waiting) == (1, 1)
    await found.settle()
    assert reasons([stays]) == {None}
    assert found.engine.stats.steps == 1 + 3
    found.check_nothing_is_left()


async def test_cancelling_all_of_a_call_leaves_the_others() -> None:
    found = driven(rows=1, steps=100)
    call = Call()
    futures = [found.submit(call, "a", "b", "c") for _ in range(5)]
    await found.step()
    stays = found.submit(Call(), "d")
    for future in futures:
        future.cancel()
    await delivered()
    assert found.worker.waiting == 1
    await found.settle()
    assert reasons([stays]) == {None}
    futures.clear()
    found.check_nothing_is_left()


async def test_what_is_refused_while_a_round_hangs_leaves_nothing_when_it_goes_on() -> None:
    found = driven(rows=2, steps=100)
    futures = [found.submit(Call(), "a", "b") for _ in range(6)]
    await found.step()
    found.worker.refuse_pending()
    assert reasons(futures) == {Reason.MODEL_FAILING}
    assert (found.worker.waiting, found.worker.in_flight) == (0, 2)
    await found.settle()
    futures.clear()
    found.check_nothing_is_left()


# ---- the end ----


async def test_a_worker_that_is_never_started_refuses_everything_when_it_stops() -> None:
    found = driven(rows=1, steps=100)
    futures = [found.submit(Call(), "a", "b") for _ in range(3)]
    await found.step()
    await found.worker.stop()
    futures.append(found.submit(Call(), "a"))
    await delivered()
    assert reasons(futures) == {Reason.SHUTTING_DOWN}
    assert found.worker.idle


async def test_a_refusal_keeps_its_own_frames() -> None:
    """Each sentence has an exception of its own: one raised in two places would keep the frames of both."""
    found = driven()
    found.engine.broken = 1
    first, second = found.submit(Call(), "a"), found.submit(Call(), "a")
    await found.step()
    assert isinstance(first.exception(), RefusalError)
    assert first.exception() is not second.exception()
