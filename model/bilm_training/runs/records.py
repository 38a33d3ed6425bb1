"""The lines of a run's logs. A kill can leave half a line at a log's end, which is passed over."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from bilm_system.files import naming

from bilm_training.errors import RunError

Record = TypeVar("Record", "StepRecord", "EpochRecord")


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


def append_record(file: FileIO, path: Path, record: StepRecord | EpochRecord) -> None:
    """Write a record as a line to a log that is open without a buffer.

    Raises:
        OSError: names the path.
    """
    # JSON knows no NaN: other programs would stumble over a run that has diverged
    values = {key: value if math.isfinite(value) else None for key, value in asdict(record).items()}
    line = json.dumps(values).encode() + b"\n"
    with naming(path):
        while line:
            line = line[file.write(line) :]


def read_records(path: Path, kind: type[Record]) -> Iterator[tuple[bytes, Record]]:
    """Yield each whole line of a log with its record; nothing if there is no log.

    Raises:
        RunError: at a line that is no record, unless it is half a line at the end.
    """
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
    # To Python, a bool is an int; to a reader of the log it isn't
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{name}: expected a {'whole ' if whole else ''}number, found {value!r}")
    return value if whole else float(value)
