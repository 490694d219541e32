"""What this processor can do: the one file that asks.

`host_target()` chooses among three instruction sets. `CYCLEWISE_TARGET` (`avx512`, `avx2`,
`plain`) restricts the choice, for tests and for comparing; a restriction that the processor
cannot meet is an error.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

from cyclewise.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class Target:
    """A processor to compile for."""

    name: str
    """`avx512` (VPDPBUSD on 512 bits), `avx2` (VPMADDUBSW on 256), or `plain` (what LLVM makes of
    vectors).
    """
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


AVX512_FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
AVX2_FEATURES = ("avx2", "fma", "f16c")


@cache
def host_target() -> Target:
    """The best target of this processor, or the one that `CYCLEWISE_TARGET` names."""
    wanted = os.environ.get("CYCLEWISE_TARGET", "")
    if wanted not in ("", "avx512", "avx2", "plain"):
        raise InvalidParameterError(
            f"CYCLEWISE_TARGET is {wanted!r}; it can be avx512, avx2, plain, or left out."
        )
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    cpu = binding.get_host_cpu_name()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    able = ["plain"]
    if x86 and all(features.get(name) for name in AVX2_FEATURES):
        able.insert(0, "avx2")
        if all(features.get(name) for name in AVX512_FEATURES):
            able.insert(0, "avx512")
    name = wanted or able[0]
    if name not in able:
        raise InvalidParameterError(
            f"CYCLEWISE_TARGET is {wanted}, which this processor ({cpu}) cannot run; "
            f"it can run {', '.join(able)}."
        )
    if name == able[0] and name != "plain":
        return make_target(name, cpu, features.flatten())
    return make_target(name)


def make_target(name: str, cpu: str = "", features: str = "") -> Target:
    """A target by name; without a processor, the least one that has its instructions."""
    if name == "avx512":
        return Target(name, cpu or "cascadelake", features, 16, (12, 8, 4, 2, 1))
    if name == "avx2":
        return Target(name, cpu or "x86-64-v3", features, 8, (4, 2, 1))
    generic = "x86-64" if platform.machine().lower() in ("x86_64", "amd64") else "generic"
    return Target("plain", cpu or generic, features, 16, (4, 2, 1))
