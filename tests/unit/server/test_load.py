"""What a server reports of its load, and that it says how much the server can do, whatever comes."""

import struct

import pytest
from bilm_server.inference.load import Load, LoadMeter
from bilm_server.inference.types import RoundReport
from bilm_server.protocols.grpc.load_report import load_trailer

ROWS = 128


def worked(rows: int, steps: int, round_s: float, pause_s: float, seconds: float = 60.0) -> Load:
    """Return the load of a server that makes equal rounds with equal pauses."""
    meter, now_s = LoadMeter(), 1000.0
    while now_s < 1000 + seconds:
        now_s += round_s
        meter.add(RoundReport(rows, steps, round_s), ROWS, now_s)
        now_s += pause_s
    load = meter.load(now_s)
    assert load is not None
    return load


def test_it_is_a_mean_over_time_with_its_pauses() -> None:
    load = worked(rows=32, steps=320, round_s=0.02, pause_s=0.06)
    assert load.tokens_per_s == pytest.approx(320 / 0.08, rel=0.02)
    assert load.utilization == pytest.approx(32 / ROWS * 0.25, rel=0.02)


def test_all_rows_all_the_time_are_1() -> None:
    assert worked(ROWS, 1000, 7.0, 0.0).utilization == pytest.approx(1, rel=0.001)  # rounds longer than the half-life


@pytest.mark.parametrize(("rows", "pause_s"), [(1, 1.0), (1, 0.0), (16, 0.1), (128, 0.0)])
def test_their_quotient_is_the_capacity_whatever_comes(rows: int, pause_s: float) -> None:
    fast, slow = (worked(rows, 10 * rows, round_s, pause_s) for round_s in (0.01, 0.04))
    weights = [load.tokens_per_s / load.utilization for load in (fast, slow)]
    assert weights == pytest.approx([10 * ROWS / 0.01, 10 * ROWS / 0.04])


def test_it_falls_while_nothing_comes_and_the_capacity_stays() -> None:
    meter = LoadMeter()
    meter.add(RoundReport(64, 100, 1.0), ROWS, 50.0)
    before, after = meter.load(50.0), meter.load(60.0)
    assert before is not None
    assert after is not None
    assert after.utilization == pytest.approx(before.utilization / 4)
    assert after.tokens_per_s / after.utilization == pytest.approx(before.tokens_per_s / before.utilization)


def test_before_the_first_round_and_long_after_the_last_there_is_none() -> None:
    meter = LoadMeter()
    assert meter.load(50.0) is None
    meter.add(RoundReport(64, 100, 1.0), ROWS, 50.0)
    assert meter.load(1e9) is None


def test_a_round_without_a_duration_counts_nothing() -> None:
    meter = LoadMeter()
    meter.add(RoundReport(64, 100, 0.0), ROWS, 50.0)
    assert meter.load(50.0) is None


def test_the_trailer_has_two_fields_of_an_orca_load_report() -> None:
    ((key, report),) = load_trailer(Load(tokens_per_s=1500.0, utilization=0.25))
    assert key == "endpoint-load-metrics-bin"
    assert report == b"\x31" + struct.pack("<d", 1500.0) + b"\x49" + struct.pack("<d", 0.25)


def test_no_load_leaves_no_trailer() -> None:
    assert load_trailer(None) == ()
