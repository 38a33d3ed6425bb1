"""The caller's sentences, checked and counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bilm_api.v1 import embed_pb2 as pb

from bilm_client._core.chosen import Choice, Chosen
from bilm_client._core.options import Options

WholeSentence = str | Sequence[str]
"""Raw text, which the server tokenises, or the tokens themselves."""
Sentence = WholeSentence | Chosen
"""All of a sentence, or chosen tokens of one."""

# Bytes that a sentence, and each of its tokens, takes on the wire besides its text (tags and lengths, at most).
_SENTENCE_OVERHEAD_BYTES = 32
_TOKEN_OVERHEAD_BYTES = 6
# What a tokenizer makes of words: punctuation is cut off.
_TOKENS_PER_WORD = 1.5
_TOKENS_SPARE = 2


@dataclass(frozen=True, slots=True)
class Input:
    """One sentence to embed.

    Attributes:
        text: The text, or None where the sentence came as tokens.
        tokens: The tokens, or None where the sentence came as text.
        text_bytes: UTF-8 bytes of either.
        state: The state to continue from, or b"".
        return_state: Whether the caller wants the state after the sentence.
        choice: Which tokens come back; None: all.
    """

    text: str | None
    tokens: tuple[str, ...] | None
    text_bytes: int
    state: bytes = b""
    return_state: bool = False
    choice: Choice | None = None

    @property
    def token_estimate(self) -> int:
        """Tokens of the sentence; a guess from its words where it is text."""
        if self.tokens is not None:
            return len(self.tokens)
        return int(len((self.text or "").split()) * _TOKENS_PER_WORD) + _TOKENS_SPARE

    @property
    def request_bytes(self) -> int:
        """Bytes that the sentence takes in a request, at most."""
        tokens = _TOKEN_OVERHEAD_BYTES * len(self.tokens or ())
        choice = 0 if self.choice is None else self.choice.request_bytes
        return self.text_bytes + tokens + len(self.state) + choice + _SENTENCE_OVERHEAD_BYTES

    @property
    def chosen_estimate(self) -> int:
        """Tokens that are read, or that are chosen, if those are more; a guess where the sentence is text."""
        choice = self.choice
        if choice is None:
            return self.token_estimate
        return max(self.token_estimate, choice.token_estimate)

    @property
    def has_spans(self) -> bool:
        """Whether its vectors are those of spans."""
        return self.choice is not None and self.choice.rows is None

    def rows_chosen(self, options: Options) -> int | None:
        """Return how many rows, or spans, its vectors have; None: nothing is chosen, or rows are pooled to one."""
        if self.choice is None:
            return None
        if self.choice.rows is None:
            return len(self.choice.spans)
        return None if options.pooled else len(self.choice.rows)

    def tokens_expected(self, options: Options) -> tuple[str, ...] | None:
        """Return the tokens that belong to its vectors, in their order; None: the server says."""
        choice = self.choice
        if self.tokens is None or options.pooled or choice is None or choice.rows is None:
            return self.tokens
        return tuple(self.tokens[row] for row in choice.rows if row < len(self.tokens))

    def write(self, message: pb.Sentence, *, state: bytes | None = None, return_state: bool | None = None) -> None:
        """Write the sentence into an empty message; `state` and `return_state`, where given, replace the input's."""
        message.state = self.state if state is None else state
        message.return_state = self.return_state if return_state is None else return_state
        if self.tokens is None:
            message.text = self.text or ""
        else:
            message.tokens.SetInParent()  # of a sentence without tokens, too
            message.tokens.tokens.extend(self.tokens)
        if self.choice is not None:
            self.choice.write(message)


def parse_sentences(
    sentences: str | Chosen | Iterable[Sentence], states: Sequence[bytes | None] | None, return_states: bool
) -> list[Input]:
    """Check the arguments of `embed`; a single str or `Chosen` is one sentence.

    Raises:
        TypeError: A sentence is neither a str nor a sequence of str, or a state isn't bytes.
        ValueError: A string can't be written as UTF-8, or `states` has another length than `sentences`.
    """
    if isinstance(sentences, str | Chosen):
        sentences = [sentences]
    if not isinstance(sentences, Iterable) or _is_bytes(sentences):
        raise TypeError(f"sentences must be a str or a list of sentences, got {type(sentences).__name__}")
    listed = list(sentences)
    if states is not None and len(states) != len(listed):
        raise ValueError(f"states must have one entry for each of the {len(listed)} sentences, got {len(states)}")
    given = states if states is not None else [None] * len(listed)
    check_bool("return_states", return_states)
    return [
        parse_sentence(sentence, f"sentences[{index}]", check_state(f"states[{index}]", state), return_states)
        for index, (sentence, state) in enumerate(zip(listed, given, strict=True))
    ]


def parse_sentence(sentence: Sentence, name: str, state: bytes = b"", return_state: bool = False) -> Input:
    """Check one sentence; `name` is what messages call it.

    Raises:
        TypeError: It is neither a str, nor a sequence of str, nor `Chosen`.
        ValueError: A string can't be written as UTF-8.
    """
    if isinstance(sentence, Chosen):
        found = parse_sentence(sentence.sentence, name, state, return_state)
        return replace(found, choice=sentence.choice())
    if isinstance(sentence, str):
        return Input(sentence, None, _utf8_bytes(sentence, name), state, return_state)
    if not isinstance(sentence, Sequence) or _is_bytes(sentence):
        raise TypeError(f"{name} must be a str or a list of str, got {type(sentence).__name__}")
    tokens = tuple(sentence)
    return Input(None, tokens, _utf8_bytes_of_all(tokens, name), state, return_state)


def check_state(name: str, state: bytes | None) -> bytes:
    """Return the state as bytes, b"" for None.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(state, bytes | None):
        raise TypeError(f"{name} must be bytes or None, got {type(state).__name__}")
    return state or b""


def check_bool(name: str, value: bool) -> None:
    """Check a switch.

    Raises:
        TypeError: It isn't a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _is_bytes(value: object) -> bool:
    return isinstance(value, bytes | bytearray | memoryview)  # sequences too, but of numbers


def _utf8_bytes_of_all(tokens: tuple[str, ...], name: str) -> int:
    try:
        text = "".join(tokens)  # checks and counts all tokens at once
        return len(text) if text.isascii() else len(text.encode())
    except (TypeError, UnicodeEncodeError):
        return sum(_token_bytes(token, f"{name}[{position}]") for position, token in enumerate(tokens))


def _token_bytes(token: str, name: str) -> int:
    if not isinstance(token, str):
        raise TypeError(f"{name} must be a str, got {type(token).__name__}")
    return _utf8_bytes(token, name)


def _utf8_bytes(text: str, name: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text that UTF-8 can hold, got a lone surrogate at {error.start}") from error
