"""One `embed` call as a state machine without I/O: which request next, and what its response means."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

import grpc
from bilm_api.constants import Feature, Reason
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.chosen import Chosen
from bilm_client._core.inputs import Input, Sentence, parse_sentences
from bilm_client._core.keywords import EmbedArguments
from bilm_client._core.local_choices import choose_here, whole_options
from bilm_client._core.options import Options
from bilm_client._core.plan import NO_COST, RequestCost, plan, shared_limit
from bilm_client._core.settings import Settings
from bilm_client._core.tensors import to_embedding
from bilm_client.errors import (
    MalformedResponseError,
    ModelVersionError,
    RequestTooLargeError,
    SentenceError,
    ServiceError,
    sentence_error,
    version_changed,
)
from bilm_client.policy import broke_off
from bilm_client.results import Embedding, ModelInfo

Outcome = Embedding | SentenceError

PARTS_IN_FLIGHT = 4
_TOO_MUCH = frozenset({Reason.RESPONSE_TOO_LARGE, Reason.TOO_MANY_TOKENS, Reason.TOO_MANY_SENTENCES})


class EmbedJob:
    """The sentences of one call on their way.

    Where some of them are `Chosen` and the server can't choose, all are asked for whole and cut when they are settled.

    A driver takes parts with `take()`, sends `request(part)`, and hands back what came by `succeed` or `fail`, until
    `take()` gives None with nothing under way; then it sends what `by_stream` names by stream.
    """

    def __init__(self, inputs: list[Input], options: Options, settings: Settings) -> None:
        self.inputs = self._wanted = inputs
        self.options = self._wanted_options = options
        self.by_stream: list[int] = []
        self._model = settings.model
        self._expected = settings.expected_model_version
        self._retries = settings.retry.max_attempts > 1
        self._version = self._expected
        self._parts: deque[range] = deque()
        self._in_flight = 0
        self._outcomes: dict[int, Outcome] = {}
        self._total = self._shared_limit = NO_COST
        self._priority: pb.Priority = pb.PRIORITY_UNSPECIFIED
        self.features: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """The model version that responses must have; "" as long as any will do."""
        return self._version

    @property
    def priority(self) -> pb.Priority:
        """What requests state; known after `plan`."""
        return self._priority

    @property
    def cost(self) -> RequestCost:
        """What all sentences take together; known after `plan`."""
        return self._total

    @property
    def shared_limit(self) -> RequestCost:
        """What a request that the job shares with others may take; known after `plan`."""
        return self._shared_limit

    def plan(self, info: ModelInfo, priority: pb.Priority = pb.PRIORITY_UNSPECIFIED) -> None:
        """Cut the sentences into parts.

        Args:
            info: The server's model, limits and features.
            priority: What requests state, see `StatedPriority`.

        Raises:
            ValueError: The mix doesn't fit the model.
            RequestTooLargeError: A sentence is larger than a request, with on_error="raise".
        """
        self.options.check_layer_count(info.layer_count)
        self._priority, self.features = priority, info.features
        if Feature.SELECTION not in info.features and any(source.choice is not None for source in self.inputs):
            self.inputs = [replace(source, choice=None) for source in self.inputs]
            self.options = whole_options(self.options)
        planned = plan(self.inputs, self.options, info)
        self._total, self._shared_limit = planned.total, shared_limit(info.limits)
        self._parts.extend(planned.parts)
        self.by_stream.extend(planned.oversized)
        for index in planned.unsendable:
            self.settle(index, _too_large(self.inputs[index], index, info))

    @property
    def takes_more(self) -> bool:
        """Whether `take` has a part."""
        # Until the first response brings the version, a second request could be computed by another one.
        return bool(self._parts) and self._in_flight < (PARTS_IN_FLIGHT if self._version else 1)

    def take(self) -> range | None:
        """Return the next part to send, or None: wait for a response first, or nothing is left."""
        if not self.takes_more:
            return None
        self._in_flight += 1
        return self._parts.popleft()

    def put_back(self, part: range) -> None:
        """Take back a part that is to be sent once more."""
        self._in_flight -= 1
        self._parts.appendleft(part)

    def request(self, part: range) -> pb.EmbedRequest:
        """Return the message for a part."""
        return self.message([self.inputs[index] for index in part])

    def message(self, inputs: Sequence[Input]) -> pb.EmbedRequest:
        """Return a message with the job's options for any sentences."""
        # The client knows tokens that it sent, so the server need not send them back.
        omit_tokens = all(source.tokens is not None for source in inputs)
        request = pb.EmbedRequest(
            model=self._model,
            expected_model_version=self._version,
            options=self.options.to_proto(omit_tokens=omit_tokens),
            priority=self._priority,
        )
        for source in inputs:
            source.write(request.sentences.add())
        return request

    def succeed(self, part: range, response: pb.EmbedResponse) -> None:
        """Take the response of a part.

        Raises:
            SentenceError: A sentence failed, with on_error="raise".
            ModelVersionChangedError: Another version answered than before.
            MalformedResponseError: The response breaks the contract.
        """
        self.take_results(part, response.results, response.usage.model_version)

    def take_results(self, part: range, results: Sequence[pb.EmbedResult], model_version: str) -> None:
        """Take the results of a part, which may have come with those of other calls; raises as `succeed`."""
        self._in_flight -= 1
        self._version = agreed_version(self._version, model_version)
        if len(results) != len(part):
            raise MalformedResponseError(f"expected {len(part)} results, got {len(results)}")
        for index, result in zip(part, results, strict=True):
            self.settle(index, self._outcome(index, result))

    def fail(self, part: range, error: ServiceError) -> None:
        """Take the failure of a part: one that was too much is cut in two, or goes by stream.

        So does one whose connection broke in the middle of the response: gRPC retries no call that has got a part of
        its response already, and a stream outlives its connections.

        Raises:
            ServiceError: `error`, where cutting can't help.
        """
        self._in_flight -= 1
        if error.reason in _TOO_MUCH:
            self._cut(part)
        elif self._retries and broke_off(error):
            self.by_stream.extend(part)
        elif isinstance(error, ModelVersionError) and self._version != self._expected:
            raise version_changed(self._version, "another one") from error
        else:
            raise error

    def settle(self, index: int, outcome: Outcome) -> None:
        """Record what became of a sentence.

        Raises:
            SentenceError: `outcome`, with on_error="raise".
        """
        if isinstance(outcome, Embedding) and self.inputs is not self._wanted:
            outcome = choose_here(outcome, self._wanted[index], self._wanted_options, index)
        if isinstance(outcome, SentenceError) and self.options.raises:
            raise outcome
        self._outcomes[index] = outcome

    def results(self) -> list[Outcome]:
        """Return one outcome for each sentence, in order."""
        return [self._outcomes[index] for index in range(len(self.inputs))]

    def _cut(self, part: range) -> None:
        if len(part) == 1:
            self.by_stream.append(part.start)
            return
        middle = part.start + len(part) // 2
        self._parts.extendleft((range(middle, part.stop), range(part.start, middle)))

    def _outcome(self, index: int, result: pb.EmbedResult) -> Outcome:
        match result.WhichOneof("outcome"):
            case "embedding":
                return to_embedding(result.embedding, self.inputs[index], self.options, self._version)
            case "error":
                return sentence_error(result.error, index)
            case _:
                raise MalformedResponseError(f"sentence {index} has no outcome")


def embed_job(settings: Settings, sentences: str | Chosen | Iterable[Sentence], arguments: EmbedArguments) -> EmbedJob:
    """Check the sentences of an `embed`, and return the job that embeds them.

    Raises:
        TypeError: A sentence or a state has the wrong type; the message names it.
        ValueError: A sentence has a value that can't be; the message names it.
    """
    inputs = parse_sentences(sentences, arguments.states, arguments.return_states)
    for index, source in enumerate(inputs):
        if source.choice is not None:
            source.choice.check_pool(f"sentences[{index}]", arguments)
    return EmbedJob(inputs, arguments, settings)


def agreed_version(expected: str, found: str) -> str:
    """Return the version that all responses share; `expected` is "" before the first.

    Raises:
        ModelVersionChangedError: They differ.
    """
    if expected and found and expected != found:
        raise version_changed(expected, found)
    return expected or found


def at_index(outcome: Outcome, index: int) -> Outcome:
    """Return the outcome of a sentence that was number `index` of the call, whatever its number on its way."""
    if isinstance(outcome, SentenceError):
        return type(outcome)(outcome.message, index=index, reason=outcome.reason, code=outcome.code)
    return outcome


def _too_large(source: Input, index: int, info: ModelInfo) -> RequestTooLargeError:
    limit = info.limits.max_request_bytes
    return RequestTooLargeError(
        f"about {source.request_bytes} bytes, and a request may have {limit}",
        index=index,
        reason="REQUEST_TOO_LARGE",
        code=grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
