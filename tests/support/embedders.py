"""An Embedder on a fake engine, in this process: milliseconds to start, and nothing may be left at its end."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from bilm_server.embedding.admission import Admission, StreamAdmission
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.embedder import Embedder
from bilm_server.embedding.preprocessing import RequestLimits
from bilm_server.inference.types import Sentence
from bilm_server.inference.worker import InferenceWorker
from bilm_server.observability.call_record import CallRecord, enter, leave
from bilm_server.served_model import ServedModel

from tests.support.fake_engine import FakeEngine, fake_model

LIMITS = RequestLimits(
    sentences=8, tokens=1000, response_bytes=2**20, sentence_tokens=500, text_bytes=10_000, stream_items=4
)
NO_LIMITS = CallerLimits(0, 0, 1)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it didn't come about"
        await asyncio.sleep(0.001)


def worker_of(embedder: Embedder) -> InferenceWorker:
    """Return the worker of an embedder that isn't an ensemble's."""
    assert isinstance(embedder.worker, InferenceWorker)
    return embedder.worker


@contextmanager
def entered(call: CallRecord) -> Iterator[None]:
    """Make a call the current one."""
    token = enter(call)
    try:
        yield
    finally:
        leave(token)


@asynccontextmanager
async def embedding(
    engine: FakeEngine[Sentence],
    *,
    model: ServedModel | None = None,
    max_tokens: int = 1000,
    max_response_bytes: int = 2**20,
    caller_limits: CallerLimits = NO_LIMITS,
    **limits: int,
) -> AsyncIterator[Embedder]:
    """Yield an embedder that has started.

    Args:
        engine: what computes.
        model: that it belongs to; None: one whose tokens are separated by white space.
        max_tokens: that calls may have waiting, and so many that streams may.
        max_response_bytes: that both may hold.
        caller_limits: of each caller.
        limits: other ones than `LIMITS`.
    """
    worker = InferenceWorker(engine)
    embedder = Embedder(
        model=model or fake_model(engine),
        worker=worker,
        limits=replace(LIMITS, **limits),
        conversions=Conversions(),
        admission=Admission(max_tokens, max_response_bytes),
        stream_admission=StreamAdmission(max_tokens, max_response_bytes),
        caller_limits=caller_limits,
    )
    await worker.start()
    try:
        yield embedder
        await until(lambda: embedder.idle)
    finally:
        engine.go_on.set()
        await worker.stop()
        embedder.conversions.stop()
