"""The kernel language: Python functions that emit LLVM.

Every kernel of Cyclewise is a Python function that is given an `Emitter` and writes a function
with it: addresses are 64-bit integers, vectors are values, a Python loop unrolls, `emitter.range`
loops at run time. `compiler.py` turns what was written into machine code. Nothing here knows of
models, weights or threads.

Floating-point operations carry no fast-math flag: what is written is what is computed, in the
order in which it is written, so that a token's bits do not depend on the shape of the tile that
it was computed in. A fused multiply-add is asked for by name (`Emitter.fma`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from cyclewise.machine.kernels.target import Target


class _BFloat16(ir.HalfType):
    """LLVM's `bfloat`, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat16._create_instance()  # as llvmlite makes its own types, of which there is one each

I1 = ir.IntType(1)
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F16 = ir.HalfType()
F32 = ir.FloatType()
BF16 = _BFloat16()
VOID = ir.VoidType()


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


_SUFFIX = {"i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64", "half": "f16", "float": "f32"}


def _mangled(type_: ir.Type) -> str:
    """The name LLVM gives a type in an overloaded intrinsic: `v16f32`, `i32`."""
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_SUFFIX[str(type_.element)]}"
    return _SUFFIX[str(type_)]


def _is_float(type_: ir.Type) -> bool:
    element = type_.element if isinstance(type_, ir.VectorType) else type_
    return isinstance(element, ir.FloatType | ir.HalfType)


class Value:
    """An LLVM value with Python's operators; integers are signed."""

    __slots__ = ("emitter", "value")

    def __init__(self, emitter: Emitter, value: ir.Value) -> None:
        self.emitter = emitter
        self.value = value

    @property
    def type(self) -> ir.Type:
        return self.value.type

    def _binary(self, other: Any, integer: str, floating: str | None = None) -> Value:
        builder = self.emitter.builder
        name = floating if floating and _is_float(self.type) else integer
        right = self.emitter.lift(other, self.type)
        return Value(self.emitter, getattr(builder, name)(self.value, right.value))

    def __add__(self, other: Any) -> Value:
        return self._binary(other, "add", "fadd")

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: Any) -> Value:
        return self.emitter.lift(other, self.type) - self

    def __mul__(self, other: Any) -> Value:
        return self._binary(other, "mul", "fmul")

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self._binary(other, "sdiv", "fdiv")

    def __rtruediv__(self, other: Any) -> Value:
        return self.emitter.lift(other, self.type) / self

    def __floordiv__(self, other: Any) -> Value:
        """Division of non-negative integers."""
        return self._binary(other, "udiv")

    def __mod__(self, other: Any) -> Value:
        """Remainder of non-negative integers."""
        return self._binary(other, "urem")

    def __and__(self, other: Any) -> Value:
        return self._binary(other, "and_")

    def __or__(self, other: Any) -> Value:
        return self._binary(other, "or_")

    def __xor__(self, other: Any) -> Value:
        return self._binary(other, "xor")

    def __lshift__(self, other: Any) -> Value:
        return self._binary(other, "shl")

    def __rshift__(self, other: Any) -> Value:
        """Logical shift: zeros come in from the left."""
        return self._binary(other, "lshr")

    def arithmetic_right(self, bits: int) -> Value:
        """Arithmetic shift: the sign comes in from the left."""
        return self._binary(bits, "ashr")

    def _compare(self, other: Any, sign: str) -> Value:
        builder = self.emitter.builder
        right = self.emitter.lift(other, self.type).value
        if _is_float(self.type):
            return Value(self.emitter, builder.fcmp_ordered(sign, self.value, right))
        return Value(self.emitter, builder.icmp_signed(sign, self.value, right))

    def __lt__(self, other: Any) -> Value:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> Value:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> Value:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> Value:
        return self._compare(other, ">=")

    def equals(self, other: Any) -> Value:
        return self._compare(other, "==")

    def differs(self, other: Any) -> Value:
        return self._compare(other, "!=")

    def select(self, if_true: Value, if_false: Value) -> Value:
        return Value(
            self.emitter, self.emitter.builder.select(self.value, if_true.value, if_false.value)
        )


class Variable:
    """A value that changes in a loop; LLVM keeps it in a register."""

    __slots__ = ("address", "emitter")

    def __init__(self, emitter: Emitter, address: ir.Value) -> None:
        self.emitter = emitter
        self.address = address

    def get(self) -> Value:
        return Value(self.emitter, self.emitter.builder.load(self.address))

    def set(self, value: Value) -> None:
        self.emitter.builder.store(value.value, self.address)

    def add(self, value: Any) -> None:
        self.set(self.get() + value)


class Emitter:
    """Writes the functions of one LLVM module."""

    builder: ir.IRBuilder

    def __init__(self, name: str, target: Target) -> None:
        self.module = ir.Module(name)
        self.target = target

    # Functions

    def function(
        self, name: str, num_arguments: int, write: Callable[..., None], *, exported: bool = True
    ) -> ir.Function:
        """Writes `void name(int64, ...)`; `write` is called with one `Value` an argument."""
        type_ = ir.FunctionType(VOID, [I64] * num_arguments)
        function = ir.Function(self.module, type_, name)
        function.attributes.add("nounwind")
        if not exported:
            function.linkage = "internal"
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self._allocas = ir.IRBuilder(function.append_basic_block("body"))
        body = self._allocas.block
        entry = self.builder.block
        self.builder.position_at_end(body)
        self._allocas.position_at_end(entry)
        write(*[Value(self, argument) for argument in function.args])
        self.builder.ret_void()
        self._allocas.branch(body)
        return function

    def call(self, function: ir.Function, *arguments: Value) -> None:
        self.builder.call(function, [argument.value for argument in arguments])

    def call_address(self, address: Value, *arguments: Value) -> None:
        """Calls the `void (int64, ...)` that lies at `address`."""
        type_ = ir.FunctionType(VOID, [I64] * len(arguments))
        pointer = self.builder.inttoptr(address.value, type_.as_pointer())
        self.builder.call(pointer, [argument.value for argument in arguments])

    def call_c(self, name: str, result: ir.Type, *arguments: Value, variadic: int = -1) -> Value:
        """Calls a C function of the process; from the `variadic`-th argument on it takes any
        number.
        """
        types = [argument.type for argument in arguments]
        fixed = types if variadic < 0 else types[:variadic]
        function = self._declare(name, ir.FunctionType(result, fixed, var_arg=variadic >= 0))
        return Value(self, self.builder.call(function, [a.value for a in arguments]))

    def _declare(self, name: str, type_: ir.FunctionType) -> ir.Function:
        known = self.module.globals.get(name)
        return known if known is not None else ir.Function(self.module, type_, name)

    def intrinsic(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        type_ = ir.FunctionType(result, [argument.type for argument in arguments])
        function = self._declare(name, type_)
        return Value(self, self.builder.call(function, [a.value for a in arguments]))

    def hint(self, name: str) -> None:
        """An intrinsic of no arguments and no result."""
        self.builder.call(self._declare(name, ir.FunctionType(VOID, [])), [])

    def read_counter(self) -> Value:
        """The processor's time counter: `rdtsc` on x86-64, `CNTVCT_EL0` on AArch64."""
        return self.intrinsic("llvm.readcyclecounter", I64)

    # Constants and memory

    def constant(self, value: int | float, type_: ir.Type = I64) -> Value:
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, [value] * type_.count))
        return Value(self, ir.Constant(type_, value))

    def vector_constant(self, values: Sequence[int], element: ir.Type) -> Value:
        return Value(self, ir.Constant(vector(element, len(values)), list(values)))

    def lift(self, value: Any, type_: ir.Type) -> Value:
        return value if isinstance(value, Value) else self.constant(value, type_)

    def variable(self, initial: Value) -> Variable:
        variable = Variable(self, self._allocas.alloca(initial.type))
        variable.set(initial)
        return variable

    def stack(self, num_bytes: int) -> Value:
        """The address of `num_bytes` of the function's own stack, aligned to 64."""
        allocated = self._allocas.alloca(vector(I8, 64), num_bytes // 64)
        allocated.align = 64
        return Value(self, self.builder.ptrtoint(allocated, I64))

    def _pointer(self, address: Value, type_: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address.value, type_.as_pointer())

    def load(self, address: Value, type_: ir.Type = I64, align: int | None = None) -> Value:
        if align is None:
            align = (
                1
                if isinstance(type_, ir.VectorType)
                else type_.width // 8
                if (isinstance(type_, ir.IntType))
                else 4
                if isinstance(type_, ir.FloatType)
                else 2
            )
        return Value(self, self.builder.load(self._pointer(address, type_), align=align))

    def load_constant(self, address: Value, type_: ir.Type) -> Value:
        """A vector that nobody writes while the function runs: it is loaded once, outside of a loop
        where that can be, and on either side of `keep_order`.
        """
        loaded = self.load(address, type_)
        loaded.value.set_metadata("invariant.load", self.module.add_metadata([]))
        return loaded

    def store(self, address: Value, value: Value, align: int = 1) -> None:
        self.builder.store(value.value, self._pointer(address, value.type), align=align)

    def prefetch(self, address: Value) -> None:
        pointer = self.builder.inttoptr(address.value, I8.as_pointer())
        type_ = ir.FunctionType(VOID, [I8.as_pointer(), I32, I32, I32])
        function = self._declare("llvm.prefetch.p0", type_)
        arguments = [pointer, *(ir.Constant(I32, value) for value in (0, 3, 1))]
        self.builder.call(function, arguments)

    def keep_order(self) -> None:
        """Loads stay on their side of it: no instruction, only fewer registers at once."""
        self.builder.fence("seq_cst", targetscope="singlethread")

    # Atomics, all of 64 bits

    def atomic_load(self, address: Value, type_: ir.IntType = I64) -> Value:
        pointer = self._pointer(address, type_)
        return Value(self, self.builder.load_atomic(pointer, "seq_cst", type_.width // 8))

    def atomic_store(self, address: Value, value: Value) -> None:
        pointer = self._pointer(address, value.type)
        self.builder.store_atomic(value.value, pointer, "seq_cst", value.type.width // 8)

    def atomic_add(self, address: Value, value: Value) -> Value:
        """Returns what lay there before."""
        pointer = self._pointer(address, value.type)
        return Value(self, self.builder.atomic_rmw("add", pointer, value.value, "seq_cst"))

    def compare_exchange(
        self, address: Value, expected: Value, desired: Value
    ) -> tuple[Value, Value]:
        """Returns what lay there and whether `desired` took its place."""
        pointer = self._pointer(address, expected.type)
        pair = self.builder.cmpxchg(pointer, expected.value, desired.value, "seq_cst", "seq_cst")
        return (
            Value(self, self.builder.extract_value(pair, 0)),
            Value(self, self.builder.extract_value(pair, 1)),
        )

    # Control

    @contextmanager
    def range(self, start: Any, stop: Any, step: int = 1) -> Iterator[Value]:
        """A counting loop of int64; the body is what is written inside the `with`."""
        first, last = self.lift(start, I64), self.lift(stop, I64)
        before = self.builder.block
        head = self.builder.append_basic_block("head")
        body = self.builder.append_basic_block("loop")
        done = self.builder.append_basic_block("done")
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(first.value, before)
        self.builder.cbranch(self.builder.icmp_signed("<", index, last.value), body, done)
        self.builder.position_at_end(body)
        yield Value(self, index)
        following = self.builder.add(index, ir.Constant(I64, step), flags=["nsw"])
        index.add_incoming(following, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(done)

    @contextmanager
    def loop(self) -> Iterator[Callable[[Value], None]]:
        """An endless loop; calling what it yields with a condition leaves it where that is true."""
        body = self.builder.append_basic_block("forever")
        done = self.builder.append_basic_block("left")

        def leave_if(condition: Value) -> None:
            stay = self.builder.append_basic_block("stay")
            self.builder.cbranch(condition.value, done, stay)
            self.builder.position_at_end(stay)

        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield leave_if
        self.builder.branch(body)
        self.builder.position_at_end(done)

    def in_tiles(
        self, count: Value, sizes: Sequence[int], call: Callable[[int, Value], None]
    ) -> None:
        """Covers 0..count with tiles, the largest first: `call(size, first)`. The last size is
        1.
        """
        done = self.variable(self.constant(0))
        for size in sizes:
            with self.loop() as leave_if:
                leave_if(done.get() + size > count)
                call(size, done.get())
                done.add(size)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.value):
            yield

    def return_if(self, condition: Value) -> None:
        leave = self.builder.append_basic_block("return")
        stay = self.builder.append_basic_block("stay")
        self.builder.cbranch(condition.value, leave, stay)
        self.builder.position_at_end(leave)
        self.builder.ret_void()
        self.builder.position_at_end(stay)

    # Vectors

    def splat(self, scalar: Value, lanes: int) -> Value:
        type_ = vector(scalar.type, lanes)
        undefined = ir.Constant(type_, ir.Undefined)
        single = self.builder.insert_element(undefined, scalar.value, ir.Constant(I32, 0))
        mask = ir.Constant(vector(I32, lanes), [0] * lanes)
        return Value(self, self.builder.shuffle_vector(single, undefined, mask))

    def broadcast(self, address: Value, element: ir.Type, lanes: int) -> Value:
        """One element from memory in every lane."""
        return self.splat(self.load(address, element, align=1), lanes)

    def shuffle(self, left: Value, right: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(vector(I32, len(lanes)), list(lanes))
        return Value(self, self.builder.shuffle_vector(left.value, right.value, mask))

    def lookup(self, table: Sequence[int], indices: Value) -> Value:
        """Of a table of 16 bytes, the one that each byte of `indices` (0..15) names."""
        lanes = indices.type.count
        names = {64: "x86.avx512.pshuf.b.512", 32: "x86.avx2.pshuf.b"}
        if self.target.is_arm:
            names = {16: "aarch64.neon.tbl1.v16i8"}
        if self.target.name != "plain" and lanes in names:
            whole = self.vector_constant(list(table) * (lanes // 16), I8)
            return self.intrinsic(f"llvm.{names[lanes]}", indices.type, whole, indices)
        choices = [self.constant(value, indices.type) for value in table]
        for bit in range(4):
            is_set = (indices & (1 << bit)).differs(0)
            choices = [
                is_set.select(high, low)
                for low, high in zip(choices[::2], choices[1::2], strict=True)
            ]
        return choices[0]

    def extract(self, value: Value, lane: int) -> Value:
        return Value(self, self.builder.extract_element(value.value, ir.Constant(I32, lane)))

    def bitcast(self, value: Value, type_: ir.Type) -> Value:
        return Value(self, self.builder.bitcast(value.value, type_))

    def cast(self, value: Value, type_: ir.Type, how: str) -> Value:
        """`how` is LLVM's name: sext, zext, trunc, sitofp, fptosi, fpext, fptrunc."""
        return Value(self, getattr(self.builder, how)(value.value, type_))

    def to_float(self, value: Value) -> Value:
        lanes = value.type.count if isinstance(value.type, ir.VectorType) else 0
        return self.cast(value, vector(F32, lanes) if lanes else F32, "sitofp")

    def fma(self, left: Value, right: Value, addend: Value) -> Value:
        """left * right + addend, rounded once where the processor can."""
        name = "llvm.fmuladd" if self.target.name == "plain" else "llvm.fma"
        return self.intrinsic(f"{name}.{_mangled(left.type)}", left.type, left, right, addend)

    def half_to_float(self, half: Value) -> Value:
        """float16 bits (int16 lanes) as float32. Without F16C by integers: LLVM would call a
        library.
        """
        lanes = half.type.count
        if self.target.has_f16:
            return self.cast(self.bitcast(half, vector(F16, lanes)), vector(F32, lanes), "fpext")
        words, floats = vector(I32, lanes), vector(F32, lanes)
        wide = self.cast(half, words, "zext")
        magnitude = (wide & 0x7FFF) << 13
        scaled = self.bitcast(magnitude, floats) * self.constant(2.0**112, floats)
        special = magnitude >= (0x1F << 23)
        bits = special.select(magnitude | 0x7F800000, self.bitcast(scaled, words))
        return self.bitcast(bits | ((wide & 0x8000) << 16), floats)

    def float_to_half(self, value: Value) -> Value:
        """float32 as float16 bits (int16 lanes), ties to even."""
        lanes = value.type.count
        shorts = vector(I16, lanes)
        if self.target.has_f16:
            return self.bitcast(self.cast(value, vector(F16, lanes), "fptrunc"), shorts)
        words, floats = vector(I32, lanes), vector(F32, lanes)
        bits = self.bitcast(value, words)
        magnitude = bits & 0x7FFFFFFF
        odd = (magnitude >> 13) & 1
        normal = (magnitude + (odd + (0xFFF - (112 << 23)))) >> 13
        magic = self.constant(126 << 23, words)
        small = self.bitcast(self.bitcast(magnitude, floats) + self.bitcast(magic, floats), words)
        finite = (magnitude < (113 << 23)).select(small - magic, normal)
        infinite = (magnitude > (0xFF << 23)).select(
            self.constant(0x7E00, words), self.constant(0x7C00, words)
        )
        result = (magnitude >= (143 << 23)).select(infinite, finite)
        return self.cast(result | ((bits >> 16) & 0x8000), shorts, "trunc")

    def unary(self, name: str, value: Value) -> Value:
        """An overloaded intrinsic of one argument: fabs, sqrt, rint."""
        return self.intrinsic(f"llvm.{name}.{_mangled(value.type)}", value.type, value)

    def maximum(self, left: Value, right: Value) -> Value:
        return (left > right).select(left, right)

    def minimum(self, left: Value, right: Value) -> Value:
        return (left < right).select(left, right)

    def fold(self, value: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined into one scalar, halves first: always in the same order."""
        lanes = value.type.count
        while lanes > 1:
            lanes //= 2
            low = self.shuffle(value, value, range(lanes))
            high = self.shuffle(value, value, range(lanes, 2 * lanes))
            value = combine(low, high)
        return self.extract(value, 0)

    def fold_all(self, value: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined, in every lane."""
        lanes, half = value.type.count, value.type.count // 2
        while half:
            other = self.shuffle(value, value, [lane ^ half for lane in range(lanes)])
            value, half = combine(value, other), half // 2
        return value

    def sum(self, value: Value) -> Value:
        return self.fold(value, lambda a, b: a + b)
