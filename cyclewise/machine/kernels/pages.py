"""What pages of the KV cache hold, and how query rows meet them: `Halves` and `Bytes`.

Both kinds store 2 bytes a *lane* and widen them to 4 in a register. Of float16 a lane is one
number, float32 when widened, and a step of a product is a multiply-add. Of int8 a lane is a pair
of neighbours (head dimensions of a key, tokens of values), int16 when widened, and a step adds the
products of both to an int32; a head's codes are followed by a scale for each token, the upper half
of a float32. Of one layer's part of a page, `steps` is the number of lanes in the direction that is
summed:

    keys    (kv_heads, steps(head_dim), PAGE_TOKENS) lanes
    values  (kv_heads, steps(PAGE_TOKENS), padded_head_dim) lanes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cyclewise.machine.kernels.lang import F32, I8, I16, I32, Emitter, Value, Variable, vector
from cyclewise.machine.kernels.layout import LINE, PAGE_TOKENS
from cyclewise.machine.kernels.math import absolute, round_to_int
from cyclewise.machine.names import CacheKind

LANES = 16
LANE_BYTES, WIDE_BYTES = 2, 4
"""Of a lane in a page, and when widened."""
SCALE_BYTES = 2
LARGEST_HALF = 65504.0
LARGEST_CODE, LARGEST_FACTOR = 127.0, 32767.0
"""Of what int8 pages hold, and of the int16 that they are multiplied by."""
LEAST_SCALED = 1e-30
"""Factors that are all smaller are taken for zeros."""

STEPS = 4
"""Of a product of few rows, in one turn of its loop."""


class Halves:
    """Pages of float16."""

    name: CacheKind = "f16"

    chunk = 64
    """Keys whose scores become weights at once: a multiple of PAGE_TOKENS that divides SPLIT. What
    a head of 64 has of them fits the first-level cache with what is asked for meanwhile.
    """

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter

    @staticmethod
    def steps(count: Any) -> Any:
        """Steps of a sum over so many numbers."""
        return count

    @staticmethod
    def head_bytes(lanes: Any) -> Any:
        """Of one head's keys or values of a page."""
        return lanes * LANE_BYTES

    def zero(self, lanes: int) -> Value:
        return self.emitter.constant(0.0, vector(F32, lanes))

    def widen(self, stored: Value) -> Value:
        return self.emitter.half_to_float(stored)

    def load_wide(self, address: Value, lanes: int) -> Value:
        return self.emitter.load(address, vector(F32, lanes))

    def scalar(self, address: Value, lanes: int) -> Value:
        return self.emitter.broadcast(address, F32, lanes)

    def add(self, left: Value, right: Value, total: Value) -> Value:
        return self.emitter.fma(left, right, total)

    def mix(self, head: Value, dim: Value) -> None:
        """What becomes of a query or key, in place, before they meet: nothing."""

    def write_key(self, source: Value, keys: Value, place: Value, dim: Value) -> None:
        """A token's key, `dim` float32, to its place in a head's part of a page."""
        with self.emitter.range(0, dim) as at:
            single = self.emitter.load(source + at * 4, vector(F32, 1))
            to = keys + (at * PAGE_TOKENS + place) * LANE_BYTES
            self.emitter.store(to, self._to_half(single))

    def write_value(
        self, source: Value, values: Value, place: Value, dim: Value, padded: Value
    ) -> None:
        with self.emitter.range(0, dim) as at:
            single = self.emitter.load(source + at * 4, vector(F32, 1))
            to = values + (place * padded + at) * LANE_BYTES
            self.emitter.store(to, self._to_half(single))

    def _to_half(self, value: Value) -> Value:
        return self.emitter.float_to_half(clamp(self.emitter, value))


class Bytes:
    """Pages of int8."""

    name: CacheKind = "int8"

    chunk = 128

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter

    @staticmethod
    def steps(count: Any) -> Any:
        return count // 2

    @staticmethod
    def head_bytes(lanes: Any) -> Any:
        return lanes * LANE_BYTES + PAGE_TOKENS * SCALE_BYTES

    def zero(self, lanes: int) -> Value:
        return self.emitter.constant(0, vector(I32, lanes))

    def widen(self, stored: Value) -> Value:
        lanes = stored.type.count
        codes = self.emitter.bitcast(stored, vector(I8, 2 * lanes))
        return self.emitter.cast(codes, vector(I16, 2 * lanes), "sext")

    def load_wide(self, address: Value, lanes: int) -> Value:
        return self.emitter.load(address, vector(I16, 2 * lanes))

    def scalar(self, address: Value, lanes: int) -> Value:
        pair = self.emitter.broadcast(address, I32, lanes)
        return self.emitter.bitcast(pair, vector(I16, 2 * lanes))

    def add(self, left: Value, right: Value, total: Value) -> Value:
        return add_pairs(self.emitter, left, right, total)

    def mix(self, head: Value, dim: Value) -> None:
        """Queries and keys times a Hadamard matrix, in place (QuaRot: Ashkboos et al., 2024): their
        products stay as they are, and the few large dimensions that some models' keys have are
        spread over all. Blocks are as large as the largest power of two that divides `dim`, which
        must be a multiple of 16; others stay as they are.
        """
        emitter, floats = self.emitter, vector(F32, LANES)
        whole = (dim % LANES).equals(0)
        end = whole.select(dim, emitter.constant(0))
        block = end & (0 - end)

        def within(address: Value) -> None:
            value = emitter.load(address, floats)
            for half in (1, 2, 4, 8):
                other = emitter.shuffle(value, value, [lane ^ half for lane in range(LANES)])
                signs = [-1.0 if lane & half else 1.0 for lane in range(LANES)]
                value = value * emitter.vector_constant(signs, F32) + other
            size = emitter.cast(block, F32, "sitofp")
            factor = emitter.splat(1.0 / emitter.unary("sqrt", size), LANES)
            emitter.store(address, value * factor)

        with emitter.range(0, end, LANES) as at:
            within(head + at * 4)
        half = emitter.variable(emitter.constant(LANES))
        with emitter.loop() as leave_if:
            step = half.get()
            leave_if(step >= block)
            with emitter.range(0, end, LANES) as at, emitter.when((at & step).equals(0)):
                low, high = head + at * 4, head + (at + step) * 4
                left, right = emitter.load(low, floats), emitter.load(high, floats)
                emitter.store(low, left + right)
                emitter.store(high, left - right)
            half.set(step + step)

    def write_key(self, source: Value, keys: Value, place: Value, dim: Value) -> None:
        """A token's key, `dim` float32, to its place in a head's part of a page."""
        pairs, lanes = PAGE_TOKENS * LANE_BYTES, self.steps(dim) * PAGE_TOKENS
        to = keys + place * LANE_BYTES
        scale = self._write(source, dim, lambda at: to + (at >> 1) * pairs + (at & 1))
        self.emitter.store(keys + lanes * LANE_BYTES + place * SCALE_BYTES, scale)

    def write_value(
        self, source: Value, values: Value, place: Value, dim: Value, padded: Value
    ) -> None:
        lanes = padded * self.steps(PAGE_TOKENS)
        to = values + (place >> 1) * (padded * LANE_BYTES) + (place & 1)
        scale = self._write(source, dim, lambda at: to + at * LANE_BYTES)
        self.emitter.store(values + lanes * LANE_BYTES + place * SCALE_BYTES, scale)

    def _write(self, source: Value, dim: Value, address: Callable[[Value], Value]) -> Value:
        """Codes of float32, byte by byte: another thread may write the other half of a lane.
        Returns their scale as it is stored.
        """
        emitter = self.emitter
        largest = emitter.variable(emitter.constant(0.0, F32))

        def number(at: Value) -> Value:
            return clamp(emitter, emitter.load(source + at * 4, vector(F32, 1)))

        with emitter.range(0, dim) as at:
            magnitude = emitter.extract(absolute(emitter, number(at)), 0)
            largest.set(emitter.maximum(largest.get(), magnitude))
        stored, scale = code_scale(emitter, largest.get())
        enough = scale > LEAST_SCALED
        inverse = enough.select(1.0 / scale, emitter.constant(0.0, F32))
        with emitter.range(0, dim) as at:
            code = round_to_int(emitter, number(at) * emitter.splat(inverse, 1))
            emitter.store(address(at), emitter.cast(code, vector(I8, 1), "trunc"))
        return stored


Kind = Halves | Bytes
KINDS: dict[CacheKind, type[Halves] | type[Bytes]] = {"f16": Halves, "int8": Bytes}


def add_pairs(emitter: Emitter, left: Value, right: Value, total: Value) -> Value:
    """total + the products of neighbouring int16: VPMADDWD, which LLVM makes VPDPWSSD of where
    there is one.
    """
    lanes = total.type.count
    if emitter.target.is_x86 and emitter.target.name != "plain":
        name = "avx512.pmaddw.d.512" if lanes == 16 else "avx2.pmadd.wd"
        return total + emitter.intrinsic(f"llvm.x86.{name}", total.type, left, right)
    words = vector(I32, lanes)

    def every_second(pairs: Value, first: int) -> Value:
        found = emitter.shuffle(pairs, pairs, range(first, 2 * lanes, 2))
        return emitter.cast(found, words, "sext")

    low, high = (every_second(left, i) * every_second(right, i) for i in (0, 1))
    return total + (low + high)


def products(
    kind: Kind,
    sums: list[list[Variable]],
    steps: Value | int,
    scalars: Value,
    row_bytes: Value | int,
    vectors: Value,
    step_bytes: Value | int,
    few: bool,
    ahead: Value | None,
) -> None:
    """sums[row][i] += scalars[row][step] * vectors[step][i] over all steps, both read from memory:
    first whichever are fewer, so that registers hold them.

    Args:
        scalars: the address of the first row's first number; rows are `row_bytes` apart.
        vectors: the address of the first step's first vector, as they are stored if `few` and wide
            otherwise; steps are `step_bytes` apart.
        ahead: from there on, as many bytes as the vectors have are asked for, bit by bit: many
            lines at once would have to wait for each other.
    """
    emitter = kind.emitter
    lanes = emitter.target.lanes
    rows, width = range(len(sums)), range(len(sums[0]))
    size = LANE_BYTES if few else WIDE_BYTES

    def found(address: Value) -> Value:
        if few:
            return kind.widen(emitter.load(address, vector(I16, lanes)))
        return kind.load_wide(address, lanes)

    def add(row: int, i: int, left: Value, right: Value) -> None:
        sums[row][i].set(kind.add(left, right, sums[row][i].get()))

    def take(step: int) -> None:
        here = line.get() + step * step_bytes
        addresses = [here + i * (lanes * size) for i in width]
        numbers = [number.get() + row * row_bytes + step * WIDE_BYTES for row in rows]
        if len(rows) < len(width):
            held = [kind.scalar(address, lanes) for address in numbers]
            for i in width:
                right = found(addresses[i])
                for row in rows:
                    add(row, i, held[row], right)
        else:
            held = [found(address) for address in addresses]
            for row in rows:
                left = kind.scalar(numbers[row], lanes)
                for i in width:
                    add(row, i, left, held[i])

    line, number = emitter.variable(vectors), emitter.variable(scalars)
    asked = None if ahead is None else emitter.variable(ahead)

    def turns(count: Value | int, at_once: int) -> None:
        with emitter.range(0, count):
            if asked is not None and at_once == STEPS:
                num_bytes = STEPS * len(width) * lanes * LANE_BYTES
                for at in range(0, num_bytes, LINE):
                    emitter.prefetch(asked.get() + at)
                asked.add(num_bytes)
            for step in range(at_once):
                take(step)
            line.add(at_once * step_bytes)
            number.add(at_once * WIDE_BYTES)

    # From the first-level cache alone, many rows are no faster for it.
    at_once = STEPS if few else 1
    turns(steps // at_once, at_once)
    if few and isinstance(steps, Value):
        turns(steps % at_once, 1)


def clamp(emitter: Emitter, value: Value) -> Value:
    """What float16 cannot hold becomes its largest value: nothing in a page is ever infinite."""
    limit = emitter.constant(LARGEST_HALF, value.type)
    least = emitter.constant(-LARGEST_HALF, value.type)
    return emitter.maximum(emitter.minimum(value, limit), least)


def load_scales(emitter: Emitter, address: Value, lanes: int) -> Value:
    """Scales of as many tokens as float32."""
    halves = emitter.load(address, vector(I16, lanes))
    wide = emitter.cast(halves, vector(I32, lanes), "zext") << 16
    return emitter.bitcast(wide, vector(F32, lanes))


def code_scale(emitter: Emitter, largest: Value) -> tuple[Value, Value]:
    """The scale of codes whose largest magnitude is `largest`, as the int16 that is stored and as
    float32: rounded up to what 16 bits hold, so that no code is beyond 127.
    """
    bits = emitter.bitcast(largest / LARGEST_CODE, I32) + 0xFFFF
    upper = bits >> 16
    return emitter.cast(upper, I16, "trunc"), emitter.bitcast(upper << 16, F32)


def to_factors(emitter: Emitter, numbers: list[Value], largest: Value) -> list[Value]:
    """float32 lanes as int16 multiples of largest / 32767."""
    enough = largest > LEAST_SCALED
    inverse = enough.select(LARGEST_FACTOR / largest, emitter.constant(0.0, F32))
    found = []
    for value in numbers:
        lanes = value.type.count
        rounded = round_to_int(emitter, value * emitter.splat(inverse, lanes))
        found.append(emitter.cast(rounded, vector(I16, lanes), "trunc"))
    return found


def largest_of(emitter: Emitter, numbers: list[Value]) -> Value:
    """The largest magnitude of float32 lanes."""
    found = absolute(emitter, numbers[0])
    for value in numbers[1:]:
        found = emitter.maximum(found, absolute(emitter, value))
    return emitter.fold(found, emitter.maximum)
