import logging
from pathlib import Path

import pytest
from bilm_api.constants import Priority
from bilm_server.config import CallerSettings, Right
from bilm_server.config_sources import load_config
from bilm_server.errors import Code, ConfigurationError
from bilm_server.main import main
from bilm_server.observability.call_record import CallRecord
from bilm_server.observability.no_log_calls import NoLogCalls
from bilm_server.security.callers import CallerRights

CALLERS = [CallerSettings(name="team-a", rights=frozenset({Right.NO_LOG})), CallerSettings(name="team-b")]


def end(calls: NoLogCalls, caller: str, times: int = 1, is_test: bool = True) -> None:
    for _ in range(times):
        call = CallRecord("Embed", "ipv4:127.0.0.1:1", caller=caller, is_test=is_test, code=Code.OK)
        calls.begin(call)
        calls.end(call)


def test_a_right_belongs_to_the_names_that_have_it() -> None:
    rights = CallerRights(CALLERS, authenticated=True)
    assert [rights.has(name, Right.NO_LOG) for name in ("team-a", "team-b", "team-c", "")] == [
        True,
        False,
        False,
        False,
    ]


def test_without_authentication_everybody_has_every_right() -> None:
    assert all(CallerRights(callers, False).has("127.0.0.1", right) for callers in ((), CALLERS) for right in Right)


def test_a_ceiling_belongs_to_the_names_that_have_it_and_to_nobody_without_authentication() -> None:
    callers = [*CALLERS, CallerSettings(name="nightly", max_priority=Priority.BATCH)]
    rights = CallerRights(callers, authenticated=True)
    names = ("team-a", "nightly", "somebody")
    assert [rights.max_priority(name) for name in names] == [
        Priority.INTERACTIVE, Priority.BATCH, Priority.INTERACTIVE,
    ]  # fmt: skip
    assert not rights.has("nightly", Right.NO_LOG)
    assert CallerRights(callers, authenticated=False).max_priority("nightly") is Priority.INTERACTIVE


def test_uses_are_counted_and_logged_by_caller_without_flooding(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    calls = NoLogCalls(CallerRights(CALLERS, authenticated=True))
    end(calls, "team-a", 1234)
    end(calls, "team-b", 3, is_test=False)
    assert calls.counts == {"team-a": 1234}
    logged = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in logged] == ["caller team-a"] * 4
    assert [int(line.split()[2]) for line in logged] == [1, 10, 100, 1000]


def test_addresses_are_counted_together(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    calls = NoLogCalls(CallerRights((), authenticated=False))
    for number in range(50):
        end(calls, f"10.0.0.{number}")
    assert calls.counts == {"": 50}
    assert len(caplog.records) == 2


def test_callers_in_the_file_and_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "bilm.toml").write_text(
        '[[callers]]\nname = "team-a"\nrights = ["no-log"]\n\n[[callers]]\nname = "team-b"\nmax_priority = "batch"\n'
    )
    first, second = load_config(["--config", str(file)]).callers
    assert (first, second.max_priority) == (CALLERS[0], Priority.BATCH)
    monkeypatch.setenv("BILM_CALLERS", '[{"name": "team-a", "rights": ["no-log"]}, {"name": "team-b"}]')
    assert load_config([]).callers == tuple(CALLERS)


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            'name = "a"\nrights = ["no-logs"]',
            "callers.0.rights.0: Input should be 'no-log' or 'reload' (",
        ),
        ('name = "a"\nrights = "no-log"', "callers.0.rights: "),
        ('name = ""', "callers.0.name: expected a name as the token file or the certificate gives it (found '')"),
        ('name = "a\\nb"', "callers.0.name: expected a name as the token file or the certificate gives it (found "),
        ('name = "a"\nmax_priority = "low"', "callers.0.max_priority: Input should be 'interactive' or 'batch'"),
        ("rights = []", "callers.0.name: Field required"),
        ('name = "a"\nright = []', "callers.0.right: Extra inputs are not permitted (found [])"),
        ('name = "a"\n[[callers]]\nname = "a"', "callers: names must differ, these are there twice: 'a'"),
    ],
)
def test_a_bad_caller_is_one_line_and_exit_code_2(
    table: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "bilm.toml").write_text(f"[[callers]]\n{table}\n")
    assert main(["--config", str(file)]) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"bilm-serve: {line}")


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CALLERS[0].name = "other"  # type: ignore[misc]
    with pytest.raises(ConfigurationError):
        load_config(["--callers", "team-a"])
