"""How sentences end: the refusals of inference, and the futures that results and refusals go to."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from bilm_api.constants import Reason

from bilm_server.errors import RefusalError
from bilm_server.inference.types import Result, Sentence

Exit = Result | RefusalError | None
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
    """Sentences whose futures aren't done; used from the event loop only, save `deliver` and `call`."""

    def __init__(self) -> None:
        self._sentences: set[Sentence] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __len__(self) -> int:
        """Sentences that something waits for."""
        return len(self._sentences)

    def attach(self) -> asyncio.AbstractEventLoop:
        """Let results go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        return self._loop

    def open(self, sentence: Sentence, on_done: Callable[[Sentence], None]) -> asyncio.Future[Result]:
        """Give a sentence its future.

        Args:
            sentence: a new one.
            on_done: called when the future is done, whatever did that.
        """
        future = sentence.future = self.attach().create_future()
        self._sentences.add(sentence)

        def done(_: object) -> None:
            self._sentences.discard(sentence)
            on_done(sentence)

        future.add_done_callback(done)
        return future

    def refuse(self, refusal: Refusal) -> None:
        """Refuse all of them."""
        resolve([(sentence, refusal()) for sentence in tuple(self._sentences)])

    def deliver(self, exits: Sequence[tuple[Sentence, Exit]]) -> None:
        """Let the event loop end the futures of sentences that have ended."""
        found = [(sentence, result) for sentence, result in exits if result is not None]
        if found:
            self.call(lambda: resolve(found))

    def call(self, callback: Callable[[], None]) -> None:
        """Let the event loop call a function."""
        assert self._loop is not None  # noqa: S101 - there is a sentence, or the worker was started
        with suppress(RuntimeError):  # the loop was closed while the thread hung: nothing waits any more
            self._loop.call_soon_threadsafe(callback)


def resolve(exits: Sequence[tuple[Sentence, Result | RefusalError]]) -> None:
    """End the futures of sentences, on the event loop; those that are done stay as they are."""
    for sentence, result in exits:
        future = sentence.future
        if future is None or future.done():
            continue
        if isinstance(result, RefusalError):
            future.set_exception(result)
            future.exception()  # marks it as retrieved: a call that ends at its first refusal reads no other
        else:
            future.set_result(result)
