"""What a measurement was made on: processor, versions, commit, hour and load.

`bench.py` and the scripts in `benchmarks/` put it beside their figures.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

from cyclewise import __version__
from cyclewise.machine.host import cpu_name

_PACKAGES = ("llvmlite", "numpy")


def describe_host() -> dict[str, Any]:
    """Plain values for JSON; what cannot be found out here is None."""
    from cyclewise.machine.kernels.target import host_target

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "target": host_target().name,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {
            "cyclewise": __version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def busy_seconds() -> float | None:
    """Processor time that all processes and the hypervisor have used of this machine's cores.

    Only differences mean anything. None where Linux does not tell.
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def commit() -> str | None:
    """The commit that the package runs from, if it runs from a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
