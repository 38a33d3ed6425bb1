"""Which device to run on, and on how much of it."""

import math
import os
from pathlib import Path

import torch
from bilm_system.control_groups import CGROUPS, PROC, cpu_quota

from bilm_model.errors import ModelError


def resolve_device(name: str) -> torch.device:
    """Return the device that a user names; where it is a GPU, the process computes exactly from then on.

    Args:
        name: "cpu", "cuda", "cuda:N", or "auto": the first CUDA device where there is one, else the CPU.

    Raises:
        ModelError: if the name is none of these, or there is no such device here.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda:0" if available else "cpu"
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
    except RuntimeError as error:
        raise ModelError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise ModelError(
            f"device {name}: this machine has {available} CUDA devices that torch {torch.__version__} sees"
        )
    if device.type == "cuda":
        compute_exactly()
    return device


def compute_exactly() -> None:
    """Have GPUs compute float32 in float32, and the sums of bfloat16 products, too.

    By default cuDNN's convolutions round their factors to TF32, which has 11 significant bits, and cuBLAS may add up
    bfloat16 products in bfloat16.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def is_lost(error: BaseException) -> bool:
    """Return whether an error says that its device can't be used any more in this process.

    Such an error breaks the context: every later call fails, whatever it computes, so only another process helps. Being
    out of memory is none of them. An error without a code that breaks the context (cuBLAS, Triton) shows at the next
    operator, which raises one with a code.
    """
    return getattr(error, "error_code", None) in _FINAL_CUDA_ERRORS


def default_threads(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return the CPU threads to use: one for each core that this process may use, 16 at most.

    That is by its affinity and by the quota of its control groups. Torch's own default counts the machine's cores, also
    in a container that is given two of 64; and threads that wait for a core in turns are slower than fewer threads.
    More than 16 share out ticks that are too small for them.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(n_cores, cpu_quota(proc, cgroups), _MAX_THREADS)))


_FINAL_CUDA_ERRORS = frozenset(
    {
        46,  # no device available
        214,  # an uncorrectable memory error
        220,  # an NVLink error
        700,  # an illegal address
        702,  # a kernel that took too long
        709,  # the context was destroyed
        710,  # an assertion in a kernel
        *range(714, 720),  # exceptions of the hardware, an illegal instruction or address space, a failed launch
    }
)
"""`cudaError_t`, which `torch.AcceleratorError.error_code` is (CUDA Runtime API, "Data types used by CUDA Runtime")."""
_MAX_THREADS = 16
