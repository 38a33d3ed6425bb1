"""HDF5, laid out as by `allennlp elmo` (up to 0.9.0).

One dataset a sentence, and `sentence_to_index`, shape (1,). What the run was is in an attribute of the root.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from bilm_client.batch.outputs.deferring import DeferringFile
from bilm_client.batch.outputs.layout import RUN_KEY, SENTENCES_KEY, Write, WriteSentences


@contextlib.contextmanager
def write_hdf5(path: Path, run: dict[str, Any]) -> Iterator[tuple[Write, WriteSentences]]:
    """Write an HDF5 file; it is whole when the context has ended without an error.

    Yields:
        A function that writes a dataset, and one that writes `sentence_to_index`.
    """
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


def read_hdf5_run(path: Path) -> str | None:
    """Return the JSON of the run that made a file; None if it wasn't made by this program."""
    # Given a name, HDF5 locks the file, which not every file system can
    with path.open("rb") as raw, h5py.File(raw, "r") as file:
        text: str | None = file.attrs.get(RUN_KEY)
    return text
