"""Dot products of AArch64: signed codes times signed activations.

SDOT takes four columns of four rows and of one token, SMMLA eight columns of two rows and of two
tokens. Codes of fewer than 8 bits are not negative, and a sum begins at the zero point's share.
"""

from __future__ import annotations

from cyclewise.machine.kernels.dot import HALVES, Codes, Dot, SubScale
from cyclewise.machine.kernels.lang import I8, I32, Value, vector


class SdotDot(Dot):
    def group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        if not sub_scale:
            return self._sums(codes, activations, num_parts)
        halves = [self._sums(codes, activations, num_parts, half) for half in (0, 1)]
        return self._with_sub_scales(halves, sub_scale)

    def _sums(
        self, codes: Codes, activations: list[Value], num_parts: int, half: int | None = None
    ) -> list[list[Value]]:
        """Sums of a whole group or of a half, (part, token)."""
        emitter, words = self.emitter, vector(I32, 4)
        starts = [self._start(address, half) for address in activations]
        sums = [list(starts) for _ in range(num_parts)]
        for index in (0, 1) if half is None else (half,):
            loaded = [emitter.load(address + 16 * index, words) for address in activations]
            for step in HALVES[index]:
                found = [codes(step, part) for part in range(num_parts)]
                for i, four in enumerate(loaded):
                    x = emitter.shuffle(four, four, [step % 4] * 4)
                    for total, word in zip(sums, found, strict=True):
                        total[i] = self._multiply("sdot", total[i], word, x)
        return sums

    def _start(self, address: Value, half: int | None) -> Value:
        zero_point = self.kind.zero_point
        if half is not None:
            return self._half_correction(address, half, zero_point)
        return self._correction(address, zero_point) if zero_point else self._zero()

    def _multiply(self, instruction: str, total: Value, codes: Value, x: Value) -> Value:
        emitter, as_bytes = self.emitter, vector(I8, 16)
        name = f"llvm.aarch64.neon.{instruction}.v4i32.v16i8"
        operands = (emitter.bitcast(codes, as_bytes), emitter.bitcast(x, as_bytes))
        return emitter.intrinsic(name, total.type, total, *operands)


class SmmlaDot(SdotDot):
    """Unpacked weights hold two steps side by side, two rows in a register."""

    rearranges = True

    def arranged(self, codes: list[Value]) -> list[Value]:
        found = []
        for even, odd in zip(codes[::2], codes[1::2], strict=True):
            for lanes in ((0, 4, 1, 5), (2, 6, 3, 7)):
                found.append(self.emitter.shuffle(even, odd, lanes))
        return found

    def place(self, lane: Value, step: int) -> Value:
        pair, odd = divmod(step, 2)
        return (lane >> 1) * 16 + (lane & 1) * 8 + (pair * 32 + odd * 4)

    def unpacked_group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
    ) -> list[list[Value]]:
        if not sub_scale:
            return self._pair_sums(codes, activations, num_parts)
        halves = [self._pair_sums(codes, activations, num_parts, half) for half in (0, 1)]
        return self._with_sub_scales(halves, sub_scale)

    def _pair_sums(
        self, codes: Codes, activations: list[Value], num_parts: int, half: int | None = None
    ) -> list[list[Value]]:
        """Sums of a whole group or of a half, (part, token). A last token without a second is its
        own.
        """
        emitter, words = self.emitter, vector(I32, 4)
        seconds = [*activations[1::2], activations[-1]]
        pairs = list(zip(activations[::2], seconds, strict=False))
        # Sums of two rows (low, then high) and two tokens: row, row, in each first, second.
        sums = []
        for pair in pairs:
            first, second = (self._start(address, half) for address in pair)
            sums.append([[emitter.shuffle(first, second, (0, 4, 1, 5))] * 2] * num_parts)
        sums = [[list(of_part) for of_part in of_pair] for of_pair in sums]
        for index in (0, 1) if half is None else (half,):
            for of_pair, addresses in zip(sums, pairs, strict=True):
                loaded = [emitter.load(address + 16 * index, words) for address in addresses]
                for eighth, lanes in enumerate(((0, 1, 4, 5), (2, 3, 6, 7))):
                    x = emitter.shuffle(*loaded, lanes)
                    step = 4 * index + 2 * eighth
                    for part, of_part in enumerate(of_pair):
                        for high in (0, 1):
                            code = codes(step + high, part)
                            of_part[high] = self._multiply("smmla", of_part[high], code, x)
        found: list[list[Value]] = [[] for _ in range(num_parts)]
        for of_pair in sums:
            for tokens, of_part in zip(found, of_pair, strict=True):
                for lanes in ((0, 2, 4, 6), (1, 3, 5, 7)):
                    tokens.append(emitter.shuffle(*of_part, lanes))
        return [tokens[: len(activations)] for tokens in found]
