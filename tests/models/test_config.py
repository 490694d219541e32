from __future__ import annotations

import math

import numpy as np
import pytest

from cyclewise.errors import InvalidParameterError, ModelFileError, UnsupportedModelError
from cyclewise.models.config import Rope, read_config
from cyclewise.models.rope import rope_tables

KEYS = {
    "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
    "context_length": 9000, "block_count": 7, "feed_forward_length": 96,
    "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip


def config(architecture="llama", context=None, more=(), **keys):
    """`keys` with __ for a point."""
    whole = KEYS | {key.replace("__", "."): value for key, value in keys.items()}
    metadata = {f"{architecture}.{key}": value for key, value in whole.items()}
    return read_config(metadata | dict(more), architecture, 100, context)


def test_what_a_plain_file_means():
    plain = config()
    assert plain.context_length == 4096 and plain.trained_context == 9000
    assert plain.rope == Rope(16, 10000.0, neighbours=True, original_context=9000)
    assert plain.query_scale == 0.25 and plain.local_rope is None
    assert [plain.window(layer) for layer in range(7)] == [None] * 7
    assert plain.attention_softcap is None and plain.logit_softcap is None
    assert not config("qwen2").rope.neighbours
    assert not config(more={"cyclewise.rope_halves": True}).rope.neighbours


def test_windows():
    def local(architecture, **keys):
        found = config(architecture, attention__sliding_window=32, **keys)
        windows = [found.window(layer) for layer in range(7)]
        assert set(windows) <= {None, 32}
        return [window is not None for window in windows]

    assert local("llama") == [True] * 7
    assert local("gemma2") == [True, False, True, False, True, False, True]
    assert local("gemma3") == [True, True, True, True, True, False, True]
    assert local("gemma3", attention__sliding_window_pattern=3) == [True, True, False] * 2 + [True]
    pattern = [True, False, False, True, True, False, True]
    for array in (pattern, np.array(pattern)):
        assert local("gemma3", attention__sliding_window_pattern=array) == pattern
    assert config("gemma3", attention__sliding_window=0).windows == ()
    for wrong in ([True] * 6, "6", -1, True, 1.5):
        with pytest.raises(ModelFileError, match="sliding_window_pattern"):
            local("gemma3", attention__sliding_window_pattern=wrong)


def test_the_largest_gemmas_scale_their_queries_by_another_size():
    assert config("gemma2", block_count=46, attention__key_length=8).query_scale == 0.25
    assert config("gemma3", block_count=62, attention__key_length=8).query_scale == 0.25
    assert config("gemma3", attention__key_length=64).query_scale == 0.125
    assert config("gemma3", attention__scale=0.7).query_scale == 0.7


def test_gemma_3_rotates_by_two_bases():
    gemma = config("gemma3", rope__freq_base=1e6)
    assert gemma.local_rope is not None
    assert (gemma.rope.base, gemma.local_rope.base) == (1e6, 1e4)
    scaled = config("gemma3", rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert (scaled.rope.factor, scaled.local_rope.factor) == (8.0, 1.0)
    assert config("gemma3", rope__freq_base_swa=5e3).local_rope.base == 5e3


def test_a_context_that_changes_every_angle_must_be_asked_for():
    keys = {"rope__scaling__type": "dynamic", "rope__scaling__factor": 2.0}
    assert config(**keys | {"context_length": 300}).context_length == 300
    assert config(context=600, **keys | {"context_length": 300}).context_length == 600
    with pytest.raises(InvalidParameterError, match="1 to 600"):
        config(context=601, **keys | {"context_length": 300})
    long = {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 100}
    assert config(**long).context_length == 100
    assert config(context=9000, **long).context_length == 9000


def test_rope_that_is_not_known_or_cannot_be():
    with pytest.raises(UnsupportedModelError, match="'mrope' is not supported; none, linear"):
        config(rope__scaling__type="mrope")
    with pytest.raises(UnsupportedModelError, match="one pair"):
        config(rope__scaling__type="dynamic", rope__dimension_count=2)
    for base in (1.0, 0.5, -3.0, 0.0, math.nan, math.inf):
        with pytest.raises(ModelFileError, match="freq_base"):
            config(rope__freq_base=base)
    with pytest.raises(ModelFileError, match="factor"):
        config(rope__scaling__type="linear", rope__scaling__factor=-2.0)


ARRAYS = ([], ["yarn"], np.array([1, 2]), np.array([True] * 100), np.array([], np.int32))
NUMBERS = [
    "rope.scaling.type", "rope.scaling.attn_factor", "attention.sliding_window", "expert_count",
    "expert_weights_norm", "attention.scale", "rope.freq_base_swa", "attn_logit_softcapping",
    "rope.dimension_count", "rope.freq_base", "block_count", "attention.head_count",
]  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_an_array_in_the_place_of_a_number(key):
    for array in ARRAYS:
        with pytest.raises(ModelFileError, match=key) as caught:
            config("phi3", **{key: array})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_name_is_one_line_of_text():
    for given, name in (("Tiny 1", "Tiny 1"), ("a\x1b]0;b\a\nc", "a]0;bc"), (3, "3")):
        assert config(more={"general.name": given}).name == name
    assert len(config(more={"general.name": "x" * 10**6}).name) == 200


def test_a_factor_that_would_make_angles_infinite():
    for number in (1e-300, 5e-324):
        with pytest.raises(ModelFileError, match="factor"):
            config(rope__scaling__type="linear", rope__scaling__factor=number)
        with pytest.raises(ModelFileError, match="beta_slow"):
            config(rope__scaling__type="yarn", rope__scaling__yarn_beta_slow=number)

    class Factors(Kept):
        def __contains__(self, name):
            return True

        def vector(self, name, length):
            return np.array([*([1.0] * (length - 1)), self.last, 0.0], np.float32)

    factors = Factors()
    for factors.last in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ModelFileError, match="rope_freqs"):
            rope_tables(Rope(16, 1e4), 50, factors)


class Kept:
    """Stands for weights without factors."""

    def __contains__(self, name):
        return False

    def keep(self, array):
        return array


@pytest.mark.parametrize("rope", [
    Rope(16, 1e4), Rope(16, 1e4, scaling="linear", factor=1e9),
    Rope(16, 1e4, scaling="dynamic", factor=1e9, original_context=1),
    Rope(2, 1.0001, scaling="yarn", factor=1e9, original_context=1),
    Rope(16, 1e9, scaling="yarn", factor=1e-9, original_context=1 << 30, beta_fast=1e-9),
])  # fmt: skip
def test_tables_are_finite_whatever_a_file_says(rope):
    for table in rope_tables(rope, 50, Kept()):
        assert table.shape == (50, rope.dim // 2) and table.dtype == np.float32
        assert np.isfinite(table).all()


def test_positions_turn_pairs():
    cosines, sines = rope_tables(Rope(4, 100.0, attention_factor=2.0), 9, Kept())
    angles = np.arange(9)[:, None] * [1.0, 0.1]
    np.testing.assert_allclose(cosines, 2 * np.cos(angles), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sines, 2 * np.sin(angles), rtol=1e-6, atol=1e-6)


def test_a_mixture_of_experts_says_how_many():
    with pytest.raises(ModelFileError, match=r"lacks qwen3moe\.expert_count"):
        config("qwen3moe")
    assert config("qwen3moe", expert_count=4, expert_used_count=2).num_experts == 4
    assert config().num_experts == 0
