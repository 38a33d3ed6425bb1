"""One `embed_stream` call as a state machine without I/O: what to send, in which order results leave, what to resend.

A session outlives its connections. A driver reads input while the session `accepts_input`, sends what `add` gives (or,
on a new connection, all that `opening` gives), hands every message to `receive`, takes results with `take`, and asks
`broken` what to do when a connection ends.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

from bilm_api.constants import Feature
from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.chosen import Chosen
from bilm_client._core.inputs import Input, Sentence, parse_sentence
from bilm_client._core.job import EmbedJob, Outcome, agreed_version
from bilm_client._core.keywords import StreamArguments
from bilm_client._core.local_choices import choose_here, whole_options
from bilm_client._core.options import Options
from bilm_client._core.settings import Settings
from bilm_client._core.tensors import Rows
from bilm_client.errors import (
    MalformedResponseError,
    ModelVersionError,
    SentenceError,
    ServiceError,
    UnsupportedError,
    sentence_error,
    version_changed,
)
from bilm_client.policy import RetryPolicy, is_resumable
from bilm_client.results import Embedding


@dataclass(slots=True)
class _Item:
    """A sentence between its reading and the moment when nothing can need it any more.

    Attributes:
        wanted: As the caller gave it.
        source: As it is sent.
    """

    index: int
    wanted: Input
    source: Input
    asks_state: bool
    rows: Rows | None = None
    outcome: Outcome | None = None
    done: bool = False
    failed: bool = False


class ResumableSession:
    """Sentences on their way through one or, after a break, several streams.

    With `carry_state`, sentences stay in hand after their results have left, until a later state makes them
    unnecessary: a new stream starts from the last state and reads them once more, and their second results are dropped.

    Attributes:
        ended: Whether there is no more input.
        options: What is returned.
    """

    def __init__(
        self, arguments: StreamArguments, settings: Settings, *, uniform: Callable[[], float], version: str = ""
    ) -> None:
        self.options: Options = arguments
        self._asked: Options = arguments  # of the server
        self._model = settings.model
        self._asks_first = arguments.needs_features or settings.watches_model
        self._retry: RetryPolicy = settings.retry
        self._window = arguments.window
        self._window_tokens = arguments.window_tokens
        self._uniform = uniform
        self._carry = arguments.carry_state
        self._every = arguments.return_state_every
        self._expected = version or settings.expected_model_version
        self._version = self._expected
        self._items: dict[int, _Item] = {}
        self._added = 0  # items read from the input
        self._done = 0  # items with a result
        self._next = 0  # the item whose result leaves next
        self._tokens = 0  # of the items from there on
        self._checkpoint = 0  # the first item that `_state` precedes
        self._state = arguments.initial_state or b""
        self._owes_state = False
        self._failures = 0
        self.ended = False
        self._priority: pb.Priority = pb.PRIORITY_UNSPECIFIED
        self._features: Collection[str] | None = None  # None: the server wasn't asked

    @property
    def accepts_input(self) -> bool:
        """Whether another sentence may be read; one always may while none is under way."""
        if self.ended or self._added - self._next >= self._window:
            return False
        return self._tokens < self._window_tokens

    @property
    def ready(self) -> bool:
        """Whether `take` has a result."""
        item = self._items.get(self._next)
        return item is not None and item.outcome is not None

    @property
    def awaiting(self) -> bool:
        """Whether a sentence that was read has no result yet."""
        return self._done < self._added

    @property
    def finished(self) -> bool:
        """Whether every result has left."""
        return self.ended and self._next == self._added

    def must_learn(self, source: Input) -> bool:
        """Return whether the server must be asked for its model, and `learn` be called, before a sentence is added."""
        return self._features is None and (self._asks_first or source.choice is not None)

    def learn(self, features: Collection[str], priority: pb.Priority) -> None:
        """Take what the server can do, and what each stream states, see `StatedPriority`."""
        self._features, self._priority = features, priority

    def add(self, source: Input) -> pb.EmbedStreamRequest:
        """Take a sentence in; the message for a stream that is open already.

        Raises:
            ValueError: The sentence has spans, and nothing is pooled.
            UnsupportedError: Neither the server nor the client can choose what the sentence asks for.
        """
        index, sent = self._added, source
        if source.choice is not None:
            source.choice.check_pool(f"sentence {index}", self.options)
            if Feature.SELECTION not in (self._features or ()):
                sent = replace(source, choice=None)
                self._ask_whole()
        asks = source.return_state or self._at_interval(index) or self._owes_state
        self._owes_state = False
        self._items[index] = item = _Item(index, source, sent, asks)
        self._added += 1
        self._tokens += source.chosen_estimate
        return _item_message(item)

    def opening(self) -> list[pb.EmbedStreamRequest]:
        """Return the first messages of a new stream: the options, and every sentence that it has to see."""
        start = pb.StreamStart(
            model=self._model,
            expected_model_version=self._version,
            options=self._asked.to_proto(),
            carry_state=self._carry,
            priority=self._priority,
        )
        again = [item for item in self._items.values() if self._is_needed(item)]
        for item in again:
            item.rows = None
        # States are asked for item by item: a count by the server would start anew with each stream.
        states = [self._state if self._carry else None] + [None] * len(again)
        items = [_item_message(item, state) for item, state in zip(again, states, strict=False)]
        return [pb.EmbedStreamRequest(start=start), *items]

    def receive(self, response: pb.EmbedStreamResponse) -> None:
        """Take a message from the server.

        Raises:
            MalformedResponseError: It breaks the contract.
            ModelVersionChangedError: Another version answered than before.
            SentenceError: A sentence that had to be read again, to restore the state, failed this time.
        """
        item = self._items.get(response.id)
        if item is None or (item.done and not (self._carry and item.index >= self._checkpoint)):
            raise MalformedResponseError(f"a result for {response.id}, which isn't in flight")
        self._version = agreed_version(self._version, response.usage.model_version)
        outcome = self._outcome(item, response)
        if outcome is not None:
            self._settle(item, outcome)

    def take(self) -> Outcome | None:
        """Return the next result in input order, or None if it isn't there yet.

        Raises:
            SentenceError: The sentence failed, with on_error="raise".
        """
        item = self._items.get(self._next)
        if item is None or item.outcome is None:
            return None
        outcome, item.outcome = item.outcome, None
        self._next += 1
        self._tokens -= item.wanted.chosen_estimate
        if not self._carry or item.failed or item.index < self._checkpoint:
            del self._items[item.index]
        if isinstance(outcome, SentenceError) and self.options.raises:
            raise outcome
        return outcome

    def broken(self, error: ServiceError) -> float:
        """Return seconds to wait before the next connection.

        Raises:
            ServiceError: `error`, where another attempt can't help or none is left.
        """
        if isinstance(error, ModelVersionError) and self._version != self._expected:
            raise version_changed(self._version, "another one") from error
        self._failures += 1
        if not is_resumable(error) or self._failures >= self._retry.max_attempts:
            raise error
        if error.pushback_ms is not None:
            return error.pushback_ms / 1000
        return self._retry.backoff_s(self._failures, self._uniform())

    def _ask_whole(self) -> None:
        """Ask for what choosing on this side needs, from the first sentence on."""
        whole = whole_options(self.options)
        if whole is not self.options and self._asked is self.options:
            if self._added:
                raise UnsupportedError(
                    "the server can't choose rows or spans, and the stream pools whole sentences already: "
                    "begin it with a Chosen, or use embed"
                )
            self._asked = whole

    def _at_interval(self, index: int) -> bool:
        return self._carry and (index + 1) % self._every == 0

    def _is_needed(self, item: _Item) -> bool:
        if not item.done:
            return True
        return self._carry and not item.failed and item.index >= self._checkpoint

    def _outcome(self, item: _Item, response: pb.EmbedStreamResponse) -> Outcome | None:
        match response.WhichOneof("outcome"):
            case "error":
                return sentence_error(response.error, item.index)
            case "rows":
                item.rows = item.rows or Rows(item.source, self._asked)
                return self._finished(item, item.rows) if item.rows.add(response.rows) else None
            case _:
                raise MalformedResponseError(f"a message for {item.index} without an outcome")

    def _finished(self, item: _Item, rows: Rows) -> Outcome:
        found = rows.embedding(self._version)
        if item.source is item.wanted and self._asked is self.options:
            return found
        return choose_here(found, item.wanted, self.options, item.index)

    def _settle(self, item: _Item, outcome: Outcome) -> None:
        item.rows = None
        if isinstance(outcome, Embedding):
            outcome = self._keep_state(item, outcome)
        elif item.done:
            raise outcome  # the state that later sentences continue from can't be restored
        if item.done:
            return
        item.done, item.outcome = True, outcome
        item.failed = isinstance(outcome, SentenceError)
        self._owes_state |= self._carry and item.failed and item.asks_state
        self._done += 1
        self._failures = 0  # only a first result is progress: reading again what was known could continue for ever

    def _keep_state(self, item: _Item, embedding: Embedding) -> Embedding:
        if self._carry and embedding.state is not None:
            if any(not other.done for other in self._items.values() if other.index < item.index):
                raise MalformedResponseError(f"with a carried state, {item.index} came before an earlier result")
            self._checkpoint, self._state = item.index + 1, embedding.state
            for index in [i for i in self._items if i < min(self._checkpoint, self._next)]:
                del self._items[index]
        wanted = item.source.return_state or self._at_interval(item.index)
        return embedding if wanted else replace(embedding, state=None)


def stream_by_job(settings: Settings, job: EmbedJob, uniform: Callable[[], float]) -> ResumableSession:
    """Return the session for those sentences of a job that an Embed can't bring."""
    options = {each.name: getattr(job.options, each.name) for each in fields(Options)}
    options["on_error"] = "return"  # the job settles, by the sentence's number in the call
    session = ResumableSession(StreamArguments(**options), settings, uniform=uniform, version=job.version)
    session.learn(job.features, job.priority)
    return session


def stream_input(sentence: Sentence, index: int, return_state: bool) -> Input:
    """Check one sentence of a stream.

    Raises:
        TypeError: It is neither a str, nor a sequence of str, nor `Chosen`.
        ValueError: A string can't be written as UTF-8.
    """
    return parse_sentence(sentence, f"sentence {index}", return_state=return_state)


def check_iterable(sentences: object) -> None:
    """Check the input of `embed_stream`: a lone str would be taken for a sequence of letters.

    Raises:
        TypeError: It is a str, bytes or `Chosen`.
    """
    if isinstance(sentences, str | bytes | bytearray | Chosen):
        raise TypeError(f"sentences must be an iterable of sentences, got one {type(sentences).__name__}")


def _item_message(item: _Item, state: bytes | None = None) -> pb.EmbedStreamRequest:
    message = pb.EmbedStreamRequest()
    message.item.id = item.index
    item.source.write(message.item.sentence, state=state or None, return_state=item.asks_state)
    return message
