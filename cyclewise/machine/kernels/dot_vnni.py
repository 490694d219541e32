"""Dot products by VPDPBUSD: unsigned codes times signed activations, four columns a lane."""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import STEPS
from cyclewise.machine.kernels.dot import AT_HALF_SUMS, HALVES, Codes, Dot, SubScale
from cyclewise.machine.kernels.lang import I8, I16, Value, vector


class VnniDot(Dot):
    """Signed codes become unsigned by adding 128; a sum begins at the zero point's share.

    Where the sums of 16 columns fit into int16 (codes of 2 and 3 bits), VPMADDWD takes both of a
    lane by their scales at once.
    """

    @property
    def num_factors(self) -> int:
        return 1 if self.kind.bits < 4 else 2

    def factors(self, pairs: Value) -> list[Value]:
        return [pairs] if self.num_factors == 1 else super().factors(pairs)

    def pair_sums(self, pairs: Value, address: Value) -> Value:
        return self._vpmaddwd(pairs, self._words(address))

    def group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        if not sub_scale:
            return self._sums(codes, activations, num_parts, in_order)
        halves = [self._sums(codes, activations, num_parts, in_order, half) for half in (0, 1)]
        if self.num_factors == 2:
            return self._with_sub_scales(halves, sub_scale)
        starts = [self._pair_correction(address) for address in activations]
        found = []
        for part, sums in enumerate(zip(*halves, strict=True)):
            scales, totals = sub_scale(0, part), []
            for low, high, start in zip(*sums, starts, strict=True):
                both = (low & 0xFFFF) | (high << 16)
                totals.append(self._vpmaddwd(self._added_pairs(both, start), scales))
            found.append(totals)
        return found

    def _pair_correction(self, address: Value) -> Value | None:
        """-zero_point * the sums of both halves in int16, from the stored -8 * sums."""
        if not self.kind.zero_point:
            return None
        shorts = vector(I16, 2 * self.lanes)
        sums = self.emitter.bitcast(self._words(address + AT_HALF_SUMS), shorts)
        shift = {4: 1}[self.kind.zero_point]
        return sums.arithmetic_right(shift)

    def _added_pairs(self, both: Value, start: Value | None) -> Value:
        if start is None:
            return both
        emitter = self.emitter
        return emitter.bitcast(emitter.bitcast(both, start.type) + start, both.type)

    def _sums(
        self,
        codes: Codes,
        activations: list[Value],
        num_parts: int,
        in_order: bool,
        half: int | None = None,
    ) -> list[list[Value]]:
        """Sums of a whole group or of a half, (part, token)."""
        signed = self.kind.bits == 8
        starts = [self._start(address, half) for address in activations]
        sums = [list(starts) for _ in range(num_parts)]
        for step in range(STEPS) if half is None else HALVES[half]:
            if in_order and num_parts > 1:  # one part leaves registers to load ahead into
                self.emitter.keep_order()
            words = [codes(step, part) for part in range(num_parts)]
            if signed:
                words = [word ^ -0x7F7F7F80 for word in words]
            for i, address in enumerate(activations):
                x = self._words(address + 4 * step)
                for total, word in zip(sums, words, strict=True):
                    total[i] = self._vpdpbusd(total[i], word, x)
        return sums

    def _start(self, address: Value, half: int | None) -> Value:
        zero_point = 128 if self.kind.bits == 8 else self.kind.zero_point
        if half is not None:
            if self.num_factors == 1:
                return self._zero()
            return self._half_correction(address, half, zero_point)
        return self._correction(address, zero_point) if zero_point else self._zero()

    def _vpmaddwd(self, left: Value, right: Value) -> Value:
        emitter, shorts = self.emitter, vector(I16, 2 * self.lanes)
        name = "avx512.pmaddw.d.512" if self.lanes == 16 else "avx2.pmadd.wd"
        pairs = [emitter.bitcast(value, shorts) for value in (left, right)]
        return emitter.intrinsic(f"llvm.x86.{name}", left.type, *pairs)

    def _vpdpbusd(self, total: Value, codes: Value, activations: Value) -> Value:
        emitter = self.emitter
        as_bytes = vector(I8, 4 * self.lanes)
        return emitter.intrinsic(
            f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}",
            total.type,
            total,
            emitter.bitcast(codes, as_bytes),
            emitter.bitcast(activations, as_bytes),
        )
