from __future__ import annotations

import gguf
import numpy as np
import pytest

from cyclewise.errors import InvalidParameterError, ModelFileError
from cyclewise.llm import LLM
from cyclewise.machine import packed
from cyclewise.models import load_model
from cyclewise.weights.quantize import QUANTIZED, choose_format, quantize_rows
from cyclewise.weights.source import open_source
from tests import naive
from tests.machine.kernel_calls import llama_cpp_rows
from tests.weights import build, layouts
from tests.weights.directories import write


def weights(seed=0, rows=16, columns=512):
    """Rows as weights are; some far from zero, with few large values, all equal, or zero."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    values[1] += 0.2
    values[2, ::50] *= 20
    values[3], values[4], values[5] = 0, 0.3, -0.3
    values[6, :300] = 0
    values[7] = np.abs(values[7])
    values[8] *= 1e-6
    return values


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_blocks_are_those_of_the_gguf_package(name):
    values = weights()
    want = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(quantize_rows(values, name), want)


def squared_error(name, values):
    rows = quantize_rows(values, name)
    found = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])
    assert np.isfinite(found).all()
    return ((found - values).astype(np.float64) ** 2).sum()


def test_q4_1_has_a_smaller_error_than_the_plain_grid():
    values = weights()
    plain = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    error = (gguf.quants.dequantize(plain, gguf.GGMLQuantizationType.Q4_1) - values) ** 2
    assert squared_error("Q4_1", values) < 0.85 * error.sum()


def weights_of_blocks(number):
    """What `make_blocks.py` drew for its format of that number."""
    rng = np.random.default_rng(0)
    for _ in range(number + 1):
        values = rng.standard_normal((4, 256)) * 0.05
        values[1] += 0.1
        values[2, rng.integers(0, 256, 5)] *= 20
    return values.astype(np.float32)


@pytest.mark.parametrize(("name", "number"), [("Q4_1", 1), ("Q4_K", 7)])
def test_errors_are_no_larger_than_llama_cpps(name, number):
    values, (blocks, theirs) = weights_of_blocks(number), llama_cpp_rows(name)
    assert blocks.shape == quantize_rows(values, name).shape
    error = ((theirs - values).astype(np.float64) ** 2).sum()
    assert 1e-4 < error / (values**2).sum() < 0.02
    assert squared_error(name, values) <= 1.03 * error


def test_equal_weights_and_zeros_are_kept():
    values = np.zeros((3, 256), np.float32)
    values[1], values[2] = 0.25, -0.25
    for name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K"):
        rows = quantize_rows(values, name)
        found = naive.dequantize(name, rows)
        assert (found[0] == 0).all()
        np.testing.assert_allclose(found, values, rtol=0.01)


def test_which_format_a_tensor_takes():
    for choice, name, shape, want in (
        ("q8_0", "blk.0.ffn_up.weight", (8, 64), "Q8_0"),
        ("q4_0", "blk.0.ffn_up.weight", (8, 64), "Q4_0"),
        ("q4_k", "blk.0.ffn_up.weight", (8, 512), "Q4_K"),
        ("q4_k", "blk.0.ffn_up.weight", (8, 576), "Q4_1"),
        ("q4_k", "blk.0.ffn_up.weight", (8, 80), None),
        ("q4_k", "output.weight", (8, 512), "Q8_0"),
        ("q4_0", "token_embd.weight", (8, 512), "Q8_0"),
        ("q4_k", "blk.0.attn_norm.weight", (512,), None),
        ("q4_k", "blk.0.ffn_gate_inp.weight", (8, 512), None),
        ("q4_k", "position_embd.weight", (8, 512), None),
    ):
        found = choose_format(name, shape, choice)
        assert (found and found.name) == want


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of float weights, with rows of 128 and of 256."""
    _, floats = layouts.write_both(tmp_path_factory.mktemp("model"), "bytes")
    return floats


def test_a_directory(folder):
    for choice, formats in (
        ("q8_0", {"Q8_0", "F32"}),
        ("q4_0", {"Q8_0", "Q4_0", "F32"}),
        ("q4_k", {"Q8_0", "Q4_K", "Q4_1", "F32"}),
    ):
        with open_source(folder, choice) as source, open_source(folder) as plain:
            assert {tensor.format.name for tensor in source.tensors.values()} == formats
            assert source.variant == f"quantize={choice}" and plain.variant == ""
            for name, tensor in source.tensors.items():
                shape, data = plain.tensors[name].shape, plain.data(name)
                if len(shape) == 2:
                    values = data.view(np.float32).reshape(shape)
                    data = quantize_rows(values, tensor.format.name).reshape(-1)
                assert tensor.shape == shape and source.data(name).nbytes == tensor.nbytes
                assert source.data(name).tobytes() == data.tobytes()
                source.release(name)
            assert QUANTIZED not in plain.metadata
            described = source.metadata[QUANTIZED]
    assert described == "Q4_K, embedding and output Q8_0, 12 of rows of 128 as Q4_1"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_floats(tmp_path, folder, dtype):
    with open_source(folder) as source:
        values = source.data("blk.0.ffn_down.weight").view(np.float32).reshape(128, 256)
    if dtype == "F16":
        halves = values.astype(np.float16)
        exact = halves.astype(np.float32)
    else:
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        exact = (halves.astype(np.uint32) << 16).view(np.float32)
    tensors = {"model.layers.0.mlp.down_proj.weight": halves}
    write(tmp_path, layouts.CONFIG | {"tie_word_embeddings": True}, tensors)
    with open_source(tmp_path, "q4_k") as source:
        assert source.data("blk.0.ffn_down.weight").tobytes() == (
            quantize_rows(exact, "Q4_K").tobytes()
        )


def test_the_second_start_finds_it_in_the_cache(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(packed, "_folder", lambda: tmp_path / "packed")
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    monkeypatch.setattr(packed, "FREE_SHARE", 0)
    formats = []
    for choice in ("q8_0", "q4_0", None):
        load_model(folder, threads=1, quantize=choice).close()
    assert len(list((tmp_path / "packed").iterdir())) == 3

    def nothing(*_):
        raise AssertionError("it was quantized again")

    monkeypatch.setattr("cyclewise.weights.directory.quantize_rows", nothing)
    for choice in ("q8_0", "q4_0"):
        model = load_model(folder, threads=1, quantize=choice)
        formats.append(set(model.format_bytes))
        model.close()
    assert formats == [{"Q8_0", "F32"}, {"Q8_0", "Q4_0", "F32"}]


def test_what_cannot_be_quantized(tmp_path, folder):
    with pytest.raises(InvalidParameterError, match="'q5_0'; weights are quantized to q8_0, q4_0"):
        open_source(folder, "q5_0")
    (tmp_path / "model.gguf").write_bytes(build.small_model())
    with pytest.raises(InvalidParameterError, match="a GGUF file is run as it is"):
        open_source(tmp_path / "model.gguf", "q8_0")
    ours, _ = layouts.write_both(tmp_path, "awq")
    with pytest.raises(InvalidParameterError, match=r"quantized already \(awq\)"):
        open_source(ours, "q8_0")
    with pytest.raises(InvalidParameterError, match="'q5_0'"):
        LLM(str(folder), quantize="q5_0")


def test_a_weight_that_is_no_number(tmp_path, folder):
    values = weights()
    values[9, 3] = np.nan
    tensors = {"model.layers.0.mlp.down_proj.weight": values}
    write(tmp_path, layouts.CONFIG | {"tie_word_embeddings": True}, tensors)
    with (
        open_source(tmp_path, "q4_k") as source,
        pytest.raises(ModelFileError, match=r"down_proj\.weight' holds a weight that is no number"),
    ):
        source.data("blk.0.ffn_down.weight")


def test_it_shows_how_far_it_is(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with open_source(folder, "q4_k") as source:
        assert capsys.readouterr().err == ""
        source.data("output.weight")
    assert "quantizing to q4_k" in capsys.readouterr().err
