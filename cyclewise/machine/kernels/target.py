"""What this processor can do: the one file that asks.

`host_target()` takes the first of `host_targets()`, the instruction sets that kernels are written
for and that this processor has. `CYCLEWISE_TARGET` names another of them, for tests and for
comparing; one that the processor cannot run is an error.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache

from cyclewise.errors import InvalidParameterError

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
"""What this computer is."""


@dataclass(frozen=True, slots=True)
class Target:
    """A processor to compile for."""

    name: str
    """A key of `INSTRUCTION_SETS`."""
    cpu: str
    """LLVM's name of the processor."""
    features: str
    """LLVM's feature string."""
    lanes: int
    """float32 lanes that a matrix kernel keeps in one register."""
    token_tiles: tuple[int, ...]
    """How many tokens a matrix kernel takes at once, largest first; the last is 1."""

    @property
    def has_f16(self) -> bool:
        return self.name != "plain"

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bfloat16 (VDPBF16PS)."""
        return self.name == "avx512" and "+avx512bf16" in self.features.split(",")

    @property
    def keeps_order(self) -> bool:
        """Whether instructions stay in the order in which a kernel writes them. LLVM's schedulers
        balance sums that are long enough for 16 registers already, and spill them.
        """
        return self.name == "avx2"

    @property
    def is_x86(self) -> bool:
        return IS_X86 if self.name == "plain" else self.name in X86_SETS

    @property
    def is_arm(self) -> bool:
        return IS_ARM if self.name == "plain" else self.name in ARM_SETS

    @property
    def triple(self) -> str:
        """LLVM's name of another architecture than this computer's; otherwise empty."""
        if self.is_x86 and not IS_X86:
            return "x86_64-unknown-linux-gnu"
        return "aarch64-unknown-linux-gnu" if self.is_arm and not IS_ARM else ""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What all targets of a name share."""

    needs: tuple[str, ...]
    """LLVM's names of the features that its kernels use."""
    least_cpu: str
    """A processor that every one with those features can stand in for."""
    lanes: int
    token_tiles: tuple[int, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")

X86_SETS = {
    # VPDPBUSD on 512 bits.
    "avx512": InstructionSet(_AVX512, "cascadelake", 16, (12, 8, 4, 2, 1)),
    # VPDPBUSD on 256 bits, in the encoding of processors without AVX-512.
    "avxvnni": InstructionSet((*_AVX2, "avxvnni"), "x86-64-v3", 8, (4, 2, 1)),
    # VPMADDUBSW on 256 bits.
    "avx2": InstructionSet(_AVX2, "x86-64-v3", 8, (4, 2, 1)),
}
ARM_SETS = {
    # SMMLA where weights are unpacked, else SDOT.
    "neon_i8mm": InstructionSet(("dotprod", "i8mm"), "generic", 4, (4, 2, 1)),
    # SDOT on 128 bits.
    "neon_dot": InstructionSet(("dotprod",), "generic", 4, (4, 2, 1)),
}
INSTRUCTION_SETS = {
    **X86_SETS,
    **ARM_SETS,
    # What LLVM makes of vectors, on any processor.
    "plain": InstructionSet((), "x86-64" if IS_X86 else "generic", 16, (4, 2, 1)),
}
"""The best of an architecture first."""

_ARM_FLAGS = {"dotprod": (16, 20), "i8mm": (26, 13), "bf16": (26, 14)}
"""LLVM's name: the number of Linux's auxiliary value (AT_HWCAP, AT_HWCAP2) and the bit in it."""


def _host_features() -> dict[str, bool]:
    """LLVM's names of features, and whether this processor has them."""
    from llvmlite import binding

    features = dict(binding.get_host_cpu_features())
    if IS_ARM and sys.platform == "linux":
        # LLVM reads a text that not every kernel and emulator writes; the flags are always there.
        auxiliary = ctypes.CDLL(None).getauxval
        auxiliary.restype, auxiliary.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        for name, (number, bit) in _ARM_FLAGS.items():
            features[name] = bool(auxiliary(number) >> bit & 1)
    return features


def host_targets() -> list[str]:
    """The instruction sets of this processor, the best first."""
    features = _host_features()
    known = X86_SETS if IS_X86 else ARM_SETS if IS_ARM else {}
    able = [
        name for name, found in known.items() if all(features.get(need) for need in found.needs)
    ]
    return [*able, "plain"]


@cache
def host_target() -> Target:
    """The best target of this processor, or the one that `CYCLEWISE_TARGET` names."""
    wanted = os.environ.get("CYCLEWISE_TARGET", "")
    if wanted and wanted not in INSTRUCTION_SETS:
        raise InvalidParameterError(
            f"CYCLEWISE_TARGET is {wanted!r}; it can be {', '.join(INSTRUCTION_SETS)}, or left out."
        )
    from llvmlite import binding

    able, cpu = host_targets(), binding.get_host_cpu_name()
    name = wanted or able[0]
    if name not in able:
        raise InvalidParameterError(
            f"CYCLEWISE_TARGET is {wanted}, which this processor ({cpu}) cannot run; "
            f"it can run {', '.join(able)}."
        )
    if name == able[0] and name != "plain":
        flags = (f"{'+' if has else '-'}{name}" for name, has in _host_features().items())
        return make_target(name, cpu, ",".join(flags))
    return make_target(name)


def make_target(name: str, cpu: str = "", features: str = "") -> Target:
    """A target by name; without a processor, the least one that has its instructions."""
    found = INSTRUCTION_SETS[name]
    if not cpu:
        cpu, features = found.least_cpu, ",".join(f"+{need}" for need in found.needs)
    return Target(name, cpu, features, found.lanes, found.token_tiles)
