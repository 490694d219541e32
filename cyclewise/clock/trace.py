"""A run as a trace for Perfetto (ui.perfetto.dev): every moment of every thread, in time.

`cyclewise profile --trace` hands over the turns of a `ClockedRun`. A slice is a step, in it the
layers, in them the moments; what a thread waited is a slice `waiting` after its moment. Python's
stages lie between the steps on the first thread, and a counter holds tokens a second.

The file is Perfetto's protocol buffer (`protos/perfetto/trace/trace_packet.proto`), of which this
module encodes the few messages that it needs. Names are interned and times are differences, so a
slice takes about 33 bytes; a run that would still exceed `MAX_BYTES` loses its last steps, and the
file and the caller are told how many.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.names import layer_of
from cyclewise.machine.stamps import spent

if TYPE_CHECKING:
    from cyclewise.clock.run import Turn
    from cyclewise.models import Model

MAX_BYTES = 50_000_000
WAITING = "waiting"
PID = 1
START_NS = 1_000_000_000
"""The trace's time of the first tick."""
_CLOCK = 64
"""Of a sequence's own: nanoseconds since the packet before."""
_BOOTTIME = 6
_PROCESS, _COUNTER, _FIRST_THREAD = 1, 2, 3
"""Tracks, and the sequences of packets that fill them."""
_BEGIN, _END, _COUNT = 1, 2, 4
_CLEARED, _NEEDS_STATE = 1, 2
_SLICE_BYTES = 36
"""At most, where its times take three bytes, which hold `_SHORT` nanoseconds; else three more."""
_SHORT = 1 << 21


@dataclass(frozen=True, slots=True)
class TraceInput:
    """A run in ticks."""

    model: str
    moments: Sequence[str]
    """The program's names."""
    classes: Sequence[str]
    """Of each moment."""
    ticks: NDArray[np.int64]
    """(steps, threads, moments + 1, 2), as `Stamps.ticks`, steps in order; at least one."""
    ticks_per_second: float
    labels: Sequence[str]
    """Of each step."""
    num_tokens: Sequence[int]
    """Of each step's batch."""
    stages: Sequence[tuple[str, int, int]]
    """What Python did on the first thread: name, first and last tick; in order."""


@dataclass(frozen=True, slots=True)
class TraceFile:
    """What was written."""

    num_bytes: int
    num_steps: int
    left_out: int
    """Steps for which there was no room."""


def write_trace(path: str | Path, model: Model, turns: Sequence[Turn]) -> TraceFile:
    """Writes a clocked run, all its turns one after the other.

    Raises OSError if the file cannot be written.
    """
    phases = [phase for turn in turns for phase in (turn.prefill, turn.decode)]
    labels = [
        f"{'token' if phase.name == 'decode' else 'prompt'} {step}"
        for phase in phases
        for step in range(len(phase.shapes))
    ]
    moments = model.program.moments
    return write_run(
        path,
        TraceInput(
            model=model.config.name or model.path.name,
            moments=[moment.name for moment in moments],
            classes=[moment.kind for moment in moments],
            ticks=np.concatenate([phase.ticks for phase in phases]),
            ticks_per_second=turns[0].calibration.ticks_per_second,
            labels=labels,
            num_tokens=[shape.num_tokens for phase in phases for shape in phase.shapes],
            stages=[(s.name, s.start, s.end) for phase in phases for s in phase.spans],
        ),
    )


def write_run(path: str | Path, run: TraceInput, max_bytes: int = MAX_BYTES) -> TraceFile:
    """Writes a run, of its steps so many first ones as are sure to fit into `max_bytes`."""
    num_steps = _fitting_steps(run, max_bytes)
    left_out = len(run.ticks) - num_steps
    with Path(path).open("wb") as file:
        _Writer(file, run, num_steps).write(left_out)
        return TraceFile(file.tell(), num_steps, left_out)


def _fitting_steps(run: TraceInput, max_bytes: int) -> int:
    names = [run.model, *_names(run)]
    fixed = 4096 + run.ticks.shape[1] * (1024 + sum(len(name.encode()) + 16 for name in names))
    slices = (spent(run.ticks) > 0).sum(axis=(1, 2, 3))
    layers = len({layer_of(name) for name in run.moments}) + 1
    slices += run.ticks.shape[1] * layers + 1
    fixed += len(run.stages) * _SLICE_BYTES
    # However the time is cut, so many pieces at most are longer.
    ends = run.ticks.max(axis=(1, 2, 3)) - _first_tick(run)
    longer = ends * (1e9 / run.ticks_per_second) / _SHORT
    needed = np.cumsum(slices) * _SLICE_BYTES + 3 * run.ticks.shape[1] * longer
    return int(np.searchsorted(needed, max_bytes - fixed, "right"))


def _first_tick(run: TraceInput) -> int:
    step = run.ticks[0]
    return min([int(step[step > 0].min()), *(start for _, start, _ in run.stages[:1])])


def _names(run: TraceInput) -> list[str]:
    """All names of slices, each once, in a fixed order."""
    layers = [f"layer {n}" for name in run.moments if (n := layer_of(name)) is not None]
    stages = [name for name, _, _ in run.stages]
    return list(dict.fromkeys([*run.moments, *layers, *run.labels, *stages, WAITING]))


class _Writer:
    def __init__(self, file: BinaryIO, run: TraceInput, num_steps: int) -> None:
        self._file, self._run, self._num_steps = file, run, num_steps
        self._first = _first_tick(run)
        self._names = {name: iid for iid, name in enumerate(_names(run), 1)}
        categories = dict.fromkeys([*run.classes, "step", "layer", "host", WAITING])
        self._categories = {name: iid for iid, name in enumerate(categories, 1)}

    def write(self, left_out: int) -> None:
        run, threads = self._run, self._run.ticks.shape[1]
        kept = f"{self._num_steps} steps"
        label = kept if not left_out else f"first {kept}; {left_out} more had no room"
        process = _number(1, PID) + _text(6, f"cyclewise {run.model}") + _text(8, label)
        self._describe(_PROCESS, _bytes(3, process))
        self._describe(
            _COUNTER, _number(5, _PROCESS) + _text(2, "tokens/s") + _bytes(8, _text(6, "tokens/s"))
        )
        for thread in range(threads):
            name = "main" if thread == 0 else f"cyclewise-{thread}"
            fields = _number(1, PID) + _number(2, PID + thread) + _text(5, name)
            self._describe(_FIRST_THREAD + thread, _number(5, _PROCESS) + _bytes(4, fields))
            self._write_thread(thread)
        self._write_counter()

    def _describe(self, track: int, fields: bytes) -> None:
        self._packet(_number(10, track) + _bytes(60, _number(1, track) + fields))

    def _packet(self, fields: bytes) -> None:
        self._file.write(_bytes(1, fields))

    def _open_sequence(self, track: int, interned: bytes = b"") -> None:
        """The first packet of a track's sequence: its clock, defaults and names."""
        clocks = _bytes(1, _number(1, _BOOTTIME) + _number(2, START_NS))
        clocks += _bytes(1, _number(1, _CLOCK) + _number(2, START_NS) + _number(3, 1))
        defaults = _number(58, _CLOCK) + _bytes(11, _number(11, track))
        self._packet(
            _number(10, track)
            + _number(13, _CLEARED)
            + _bytes(6, clocks)
            + _bytes(59, defaults)
            + (_bytes(12, interned) if interned else b"")
        )

    def _write_thread(self, thread: int) -> None:
        track = _FIRST_THREAD + thread
        interned = b"".join(
            _bytes(field, _number(1, iid) + _text(2, name))
            for field, table in ((1, self._categories), (2, self._names))
            for name, iid in table.items()
        )
        self._open_sequence(track, interned)
        tail = _number(10, track) + _number(13, _NEEDS_STATE)
        end = tail + _bytes(11, _number(9, _END))
        begins: dict[tuple[str, str], bytes] = {}
        before, chunk = 0, bytearray()
        for at, what in self._slices(thread):
            if what is None:
                fields = end
            elif (found := begins.get(what)) is not None:
                fields = found
            else:
                name, category = self._names[what[0]], self._categories[what[1]]
                event = _number(3, category) + _number(9, _BEGIN) + _number(10, name)
                begins[what] = fields = tail + _bytes(11, event)
            assert at >= before, (at, before)
            time = _number(8, at - before)
            before = at
            chunk += b"\x0a" + bytes((len(time) + len(fields),)) + time + fields
            if len(chunk) > 1 << 20:
                self._file.write(chunk)
                chunk.clear()
        self._file.write(chunk)

    def _slices(self, thread: int) -> Iterator[tuple[int, tuple[str, str] | None]]:
        """(nanoseconds, (name, category) of a slice that begins or None for the end of one)."""
        run = self._run
        stages = deque(run.stages if thread == 0 else ())
        end_of_last = 0
        for step in range(self._num_steps):
            flat = run.ticks[step, thread].reshape(-1)
            if not flat[0]:
                continue
            while stages and stages[0][1] < flat[0]:
                name, start, end = stages.popleft()
                start, end = max(start, end_of_last), min(end, int(flat[0]))
                if end > start:
                    yield from self._slice(start, end, name, "host")
            reached = np.maximum.accumulate(flat)
            times = self._nanoseconds(reached)
            yield times[0], (run.labels[step], "step")
            yield from self._moments(times)
            yield times[-1], None
            end_of_last = int(reached[-1])
        if self._num_steps == len(run.ticks):
            for name, start, end in stages:
                yield from self._slice(max(start, end_of_last), end, name, "host")

    def _slice(
        self, start: int, end: int, name: str, category: str
    ) -> Iterator[tuple[int, tuple[str, str] | None]]:
        first, last = self._nanoseconds(np.array([start, max(start, end)]))
        yield first, (name, category)
        yield last, None

    def _moments(self, times: list[int]) -> Iterator[tuple[int, tuple[str, str] | None]]:
        """Of a step with so many nanoseconds at its borders."""
        run = self._run
        layer: int | None = None
        for index, (name, kind) in enumerate(zip(run.moments, run.classes, strict=True)):
            start, worked, over = times[2 * index + 1 : 2 * index + 4]
            if over == start:
                continue
            if (here := layer_of(name)) != layer:
                if layer is not None:
                    yield start, None
                if here is not None:
                    yield start, (f"layer {here}", "layer")
                layer = here
            if worked > start:
                yield start, (name, kind)
                yield worked, None
            if over > worked:
                yield worked, (WAITING, WAITING)
                yield over, None
        if layer is not None:
            yield times[-1], None

    def _write_counter(self) -> None:
        self._open_sequence(_COUNTER)
        tail = _number(10, _COUNTER) + _number(13, _NEEDS_STATE)
        before = 0
        for step in range(self._num_steps):
            ticks = self._run.ticks[step, 0]
            seconds = float(ticks.max() - ticks[0, 0]) / self._run.ticks_per_second
            if seconds <= 0:
                continue
            [at] = self._nanoseconds(ticks[0, :1])
            value = struct.pack("<d", self._run.num_tokens[step] / seconds)
            event = _number(9, _COUNT) + _varint(44 << 3 | 1) + value
            self._packet(_number(8, at - before) + tail + _bytes(11, event))
            before = at

    def _nanoseconds(self, ticks: NDArray[np.int64]) -> list[int]:
        scaled = (ticks - self._first) * (1e9 / self._run.ticks_per_second)
        found: list[int] = np.rint(scaled).astype(np.int64).tolist()
        return found


# The wire format of protocol buffers


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8", "replace"))
