"""The RPC methods: check, admit, compute, answer."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from bilm_api.constants import MAX_REQUEST_BYTES, MAX_RESPONSE_BYTES, Reason
from bilm_api.v1 import embed_pb2, embed_pb2_grpc
from bilm_model.characters import MAX_TOKEN_BYTES

import bilm_server
from bilm_server import responses
from bilm_server.admission import Cost, Reservation
from bilm_server.config import ServerConfig
from bilm_server.conversions import INLINE_BYTES
from bilm_server.errors import RefusalError
from bilm_server.jobs import Call, Job, Outcome
from bilm_server.observability.call_record import current_call
from bilm_server.parts import Parts
from bilm_server.protocols.grpc.status import status_of
from bilm_server.requests import PreparedSentence, Wanted, check_model, parse_options, prepare_sentence, priced_tokens
from bilm_server.served_model import ServedModel
from bilm_server.stream import StreamSession

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

_NO_DEADLINE_S = float("inf")

Prepared = PreparedSentence | RefusalError


class EmbedService(embed_pb2_grpc.EmbedServiceServicer):
    """`bilm_api.v1.EmbedService`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def Embed(  # type: ignore[override] # noqa: N802 - the contract's name; bytes, see CallInterceptor
        self, request: embed_pb2.EmbedRequest, context: "Context"
    ) -> bytes | embed_pb2.EmbedResponse:
        """All sentences of a request, answered together; a large answer comes serialised already."""
        parts = self._parts
        check_model(request.model, request.expected_model_version, parts.model)
        _check_counts(request, parts.config)
        wanted = parse_options(request.options, parts.model)
        price = _price(request, parts)
        room = parts.admission.reserve(Cost(price, 0), parts.retry_after_ms())  # before any work is done for it
        current_call().held.callback(room.release)
        try:
            prepared, cost = await _prepare(request, wanted, price, room, parts)
            outcomes = await _compute_all(prepared, wanted, _new_call(context), parts)
        except BaseException:
            room.release()
            raise
        room.shrink(Cost(0, cost.answer_bytes))
        _record(prepared, outcomes)
        return await parts.conversions.response(
            cost.answer_bytes, lambda: _response(prepared, outcomes, wanted, parts.model, cost.answer_bytes)
        )

    async def EmbedStream(  # type: ignore[override] # noqa: N802 - grpc.aio also takes a coroutine that writes
        self, request_iterator: AsyncIterator[embed_pb2.EmbedStreamRequest], context: "Context"
    ) -> None:
        """Sentences as they come."""
        # By itself: were it to go with the first message, a status behind a message that nobody reads could not be sent
        await context.send_initial_metadata(())
        call = _new_call(context)
        try:
            await StreamSession(self._parts, call, context.write).run(request_iterator)
        finally:
            self._parts.inference.abandon(call)

    async def GetModel(  # noqa: N802 - the contract's name
        self, request: embed_pb2.GetModelRequest, context: "Context"
    ) -> embed_pb2.GetModelResponse:
        """What is served, and within which limits."""
        model, config = self._parts.model, self._parts.config
        check_model(request.model, request.expected_model_version, model)
        return embed_pb2.GetModelResponse(
            name=model.name,
            version=model.version,
            layer_count=model.config.layer_count,
            width=model.config.width,
            cell_size=model.config.cell_dim,
            parameter_count=model.parameter_count,
            precision=model.precision,
            backend=model.engine.description.backend,
            tokenizer=model.tokenizer.name,
            max_token_bytes=MAX_TOKEN_BYTES,
            state_bytes=model.state_bytes,
            limits=embed_pb2.Limits(
                max_sentences_per_request=config.max_sentences_per_request,
                max_tokens_per_request=config.max_tokens_per_request,
                max_tokens_per_sentence=config.max_tokens_per_sentence,
                max_request_bytes=MAX_REQUEST_BYTES,
                max_response_bytes=MAX_RESPONSE_BYTES,
                max_stream_items_in_flight=config.max_stream_items_in_flight,
            ),
            server_version=bilm_server.__version__,
        )


def _new_call(context: "Context") -> Call:
    remaining_s = context.time_remaining()
    return Call(_NO_DEADLINE_S if remaining_s is None else time.monotonic() + remaining_s)


def _check_counts(request: embed_pb2.EmbedRequest, config: ServerConfig) -> None:
    if not request.sentences:
        raise RefusalError(Reason.SENTENCES_MISSING, "sentences: none")
    if len(request.sentences) > config.max_sentences_per_request:
        found, limit = len(request.sentences), config.max_sentences_per_request
        raise RefusalError(Reason.TOO_MANY_SENTENCES, f"sentences: {found} are more than {limit}")


def _price(request: embed_pb2.EmbedRequest, parts: Parts) -> int:
    """Tokens that a request is taken to have until it is tokenised, no more than it may have.

    Raises:
        RefusalError: TOO_MANY_TOKENS, if those that are given as tokens are too many already.
    """
    most = parts.config.max_tokens_per_request
    given, guessed = priced_tokens(request.sentences, parts.sentence_limits)
    if given > most:
        raise RefusalError(Reason.TOO_MANY_TOKENS, f"{given} tokens are more than {most}")
    return min(given + guessed, most)


async def _prepare(
    request: embed_pb2.EmbedRequest, wanted: Wanted, price: int, room: Reservation, parts: Parts
) -> tuple[list[Prepared], Cost]:
    """Check and tokenise; then room and the caller's tokens are corrected by what it costs in fact."""
    caller = current_call().caller
    parts.caller_limits.charge(caller, price)
    try:
        prepared = await parts.conversions.request(request.ByteSize(), lambda: _prepare_all(request, wanted, parts))
        cost = _cost(prepared, wanted, parts)
        room.resize(cost, parts.retry_after_ms())
    except BaseException:
        parts.caller_limits.correct(caller, -price)  # what isn't admitted costs nothing
        raise
    parts.caller_limits.correct(caller, cost.tokens - price)
    return prepared, cost


def _prepare_all(request: embed_pb2.EmbedRequest, wanted: Wanted, parts: Parts) -> list[Prepared]:
    prepared: list[Prepared] = []
    tokens, limit, sentence_limits = 0, parts.config.max_tokens_per_request, parts.sentence_limits
    for sentence in request.sentences:
        try:
            found = prepare_sentence(sentence, wanted, parts.model, sentence_limits)
        except RefusalError as error:
            prepared.append(error)
            continue
        prepared.append(found)
        tokens += len(found.tokens)
        if tokens > limit:  # tokenising the rest would be for nothing
            raise RefusalError(Reason.TOO_MANY_TOKENS, f"{tokens} tokens and more are more than {limit}")
    return prepared


def _cost(prepared: list[Prepared], wanted: Wanted, parts: Parts) -> Cost:
    sentences = [sentence for sentence in prepared if isinstance(sentence, PreparedSentence)]
    answer_bytes = sum(sentence.answer_bytes(wanted, parts.model) for sentence in sentences)
    if answer_bytes > MAX_RESPONSE_BYTES:
        raise RefusalError(
            Reason.RESPONSE_TOO_LARGE,
            f"the answer would have about {answer_bytes} bytes, more than {MAX_RESPONSE_BYTES}: send fewer sentences, "
            "ask for less of them (layers, pooling, data_type), or use EmbedStream",
        )
    return Cost(sum(len(sentence.tokens) for sentence in sentences), answer_bytes)


async def _compute_all(
    prepared: list[Prepared], wanted: Wanted, call: Call, parts: Parts
) -> list[Outcome | RefusalError]:
    jobs = [
        Job(sentence, wanted, sentence.state, sentence.return_state, call)
        for sentence in prepared
        if isinstance(sentence, PreparedSentence)
    ]
    try:
        outcomes = iter(await _outcomes([parts.inference.submit(job) for job in jobs]))
    finally:
        parts.inference.abandon(call)
    return [sentence if isinstance(sentence, RefusalError) else next(outcomes) for sentence in prepared]


async def _outcomes(futures: list[asyncio.Future[Outcome]]) -> list[Outcome | RefusalError]:
    """Wait for a call's sentences; raise the first refusal, save INTERNAL, which is the sentence's own result."""
    waiting = set(futures)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        for error in filter(None, map(_refusal_of, done)):
            if error.reason is not Reason.INTERNAL:
                raise error
    return [_refusal_of(future) or future.result() for future in futures]


def _refusal_of(future: asyncio.Future[Outcome]) -> RefusalError | None:
    error = future.exception()
    if error is None or isinstance(error, RefusalError):
        return error
    raise error


def _record(prepared: list[Prepared], outcomes: list[Outcome | RefusalError]) -> None:
    call = current_call()
    for sentence, outcome in zip(prepared, outcomes, strict=True):
        if isinstance(sentence, PreparedSentence) and isinstance(outcome, Outcome):
            call.computed(len(sentence.tokens), outcome.queue_s, outcome.inference_s)
        else:
            call.sentence_failed()


def _response(
    prepared: list[Prepared],
    outcomes: list[Outcome | RefusalError],
    wanted: Wanted,
    model: ServedModel,
    answer_bytes: int,
) -> bytes | embed_pb2.EmbedResponse:
    results, done = [], []
    for sentence, outcome in zip(prepared, outcomes, strict=True):
        if isinstance(outcome, RefusalError):
            results.append(embed_pb2.EmbedResult(error=status_of(outcome)))
        elif isinstance(sentence, PreparedSentence):
            done.append((sentence, outcome))
            embedding = responses.embedding(sentence, outcome, wanted, model)
            results.append(embed_pb2.EmbedResult(embedding=embedding))
    response = embed_pb2.EmbedResponse(results=results, usage=responses.usage(done, model))
    return response.SerializeToString() if answer_bytes > INLINE_BYTES else response
