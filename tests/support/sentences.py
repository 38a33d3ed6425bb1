"""Sentences for the inference worker, and a worker that a test drives step by step."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity, OutputSpec
from bilm_model.scalar_mix import Selection
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Result, RoundReport, Sentence
from bilm_server.inference.worker import InferenceWorker

from tests.support.fake_engine import FakeEngine

PLAIN = OutputSpec(Selection())


def new_sentence(call: Call, *tokens: str) -> Sentence:
    """Return a sentence that is prepared."""
    return Sentence(call, tokens, PLAIN, tokens=tokens)


def reasons(futures: list["asyncio.Future[Result]"]) -> set[Reason | None]:
    """Return how futures that are done ended, None standing for a result."""
    errors = [future.exception() for future in futures]
    return {error.reason if isinstance(error, RefusalError) else None for error in errors}


class DrivenWorker:
    """A worker whose thread isn't started, and everything that was ever asked of it.

    What nothing retrieves or what is set twice goes to `wrong`.
    """

    def __init__(
        self,
        engine: FakeEngine[Sentence],
        now_s: Callable[[], float] = lambda: 0.0,
        on_round: Callable[[RoundReport], None] = lambda report: None,
    ) -> None:
        self.engine = engine
        self.worker = InferenceWorker(engine, on_round, now_s)
        self.futures: list[asyncio.Future[Result]] = []
        self.wrong: list[Any] = []
        self._sentences: weakref.WeakSet[Sentence] = weakref.WeakSet()

    def submit(self, call: Call, *tokens: str) -> "asyncio.Future[Result]":
        """Submit a new sentence."""
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.wrong.append(context))
        sentence = new_sentence(call, *tokens)
        self._sentences.add(sentence)
        future = self.worker.submit(sentence)
        self.futures.append(future)
        return future

    async def step(self, times: int = 1) -> None:
        """Do steps, and let the event loop have what came of them."""
        for _ in range(times):
            self.worker.step()
            await delivered()

    async def settle(self) -> None:
        """Do steps until nothing is left to do."""
        await delivered()
        for _ in range(10_000):
            if not self.worker.has_work and self.worker.healthy:
                break
            await self.step()

    def check_nothing_is_left(self) -> None:
        """Every sentence has ended, and nothing of it is left anywhere."""
        assert self.worker.idle
        assert self.engine.used == Capacity(0, 0)
        for future in self.futures:
            assert future.cancelled() or future.exception() is None or isinstance(future.exception(), RefusalError)
        self.futures.clear()
        assert not self._sentences or (gc.collect() or not self._sentences)
        assert self.wrong == []


async def delivered() -> None:
    """Let the event loop call what was handed to it, and what that led to."""
    for _ in range(3):
        await asyncio.sleep(0)
