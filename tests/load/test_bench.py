"""`bilm-bench` against real servers on tiny models."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bilm_bench import main as bench_main
from bilm_bench.main import DONE
from bilm_bench.reporting.report import is_violated, make_report
from bilm_bench.reporting.summary import summary
from bilm_bench.run import measure
from bilm_bench.settings import load_settings
from bilm_client._core.inputs import WholeSentence

from tests.support.server_processes import ProcessServer
from tests.support.servers import LoopServer, serving

LINES = (
    "A short one .",
    "Here is a sentence with some more tokens in it .",
    "Yes .",
    "The river runs by the old bank .",
)


@pytest.fixture(scope="module")
def server() -> Iterator[LoopServer]:
    with serving() as server:
        yield server


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def bench(target: str, text: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    report = text.with_name("report.json")
    given = ["--target", target, "--text", str(text), "--json", str(report), "--warm-up-s", "0.2", "--no-log"]
    return bench_main.main([*given, *flags]), json.loads(report.read_text(encoding="utf-8"))


def assert_all_right(report: dict[str, Any]) -> None:
    figures = report["figures"]
    assert figures["errors"] == []
    assert figures["sentence_errors"] == {}
    assert figures["accepted"]["calls"] == figures["calls"] > 0
    assert figures["health"]["not_serving"] == 0


def test_an_open_loop_with_every_answer_verified(server: LoopServer, text: Path) -> None:
    code, report = bench(server.target, text, "--rate", "80", "--step-s", "1.5", "--verify", "--connections", "3")
    assert code == DONE
    assert_all_right(report)
    figures = report["figures"]
    assert figures["checked_answers"] == figures["calls"]
    assert figures["tokens_per_s"] / figures["sentences_per_s"] == pytest.approx(25 / 4, rel=0.3)


def test_a_closed_loop_with_raw_text_and_other_outputs(server: LoopServer, text: Path) -> None:
    flags = ("--raw", "--layers", "top", "--pool", "mean", "--dtype", "bfloat16", "--verify", "--tolerance", "1e-5")
    load = ("--loop", "closed", "--callers", "4", "--sentences-per-call", "3", "--step-s", "1.5")
    code, report = bench(server.target, text, *load, *flags)
    assert code == DONE
    assert_all_right(report)
    assert report["figures"]["checked_answers"] == 3 * report["figures"]["calls"]
    assert max(sample["in_flight"] for sample in report["samples"]) <= 4


def test_a_ramp(server: LoopServer, text: Path) -> None:
    code, report = bench(server.target, text, "--ramp", "20:100:3", "--step-s", "1")
    assert code == DONE
    assert_all_right(report)
    assert [step["load"] for step in report["steps"]] == [20, 60, 100]
    offered = [step["offered_sentences_per_s"] for step in report["steps"]]
    assert offered == sorted(offered)
    assert sum(step["calls"] for step in report["steps"]) == report["figures"]["calls"]


def test_a_short_soak(server: LoopServer, text: Path) -> None:
    flags = ("--soak", "2s", "--sample-s", "0.2", "--rate", "40", "--server-pid", str(os.getpid()))
    code, report = bench(server.target, text, *flags, "--fail-on", "server.descriptors_per_hour>1e9")
    assert code == DONE
    assert_all_right(report)
    assert len(report["samples"]) > 5
    assert report["figures"]["server"]["descriptors_per_hour"] is not None


def test_refusals_come_with_a_pushback(text: Path) -> None:
    limits = ("--max-tokens-per-request", "30", "--max-waiting-tokens", "30")  # one call of four sentences
    load = ("--loop", "closed", "--callers", "12", "--sentences-per-call", "4", "--step-s", "2", "--verify")
    with serving(*limits) as server:
        code, report = bench(server.target, text, *load)
    figures = report["figures"]
    assert code == DONE  # a refusal is no wrong answer
    assert figures["accepted"]["calls"] > 0
    assert figures["refused"]["calls"] == figures["refused"]["with_pushback"] > 0
    assert [(error["status"], error["reason"]) for error in figures["errors"]] == [("RESOURCE_EXHAUSTED", "OVERLOADED")]
    assert figures["failed"] == 0
    assert figures["refused"]["pushback_p50_ms"] > 0


def test_a_server_that_dies_in_mid_run_is_counted(text: Path) -> None:
    with ProcessServer() as server:
        alive = [server.pid]

        def kill_once(_step: object, _counters: object) -> None:
            while alive:
                os.kill(alive.pop(), signal.SIGKILL)

        flags = ("--ramp", "40,40", "--step-s", "1.5", "--server-pid", str(server.pid), "--connections", "2")
        settings = load_settings(["--target", server.target, "--text", str(text), "--warm-up-s", "0.2", *flags])
        sentences: list[WholeSentence] = [line.split() for line in LINES]
        measured = asyncio.run(measure(settings, sentences, kill_once))  # after the first step
    report = make_report(settings, sentences, measured)
    assert not is_violated(report)
    before, after = report["steps"]
    assert before["errors"] == []
    assert after["accepted"]["calls"] == 0
    assert after["failed"] == after["calls"] > 0
    assert {error["status"] for error in after["errors"]} == {"UNAVAILABLE"}
    assert report["figures"]["health"]["unanswered"] > 0
    assert report["samples"][0]["server_memory_mib"] > 0
    assert report["samples"][-1]["server_memory_mib"] is None
    assert "× UNAVAILABLE: " in summary(report)
