"""What the process's own control groups, of version 1 or 2, allow it: CPU time and memory.

A limit of any group above holds, too, so the lowest on the way up is what counts. Groups above the mounted ones, as in
a container, can't be seen; neither can the path of the process's group there, in which case the root of the mount is
its group.

Source: the kernel's documentation, "Control Group v2" (cpu.max, memory.max), "CFS Bandwidth Control"
(cpu.cfs_quota_us) and "Memory Resource Controller" (memory.limit_in_bytes).
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def cpu_quota(proc: Path = PROC, cgroups: Path = CGROUPS) -> float:
    """Return the cores that the process may keep busy on average; infinity where there is no limit.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups.
    """
    quotas = [_quotient((_text(group / "cpu.max") or "").split()) for group in _groups(proc, cgroups, "")]
    for group in _groups(proc, cgroups, "cpu"):
        files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        quotas.append(_quotient([_text(file) or "" for file in files]))
    return min(quotas, default=math.inf)


def memory_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the bytes that the process may have; the machine's memory where that is less, or there is no limit.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups.
    """
    files = [group / "memory.max" for group in _groups(proc, cgroups, "")]
    files += [group / "memory.limit_in_bytes" for group in _groups(proc, cgroups, "memory")]
    limits = [int(text) for file in files if (text := _text(file) or "").isdecimal()]  # otherwise "max"
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *limits])


def _groups(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Yield the process's group and those above it, of a controller of version 1, or of version 2 for ""."""
    for line in (_text(proc / "self" / "cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        for root in _roots(cgroups, controllers, controller):
            group = root / os.path.normpath(f"/{path}").lstrip("/")  # ".." stands for what a namespace hides
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _roots(cgroups: Path, controllers: str, controller: str) -> tuple[Path, ...]:
    """Return where a hierarchy may be mounted."""
    if not controller:
        return cgroups, cgroups / "unified"  # the latter beside version 1
    return tuple({cgroups / controller, cgroups / controllers})


def _text(file: Path) -> str | None:
    """Return what stands in a file; None where it isn't there or can't be read."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None


def _quotient(words: list[str]) -> float:
    """Return quota / period; infinity where there is no quota: "max", -1, or no such file."""
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        return math.inf
    return int(words[0]) / int(words[1])
