"""What another process uses: its threads' processor time and its memory, from /proc."""

import os
from pathlib import Path

EVENT_LOOP = "event loop"

_MEMORY = ("VmRSS", "RssAnon", "RssFile")
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def thread_cpu_s(process_id: int) -> dict[str, float]:
    """Return seconds of processor time of each thread of a process; the first thread runs the event loop."""
    found = {}
    for task in Path(f"/proc/{process_id}/task").iterdir():
        try:
            fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        name = EVENT_LOOP if task.name == str(process_id) else f"thread {task.name}"
        found[name] = (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS_PER_S  # utime, stime
    return found


def spent_s(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return what each thread has used between two looks."""
    return {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}


def memory_mib(process_id: int) -> dict[str, float]:
    """Return a process's memory in MiB: `VmRSS` resident, `RssAnon` its private part, and the other fields of Rss."""
    found = {}
    for line in Path(f"/proc/{process_id}/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in _MEMORY:
            found[name] = int(value.split()[0]) / 1024
    return found
