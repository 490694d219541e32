from __future__ import annotations

import numpy as np
import pytest

from cyclewise.clock.limits import Limits
from cyclewise.machine.cache import Heads, KVCache
from cyclewise.machine.costs import (
    BatchShape,
    MatrixShape,
    attention_form,
    cost,
    linear_form,
    norm_form,
    quantize_form,
)
from cyclewise.machine.names import collapsed, layer_of
from cyclewise.machine.profile import Level, Roofs
from cyclewise.machine.program import Moment, Program

ROOFS = Roofs(
    core_hertz=3e9,
    levels=(
        Level("L1", 1 << 10, 1, ((1, 8e9), (2, 16e9))),
        Level("L3", 1 << 20, 2, ((1, 4e9), (2, 6e9))),
        Level("memory", 0, 2, ((1, 1e9), (2, 1.5e9))),
    ),
    operations={"dot": ((1, 64e9), (2, 128e9)), "fma": ((1, 16e9), (2, 32e9))},
    instructions={"dot": "VPDPBUSD", "fma": "FMA"},
    handover_seconds=1e-7,
)
ONE_TOKEN = BatchShape(((1, 0),), 1)


def matrix(rows, columns=64):
    return MatrixShape("Q8_0", rows, columns, rows * columns * 34 // 32)


def program(**forms):
    record = np.zeros(1, np.int64)
    moments = tuple(
        Moment(name.replace("_", "."), "matmul", "linear", record, form, "tokens")
        for name, form in forms.items()
    )
    nothing = np.zeros((0, 0), np.float32)
    return Program(moments, 1, 1, KVCache(Heads(1, 1, 1), 1, 1), nothing, 1, 0, 0, ())


def limits(num_threads=1, memory_bandwidth=None, **forms):
    return Limits(ROOFS, program(**forms), num_threads, memory_bandwidth)


def test_weights_come_from_memory_and_everything_crosses_the_first_level():
    form = linear_form((matrix(1 << 15),), quantized=True)
    total = cost(form, ONE_TOKEN)
    found = limits(down=form).seconds(form, ONE_TOKEN)
    # Its input and output are more than L1 holds.
    assert total.weight_bytes > 1 << 20 > total.activation_bytes > 1 << 10
    assert found.bytes_seconds == pytest.approx(total.weight_bytes / 1e9)
    assert found.operations_seconds == pytest.approx(total.operations / 64e9)
    assert (found.seconds, found.bound) == (found.bytes_seconds, "bytes")


def test_arithmetic_bounds_a_prompt():
    form = linear_form((matrix(2048, 1024),), quantized=True)
    batch = BatchShape(((512, 0),), 1)
    found = limits(down=form).seconds(form, batch)
    assert found.bound == "operations"
    assert found.seconds == pytest.approx(512 * 2 * 2048 * 1024 / 64e9)
    floats = linear_form((matrix(2048, 1024),), quantized=False)
    assert limits(down=floats).seconds(floats, batch).seconds == pytest.approx(4 * found.seconds)


def test_weights_come_from_the_cache_that_holds_the_whole_program():
    form = linear_form((matrix(8000),), quantized=True)
    alone = limits(a=form).seconds(form, ONE_TOKEN)
    total = cost(form, ONE_TOKEN)
    assert alone.bytes_seconds == pytest.approx(total.bytes / 4e9)
    beside = limits(a=form, b=form).seconds(form, ONE_TOKEN)
    assert beside.bytes_seconds == pytest.approx(total.weight_bytes / 1e9)


def test_a_prefix_of_the_layers_may_fit():
    form = linear_form((matrix(8000),), quantized=True)
    whole = program(layers_0_a=form, layers_1_a=form)
    shares = [Limits(ROOFS, p, 1).program_seconds(ONE_TOKEN) for p in (whole, whole.prefix(1))]
    assert shares[0] > 7 * shares[1]


def test_caches_add_up_over_threads():
    # Two threads have two first levels, of one kibibyte each, and one last.
    form = quantize_form(256)
    bytes_ = cost(form, ONE_TOKEN).bytes
    assert 1 << 10 < bytes_ < 2 << 10
    assert limits(1, a=form).seconds(form, ONE_TOKEN).bytes_seconds == pytest.approx(bytes_ / 4e9)
    assert limits(2, a=form).seconds(form, ONE_TOKEN).bytes_seconds == pytest.approx(bytes_ / 16e9)


def test_keys_of_earlier_steps_are_as_far_as_weights_and_those_of_this_step_near():
    form, weights = attention_form(2, 1, 64), linear_form((matrix(1 << 15),), quantized=True)
    near, far = BatchShape(((1, 0),), 1), BatchShape(((1, 4000),), 1)
    here = limits(attend=form, down=weights)
    assert here.seconds(form, near).bytes_seconds == pytest.approx(cost(form, near).bytes / 4e9)
    assert here.seconds(form, far).bytes_seconds == pytest.approx(4000 * 256 / 1e9)
    # The cache that holds the weights must hold them too.
    small = linear_form((matrix(2000),), quantized=True)
    for position, bandwidth in ((3000, 4e9), (4000, 1e9)):
        batch = BatchShape(((1, position),), 1)
        seconds = limits(attend=form, down=small).seconds(small, batch).bytes_seconds
        assert seconds == pytest.approx(cost(small, batch).weight_bytes / bandwidth, rel=0.1)


def test_a_bandwidth_read_within_the_run_takes_the_place_of_the_memory_s():
    form = linear_form((matrix(1 << 15),), quantized=True)
    usual = limits(a=form).seconds(form, ONE_TOKEN)
    busy = limits(1, 0.5e9, a=form).seconds(form, ONE_TOKEN)
    assert busy.bytes_seconds == pytest.approx(2 * usual.bytes_seconds)


def test_what_is_left_out_of_a_batch_takes_no_time():
    form = norm_form(64, of_logits=True)
    found = limits(output_norm=form).seconds(form, BatchShape(((4, 0),), 0))
    assert found.seconds == found.operations_seconds == found.bytes_seconds == 0


def test_sums():
    norm, down = norm_form(64), linear_form((matrix(1 << 12),), quantized=True)
    here = limits(layers_0_norm=norm, layers_0_down=down, layers_1_down=down, output=down)
    norm_seconds, down_seconds = (here.seconds(f, ONE_TOKEN).seconds for f in (norm, down))
    assert here.program_seconds(ONE_TOKEN) == pytest.approx(norm_seconds + 3 * down_seconds)
    assert [limit.seconds for limit in here.each(ONE_TOKEN)] == [
        norm_seconds, down_seconds, down_seconds, down_seconds,
    ]  # fmt: skip
    assert here.totals(lambda moment: collapsed(moment.name), ONE_TOKEN) == pytest.approx(
        {"layers.*.norm": norm_seconds, "layers.*.down": 2 * down_seconds, "output": down_seconds}
    )
    assert here.totals(lambda moment: layer_of(moment.name), ONE_TOKEN) == pytest.approx(
        {0: norm_seconds + down_seconds, 1: down_seconds, None: down_seconds}
    )
