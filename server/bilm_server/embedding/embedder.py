"""Embed these sentences: check, tokenise, price, admit, compute, deliver. The one way in for every protocol.

A protocol makes `Sentence`s of its messages and its messages of `Result`s; it is called within a `CallRecord`, which
says who calls. Limits, admission, cancellation and accounting are here, for all of them.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from bilm_api.constants import Priority, Reason
from bilm_model.engine.types import State

from bilm_server.embedding.admission import (
    NOTHING,
    Admission,
    Cost,
    Reservation,
    StreamAdmission,
    StreamShare,
    pushback_ms,
)
from bilm_server.embedding.caller_limits import CallerLimits
from bilm_server.embedding.conversions import Conversions
from bilm_server.embedding.preprocessing import Preprocessing, RequestLimits
from bilm_server.errors import Code, RefusalError
from bilm_server.inference.types import Call, Outcome, Result, Sentence
from bilm_server.inference.worker import Worker
from bilm_server.observability.call_record import current_call
from bilm_server.served_model import EmbeddingModel

R_co = TypeVar("R_co", covariant=True)


class ResponseFormat(Protocol[R_co]):
    """A protocol's response to a call: how large it may get, and how it is built."""

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes beside its vectors and state."""

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> R_co:
        """Build the response; in any thread."""


class Embedder:
    """Embeds sentences by one model; used from the event loop only.

    Attributes:
        model: what embeds.
        worker: runs its engine.
        limits: of single requests.
        conversions: threads for what would hold the event loop.
        admission: of calls.
        stream_admission: of streams' items.
    """

    def __init__(
        self,
        *,
        model: EmbeddingModel,
        worker: Worker,
        limits: RequestLimits,
        conversions: Conversions,
        admission: Admission,
        stream_admission: StreamAdmission,
        caller_limits: CallerLimits,
    ) -> None:
        """Set the parts.

        Args:
            model: what embeds.
            worker: runs its engine.
            limits: of single requests.
            conversions: threads for conversions that would hold the event loop.
            admission: of calls, of all models together.
            stream_admission: of streams' items, of all models together.
            caller_limits: of each caller by itself.
        """
        self.model, self.worker, self.limits = model, worker, limits
        self.conversions, self.admission, self.stream_admission = conversions, admission, stream_admission
        self._caller_limits = caller_limits
        self._n_calls, self._changed = 0, asyncio.Event()
        self._preprocessing = Preprocessing(model, limits)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, nothing is reserved, and nothing is computed or converted."""
        return (
            self.worker.idle
            and not self.conversions.waiting_bytes
            and self.admission.used == self.stream_admission.used == NOTHING
            and not self.stream_admission.waiting
        )

    @property
    def healthy(self) -> bool:
        """Whether the last thing that its engine computed succeeded."""
        return self.worker.healthy

    def take(self) -> Callable[[], None]:
        """Count a call that uses it; return what counts it out again."""
        self._n_calls += 1
        return self._give_back

    async def given_back(self) -> None:
        """Wait until no call uses it any more, which none may begin to."""
        while self._n_calls:
            self._changed.clear()
            await self._changed.wait()

    def _give_back(self) -> None:
        self._n_calls -= 1
        self._changed.set()

    @staticmethod
    def prioritise(call: Call, asked: Priority) -> None:
        """Give a call's sentences the priority that it asks for, or its caller's ceiling where that is lower."""
        record = current_call()
        if asked is Priority.BATCH:
            record.priority = asked
        call.priority = record.priority

    async def embed(
        self,
        sentences: Sequence[Sentence],
        request_bytes: int,
        response: ResponseFormat[R_co],
        *,
        fail_as_one: bool = False,
    ) -> R_co:
        """Embed sentences that are answered together.

        A sentence that is at fault by itself has a refusal for a result. The call's `held` holds room for the response
        until it has been sent.

        Args:
            sentences: new ones.
            request_bytes: size of the request that they came with.
            response: what is made of the results.
            fail_as_one: whether such a refusal ends the call, as for a response that has no place for it; a sentence
                that is refused before it is computed then keeps the others from it.

        Raises:
            RefusalError: of the whole call.
        """
        self.limits.check_count(len(sentences))
        price = self._preprocessing.price(sentences)
        record = current_call()
        room = self.admission.reserve(Cost(price, 0), self._retry_after_ms, record.priority)  # before any work
        record.held.add(room.release)
        try:
            refusals, n_bytes = await self._prepare(sentences, request_bytes, room, response)
            if fail_as_one:
                _raise_first(refusals)
            good = _good(sentences, refusals)
            outcomes = await self.worker.submit(good) if good else ()
        except BaseException:
            room.release()  # at once, not when the status has been sent
            raise
        self.admission.resize(room, Cost(0, n_bytes))
        results = outcomes if good is sentences else _in_their_order(refusals, outcomes)
        _count(sentences, results)
        if fail_as_one:
            _raise_first(results)
        return await self.conversions.response(n_bytes, lambda: response.build(sentences, results), record.priority)

    def stream(self) -> "SentenceStream":
        """Return a stream of sentences that are answered one by one; the call's priority is known."""
        return SentenceStream(self, self._preprocessing, self._caller_limits)

    async def compute(self, sentence: Sentence) -> Result:
        """Compute a prepared sentence; cancelled, it takes the sentence out.

        Raises:
            RefusalError: what it ended in.
        """
        (outcome,) = await self.worker.submit([sentence])
        if isinstance(outcome, RefusalError):
            raise outcome
        return outcome

    def _retry_after_ms(self) -> int:
        """Return when there will be room again: the time that half of what waits takes."""
        return pushback_ms(self.admission.used_tokens / self.worker.steps_per_s / 2)

    async def _prepare(
        self,
        sentences: Sequence[Sentence],
        request_bytes: int,
        room: Reservation,
        response: ResponseFormat[object],
    ) -> tuple[list[RefusalError | None], int]:
        """Check and tokenise; room and the caller's charge follow what it costs in fact.

        Returns:
            What is wrong with each sentence, and a bound of the response's bytes.
        """
        record, prepare_all = current_call(), self._preprocessing.prepare_all
        with self._caller_limits.charged(record.caller, room.cost.tokens) as charge:
            weight = self._preprocessing.weight(sentences, request_bytes)
            refusals = await self.conversions.request(weight, lambda: prepare_all(sentences), record.priority)
            cost = self._cost(_good(sentences, refusals), response)
            self.admission.resize(room, cost, self._retry_after_ms)
            charge.tokens = cost.tokens
        return refusals, cost.response_bytes

    def _cost(self, sentences: Sequence[Sentence], response: ResponseFormat[object]) -> Cost:
        n_bytes = self._preprocessing.computed_bytes(*sentences) + sum(map(response.overhead_bytes, sentences))
        if n_bytes > self.limits.response_bytes:
            raise RefusalError(
                Reason.RESPONSE_TOO_LARGE,
                f"the response would have about {n_bytes} bytes, more than {self.limits.response_bytes}: send fewer "
                "sentences, ask for less of them (layers, pooling, data_type), or use EmbedStream",
            )
        return Cost(sum([len(sentence.tokens) for sentence in sentences]), n_bytes)


class SentenceStream:
    """Sentences of one stream, each of which waits for room; made by `Embedder.stream`."""

    def __init__(self, embedder: Embedder, preprocessing: Preprocessing, caller_limits: CallerLimits) -> None:
        self._embedder, self._preprocessing, self._caller_limits = embedder, preprocessing, caller_limits
        self._share = StreamShare(embedder.limits.stream_items, current_call().priority)
        self._carried: State | None = None

    async def place(self) -> Reservation:
        """Wait until the stream may have another sentence in flight; that is its flow control."""
        return await self._share.place()

    async def admit(
        self, sentence: Sentence, request_bytes: int, overhead_bytes: Callable[[Sentence], int]
    ) -> Reservation:
        """Check and tokenise a sentence, and wait for room for it, which the reservation holds.

        Args:
            sentence: a new one.
            request_bytes: size of the message that it came with.
            overhead_bytes: returns an upper bound of what it takes of the response beside its vectors and state.

        Raises:
            RefusalError: what is wrong with the sentence.
        """
        try:
            prepare = self._preprocessing.prepare
            weight = self._preprocessing.weight([sentence], request_bytes)
            await self._embedder.conversions.item(weight, lambda: prepare(sentence), self._share.priority)
            n_bytes = self._preprocessing.computed_bytes(sentence) + overhead_bytes(sentence)
            return await self._reserve(Cost(len(sentence.tokens), n_bytes))
        except RefusalError as error:
            _count_failed(error)
            raise

    async def embed(self, sentence: Sentence) -> Result:
        """Compute a sentence that was let in.

        Raises:
            RefusalError: what it ended in; the whole stream's, if its code is UNAVAILABLE.
        """
        try:
            result = await self._embedder.compute(sentence)
        except RefusalError as error:
            _count_failed(error)
            raise
        current_call().computed(len(sentence.tokens), result.queue_s, result.inference_s)
        return result

    async def embed_next(self, sentence: Sentence) -> Result:
        """Compute a sentence that was let in and that continues from the last one, unless it has a state itself."""
        sentence.return_state = True
        if sentence.state is None:
            sentence.state = self._carried
        result = await self.embed(sentence)
        self._carried = result.state
        return result

    async def _reserve(self, cost: Cost) -> Reservation:
        caller = current_call().caller
        # The caller's own limit first: a sentence that waits for it holds no room that others could use
        await self._caller_limits.acquire(caller, cost.tokens)
        try:
            return await self._embedder.stream_admission.reserve(self._share, cost)
        except BaseException:
            self._caller_limits.correct(caller, -cost.tokens)  # what isn't admitted costs nothing
            raise


def _good(sentences: Sequence[Sentence], refusals: Sequence[RefusalError | None]) -> Sequence[Sentence]:
    """Return the sentences that aren't refused; the same object if none is."""
    if not any(refusals):
        return sentences
    return [sentence for sentence, refusal in zip(sentences, refusals, strict=True) if refusal is None]


def _raise_first(outcomes: Sequence[Outcome | None]) -> None:
    """Raise the first refusal among the outcomes of a call's sentences, which then is the call's."""
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, RefusalError):
            raise RefusalError(outcome.reason, f"sentence {index}: {outcome}", outcome.retry_after_ms)


def _in_their_order(refusals: Sequence[RefusalError | None], outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    computed = iter(outcomes)
    return [refusal or next(computed) for refusal in refusals]


def _count(sentences: Sequence[Sentence], results: Sequence[Outcome]) -> None:
    call, pairs = current_call(), zip(sentences, results, strict=True)
    computed = [(sentence, result) for sentence, result in pairs if not isinstance(result, RefusalError)]
    for _ in range(len(sentences) - len(computed)):
        call.sentence_failed()
    if computed:
        call.computed(
            sum([len(sentence.tokens) for sentence, _ in computed]),
            max([result.queue_s for _, result in computed]),
            max([result.inference_s for _, result in computed]),
            len(computed),
        )


def _count_failed(error: RefusalError) -> None:
    if error.code is not Code.UNAVAILABLE:
        current_call().sentence_failed()
