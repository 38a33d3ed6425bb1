"""Commands on a file system without locks, made by a library that fails `flock` before the system's is asked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.batch_support import datasets, journal_of, write
from tests.support.processes import started
from tests.support.servers import LoopServer

PUBLISHED = Path(__file__).parents[1] / "data" / "golden" / "relu-2highway"
_MISSING = "int flock(int file, int operation) { errno = %d; return -1; }"
_COMPILER = next((cc for cc in ("/usr/bin/cc", "/usr/bin/gcc", "/usr/bin/clang") if Path(cc).exists()), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="preloading is done as on Linux"),
    pytest.mark.skipif(_COMPILER is None, reason="needs a C compiler"),
]


@pytest.fixture(params=[37, 38, 95, 524], ids=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUPP"])
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    library, source = tmp_path / "noflock.so", tmp_path / "noflock.c"
    source.write_text(f"#include <errno.h>\n{_MISSING % request.param}\n")
    subprocess.run([str(_COMPILER), "-shared", "-fPIC", "-o", library, source], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def test_a_run_continues_with_a_warning(server: LoopServer, tmp_path: Path, environment: dict[str, str]) -> None:
    text, output = write(tmp_path / "in.txt", "one line", "another"), tmp_path / "out.hdf5"
    command = [sys.executable, "-m", "bilm_client.batch", str(text), str(output), "--target", server.target]
    for flags, expected in (((), "2 sentences"), (("--resume",), "whole already")):
        with started(
            [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert expected in out
        warning = f"bilm-embed: {journal_of(output)}: no locks on this file system: nothing keeps a second run out"
        assert errors.splitlines() == ([] if flags else [warning])
    assert datasets(output).keys() == {"0", "1"}


def test_published_files_are_converted_and_a_run_folder_is_taken(tmp_path: Path, environment: dict[str, str]) -> None:
    single, folder = str(tmp_path / "model.safetensors"), str(tmp_path / "folder")
    for source, target in ((str(PUBLISHED), single), (single, folder)):
        convert = [sys.executable, "-m", "bilm_model.weights.convert", source, target]
        ended = subprocess.run(convert, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")
    take = "import sys; from pathlib import Path; from bilm_training.runs.run_folder import RunFolder\n"
    take += "with RunFolder(Path(sys.argv[1])).taken(): print('taken')"
    ended = subprocess.run(
        [sys.executable, "-c", take, str(tmp_path / "run")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "taken\n"), ended.stderr
    assert "no locks on this file system: nothing keeps a second process out" in ended.stderr
