"""Dot products by VPMADDUBSW into int16 for as long as nothing can overflow, then VPMADDWD into
int32.

An int16 holds the sum of 2 columns a step, and only the whole sum must fit, not its parts:
additions wrap. So where a format has a zero point, its share is where the sum begins (but for 4
bits, where eight steps of whole codes fit), and the largest |code - zero point| * 127 * 2 leaves
room for so many steps (`steps_of_a_sum`): 8 for 4 bits, and for 5 with a zero point; 4 for 5 bits
without one, and for 6. Scales of 16 columns allow 4 at most. Codes of 8 bits fill an int16 at once:
their sign moves to the activation, |code| <= 128 leaves 32,512.
"""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import STEPS, BlockFormat
from cyclewise.machine.kernels.dot import (
    AT_HALF_LANE_SUMS,
    AT_LANE_SUMS,
    Codes,
    Dot,
    SubScale,
)
from cyclewise.machine.kernels.lang import I1, I8, I16, I32, Value, vector

_AT_START = {4: AT_HALF_LANE_SUMS, 16: AT_LANE_SUMS, 32: AT_HALF_LANE_SUMS}
"""Where a zero point's share of a sum of int16 is found."""


def steps_of_a_sum(kind: BlockFormat) -> int:
    """How many steps of a group one int16 holds, whatever codes and activations there are."""
    if kind.bits == 8:
        return 1
    least = kind.zero_point if kind.zero_point in _AT_START else 0
    largest = max(kind.max_code - least, least)
    most = STEPS // 2 if kind.has_sub_scales else STEPS
    return next(steps for steps in (8, 4) if steps <= most and steps * 2 * 127 * largest < 1 << 15)


class Avx2Dot(Dot):
    def factors(self, pairs: Value) -> list[Value]:
        """Each in both halves of a lane, for VPMADDWD."""
        emitter, shorts = self.emitter, vector(I16, 2 * self.lanes)
        whole, found = emitter.bitcast(pairs, shorts), []
        for half in (0, 1):
            twice = [2 * lane + half for lane in range(self.lanes) for _ in (0, 1)]
            found.append(emitter.bitcast(emitter.shuffle(whole, whole, twice), pairs.type))
        return found

    def pair_sums(self, pairs: Value, address: Value) -> Value:
        shorts = vector(I16, 2 * self.lanes)
        both = [self.emitter.bitcast(value, shorts) for value in (pairs, self._words(address))]
        return self._vpmaddwd(*both)

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
        run, at_start = steps_of_a_sum(kind), _AT_START.get(kind.zero_point)
        signed = kind.bits == 8
        totals: list[list[Value | None]] = [[None] * len(activations) for _ in parts]
        for first in range(0, STEPS, run):
            partial: list[list[Value | None]] = [[None] * len(activations) for _ in parts]
            if at_start:
                for i, address in enumerate(activations):
                    start = emitter.bitcast(self._words(address + at_start + first), shorts)
                    if kind.zero_point == 4:  # what is found is -32 * the sums
                        start = start.arithmetic_right(3)
                    for part in parts:
                        partial[part][i] = start
            for step in range(first, first + run):
                if in_order:
                    emitter.keep_order()
                words = [emitter.bitcast(codes(step, part), as_bytes) for part in parts]
                magnitudes = [self._magnitude(word) for word in words] if signed else words
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
        sums = [[total for total in of_part if total is not None] for of_part in totals]
        if kind.zero_point and not at_start:
            # Read last, so that the sums have its registers.
            starts = [self._correction(address, kind.zero_point) for address in activations]
            sums = [[a + b for a, b in zip(found, starts, strict=True)] for found in sums]
        return sums

    def _vpmaddubsw(self, left: Value, right: Value) -> Value:
        result = vector(I16, 2 * self.lanes)
        return self.emitter.intrinsic("llvm.x86.avx2.pmadd.ub.sw", result, left, right)

    def _magnitude(self, value: Value) -> Value:
        """VPABSB: unsigned, so that -128 becomes 128."""
        wraps = self.emitter.constant(0, I1)
        return self.emitter.intrinsic(f"llvm.abs.v{4 * self.lanes}i8", value.type, value, wraps)

    def _signed_by(self, value: Value, sign: Value) -> Value:
        """VPSIGNB: `value`, negated where `sign` is negative, 0 where it is 0."""
        return self.emitter.intrinsic("llvm.x86.avx2.psign.b", value.type, value, sign)

    def _vpmaddwd(self, left: Value, right: Value) -> Value:
        result = vector(I32, self.lanes)
        return self.emitter.intrinsic("llvm.x86.avx2.pmadd.wd", result, left, right)
