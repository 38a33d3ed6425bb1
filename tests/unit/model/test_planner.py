import numpy as np
import pytest
from bilm_model.engine.planner import RoundPlan, Row, ticks_of_round
from hypothesis import given
from hypothesis import strategies as st

ROWS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 29)), min_size=1, max_size=12)


@given(ROWS, st.integers(1, 40))
def test_every_row_makes_its_next_steps_in_order(shapes: list[tuple[int, int]], max_ticks: int) -> None:
    rows = [
        Row(slot, 100 * slot + np.arange(length, dtype=np.int64), min(done, length - 1), brings_state=slot % 3 == 0)
        for slot, (length, done) in enumerate(shapes)
    ]
    plan = RoundPlan.of(rows, max_ticks)
    assert list(plan.sizes) == sorted(plan.sizes, reverse=True)
    assert len(plan.sizes) <= max_ticks
    forward: dict[int, list[int]] = {row.slot: [] for row in rows}
    backward: dict[int, list[int]] = {row.slot: [] for row in rows}
    fresh: set[int] = set()
    first = 0
    for size in plan.sizes:
        for r, slot in enumerate(plan.slots[:size].tolist()):
            fresh |= {int(plan.places[0, first + r])} if plan.fresh[first + r] else set()
            forward[slot].append(int(plan.places[0, first + r]))
            backward[slot].append(int(plan.places[1, first + r]))
        first += size
    assert fresh == {int(row.places[0]) for row in rows if row.done == 0 and not row.brings_state}
    for r, slot in enumerate(plan.slots.tolist()):
        row = rows[slot]
        n_steps = min(row.remaining, max_ticks)
        assert forward[slot] == row.places[row.done : row.done + n_steps].tolist()
        assert backward[slot] == row.places[::-1][row.done : row.done + n_steps].tolist()
        assert plan.places[0, plan.last[r]] == forward[slot][-1]


@pytest.mark.parametrize(("n_rows", "expected"), [(1, 32), (4, 32), (8, 16), (100, 1), (128, 1), (1000, 1)])
def test_few_rows_take_many_ticks_together(n_rows: int, expected: int) -> None:
    assert ticks_of_round([50] * n_rows, block_rows=128, max_ticks=32) == expected


def test_a_round_ends_when_rows_would_be_idle() -> None:
    assert ticks_of_round([50, 7], block_rows=1000, max_ticks=32) == 7
    assert ticks_of_round([50] * 30 + [3], block_rows=1000, max_ticks=32) == 3
    assert ticks_of_round([50] * 31 + [3], block_rows=1000, max_ticks=20) == 3
    assert ticks_of_round([3] + [9] * 42 + [4], block_rows=1000, max_ticks=32) == 4
    assert ticks_of_round([3] + [9] * 43, block_rows=1000, max_ticks=32) == 9
