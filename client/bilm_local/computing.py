"""One thread that loads a model and computes for all calls: their sentences share its rounds.

Calls take turns, a sentence a turn, and a sentence joins as soon as the engine's capacity allows. While interactive
calls wait, those with batch sentences have one turn of `_BATCH_TURNS`.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from bilm_api.constants import Reason
from bilm_client._core.settings import Deadline, deadline_passed
from bilm_client._transport.forks import FORK_GATE
from bilm_client.errors import BilmError, ClientClosedError
from bilm_model.engine.types import Capacity, Engine, EngineResult

from bilm_local.loading import LocalModel
from bilm_local.sentences import LocalSentence, RefusedSentenceError

_BATCH_TURNS = 8

_log = logging.getLogger(__name__)

LocalResult = EngineResult[LocalSentence] | RefusedSentenceError
LocalEngine = Engine[LocalSentence]


class LocalCall:
    """Sentences that end together.

    Attributes:
        batch: Whether they step aside for others.
        done: Their results in their order, or what ended the call; its callbacks run in the computing thread.
        waiting: Those that haven't joined the engine.
    """

    def __init__(self, sentences: Sequence[LocalSentence], *, batch: bool) -> None:
        self.batch = batch
        self.done: Future[list[LocalResult]] = Future()
        self.waiting = deque(sentences)
        self._sentences = sentences
        self._results: dict[LocalSentence, LocalResult] = {}

    def settle(self, sentence: LocalSentence, result: LocalResult) -> None:
        """Take the result of a sentence; the last one ends the call."""
        self._results[sentence] = result
        if len(self._results) == len(self._sentences):
            self._end(lambda: self.done.set_result([self._results[each] for each in self._sentences]))

    def fail(self, error: BilmError) -> None:
        """End the call by an error, unless it has ended."""
        self._end(lambda: self.done.set_exception(error))

    def _end(self, end: Callable[[], None]) -> None:
        try:
            end()
        except InvalidStateError:  # cancelled meanwhile, or ended
            return


class ComputingThread:
    """Computes from `start` to `close`, which may be called in any thread.

    Args:
        load: Loads the model, in the thread.
    """

    def __init__(self, load: Callable[[], LocalModel]) -> None:
        self._load = load
        self._process_id = os.getpid()
        self._loading: Future[LocalModel] = Future()
        self._changed = threading.Condition()
        self._interactive: deque[LocalCall] = deque()
        self._batch: deque[LocalCall] = deque()
        self._turn = 0
        self._in_flight: dict[LocalSentence, LocalCall] = {}
        self._suspects: deque[tuple[LocalSentence, LocalCall]] = deque()
        self._cancelled = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="bilm-local", daemon=True)

    def start(self) -> None:
        """Start loading."""
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the model could not be loaded."""
        return self._loading.done() and self._loading.exception() is not None

    @property
    def on_gpu(self) -> bool:
        """Whether the model is loaded and lies on a GPU."""
        return self._loading.done() and not self.failed and self._loading.result().on_gpu

    def model(self, deadline: Deadline) -> LocalModel:
        """Wait for the model.

        Raises:
            ModelError: It can't be loaded.
            DeadlineError: It takes longer than the call may.
        """
        try:
            return self._loading.result(deadline.remaining_s())
        except TimeoutError:
            raise deadline_passed() from None

    def submit(self, call: LocalCall) -> None:
        """Compute a call that has sentences.

        Raises:
            ClientClosedError: The thread is closed.
        """
        with self._changed:
            if self._closed:
                raise ClientClosedError("the client is closed")
            (self._batch if call.batch else self._interactive).append(call)
            self._changed.notify()

    def cancel(self, call: LocalCall) -> None:
        """End a call that nothing waits for any more, without waiting."""
        if call.done.cancel():
            with self._changed:
                self._cancelled = True
                self._changed.notify()

    def close(self) -> None:
        """End all calls by ClientClosedError, and wait for the round under way; again, or in a fork, does nothing."""
        if os.getpid() != self._process_id:
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            with FORK_GATE.call():
                model = self._load()
                model.engine.warm_up()
        except Exception as error:
            self._loading.set_exception(error)
            return
        self._loading.set_result(model)
        try:
            while self._wait():
                with FORK_GATE.call():
                    self._work(model.engine)
        finally:
            self._end_calls()

    def _end_calls(self) -> None:
        with self._changed:
            self._closed = True
            left = {*self._interactive, *self._batch, *self._in_flight.values(), *(call for _, call in self._suspects)}
        for call in left:
            call.fail(ClientClosedError("the client was closed during the call"))

    def _wait(self) -> bool:
        """Wait for something to do; False: there is nothing more to come."""
        with self._changed:
            while not (self._closed or self._has_work()):
                self._changed.wait()
            return not self._closed

    def _has_work(self) -> bool:
        return bool(self._interactive or self._batch or self._in_flight or self._suspects or self._cancelled)

    def _work(self, engine: LocalEngine) -> None:
        """Let sentences leave and join, and compute a round."""
        self._drop_cancelled(engine)
        joining = self._next_suspect() if self._suspects else self._next_sentences(engine)
        self._in_flight |= joining
        if not self._in_flight:
            return
        try:
            engine.join(list(joining))
            found = engine.advance()
        except Exception:
            _log.exception("a round of %d sentences failed", len(self._in_flight))
            self._on_failed_round(engine)
            return
        for result in found:
            self._in_flight.pop(result.sentence).settle(result.sentence, result)

    def _drop_cancelled(self, engine: LocalEngine) -> None:
        with self._changed:
            if not self._cancelled:
                return
            self._cancelled = False
            for calls in (self._interactive, self._batch):
                left = [call for call in calls if not call.done.cancelled()]
                calls.clear()
                calls.extend(left)
        gone = [sentence for sentence, call in self._in_flight.items() if call.done.cancelled()]
        for sentence in gone:
            del self._in_flight[sentence]
        self._suspects = deque(each for each in self._suspects if not each[1].done.cancelled())
        if gone:
            engine.drop(gone)

    def _next_sentences(self, engine: LocalEngine) -> dict[LocalSentence, LocalCall]:
        """Take sentences, in turns of their calls, as far as they fit."""
        free = engine.capacity + Capacity(engine.ahead, 0) - engine.used
        found: dict[LocalSentence, LocalCall] = {}
        with self._changed:
            while self._interactive or self._batch:
                calls = self._next_turn()
                call = calls[0]
                need = engine.need(len(call.waiting[0].tokens))
                if not free.fits(need):
                    break
                free -= need
                self._turn += 1
                found[call.waiting.popleft()] = call
                calls.popleft()
                if call.waiting:
                    calls.append(call)
        return found

    def _next_turn(self) -> deque[LocalCall]:
        batch = self._turn % _BATCH_TURNS == 0 or not self._interactive
        return self._batch if batch and self._batch else self._interactive

    # ---- a failed round doesn't identify the sentence at fault: all of them are computed again one by one ----

    def _on_failed_round(self, engine: LocalEngine) -> None:
        engine.reset()
        failed, self._in_flight = self._in_flight, {}
        if len(failed) > 1:
            self._suspects.extend(failed.items())
            return
        for sentence, call in failed.items():
            call.settle(sentence, RefusedSentenceError(Reason.INTERNAL, "the sentence can't be computed; see the log"))

    def _next_suspect(self) -> dict[LocalSentence, LocalCall]:
        return {} if self._in_flight else dict([self._suspects.popleft()])
