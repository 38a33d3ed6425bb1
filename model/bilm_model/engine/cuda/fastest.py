"""The choice of the arithmetic between a tick's products."""

import os
import pwd
import shutil
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from bilm_model.device import is_lost
from bilm_model.engine.cuda.steps import Steps, TorchSteps, check_steps
from bilm_model.kernels.fallbacks import note_fallback

_COMPILERS = ("cc", "gcc", "clang")


def fastest_steps(device: torch.device, dtypes: Sequence[torch.dtype], new_steps: Callable[[], Steps]) -> Steps:
    """Return the fastest arithmetic that works on a device.

    Args:
        device: to compute on.
        dtypes: formats that it will be used with; each is tried, which compiles its kernels.
        new_steps: makes what is tried first, see `triton_steps`.

    Raises:
        torch.OutOfMemoryError: if there is no memory to try with; torch's operators wouldn't have it either.
        RuntimeError: if the device was lost, see `is_lost`.
    """
    try:
        steps = new_steps()
        for dtype in dtypes:
            check_steps(steps, device, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever keeps a kernel from being compiled or from computing what it should
        if is_lost(error):
            raise
        lacks = "".join(f"; {each}" for each in missing_for_triton(os.environ))
        wrong = RuntimeError(f"{type(error).__name__}: {error}{lacks}")
        note_fallback("elementwise", "Triton kernels unavailable, falling back to torch", wrong)
        return TorchSteps()
    return steps


def triton_steps() -> Steps:
    """Return the Triton kernels.

    Raises:
        ImportError: if there is no Triton.
    """
    # Not at the top: a machine without a GPU needn't have Triton
    from bilm_model.engine.cuda.triton_steps import TritonSteps  # noqa: PLC0415

    return TritonSteps()


def missing_for_triton(environment: Mapping[str, str], include: Path | None = None) -> list[str]:
    """Return what Triton needs at run time, to compile its launcher, and doesn't find; for people to read.

    Args:
        environment: variables of the process.
        include: folder of Python's headers; None: where they belong.
    """
    named, path = environment.get("CC"), environment.get("PATH", os.defpath)
    headers = include or Path(sysconfig.get_path("include"))
    kept = environment.get("TRITON_CACHE_DIR") or environment.get("TRITON_HOME") or environment.get("HOME") or _home()
    found = []
    if not any(shutil.which(each, path=path) for each in ([named] if named else _COMPILERS)):
        found.append(f"there is no C compiler ({named or ', '.join(_COMPILERS)}) on PATH")
    if not (headers / "Python.h").is_file():
        found.append(f"Python's headers are not in {headers}")
    if kept is None or not _can_write(Path(kept)):
        found.append(f"its cache can't be written below {kept or 'a home folder, which there is none of'}")
    if not any(os.access(folder, os.W_OK) for folder in _temporary_folders(environment)):
        found.append("no temporary folder can be written to")
    return found


def _home() -> str | None:
    """Return this user's home folder where no variable names it; None: there is no such user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def _can_write(folder: Path) -> bool:
    """Return whether a folder, or the nearest one above it that exists, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folders(environment: Mapping[str, str]) -> list[str]:
    named = [environment[name] for name in ("TMPDIR", "TEMP", "TMP") if name in environment]
    return [*named, "/tmp", "/var/tmp", "/usr/tmp"]  # noqa: S108 - only looked at
