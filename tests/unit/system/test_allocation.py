"""Libraries keep bounded memory for themselves, unless the user has said how much."""

import platform
import subprocess
import sys

import pytest
from bilm_system.allocation import bound_arenas, bound_product_kernels

TIME_LIMIT_S = 120

PROGRAM = """
import os, sys, threading
from bilm_system.allocation import bound_arenas
if "bound" in sys.argv:
    assert bound_arenas({})
kept = []
started = threading.Barrier(9)

def allocate():
    kept.append([bytes(1000) for _ in range(1000)])
    started.wait()
    started.wait()

for _ in range(8):
    threading.Thread(target=allocate).start()
started.wait()
# An arena of a thread is a mapping of 64 MiB, of which the rest can't be accessed yet
with open("/proc/self/maps") as maps:
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if " ---p " in line]
print(sum(2**25 < end - begin < 2**26 for begin, end in spans))
started.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_threads_share_few_arenas() -> None:
    n_arenas = {}
    for mode in ("bound", "free"):
        ran = subprocess.run(
            ["env", "-u", "MALLOC_ARENA_MAX", "-u", "GLIBC_TUNABLES", "PYTHONMALLOC=malloc", sys.executable, "-c",
             PROGRAM, mode],
            capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        n_arenas[mode] = int(ran.stdout)
    assert n_arenas["bound"] == 1  # beside the first one, which isn't a mapping of its own
    assert n_arenas["free"] > 1


@pytest.mark.parametrize("said", [{"MALLOC_ARENA_MAX": "7"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=7"}])
def test_arenas_are_as_many_as_the_user_says(said: dict[str, str]) -> None:
    assert not bound_arenas(said)


def test_few_kernels_are_kept() -> None:
    environment: dict[str, str] = {}
    bound_product_kernels(environment)
    assert 0 < int(environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


def test_kernels_are_as_many_as_the_user_says() -> None:
    environment = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}
    bound_product_kernels(environment)
    assert environment == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}
