"""Products of bfloat16 factors inside a kernel, by the processor's tile registers (Intel's AMX).

A tile holds 16 rows of 64 bytes. A panel is 64 columns of a weight, two components of a column side by side, so that 16
such rows of 16 columns are a tile as the processor multiplies it. The sum of a column is accumulated in float32, one
pair of components after another, whatever the rows beside it: so a row has the same bits in any company. Rows that only
fill up a tile are computed, and not read.

Legend: R rows, K components of a product's input.
"""

import ctypes
import functools
import platform
import sys
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from bilm_model.engine.cpu.panels import PANEL, processor_features
from bilm_model.kernels.numba_blocks import inner

TILE_ROWS = 16
"""Rows of a tile, and columns of float32 numbers."""
TILE_COMPONENTS = 32
"""Components of a product's input in a tile."""
TILE_BYTES = 64
"""A tile's row."""
_PANEL_TILE_BYTES = TILE_COMPONENTS * PANEL * 2
_N_TILES = 8

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64: asm/prctl.h, Documentation/arch/x86

_INT8, _INT64, _VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
_BYTES = _INT8.as_pointer()


def paired(panels: Tensor) -> Tensor:
    """Return panels (n, K, 64) in bfloat16 with pairs of components side by side, (n, ⌈K / 32⌉·16, 64, 2)."""
    n_panels, n_in, _ = panels.shape
    padded = F.pad(panels.to(torch.bfloat16), (0, 0, 0, -n_in % TILE_COMPONENTS))
    return padded.view(n_panels, -1, 2, PANEL).transpose(2, 3).contiguous()


def n_tiles(n_components: int) -> int:
    """Return the tiles that so many components fill."""
    return -(-n_components // TILE_COMPONENTS)


def tile_configuration() -> Tensor:
    """Return what `open_tiles` reads: palette 1, eight tiles of 16 rows of 64 bytes. Source: Intel's SDM, LDTILECFG."""
    configuration = torch.zeros(64, dtype=torch.uint8)
    configuration[0] = 1
    configuration[16 : 16 + 2 * _N_TILES : 2] = TILE_BYTES
    configuration[48 : 48 + _N_TILES] = TILE_ROWS
    return configuration


def has_tiles(features: str | None = None) -> bool:
    """Return whether a processor has tiles, and this process may use them.

    Args:
        features: in LLVM's names; None: those that kernels are compiled for.
    """
    found = processor_features() if features is None else features
    return {"+amx-tile", "+amx-bf16", "+avx512f"} <= set(found.split(",")) and _may_use_tiles()


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for the tiles, which a process has to do once; what it answers holds for all threads."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    function = ir.FunctionType(_VOID, [each.type for each in arguments])
    name = f"llvm.x86.{name}"
    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function, name), arguments)


@intrinsic
def open_tiles(typing_context, configuration):  # type: ignore[no-untyped-def]
    """Shape this thread's tiles as the 64 bytes at an address say."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, "ldtilecfg", builder.inttoptr(args[0], _BYTES))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def close_tiles(typing_context):  # type: ignore[no-untyped-def]
    """Empty this thread's tiles, so that a change of threads needn't save them."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _times_tiles(n_down: int, n_across: int) -> Any:
    """Return `f(n, x, x_stride, panel, begin, begin_stride, out, out_stride)`, n tiles of components.

    Out (16·down, 16·across) = begin + x (16·down, 32·n)·panel, by addresses, with strides in bytes. The stride of what
    the sums begin with may be 0: then all rows begin with the same.
    """
    first_x, first_weight = n_down * n_across, n_down * n_across + n_down

    @intrinsic
    def multiply(typing_context, n, x, x_stride, panel, begin, begin_stride, out, out_stride):  # type: ignore[no-untyped-def] # noqa: PLR0917
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            n, x, x_stride, panel, begin, begin_stride, out, out_stride = args
            sums = [(i * n_across + j, i, j) for i in range(n_down) for j in range(n_across)]

            def offset(base: Any, stride: Any, i: int, at: Any) -> Any:
                address = builder.add(base, builder.mul(stride, _INT64(TILE_ROWS * i)))
                return builder.inttoptr(builder.add(address, at), _BYTES)

            for tile, i, j in sums:
                start = offset(begin, begin_stride, i, _INT64(TILE_BYTES * j))
                _call(builder, "tileloadd64", _INT8(tile), start, begin_stride)
            before = builder.block
            head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(_INT64)
            k.add_incoming(_INT64(0), before)
            builder.cbranch(builder.icmp_signed("<", k, n), body, done)
            builder.position_at_end(body)
            for i in range(n_down):
                start = offset(x, x_stride, i, builder.mul(k, _INT64(TILE_BYTES)))
                _call(builder, "tileloadd64", _INT8(first_x + i), start, x_stride)
            for j in range(n_across):
                weights = _INT8(first_weight + j % (_N_TILES - first_weight))
                at = builder.add(builder.mul(k, _INT64(_PANEL_TILE_BYTES)), _INT64(TILE_BYTES * j))
                start = builder.inttoptr(builder.add(panel, at), _BYTES)
                _call(builder, "tileloadd64", weights, start, _INT64(4 * PANEL))
                for i in range(n_down):
                    _call(builder, "tdpbf16ps", _INT8(i * n_across + j), _INT8(first_x + i), weights)
            k.add_incoming(builder.add(k, _INT64(1)), builder.block)
            builder.branch(head)
            builder.position_at_end(done)
            for tile, i, j in sums:
                start = offset(out, out_stride, i, _INT64(TILE_BYTES * j))
                _call(builder, "tilestored64", _INT8(tile), start, out_stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return multiply


_square, _row = _times_tiles(2, 2), _times_tiles(1, 4)


@inner
def multiply_tiles(n_rows, n, x, x_stride, panel, begin, begin_stride, out, out_stride):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """Out (⌈R / 16⌉·16, 64) = begin + x (⌈R / 16⌉·16, 32·n)·panel, in tiles. Strides are in bytes."""
    row = 0
    while row + TILE_ROWS < n_rows:
        for half in range(2):
            at, part = 2 * TILE_BYTES * half, panel + 2 * TILE_BYTES * half
            its_begin, its_out = begin + row * begin_stride + at, out + row * out_stride + at
            _square(n, x + row * x_stride, x_stride, part, its_begin, begin_stride, its_out, out_stride)
        row += 2 * TILE_ROWS
    if row < n_rows:
        its_begin, its_out = begin + row * begin_stride, out + row * out_stride
        _row(n, x + row * x_stride, x_stride, panel, its_begin, begin_stride, its_out, out_stride)
