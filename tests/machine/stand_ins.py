"""The kernels of AVX-512 and AVX-VNNI on an x86 processor that has AVX2 alone: a pytest plugin.

    CYCLEWISE_TARGET=avx512 python -m pytest -p tests.machine.stand_ins tests/machine

LLVM makes two registers of one that is too wide, and instructions that this processor lacks are
written as what they do. So the tiles, layouts and passes of those targets are tested everywhere;
the instructions themselves run in `tests/x86.sh`, on emulated processors.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from llvmlite import ir

from cyclewise.machine.kernels import target
from cyclewise.machine.kernels.lang import BF16, F32, I16, I32, Emitter, Value, vector


@dataclass(frozen=True, slots=True)
class Reduced(target.Target):
    """A target for a processor without its instructions."""

    stand_ins: str = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    """Compiled kernels are kept under the target: other code is never taken for theirs."""

    @property
    def has_bf16(self) -> bool:
        return self.name == "avx512"


def _vpdpbusd(emitter: Emitter, total: Value, codes: Value, activations: Value) -> Value:
    codes, activations = (emitter.bitcast(four, total.type) for four in (codes, activations))
    for shift in (0, 8, 16, 24):
        x = (activations << (24 - shift)).arithmetic_right(24)
        total = total + ((codes >> shift) & 0xFF) * x
    return total


def _vpmaddwd(emitter: Emitter, left: Value, right: Value) -> Value:
    words = vector(I32, left.type.count // 2)
    left, right = (emitter.bitcast(pair, words) for pair in (left, right))
    low = (left << 16).arithmetic_right(16) * (right << 16).arithmetic_right(16)
    return low + left.arithmetic_right(16) * right.arithmetic_right(16)


def _vpshufb(emitter: Emitter, table: Value, indices: Value) -> Value:
    count = indices.type.count
    halves = []
    for half in (range(count // 2), range(count // 2, count)):
        parts = [emitter.shuffle(value, value, half) for value in (table, indices)]
        halves.append(emitter.intrinsic("llvm.x86.avx2.pshuf.b", parts[0].type, *parts))
    return emitter.shuffle(*halves, range(count))


def _vcvtneps2bf16(emitter: Emitter, values: Value) -> Value:
    lanes = values.type.count
    bits = emitter.bitcast(values, vector(I32, lanes))
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = (bits & 0x7F800000).differs(0).select(rounded, (bits >> 16) & 0x8000)
    shorts = emitter.cast(kept, vector(I16, lanes), "trunc")
    return emitter.bitcast(shorts, vector(BF16, lanes))


def _vdpbf16ps(emitter: Emitter, total: Value, left: Value, right: Value) -> Value:
    words = vector(I32, total.type.count)
    left, right = (emitter.bitcast(pair, words) for pair in (left, right))
    for numbers in (lambda pair: pair & -0x10000, lambda pair: pair << 16):
        factors = [
            emitter.bitcast(numbers(pair), vector(F32, words.count)) for pair in (left, right)
        ]
        total = emitter.fma(*factors, total)
    return total


STAND_INS = {
    "llvm.x86.avx512.vpdpbusd.256": _vpdpbusd,
    "llvm.x86.avx512.vpdpbusd.512": _vpdpbusd,
    "llvm.x86.avx512.pmaddw.d.512": _vpmaddwd,
    "llvm.x86.avx512.pshuf.b.512": _vpshufb,
    "llvm.x86.avx512bf16.cvtneps2bf16.512": _vcvtneps2bf16,
    "llvm.x86.avx512bf16.dpbf16ps.512": _vdpbf16ps,
}


class _Emitter(Emitter):
    def intrinsic(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        if name in STAND_INS:
            return STAND_INS[name](self, *arguments)
        return super().intrinsic(name, result, *arguments)


def _host_target() -> target.Target:
    """The target that is asked for, in the instructions of AVX2."""
    wanted = target.make_target(os.environ["CYCLEWISE_TARGET"])
    least = target.make_target("avx2")
    return Reduced(wanted.name, least.cpu, least.features, wanted.lanes, wanted.token_tiles)


# Before any module takes them by name.
target.host_target = _host_target

from cyclewise.machine.kernels import compiler  # noqa: E402

compiler.Emitter = _Emitter
