"""Limits of control groups, as files of a machine that isn't this one."""

import math
import os
from pathlib import Path

import pytest
from bilm_model.device import default_threads
from bilm_system.control_groups import cpu_quota, memory_limit_bytes

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Machine:
    """A folder that looks like /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()

    def place(self, *lines: str) -> None:
        """Says which groups the process is in."""
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def write(self, path: str, text: str) -> None:
        (self.cgroups / path).parent.mkdir(parents=True, exist_ok=True)
        (self.cgroups / path).write_text(f"{text}\n")

    @property
    def quota(self) -> float:
        return cpu_quota(self.proc, self.cgroups)

    @property
    def memory(self) -> int:
        return memory_limit_bytes(self.proc, self.cgroups)

    @property
    def threads(self) -> int:
        return default_threads(self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_control_groups_there_is_no_limit(machine: Machine) -> None:
    assert (machine.quota, machine.memory) == (math.inf, MACHINE)
    machine.place("0::/a/b")
    assert (machine.quota, machine.memory) == (math.inf, MACHINE)


def test_a_service_of_systemd_has_its_own_groups_quota(machine: Machine) -> None:
    machine.place("0::/system.slice/bilm-serve@0.service")
    machine.write("system.slice/bilm-serve@0.service/cpu.max", "100000 100000")
    machine.write("system.slice/cpu.max", "max 100000")
    assert machine.quota == 1
    assert machine.threads == 1


def test_the_lowest_limit_on_the_way_up_counts(machine: Machine) -> None:
    machine.place("0::/a/b")
    for path, quota, memory in (
        ("a/b/", "max 100000", "max"),
        ("a/", "250000 100000", "4194304"),
        ("", "9 3", "8388608"),
    ):
        machine.write(f"{path}cpu.max", quota)
        machine.write(f"{path}memory.max", memory)
    machine.write("a/other/cpu.max", "1 100000")
    machine.write("../cpu.max", "1 100000")  # above the root: not a control group
    assert (machine.quota, machine.memory) == (2.5, 4194304)
    machine.write("a/b/cpu.max", "50000 100000")
    machine.write("a/b/memory.max", "1048576")
    assert (machine.quota, machine.memory) == (0.5, 1048576)


@pytest.mark.parametrize(("quota", "threads"), [("1000 100000", 1), ("50000 100000", 1), ("100000 100000", 1)])
def test_a_fraction_of_a_core_is_a_thread(machine: Machine, quota: str, threads: int) -> None:
    machine.place("0::/a")
    machine.write("a/cpu.max", quota)
    assert machine.threads == threads


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_version_1(machine: Machine, folder: str) -> None:
    machine.place("5:cpuset:/a", "4:cpu,cpuacct:/a/b", "3:memory:/not/seen/in/here", "1:name=systemd:/a", "0::/a")
    machine.write(f"{folder}/a/b/cpu.cfs_quota_us", "-1")
    machine.write(f"{folder}/a/b/cpu.cfs_period_us", "100000")
    machine.write("memory/memory.limit_in_bytes", "2097152")
    assert (machine.quota, machine.memory) == (math.inf, 2097152)
    machine.write(f"{folder}/a/cpu.cfs_quota_us", "150000")
    machine.write(f"{folder}/a/cpu.cfs_period_us", "100000")
    assert machine.quota == 1.5


def test_version_2_beside_version_1(machine: Machine) -> None:
    machine.place("4:cpu,cpuacct:/", "0::/a")
    machine.write("unified/a/memory.max", "1048576")
    assert machine.memory == 1048576


def test_a_group_that_a_namespace_hides_is_taken_for_the_root(machine: Machine) -> None:
    machine.place("0::/../../x")
    machine.write("cpu.max", "100000 100000")
    machine.write("../../cpu.max", "1 100000")
    assert machine.quota == 1


@pytest.mark.parametrize("text", ["", "max", "100000", "100000 0", "-1 100000", "a b", "1 2 3"])
def test_what_makes_no_sense_is_no_limit(machine: Machine, text: str) -> None:
    machine.place("", "nonsense", "0::/a")
    machine.write("a/cpu.max", text)
    machine.write("a/memory.max", "lots")
    assert (machine.quota, machine.memory) == (math.inf, MACHINE)


def test_files_that_cannot_be_read_are_no_limit(machine: Machine) -> None:
    machine.place("0::/a/ü")
    (machine.cgroups / "a" / "ü" / "cpu.max").mkdir(parents=True)  # root may read whatever it is
    machine.write("a/cpu.max", "300000 100000")
    assert machine.quota == 3
