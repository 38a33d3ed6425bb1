"""Cuts the sentences of a call into requests that fit the limits. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from bilm_client._core.inputs import Input
from bilm_client._core.options import Options
from bilm_client.results import Limits, ModelInfo

# Sentences and tokens of an Embed that several calls share.
SHARED_SENTENCES = 64
SHARED_TOKENS = 2048
# Names, versions, options and mix weights of a request; usage of a response.
_MESSAGE_OVERHEAD_BYTES = 4096
# Tags, lengths and shape of one result, and tag, length, start and end of one of its tokens, at most.
_RESULT_OVERHEAD_BYTES = 64
_TOKEN_OVERHEAD_BYTES = 16


@dataclass(frozen=True, slots=True)
class RequestCost:
    """What one sentence, or a whole request, takes of each limit."""

    sentences: int
    tokens: int
    request_bytes: int
    response_bytes: int

    def __add__(self, other: "RequestCost") -> "RequestCost":
        return RequestCost(
            self.sentences + other.sentences,
            self.tokens + other.tokens,
            self.request_bytes + other.request_bytes,
            self.response_bytes + other.response_bytes,
        )

    def fits(self, limit: "RequestCost") -> bool:
        """Return whether no limit is exceeded."""
        return (
            self.sentences <= limit.sentences
            and self.tokens <= limit.tokens
            and self.request_bytes <= limit.request_bytes
            and self.response_bytes <= limit.response_bytes
        )


NO_COST = RequestCost(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sentences of a call travel, by index.

    Attributes:
        parts: Runs of sentences, one request each.
        oversized: Sentences that fit no Embed alone and go by stream.
        unsendable: Sentences that fit no request at all.
        total: What all sentences take together.
    """

    parts: tuple[range, ...]
    oversized: tuple[int, ...]
    unsendable: tuple[int, ...]
    total: RequestCost


@lru_cache(maxsize=16)  # asked for by each call
def request_limit(limits: Limits) -> RequestCost:
    """Return what one Embed may take at most."""
    return RequestCost(
        limits.max_sentences_per_request,
        limits.max_tokens_per_request,
        limits.max_request_bytes - _MESSAGE_OVERHEAD_BYTES,
        limits.max_response_bytes - _MESSAGE_OVERHEAD_BYTES,
    )


@lru_cache(maxsize=16)
def shared_limit(limits: Limits) -> RequestCost:
    """Return what one Embed that several calls share may take at most: less than a server's limits are by default."""
    limit = request_limit(limits)
    sentences, tokens = min(limit.sentences, SHARED_SENTENCES), min(limit.tokens, SHARED_TOKENS)
    return replace(limit, sentences=sentences, tokens=tokens)


def cost_of(source: Input, options: Options, info: ModelInfo) -> RequestCost:
    """Return what one sentence takes; for text, from the estimate of its tokens."""
    tokens = source.chosen_estimate
    rows = source.rows_chosen(options)
    if rows is None:
        rows = 1 if options.pooled else source.token_estimate
    tensor_bytes = rows * options.layers_returned(info.layer_count) * info.width * options.item_bytes
    text_bytes = source.text_bytes + tokens * _TOKEN_OVERHEAD_BYTES
    state_bytes = info.state_bytes if source.return_state else 0
    response_bytes = tensor_bytes + text_bytes + state_bytes + _RESULT_OVERHEAD_BYTES
    return RequestCost(1, tokens, source.request_bytes, response_bytes)


def total_of(costs: Sequence[RequestCost]) -> RequestCost:
    """Return what several sentences or requests take together."""
    if len(costs) == 1:
        return costs[0]
    return RequestCost(
        sum(cost.sentences for cost in costs),
        sum(cost.tokens for cost in costs),
        sum(cost.request_bytes for cost in costs),
        sum(cost.response_bytes for cost in costs),
    )


def plan(inputs: Sequence[Input], options: Options, info: ModelInfo) -> Plan:
    """Pack the sentences, in order, into as few requests as fit."""
    limit = request_limit(info.limits)
    costs = [cost_of(source, options, info) for source in inputs]
    total = total_of(costs)
    if total.fits(limit):
        return Plan((range(len(inputs)),), (), (), total)
    unsendable = tuple(i for i, cost in enumerate(costs) if cost.request_bytes > limit.request_bytes)
    apart = set(unsendable)
    oversized = tuple(i for i, cost in enumerate(costs) if i not in apart and not cost.fits(limit))
    return Plan(tuple(_pack(costs, apart | set(oversized), limit)), oversized, unsendable, total)


def _pack(costs: Sequence[RequestCost], apart: set[int], limit: RequestCost) -> Iterator[range]:
    first, total = 0, NO_COST
    for index, cost in enumerate(costs):
        if index not in apart and (total + cost).fits(limit):
            total += cost
            continue
        if total.sentences:
            yield range(first, index)
        first, total = (index + 1, NO_COST) if index in apart else (index, cost)
    if total.sentences:
        yield range(first, len(costs))
