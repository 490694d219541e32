"""Probes do the work that they say: the numbers are the clock's business, a timing is no test."""

from __future__ import annotations

import platform
import re

import numpy as np
import pytest

from cyclewise.machine.kernels.compiler import assembly, callable_at, host_compiler
from cyclewise.machine.kernels.layout import HANDOVER, RATE, STREAM
from cyclewise.machine.kernels.rates import (
    CHAINS,
    OPERAND_BYTES,
    UNROLL,
    rates,
    rates_unit,
)
from cyclewise.machine.kernels.stream import STRIDE, stream_unit
from cyclewise.machine.kernels.target import host_target, make_target
from cyclewise.machine.probe import (
    cache_probe,
    handover_probe,
    memory_probe,
    rate_probe,
    touched,
)
from cyclewise.machine.threads import Threads
from tests.machine.kernel_calls import Thread, kernel, record

SAPPHIRE_RAPIDS = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16"


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    threads = Threads(request.param, 1)
    yield threads
    threads.close()


def test_a_stream_reads_every_byte_of_its_tiles_and_no_other():
    """Each word of a tile alone comes out of the read."""
    tile = 2 * STRIDE
    buffer = np.zeros(4 * tile, np.uint8)
    run = kernel(stream_unit(), "stream")
    moment = record(STREAM, source=buffer, tile_bytes=tile, repeats=2)
    thread = Thread(64)
    found = np.frombuffer(thread._scratch, np.uint8)
    for at in range(0, 4 * tile, 61):
        buffer[:] = 0
        buffer[at] = 1
        run(moment, 0, thread.record, 1, 3)
        assert found[:32].any() == (tile <= at < 3 * tile)
    thread.check()


@pytest.mark.parametrize("unit", list(rates(host_target())))
def test_a_rate_runs_as_many_instructions_as_it_says(unit):
    """Multiplying by one and adding three, of integers: the sum tells the count."""
    rate = rates(host_target())[unit]
    if rate.instruction == "VPMADDUBSW":
        pytest.skip("its result is not a count")
    operands = np.zeros(OPERAND_BYTES, np.uint8)
    one, three = {"i32": (1, 3), "float": (1.0, 3.0)}[str(rate.element)]
    if rate.instruction == "VPDPBUSD":
        one, three = 1, 3  # one product a lane: 1 * 3
    if rate.instruction == "SMMLA":
        three = np.resize([3, 0], 16)  # a sum is of two words
    kind = np.float32 if isinstance(one, float) else np.int32
    words = operands.view(kind)
    words[:16], words[16:32] = one, three
    thread = Thread(OPERAND_BYTES)
    run = kernel(rates_unit(host_target()), f"rate_{unit}")
    run(record(RATE, operands=operands, repeats=5), 0, thread.record, 2, 4)
    chains = np.frombuffer(thread._scratch, kind, count=CHAINS * 16).reshape(CHAINS, 16)
    assert (chains[:, : rate.lanes] == 3 * 2 * 5 * UNROLL).all()
    thread.check()


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="looks for x86 instructions"
)
@pytest.mark.parametrize("name", ["avx512", "avx2"])
def test_the_loop_holds_nothing_but_the_instruction(name):
    """All of the instructions are there, in registers, and nothing is spilled between them."""
    target = make_target("avx2") if name == "avx2" else make_target(
        "avx512", "sapphirerapids", SAPPHIRE_RAPIDS
    )  # fmt: skip
    text = assembly(rates_unit(target), target)
    found = rates(target)
    assert set(found) == ({"dot", "fma", "bf16"} if name == "avx512" else {"dot", "fma"})
    for rate in found.values():
        mnemonic = "vfmadd" if rate.instruction == "FMA" else rate.instruction.lower()
        body = text[text.index(f"rate_{rate.unit}:") : text.index(f"size\trate_{rate.unit}")]
        lines = [line for line in body.splitlines() if line.startswith(f"\t{mnemonic}")]
        assert len(lines) == CHAINS * UNROLL
        assert not any("(" in line for line in lines)
        start, end = body.index(lines[0]), body.rindex(lines[-1])
        between = [x for x in body[start:end].splitlines() if re.match(r"\tv", x)]
        assert len(between) == CHAINS * UNROLL - 1
        width = {"avx512": "zmm", "avx2": "ymm"}[name]
        assert all(width in line for line in lines)


def test_probes_of_any_number_of_threads(threads):
    """They run, they end, and they say more than nothing."""
    buffer = touched(1 << 22)
    probes = [memory_probe(threads, buffer), cache_probe(threads, buffer, 5000)]
    probes += [rate_probe(threads, rate) for rate in rates(host_target()).values()]
    if threads.num_threads > 1:
        probes.append(handover_probe(threads))
    for _ in range(2):
        for probe in probes:
            assert probe.best(0.0) == 0.0
            assert probe.best(0.005) > 0


def test_a_handover_leaves_the_line_as_it_was():
    import threading

    host_compiler().load([rates_unit(host_target())])
    run = callable_at(host_compiler().address("handover"), 5)
    line = np.zeros(8, np.int64)
    moment = record(HANDOVER, line=line, rounds=100)
    for _ in range(3):
        other = threading.Thread(target=run, args=(moment.ctypes.data, 0, 0, 1, 2))
        other.start()
        run(moment.ctypes.data, 0, 0, 0, 1)
        other.join()
        assert line[0] == 0
