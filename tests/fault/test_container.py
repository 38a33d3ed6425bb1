"""The image, built from the Dockerfile by Buildah and run by Podman: about five minutes, most of them for its base.

The base image is made of Debian's own packages, under the name that the Dockerfile asks for; what pip installs comes
as wheels from the folder that BILM_TEST_WHEELS names, else from where pip is configured to look. BILM_TEST_BASE names
a folder that debootstrap has filled before.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from bilm_client import Client
from grpc_health.v1 import health_pb2

from tests.fault.balancer_support import free_ports, poll, program
from tests.integration.integration_support import health_stub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BASE_NAME = "docker.io/library/python:3.11-slim-bookworm"
BASE_PACKAGES = "ca-certificates,gcc,libc6-dev,python3,python3-dev,python3-pip,python3-venv"
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
PROGRAMS = ("buildah", "podman", "runc", "debootstrap", "tar")
TIMEOUT_S = 1800.0


def run(*command: str | Path, timeout_s: float = TIMEOUT_S) -> str:
    """What a command wrote; fails with it."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Store:
    """Images and containers of this test alone.

    Attributes:
        folder: where they are.
        driver: of their storage.
    """

    folder: Path
    driver: str = "vfs"

    def buildah(self, *arguments: str | Path) -> str:
        return run("buildah", *self._options(), *arguments)

    def podman(self, *arguments: str | Path) -> str:
        return run(*self.podman_command(*arguments))

    def podman_command(self, *arguments: str | Path) -> list[str | Path]:
        return ["podman", *self._options(), "--cgroup-manager", "cgroupfs", "--runtime", "runc", *arguments]

    def _options(self) -> list[str | Path]:
        return ["--root", self.folder / "root", "--runroot", self.folder / "run", "--storage-driver", self.driver]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    for name in PROGRAMS:
        program(name)
    if os.geteuid() != 0:
        pytest.skip("needs root, as debootstrap does")
    folder = Path(tempfile.mkdtemp(prefix="bilm-image-"))
    store = Store(folder, "overlay")
    if subprocess.run(store.podman_command("info"), capture_output=True, check=False).returncode:
        store = Store(folder, "vfs")  # slower, but works inside another container and on any kernel
    yield store
    mounted = folder / "root" / store.driver  # on itself, which Path.is_mount() doesn't see
    if f" {mounted} " in Path("/proc/mounts").read_text():
        run("umount", "--recursive", mounted)  # a container that was killed leaves its own mount below
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(store: Store) -> str:
    """Debian with Python, under the name of the official image."""
    given = os.environ.get("BILM_TEST_BASE")
    tree = Path(given) if given else store.folder / "debian"
    if not given:
        run("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", tree, debian_mirror())
    for name, target in (("python", "python3"), ("pip", "pip3")):  # as the official image has them
        if not (tree / "usr/bin" / name).exists():
            (tree / "usr/bin" / name).symlink_to(target)
    archive = store.folder / "base.tar"
    run("tar", "-C", tree, "--one-file-system", "-cf", archive, ".")
    store.podman("import", "--change", f"ENV PATH={BASE_PATH}", archive, BASE_NAME)
    archive.unlink()
    return BASE_NAME


def debian_mirror() -> str:
    """Where apt finds this machine's Debian; debootstrap's own default elsewhere."""
    if shutil.which("apt-get") is None:
        return ""
    found = run("apt-get", "indextargets", "--format", "$(CODENAME) $(SITE)").splitlines()
    sites = [line.split()[1] for line in found if line.startswith("bookworm ")]
    return sites[0] if sites else ""


@pytest.fixture(scope="module")
def wheels(store: Store) -> Path:
    """Everything that pip needs in the build, which has no network."""
    if given := os.environ.get("BILM_TEST_WHEELS"):
        return Path(given)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needs = [*project["project"]["dependencies"], *extras["server"], *extras["gpu"]]
    needs += [*project["build-system"]["requires"], "wheel"]
    folder = store.folder / "wheels"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "-c", ROOT / "constraints.txt")
    run(*pip, "--dest", folder, *needs)
    return folder


@pytest.fixture(scope="module")
def image(store: Store, base: str, wheels: Path) -> str:
    return build(store, wheels, "bilm-serve:test")


@pytest.fixture(scope="module")
def gpu_image(store: Store, base: str, wheels: Path) -> str:
    return build(store, wheels, "bilm-serve:test-gpu", "--target", "gpu", "--build-arg", "EXTRAS=server,gpu")


def build(store: Store, wheels: Path, tag: str, *flags: str) -> str:
    configuration = store.folder / "pip.conf"
    configuration.write_text("[global]\nno-index = true\nfind-links = /mnt\n")
    store.buildah(
        *("bud", "--isolation", "chroot", "--pull-never", "--format", "docker", "--layers", "--tag", tag, *flags),
        *("--secret", f"id=pip.conf,src={configuration}", "--volume", f"{wheels}:/mnt:ro", ROOT),
    )
    return tag


class Container:
    """The image, running as it should be run."""

    def __init__(self, store: Store, image: str) -> None:
        [port] = free_ports(1)
        self.target = f"127.0.0.1:{port}"
        self._store, self._image = store, image
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        hardened = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL")
        # Podman's own defaults are more than a machine that is itself a container may set
        limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
        choices = ("--env", f"BILM_LISTEN={self.target}", "--env", f"BILM_TARGET={self.target}")
        arguments = ("--rm", "--name", "bilm", "--network", "host", *hardened, *limits, *choices)
        command = self._store.podman_command("run", *arguments, self._image)
        # Without systemd nothing runs the check by itself; the test does
        self._process = subprocess.Popen(command, env={**os.environ, "DISABLE_HC_SYSTEMD": "true"})
        poll("a healthy container", self.is_healthy, 180)

    def is_healthy(self) -> bool:
        """By the image's own check."""
        assert self.process.poll() is None, "the container has ended"
        check = self._store.podman_command("healthcheck", "run", "bilm")
        return subprocess.run(check, capture_output=True, check=False).returncode == 0

    def execute(self, *command: str) -> str:
        return self._store.podman("exec", "bilm", *command)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._store.podman("kill", "bilm")
            self._process.wait(60)


@pytest.fixture(scope="module")
def container(store: Store, image: str) -> Iterator[Container]:
    container = Container(store, image)
    container.start()
    yield container
    container.stop()


def test_it_embeds_with_the_model_that_ships(container: Container) -> None:
    with Client(container.target) as client:
        [found] = client.embed([["The", "cat", "sat"]], layers="top")
    assert found.vectors.shape[0] == 3


def test_it_is_nobody_and_can_write_nowhere(container: Container) -> None:
    status = dict(line.split(":\t", 1) for line in container.execute("cat", "/proc/1/status").splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    code = "import os; print([p for p in ('/', '/tmp', '/var/tmp', '/opt/bilm', '/run') if os.access(p, os.W_OK)])"
    assert container.execute("python", "-c", code) == "[]"
    with pytest.raises(AssertionError, match="Read-only file system"):
        container.execute("python", "-c", "open('/tmp/file', 'w')")


def test_it_drains_and_ends_with_0(store: Store, container: Container) -> None:
    with grpc.insecure_channel(container.target) as channel:
        updates = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
        begun_s = time.monotonic()
        store.podman("kill", "--signal", "TERM", "bilm")
        assert next(updates).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not container.is_healthy()
        updates.cancel()
    assert container.process.wait(60) == 0
    assert time.monotonic() - begun_s > 3.5  # the drain's delay


# ---- the target for GPUs, on a machine without one ----

HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop", "ALL")
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")
FOLDERS = ("--tmpfs", "/tmp", "--tmpfs", "/var/cache/bilm:mode=1777,exec")
TRITON = ("--env", "TRITON_CACHE_DIR=/var/cache/bilm/kernels/triton")  # as the server sets it
LACKS = (
    "import os; from bilm_model.engine.cuda.fastest import missing_for_triton; print(missing_for_triton(os.environ))"
)
EXTENSION = """
import importlib.util, os, pathlib, subprocess, sysconfig, tempfile
folder = pathlib.Path(os.environ["BILM_KERNEL_CACHE"])
folder.mkdir(mode=0o700)
source = pathlib.Path(tempfile.mkdtemp()) / "stub.c"
source.write_text('#include <Python.h>\\nstatic PyModuleDef d = {PyModuleDef_HEAD_INIT, "stub"};\\n'
                  'PyMODINIT_FUNC PyInit_stub(void) { return PyModule_Create(&d); }')
library = folder / "stub.so"
include = sysconfig.get_path("include")
subprocess.run([os.environ["CC"], "-shared", "-fPIC", f"-I{include}", source, "-o", library], check=True)
spec = importlib.util.spec_from_file_location("stub", library)
print(importlib.util.module_from_spec(spec).__name__)
"""


def in_gpu_image(store: Store, image: str, code: str, *flags: str) -> str:
    """What Python says in the image, with a root that nothing can be written to."""
    arguments = (
        "--rm",
        "--no-healthcheck",
        "--network",
        "none",
        *HARDENED,
        *LIMITS,
        *flags,
        "--entrypoint",
        "python",
        image,
        "-c",
        code,
    )
    return store.podman("run", *arguments)


def test_the_gpu_image_has_what_triton_needs(store: Store, gpu_image: str) -> None:
    assert in_gpu_image(store, gpu_image, LACKS, *FOLDERS, *TRITON) == "[]"
    assert in_gpu_image(store, gpu_image, EXTENSION, *FOLDERS) == "stub"


SHIPPED = """
import os, pathlib
from bilm_model.kernels.kernel_cache import CachedKernels, keep_triton_kernels
keep_triton_kernels(CachedKernels(pathlib.Path(os.environ["BILM_KERNEL_CACHE"])))
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
from triton.runtime.cache import FileCacheManager
names = {name for group in cache.glob("*/__grp__*.json")
         for name in FileCacheManager(group.parent.name).get_group(group.name.removeprefix("__grp__"))}
print(sorted(name for name in names if name.endswith(".cubin")))
"""


def test_the_gpu_image_brings_kernels_that_triton_finds(store: Store, gpu_image: str) -> None:
    found = in_gpu_image(store, gpu_image, SHIPPED, *FOLDERS)
    assert found == "['cells_kernel.cubin', 'gates_kernel.cubin', 'outputs_kernel.cubin']"


def test_without_folders_to_write_to_the_gpu_image_says_so(store: Store, gpu_image: str) -> None:
    lacks = in_gpu_image(store, gpu_image, LACKS, *TRITON)
    assert "its cache can't be written" in lacks
    assert "no temporary folder can be written to" in lacks
