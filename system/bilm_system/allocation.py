"""Memory that libraries keep for themselves: bounds that have to be settled before they are used."""

import ctypes
import sys
from collections.abc import Mapping, MutableMapping

_M_ARENA_MAX = -8
"""Source: glibc's malloc.h."""

_ARENAS = 2
"""Of glibc's allocator. By default threads spread over eight a core, and what one has freed another can't take."""

_KERNELS = "256"
"""Kernels for products that oneDNN keeps, one for each product and number of rows, at several hundred kilobytes each. A
model needs about 150 (see `bilm_model.kernels.products.padded_rows`); oneDNN's own default is 1,024."""


def bound_arenas(environment: Mapping[str, str]) -> bool:
    """Let threads share few arenas of glibc's allocator, unless the environment says how many; return whether they do.

    Args:
        environment: of this process, which has started no other thread yet.
    """
    if "MALLOC_ARENA_MAX" in environment or "glibc.malloc.arena_max" in environment.get("GLIBC_TUNABLES", ""):
        return False
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS))
    except AttributeError:  # another C library
        return False


def bound_product_kernels(environment: MutableMapping[str, str]) -> None:
    """Let oneDNN keep fewer kernels, unless the environment says how many.

    Args:
        environment: of this process, before it loads oneDNN, which comes with torch.
    """
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
