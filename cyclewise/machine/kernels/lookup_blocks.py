"""Formats whose codes of 4 bits are places in a table of 16 weights, which VPSHUFB looks up.

IQ4_NL and IQ4_XS share ggml's table of signed bytes, closer together near zero. MXFP4 has the
values of a 4-bit float (E2M1), doubled so that they are whole, and a power of two as scale (E8M0):
the microscaling formats of the Open Compute Project (OCP MX v1.0, 2023).
"""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import (
    BlockFormat,
    Group,
    load_bytes,
    load_halves,
    looked_up,
    nibbles,
)
from cyclewise.machine.kernels.lang import F32, Emitter, Value, vector

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class IQ4_NL(BlockFormat):
    """4 words of nibbles a row, 16 float16 scales."""

    name, bits, block_bytes = "IQ4_NL", 8, 288

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        return looked_up(emitter, IQ4_TABLE, nibbles(emitter, block, step, part))

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        return load_halves(emitter, block + 256, part)


class IQ4_XS(BlockFormat):
    """16 float16 d, 8 x 16 signed byte scales, 8 groups of 4 words of nibbles a row."""

    name, bits, groups_per_block, block_bytes = "IQ4_XS", 8, 8, 2208

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        words = block + 160 + group * 256
        return looked_up(emitter, IQ4_TABLE, nibbles(emitter, words, step, part))

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        small = load_bytes(emitter, block + 32 + group * 16, part, "sext")
        return load_halves(emitter, block, part) * emitter.to_float(small)


class MXFP4(BlockFormat):
    """4 words of nibbles a row, 16 bytes of exponents. The codes are read + 16: five bits."""

    name, bits, zero_point, block_bytes = "MXFP4", 5, 16, 272

    def codes(self, emitter: Emitter, block: Value, group: Group, step: int, part: int) -> Value:
        table = [value + self.zero_point for value in MXFP4_TABLE]
        return looked_up(emitter, table, nibbles(emitter, block, step, part))

    def scale(self, emitter: Emitter, block: Value, group: Group, part: int) -> Value:
        """Half of 2^(e - 127), as bits: the first of these where it is a normal number."""
        exponent = load_bytes(emitter, block + 256, part)
        normal, subnormal = (exponent << 23) - (1 << 23), (exponent << 21) + (1 << 21)
        return emitter.bitcast(
            emitter.maximum(normal, subnormal), vector(F32, emitter.target.lanes)
        )
