"""How sentences end: the refusals of inference, and the futures that results and refusals go to."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from bilm_api.constants import Reason

from bilm_server.errors import RefusalError
from bilm_server.inference.types import Outcome, Outcomes, Sentence

Exit = Outcome | None
"""None: the sentence was cancelled, so that there is nothing to deliver."""

Refusal = Callable[[], RefusalError]
"""Makes one for each sentence: an exception raised in two places keeps the frames of both."""


def shutting_down() -> RefusalError:
    """Return the refusal of what isn't done when the server stops."""
    return RefusalError(Reason.SHUTTING_DOWN, "the server is shutting down")


def late() -> RefusalError:
    """Return the refusal of what waited too long."""
    return RefusalError(Reason.DEADLINE_EXCEEDED, "the deadline passed before the sentence's turn came")


def failing() -> RefusalError:
    """Return the refusal of everything while the engine fails."""
    return RefusalError(Reason.MODEL_FAILING, "the model fails at the moment; another replica may do better")


def too_large() -> RefusalError:
    """Return the refusal of what would wait for ever."""
    return RefusalError(Reason.SENTENCE_TOO_LONG, "the sentence needs more capacity than the engine has")


class PendingSentences:
    """Sentences whose futures aren't done; used from the event loop only, save `deliver` and `call`.

    Those that are submitted together have one future. It ends in the outcomes of all of them, or in the first refusal
    that isn't a sentence's own.
    """

    def __init__(self) -> None:
        self._sentences: dict[asyncio.Future[Outcomes], Sequence[Sentence]] = {}
        self._n_open: dict[asyncio.Future[Outcomes], int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """Futures that something waits for."""
        return len(self._sentences)

    def attach(self) -> asyncio.AbstractEventLoop:
        """Let results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    def open(
        self, sentences: Sequence[Sentence], on_done: Callable[[Sequence[Sentence]], None]
    ) -> asyncio.Future[Outcomes]:
        """Give sentences their future.

        Args:
            sentences: new ones, one at least.
            on_done: called when the future is done, whatever did that.
        """
        future: asyncio.Future[Outcomes] = (self._loop or self.attach()).create_future()
        for sentence in sentences:
            sentence.future = future
        self._sentences[future], self._n_open[future] = sentences, len(sentences)

        def done(future: asyncio.Future[Outcomes]) -> None:
            del self._sentences[future], self._n_open[future]
            on_done(sentences)

        future.add_done_callback(done)
        return future

    def refuse(self, refusal: Refusal) -> None:
        """Refuse all of them."""
        for future in tuple(self._sentences):
            _refuse(future, refusal())

    def deliver(self, exits: Sequence[tuple[Sentence, Exit]]) -> None:
        """Let the event loop end the futures of sentences that have ended."""
        if any(outcome is not None for _, outcome in exits):
            self.call(lambda: self._resolve(exits))

    def call(self, callback: Callable[[], None]) -> None:
        """Let the event loop call a function."""
        assert self._loop is not None  # noqa: S101 - there is a sentence, or the worker was started
        with suppress(RuntimeError):  # the loop was closed while the thread hung: nothing waits any more
            self._loop.call_soon_threadsafe(callback)

    def _resolve(self, exits: Sequence[tuple[Sentence, Exit]]) -> None:
        for sentence, outcome in exits:
            future = sentence.future
            if outcome is None or future is None or future.done():
                continue
            if isinstance(outcome, RefusalError) and outcome.reason is not Reason.INTERNAL:
                _refuse(future, outcome)
                continue
            sentence.outcome = outcome
            self._n_open[future] -= 1
            if not self._n_open[future]:
                future.set_result([each.outcome for each in self._sentences[future] if each.outcome is not None])


def _refuse(future: asyncio.Future[Outcomes], refusal: RefusalError) -> None:
    """End a future, unless it is done."""
    if not future.done():
        future.set_exception(refusal)
        future.exception()  # marks it as retrieved: a call that is over reads none
