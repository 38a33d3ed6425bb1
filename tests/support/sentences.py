"""Sentences for the inference worker, and a worker that a test drives step by step."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from bilm_api.constants import Reason
from bilm_model.engine.types import Capacity, OutputSpec
from bilm_model.scalar_mix import Selection
from bilm_server.errors import RefusalError
from bilm_server.inference.types import Call, Outcomes, Result, RoundReport, Sentence
from bilm_server.inference.worker import InferenceWorker

from tests.support.fake_engine import FakeEngine

PLAIN = OutputSpec(Selection())


def new_sentence(call: Call, *tokens: str) -> Sentence:
    """Return a sentence that is prepared."""
    return Sentence(call, tokens, PLAIN, tokens=tokens)


def reasons(futures: list["asyncio.Future[Outcomes]"]) -> set[Reason | None]:
    """Return how the sentences of futures that are done ended, None standing for a result."""
    found: list[Any] = [
        each for future in futures for each in ([future.exception()] if future.exception() else future.result())
    ]
    return {each.reason if isinstance(each, RefusalError) else None for each in found}


def result(future: "asyncio.Future[Outcomes]") -> Result:
    """Return the result of the only sentence of a future."""
    (found,) = future.result()
    assert isinstance(found, Result)
    return found


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
        self.futures: list[asyncio.Future[Outcomes]] = []
        self.wrong: list[Any] = []
        self._sentences: weakref.WeakSet[Sentence] = weakref.WeakSet()

    def submit(self, call: Call, *tokens: str) -> "asyncio.Future[Outcomes]":
        """Submit a new sentence."""
        return self.submit_all(call, [tokens])

    def submit_all(self, call: Call, sentences: Sequence[Sequence[str]]) -> "asyncio.Future[Outcomes]":
        """Submit new sentences together."""
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.wrong.append(context))
        found = [new_sentence(call, *tokens) for tokens in sentences]
        self._sentences.update(found)
        future = self.worker.submit(found)
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
