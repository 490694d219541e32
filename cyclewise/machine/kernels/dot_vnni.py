"""Dot products by VPDPBUSD: unsigned codes times signed activations, four columns a lane."""

from __future__ import annotations

from cyclewise.machine.kernels.blocks import STEPS
from cyclewise.machine.kernels.dot import HALVES, Codes, Dot, SubScale
from cyclewise.machine.kernels.lang import I8, Value, vector


class VnniDot(Dot):
    """Signed codes become unsigned by adding 128; a sum begins at the zero point's share."""

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
        return self._with_sub_scales(halves, sub_scale)

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
            return self._half_correction(address, half, zero_point)
        return self._correction(address, zero_point) if zero_point else self._zero()

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
