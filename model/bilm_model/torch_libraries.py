"""Torch's libraries, opened before torch is imported, without holding the interpreter.

`import torch` opens half a gigabyte of libraries, which takes a quarter of a second and more, and holds the interpreter
for all of it: a server's event loop would answer nothing meanwhile. Opened here, the import only finds them again.
"""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

_LIBRARIES = (("libtorch_global_deps.so", "RTLD_GLOBAL"), ("libtorch_python.so", "RTLD_LOCAL"))
"""In the order and with the visibility that `import torch` has for them."""


def open_libraries() -> None:
    """Open torch's libraries; do nothing where they aren't found as expected, or are open already.

    `ctypes` lets the interpreter go while a C function runs, so `dlopen` is called as one.
    """
    spec = find_spec("torch")
    if sys.platform != "linux" or "torch" in sys.modules or spec is None or spec.origin is None:
        return
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    for name, visibility in _LIBRARIES:
        # One that can't be opened isn't: the import finds out why
        dlopen(os.fsencode(Path(spec.origin).parent / "lib" / name), os.RTLD_NOW | getattr(os, visibility))
