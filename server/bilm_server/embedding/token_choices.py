"""Which tokens of a sentence come back: what a request asks for, checked against the sentence's tokens."""

from bilm_api.constants import MAX_CHOSEN_PER_TOKEN, Reason
from bilm_model.engine.choices import choose_byte_spans, choose_rows, choose_spans
from bilm_model.engine.types import TokenChoice
from bilm_model.errors import ChoiceError

from bilm_server.errors import RefusalError
from bilm_server.inference.types import AskedTokens, Sentence


def choose(asked: AskedTokens, sentence: Sentence, text_bytes: int | None, max_tokens: int) -> TokenChoice:
    """Return the choice of tokens that a request asks for.

    Args:
        asked: what it asks for.
        sentence: tokenised.
        text_bytes: length of the text that it was; None: it came as tokens.
        max_tokens: that may be chosen, each counted as often as it is; `MAX_CHOSEN_PER_TOKEN` of each may be fewer.

    Raises:
        RefusalError: SELECTION_INVALID.
    """
    max_tokens = min(max_tokens, MAX_CHOSEN_PER_TOKEN * len(sentence.tokens))
    try:
        if asked.rows is not None:
            return choose_rows(asked.rows, sentence.tokens, max_tokens)
        if not sentence.output.pooled:
            raise ChoiceError("spans: they need a pooling")
        return _choose_spans(asked, sentence, text_bytes, max_tokens)
    except ChoiceError as error:
        raise RefusalError(Reason.SELECTION_INVALID, str(error)) from error


def _choose_spans(asked: AskedTokens, sentence: Sentence, text_bytes: int | None, max_tokens: int) -> TokenChoice:
    match asked.unit:
        case "tokens":
            return choose_spans(asked.spans, len(sentence.tokens), max_tokens)
        case "bytes":
            if text_bytes is None:
                raise ChoiceError("spans.unit: bytes need a text, and the sentence came as tokens")
            return choose_byte_spans(asked.spans, text_bytes, sentence.starts, sentence.ends, max_tokens)
        case unit:
            raise ChoiceError(f"spans.unit: unsupported value {unit} (expected tokens or bytes)")
