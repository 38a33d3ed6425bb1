"""The machine code of a compiled kernel, as it is kept: loaded by LLVM alone.

Numba's own cache holds pickles, and to read it Numba sets its compiler up, which takes a second. Here an object file is
kept, with the name of its function and the symbols that it needs. `llvmlite` links it into the process.
"""

import ctypes
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from numba.core.typing.ctypes_utils import to_ctypes

_CHECKSUM_BYTES, _LENGTH_BYTES = 32, 4
_DECLARED = re.compile(r'^(?:declare .*?@"?([\w.$]+)"?\(|@"?([\w.$]+)"? = external )', re.MULTILINE)
_NUMBA_PREFIXES = ("numba_", "NRT_")
"""Of functions by which a kernel would raise an exception of Python's."""


_engines: list[llvm.ExecutionEngine] = []
"""Own the code that was loaded. It stays for as long as the process, as its address may be anywhere."""


class MachineCodeError(Exception):
    """Machine code can't be loaded."""


class LoadedKernel:
    """A C function that was loaded; has what kernels use of Numba's.

    Attributes:
        address: of the function.
        ctypes: calls it.
    """

    def __init__(self, address: int, signature: Any) -> None:
        """Make the function callable from Python.

        Args:
            address: of the function.
            signature: its type.
        """
        self.address = address
        types = [to_ctypes(each) for each in (signature.return_type, *signature.args)]
        self.ctypes = ctypes.CFUNCTYPE(*types)(address)


@dataclass(frozen=True)
class MachineCode:
    """An object file with one function.

    Attributes:
        symbol: name of the function.
        needs: names of what it refers to outside of itself.
        data: the object file.
    """

    symbol: str
    needs: tuple[str, ...]
    data: bytes

    @classmethod
    def of(cls, kernel: Any) -> "MachineCode":
        """Return the machine code of a kernel that Numba has just compiled (`numba.cfunc`)."""
        declared = ("".join(names) for names in _DECLARED.findall(kernel.inspect_llvm()))
        needs = sorted({name for name in declared if not name.startswith("llvm.")})
        return cls(kernel.native_name, tuple(needs), kernel._library._get_compiled_object())

    def to_bytes(self) -> bytes:
        """Return it as the content of a file: a checksum, and what it is of."""
        head = json.dumps({"symbol": self.symbol, "needs": self.needs}).encode()
        content = len(head).to_bytes(_LENGTH_BYTES, "little") + head + self.data
        return hashlib.sha256(content).digest() + content

    @classmethod
    def from_bytes(cls, data: bytes) -> "MachineCode":
        """Return what `to_bytes` was of.

        Raises:
            MachineCodeError: if a byte has changed: it would end the process.
        """
        checksum, content = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
        if hashlib.sha256(content).digest() != checksum:
            raise MachineCodeError("the checksum differs")
        end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        head = json.loads(content[_LENGTH_BYTES:end])
        return cls(head["symbol"], tuple(head["needs"]), content[end:])

    def load(self, signature: Any) -> LoadedKernel:
        """Link it into this process.

        Raises:
            MachineCodeError: if it needs what this process doesn't have.
        """
        _initialize()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(
            llvm.parse_assembly(""), machine
        )  # the first one finds the process's symbols
        for name in self.needs:
            _resolve(name)
        engine.add_object_file(llvm.ObjectFileRef.from_data(self.data))
        engine.finalize_object()
        address = engine.get_function_address(self.symbol)
        if not address:
            raise MachineCodeError(f"it has no function {self.symbol}")
        _engines.append(engine)
        return LoadedKernel(address, signature)


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _resolve(name: str) -> None:
    """Make sure that a symbol has an address: LLVM would end the process.

    Kernels raise no exceptions, but their code holds the paths on which Numba's would. Where Numba's compiler isn't set
    up, these lead to `abort`.
    """
    if llvm.address_of_symbol(name) is not None:
        return
    if not name.startswith(_NUMBA_PREFIXES):
        raise MachineCodeError(f"it needs {name}, which this process doesn't have")
    address = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    llvm.add_symbol(name, address)
