from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cyclewise.clock.calibrate import COUNTS, attention_features, nonnegative
from cyclewise.clock.predict import Predictor, View, between, prefill_shapes
from cyclewise.clock.run import Settings
from cyclewise.machine.costs import BatchShape, cost
from cyclewise.machine.kernels.layout import SPLIT
from cyclewise.models import load_model
from tests.clock.forecasts import (
    BANDWIDTH,
    FIXED,
    GAP,
    GROUP,
    LOGIT,
    SEQUENCE,
    STEP,
    TILE,
    kernel_costs,
    view,
)
from tests.models.tiny import Tiny, write

ONE_TOKEN = BatchShape(((1, 40),), 1)
VIEW = view()


def part(name, of=VIEW):
    return next(each for each in of.parts if each.name == name)


def predictor(threads=1, bandwidth=BANDWIDTH, **costs):
    return Predictor(kernel_costs("Q8_0", **costs), threads, bandwidth)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 5, 16, 100, 512])
def test_a_matrix_moment_is_fixed_tiles_and_groups(threads, count):
    told = predictor(threads).moment(VIEW, part("layers.1.ffn.down"), BatchShape(((count, 0),), 1))
    tiles, groups = 128 / 16, 256 / 32
    assert told == pytest.approx(
        FIXED + (1 + count) / 2 * tiles / threads * (TILE + groups * GROUP)
    )


def test_matrices_of_one_moment_share_what_is_fixed():
    told = predictor().moment(VIEW, part("layers.0.attention.qkv"), ONE_TOKEN)
    tiles = (128 + 32 + 32) / 16
    assert told == pytest.approx(FIXED + tiles * (TILE + 4 * GROUP))


def test_logits_count_their_own_rows():
    quiet = BatchShape(((20, 0),), 0)
    assert predictor().moment(VIEW, part("output"), quiet) == 0.0
    two = predictor().moment(VIEW, part("output"), BatchShape(((20, 0), (20, 0)), 2))
    assert two == pytest.approx(FIXED + 1.5 * 512 / 16 * (TILE + 4 * GROUP))


def waiting_share():
    """Of `ffn.down` for one token on one thread, the share that reading its bytes would take."""
    bytes_ = 8 * 8 * 544
    return bytes_ / BANDWIDTH / (8 * (TILE + 8 * GROUP))


def test_what_waits_for_memory_follows_the_bandwidth():
    down, share = part("layers.0.ffn.down"), waiting_share()
    assert 0.9 > share > 0.4
    seconds = 8 * (TILE + 8 * GROUP)
    told = {factor: predictor(bandwidth=BANDWIDTH * factor).moment(VIEW, down, ONE_TOKEN) - FIXED
            for factor in (0.25, 0.5, 1, 2, 4, 1e6)}  # fmt: skip
    assert told[1] == pytest.approx(seconds)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    # Very slow memory is all there is to wait for, and very fast memory leaves the arithmetic.
    slow = predictor(bandwidth=BANDWIDTH / 1e6).moment(VIEW, down, ONE_TOKEN)
    assert slow == pytest.approx(8 * 8 * 544 / (BANDWIDTH / 1e6), rel=0.01)
    assert told[1e6] == pytest.approx(seconds * (1 - share**3) ** (1 / 3))


def test_arithmetic_is_left_however_fast_memory_is():
    """Where all of the time is waiting: no less than a full batch takes for each of its tokens."""
    costs = kernel_costs("Q8_0", bandwidth=BANDWIDTH / 10)
    costs["Q8_0"] = {**costs["Q8_0"], "tile": [0.0] * len(COUNTS)}
    costs["Q8_0"]["group"] = [GROUP] + [GROUP * count / 4 for count in COUNTS[1:]]
    told = Predictor(costs, 1, 1e20).moment(VIEW, part("layers.0.ffn.down"), ONE_TOKEN)
    assert told == pytest.approx(FIXED + 8 * 8 * GROUP / 4)


def test_many_tokens_do_not_wait_for_memory():
    shape, down = BatchShape(((64, 0),), 1), part("layers.0.ffn.down")
    times = [predictor(bandwidth=b).moment(VIEW, down, shape) for b in (1e8, 1e12)]
    assert times[0] == times[1]


def test_attention_takes_whole_tiles_of_heads_on_each_thread():
    """Two key-value heads: three threads are no faster than two."""
    attend = part("layers.0.attention.attend")
    one, two, three = (predictor(t).moment(VIEW, attend, ONE_TOKEN) - GAP for t in (1, 2, 3))
    assert one == pytest.approx(2 * two)
    assert two == pytest.approx(three)


def test_attention_of_many_keys_is_cut_into_splits():
    """Nine splits of each of two heads are enough for three threads, and for four almost."""
    attend, shape = part("layers.0.attention.attend"), BatchShape(((1, 9 * SPLIT - 1),), 1)
    times = [predictor(t, 1e20).moment(VIEW, attend, shape) - GAP for t in (1, 2, 3, 4)]
    assert times[0] == pytest.approx(2 * times[1]) == pytest.approx(3 * times[2])
    assert times[3] == pytest.approx(times[0] * 5 / 18)


def test_attention_features_are_those_of_the_pages():
    rows = attention_features([(1, 40), (20, 31)], 8, 2, 16)
    keys = np.array([64, 64, 64])  # 41, 47 and 51 keys, in pages of 32
    tokens = np.array([1, 16, 4])
    assert rows[:, 0].tolist() == (keys * 16).tolist()
    assert rows[:, 1].tolist() == (keys * 16 * 4 * tokens).tolist()
    assert rows[:, 2].tolist() == [1, 1, 1]
    # Of 33 tokens the one at 40 sees those from 8 on; the ones at 31 to 46 begin before them.
    rows = attention_features([(1, 40), (16, 70)], 8, 2, 16, 33)
    assert rows[:, 0].tolist() == [64 * 16, 64 * 16]


def test_smaller_keys_save_at_most_their_share():
    long = BatchShape(((1, 4000),), 1)
    attend = part("layers.0.attention.attend")
    halved = replace(VIEW, kv="int8")
    slow = predictor(bandwidth=1.0)
    full, half = (slow.moment(each, attend, long) for each in (VIEW, halved))
    assert half == pytest.approx(full * (VIEW.head_dim + 2) / (2 * VIEW.head_dim))
    fast = predictor(bandwidth=1e20)
    assert fast.moment(halved, attend, long) == pytest.approx(fast.moment(VIEW, attend, long))


def test_a_step_is_its_moments_and_what_python_takes():
    asked = predictor()
    inside = sum(asked.moment(VIEW, each, ONE_TOKEN) for each in VIEW.parts)
    assert asked.step(VIEW, ONE_TOKEN) == pytest.approx(inside + STEP + SEQUENCE + 512 * LOGIT)


def test_a_prompt_is_cut_as_the_engine_cuts_it():
    shapes = prefill_shapes(VIEW, Settings(prompt_tokens=100, batch=2))
    assert shapes == [
        BatchShape(((64, 0),), 0),
        BatchShape(((36, 64), (28, 0)), 1),
        BatchShape(((64, 28),), 0),
        BatchShape(((8, 92),), 1),
    ]


def test_the_shapes_of_prompts_are_those_that_the_engine_runs(tmp_path):
    from cyclewise.engine.engine import Engine, Request
    from cyclewise.machine.stamps import Stamps

    path = tmp_path / "tiny.gguf"
    write(path, Tiny(vocab=260, context=2048, format="Q8_0"))
    model = load_model(path, threads=1)
    try:
        seen = View.of(model)
        stamps = Stamps(len(model.program.moments), 1, 8)
        model.machine.clock(stamps)
        engine = Engine(model)
        requests = []
        for _ in range(3):
            sequence = engine.new_sequence()
            sequence.reserve(400)
            requests.append(Request(sequence, np.ones(400, np.int32), "last"))
        while any(request.num_left for request in requests):
            engine.step(requests)
        settings = Settings(prompt_tokens=400, batch=3)
        assert stamps.shapes == tuple(prefill_shapes(seen, settings))
        assert seen.weight_bytes == model.program.weight_bytes
        assert seen.formats == ("Q8_0",)
        assert sum(cost(each.form, ONE_TOKEN).bytes for each in seen.parts) > seen.weight_bytes
    finally:
        model.close()


def test_times_are_of_all_prompts_and_of_a_step_in_the_middle():
    asked, settings = predictor(2), Settings(prompt_tokens=100, generate_tokens=9, batch=2)
    times = asked.times(VIEW, settings)
    assert times.first_token == sum(asked.step(VIEW, s) for s in prefill_shapes(VIEW, settings))
    assert times.per_token == asked.step(VIEW, BatchShape(((1, 104), (1, 104)), 2))
    assert times.tokens_per_second(2) == 2 / times.per_token


def test_between_measured_counts_the_line():
    values = [float(count**2) for count in COUNTS]
    assert [between(values, count) for count in COUNTS] == values
    assert between(values, 5) == (16 + 36) / 2
    assert between(values, 10_000) == 512**2


@pytest.mark.parametrize("truth", [(1.0, 2.0, 3.0), (0.0, 2.0, 0.5), (4.0, 0.0, 0.0)])
def test_nonnegative_finds_what_made_the_rows(truth):
    rows = np.random.default_rng(0).uniform(0.5, 5, (6, 3))
    design = rows / (rows @ truth)[:, None]
    assert nonnegative(design) == pytest.approx(truth, abs=1e-9)


def test_nonnegative_never_pays_with_a_negative():
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    falling = np.array([3.0, 2.0, 1.0])
    found = nonnegative(rows / falling[:, None])
    assert (found >= 0).all() and found.any()
