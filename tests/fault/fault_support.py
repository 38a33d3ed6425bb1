"""What tests need from the machine: programs and namespaces."""

import os
import shutil
import subprocess
from functools import cache


@cache
def missing(*programs: str) -> str:
    """Why a test that needs these programs has to be skipped; "" if they are there."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"needs {', '.join(absent)}, not found" if absent else ""


@cache
def missing_namespace(*flags: str) -> str:
    """Why a test that needs namespaces (flags of `unshare`) has to be skipped; "" if this user may have them."""
    if reason := missing("unshare", "ip"):
        return reason
    tried = subprocess.run([*unshare(*flags), "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"needs a namespace of its own: {tried.stderr.strip()}"


def unshare(*flags: str) -> list[str]:
    """The start of a command that runs in namespaces of its own."""
    return ["unshare", *(() if os.geteuid() == 0 else ("--map-root-user",)), *flags]
