"""The output files, made from a journal in one go: there is never a partial one under the final name."""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bilm_system.files import replaced

from bilm_client.batch.outputs.hdf5 import read_hdf5_run, write_hdf5
from bilm_client.batch.outputs.layout import Write, WriteSentences
from bilm_client.batch.outputs.npz import read_npz_run, write_npz
from bilm_client.cli.settings_sources import UsageError

OpenOutput = Callable[[Path, dict[str, Any]], AbstractContextManager[tuple[Write, WriteSentences]]]
"""Opens the output of a run that made it; yields as `new_output` does."""

# What a damaged file raises, by h5py, zipfile or NumPy
_DAMAGE = (OSError, ValueError, TypeError, RuntimeError, LookupError, zipfile.BadZipFile)


@contextlib.contextmanager
def new_output(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, WriteSentences]]:
    """Write an output file; it appears under its name when the context has ended without an error.

    Yields:
        A function that writes a dataset, and one that writes `sentence_to_index`.
    """
    make = write_npz if is_npz(path) else write_hdf5
    with replaced(path) as draft, make(draft, run) as writers:
        yield writers


def is_npz(path: Path) -> bool:
    """Return whether an output's name says NumPy's archive; otherwise it is HDF5."""
    return path.suffix.lower() == ".npz"


def read_run(path: Path) -> dict[str, Any] | None:
    """Return what run made a whole output file; None if it wasn't made by this program.

    Raises:
        UsageError: The file can't be read.
    """
    try:
        text = read_npz_run(path) if is_npz(path) else read_hdf5_run(path)
        return None if text is None else dict(json.loads(text))
    except _DAMAGE as error:
        raise UsageError(f"output: {path} is there and can't be read: {error}") from error
