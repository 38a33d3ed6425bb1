"""The logs of a run, written so that they survive a kill at any moment."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bilm_system.files import naming, replaced

from bilm_training.errors import RunError
from bilm_training.runs.records import EpochRecord, Record, StepRecord, append_record, read_records
from bilm_training.runs.run_folder import RunFolder

if TYPE_CHECKING:  # a run that is only read needs no TensorBoard
    from torch.utils.tensorboard import SummaryWriter


@dataclass(eq=False)
class RunLog:
    """Appends to a run's logs, as a context manager; entering it cuts off what lies beyond the step to continue from.

    Attributes:
        folder: of the run; it must be there.
        last_step: that of the checkpoint that the run continues from; 0: a new run.

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
        """Append a step."""
        append_record(self._steps, self.folder.steps, record)
        self._draw(record)

    def epoch(self, record: EpochRecord) -> None:
        """Append an epoch."""
        append_record(self._epochs, self.folder.epochs, record)
        self._draw(record)

    def sync(self) -> None:
        """Write all lines to the disk; to be called before a checkpoint, which must not be ahead of them."""
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


def _cut(path: Path, kind: type[Record], last_step: int) -> None:
    if path.exists():
        with replaced(path) as draft, draft.open("wb") as file:
            file.writelines(line for line, record in read_records(path, kind) if record.step <= last_step)
