"""Traces, decoded again with the schema that Perfetto publishes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema

from cyclewise.clock.account import Span
from cyclewise.clock.run import Phase, Turn
from cyclewise.clock.trace import START_NS, TraceFile, TraceInput, write_run, write_trace
from cyclewise.machine.costs import BatchShape

TICKS_PER_SECOND = 2.5e9
MOMENTS = (
    "embed",
    *(f"layers.{n}.{part}" for n in range(3) for part in ("attention.qkv", "ffn.down")),
    "output",
)
CLASSES = ("memory", *(["matmul", "activation"] * 3), "matmul")
BEGIN, END, COUNTER = (
    getattr(schema.TrackEvent, f"TYPE_{name}") for name in ("SLICE_BEGIN", "SLICE_END", "COUNTER")
)


@dataclass(frozen=True)
class Slice:
    start: int
    end: int
    name: str
    category: str
    depth: int


@dataclass(frozen=True)
class Decoded:
    process: schema.ProcessDescriptor
    threads: dict[int, str]
    """Names by thread number."""
    slices: dict[int, list[Slice]]
    """By thread number, in the order in which they begin."""
    counter: list[tuple[int, float]]


def decode(path: Path) -> Decoded:
    """What the file says, by the rules of the format and without a look at how it is written."""
    trace = schema.Trace()
    trace.ParseFromString(path.read_bytes())
    process, threads, counters = None, {}, set()
    open_slices: dict[int, list[tuple[int, str, str]]] = defaultdict(list)
    slices: dict[int, list[Slice]] = defaultdict(list)
    counter = []
    clocks: dict[int, int] = {}
    tracks: dict[int, int] = {}
    names: dict[tuple[int, int], str] = {}
    categories: dict[tuple[int, int], str] = {}
    for packet in trace.packet:
        sequence = packet.trusted_packet_sequence_id
        assert sequence
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            if track.HasField("process"):
                process = track.process
            elif track.HasField("thread"):
                assert track.thread.pid == process.pid
                threads[track.uuid] = (
                    track.thread.tid - track.thread.pid,
                    track.thread.thread_name,
                )
            else:
                assert track.HasField("counter")
                counters.add(track.uuid)
        if packet.sequence_flags & schema.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            own, boottime = {}, None
            for clock in packet.clock_snapshot.clocks:
                if clock.clock_id == schema.BUILTIN_CLOCK_BOOTTIME:
                    boottime = clock.timestamp
                else:
                    assert clock.is_incremental
                    own[clock.clock_id] = clock.timestamp
            defaults = packet.trace_packet_defaults
            assert own[defaults.timestamp_clock_id] == boottime
            clocks[sequence] = boottime
            tracks[sequence] = defaults.track_event_defaults.track_uuid
        for entry in packet.interned_data.event_names:
            names[sequence, entry.iid] = entry.name
        for entry in packet.interned_data.event_categories:
            categories[sequence, entry.iid] = entry.name
        if not packet.HasField("track_event"):
            continue
        assert packet.sequence_flags & schema.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        clocks[sequence] += packet.timestamp
        now, track_id, event = clocks[sequence], tracks[sequence], packet.track_event
        if event.type == COUNTER:
            assert track_id in counters
            counter.append((now, event.double_counter_value))
        elif event.type == BEGIN:
            [category] = event.category_iids
            opened = (now, names[sequence, event.name_iid], categories[sequence, category])
            open_slices[track_id].append(opened)
        else:
            assert event.type == END
            start, name, group = open_slices[track_id].pop()
            depth = len(open_slices[track_id])
            slices[threads[track_id][0]].append(Slice(start, now, name, group, depth))
    assert not any(open_slices.values())
    ordered = {
        thread: sorted(found, key=lambda each: (each.start, each.depth))
        for thread, found in slices.items()
    }
    return Decoded(process, dict(threads.values()), ordered, counter)


def make_run(num_steps: int = 5, num_threads: int = 3, seed: int = 7) -> TraceInput:
    """Steps with random durations. A thread sleeps through step 1, another leaves step 2 early."""
    random = np.random.default_rng(seed)
    at = 5_000_000_000
    steps, stages = [], [("template", at - 9_000, at - 4_000)]
    for _ in range(num_steps):
        stages.append(("scheduling", at - 3_000, at - 500))
        thread_ticks = np.zeros((num_threads, len(MOMENTS) + 1, 2), np.int64)
        thread_ticks[:, 0] = (at + random.integers(0, 300, num_threads))[:, None]
        over = at + 300
        for row in range(1, len(MOMENTS) + 1):
            ended = np.maximum(over, thread_ticks[:, row - 1, 1])
            ended = ended + random.integers(0, 5_000, num_threads)
            over = int(ended.max())
            thread_ticks[:, row, 0], thread_ticks[:, row, 1] = ended, over
        steps.append(thread_ticks)
        at = over + 20_000
        stages.append(("sampling", over + 100, over + 9_000))
    ticks = np.stack(steps)
    if num_steps > 2 and num_threads > 2:
        ticks[1, 1] = 0
        ticks[2, 2, 4:] = 0
    return TraceInput(
        model="a model of öre", moments=MOMENTS, classes=CLASSES, ticks=ticks,
        ticks_per_second=TICKS_PER_SECOND,
        labels=["prompt 0", *(f"token {n}" for n in range(num_steps - 1))],
        num_tokens=[512] + [1] * (num_steps - 1), stages=stages,
    )  # fmt: skip


def expected_slices(run: TraceInput, thread: int) -> list[Slice]:
    """The slow, obvious way from ticks to slices."""
    first = min(run.stages[0][1], int(run.ticks[run.ticks > 0].min()))

    def time(tick: int) -> int:
        return START_NS + round((int(tick) - first) / TICKS_PER_SECOND * 1e9)

    found = []
    if thread == 0:
        found += [Slice(time(a), time(b), name, "host", 0) for name, a, b in run.stages]
    for label, threads in zip(run.labels, run.ticks, strict=True):
        rows = [row for row in threads[thread] if row[1]]
        if not rows:
            continue
        found.append(Slice(time(rows[0][0]), time(rows[-1][1]), label, "step", 0))
        layers: dict[str, list[int]] = {}
        for name, kind, before, row in zip(
            run.moments, run.classes, rows[:-1], rows[1:], strict=False
        ):
            start, worked, over = before[1], row[0], row[1]
            depth = 1
            if name.startswith("layers."):
                layers.setdefault(f"layer {name.split('.')[1]}", []).extend([start, over])
                depth = 2
            if worked > start:
                found.append(Slice(time(start), time(worked), name, kind, depth))
            if over > worked:
                found.append(Slice(time(worked), time(over), "waiting", "waiting", depth))
        for layer, ticks in layers.items():
            if max(ticks) > min(ticks):
                found.append(Slice(time(min(ticks)), time(max(ticks)), layer, "layer", 1))
    return sorted(found, key=lambda each: (each.start, each.depth))


def test_every_slice_has_its_place_name_and_duration(tmp_path: Path) -> None:
    run = make_run()
    written = write_run(tmp_path / "a.pftrace", run)
    assert written == TraceFile((tmp_path / "a.pftrace").stat().st_size, 5, 0)
    found = decode(tmp_path / "a.pftrace")
    assert found.process.process_name == "cyclewise a model of öre"
    assert list(found.process.process_labels) == ["5 steps"]
    assert found.threads == {0: "main", 1: "cyclewise-1", 2: "cyclewise-2"}
    for thread in range(3):
        assert found.slices[thread] == expected_slices(run, thread)
    assert {each.name for each in found.slices[0]} >= {*MOMENTS, "waiting", "layer 2", "sampling"}


def test_turns_follow_each_other(tmp_path: Path) -> None:
    run = make_run(num_steps=4)
    first, second = (_turn(run, slice(2 * n, 2 * n + 2)) for n in range(2))
    pairs = zip(run.moments, run.classes, strict=True)
    moments = [SimpleNamespace(name=name, kind=kind) for name, kind in pairs]
    model: Any = SimpleNamespace(
        config=SimpleNamespace(name=""), path=Path("model.gguf"),
        program=SimpleNamespace(moments=moments),
    )  # fmt: skip
    written = write_trace(tmp_path / "a.pftrace", model, [first, second])
    assert (written.num_steps, written.left_out) == (4, 0)
    found = decode(tmp_path / "a.pftrace")
    assert found.process.process_name == "cyclewise model.gguf"
    labels = ["prompt 0", "token 0"] * 2
    assert [s.name for s in found.slices[0] if s.category == "step"] == labels
    renamed = replace(run, labels=labels)
    assert found.slices[2] == expected_slices(renamed, 2)


def _turn(run: TraceInput, steps: slice) -> Turn:
    """A prompt and a token, with the stages before and after each."""
    ticks = run.ticks[steps]
    spans = [Span(*stage) for stage in run.stages]
    phases = []
    for index, (name, num_tokens) in enumerate((("prefill", 512), ("decode", 1))):
        start, end = int(ticks[index, 0, 0, 0]) - 10_000, int(ticks[index].max()) + 10_000
        inside = tuple(span for span in spans if start <= span.start < end)
        shape = BatchShape(((num_tokens, 0),), 1)
        phases.append(Phase(name, ticks[index : index + 1], (shape,), inside, (start, end)))
    calibration: Any = SimpleNamespace(ticks_per_second=TICKS_PER_SECOND)
    return Turn(phases[0], phases[1], calibration, (), (1.0, 1.0))


def test_the_counter_holds_tokens_a_second(tmp_path: Path) -> None:
    run = make_run()
    write_run(tmp_path / "a.pftrace", run)
    counter = decode(tmp_path / "a.pftrace").counter
    spans = run.ticks[:, 0, -1, 1] - run.ticks[:, 0, 0, 0]
    rates = np.array(run.num_tokens) / (spans / TICKS_PER_SECOND)
    assert [rate for _, rate in counter] == rates.tolist()


def test_stages_that_reach_into_a_step_are_cut(tmp_path: Path) -> None:
    """Python's clock and the counter's agree only to a microsecond."""
    run = make_run(num_steps=2)
    starts, ends = run.ticks[:, 0, 0, 0].tolist(), run.ticks[:, 0, -1, 1].tolist()
    stages = [
        ("scheduling", starts[0] - 900, starts[0] + 800),
        ("sampling", ends[0] - 700, ends[0] + 5_000),
        ("writing", ends[1] - 600, ends[1] - 100),
    ]
    write_run(tmp_path / "a.pftrace", replace(run, stages=stages))
    cut = [("scheduling", starts[0] - 900, starts[0]), ("sampling", ends[0], ends[0] + 5_000)]
    host = [each for each in decode(tmp_path / "a.pftrace").slices[0] if each.category == "host"]
    first = starts[0] - 900
    for (name, start, end), found in zip(cut, host, strict=False):
        times = [START_NS + round((tick - first) / TICKS_PER_SECOND * 1e9) for tick in (start, end)]
        assert (found.name, found.start, found.end) == (name, *times)
    assert all(each.depth == 0 for each in host)


def test_a_long_run_is_cut_and_says_so(tmp_path: Path) -> None:
    run = make_run(num_steps=400)
    full = write_run(tmp_path / "full.pftrace", run)
    assert full.left_out == 0
    limit = full.num_bytes // 2
    written = write_run(tmp_path / "cut.pftrace", run, limit)
    assert 0.5 * limit < written.num_bytes <= limit
    assert written.left_out == 400 - written.num_steps > 0
    found = decode(tmp_path / "cut.pftrace")
    [label] = found.process.process_labels
    assert label == f"first {written.num_steps} steps; {written.left_out} more had no room"
    kept = [each for each in expected_slices(run, 1) if each.category == "step"]
    steps = [each for each in found.slices[1] if each.category == "step"]
    # Thread 1 slept through one of them.
    assert steps == kept[: written.num_steps - 1]
    assert write_run(tmp_path / "none.pftrace", run, 10_000).num_steps == 0
    assert decode(tmp_path / "none.pftrace").slices.keys() <= {0}
