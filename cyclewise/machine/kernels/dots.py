"""Which dot product a target has."""

from __future__ import annotations

from cyclewise.machine.kernels.block_format import BlockFormat
from cyclewise.machine.kernels.dot import Dot
from cyclewise.machine.kernels.dot_avx2 import Avx2Dot
from cyclewise.machine.kernels.dot_neon import SdotDot, SmmlaDot
from cyclewise.machine.kernels.dot_plain import PlainDot
from cyclewise.machine.kernels.dot_vnni import VnniDot
from cyclewise.machine.kernels.lang import Emitter

_WRITERS: dict[str, type[Dot]] = {
    "avx512": VnniDot,
    "avxvnni": VnniDot,
    "avx2": Avx2Dot,
    "neon_i8mm": SmmlaDot,
    "neon_dot": SdotDot,
    "plain": PlainDot,
}


def make_dot(emitter: Emitter, kind: BlockFormat) -> Dot:
    """The dot products of a format, on the emitter's target."""
    return _WRITERS[emitter.target.name](emitter, kind)
