"""Integer dot products of a group: weight codes times activation codes, by what the target can do.

`Dot.group(...)` gives, for some tokens, the int32 sums over a group of 32 columns of
`(code - zero_point) * activation`, exact in every target, one row a lane. Each family of
instructions has a writer in a file of its own (`dot_vnni.py`, `dot_avx2.py`, `dot_neon.py`,
`dot_plain.py`); `dots.py` chooses.

An activation group of a token takes 60 bytes: 32 int8 codes (-127..127), float32 scale, float32
scale*sum, int32 -8*sum, and sums in int16: -8 * each half's; -16 * those of the columns whose place
in a step is 0 or 1, and 2 or 3, which VPMADDUBSW adds up in a lane; -32 * the same of each half.

A batch of at least QUAD tokens has them four by four: a quad's groups lie side by side, so that a
kernel reaches four tokens from one address. Fewer tokens lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

from cyclewise.machine.kernels.block_format import BlockFormat
from cyclewise.machine.kernels.lang import I16, I32, Emitter, Value, vector

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

HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))
"""The steps of each half of a group."""

Codes = Callable[[int, int], Value]
"""Of a step and a part: int32 lanes of four codes each."""
SubScale = Callable[[int, int], Value]
"""Of a number and a part: one of the values that `Dot.factors` makes of the scales of a format that
has some for each half of a group.
"""


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

    The parts of a tile's rows are taken step by step together, so that a register of activations
    serves them all.
    """

    rearranges = False
    """Whether `arranged` changes the order of codes."""

    def __init__(self, emitter: Emitter, kind: BlockFormat) -> None:
        self.emitter = emitter
        self.kind = kind
        self.lanes = emitter.target.lanes

    @property
    def num_factors(self) -> int:
        """How many values `factors` gives: one for each half of a group, or the pairs as they
        are.
        """
        return 2

    def factors(self, pairs: Value) -> list[Value]:
        """Lanes of two int16 scales, ready for `group`; the low 16 bits of each half's value are
        its scale.
        """
        return [(pairs << 16).arithmetic_right(16), pairs.arithmetic_right(16)]

    def pair_sums(self, pairs: Value, address: Value) -> Value:
        """Lanes of two int16 by the two int16 at `address`, added up in int32."""
        halves = [
            self.emitter.splat(
                self.emitter.cast(self.emitter.load(address + 2 * half, I16), I32, "sext"),
                self.lanes,
            )
            for half in (0, 1)
        ]
        low, high = Dot.factors(self, pairs)
        return low * halves[0] + high * halves[1]

    def group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
        in_order: bool = False,
    ) -> list[list[Value]]:
        """int32 sums, for each part one vector a token.

        `activations` are the addresses of the tokens' groups. `in_order` keeps loads in the order
        of the steps.
        """
        raise NotImplementedError

    def arranged(self, codes: list[Value]) -> list[Value]:
        """The codes of a part's eight steps, in the order in which unpacked weights hold them."""
        return codes

    def place(self, lane: Value, step: int) -> Value:
        """Where the four codes of a row and a step lie, in bytes, in what `arranged` gave."""
        return lane * 4 + step * (self.lanes * 4)

    def unpacked_group(
        self,
        codes: Codes,
        sub_scale: SubScale | None,
        activations: list[Value],
        num_parts: int = 1,
    ) -> list[list[Value]]:
        """`group` of codes that `arranged` gave, numbered as there."""
        return self.group(codes, sub_scale, activations, num_parts)

    def _words(self, address: Value) -> Value:
        return self.emitter.broadcast(address, I32, self.lanes)

    def _zero(self) -> Value:
        return self.emitter.constant(0, vector(I32, self.lanes))

    @staticmethod
    def _with_sub_scales(halves: list[list[list[Value]]], sub_scale: SubScale) -> list[list[Value]]:
        """The sums of both halves of a group, each (part, token), by their scales."""
        found = []
        for part, sums in enumerate(zip(*halves, strict=True)):
            scales = [sub_scale(half, part) for half in (0, 1)]
            pairs = zip(*sums, strict=True)
            found.append([low * scales[0] + high * scales[1] for low, high in pairs])
        return found

    def _correction(self, address: Value, zero_point: int) -> Value:
        """-zero_point * sum, from the stored -8 * sum."""
        shift = {8: 0, 16: 1, 32: 2, 128: 4}[zero_point]
        return self._words(address + AT_SUM) << shift

    def _half_correction(self, address: Value, half: int, zero_point: int) -> Value:
        """The same for one half of the group's columns."""
        sums = self.emitter.load(address + AT_HALF_SUMS + 2 * half, I16)
        wide = self.emitter.cast(sums, I32, "sext") * zero_point
        return self.emitter.splat(wide.arithmetic_right(3), self.lanes)
