"""Every file that a user can name, to every command, being everything that a path can be: one line and an exit code."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bilm_bench.main import main as bilm_bench
from bilm_client.batch.main import main as bilm_embed
from bilm_client.cli.health_check import main as bilm_health
from bilm_model.errors import ModelError
from bilm_model.weights.convert import main as bilm_convert
from bilm_server.config_sources import load_config
from bilm_server.errors import ConfigurationError
from bilm_server.main import exit_code
from bilm_server.main import main as bilm_serve
from bilm_server.security.auth import Authenticator
from bilm_server.security.tls import server_credentials
from bilm_server.served_model import load_served_model
from bilm_training.main import main as bilm_train

MODEL = Path(__file__).parents[1] / "data" / "golden" / "relu-2highway"
NOBODY = 65534
READ = ("missing", "folder", "dangling", "loop", "pipe", "device", "empty", "long", "below a file", "NUL", "unreadable")
UNUSABLE = ("folder", "loop", "pipe", "device", "long", "below a file", "unreadable")
WRITTEN = ("folder", "loop", "pipe", "long", "below a file", "NUL", "unreadable")


@dataclass(frozen=True)
class Door:
    """A place in a command line, PATH, that takes a file's name."""

    command: Callable[[list[str]], int]
    arguments: str
    code: int
    kinds: tuple[str, ...] = READ
    refused: tuple[str, ...] = ()
    """Kinds with exit code 2 in place of `code`: no supervisor need try again."""

    @property
    def name(self) -> str:
        return f"{self.command.__module__.split('.')[-2]}: {self.arguments}"

    def but(self, *kinds: str) -> "Door":
        """Without those that are fine here."""
        return replace(self, kinds=tuple(kind for kind in self.kinds if kind not in kinds))


def _model(argv: list[str]) -> int:
    return _reported(lambda: load_served_model(load_config(argv)))


def _tokens(argv: list[str]) -> int:
    return _reported(Authenticator(Path(argv[0])).load)


def _certificate(argv: list[str]) -> int:
    return _reported(lambda: server_credentials(Path(argv[0]), Path(argv[1])))


def _reported(start: Callable[[], object]) -> int:
    """As `bilm-serve` ends: its log and signals are for a process of its own."""
    import sys

    try:
        start()
    except (ConfigurationError, ModelError) as error:
        print(f"bilm-serve: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


DOORS = (
    Door(bilm_embed, "PATH out.npz", 2).but("pipe"),  # waited for, as cat does
    Door(bilm_embed, "text PATH.npz", 2, WRITTEN),
    Door(bilm_embed, "text out.npz --errors PATH", 2, WRITTEN),
    Door(bilm_embed, "text out.npz --config PATH", 2).but("empty", "pipe"),
    Door(bilm_embed, "text out.npz --ca-file PATH", 2),
    Door(bilm_embed, "text out.npz --token-file PATH", 2),
    Door(bilm_bench, "--text PATH", 2),
    Door(bilm_bench, "--text text --config PATH", 2).but("empty", "pipe"),
    Door(bilm_bench, "--text text --ca-file PATH", 2),
    Door(bilm_bench, "--text text --token-file PATH", 2),
    Door(bilm_bench, "--text text --json PATH", 2, WRITTEN).but("pipe"),  # read by another command, `>(jq)`
    Door(bilm_bench, "--text text --html PATH", 2, WRITTEN).but("pipe"),
    Door(bilm_health, "--ca-file PATH", 2),
    Door(bilm_health, "--token-file PATH", 2),
    Door(bilm_serve, "--config PATH", 2).but("empty", "pipe"),
    Door(bilm_serve, "--test-log PATH", 2, WRITTEN),
    Door(bilm_serve, "--check-config --model PATH", 2),
    Door(bilm_serve, "--check-config --model MODEL/weights.hdf5 --options PATH", 2),
    Door(bilm_serve, "--check-config --token-file PATH", 2),
    Door(bilm_serve, "--check-config --tls-cert PATH --tls-key MODEL/options.json", 2),
    Door(bilm_serve, "--check-config --test-log PATH", 2, WRITTEN).but("pipe"),  # somebody may read it by then
    Door(_model, "--model PATH", 1, refused=UNUSABLE[1:]),  # of an empty folder, files are missing
    Door(_model, "--model MODEL/weights.hdf5 --options PATH", 1, refused=UNUSABLE),
    Door(_tokens, "PATH", 1, refused=UNUSABLE),
    Door(_certificate, "PATH MODEL/options.json", 1, refused=UNUSABLE),
    Door(bilm_convert, "PATH out.safetensors", 1),
    Door(bilm_convert, "MODEL/weights.hdf5 out.safetensors --options PATH", 1),
    Door(bilm_convert, "MODEL PATH.safetensors --overwrite", 1, WRITTEN).but("loop", "pipe", "NUL"),
    Door(bilm_train, "run PATH --out run", 1).but("empty", "pipe"),
    Door(bilm_train, "run mini --train PATH --valid text --out run", 1),
    Door(bilm_train, "run mini --train text --valid PATH --out run", 1),
    Door(bilm_train, "resume PATH", 1),
    Door(bilm_train, "eval PATH --neighbours text", 1),
    Door(bilm_train, "eval MODEL --neighbours PATH", 1),
    Door(bilm_train, "eval MODEL --treebank PATH", 1),
    Door(bilm_train, "compare PATH", 1),
    Door(bilm_train, "export PATH out.safetensors", 1),
)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that every user can enter; pytest's own are for one."""
    with tempfile.TemporaryDirectory(prefix="bilm-named-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "text").write_text("one sentence with some words .\n" * 200)
        monkeypatch.chdir(folder)
        yield folder


def _make(kind: str, folder: Path, suffix: str) -> str:
    """Make such a thing, and return its name."""
    path = folder / f"it{suffix}"
    match kind:
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to(folder / "nowhere")
        case "loop":
            path.symlink_to(path)
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/null")
        case "empty":
            path.touch()
        case "long":
            return f"{folder}/{'n' * 300}{suffix}"
        case "below a file":
            (folder / "text").touch()
            return f"{folder}/text/it{suffix}"
        case "NUL":
            return f"{folder}/a\0b{suffix}"
        case "unreadable":
            (folder / "closed").mkdir(mode=0o700)
            (folder / "closed" / f"it{suffix}").touch()
            (folder / "closed").chmod(0o700 if os.geteuid() == 0 else 0o000)
            return f"{folder}/closed/it{suffix}"
    return str(path)


@contextlib.contextmanager
def _somebody_else(kind: str) -> Iterator[None]:
    """Run as a user for whom modes count; another user's folder is closed to the superuser, then."""
    if kind == "unreadable" and os.geteuid() == 0:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_a_path_that_cannot_be_used_is_one_line_and_an_exit_code(
    door: Door, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in door.kinds:
        folder = place / kind.replace(" ", "-")
        folder.mkdir()
        suffix = next((word[4:] for word in door.arguments.split() if word.startswith("PATH")), "")
        path = _make(kind, folder, suffix)
        words = [word.replace("MODEL", str(MODEL)) for word in door.arguments.split()]
        argv = [path if word.startswith("PATH") else word for word in words]
        with _somebody_else(kind):
            code = door.command(argv)
        told = capfd.readouterr()
        expected = 2 if kind in door.refused else door.code
        assert (kind, code, told.out, told.err.count("\n")) == (kind, expected, "", 1), told.err
        assert told.err.startswith("bilm-"), told.err
        if kind == "unreadable":
            (folder / "closed").chmod(0o700)
        assert sorted(each.name for each in place.iterdir() if each.is_file()) == ["text"], kind
        shutil.rmtree(folder)
