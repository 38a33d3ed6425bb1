"""A training run's folder: what lies where.

```
config.toml         the effective configuration
vocabulary.txt      the words of the softmax, one a line
checkpoint.pt       the last checkpoint
best.pt             the parameters that are best on the validation text so far, the softmax included
model.safetensors   the biLM of best.pt, ready to serve
steps.jsonl         a StepRecord a line
epochs.jsonl        an EpochRecord a line
tensorboard/        the same as TensorBoard's scalars
eval.json           what `bilm-train eval` found
lock                locked by the process that trains into the folder, for as long as it lives
```

Whole files appear by renaming (`replaced`). A log grows line by line; a kill can leave half a line at its end, which
readers pass over and the next `RunLog` cuts off.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from bilm_system.files import lock

from bilm_training.errors import RunError
from bilm_training.runs.records import EpochRecord, StepRecord, read_records

_log = logging.getLogger(__name__)


class RunFolder:
    """Where a run's files are; nothing is read or made before a method is called. The attributes are paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.vocabulary = path / "vocabulary.txt"
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.model = path / "model.safetensors"
        self.steps = path / "steps.jsonl"
        self.epochs = path / "epochs.jsonl"
        self.tensorboard = path / "tensorboard"
        self.eval = path / "eval.json"
        self.lock = path / "lock"

    @classmethod
    def of_run(cls, path: Path) -> Self:
        """Return the folder of a run that has been started.

        Raises:
            RunError: if there is no such folder, or no run in it.
        """
        if not path.is_dir():
            raise RunError(f"{path}: no such folder")
        folder = cls(path)
        if not folder.config.is_file():
            raise RunError(f"{path}: not the folder of a run ({folder.config.name} is missing)")
        return folder

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Keep other processes from training into the folder, which is made where it is missing.

        A process that is killed leaves it free. If the body fails before it has written anything, a folder that was
        missing is missing again.

        Raises:
            RunError: if another process has it.
            OSError: if the folder can't be made.
        """
        missing = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("ab") as file:
            try:
                if not lock(file):
                    _log.warning("%s: no locks on this file system: nothing keeps a second process out", self.lock)
            except BlockingIOError as error:
                raise RunError(f"{self.path}: another process is training into it") from error
            try:
                yield
            finally:
                if missing and [path.name for path in self.path.iterdir()] == [self.lock.name]:
                    self.lock.unlink()
                    self.path.rmdir()

    def read_steps(self) -> Iterator[StepRecord]:
        """Yield all steps, line by line; none if the log isn't there.

        Raises:
            RunError: at a line that is no record, unless it is half a line at the end.
        """
        return (record for _, record in read_records(self.steps, StepRecord))

    def read_epochs(self) -> Iterator[EpochRecord]:
        """Yield all finished epochs; otherwise like `read_steps`."""
        return (record for _, record in read_records(self.epochs, EpochRecord))
