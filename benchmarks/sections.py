"""The sections of a benchmark, run one after the other."""

import time
from collections.abc import Callable, Collection, Mapping

Sections = Mapping[str, Callable[[], None]]


def run_sections(sections: Sections, only: Collection[str] | None = None) -> None:
    """Run all sections, or those that are named; say how long each took.

    Raises:
        SystemExit: If a name is unknown.
    """
    if unknown := set(only or ()) - sections.keys():
        raise SystemExit(f"--only: unknown section {', '.join(sorted(unknown))} (expected {', '.join(sections)})")
    begun_s = time.perf_counter()
    for name, section in sections.items():
        if only and name not in only:
            continue
        print(f"\n-- {name}", flush=True)
        section_begun_s = time.perf_counter()
        section()
        now_s = time.perf_counter()
        print(f"-- {name}: {now_s - section_begun_s:.0f} s, {now_s - begun_s:.0f} s in all", flush=True)
