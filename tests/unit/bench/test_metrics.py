"""bilm-bench, without a server: when calls are sent, with what, and what is made of the counts."""

import math
import pickle
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from bilm_api.v1 import embed_pb2 as pb
from bilm_bench.conditions import Condition, flat
from bilm_bench.resources import Resources, of_process
from bilm_bench.statistics.counters import StepCounters
from bilm_bench.statistics.histogram import Histogram
from bilm_bench.statistics.metrics import metrics_of_nothing, resource_metrics, slope_per_hour, step_metrics
from bilm_bench.workload.calls import CallKind, CallResult, Request, make_requests
from bilm_bench.workload.schedule import arrivals_s, in_rounds, parse_duration_s, parse_ramp
from bilm_bench.workload.texts import read_sentences
from bilm_client._core.options import Options
from bilm_client.cli.settings_sources import UsageError

TIMEOUT_S = 10.0
REQUEST = Request(b"", (0, 1), 7)
COMMON = pb.EmbedRequest(options=Options("all", "none", "float32", None, False, "return").to_proto())


def histogram(*seconds: float) -> Histogram:
    found = Histogram()
    for value in seconds:
        found.record(value)
    return found


# ---- histogram ----


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9, 100])
def test_a_percentile_is_at_most_one_percent_off(percent: float) -> None:
    values = np.sort(np.random.default_rng(0).lognormal(-4, 2, 20_000))
    exact = values[math.ceil(len(values) * percent / 100) - 1]
    assert histogram(*values).percentile_s(percent) == pytest.approx(exact, rel=0.01)


def test_a_histogram_takes_no_more_room_for_more_values_and_none_is_out_of_range() -> None:
    found = histogram(0.0, 1e-9, 1e9)
    assert (found.count, found.max_s) == (3, 1e9)
    assert found.percentile_s(50) == pytest.approx(1e-6, rel=0.01)
    assert found.percentile_s(100) == pytest.approx(1e5, rel=0.03)  # the last bucket: a day and more
    assert len(pickle.dumps(found)) < 20_000


def test_nothing_has_no_percentile() -> None:
    assert Histogram().percentile_s(99) is None


def test_one_value_is_every_percentile_exactly() -> None:
    assert histogram(0.1234).percentile_s(50) == histogram(0.1234).percentile_s(99.9) == 0.1234


def test_merged_histograms_are_the_histogram_of_both() -> None:
    both, one, other = histogram(0.1, 0.2, 0.3, 9.0), histogram(0.1, 9.0), histogram(0.2, 0.3)
    one.merge(other)
    for percent in (25, 50, 75, 100):
        assert one.percentile_s(percent) == both.percentile_s(percent)
    assert (one.count, one.max_s) == (4, 9.0)


# ---- schedule ----


def test_ramps() -> None:
    assert parse_ramp("50,100,200") == (50, 100, 200)
    assert parse_ramp("50:200:4") == (50, 100, 150, 200)
    assert parse_ramp("7") == (7,)


@pytest.mark.parametrize(
    "text", ["", "a", "1,,2", "1:2", "1:2:1", "1:2:2.5", "0,1", "1,-1", "1,nan", "1,inf", "1:2:999"]
)
def test_what_is_no_ramp(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|positive"):
        parse_ramp(text)


def test_durations() -> None:
    assert [parse_duration_s(text) for text in ("90", "90s", "1.5m", "2h", "1d")] == [90, 90, 90, 7200, 86400]
    for text in ("", "0s", "-1s", "1 w", "s"):
        with pytest.raises(ValueError, match="expected a duration"):
            parse_duration_s(text)


def test_arrivals_are_those_of_a_poisson_process() -> None:
    moments = list(arrivals_s(200, 100, Random(1)))
    gaps = np.diff([0.0, *moments])
    assert moments[-1] < 100
    assert len(moments) == pytest.approx(200 * 100, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.05)  # exponential; 0 would be a metronome
    assert moments == list(arrivals_s(200, 100, Random(1)))
    assert moments != list(arrivals_s(200, 100, Random(2)))


def test_every_request_is_sent_once_a_round_in_another_order() -> None:
    order = in_rounds(range(20), Random(3))
    rounds = [[next(order) for _ in range(20)] for _ in range(2)]
    assert [sorted(one) for one in rounds] == [list(range(20))] * 2
    assert rounds[0] != rounds[1]


# ---- text ----

RUNNING = " = Title = \n\n He ran . She did too ? Yes\n\n Late . \n"


def read(path: Path, *, running: bool = False, raw: bool = False, at_most: int = 100) -> list[object]:
    return list(read_sentences(path, running=running, raw=raw, at_most=at_most))


def test_a_sentence_a_line(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("One  line .\n\n = not a title =\n", encoding="utf-8")
    assert read(path) == [["One", "line", "."], ["=", "not", "a", "title", "="]]
    assert read(path, raw=True) == ["One line .", "= not a title ="]
    assert read(path, at_most=1) == [["One", "line", "."]]


def test_running_text_is_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(RUNNING, encoding="utf-8")
    assert read(path, running=True) == [["He", "ran", "."], ["She", "did", "too", "?"], ["Yes"], ["Late", "."]]
    path.write_text("It is 1.5 m. So it is!\n", encoding="utf-8")
    assert read(path, running=True, raw=True) == ["It is 1.5 m.", "So it is!"]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None])
def test_a_text_without_sentences(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="text: "):
        read(path)


def test_calls_of_many_sentences_take_neighbours_and_begin_anew_at_the_end() -> None:
    sentences = [["a"], ["b", "b"], ["c", "c", "c"]]
    requests = make_requests(sentences, 2, COMMON)
    assert [(request.indices, request.n_tokens) for request in requests] == [((0, 1), 3), ((2, 0), 4)]
    assert make_requests(sentences[:1], 3, COMMON)[0].indices == (0, 0, 0)


# ---- tally ----


def ended(tally: StepCounters, answer: CallResult, since_meant_s: float = 0.2, since_sent_s: float = 0.1) -> None:
    tally.meant(REQUEST)
    tally.ended(answer, since_meant_s, since_sent_s, TIMEOUT_S)


def test_accepted_refused_and_failed_calls_are_kept_apart() -> None:
    tally = StepCounters(length_s=2.0)
    accepted = CallResult(
        CallKind.ACCEPTED, sentences=1, tokens=7, sentence_errors=Counter(TOKEN_EMPTY=1), checked=2, wrong=1
    )
    ended(tally, accepted)
    tally.in_time(accepted)
    ended(tally, accepted, 3.0)  # too late for the step's throughput
    for pushback_ms in (100, -1, None):
        ended(tally, CallResult(CallKind.REFUSED, "RESOURCE_EXHAUSTED", "OVERLOADED", "busy", pushback_ms), 0.05, 0.04)
    ended(tally, CallResult(CallKind.FAILED, "UNAVAILABLE", message="gone"), 0.5)
    tally.meant(REQUEST)
    tally.not_sendable()
    tally.meant(REQUEST)
    tally.no_end()

    found = step_metrics(tally)
    assert (found["calls"], found["offered_sentences_per_s"], found["offered_tokens_per_s"]) == (8, 8, 28)
    assert (found["sentences_per_s"], found["tokens_per_s"]) == (0.5, 3.5)
    assert (found["accepted"]["calls"], found["refused"]["calls"], found["failed"]) == (2, 3, 3)
    assert (found["refused_rate"], found["error_rate"]) == (3 / 8, 3 / 8)
    assert found["accepted"]["p50_ms"] == pytest.approx(200, rel=0.01)
    assert found["accepted"]["max_ms"] == pytest.approx(3000)
    assert found["accepted"]["since_sent"]["max_ms"] == pytest.approx(100)
    assert found["refused"]["p99_ms"] == pytest.approx(50, rel=0.01)
    assert found["refused"]["since_sent"]["p99_ms"] == pytest.approx(40, rel=0.01)
    assert [found["refused"][name] for name in ("with_pushback", "never_retry", "without_pushback")] == [1, 1, 1]
    assert found["refused"]["pushback_max_ms"] == pytest.approx(100)
    assert found["errors"][0] == {
        "status": "RESOURCE_EXHAUSTED", "reason": "OVERLOADED", "calls": 3, "message": "busy",
    }  # fmt: skip
    assert {error["status"] for error in found["errors"][1:]} == {"UNAVAILABLE", "NOT_SENT", "NO_END"}
    assert (found["sentence_errors"], found["failed_sentences"]) == ({"TOKEN_EMPTY": 2}, 2)
    assert (found["checked_answers"], found["wrong_answers"], found["overdue"]) == (4, 2, 1)


def test_a_call_that_outlives_its_deadline_is_overdue() -> None:
    tally = StepCounters()
    ended(tally, CallResult(CallKind.FAILED, "DEADLINE_EXCEEDED"), since_sent_s=TIMEOUT_S + 0.5)
    assert tally.overdue == 0
    ended(tally, CallResult(CallKind.FAILED, "DEADLINE_EXCEEDED"), since_sent_s=TIMEOUT_S + 1.5)
    assert tally.overdue == 1


def test_steps_add_up() -> None:
    total, tallies = StepCounters(), [StepCounters(length_s=1.0), StepCounters(length_s=3.0)]
    for tally in tallies:
        answer = CallResult(CallKind.ACCEPTED, sentences=2, tokens=7, checked=2, wrong=1)
        ended(tally, answer)
        tally.in_time(answer)
        ended(tally, CallResult(CallKind.REFUSED, "RESOURCE_EXHAUSTED", "OVERLOADED", "busy", 5))
        tally.unfinished += 1
        total.merge(tally)
    found, one = step_metrics(total), step_metrics(tallies[0])
    for name in ("calls", "wrong_answers", "checked_answers", "unfinished"):
        assert found[name] == 2 * one[name] > 0, name
    assert (found["length_s"], found["sentences_per_s"], found["tokens_per_s"]) == (4.0, 1.0, 3.5)
    assert found["refused"]["with_pushback"] == 2
    assert found["errors"] == [{**one["errors"][0], "calls": 2}]


# ---- memory and descriptors ----


def test_the_slope_is_an_hours_and_leaves_out_the_beginning() -> None:
    filling = [(float(at_s), 100.0 * at_s) for at_s in range(20)]
    steady = [(float(at_s), 2000.0 + 0.5 * at_s) for at_s in range(20, 101)]
    assert slope_per_hour(filling + steady) == pytest.approx(0.5 * 3600)
    assert slope_per_hour([(float(at_s), 7.0) for at_s in range(100)]) == pytest.approx(0)
    assert slope_per_hour(steady[:3]) is None
    assert slope_per_hour([]) is None


def test_resources_that_nobody_knows_are_left_out() -> None:
    points = [(0.0, Resources(2**20, 10)), (1.0, Resources()), (2.0, Resources(3 * 2**20, 12))]
    found = resource_metrics(points, with_slopes=False)
    assert (found["memory_mib_first"], found["memory_mib_last"], found["memory_mib_max"]) == (1, 3, 3)
    assert (found["descriptors_first"], found["descriptors_last"], found["memory_mib_per_hour"]) == (10, 12, None)
    assert resource_metrics([(0.0, Resources())], with_slopes=True)["memory_mib_last"] is None


def test_our_own_process_has_memory_and_descriptors(tmp_path: Path) -> None:
    before = of_process()
    with (tmp_path / "file").open("w"):
        assert of_process().descriptors == (before.descriptors or 0) + 1
    assert before.memory_bytes is not None
    assert before.memory_bytes > 2**20
    assert of_process(2**22 + 1) == Resources()  # above the largest process number


# ---- conditions ----


def test_a_condition_is_violated_when_its_comparison_holds() -> None:
    condition = Condition.parse(" accepted.p99_ms >= 500 ")
    assert str(condition) == "accepted.p99_ms>=500"
    assert [condition.is_violated(value) for value in (499.9, 500, 501)] == [False, True, True]
    below = Condition.parse("sentences_per_s<1e2")
    assert [below.is_violated(value) for value in (99, 100)] == [True, False]


def test_what_was_not_measured_violates_its_condition_except_for_refusals() -> None:
    assert Condition.parse("accepted.p99_ms>500").is_violated(None)
    assert not Condition.parse("refused.p99_ms>200").is_violated(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p99_ms>5", "no figure 'p99_ms'; there are .*accepted.p99_ms"),
        ("errors>5", "no figure"),
        ("accepted.p99_ms=5", "expected FIGURE>NUMBER"),
        ("accepted.p99_ms>", "expected FIGURE>NUMBER"),
        ("accepted.p99_ms>5 ms", "expected FIGURE>NUMBER"),
    ],
)
def test_a_condition_that_says_nothing_is_told_before_the_run(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condition.parse(text)


def test_conditions_can_be_put_on_all_that_matters() -> None:
    names = dict(flat(metrics_of_nothing()))
    assert {
        "accepted.p999_ms", "refused.since_sent.p99_ms", "error_rate", "refused_rate", "wrong_answers", "overdue",
        "sentences_per_s", "health.p99_ms", "health.not_serving", "server.memory_mib_per_hour",
        "bench.descriptors_per_hour", "late_p99_ms",
    } <= names.keys()  # fmt: skip
