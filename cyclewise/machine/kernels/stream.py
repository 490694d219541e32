"""Reading memory as fast as it comes: the probe that decode is measured against.

A tile is `tile_bytes` of the buffer, read `repeats` times by vector loads, and nothing is written
but one value a call: one pass over a large buffer measures memory, many over a small one the cache
that holds it. The processor's own prefetching does best here: asking ahead by instructions, as
the matrix kernels must, only takes from it.
"""

from __future__ import annotations

from cyclewise.machine.kernels.compiler import Unit
from cyclewise.machine.kernels.lang import I64, Emitter, Value, vector
from cyclewise.machine.kernels.layout import STREAM, THREAD, Record

STRIDE = 512
"""A tile is a multiple of it."""


def _stream(
    emitter: Emitter, moment: Value, batch: Value, thread: Value, first: Value, last: Value
) -> None:
    m, t = Record(emitter, moment, STREAM), Record(emitter, thread, THREAD)
    width = 64 if emitter.target.name == "avx512" else 32
    words = vector(I64, width // 8)
    sums = [emitter.variable(emitter.constant(0, words)) for _ in range(4)]
    with emitter.range(first, last) as tile, emitter.range(0, m.repeats):
        start = m.source + tile * m.tile_bytes
        with emitter.range(start, start + m.tile_bytes, STRIDE) as at:
            for i, offset in enumerate(range(0, STRIDE, width)):
                total = sums[i % len(sums)]
                total.set(total.get() | emitter.load(at + offset, words))
    found = sums[0].get() | sums[1].get() | sums[2].get() | sums[3].get()
    emitter.store(t.scratch, found)


def stream_unit() -> Unit:
    def write(emitter: Emitter) -> None:
        emitter.function("stream", 5, lambda *a: _stream(emitter, *a))

    return Unit("stream", write, ("stream",))
