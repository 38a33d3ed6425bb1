import shutil
from pathlib import Path

import pytest
from bilm_model.kernels.kernel_cache import CachedKernels, use_store
from bilm_server.config import ServerConfig
from bilm_server.config_sources import load_config
from bilm_server.errors import ConfigurationError
from bilm_server.main import main
from bilm_server.served_model import load_served_model


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServerConfig.model_fields:
        monkeypatch.delenv(f"BILM_{name.upper()}", raising=False)


def test_flag_before_environment_before_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bilm.toml"
    file.write_text('threads = 1\nmax_rows = 11\nlisten = "unix:/tmp/x"\n')
    monkeypatch.setenv("BILM_MAX_ROWS", "22")
    monkeypatch.setenv("BILM_THREADS", "2")
    config = load_config(["--config", str(file), "--threads", "3"])
    assert (config.threads, config.max_rows, config.listen) == (3, 22, "unix:/tmp/x")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bilm.toml"
    file.write_text("reflection = true\n")
    monkeypatch.setenv("BILM_CONFIG", str(file))
    assert load_config([]).reflection
    assert not load_config(["--no-reflection"]).reflection


def test_defaults_are_safe() -> None:
    config = load_config([])
    assert config.listen.startswith("127.0.0.1:")
    assert not config.reflection


def test_every_error_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bilm.toml"
    file.write_text('unknown_choice = 1\nlog_level = "loud"\n')
    flags = ["--config", str(file), "--listen", "nowhere", "--device", "tpu", "--precision", "int8", "--threads", "-1"]
    assert main(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    for name in ("unknown_choice", "log_level", "listen", "device", "precision", "threads"):
        assert any(line.startswith(f"bilm-serve: {name}: ") for line in lines), name
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--max-tokens-per-request", "70000"],
            "max_waiting_tokens: must not be less than .*, 70000",
        ),
        (
            ["--max-tokens-per-sentence", "70000", "--max-tokens-in-flight", "100000"],
            "max_stream_tokens: must not be less than .*, 70000",
        ),
        (["--max-tokens-per-sentence", "57343"], "max_tokens_per_sentence: must not be more than 57342"),
        (["--max-waiting-mib", "15"], "max_waiting_mib: must be at least 16"),
        (["--listen", "unix:"], "a Unix socket needs a path"),
        (["--health-listen", "unix://host/s"], "expected unix:PATH or unix:///ABSOLUTE_PATH"),
        (["--listen", f"unix:/{'s' * 107}"], "a Unix socket's path may have 107 bytes"),
        (["--listen", "unix-abstract:50051"], "abstract sockets are not supported"),
        (["--listen", "h:70000"], "expected HOST:PORT"),
        (["--listen", "a..b:80"], "listen: expected HOST:PORT"),
        (["--ready-listen", ".local:80"], "ready_listen: expected HOST:PORT"),
        (["--metrics-listen", f"{'h' * 64}:80"], "metrics_listen: expected HOST:PORT"),
        (["--health-listen", "h\0:80"], "health_listen: expected HOST:PORT"),
        (["--config", "/nowhere.toml"], "config: /nowhere.toml: No such file"),
    ],
)
def test_what_does_not_go_together(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config(flags)


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    file = tmp_path / "bilm.toml"
    file.write_text("threads = = 1")
    with pytest.raises(ConfigurationError, match="bilm.toml"):
        load_config(["--config", str(file)])


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "bilm.toml"
    file.write_bytes(b"\xef\xbb\xbfthreads = 3\r\n")
    assert load_config(["--config", str(file)]).threads == 3
    file.write_bytes("threads = 3".encode("utf-16"))
    with pytest.raises(ConfigurationError, match="config: .*: the text is UTF-16, little-endian, expected UTF-8"):
        load_config(["--config", str(file)])


@pytest.mark.parametrize("name", ["a b", "größe", "a" * 65, "org/model"])
def test_a_name_that_a_model_cannot_have(name: str) -> None:
    with pytest.raises(ConfigurationError, match="served_model_name: "):
        load_config(["--served-model-name", name])
    assert load_config(["--served-model-name", "elmo_5.5B-v1"]).served_model_name == "elmo_5.5B-v1"


@pytest.mark.parametrize(
    ("folder", "name"), [("elmo_5.5B", "elmo_5.5B"), ("mein modell", "mein-modell"), ("a" * 70, "a" * 64)]
)
def test_a_model_is_served_under_the_name_of_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    golden = Path(__file__).parents[2] / "data" / "golden" / "relu-2highway"
    shutil.copytree(golden, tmp_path / folder)
    assert load_served_model(load_config(["--model", str(tmp_path / folder)])).name == name


def test_kernels_are_kept_where_the_configuration_says(tmp_path: Path) -> None:
    before = use_store(CachedKernels(tmp_path / "before"))
    try:
        load_served_model(load_config(["--model", "random:tiny", "--kernel-cache", str(tmp_path / "kernels")]))
        store = use_store(before)
        assert isinstance(store, CachedKernels)
        assert store.folder == tmp_path / "kernels"
    finally:
        use_store(before)
