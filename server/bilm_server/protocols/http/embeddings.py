"""/v1/embeddings as OpenAI's clients call it: a vector for each text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

import orjson
from bilm_api.constants import Reason
from bilm_model.engine.types import OutputSpec
from bilm_model.scalar_mix import Pooling, Selection

from bilm_server.embedding.conversions import request_weight
from bilm_server.embedding.preprocessing import item_bytes, row_bytes
from bilm_server.embedding.registry import Registry
from bilm_server.inference.types import Call, Outcome, Result, Sentence
from bilm_server.observability.call_record import current_call
from bilm_server.protocols.http.encodings import ENCODINGS, Encoding, extra_bytes, to_json
from bilm_server.protocols.http.fields import BodyFields, check_count, parse_json, wrong
from bilm_server.protocols.http.messages import HttpRequest, HttpResponse
from bilm_server.served_model import EmbeddingModel

_FIELDS = (
    "input", "model", "encoding_format", "dimensions", "user", "layers", "pooling", "l2_normalize", "priority"
)  # fmt: skip
_LAYERS: Final[dict[str, Literal["top", "average"]]] = {"top": "top", "average": "average"}
_POOLINGS: Final[dict[str, Pooling]] = {"mean": "mean", "max": "max"}

_ITEM_OVERHEAD_BYTES = 64


class Embeddings:
    """The endpoint."""

    def __init__(self, models: Registry) -> None:
        """Set what embeds."""
        self._models = models

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Embed all texts of a request; one that fails by itself fails the call."""
        n_bytes, call = len(request.body), Call(request.deadline_s)
        weight, ceiling = request_weight(n_bytes, 0), current_call().priority
        fields = await self._models.conversions.request(weight, lambda: parse_json(request.body), ceiling)
        fields.check_names(_FIELDS)
        embedder = self._models.find(fields.text("model"), "")
        embedder.prioritise(call, fields.priority())
        output, encoding = _output(fields, embedder.model)
        texts = _texts(fields)
        check_count(embedder.limits, len(texts), "input")
        sentences = _sentences(texts, call, output)
        wire = EmbeddingsFormat(embedder.model, encoding)
        return HttpResponse(await embedder.embed(sentences, n_bytes, wire, fail_as_one=True))


def _output(fields: BodyFields, model: EmbeddingModel) -> tuple[OutputSpec, Encoding]:
    fields.text("user")
    layers = fields.choice("layers", _LAYERS, "top", Reason.LAYERS_INVALID)
    pooling = fields.choice("pooling", _POOLINGS, "mean", Reason.POOLING_INVALID)
    dimensions, width = fields.get("dimensions"), model.width
    if dimensions is not None and (type(dimensions) is not int or dimensions != width):
        raise wrong("dimensions", f"this model's vectors have {width} (expected that, or nothing)")
    encoding = fields.choice("encoding_format", ENCODINGS, "float")
    return OutputSpec(Selection(layers, pooling, fields.flag("l2_normalize"))), encoding


def _texts(fields: BodyFields) -> Sequence[object]:
    found = fields.get("input")
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list):
        raise wrong("input", "expected a string or a list of strings")
    first = found[0] if found else ""
    if isinstance(first, int | list) and not isinstance(first, bool):
        raise wrong(
            "input",
            "expected strings, not the integers of another model's tokenizer "
            "(LangChain's OpenAIEmbeddings sends strings with check_embedding_ctx_length=False)",
        )
    return found


def _sentences(texts: Sequence[object], call: Call, output: OutputSpec) -> list[Sentence]:
    sentences = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong(f"input[{index}]", "expected a string")
        if not text:
            raise wrong(f"input[{index}]", "an empty string has no vector", Reason.POOLING_EMPTY)
        sentences.append(Sentence(call, text, output))
    return sentences


@dataclass(frozen=True)
class EmbeddingsFormat:
    """How results become the response.

    Attributes:
        model: that computes them.
        encoding: of the vectors.
    """

    model: EmbeddingModel
    encoding: Encoding

    def overhead_bytes(self, sentence: Sentence) -> int:
        """Return an upper bound of what a sentence takes beside its vector's four bytes a number."""
        n_bytes = row_bytes(sentence.output, self.model)
        return _ITEM_OVERHEAD_BYTES + extra_bytes(self.encoding, n_bytes, item_bytes(sentence.output), 1)

    def build(self, sentences: Sequence[Sentence], results: Sequence[Outcome]) -> bytes:
        """Return the response; no result is a refusal, since OpenAI's response has no place for one."""
        items = []
        for index, result in enumerate(cast("Sequence[Result]", results)):
            vector = to_json(result.vectors, "float32", self.encoding)
            items.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector))
        n_tokens = sum([len(sentence.tokens) for sentence in sentences])
        return b'{"object":"list","data":[%b],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
            b",".join(items), orjson.dumps(self.model.name), n_tokens, n_tokens
        )  # fmt: skip
