"""A training run's folder: what lies where, and the logs that survive a kill at any moment.

```
config.toml         the effective configuration
vocabulary.txt      the words of the softmax, one a line
checkpoint.pt       the last checkpoint
best.pt             the parameters with the best figure on the validation text so far, the softmax included
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

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from bilm_model.errors import ModelError
from bilm_system.files import lock, naming, replaced

if TYPE_CHECKING:  # a run that is only read needs no TensorBoard
    from torch.utils.tensorboard import SummaryWriter


_log = logging.getLogger(__name__)

Record = TypeVar("Record", "StepRecord", "EpochRecord")


class RunError(ModelError):
    """A run's folder that is missing, damaged, or none; the message names it, or file and line."""


@dataclass(frozen=True)
class StepRecord:
    """A line of steps.jsonl. A number that isn't finite stands there as null.

    Attributes:
        step: from 1, over the whole run.
        epoch: from 1.
        loss: mean negative log likelihood a token, of both directions, in nats; for a student, see `valid_forward`.
        loss_forward: the same, forward.
        loss_backward: the same, backward.
        learning_rate: of this step.
        gradient_norm: Euclidean, before it was clipped.
        tokens_per_s: each token counted once for both directions; reading the text is part of the time.
        seconds: since the start of the run, the time of interruptions left out.
    """

    step: int
    epoch: int
    loss: float
    loss_forward: float
    loss_backward: float
    learning_rate: float
    gradient_norm: float
    tokens_per_s: float
    seconds: float

    @property
    def scalars(self) -> dict[str, float]:
        """TensorBoard's curves, by name."""
        values = asdict(self)
        return {f"train/{name}": values[name] for name in values if name not in ("step", "epoch", "seconds")}


@dataclass(frozen=True)
class EpochRecord:
    """A line of epochs.jsonl. A number that isn't finite stands there as null.

    Attributes:
        epoch: from 1.
        step: the epoch's last one.
        train_loss: mean over the epoch, both directions, with dropout, in nats a token.
        valid_forward: perplexity on the validation text; for a student, the share of its teacher's variance that it
            doesn't explain.
        valid_backward: the same, backward.
        tokens_per_s: as in a step's record, over the epoch.
        seconds: since the start of the run, the time of interruptions left out.
    """

    epoch: int
    step: int
    train_loss: float
    valid_forward: float
    valid_backward: float
    tokens_per_s: float
    seconds: float

    @property
    def valid_mean(self) -> float:
        """The mean of the two directions' perplexities."""
        return (self.valid_forward + self.valid_backward) / 2

    @property
    def scalars(self) -> dict[str, float]:
        """TensorBoard's curves, by name."""
        return {
            "epoch/train_loss": self.train_loss,
            "epoch/tokens_per_s": self.tokens_per_s,
            "valid/mean": self.valid_mean,
            "valid/forward": self.valid_forward,
            "valid/backward": self.valid_backward,
        }


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
        """The folder of a run that has been started.

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
        """Keeps other processes from training into the folder, which is made where it is missing.

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
        """All steps, line by line; none if the log isn't there.

        Raises:
            RunError: at a line that is no record, unless it is half a line at the end.
        """
        return (record for _, record in _read(self.steps, StepRecord))

    def read_epochs(self) -> Iterator[EpochRecord]:
        """All finished epochs; otherwise like `read_steps`."""
        return (record for _, record in _read(self.epochs, EpochRecord))


# ---- logs ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class RunLog:
    """Appends to a run's logs, as a context manager; entering it cuts off what lies beyond the step to go on from.

    Attributes:
        folder: of the run; it must be there.
        last_step: that of the checkpoint that the run goes on from; 0: a new run.

    Raises:
        RunError: on entering, if a log is damaged or TensorBoard is not installed.
        OSError: if something can't be written; names the file, and leaves at most the last line cut off.
    """

    folder: RunFolder
    last_step: int = 0

    def __enter__(self) -> Self:
        writer = _summary_writer()
        _cut(self.folder.steps, StepRecord, self.last_step)
        _cut(self.folder.epochs, EpochRecord, self.last_step)
        with ExitStack() as stack:
            # unbuffered: a line is the operating system's at once, and closing has nothing left to fail at
            self._steps = stack.enter_context(self.folder.steps.open("ab", buffering=0))
            self._epochs = stack.enter_context(self.folder.epochs.open("ab", buffering=0))
            with naming(self.folder.tensorboard):
                # without purge_step, TensorBoard would draw what lies beyond the checkpoint twice
                self._board = writer(str(self.folder.tensorboard), purge_step=self.last_step + 1)
            stack.callback(self._close_board)
            self._opened = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def step(self, record: StepRecord) -> None:
        """Adds a step."""
        _append(self._steps, self.folder.steps, record)
        self._draw(record)

    def epoch(self, record: EpochRecord) -> None:
        """Adds an epoch."""
        _append(self._epochs, self.folder.epochs, record)
        self._draw(record)

    def sync(self) -> None:
        """Returns when all lines are on the disk; to be called before a checkpoint, which must not be ahead of them."""
        for file, path in ((self._steps, self.folder.steps), (self._epochs, self.folder.epochs)):
            with naming(path):
                os.fsync(file.fileno())
        with naming(self.folder.tensorboard):
            self._board.flush()

    def _draw(self, record: StepRecord | EpochRecord) -> None:
        with naming(self.folder.tensorboard):
            for tag, value in record.scalars.items():
                self._board.add_scalar(tag, value, record.step)

    def _close_board(self) -> None:
        with naming(self.folder.tensorboard):
            self._board.close()


def _summary_writer() -> "type[SummaryWriter]":
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise RunError(f"{error}: training needs TensorBoard, pip install 'bilm-serve[train]'") from error
    return SummaryWriter


def _append(file: FileIO, path: Path, record: StepRecord | EpochRecord) -> None:
    # JSON knows no NaN: other programs would stumble over a run that has diverged
    values = {key: value if math.isfinite(value) else None for key, value in asdict(record).items()}
    line = json.dumps(values).encode() + b"\n"
    with naming(path):
        while line:
            line = line[file.write(line) :]


def _cut(path: Path, kind: type[Record], last_step: int) -> None:
    if path.exists():
        with replaced(path) as draft, draft.open("wb") as file:
            file.writelines(line for line, record in _read(path, kind) if record.step <= last_step)


def _read(path: Path, kind: type[Record]) -> Iterator[tuple[bytes, Record]]:
    """Each whole line with its record."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # a kill came before its end
            try:
                record = _record(json.loads(line), kind)
            except ValueError as error:
                raise RunError(f"{path}, line {number}: {error}") from error
            yield line, record


def _record(values: object, kind: type[Record]) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {values!r}")
    return kind(**{field.name: _number(values, field.name, field.type is int) for field in fields(kind)})


def _number(values: dict[str, Any], name: str, whole: bool) -> Any:
    if name not in values:
        raise ValueError(f"{name}: missing")
    value = values[name]
    if value is None and not whole:
        return math.nan
    # bool is an int to Python, not to whoever reads the log
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name}: expected a {'whole ' if whole else ''}number, found {value!r}")
    return value if whole else float(value)
