"""A step of LSTM cells in explicit vectors, as LLVM's instructions.

LLVM's vectoriser, left to itself, computes one vector at a time, so that the chain of dependent operations decides the
time, and on some processors takes vectors of half the width. Every cell has the same instructions wherever it stands,
each rounded as IEEE 754 says, in a vector or alone: so bits don't depend on how cells are divided into vectors.

With e(x) = exp(−x): σ(x) = 1 / (1 + e(x)) and tanh(x) = (1 − e(2x)) / (1 + e(2x)), brought over one denominator.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_WIDTH = 16
_CANDIDATE = 1  # of the gates input, candidate, forget, output: the one whose activation is tanh

_LIMIT = 27.0
"""Where 1 + exp(limit) is cut off: σ is 2e-12 there, and a product of three of them is still far from infinity."""
_SHIFTER = 1.5 * 2**23 + 127
"""A sum with it is rounded to an integer n, whose lowest bits are n + 127: the exponent of 2ⁿ in float32."""
_EXPONENT_AT = 23
_LOG2_E = 1.4426950408889634
_POWER = (
    1.000000071655028,
    0.693146967063982,
    0.24022119722139784,
    0.05550713273940173,
    0.009675541426712932,
    0.0013276472111568994,
)
"""2ʳ for |r| ≤ 1/2, with the smallest largest relative error, 7.4e-8, found by Lawson's iteration. Lowest first."""

# Plain constants: LLVM keeps them in registers, or reads them beside other operands. A table of vectors, loaded at each
# use, took a quarter longer (AMD EPYC, AVX-512 and AVX2).

_FLOAT, _INT16, _INT32, _INT64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_ALIGNMENT = {_FLOAT: 4, _INT16: 2}
_HIGH_HALF = 0xFFFF0000


@dataclass(frozen=True)
class _Vectors:
    """Emits instructions for vectors of a width; a width of 1 means plain numbers."""

    builder: ir.IRBuilder
    width: int

    def type_of(self, element: ir.Type) -> ir.Type:
        return element if self.width == 1 else ir.VectorType(element, self.width)

    def constant(self, value: float) -> ir.Constant:
        """Return a whole number as an integer, any other as float32, everywhere."""
        is_whole = isinstance(value, int)
        number = value if is_whole else float(np.float32(value))
        kind = self.type_of(_INT32 if is_whole else _FLOAT)
        return ir.Constant(kind, number if self.width == 1 else [number] * self.width)

    def filled(self, number: Any) -> Any:
        """Return a vector of the same number everywhere."""
        if self.width == 1:
            return number
        vector = ir.Constant(self.type_of(_FLOAT), ir.Undefined)
        first = self.builder.insert_element(vector, number, _INT32(0))
        return self.builder.shuffle_vector(first, vector, self.constant(0))

    def load(self, pointer: Any, index: Any) -> Any:
        """Return what stands from an index on, as float32; 16 bits mean bfloat16."""
        b, element = self.builder, pointer.type.pointee
        value = b.load(self._at(pointer, index), align=_ALIGNMENT[element])
        if element == _INT16:
            value = b.bitcast(b.shl(b.zext(value, self.type_of(_INT32)), self.constant(16)), self.type_of(_FLOAT))
        return value

    def store(self, pointer: Any, index: Any, value: Any) -> None:
        """Write float32, to bfloat16 rounded."""
        b, element = self.builder, pointer.type.pointee
        if element == _INT16:
            value = b.trunc(b.lshr(self._rounded(value), self.constant(16)), self.type_of(_INT16))
        b.store(value, self._at(pointer, index), align=_ALIGNMENT[element])

    def load_pair(self, pointer: Any, index: Any) -> tuple[Any, Any]:
        """Return what stands from an index on, numbers with even and with odd distances from it apart.

        Of two bfloat16 numbers in 32 bits each is float32 with a shift or a mask, which takes fewer instructions than
        widening them does.
        """
        b = self.builder
        if pointer.type.pointee == _INT16:
            both = b.load(b.bitcast(b.gep(pointer, [index]), self.type_of(_INT32).as_pointer()), align=2)
            parts = b.shl(both, self.constant(16)), b.and_(both, self.constant(_HIGH_HALF))
            return b.bitcast(parts[0], self.type_of(_FLOAT)), b.bitcast(parts[1], self.type_of(_FLOAT))
        vectors = self.load(pointer, index), self.load(pointer, b.add(index, _INT64(self.width)))
        return self._picked(*vectors, range(0, 2 * self.width, 2)), self._picked(*vectors, range(1, 2 * self.width, 2))

    def store_pair(self, pointer: Any, index: Any, even: Any, odd: Any) -> None:
        """Write what `load_pair` would return."""
        b = self.builder
        if pointer.type.pointee == _INT16:
            low, high = b.lshr(self._rounded(even), self.constant(16)), self._rounded(odd)
            both = b.or_(low, b.and_(high, self.constant(_HIGH_HALF)))
            b.store(both, b.bitcast(b.gep(pointer, [index]), self.type_of(_INT32).as_pointer()), align=2)
            return
        order = [i // 2 + i % 2 * self.width for i in range(2 * self.width)]
        self.store(pointer, index, self._picked(even, odd, order[: self.width]))
        self.store(pointer, b.add(index, _INT64(self.width)), self._picked(even, odd, order[self.width :]))

    def _picked(self, first: Any, second: Any, order: Sequence[int]) -> Any:
        return self.builder.shuffle_vector(first, second, ir.Constant(self.type_of(_INT32), list(order)))

    def _rounded(self, value: Any) -> Any:
        """Return the bits of float32, of which the upper half is bfloat16, rounded to the nearest, ties to even."""
        b = self.builder
        bits = b.bitcast(value, self.type_of(_INT32))
        odd = b.and_(b.lshr(bits, self.constant(16)), self.constant(1))
        return b.add(bits, b.add(self.constant(0x7FFF), odd))

    def _at(self, pointer: Any, index: Any) -> Any:
        address = self.builder.gep(pointer, [index])
        return self.builder.bitcast(address, self.type_of(pointer.type.pointee).as_pointer())

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return a·b + c, in one instruction where the processor has one."""
        kind = self.type_of(_FLOAT)
        name = f"llvm.fmuladd.{'' if self.width == 1 else f'v{self.width}'}f32"
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, [a, b, c])

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        """Return x between the bounds; NaN stays NaN."""
        b = self.builder
        x = b.select(b.fcmp_ordered(">", x, high), high, x)
        return b.select(b.fcmp_ordered("<", x, low), low, x)

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """Return the polynomial of x; the coefficient of the lowest power comes first."""
        *others, last = (self.constant(coefficient) for coefficient in coefficients)
        return functools.reduce(lambda total, coefficient: self.multiply_add(x, total, coefficient), others[::-1], last)

    def decay(self, x: Any) -> tuple[Any, Any]:
        """Return exp(−x) as two factors, the second of which is a power of two; NaN stays NaN."""
        b = self.builder
        shifter, minus_log2_e = self.constant(_SHIFTER), self.constant(-_LOG2_E)
        x = self.clip(x, self.constant(-_LIMIT), self.constant(_LIMIT))
        shifted = self.multiply_add(x, minus_log2_e, shifter)
        rest = self.multiply_add(x, minus_log2_e, b.fneg(b.fsub(shifted, shifter)))
        bits = b.shl(b.bitcast(shifted, self.type_of(_INT32)), self.constant(_EXPONENT_AT))
        return self.polynomial(rest, _POWER), b.bitcast(bits, self.type_of(_FLOAT))

    def one_plus(self, factors: tuple[Any, Any]) -> Any:
        """Return 1 plus a product."""
        return self.multiply_add(*factors, self.constant(1.0))

    def one_minus(self, factors: tuple[Any, Any]) -> Any:
        """Return 1 minus a product."""
        return self.multiply_add(self.builder.fneg(factors[0]), factors[1], self.constant(1.0))


@dataclass(frozen=True)
class _Block:
    """The arguments of `lstm_block`."""

    n: Any
    gates_h: Any
    h_stride: Any
    gates_x: Any
    x_stride: Any
    c: Any
    m: Any
    clip: Any


@dataclass(frozen=True)
class _Layout:
    """Which cells a step's vectors hold: some vectors one after another; or a pair, even and odd cells apart."""

    vectors: _Vectors
    n_vectors: int
    is_pair: bool = False

    @property
    def n_cells(self) -> int:
        return self.vectors.width * self.n_vectors

    def load(self, pointer: Any, first: Any) -> Sequence[Any]:
        if self.is_pair:
            return self.vectors.load_pair(pointer, first)
        return [self.vectors.load(pointer, place) for place in self._places(first)]

    def store(self, pointer: Any, first: Any, values: Sequence[Any]) -> None:
        if self.is_pair:
            self.vectors.store_pair(pointer, first, *values)
            return
        for place, value in zip(self._places(first), values, strict=True):
            self.vectors.store(pointer, place, value)

    def _places(self, first: Any) -> list[Any]:
        return [self.vectors.builder.add(first, _INT64(i * self.vectors.width)) for i in range(self.n_vectors)]


def _emit_step(layout: _Layout, block: _Block, first: Any) -> None:
    """Emit a step of some vectors of cells, whose operations are independent and so overlap."""
    vectors, b = layout.vectors, layout.vectors.builder

    def gate(which: int) -> list[tuple[Any, Any]]:
        halves = [
            layout.load(pointer, b.add(first, b.mul(_INT64(which), stride)))
            for pointer, stride in ((block.gates_h, block.h_stride), (block.gates_x, block.x_stride))
        ]
        sums = [b.fadd(*pair) for pair in zip(*halves, strict=True)]
        return [vectors.decay(b.fadd(both, both) if which == _CANDIDATE else both) for both in sums]

    def new_cell(c: Any, i: tuple[Any, Any], j: tuple[Any, Any], f: tuple[Any, Any]) -> Any:
        """Return σ(f)·c + σ(i)·tanh(j), clipped."""
        of_f, of_ij = vectors.one_plus(f), b.fmul(vectors.one_plus(i), vectors.one_plus(j))
        new = b.fmul(vectors.one_minus(j), of_f)
        cell = b.fdiv(vectors.multiply_add(c, of_ij, new), b.fmul(of_f, of_ij))
        bound = vectors.filled(block.clip)
        return vectors.clip(cell, b.fneg(bound), bound)

    def output(cell: Any, o: tuple[Any, Any]) -> Any:
        """Return σ(o)·tanh(c)."""
        decay = vectors.decay(b.fadd(cell, cell))
        return b.fdiv(vectors.one_minus(decay), b.fmul(vectors.one_plus(o), vectors.one_plus(decay)))

    *gates, gates_o = (gate(which) for which in range(4))
    cells = [new_cell(*each) for each in zip(layout.load(block.c, first), *gates, strict=True)]
    layout.store(block.c, first, cells)
    layout.store(block.m, first, [output(*each) for each in zip(cells, gates_o, strict=True)])


def _emit_loop(builder: ir.IRBuilder, first: Any, end: Any, step: int, emit: Callable[[Any], None]) -> None:
    """Emit `for k in range(first, end, step): emit(k)`."""
    before, head, body, after = (
        builder.block, *(builder.append_basic_block(name) for name in ("cells", "cells_body", "cells_end"))
    )  # fmt: skip
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(_INT64)
    k.add_incoming(first, before)
    builder.cbranch(builder.icmp_signed("<", k, end), body, after)
    builder.position_at_end(body)
    emit(k)
    k.add_incoming(builder.add(k, _INT64(step)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


@intrinsic
def lstm_block(typing_context, n, gates_h, h_stride, gates_x, x_stride, c, m, clip):  # type: ignore[no-untyped-def] # noqa: PLR0917
    """N neighbouring cells of a row; their four gates stand a stride apart, in both halves. Two divisions a cell.

    Args:
        typing_context: Numba's.
        n: cells.
        gates_h: of the first cell's input gate, float32 or bfloat16; candidate, forget and output gate follow.
        h_stride: between one gate and the next.
        gates_x: the other half of the gates.
        x_stride: likewise.
        c: of the first cell, float32, changed in place.
        m: gets σ(o)·tanh(c), float32 or bfloat16.
        clip: bound of the cells.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        block, first = _Block(*args), _INT64(0)
        vectors, is_pair = _Vectors(builder, _WIDTH), gates_h.dtype == types.uint16
        widest = _Layout(vectors, 2, is_pair=True) if is_pair else _Layout(vectors, _n_vectors())
        for layout in dict.fromkeys((widest, _Layout(vectors, 1), _Layout(_Vectors(builder, 1), 1))):
            end = builder.and_(block.n, _INT64(-layout.n_cells))
            _emit_loop(builder, first, end, layout.n_cells, functools.partial(_emit_step, layout, block))
            first = end
        return context.get_dummy_value()

    return types.void(types.int64, gates_h, types.int64, gates_x, types.int64, c, m, types.float32), generate


@functools.cache
def _n_vectors() -> int:
    """Return how many vectors of 16 to compute side by side: one where a register holds it, two in halves otherwise.

    Found out by letting LLVM compile an addition for this processor.
    """
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    module = ir.Module()
    pointer = ir.VectorType(_FLOAT, _WIDTH).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), "add")
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.load(function.args[0])
    builder.store(builder.fadd(value, value), function.args[0])
    builder.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features)
    return 1 if "zmm" in machine.emit_assembly(llvm.parse_assembly(str(module))) else 2
