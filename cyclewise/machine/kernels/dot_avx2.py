"""Dot products by VPMADDUBSW into int16 for as long as nothing can overflow, then VPMADDWD into
int32.

An int16 holds the sum of 2 columns a step: 8 steps of (code - zero point) * activation for 4 and 5
bits, 4 steps for 6, and then only the whole sum must fit, not its parts: additions wrap. So the
zero point's share is where the sum begins. Codes of 8 bits fill an int16 at once: their sign moves
to the activation, |code| <= 128 leaves 32,512.
"""

from __future__ import annotations

from cyclewise.machine.kernels.blocks import STEPS
from cyclewise.machine.kernels.dot import (
    AT_HALF_LANE_SUMS,
    AT_LANE_SUMS,
    Codes,
    Dot,
    SubScale,
)
from cyclewise.machine.kernels.lang import I8, I16, I32, Value, vector


class Avx2Dot(Dot):
    def factor(self, sub_scale: Value) -> Value:
        """In both halves of a lane, for VPMADDWD."""
        emitter = self.emitter
        twice = [lane for index in range(self.lanes) for lane in (index, index)]
        pairs = emitter.shuffle(sub_scale, sub_scale, twice)
        wide = emitter.cast(pairs, vector(I16, 2 * self.lanes), "sext")
        return emitter.bitcast(wide, vector(I32, self.lanes))

    def group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        emitter, kind, parts = self.emitter, self.kind, range(num_parts)
        shorts, as_bytes = vector(I16, 2 * self.lanes), vector(I8, 4 * self.lanes)
        run = {4: 8, 5: 8, 6: 4, 8: 1}[kind.bits]
        at_start = {16: AT_LANE_SUMS, 32: AT_HALF_LANE_SUMS}.get(kind.zero_point)
        signed = kind.bits == 8
        totals: list[list[Value | None]] = [[None] * len(activations) for _ in parts]
        if kind.zero_point and not at_start:
            for i, address in enumerate(activations):
                correction = self._correction(address, kind.zero_point)
                for part in parts:
                    totals[part][i] = correction
        for first in range(0, STEPS, run):
            partial: list[list[Value | None]] = [[None] * len(activations) for _ in parts]
            if at_start:
                for i, address in enumerate(activations):
                    start = self._words(address + at_start + first)
                    for part in parts:
                        partial[part][i] = emitter.bitcast(start, shorts)
            for step in range(first, first + run):
                if in_order:
                    emitter.keep_order()
                words = [emitter.bitcast(codes(step, part), as_bytes) for part in parts]
                magnitudes = [self._signed_by(word, word) for word in words] if signed else words
                for i, address in enumerate(activations):
                    loaded = emitter.bitcast(self._words(address + 4 * step), as_bytes)
                    for part in parts:
                        x = self._signed_by(loaded, words[part]) if signed else loaded
                        product = self._vpmaddubsw(magnitudes[part], x)
                        before = partial[part][i]
                        partial[part][i] = product if before is None else before + product
            for part in parts:
                factor = emitter.constant(1, shorts)
                if sub_scale:
                    factor = emitter.bitcast(sub_scale(first // run, part), shorts)
                for i, value in enumerate(partial[part]):
                    assert value is not None
                    wide, before = self._vpmaddwd(value, factor), totals[part][i]
                    totals[part][i] = wide if before is None else before + wide
        return [[total for total in found if total is not None] for found in totals]

    def _vpmaddubsw(self, left: Value, right: Value) -> Value:
        result = vector(I16, 2 * self.lanes)
        return self.emitter.intrinsic("llvm.x86.avx2.pmadd.ub.sw", result, left, right)

    def _signed_by(self, value: Value, sign: Value) -> Value:
        """VPSIGNB: `value`, negated where `sign` is negative, 0 where it is 0."""
        return self.emitter.intrinsic("llvm.x86.avx2.psign.b", value.type, value, sign)

    def _vpmaddwd(self, left: Value, right: Value) -> Value:
        result = vector(I32, self.lanes)
        return self.emitter.intrinsic("llvm.x86.avx2.pmadd.wd", result, left, right)
