"""The processor's own counters, through Linux's `perf_event_open`: one group for each thread.

A group counts core cycles, instructions and last-level cache misses of one thread, from outside:
what runs there need not know. The counter (`counter.py`) takes core cycles from here where it can;
the report adds instructions per cycle and misses for a whole window. Structures and numbers are
those of `linux/perf_event.h` and perf_event_open(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cyclewise.errors import ClockError
from cyclewise.machine.kernels.compiler import callable_at, host_compiler
from cyclewise.machine.kernels.probes import pmc_unit
from cyclewise.machine.kernels.target import IS_X86

HARDWARE, SOFTWARE = 0, 1
Event = tuple[int, int]
"""A kind of event and its number there."""
CYCLES: Event = (HARDWARE, 0)
INSTRUCTIONS: Event = (HARDWARE, 1)
CACHE_MISSES: Event = (HARDWARE, 3)
EVENTS = (CYCLES, INSTRUCTIONS, CACHE_MISSES)

_SYSCALL = {"x86_64": 298, "aarch64": 241}.get(platform.machine())
_ATTRIBUTE_BYTES = 64  # the structure's first version, which every kernel knows
_TIMES_AND_GROUP = 1 | 2 | 8  # read_format: time enabled, time running, all of the group at once
_DISABLED, _EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
_ENABLE, _WHOLE_GROUP = 0x2400, 1
_CLOSE_ON_EXEC = 8
_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
USER_ONLY = (
    "Cycles inside the kernel are not counted; `sysctl kernel.perf_event_paranoid=1`, or "
    "CAP_PERFMON, would count them."
)


@dataclass(frozen=True, slots=True)
class Counts:
    """What a thread did since its group was opened, or between two reads."""

    cycles: int
    instructions: int | None
    """None, like misses: this machine does not count them."""
    cache_misses: int | None
    """Of the last level."""
    seconds_enabled: float
    """That the thread ran on a core."""
    seconds_running: float
    """That it ran and was counted. The counts above are scaled where this is less."""
    user_only: bool
    """The time is the kernel's too, but cycles inside the kernel are not counted."""

    @property
    def hertz(self) -> float:
        """Core cycles a second while the thread ran; too low where `user_only`."""
        return self.cycles / self.seconds_enabled

    def since(self, earlier: Counts) -> Counts:
        """What came after an earlier read of the same group."""

        def left(mine: int | None, its: int | None) -> int | None:
            return None if mine is None or its is None else mine - its

        return Counts(
            self.cycles - earlier.cycles, left(self.instructions, earlier.instructions),
            left(self.cache_misses, earlier.cache_misses),
            self.seconds_enabled - earlier.seconds_enabled,
            self.seconds_running - earlier.seconds_running, self.user_only,
        )  # fmt: skip


def attribute(event: Event, *, user_only: bool, leads: bool) -> bytes:
    """`struct perf_event_attr`; a leader starts disabled and takes its group with it."""
    flags = _EXCLUDE_HYPERVISOR
    flags |= _EXCLUDE_KERNEL if user_only else 0
    flags |= _DISABLED if leads else 0
    kind, number = event
    fields = (kind, _ATTRIBUTE_BYTES, number, 0, 0, _TIMES_AND_GROUP, flags)
    return struct.pack("=IIQQQQQ", *fields).ljust(_ATTRIBUTE_BYTES, b"\0")


def refusal(code: int, paranoid: int | None) -> str:
    """Why `perf_event_open` failed, and what would allow it."""
    if code in (errno.EACCES, errno.EPERM):
        if paranoid is not None and paranoid > 2:
            return (
                f"No cycle counts: kernel.perf_event_paranoid is {paranoid}; "
                "`sysctl kernel.perf_event_paranoid=2`, or CAP_PERFMON, would allow them."
            )
        return (
            "No cycle counts: this process may not call perf_event_open; CAP_PERFMON would allow "
            "it, and in a container a seccomp profile that lets the call through."
        )
    if code in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return (
            "No cycle counts: the processor's counters are not there, as in most virtual machines; "
            "a host that passes them on, or the bare machine, would have them."
        )
    if code == errno.ENOSYS:
        return (
            "No cycle counts: there is no perf_event_open here; a Linux kernel with "
            "CONFIG_PERF_EVENTS has it, outside a sandbox that hides it."
        )
    if code in (errno.EMFILE, errno.ENFILE):
        return "No cycle counts: too many files are open; `ulimit -n` would allow more."
    return f"No cycle counts: perf_event_open failed ({os.strerror(code)})."


def scaled(data: bytes, events: Sequence[Event], user_only: bool) -> Counts:
    """Counts from what read(2) gives of a group.

    A group that shared the hardware with others was counted for part of the time only: its counts
    are scaled to the whole. Raises ClockError if it never had the hardware.
    """
    count, enabled, running, *counted = struct.unpack(f"={len(data) // 8}Q", data)
    assert count == len(events) == len(counted)
    if enabled and not running:
        raise ClockError(
            "No cycle counts: others held the processor's counters all the time; "
            "end what else uses them, such as perf or the kernel's NMI watchdog."
        )
    factor = enabled / running if running else 1.0
    found = {event: round(value * factor) for event, value in zip(events, counted, strict=True)}
    return Counts(
        found[events[0]], found.get(INSTRUCTIONS), found.get(CACHE_MISSES),
        enabled / 1e9, running / 1e9, user_only,
    )  # fmt: skip


class Group:
    """Counters of one thread; they run from when they are opened until they are closed."""

    def __init__(self, thread_id: int, events: Sequence[Event] = EVENTS) -> None:
        """`thread_id`: the operating system's. The first event must be there, others may not be."""
        self.thread_id = thread_id
        self.user_only = False
        self._events = [events[0]]
        self._files: list[int] = []
        self._page: NDArray[np.uint8] | None = None
        try:
            try:
                self._files = [_open(events[0], thread_id, -1, False)]
            except PermissionError:
                self.user_only = True
                self._files = [_open(events[0], thread_id, -1, True)]
            for event in events[1:]:
                with suppress(OSError):
                    self._files.append(_open(event, thread_id, self._files[0], self.user_only))
                    self._events.append(event)
            _enable(self._files[0])
        except OSError as error:
            self.close()
            raise ClockError(refusal(error.errno or 0, _paranoid())) from None
        if IS_X86 and thread_id == threading.get_native_id():
            with suppress(OSError):
                page = mmap.mmap(self._files[0], mmap.PAGESIZE, prot=mmap.PROT_READ)
                self._page = np.frombuffer(page, np.uint8)

    def read(self) -> Counts:
        """What the thread did since the group was opened."""
        return scaled(
            os.read(self._files[0], 8 * (3 + len(self._files))), self._events, self.user_only
        )

    def cycles(self) -> int:
        """Core cycles so far, not scaled: without a system call where the caller is the group's own
        thread and the kernel allows it.
        """
        if self._page is not None and threading.get_native_id() == self.thread_id:
            found = read_page(self._page)
            if found is not None:
                return found
        data = os.read(self._files[0], 8 * (3 + len(self._files)))
        return int(struct.unpack_from("=Q", data, 24)[0])

    def close(self) -> None:
        """Ends the counting."""
        self._page = None
        while self._files:
            os.close(self._files.pop())


def open_groups(thread_ids: Iterable[int]) -> list[Group]:
    """A group for each of these threads of this process.

    Raises ClockError, which says what would allow it.
    """
    groups: list[Group] = []
    try:
        for thread_id in thread_ids:
            groups.append(Group(thread_id))
    except ClockError:
        close_groups(groups)
        raise
    return groups


def close_groups(groups: Iterable[Group]) -> None:
    for group in groups:
        group.close()


def read_page(page: NDArray[np.uint8]) -> int | None:
    """The count of a `perf_event_mmap_page`, read from user space; None where that is not possible
    just now.
    """
    compiler = host_compiler()
    compiler.load([pmc_unit()])
    out = np.zeros(2, np.int64)
    callable_at(compiler.address("read_pmc"), 2)(page.ctypes.data, out.ctypes.data)
    return int(out[0]) if out[1] else None


def _open(event: Event, thread_id: int, group: int, user_only: bool) -> int:
    if sys.platform != "linux" or _SYSCALL is None:
        raise OSError(errno.ENOSYS, "perf_event_open is Linux's")
    library = ctypes.CDLL(None, use_errno=True)
    data = attribute(event, user_only=user_only, leads=group < 0)
    buffer = ctypes.create_string_buffer(data, len(data))
    numbers = [ctypes.c_long(n) for n in (thread_id, -1, group, _CLOSE_ON_EXEC)]
    file = int(library.syscall(ctypes.c_long(_SYSCALL), buffer, *numbers))
    if file < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return file


def _enable(file: int) -> None:
    from fcntl import ioctl  # Windows has none, and never comes here

    ioctl(file, _ENABLE, _WHOLE_GROUP)


def _paranoid() -> int | None:
    try:
        return int(_PARANOID.read_text())
    except (OSError, ValueError):
        return None
