"""What experiments are made of: rounds, percentiles, findings, their file and their page."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bilm_bench.reporting.experiment import Finding, Findings
from bilm_bench.reporting.experiment_page import write_page
from bilm_bench.reporting.numbers import short
from bilm_bench.statistics.percentiles import percentile, rank
from bilm_bench.statistics.rounds import Spread, interleave, ratio

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_percentiles_by_nearest_rank() -> None:
    values = [3.0, 1.0, 2.0, 4.0]
    assert [percentile(values, percent) for percent in (0, 25, 26, 50, 99, 100)] == [1, 1, 2, 2, 4, 4]
    assert rank(1000, 99.9) == 999  # the product is 999.0000000000001


def test_contestants_take_turns_in_both_directions() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleave({name: lambda name=name: contestant(name) for name in "abc"}, 2, settle_s=0.0)  # type: ignore[misc]
    assert "".join(order) == "abccba"
    assert found == {"a": [1, 6], "b": [2, 5], "c": [3, 4]}
    assert ratio(found["a"], found["b"]) == Spread.of([0.5, 1.2])


def test_a_spread_has_the_quartiles_of_its_rounds() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.0, 5.0, lower_quartile=2.0, upper_quartile=4.0)
    assert Spread.of([1.0, 2.0]).times(2) == Spread(3.0, 2.0, 4.0, lower_quartile=2.5, upper_quartile=3.5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (7, "7"), (0.12345, "0.123"), (99.96, "100"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("target", "at_least", "met"), [(None, True, None), (2.0, True, True), (2.1, True, False), (1.9, False, False)]
)
def test_a_finding_is_held_against_its_target(target: float | None, at_least: bool, met: bool | None) -> None:
    assert Finding("key", "what", Spread.of([1.0, 2.0, 3.0]), "s", target, at_least).met is met


def test_findings_are_written_with_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Findings("one", "benchmarks.one", {"rounds": 3}, {"torch": "2"})
    report.add(Finding("a/b", "a thing", Spread.of([1.0, 1.23456, 2.0]), "ms", 2.0, at_least=False))
    report.detail("a", {"each": (1.23456, 2)})
    report.write(tmp_path / "folder" / "one.json")
    written: dict[str, Any] = json.loads((tmp_path / "folder" / "one.json").read_text(encoding="utf-8"))
    assert written["command"].startswith("python -m benchmarks.one")
    assert {"cpu", "cores", "python", "commit", "torch"} == set(written["machine"])
    assert written["figures"][0]["found"] == {
        "median": 1.235,
        "minimum": 1.0,
        "maximum": 2.0,
        "lower_quartile": 1.117,
        "upper_quartile": 1.617,
    }
    assert written["figures"][0]["met"]
    assert written["details"] == {"a": {"each": [1.235, 2]}}
    assert "a thing" in capsys.readouterr().out


def test_the_page_of_the_results_that_are_kept(tmp_path: Path) -> None:
    for name in ("bench", "full"):
        (tmp_path / f"{name}.json").write_bytes((RESULTS / f"{name}.json").read_bytes())
    write_page(tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 8
    assert "All measurements of bench" in page
    assert not re.search(r"#0\d0\d0\d\b", page)  # every colour of the plots became one of the page's
