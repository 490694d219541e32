"""Kernels on an emulated x86 processor: a pytest plugin, which `tests/x86.sh` sets up.

Bochs' processor is a library here (`bochscpu`). Its memory is this process's own, page by page and
at the same addresses, so a kernel is called with the addresses that it would be called with
anyway: every function that `callable_at` gives starts the emulated processor at its first
instruction and runs until it returns. There is one such processor and no operating system in it:
models run on one thread. `EMULATED` names one of PROCESSORS.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cyclewise.machine.kernels import target

PROCESSORS = {
    "skylake-avx512": ("avx2", 26, ""),  # no VNNI
    "cascadelake": ("avx512", 28, ""),
    "icelake-server": ("avx512", 28, ""),
    "sapphirerapids": ("avx512", 30, "+avx512bf16"),
    "znver4": ("avx512", 30, "+avx512bf16"),
    "alderlake": ("avxvnni", 31, ""),
    "arrowlake": ("avxvnni", 31, ""),
}
"""LLVM's name of a processor: the target, Bochs' number of one that has all its instructions
(26 Skylake-X, 28 Ice Lake, 30 Sapphire Rapids, 31 Arrow Lake), and features beyond the target's.
"""

PAGE, GIB = 1 << 12, 1 << 30
STACK = 1 << 23
PRESENT, LARGE = 0x7, 0xE7
"""Of an entry of the page tables: writable; one that maps a gibibyte by itself, already used."""
SEGMENT = {"cs": (8, 0xA09B), "ss": (16, 0xC093), "ds": (16, 0xC093), "es": (16, 0xC093)}
"""Selectors and attributes of long mode."""
CR0, CR4, XCR0, MXCSR = 0x80010033, 0x50620, 0xE7, 0x1F80
"""64 bits with paging; AVX-512's registers are enabled; every exception of floats is masked."""


class Processor:
    """One of Bochs' models, and functions of this process that are called on it."""

    def __init__(self, model: int) -> None:
        import bochscpu.cpu
        import bochscpu.memory

        self._bochs = bochscpu
        self._library = ctypes.CDLL(sys.modules["bochscpu._bochscpu"].__file__)
        self._choose(model)
        # Room for a table of 512 GiB each.
        self._tables = mmap.mmap(-1, 513 * PAGE)
        self._tables_at = ctypes.addressof(ctypes.c_char.from_buffer(self._tables))
        self._places: dict[int, int] = {}
        """Where in the processor's physical memory, of 1 TiB, each gibibyte of ours lies."""
        self._tops: dict[int, int] = {}
        self._mapped: set[int] = set()
        self._stack = mmap.mmap(-1, STACK)
        self._stack_end = ctypes.addressof(ctypes.c_char.from_buffer(self._stack)) + STACK - 64
        # Functions return to an instruction that halts.
        self._halt = ctypes.create_string_buffer(b"\xf4")
        self._session = bochscpu.Session()
        self._session.missing_page_handler = self._insert
        self._hook = bochscpu.Hook()
        self._hook.hlt = self._on_halt
        self._hook.exception = self._on_exception
        self._end = ""

    def _choose(self, model: int) -> None:
        """Bochs reads the number when the first session begins."""
        get = self._library._ZN13bx_real_sim_c14get_param_enumEPKcP10bx_param_c
        get.restype = ctypes.c_void_p
        get.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        parameter = ctypes.c_void_p(get(None, b"cpu.model", None))
        # The list of names is shorter than that of models.
        self._library._ZN14bx_param_num_c9set_rangeEmm(
            parameter, ctypes.c_uint64(0), ctypes.c_uint64(model)
        )
        self._library._ZN14bx_param_num_c3setEl(parameter, ctypes.c_int64(model))

    def call(self, address: int, *arguments: int) -> None:
        """Runs a function of integers."""
        self._map()
        state = self._state()
        for name, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False):
            setattr(state, name, value & (1 << 64) - 1)
        others = arguments[6:]
        stack = (self._stack_end & -64) - 16 * ((len(others) + 1) // 2) - 8
        words = (ctypes.c_int64 * (1 + len(others))).from_address(stack)
        words[:] = [ctypes.addressof(self._halt), *others]
        state.rsp, state.rip = stack, address
        self._session.cpu.state = state
        self._end = ""
        self._session.run([self._hook])
        assert self._end == "returned", self._end

    def forget_code(self) -> None:
        """Must be called when code may lie where other code lay."""
        self._library._Z12flushICachesv()

    def _map(self) -> None:
        with open("/proc/self/maps") as file:
            for line in file:
                first, last = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
                if last < 1 << 47:
                    for gibibyte in range(first // GIB, (last - 1) // GIB + 1):
                        if gibibyte not in self._mapped:
                            self._mapped.add(gibibyte)
                            self._map_gibibyte(gibibyte)

    def _map_gibibyte(self, gibibyte: int) -> None:
        top, entry = divmod(gibibyte, 512)
        if top not in self._tops:
            table = self._tops[top] = self._tables_at + (len(self._tops) + 1) * PAGE
            self._write(self._tables_at, top, self._physical(table) | PRESENT)
        self._write(self._tops[top], entry, self._physical(gibibyte * GIB) | LARGE)

    @staticmethod
    def _write(table: int, entry: int, value: int) -> None:
        ctypes.c_uint64.from_address(table + 8 * entry).value = value

    def _physical(self, address: int) -> int:
        gibibyte, offset = divmod(address, GIB)
        return self._places.setdefault(gibibyte, len(self._places)) * GIB + offset

    def _insert(self, physical: int) -> None:
        """Shows the processor a page of this process."""
        place, offset = divmod(physical & -PAGE, GIB)
        gibibyte = list(self._places)[place]
        self._bochs.memory.page_insert(physical & -PAGE, gibibyte * GIB + offset)

    def _state(self) -> Any:
        state = self._bochs.State()
        self._bochs.cpu.set_long_mode(state)
        state.cr0, state.cr4, state.xcr0, state.mxcsr = CR0, CR4, XCR0, MXCSR
        state.cr3, state.rflags = self._physical(self._tables_at), 2
        for name, (selector, attributes) in SEGMENT.items():
            segment = self._bochs.Segment()
            segment.limit, segment.selector = 0xFFFFFFFF, selector
            segment.present, segment.attr = True, attributes
            setattr(state, name, segment)
        return state

    def _on_halt(self, session: Any, _: int) -> None:
        self._end = "returned"
        session.stop()

    def _on_exception(self, session: Any, _: int, vector: int, error: int) -> None:
        at, accessed = session.cpu.rip, session.cpu.cr2
        self._end = f"exception {vector}, {error} at {at:#x}, the last address was {accessed:#x}"
        session.stop()


name, model, features = PROCESSORS[os.environ["EMULATED"]]
needs = ",".join(f"+{need}" for need in target.INSTRUCTION_SETS[name].needs)
emulated = target.make_target(name, os.environ["EMULATED"], f"{needs},{features}".rstrip(","))
processor = Processor(model)

# Before any module takes it by name.
target.host_target = lambda: emulated

from cyclewise.machine.kernels import compiler  # noqa: E402


def callable_at(address: int, num_arguments: int) -> Callable[..., None]:
    def call(*arguments: int) -> None:
        assert len(arguments) == num_arguments
        processor.call(address, *(int(argument) for argument in arguments))

    return call


def link(self: compiler.Compiler, unit: compiler.Unit, data: bytes) -> None:
    processor.forget_code()
    link_natively(self, unit, data)


link_natively, compiler.Compiler._link = compiler.Compiler._link, link
compiler.callable_at = callable_at

from cyclewise.machine import machine  # noqa: E402

machine.resolve_threads = lambda _: 1


STATUS = pytest.StashKey[int]()


def pytest_report_header() -> str:
    return f"emulated: {emulated.name} for {emulated.cpu}"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The library does not survive the interpreter's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash.get(STATUS, 1))
