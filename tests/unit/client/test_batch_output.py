"""Output files of `bilm-embed` on a disk that fills up, at any byte: one error, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from bilm_client.batch.outputs.base import new_output, read_run
from bilm_client.batch.outputs.deferring import DeferringFile
from bilm_system.files import replaced

# In a process of its own, because what it guards against ends the process, at the failure or at the interpreter's end
_SWEEP = """
import errno, random, resource, sys
from pathlib import Path
import numpy as np
from bilm_client.batch.outputs.base import new_output, read_run

output, n_lines, n_random = Path(sys.argv[1]), 600, int(sys.argv[2])

def make():
    with new_output(output, {"run": "this"}) as (write, write_sentences):
        for index in range(n_lines):
            write(str(index), np.full(16, index, np.float16))
        write_sentences({f"sentence {index}": str(index) for index in range(n_lines)})

make()
size = output.stat().st_size
output.unlink()
edges = [0, 1, 95, 96, 97, 2047, 2048, 4096, size // 2, size - 4096, size - 2, size - 1]
draw = random.Random(12)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in edges + [draw.randrange(size) for _ in range(n_random)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal, so that writes fail: EFBIG
    try:
        make()
    except OSError as error:
        assert error.errno == errno.EFBIG, error
    else:
        raise AssertionError(f"no failure below {limit} of {size} bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list(output.parent.iterdir()) == [], limit
make()
assert read_run(output) == {"run": "this"}
print("done")
"""


@pytest.mark.parametrize("n_random", [3, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["out.hdf5", "out.npz"])
def test_a_full_disk_is_one_error_wherever_it_comes(tmp_path: Path, name: str, n_random: int) -> None:
    command = [sys.executable, "-W", "error", "-c", _SWEEP, str(tmp_path / name), str(n_random)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_hdf5_reads_what_it_wrote_behind_a_failure(tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
    with os.fdopen(read_only, "rb", buffering=0) as raw:
        store = DeferringFile(raw)
        with h5py.File(store, "w") as file:
            for index in range(2000):  # more than HDF5 keeps of its structure
                file[str(index)] = np.full(4, index)
            assert all(file[str(index)][0] == index for index in range(2000))
        with pytest.raises(OSError, match="Bad file descriptor"):
            store.check()


def test_ctrl_c_does_not_go_through_hdf5(tmp_path: Path) -> None:
    class Interrupted:
        def fileno(self) -> int:
            raise KeyboardInterrupt

    store = DeferringFile(Interrupted())  # type: ignore[arg-type] # all that is asked of it
    with h5py.File(store, "w") as file:
        file["0"] = np.zeros(4)
    with pytest.raises(KeyboardInterrupt):
        store.check()


def test_a_failed_file_leaves_the_one_before(tmp_path: Path) -> None:
    def write_half() -> None:
        with replaced(path) as draft:
            draft.write_text("half")
            raise OSError("full")

    (path := tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="full"):
        write_half()
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]


@pytest.mark.parametrize("exists", [True, False])
def test_the_file_that_a_link_leads_to_is_replaced(tmp_path: Path, exists: bool) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (link := tmp_path / "out.npz").symlink_to(elsewhere / "real.npz")
    if exists:
        link.write_text("before")
    with new_output(link, {}) as (write, _):
        write("0", np.zeros(4))
    assert link.is_symlink()
    assert read_run(elsewhere / "real.npz") == {}
    assert [each.name for each in elsewhere.iterdir()] == ["real.npz"]
