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


class Simulated:
    """A server whose rounds take longer the more rows they have, with sentences of equal length that come in time.

    Attributes:
        weight: what a balancer made of its last report.
        due: sentences that it gets next, with the fraction left over.
    """

    length, ticks = 24, 8

    def __init__(self, tick_s: float, row_tick_s: float) -> None:
        self._tick_s, self._row_tick_s = tick_s, row_tick_s
        self._meter, self._now_s, self._rows = LoadMeter(), 0.0, list[int]()
        self.weight, self.due = 0.0, 0.0

    @property
    def capacity(self) -> float:
        """Sentences a second with all rows in use."""
        return ROWS / (self._tick_s + self._row_tick_s * ROWS) / self.length

    def run(self, until_s: float, sentences_per_s: float) -> None:
        """Make rounds until a moment, with so many new sentences a second."""
        while self._now_s < until_s:
            self._rows += [self.length] * int(self.due)
            self.due %= 1
            rows = min(len(self._rows), ROWS)
            took_s = self.ticks * (self._tick_s + self._row_tick_s * rows)
            self._now_s += took_s
            self.due += sentences_per_s * took_s
            if rows:
                self._meter.add(RoundReport(rows, rows * self.ticks, took_s), ROWS, self._now_s)
                left = [steps - self.ticks for steps in self._rows[:rows] if steps > self.ticks]
                self._rows = left + self._rows[rows:]
        load = self._meter.load(self._now_s)
        self.weight = load.tokens_per_s / load.utilization if load else 0.0


@pytest.mark.parametrize("utilization", [0.1, 0.5, 0.9])
def test_shares_settle_at_the_capacities_and_stay(utilization: float) -> None:
    """Weights move with what a server gets, and that with the weights: it must neither swing nor run away."""
    servers = [Simulated(0.0005, 0.00005), Simulated(0.0005, 0.00005), Simulated(0.002, 0.0002)]
    capacity = sum(server.capacity for server in servers)
    shares = [1 / 3] * 3
    for second in range(1, 61):
        for server, share in zip(servers, shares, strict=True):
            server.run(second, share * utilization * capacity)
        weights = [server.weight for server in servers]
        shares = [weight / sum(weights) for weight in weights]
        if second > 40:
            assert shares == pytest.approx([server.capacity / capacity for server in servers], abs=0.03)


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
