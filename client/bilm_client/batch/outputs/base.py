"""The output files, made from a journal in one go: there is never a partial one under the final name.

HDF5 is laid out as by `allennlp elmo` (up to 0.9.0): one dataset a sentence under the line's index (or the sentence
itself), and `sentence_to_index`, shape (1,), a JSON object from sentence to index. What the run was stands in the
attribute `bilm_serve` of the root. An .npz has the same names as arrays.
"""

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from bilm_system.files import replaced
from numpy.typing import NDArray

from bilm_client.batch.outputs.deferring import DeferringFile
from bilm_client.cli.settings_sources import UsageError

RUN_KEY = "bilm_serve"
SENTENCES_KEY = "sentence_to_index"

Write = Callable[[str, NDArray[np.generic]], None]


@contextlib.contextmanager
def new_output(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, Callable[[dict[str, str]], None]]]:
    """Makes an output file; it appears under its name when the context has ended without an error.

    Yields:
        A function that writes a dataset, and one that writes `sentence_to_index`.
    """
    make = _npz if is_npz(path) else _hdf5
    with replaced(path) as draft, make(draft, run) as writers:
        yield writers


def is_npz(path: Path) -> bool:
    """Return whether an output's name says NumPy's archive; otherwise it is HDF5."""
    return path.suffix.lower() == ".npz"


def read_run(path: Path) -> dict[str, Any] | None:
    """What run made a whole output file; None if it wasn't made by this program.

    Raises:
        UsageError: if the file can't be read.
    """
    try:
        if is_npz(path):
            with np.load(path) as file:
                text = str(file[RUN_KEY]) if RUN_KEY in file else None
        else:
            # Given a name, HDF5 locks the file, which not every file system can
            with path.open("rb") as raw, h5py.File(raw, "r") as file:
                text = file.attrs.get(RUN_KEY)
        return None if text is None else dict(json.loads(text))
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        zipfile.BadZipFile,
    ) as error:  # h5py's, for damage
        raise UsageError(f"output: {path} is there and can't be read: {error}") from error


@contextlib.contextmanager
def _hdf5(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, Callable[[dict[str, str]], None]]]:
    with path.open("w+b", buffering=0) as raw:
        store = DeferringFile(raw)
        with h5py.File(store, "w") as file:

            def write(key: str, vectors: NDArray[np.generic]) -> None:
                file.create_dataset(key, data=vectors)
                store.check()

            def write_sentences(sentences: dict[str, str]) -> None:
                dataset = file.create_dataset(SENTENCES_KEY, (1,), dtype=h5py.string_dtype())
                dataset[0] = json.dumps(sentences)
                store.check()

            yield write, write_sentences
            file.attrs[RUN_KEY] = json.dumps(run)
        store.check()  # what was written while closing


@contextlib.contextmanager
def _npz(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, Callable[[dict[str, str]], None]]]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def write(key: str, vectors: NDArray[np.generic]) -> None:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(vectors, order="C"), allow_pickle=False)
            archive.writestr(f"{key}.npy", buffer.getbuffer())

        def write_sentences(sentences: dict[str, str]) -> None:
            write(SENTENCES_KEY, np.array([json.dumps(sentences)]))

        yield write, write_sentences
        write(RUN_KEY, np.array(json.dumps(run)))
