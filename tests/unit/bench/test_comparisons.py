"""What comparisons are made of: source trees, processes behind pipes, searches for the highest load, sections."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from bilm_model.engine.sentences import ALL_LAYERS

from benchmarks.load.load import LoadGenerator
from benchmarks.load.pipe import PipedProcess, PipeError
from benchmarks.load.steady import SteadyLoad
from benchmarks.load.sustained import bounds, held, sustained
from benchmarks.process_usage import EVENT_LOOP, memory_mib, spent_s, thread_cpu_s
from benchmarks.sections import run_sections
from benchmarks.trees import PRESENT, Tree, WorkTreeError
from tests.support.fake_engine import FakeEngine

ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "end":
        raise SystemExit(7)
    print(json.dumps({"error": "no"} if request["do"] == "fail" else request), flush=True)
"""


class LimitedGenerator(LoadGenerator):
    """Calls a server that keeps its latency up to a certain load."""

    def __init__(self, limit_per_s: float) -> None:
        self._limit_per_s = limit_per_s
        self.rates: list[float] = []

    def open(self, rate: float, seconds: float, seed: int, max_in_flight: int) -> dict[str, Any]:
        self.rates.append(rate)
        return step(rate, p99_ms=100.0 if rate <= self._limit_per_s else 900.0)


def step(rate: float, p99_ms: float, *, gave_up: bool = False) -> dict[str, Any]:
    return {"offered_per_s": rate, "p99_ms": p99_ms, "gave_up": gave_up}


def test_a_process_loads_the_tree_that_it_is_given() -> None:
    PRESENT.check()


def test_a_tree_without_the_packages_isnt_measured_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(WorkTreeError, match="would be loaded from"):
        Tree(tmp_path).check()


def test_a_piped_process_answers_each_request() -> None:
    with PipedProcess([sys.executable, "-c", ECHO], {}) as process:
        assert process.ask("echo", number=1) == {"do": "echo", "number": 1}
        with pytest.raises(PipeError, match="no"):
            process.ask("fail")
        with pytest.raises(PipeError, match="ended with code 7"):
            process.ask("end")


def test_a_step_is_held_by_its_latency_and_its_backlog() -> None:
    assert held(step(1.0, 500.0))
    assert not held(step(1.0, 500.1))
    assert not held(step(1.0, 1.0, gave_up=True))


def test_a_search_begins_between_what_was_held_and_what_was_lost() -> None:
    low, high = bounds([step(10.0, 1.0), step(20.0, 1.0), step(30.0, 900.0)])
    assert low < 20.0
    assert high > 30.0


@pytest.mark.parametrize("limit_per_s", [25.0, 50.0, 90.0])
def test_a_search_finds_the_limit_even_outside_its_bounds(limit_per_s: float) -> None:
    generator, steps = LimitedGenerator(limit_per_s), list[dict[str, Any]]()
    found = sustained(generator, (40.0, 60.0), 1.0, steps)
    assert 0.8 * limit_per_s < found <= limit_per_s
    assert [each["offered_per_s"] for each in steps] == generator.rates


def test_a_full_engine_has_all_its_rows_taken() -> None:
    engine = FakeEngine[Any]()
    load = SteadyLoad(engine, [["a"] * 20, ["b"] * 30], None, ALL_LAYERS)
    load.measure(0.0)
    assert engine.in_flight == engine.capacity.rows


def test_the_use_of_a_process_is_read() -> None:
    before = thread_cpu_s(os.getpid())
    after = thread_cpu_s(os.getpid())
    assert spent_s(before, after)[EVENT_LOOP] >= 0.0
    found = memory_mib(os.getpid())
    assert 0.0 < found["RssAnon"] < found["VmRSS"]


def test_sections_run_in_order_unless_some_are_named() -> None:
    ran: list[str] = []
    sections = {name: lambda name=name: ran.append(name) for name in "abc"}
    run_sections(sections)
    run_sections(sections, ["c", "a"])
    assert "".join(ran) == "abcac"
    with pytest.raises(SystemExit, match="unknown section d"):
        run_sections(sections, ["d"])
