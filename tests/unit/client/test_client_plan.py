"""How sentences are packed into requests."""

from dataclasses import replace

from bilm_api.v1 import embed_pb2 as pb
from bilm_client._core.inputs import parse_sentences
from bilm_client._core.options import Options
from bilm_client._core.plan import RequestCost, cost_of, plan, request_limit
from bilm_client.results import ModelInfo
from bilm_client.testing.service import FakeService
from hypothesis import given
from hypothesis import strategies as st

SERVICE = FakeService()
INFO = ModelInfo.from_proto(SERVICE.get_model())
ALL = Options("all", "none", "float32", None, False, "raise")
POOLED = Options("top", "mean", "float16", None, False, "raise")
TIGHT = replace(
    INFO,
    limits=replace(
        INFO.limits,
        max_sentences_per_request=4,
        max_tokens_per_request=20,
        max_request_bytes=4096 + 200,
        max_response_bytes=4096 + 3000,
    ),
)

sentence = st.one_of(st.text("ab é", max_size=150), st.lists(st.text("aé", min_size=1, max_size=30), max_size=30))


@given(st.lists(sentence, max_size=20), st.sampled_from([ALL, POOLED]), st.booleans())
def test_every_sentence_travels_once_and_within_the_limits(
    sentences: list[str | list[str]], options: Options, return_states: bool
) -> None:
    inputs = parse_sentences(sentences, None, return_states)
    planned = plan(inputs, options, TIGHT)
    travelled = [index for part in planned.parts for index in part]
    assert sorted([*travelled, *planned.oversized, *planned.unsendable]) == list(range(len(inputs)))
    assert travelled == sorted(travelled)
    for part in planned.parts:
        total = sum((cost_of(inputs[index], options, TIGHT) for index in part), RequestCost(0, 0, 0, 0))
        assert total.fits(request_limit(TIGHT.limits))


@given(st.lists(st.lists(st.text("aé\U0001f600", min_size=1), max_size=30), min_size=1, max_size=8), st.booleans())
def test_costs_are_not_below_the_messages(sentences: list[list[str]], return_states: bool) -> None:
    inputs = parse_sentences(sentences, None, return_states)
    request = pb.EmbedRequest(options=ALL.to_proto())
    for source in inputs:
        source.write(request.sentences.add())
    response = SERVICE.embed(request)
    total = sum((cost_of(source, ALL, INFO) for source in inputs), RequestCost(0, 0, 4096, 4096))
    assert request.ByteSize() <= total.request_bytes
    assert response.ByteSize() <= total.response_bytes
    assert response.usage.tokens == total.tokens


def test_what_fits_goes_in_one_request() -> None:
    inputs = parse_sentences(["a b c"] * 100, None, False)
    assert plan(inputs, ALL, INFO).parts == (range(100),)


def test_pooling_makes_answers_small() -> None:
    [source] = parse_sentences([["a"] * 1000], None, False)
    assert cost_of(source, POOLED, INFO).response_bytes < cost_of(source, ALL, INFO).response_bytes / 5
