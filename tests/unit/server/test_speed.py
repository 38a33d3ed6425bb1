import pytest
from bilm_server.inference.speed import Speed


def test_before_anything_was_measured_it_is_a_guess() -> None:
    assert Speed().steps_per_s == pytest.approx(5000)


@pytest.mark.parametrize("steps_per_s", [1000, 40_000])
@pytest.mark.parametrize("round_s", [0.01, 0.3, 5.0])
def test_it_follows_the_real_speed_within_seconds_of_work(steps_per_s: int, round_s: float) -> None:
    speed = Speed()
    for rate in (100_000, steps_per_s):  # it was fast, and isn't any more
        worked_s = 0.0
        while worked_s < 30:
            speed.add(round(rate * round_s), round_s)
            worked_s += round_s
    assert speed.steps_per_s == pytest.approx(steps_per_s, rel=0.05)


def test_rounds_in_which_nothing_ends_count_by_what_they_advance() -> None:
    speed = Speed()
    for _ in range(10_000):  # sentences so long that none ends
        speed.add(128, 0.01)
    assert speed.steps_per_s == pytest.approx(12_800, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1.0, 1e9])
def test_dividing_by_it_always_gives_a_time(seconds: float) -> None:
    speed = Speed()
    for _ in range(2000):
        speed.add(0, seconds)
        assert speed.steps_per_s >= 1
    speed.add(100, 1.0)
    assert speed.steps_per_s >= 1
