"""What a run keeps beside its logs: parameters and vocabulary, whole or not at all."""

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from bilm_system.files import reason, replaced
from torch import nn

from bilm_training.data.vocabulary import Vocabulary
from bilm_training.errors import RunError
from bilm_training.objectives.objective import Objective
from bilm_training.runs.run_folder import RunFolder

_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError)

Save = Callable[[dict[str, Any], BinaryIO], None]
"""Writes a checkpoint's content to an open file."""


def read_vocabulary(folder: RunFolder) -> Vocabulary:
    """Return the words of a run's softmax.

    Raises:
        RunError: if they can't be read.
    """
    try:
        return Vocabulary.from_text(folder.vocabulary.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{folder.vocabulary}: {reason(error)}") from error


def load_best(folder: RunFolder, objective: Objective) -> None:
    """Give an objective the parameters that were best on the validation text.

    Raises:
        RunError: if they can't be read, or are another objective's.
    """
    load_parameters(cast(nn.Module, objective), read_checkpoint(folder.best), folder.best)


def load_parameters(module: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Give a module the parameters that a file has.

    Raises:
        RunError: if they are another module's; names the file.
    """
    try:
        module.load_state_dict(content)
    except RuntimeError as error:
        raise RunError(f"{path}: doesn't fit the run's configuration and vocabulary: {error}") from error


def write_checkpoint(path: Path, content: dict[str, Any], save: Save = torch.save) -> None:
    """Write a file that `read_checkpoint` reads, as a whole or not at all."""
    # Given a path, torch writes by itself, and doesn't say why it can't
    with replaced(path) as draft, draft.open("wb") as file:
        save(content, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what torch.save wrote; torch itself doesn't look at the checksums in the file.

    Raises:
        RunError: if the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
            # These have no checksum, and by one of their bits torch takes a tensor for a folder, and anything for it
            attributes = [entry.filename for entry in file.infolist() if entry.external_attr]
        if damaged is not None or attributes:
            raise RunError(f"{path}: damaged ({damaged or attributes[0]})")
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing") from error
    except (*_DAMAGED, OSError, EOFError, RuntimeError, ValueError) as error:
        raise RunError(f"{path}: damaged: {reason(error)}") from error
    return content
