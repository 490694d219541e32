"""Dot products in what LLVM makes of vectors: byte after byte in int32 lanes."""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import STEPS
from cyclewise.machine.kernels.dot import HALVES, Codes, Dot, SubScale
from cyclewise.machine.kernels.lang import I8, I32, Value, vector


class PlainDot(Dot):
    def group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        halves = [
            [self._sums(codes, activations, part, steps) for part in range(num_parts)]
            for steps in (HALVES if sub_scale else (tuple(range(STEPS)),))
        ]
        return self._with_sub_scales(halves, sub_scale) if sub_scale else halves[0]

    def _sums(
        self, codes: Codes, activations: list[Value], part: int, steps: tuple[int, ...]
    ) -> list[Value]:
        emitter = self.emitter
        sums = [self._zero() for _ in activations]
        for step in steps:
            word = codes(step, part)
            for byte in range(4):
                code = self._code(word, byte)
                for i, address in enumerate(activations):
                    x = emitter.cast(emitter.load(address + 4 * step + byte, I8), I32, "sext")
                    sums[i] = sums[i] + code * emitter.splat(x, self.lanes)
        return sums

    def _code(self, word: Value, byte: int) -> Value:
        """One of four codes as int32 lanes, its zero point taken off."""
        emitter, kind = self.emitter, self.kind
        shifted = word >> (8 * byte)
        if kind.bits == 8:
            narrow = emitter.cast(shifted, vector(I8, self.lanes), "trunc")
            return emitter.cast(narrow, vector(I32, self.lanes), "sext")
        return (shifted & 0xFF) - kind.zero_point
