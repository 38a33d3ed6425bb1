"""The choices of bilm-bench, and the page that lists them."""

import re
from pathlib import Path

import pytest
from bilm_bench.main import UNUSABLE, main
from bilm_bench.settings import BenchSettings, load_settings
from bilm_bench.workload.schedule import Step
from bilm_client.cli.settings_sources import UsageError

PAGE = Path(__file__).parents[3] / "docs" / "load.md"
TEXT = ["--text", "text.txt"]


def load(*flags: str) -> BenchSettings:
    return load_settings([*TEXT, *flags])


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "bench.toml"
    config.write_text('text = "a.txt"\nrate = 1\nseed = 1\ncallers = 1\njson = "c.json"\nfail_on = ["failed>0"]\n')
    monkeypatch.setenv("BILM_BENCH_CONFIG", str(config))
    monkeypatch.setenv("BILM_BENCH_SEED", "2")
    monkeypatch.setenv("BILM_BENCH_CALLERS", "2")
    monkeypatch.setenv("BILM_BENCH_HTML", "e.html")
    monkeypatch.setenv("BILM_BENCH_METADATA", "a=1,b=2")
    monkeypatch.setenv("JSON", "not ours")
    found = load_settings(["--callers", "3"])
    assert (found.rate, found.seed, found.callers) == (1, 2, 3)
    assert (found.text, found.json_file, found.html_file) == (Path("a.txt"), Path("c.json"), Path("e.html"))
    assert found.call_metadata() == (("a", "1"), ("b", "2"))
    assert [str(condition) for condition in found.conditions()] == ["failed>0"]


def test_the_loads_of_a_run() -> None:
    assert load("--rate", "5").steps() == (Step(5, 10),)
    assert load("--loop", "closed", "--callers", "3", "--step-s", "2").steps() == (Step(3, 2),)
    assert load("--ramp", "10:20:2", "--step-s", "1").steps() == (Step(10, 1), Step(20, 1))
    assert load("--soak", "30m").steps() == (Step(50, 1800),)


def test_verified_answers_are_a_condition_by_themselves() -> None:
    flags = ("--verify", "--fail-on", "failed>0", "--fail-on", "error_rate>0.1,overdue>0")
    found = [str(condition) for condition in load(*flags).conditions()]
    assert found == ["wrong_answers>0", "failed>0", "error_rate>0.1", "overdue>0"]
    assert load("--no-verify").conditions() == ()


def test_metadata_and_the_mark_of_a_test() -> None:
    found = load("--metadata", "x-a=1=2", "--metadata", "x-b=", "--no-log")
    assert found.call_metadata() == (("x-a", "1=2"), ("x-b", ""), ("x-bilm-no-log", "1"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "0"], "rate: "),
        (["--loop", "ajar"], "loop: "),
        (["--ramp", "1;2"], "ramp: expected loads"),
        (["--loop", "closed", "--ramp", "1.5,2"], "ramp: callers must be whole"),
        (["--soak", "long"], "soak: expected a duration"),
        (["--soak", "1m", "--ramp", "1,2"], "exclude each other"),
        (["--tolerance", "0.1"], "tolerance: goes with verify"),
        (["--json", __file__, "--html", __file__], "html: json names this file, too"),
        (["--server-pid", "1", "--metrics-url", "http://a/metrics"], "exclude each other"),
        (["--metrics-url", "file:///etc/passwd"], "metrics_url: "),
        (["--metadata", "novalue"], "metadata: expected NAME=VALUE"),
        (["--metadata", "Upper=1"], "metadata: expected NAME=VALUE"),
        (["--cert-file", __file__], "cert_file and key_file go together"),
        (["--key-file", __file__], "cert_file and key_file go together"),
        (["--ca-file", "/nowhere.pem"], "ca_file: No such file"),
        (["--json", "/nowhere/a.json"], "json: no such folder"),
        (["--fail-on", "p99>1"], "fail_on: no figure 'p99'"),
        (["--fail-on", "server.memory_mib_last>1"], "needs server_pid or metrics_url"),
        (["--fail-on", "bench.memory_mib_per_hour>1"], "needs soak"),
        (["--fail-on", "wrong_answers>1"], "needs verify"),
    ],
)
def test_bad_values(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        load(*flags)


def test_every_bad_value_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rate", "0", "--connections", "0"]) == UNUSABLE
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["text", "rate", "connections"]


def test_a_token_is_never_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "token").write_text("s3cret and more\n", encoding="utf-8")
    assert load("--metadata", "x-key=s3cret").shown()["metadata"] == ["x-key"]
    (text := tmp_path / "text").write_text("one sentence\n", encoding="utf-8")
    assert main(["--text", str(text), "--token-file", str(file)]) == UNUSABLE
    shown = capsys.readouterr().err
    assert "expected one token" in shown
    assert "s3cret" not in shown


@pytest.mark.parametrize("content", ["rate = ", "rite = 5\n", None], ids=["no TOML", "unknown name", "no file"])
def test_a_bad_configuration_file(tmp_path: Path, content: str | None) -> None:
    config = tmp_path / "bench.toml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(UsageError, match="rite" if content and "rite" in content else "bench.toml"):
        load("--config", str(config))


def test_the_page_lists_every_flag_with_its_default() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Choices")[2].partition("\n#")[0]
    listed = re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*?) \| (.*?) \|$", section, flags=re.MULTILINE)
    expected = []
    for name, field in BenchSettings.model_fields.items():
        nothing = field.is_required() or field.default is None or field.default is False or field.default == ""
        default = "" if nothing else f"`{_shown(field.default)}`"
        expected.append((f"--{(field.alias or name).replace('_', '-')}", default, field.description))
    assert listed == expected


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
