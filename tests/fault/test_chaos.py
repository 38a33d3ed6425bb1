"""A minute of chaos, and the parts of the program that decide whether a run has passed."""

import json
import subprocess
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from tests.fault.chaos_records import HANG_MARGIN_S, RECOVERY_S, Record, Verdict, Window, judge
from tests.fault.chaos_report import Holdings, Outcome, failures
from tests.fault.chaos_schedule import KINDS, PACKETS, schedule
from tests.fault.chaos_supervisor import End
from tests.support.processes import ROOT, module_command


def record(status: str = "OK", begun_s: float = 10.0, ended_s: float = 11.0, **changes: object) -> Record:
    fields = {"caller": "client", "path": "proxy", "limit_s": 5.0, "expected": "OK", **changes}
    return Record(begun_s=begun_s, ended_s=ended_s, status=status, **fields)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_faults() -> None:
    first, again, other = (list(islice(schedule(seed), 100)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_each_round_has_every_fault_and_the_restarts_first() -> None:
    faults = list(islice(schedule(3), 2 * len(KINDS)))
    for begin in (0, len(KINDS)):
        kinds = [fault.kind for fault in faults[begin : begin + len(KINDS)]]
        assert sorted(kinds) == sorted(KINDS)
        assert set(kinds[:2]) == {"kill", "drain"}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (record(), "right"),
        (record("NOT_FOUND MODEL_NOT_FOUND", expected="NOT_FOUND MODEL_NOT_FOUND"), "refused"),
        (record("OK", expected="NOT_FOUND MODEL_NOT_FOUND"), "unexpected"),
        (record(wrong=True), "wrong"),
        (record(ended_s=15.1 + HANG_MARGIN_S), "hang"),
        (record("UNAVAILABLE"), "excused"),
        (record("INTERNAL INTERNAL"), "unexpected"),
        (record("UNAVAILABLE", path="direct"), "unexpected"),
        (record("UNAVAILABLE", begun_s=10.6 + RECOVERY_S, ended_s=10.7 + RECOVERY_S), "unexpected"),
        (record("UNAVAILABLE", begun_s=8.0, ended_s=9.0), "unexpected"),
    ],
)
def test_a_fault_excuses_what_it_can_have_caused(found: Record, verdict: Verdict) -> None:
    assert judge(found, [Window("cut", 10.2, 10.3)]) == verdict


def test_nothing_excuses_a_wrong_answer_or_a_hang() -> None:
    windows = [Window(kind, 0.0, 100.0) for kind in KINDS]
    assert judge(record(wrong=True), windows) == "wrong"
    assert judge(record("UNAVAILABLE", ended_s=15.1 + HANG_MARGIN_S), windows) == "hang"


def test_what_makes_a_run_fail() -> None:
    passed = Outcome(1, records=[record()], ends=[End(-9, -9)], holdings={"server": Holdings(13, 14, 400, 420)})
    assert failures(passed) == []
    changes: list[dict[str, object]] = [
        {"records": [record(wrong=True)]},
        {"records": []},
        {"ends": [End(-11, None)]},
        {"hung": ["stream/proxy"]},
        {"log_errors": ["ERROR"]},
        {"holdings": {"server": Holdings(13, 30, 400, 420)}},
        {"holdings": {"server": Holdings(13, 13, 400, 700)}},
    ]
    for change in changes:
        assert failures(replace(passed, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "kinds", [("kill", "cut"), pytest.param(KINDS, marks=pytest.mark.slow)], ids=["two faults", "all"]
)
def test_a_round_of_chaos(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """Each fault once, for as long as this machine takes."""
    results = tmp_path / "chaos.json"
    command = module_command("tests.fault.chaos", "--rounds", "1", "--json", str(results), "--faults", ",".join(kinds))
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(ended.stdout)
    found = json.loads(results.read_text(encoding="utf-8"))
    assert found["failures"] == []
    assert ended.returncode == 0
    assert set(kinds) - set(PACKETS) <= found["faults"].keys()
