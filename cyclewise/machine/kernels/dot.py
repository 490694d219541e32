"""Integer dot products of a group: weight codes times activation codes, by what the target can do.

`Dot(emitter, kind).group(...)` gives, for some tokens, the int32 sums over a group of 32 columns of
`(code - zero_point) * activation`, exact in every target, one row a lane.

An activation group of a token takes 60 bytes: 32 int8 codes (-127..127), float32 scale, float32
scale*sum, int32 -8*sum, and sums in int16: -8 * each half's; -16 * those of the columns whose place
in a step is 0 or 1, and 2 or 3, which VPMADDUBSW adds up in a lane; -32 * the same of each half.

A batch of at least QUAD tokens has them four by four: a quad's groups lie side by side, so that a
kernel reaches four tokens from one address. Fewer tokens lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

from cyclewise.machine.kernels.blocks import STEPS, BlockFormat
from cyclewise.machine.kernels.lang import I8, I16, I32, Emitter, Value, vector

ACTIVATION_GROUP = 60
QUAD = 4
AT_SCALE, AT_SCALED_SUM, AT_SUM, AT_HALF_SUMS, AT_LANE_SUMS, AT_HALF_LANE_SUMS = (
    32,
    36,
    40,
    44,
    48,
    52,
)


class ActivationLayout:
    """Where the groups of quantized tokens lie, in a batch of `num_tokens` and `groups` a token."""

    def __init__(self, emitter: Emitter, x: Value, groups: Value, num_tokens: Value) -> None:
        group = emitter.constant(ACTIVATION_GROUP)
        self._x = x
        self._in_quads = num_tokens >= QUAD
        self.group_stride = self._in_quads.select(group * QUAD, group)
        self.token_stride = self._in_quads.select(group, groups * ACTIVATION_GROUP)
        self.quad_stride = groups * (QUAD * ACTIVATION_GROUP)

    def token(self, token: Value) -> Value:
        """The address of a token's first group."""
        quad, place = token >> 2, token & (QUAD - 1)
        return self._x + quad * self.quad_stride + place * self.token_stride


class Dot:
    """The dot products of one format on the emitter's target.

    `codes(step, part)` gives int32 lanes of four codes each; `sub_scale(half, part)` what
    `factor` makes of the scales of Q6_K. The parts of a tile's rows are taken step by step
    together, so that a register of activations serves them all.
    """

    def __init__(self, emitter: Emitter, kind: BlockFormat) -> None:
        self.emitter = emitter
        self.kind = kind
        self.lanes = emitter.target.lanes

    def factor(self, sub_scale: Value) -> Value:
        """int8 scales as int32 lanes, ready for `group`; their low 16 bits are the scale. For
        VPMADDWD they lie in both halves of a lane.
        """
        emitter, words = self.emitter, vector(I32, self.lanes)
        if emitter.target.name != "avx2":
            return emitter.cast(sub_scale, words, "sext")
        twice = [lane for index in range(self.lanes) for lane in (index, index)]
        pairs = emitter.shuffle(sub_scale, sub_scale, twice)
        return emitter.bitcast(emitter.cast(pairs, vector(I16, 2 * self.lanes), "sext"), words)

    def group(
        self,
        codes: Callable[[int, int], Value],
        sub_scale: Callable[[int, int], Value] | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        """int32 sums, for each part one vector a token; `activations` are the addresses of the
        tokens' groups.
        """
        target, parts = self.emitter.target.name, range(num_parts)
        if target == "avx2":
            return self._avx2(codes, sub_scale, activations, parts, in_order)
        write = self._avx512 if target == "avx512" else self._plain

        def of_part(part: int) -> list[Value]:
            scales = (lambda half: sub_scale(half, part)) if sub_scale else None
            return write(lambda step: codes(step, part), scales, activations)

        return [of_part(part) for part in parts]

    def _words(self, address: Value) -> Value:
        return self.emitter.broadcast(address, I32, self.lanes)

    def _zero(self) -> Value:
        return self.emitter.constant(0, vector(I32, self.lanes))

    def _with_sub_scales(
        self, halves: list[list[Value]], sub_scale: Callable[[int], Value]
    ) -> list[Value]:
        scales = [sub_scale(0), sub_scale(1)]
        return [low * scales[0] + high * scales[1] for low, high in zip(*halves, strict=True)]

    def _correction(self, address: Value, zero_point: int) -> Value:
        """-zero_point * sum, from the stored -8 * sum."""
        shift = {8: 0, 16: 1, 32: 2, 128: 4}[zero_point]
        return self._words(address + AT_SUM) << shift

    def _half_correction(self, address: Value, half: int, zero_point: int) -> Value:
        """The same for one half of the group's columns."""
        sums = self.emitter.load(address + AT_HALF_SUMS + 2 * half, I16)
        shift = {32: 2}[zero_point]
        wide = self.emitter.cast(sums, I32, "sext") << shift
        return self.emitter.splat(wide, self.lanes)

    def _avx512(
        self,
        codes: Callable[[int], Value],
        sub_scale: Callable[[int], Value] | None,
        activations: list[Value],
    ) -> list[Value]:
        """VPDPBUSD: unsigned codes times signed activations; signed codes become unsigned by
        adding 128.
        """
        kind = self.kind
        signed = kind.bits == 8
        zero_point = 128 if signed else kind.zero_point
        halves = []
        for steps in ((0, 1, 2, 3), (4, 5, 6, 7)) if sub_scale else (range(STEPS),):
            if sub_scale:
                sums = [self._half_correction(a, steps[0] // 4, zero_point) for a in activations]
            elif zero_point:
                sums = [self._correction(a, zero_point) for a in activations]
            else:
                sums = [self._zero() for _ in activations]
            for step in steps:
                word = codes(step)
                if signed:
                    word = word ^ -0x7F7F7F80
                sums = [
                    self._vpdpbusd(total, word, self._words(address + 4 * step))
                    for total, address in zip(sums, activations, strict=True)
                ]
            halves.append(sums)
        return self._with_sub_scales(halves, sub_scale) if sub_scale else halves[0]

    def _vpdpbusd(self, total: Value, codes: Value, activations: Value) -> Value:
        emitter = self.emitter
        as_bytes = vector(I8, 4 * self.lanes)
        return emitter.intrinsic(
            "llvm.x86.avx512.vpdpbusd.512",
            total.type,
            total,
            emitter.bitcast(codes, as_bytes),
            emitter.bitcast(activations, as_bytes),
        )

    def _avx2(
        self,
        codes: Callable[[int, int], Value],
        sub_scale: Callable[[int, int], Value] | None,
        activations: list[Value],
        parts: range,
        in_order: bool,
    ) -> list[list[Value]]:
        """VPMADDUBSW into int16 for as long as nothing can overflow, then VPMADDWD into int32.

        An int16 holds the sum of 2 columns a step: 8 steps of (code - zero point) * activation for
        4 and 5 bits, 4 steps for 6, and then only the whole sum must fit, not its parts: additions
        wrap. So the zero point's share is where the sum begins. Codes of 8 bits fill an int16 at
        once: their sign moves to the activation, |code| <= 128 leaves 32,512.
        """
        emitter, kind = self.emitter, self.kind
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

    def _plain(
        self,
        codes: Callable[[int], Value],
        sub_scale: Callable[[int], Value] | None,
        activations: list[Value],
    ) -> list[Value]:
        """Byte after byte in int32 lanes."""
        emitter, kind = self.emitter, self.kind
        halves: list[list[Value]] = []
        words = vector(I32, self.lanes)
        for steps in ((0, 1, 2, 3), (4, 5, 6, 7)) if sub_scale else (range(STEPS),):
            sums = [self._zero() for _ in activations]
            for step in steps:
                word = codes(step)
                for byte in range(4):
                    if kind.bits == 8:
                        code = emitter.cast(
                            emitter.cast(word >> (8 * byte), vector(I8, self.lanes), "trunc"),
                            words,
                            "sext",
                        )
                    else:
                        code = ((word >> (8 * byte)) & 0xFF) - kind.zero_point
                    for i, address in enumerate(activations):
                        x = emitter.cast(emitter.load(address + 4 * step + byte, I8), I32, "sext")
                        sums[i] = sums[i] + code * emitter.splat(x, self.lanes)
            halves.append(sums)
        return self._with_sub_scales(halves, sub_scale) if sub_scale else halves[0]
