"""Reading the processor's counters, and the chain of adds that tells core cycles from ticks.

`read_ticks` and `stamp` read the time counter as the clocked loop does. `chain` has the signature
of a moment's kernel, so that a machine can run it on each of its threads. `read_pmc` reads a
performance counter without a system call, by the protocol of `struct perf_event_mmap_page` in
Linux's `perf_event.h`.
"""

from __future__ import annotations

from collections.abc import Callable

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import I16, I32, I64, VOID, Emitter, Value
from cyclewise.machine.kernels.layout import CHAIN, THREAD, Record

BLOCK_ADDS = 128
"""Adds of a block of a chain."""
CHAIN_BYTES = 16
"""What a tile of `chain` leaves in a thread's scratch."""

PAGE_LOCK, PAGE_INDEX, PAGE_OFFSET, PAGE_CAPABILITIES, PAGE_WIDTH = 8, 12, 16, 40, 48
"""Where the fields of a `perf_event_mmap_page` lie: 32, 32, 64, 64 and 16 bits."""
CAN_READ = 1 << 2
"""The capability that allows `rdpmc`."""


def _fence(emitter: Emitter) -> None:
    """No instruction behind it starts before all before it have ended."""
    if emitter.target.is_x86:
        emitter.hint("llvm.x86.sse2.lfence")
    elif emitter.target.is_arm:
        emitter.intrinsic("llvm.aarch64.isb", VOID, emitter.constant(15, I32))


def _chain(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    """Chains of adds, each of which needs the one before. A tile is one chain, of a block at least;
    it leaves two int64 in the thread's scratch: the ticks of the reads alone, and those with the
    chain between them.

    Fibonacci's numbers: register to register, and no closed form that LLVM would know.
    """
    m, t = Record(emitter, moment, CHAIN), Record(emitter, thread, THREAD)
    x, y = emitter.variable(m.seed), emitter.variable(last)
    blocks = m.blocks

    def add() -> None:
        left = emitter.variable(blocks)
        with emitter.loop() as leave_if:
            for _ in range(BLOCK_ADDS // 2):
                x.add(y.get())
                y.add(x.get())
            left.add(-1)
            leave_if(left.get().equals(0))

    with emitter.range(first, last) as tile:
        for at, work in ((0, None), (8, add)):
            out = t.scratch + tile * CHAIN_BYTES + at
            _fence(emitter)
            start = emitter.read_counter()
            if work:
                work()
            # No store passes the fence: the sum is there before the second read.
            emitter.store(out, y.get(), align=8)
            _fence(emitter)
            emitter.store(out, emitter.read_counter() - start, align=8)


def _stamp(emitter: Emitter, out: Value, count: Value) -> None:
    """`count` stamps, as the loop writes them; int64 (count, 2)."""
    with emitter.range(0, count) as index:
        emitter.store(out + index * 16, emitter.read_counter(), align=8)


def probes_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        emitter.function(
            "read_ticks", 1, lambda out: emitter.store(out, emitter.read_counter(), align=8)
        )
        emitter.function("stamp", 2, lambda *a: _stamp(emitter, *a))
        emitter.function("chain", 5, lambda *a: _chain(emitter, *a))

    return Unit("probes", write, ("read_ticks", "stamp", "chain"))


ReadRegister = Callable[[Emitter, Value], Value]
"""Emits the read of the performance counter of that number (int32); int64."""


def _rdpmc(emitter: Emitter, number: Value) -> Value:
    return emitter.intrinsic("llvm.x86.rdpmc", I64, number)


def _read_pmc(emitter: Emitter, page: Value, out: Value, read_register: ReadRegister) -> None:
    """The count to `out`, and behind it whether it could be read here.

    The kernel increments the lock before and after it changes the page.
    """
    with emitter.loop() as leave_if:
        lock = emitter.atomic_load(page + PAGE_LOCK, I32)
        index = emitter.atomic_load(page + PAGE_INDEX, I32)
        able = emitter.load(page + PAGE_CAPABILITIES) & CAN_READ
        emitter.store(out + 8, emitter.constant(0), align=8)
        with emitter.when(index.differs(0)), emitter.when(able.differs(0)):
            spare = 64 - emitter.cast(emitter.load(page + PAGE_WIDTH, I16), I64, "zext")
            narrow = (read_register(emitter, index - 1) << spare) >> spare
            sign = emitter.constant(-(1 << 63)) >> spare
            # Two's complement of the counter's width.
            count = emitter.load(page + PAGE_OFFSET) + ((narrow ^ sign) - sign)
            emitter.store(out, count, align=8)
            emitter.store(out + 8, emitter.constant(1), align=8)
        leave_if(emitter.atomic_load(page + PAGE_LOCK, I32).equals(lock))


def pmc_unit(read_register: ReadRegister = _rdpmc) -> Unit:
    """x86-64 only. The tests read registers of their own."""

    def write(emitter: Emitter) -> None:
        emitter.function("read_pmc", 2, lambda *a: _read_pmc(emitter, *a, read_register))

    return Unit("pmc", write, ("read_pmc",))
