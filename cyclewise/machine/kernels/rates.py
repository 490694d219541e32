"""Raw rates: an arithmetic instruction in registers as fast as it issues, and a cache line as fast
as it goes from one thread to another.

They are roofs: what the hardware can do, and no kernel of ours. The clock measures them
(`clock/roofs.py`) through `machine/probe.py`. Every result feeds the next instruction on the same
register, so that none can be left out, and there are more registers than an instruction takes
cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import BF16, F32, I8, I16, I32, Emitter, Value, vector
from cyclewise.machine.kernels.layout import HANDOVER, RATE, THREAD, Record
from cyclewise.machine.kernels.target import Target

CHAINS = 12
"""Registers that instructions feed; with two operands, no more than any x86-64 has."""
UNROLL = 4
"""Instructions of each chain in a turn of the loop."""
OPERAND_BYTES = (2 + CHAINS) * 64
"""Two operands and the chains' first values, 64 bytes apart."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A unit's raw instruction on a target."""

    unit: str
    """`dot`, `fma` (`costs.Unit`) or `bf16`."""
    instruction: str
    element: ir.Type
    lanes: int
    """Of `element`, in a register."""
    operations: int
    """Of one instruction; a multiply-add is two."""
    write: Callable[[Emitter, Value, Value, Value], Value]
    """Emits it: from a chain's value and the two operands, all of one type, the next value."""


def rates(target: Target) -> dict[str, Rate]:
    """The raw instructions of a target, by unit."""
    writers = {"avx512": _avx512, "avxvnni": _avxvnni, "avx2": _avx2, "plain": _plain}
    writers |= {"neon_i8mm": _neon_i8mm, "neon_dot": _neon_dot}
    found = writers[target.name](target)
    return {rate.unit: rate for rate in found}


def _fma(emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    return emitter.fma(chain, left, right)


def _vpdpbusd(emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    lanes = chain.type.count
    codes, values = (emitter.bitcast(x, vector(I8, 4 * lanes)) for x in (left, right))
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return emitter.intrinsic(name, chain.type, chain, codes, values)


def _vdpbf16ps(emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    halves = vector(BF16, 32)
    pairs = [emitter.bitcast(x, halves) for x in (left, right)]
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return emitter.intrinsic(name, chain.type, chain, *pairs)


def _vpmaddubsw(emitter: Emitter, chain: Value, left: Value, _: Value) -> Value:
    as_bytes = vector(I8, 32)
    codes, values = (emitter.bitcast(x, as_bytes) for x in (chain, left))
    return emitter.intrinsic("llvm.x86.avx2.pmadd.ub.sw", chain.type, codes, values)


def _sdot(emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    return _of_bytes("sdot", emitter, chain, left, right)


def _smmla(emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    return _of_bytes("smmla", emitter, chain, left, right)


def _of_bytes(name: str, emitter: Emitter, chain: Value, left: Value, right: Value) -> Value:
    codes, values = (emitter.bitcast(x, vector(I8, 16)) for x in (left, right))
    full_name = f"llvm.aarch64.neon.{name}.v4i32.v16i8"
    return emitter.intrinsic(full_name, chain.type, chain, codes, values)


def _multiply_add(_: Emitter, chain: Value, left: Value, right: Value) -> Value:
    return chain * left + right


def _avx512(target: Target) -> list[Rate]:
    found = [
        Rate("dot", "VPDPBUSD", I32, 16, 128, _vpdpbusd),
        Rate("fma", "FMA", F32, 16, 32, _fma),
    ]
    if "+avx512bf16" in target.features:
        found.append(Rate("bf16", "VDPBF16PS", F32, 16, 64, _vdpbf16ps))
    return found


def _avxvnni(_: Target) -> list[Rate]:
    return [
        Rate("dot", "VPDPBUSD", I32, 8, 64, _vpdpbusd),
        Rate("fma", "FMA", F32, 8, 16, _fma),
    ]


def _avx2(_: Target) -> list[Rate]:
    return [
        Rate("dot", "VPMADDUBSW", I16, 16, 64, _vpmaddubsw),
        Rate("fma", "FMA", F32, 8, 16, _fma),
    ]


def _neon_i8mm(_: Target) -> list[Rate]:
    return [
        Rate("dot", "SMMLA", I32, 4, 64, _smmla),
        Rate("fma", "FMLA", F32, 4, 8, _fma),
    ]


def _neon_dot(_: Target) -> list[Rate]:
    return [
        Rate("dot", "SDOT", I32, 4, 32, _sdot),
        Rate("fma", "FMLA", F32, 4, 8, _fma),
    ]


def _plain(_: Target) -> list[Rate]:
    return [
        Rate("dot", "32-bit multiply-add", I32, 4, 8, _multiply_add),
        Rate("fma", "float32 multiply-add", F32, 4, 8, _fma),
    ]


def _rate(
    emitter: Emitter,
    rate: Rate,
    moment: Value,
    batch: Value,
    thread: Value,
    first: Value,
    last: Value,
) -> None:
    """A tile is `repeats` turns of CHAINS * UNROLL instructions."""
    m, t = Record(emitter, moment, RATE), Record(emitter, thread, THREAD)
    type_ = vector(rate.element, rate.lanes)
    left, right, *starts = (
        emitter.load(m.operands + at, type_) for at in range(0, OPERAND_BYTES, 64)
    )
    chains = [emitter.variable(start) for start in starts]
    with emitter.range(first, last), emitter.range(0, m.repeats):
        for _ in range(UNROLL):
            for chain in chains:
                chain.set(rate.write(emitter, chain.get(), left, right))
    for i, chain in enumerate(chains):
        emitter.store(t.scratch + 64 * i, chain.get())


def _handover(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """Tiles 0 and 1, on two threads: in turns each writes the line's word when it has seen the
    other's.
    """
    m = Record(emitter, moment, HANDOVER)
    line, rounds = m.line, m.rounds
    with emitter.range(first, last) as tile, emitter.range(0, rounds) as round_:
        seen = round_ * 2 + tile
        with emitter.loop() as leave_if:
            leave_if(emitter.atomic_load(line).equals(seen))
        end = rounds * 2 - 1
        # The last word is the first one again: the next pass finds the line as this one did.
        emitter.atomic_store(line, seen.equals(end).select(emitter.constant(0), seen + 1))


def rates_unit(target: Target) -> Unit:
    """Exports `rate_<unit>` for each unit of the target, and `handover`."""
    found = rates(target)

    def write(emitter: Emitter) -> None:
        for name, rate in found.items():
            emitter.function(f"rate_{name}", 5, lambda *a, rate=rate: _rate(emitter, rate, *a))
        emitter.function("handover", 5, lambda *a: _handover(emitter, *a))

    return Unit("rates", write, (*(f"rate_{name}" for name in found), "handover"))
