"""A worker under any order of events: every future ends, and nothing is held afterwards."""

import asyncio
import logging

from bilm_api.constants import Priority
from bilm_model.engine.types import Capacity
from bilm_server.inference.types import NO_DEADLINE_S, Call, Outcomes
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.fake_engine import FakeEngine
from tests.support.sentences import DrivenWorker, delivered

CAPACITY = Capacity(4, 40)
Words = st.sampled_from(["a", "b", "c", "d", "e", "f", "unfit", "poison", "stuck"])
Tokens = st.lists(Words, max_size=8) | st.just(["a"] * 60)


class WorkerMachine(RuleBasedStateMachine):
    """Submit, cancel, fail, advance, stop."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now_s = 0.0
        self.stopped = False
        self.found = DrivenWorker(FakeEngine(CAPACITY), lambda: self.now_s)
        self.level = logging.getLogger("bilm_server").level
        logging.getLogger("bilm_server").setLevel(logging.CRITICAL)  # tracebacks of failures that are meant

    @initialize(tokens=Tokens)
    def begin(self, tokens: list[str]) -> None:
        self.submit([tokens], NO_DEADLINE_S, Priority.INTERACTIVE)

    @rule(
        sentences=st.lists(Tokens, min_size=1, max_size=4),
        wait_s=st.sampled_from([-1.0, 2.0, NO_DEADLINE_S]),
        priority=st.sampled_from(Priority),
        together=st.booleans(),
    )
    def submit(self, sentences: list[list[str]], wait_s: float, priority: Priority, together: bool = False) -> None:
        async def submit_all() -> None:
            call = Call(self.now_s + wait_s, priority)
            for group in [sentences] if together else [[tokens] for tokens in sentences]:
                self.found.submit_all(call, group)

        self.loop.run_until_complete(submit_all())

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        open_futures = [future for future in self.found.futures if not future.done()]
        if open_futures:
            data.draw(st.sampled_from(open_futures), "future").cancel()

    @rule(times=st.integers(1, 3))
    def fail(self, times: int) -> None:
        self.found.engine.broken = times

    @precondition(lambda self: not self.stopped)
    @rule(times=st.integers(1, 5), seconds=st.floats(0, 1))
    def advance(self, times: int, seconds: float) -> None:
        self.now_s += seconds
        self.loop.run_until_complete(self.found.step(times))

    @rule()
    def refuse_pending(self) -> None:
        self.found.worker.refuse_pending()
        assert all(future.done() for future in self.found.futures)

    @rule()
    def stop(self) -> None:
        self.loop.run_until_complete(self.found.worker.stop())
        self.loop.run_until_complete(delivered())
        self.stopped = True

    @invariant()
    def counts_agree(self) -> None:
        worker = self.found.worker
        self.loop.run_until_complete(delivered())
        n_open = sum(1 for future in self.found.futures if not future.done())
        assert worker.pending == n_open <= worker.waiting + worker.in_flight
        assert worker.has_work or not n_open

    def teardown(self) -> None:
        try:
            futures: list[asyncio.Future[Outcomes]] = list(self.found.futures)
            if self.stopped:
                self.found.engine.reset()
            else:
                self.loop.run_until_complete(self.found.settle())
            assert all(future.done() for future in futures)
            futures.clear()
            self.found.check_nothing_is_left()
        finally:
            logging.getLogger("bilm_server").setLevel(self.level)
            self.loop.close()


TestWorker = WorkerMachine.TestCase
TestWorker.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
