"""The built wheel in empty environments: what makes of a folder of sources a thing that others install."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bilm_training.recipe import PRESETS

ROOT = Path(__file__).parents[2]
SOURCES = ("system", "proto", "model", "server", "client", "pyproject.toml", "LICENSE", "README.md")
SERVE: tuple[str, ...] = ()  # no --model: the one that ships


def run(*command: str | Path, timeout_s: float = 300) -> str:
    """What a command wrote; fails with it."""
    # Not in the tree, and without its paths: only what is installed may be found
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BILM_"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=tempfile.gettempdir(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside its sources, and takes what an earlier build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    [path] = folder.glob("*.whl")
    return path


class Environment:
    """An environment with nothing but the wheel and what it asks for."""

    def __init__(self, folder: Path, requirement: str) -> None:
        venv.create(folder, with_pip=True)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        probe = [str(self.bin / "python"), "-m", "pip", "download", "--no-deps", "--dest", str(folder), "tomli"]
        if (done := subprocess.run(probe, capture_output=True, text=True, check=False)).returncode:
            pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1]}")
        pip = (self.bin / "python", "-m", "pip", "install", "--no-compile")  # most of torch is never imported
        run(*pip, "-c", ROOT / "constraints.txt", requirement, timeout_s=600)

    def python(self, code: str) -> str:
        return run(self.bin / "python", "-W", "error", "-c", code)


@pytest.fixture(scope="module")
def light(wheel: Path) -> Iterator[Environment]:
    with tempfile.TemporaryDirectory(prefix="bilm-light-") as folder:
        yield Environment(Path(folder), str(wheel))


@pytest.fixture(scope="module")
def full(wheel: Path) -> Iterator[Environment]:
    with tempfile.TemporaryDirectory(prefix="bilm-full-") as folder:  # pytest would keep some, of a GiB each
        yield Environment(Path(folder), f"{wheel}[server,files]")


def test_the_wheel_has_the_data_files_too(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    parts = ("api", "bench", "client", "local", "model", "server", "system", "training")
    packages = {f"bilm_{part}" for part in parts}
    assert {f"{package}/py.typed" for package in packages} <= names
    assert "bilm_api/v1/embed.proto" in names
    assert "bilm_api/inference/open_inference.proto" in names
    assert "bilm_api/v1/embed_pb2.pyi" in names
    assert "bilm_api/v1/embed.binpb" in names
    assert "bilm_model/pretrained/wikitext2-mini.safetensors" in names
    page = ROOT / "server" / "bilm_server" / "protocols" / "http" / "page"
    assert {f"bilm_server/protocols/http/page/{path.name}" for path in page.iterdir()} <= names
    assert {f"bilm_training/presets/{name}.toml" for name in PRESETS} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages  # no tests, no benchmarks
    assert wheel.stat().st_size < 20 * 2**20


@pytest.mark.slow
def test_the_client_alone_is_light(light: Environment) -> None:
    code = "import bilm_client, json, sys; print(json.dumps([bilm_client.__file__, sorted(sys.modules)]))"
    place, modules = json.loads(light.python(code))
    assert "site-packages" in place
    assert not {"torch", "h5py", "pydantic"} & set(modules)
    names = {each["name"].lower() for each in json.loads(run(light.bin / "pip", "list", "--format", "json"))}
    assert {"bilm-serve", "grpcio", "numpy", "protobuf"} <= names
    assert not {"torch", "h5py", "pydantic", "pydantic-settings", "tqdm", "safetensors"} & names


@pytest.mark.slow
def test_the_batch_program_says_what_it_lacks(light: Environment) -> None:
    done = subprocess.run([light.bin / "bilm-embed", "in", "out.npz"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "bilm-embed: needs the extra `files`: pip install 'bilm-serve[files]'\n"


@contextmanager
def serving(environment: Environment, folder: Path) -> Iterator[str]:
    from bilm_client.testing.server import wait_until_serving

    target = f"unix:{folder}/socket"
    with (folder / "log").open("w+") as log:
        command = [str(environment.bin / "bilm-serve"), "--listen", target, "--drain-delay-s", "0", *SERVE]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            wait_until_serving(target, process, 120)
            yield target
        finally:
            process.terminate()
            code = process.wait(30)
            log.seek(0)
            assert code == 0, log.read()


@pytest.mark.slow
def test_it_serves_and_embeds(full: Environment, light: Environment) -> None:
    with tempfile.TemporaryDirectory(prefix="bilm-") as name:  # short: a Unix socket's path has to be
        folder = Path(name)
        (folder / "in.txt").write_text("The cat sat on the mat .\nHello\n")
        with serving(full, folder) as target:
            assert run(full.bin / "bilm-health", "--target", target).strip() == "SERVING"
            assert "* the default model" in run(light.bin / "bilm-models", "list", "--target", target)
            run(full.bin / "bilm-embed", folder / "in.txt", folder / "out.hdf5", "--target", target)
        code = f"import h5py; f = h5py.File({str(folder / 'out.hdf5')!r}); print([f[k].shape[:2] for k in '01'])"
        assert full.python(code).strip() == "[(3, 7), (3, 1)]"
