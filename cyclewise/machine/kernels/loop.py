"""The loop that executes a program, and the threads' life around it.

`execute(shared, epoch, thread)` walks the moments of a step. Threads claim tiles from counters,
their own share first, then the others', and a moment is over when its tiles are done, not when
its threads have arrived: a thread that the operating system has put to sleep holds nobody up. A
counter is one word, `epoch << 32 | next`; a claim is a compare-and-swap that carries the step's
epoch, so that a thread which slept through steps finds nothing to claim, and nobody has to reset
a counter. A *replicated* moment is one that every thread computes for itself, because that costs
less than handing it over.

`work(shared, thread)` is a helper thread's life: wait for a new epoch, execute it, again; it
returns when the epoch's word becomes `STOP`. Waiting spins, then parks: a thread that only yields
keeps its core from one that was put to sleep inside a tile. Between steps, where a new one is due
soon, it yields before it parks.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import I32, I64, VOID, Emitter, Value
from cyclewise.machine.kernels.layout import (
    FINISHED_AT,
    LINE,
    SCHEDULE,
    SLEEPERS_AT,
    STEP,
    STEP_BYTES,
    STEPS_AT,
    THREAD,
    Record,
)

STOP = -1
MAX_TILES = (1 << 20) - 1
"""Tiles of a moment: they are counted in 20 bits."""

SPINS_IN_STEP = 1_000
SPINS_BETWEEN_STEPS = 2_000
YIELDS_BETWEEN_STEPS = 2_000

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None


def _pause(emitter: Emitter) -> None:
    if emitter.target.is_x86:
        emitter.hint("llvm.x86.sse2.pause")
    elif emitter.target.is_arm:  # YIELD does nothing on most
        emitter.intrinsic("llvm.aarch64.isb", VOID, emitter.constant(15, I32))


def _yield(emitter: Emitter) -> None:
    if sys.platform == "win32":
        emitter.call_c("SwitchToThread", I32)
    else:
        emitter.call_c("sched_yield", I32)


def _futex(emitter: Emitter, address: Value, operation: int, value: Value) -> None:
    number, private = emitter.constant(_FUTEX), emitter.constant(operation + 128)
    none = emitter.constant(0)
    arguments = (number, address, private, value, none, none, none)
    emitter.call_c("syscall", I64, *arguments, variadic=1)


def _park(emitter: Emitter, address: Value, seen: Value, sleepers: Value) -> None:
    """Sleeps while the low half of the word at `address` is that of `seen`; may wake for no reason.

    `sleepers` counts who sleeps, so that nobody pays for waking when nobody does.
    """
    if _FUTEX:
        emitter.atomic_add(sleepers, emitter.constant(1))
        _futex(emitter, address, 0, seen & 0xFFFFFFFF)
        emitter.atomic_add(sleepers, emitter.constant(-1))
    elif sys.platform == "win32":
        emitter.call_c("Sleep", I32, emitter.constant(1, I32))
    else:
        emitter.call_c("usleep", I32, emitter.constant(500, I32))


def _wake(emitter: Emitter, address: Value, sleepers: Value) -> None:
    """Wakes all who sleep on the word at `address`, which the caller has just changed."""
    if _FUTEX:
        with emitter.when(emitter.atomic_load(sleepers) > 0):
            _futex(emitter, address, 1, emitter.constant(0x7FFFFFFF))


def _execute(
    emitter: Emitter, shared: Value, epoch: Value, thread: Value, *, clocked: bool
) -> None:
    # The next step's record is written beside ours and the one after it over ours: what was read
    # is one step's if the epoch is still ours afterwards. If not, the step is over.
    at = shared + (epoch & 1) * STEP_BYTES + STEPS_AT
    fields = {name: emitter.atomic_load(at + 8 * i) for i, name in enumerate(STEP)}
    emitter.return_if(emitter.atomic_load(shared).differs(epoch))
    threads, batch, schedule = fields["num_threads"], fields["batch"], fields["schedule"]
    counters, waiters = fields["counters"], fields["waiters"]
    tag = epoch << 32
    # The half that threads sleep on has bits of the epoch too: it changes from step to step.
    none_done = tag | ((epoch & 0xFFF) << 20)
    context = fields["threads"] + thread * (8 * len(THREAD))
    stride = (threads + 1) * LINE
    stamps = fields["stamps"] + thread * stamp_bytes(fields["num_moments"])

    def stamp(row: Value, *columns: int) -> None:
        if clocked:
            ticks = emitter.read_counter()
            for column in columns:
                emitter.store(stamps + row * 16 + 8 * column, ticks, align=8)

    stamp(emitter.constant(0), 0, 1)

    def is_later(word: Value) -> Value:
        """Whether a counter belongs to a later step than ours: then ours is long over."""
        difference = emitter.cast(word >> 32, I32, "trunc") - emitter.cast(epoch, I32, "trunc")
        return difference > 0

    with emitter.range(0, fields["num_moments"]) as index:
        entry = Record(emitter, schedule + index * (8 * len(SCHEDULE)), SCHEDULE)
        kernel, moment, tiles, grain = entry.kernel, entry.moment, entry.num_tiles, entry.grain

        def run(first: Value, last: Value) -> None:
            emitter.call_address(kernel, moment, batch, context, first, last)

        with emitter.when(entry.replicated.differs(0)):
            run(emitter.constant(0), tiles)
            stamp(index + 1, 0, 1)
        with emitter.when(entry.replicated.equals(0)):
            line = counters + index * stride
            done_at = line + threads * LINE
            done = emitter.variable(emitter.constant(0))
            with emitter.range(0, threads) as turn:
                owner = (thread + turn) % threads
                base = tiles * owner // threads
                size = tiles * (owner + 1) // threads - base
                counter = line + owner * LINE
                with emitter.loop() as leave_if:
                    word = emitter.atomic_load(counter)
                    emitter.return_if(is_later(word))
                    ours = (word >> 32).equals(epoch)
                    claimed = ours.select(word & 0xFFFFFFFF, emitter.constant(0))
                    leave_if(claimed >= size)
                    end = claimed + grain
                    end = (end > size).select(size, end)
                    _, won = emitter.compare_exchange(counter, word, tag | end)
                    with emitter.when(won):
                        run(base + claimed, base + end)
                        done.add(end - claimed)
            mine = done.get()
            with emitter.when(mine > 0), emitter.loop() as leave_if:
                word = emitter.atomic_load(done_at)
                ours = (word >> 32).equals(epoch)
                count = ours.select(word & MAX_TILES, emitter.constant(0))
                _, won = emitter.compare_exchange(done_at, word, none_done + count + mine)
                leave_if(won)
            with emitter.when(mine > 0):
                _wake(emitter, done_at, waiters)
            stamp(index + 1, 0)
            spins = emitter.variable(emitter.constant(0))
            with emitter.loop() as leave_if:
                word = emitter.atomic_load(done_at)
                leave_if(word.equals(none_done + tiles))
                emitter.return_if(is_later(word))
                _pause(emitter)
                spins.add(1)
                with emitter.when(spins.get() > SPINS_IN_STEP):
                    # Sleep only on a count of this step: it grows with every change. An old one
                    # could be what the new one will be, and nobody would wake us.
                    ours = (word >> 32).equals(epoch)
                    with emitter.when(ours):
                        _park(emitter, done_at, word, waiters)
                    with emitter.when(ours.equals(0)):
                        emitter.compare_exchange(done_at, word, none_done)
            stamp(index + 1, 1)


def _call_execute(emitter: Emitter, shared: Value, epoch: Value, thread: Value) -> None:
    """Runs the specialization that the step's record names; a late thread finds another step's,
    and leaves either at once.
    """
    at = shared + (epoch & 1) * STEP_BYTES + STEPS_AT + 8 * STEP.index("execute")
    emitter.call_address(emitter.atomic_load(at), shared, epoch, thread)


def _work(emitter: Emitter, shared: Value, thread: Value) -> None:
    before = emitter.variable(emitter.constant(0))
    idle = emitter.variable(emitter.constant(0))
    with emitter.loop() as leave_if:
        epoch = emitter.atomic_load(shared)
        leave_if(epoch.equals(STOP))
        with emitter.when(epoch.differs(before.get())):
            before.set(epoch)
            idle.set(emitter.constant(0))
            _call_execute(emitter, shared, epoch, thread)
            emitter.atomic_store(shared + thread * LINE + FINISHED_AT, epoch)
        with emitter.when(epoch.equals(before.get())):
            idle.add(1)
            spent = idle.get()
            _pause(emitter)
            with emitter.when(spent > SPINS_BETWEEN_STEPS):
                _yield(emitter)
            with emitter.when(spent > SPINS_BETWEEN_STEPS + YIELDS_BETWEEN_STEPS):
                _park(emitter, shared, before.get(), shared + SLEEPERS_AT)


def _post(emitter: Emitter, shared: Value, epoch: Value) -> None:
    """Makes `epoch` the current one and wakes who sleeps."""
    emitter.atomic_store(shared, epoch)
    _wake(emitter, shared, shared + SLEEPERS_AT)


def stamp_bytes(num_moments: Any) -> Any:
    """Bytes of a thread's stamps in one step: a pair of ticks for its start and for each moment,
    in whole cache lines. A moment's pair is when the thread's work on it ended, and when the
    moment was over.
    """
    return ((num_moments + 1) * 16 + (LINE - 1)) // LINE * LINE


def loop_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        emitter.function("execute", 3, lambda *a: _execute(emitter, *a, clocked=False))
        emitter.function("work", 2, lambda *a: _work(emitter, *a))
        emitter.function("post", 2, lambda *a: _post(emitter, *a))

        def step(shared: Value, epoch: Value) -> None:
            _post(emitter, shared, epoch)
            _call_execute(emitter, shared, epoch, emitter.constant(0))

        emitter.function("step", 2, step)

    return Unit("loop", write, ("execute", "work", "post", "step"))


def clocked_loop_unit() -> Unit:
    """The loop that stamps each moment on each thread: the same source, and a unit of its own, so
    that nothing of it is in the plain one.
    """

    def write(emitter: Emitter) -> None:
        emitter.function("execute_clocked", 3, lambda *a: _execute(emitter, *a, clocked=True))

    return Unit("clocked_loop", write, ("execute_clocked",))
