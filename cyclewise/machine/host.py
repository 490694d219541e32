"""What computer this is, without asking it for anything slow: the processor's name, how many of
its CPUs this process may use, and what memory it would like.

The machine counts its threads by it, the profile is keyed by it, and measurements put it beside
their figures.
"""

from __future__ import annotations

import mmap
import os
import platform
from contextlib import suppress
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_CPUINFO_BYTES = 4096
"""The first CPU's entry is in here; the kernel takes milliseconds to write those of a hundred."""


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut by a cgroup quota."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    group = Path("/sys/fs/cgroup")
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu" / "cpu.cfs_period_us").read_text()
        if int(quota) > 0:
            count = min(count, round(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no quota: "max", or no cgroup at all
    return max(1, count)


def cpu_name() -> str:
    """The processor's own name for itself, with family and model where Linux tells them."""
    try:
        with _CPUINFO.open("rb", buffering=0) as file:
            text = file.read(_CPUINFO_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def advise(memory: mmap.mmap, *advice: str) -> None:
    """Tells the operating system how memory will be used (`"MADV_HUGEPAGE"`), where it knows."""
    for name in advice:
        if hasattr(mmap, name):
            with suppress(OSError):  # a kernel that was built without it
                memory.madvise(getattr(mmap, name))
