from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cyclewise.errors import CyclewiseError, ModelFileError, UnsupportedModelError
from cyclewise.machine.kernels.blocks import tile_bytes
from cyclewise.machine.machine import Chunk
from cyclewise.models import load_model
from cyclewise.weights.published import read_layout
from cyclewise.weights.quantize import QUANTIZED
from cyclewise.weights.rows import make_rows
from cyclewise.weights.safetensors import SafetensorsFile
from cyclewise.weights.source import open_source
from tests.machine.test_packing import dequantized
from tests.weights import build, layouts
from tests.weights.layouts import LAYOUTS, write_both

MADE = np.load(Path(__file__).with_name("published.npz"))
CASES = sorted({name.partition(".")[0] for name in MADE})


def layout_of(case):
    """The layout that the configuration of a case names, and its smallest blocks."""
    kind, *rest = case.split("_")
    if kind == "gptq":
        settings = {"quant_method": "gptq", "bits": int(rest[0]), "group_size": int(rest[1])}
    elif kind == "awq":
        settings = {"quant_method": "awq", "bits": 4, "group_size": int(rest[0])}
    elif kind == "packed":
        settings = layouts.compressed("pack-quantized", int(rest[0]))
    else:
        settings = layouts.compressed("int-quantized", 8)
    return read_layout({"quantization_config": settings}, "config.json")


def read(path, tensors, layout):
    """The blocks' format and the weights that they hold."""
    path.write_bytes(build.safetensors({f"m.{name}": value for name, value in tensors.items()}))
    with SafetensorsFile(path) as file:
        matrix, used = layout.matrix("m", dict.fromkeys(tensors, file))
        assert set(used) | {"bias"} == set(tensors) | {"bias"}
        rows = make_rows(matrix.rows, matrix.columns, matrix.row_bytes, matrix.writer())
    name = matrix.format.name
    return name, dequantized(name, rows.reshape(matrix.rows, -1))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_layouts_own_tools(tmp_path, case):
    tensors = {name.partition(".")[2]: MADE[name] for name in MADE if name.startswith(case + ".")}
    want = tensors.pop("weights")
    name, got = read(tmp_path / "m.safetensors", tensors, layout_of(case))
    size = [int(part) for part in case.split("_") if part in ("32", "64", "128")]
    bits = 8 if "8" in case.split("_") or case.startswith("bytes") else 4
    assert name == f"I{bits}_{(size or [128])[0]}"
    np.testing.assert_array_equal(got, want)


def logits(path):
    """Of sixty tokens, and the formats of the weights."""
    model = load_model(path, threads=1)
    try:
        pages = np.arange(model.machine.num_pages, dtype=np.int32)
        found = model.machine.step(list(range(60)), [Chunk(0, 60, 0, pages)], range(60))
        return found.astype(np.float64), set(model.format_bytes)
    finally:
        model.close()


def log_softmax(values):
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_near_those_of_the_same_weights_in_float(tmp_path, layout):
    ours, floats = write_both(tmp_path, layout)
    (got, formats), (want, _) = logits(ours), logits(floats)
    bits, group, _ = LAYOUTS[layout][2]
    # What the configuration leaves out is float as it was; what has no blocks of ours is Q8_0.
    integers = "Q8_0" if "order" in layout else f"I{bits}_{group if group > 0 else 128}"
    assert formats == {"F32", integers}
    p, q = log_softmax(want), log_softmax(got)
    assert (np.exp(p) * (p - q)).sum(-1).mean() < 1e-3


@pytest.mark.parametrize("layout", ["gptq_order", "packed_8_order"])
def test_columns_in_the_order_of_their_importance(tmp_path, layout):
    """Their weights are within half a step of Q8_0, and `info` says that they are no codes."""
    ours, floats = write_both(tmp_path, layout)
    name = "blk.0.ffn_down.weight"
    with open_source(ours) as source, open_source(floats) as exact:
        assert source.metadata[QUANTIZED] == "Q8_0 for 13 matrices in act-order"
        got = dequantized("Q8_0", source.data(name).reshape(source.tensors[name].shape[0], -1))
        want = exact.data(name).view(np.float32).reshape(got.shape)
    largest = np.abs(want).reshape(-1, 32).max(1, keepdims=True)
    assert (np.abs(got - want).reshape(-1, 32) <= largest / 254 * 1.13).all()


def test_an_order_that_is_not_known(tmp_path):
    """compressed-tensors begins with -1 everywhere: neighbours."""
    ours, _ = write_both(
        tmp_path, "packed_4", tensors={DOWN + "weight_g_idx": np.full(256, -1, np.int32)}
    )
    with open_source(ours) as source:
        assert source.tensors["blk.1.ffn_down.weight"].format.name == "I4_128"
        assert QUANTIZED not in source.metadata


@pytest.mark.parametrize("layout", ["gptq_v2", "awq", "packed_8", "bytes"])
def test_bytes_of_the_model(tmp_path, layout):
    """Nothing is expanded: what is streamed is at most 3 % more than codes and scales."""
    ours, _ = write_both(tmp_path, layout)
    with open_source(ours) as source:
        tensor = source.tensors["blk.0.ffn_up.weight"]
        name = tensor.format.name
        bits, group, _ = LAYOUTS[layout][2]
        assert source.data(tensor.name).nbytes == tensor.nbytes
        source.release(tensor.name)
    columns = 4096
    least = 16 * (columns * bits // 8 + 2 * columns // (group if group > 0 else columns))
    if bits == 8:
        assert tile_bytes(name, columns) <= 1.03 * least
    else:
        zero_points = 16 * columns // group
        assert tile_bytes(name, columns) <= 1.03 * (least + zero_points)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_scales_that_are_no_float16(tmp_path, dtype):
    made = layouts.Integers(np.random.default_rng(1), 16, 128, 8, -1, False)
    scales = np.geomspace(2**-20, 2**-4, 16).astype(np.float32)[:, None]
    bits = scales.view(np.uint32) & np.uint32(0xFFFF0000 if dtype == np.uint16 else 0xFFFFFFFF)
    scales = bits.view(np.float32)
    tensors = layouts.signed_bytes(made)
    tensors["weight_scale"] = (bits >> 16).astype(dtype) if dtype == np.uint16 else scales
    layout = layout_of("bytes_channel")
    _, got = read(tmp_path / "m.safetensors", tensors, layout)
    want = (made.codes - 128).astype(np.float32) * scales
    if dtype == np.uint16:
        exact = scales[:, 0] >= 2**-17
        np.testing.assert_array_equal(got[exact], want[exact])
    bound = np.maximum(scales * 2.0**-11, 2.0**-25) * np.abs(made.codes - 128)
    assert (np.abs(got - want) <= bound).all()


DOWN = "model.layers.1.mlp.down_proj."


def refused(folder, kind, reason):
    with pytest.raises(kind, match=reason) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value) and isinstance(caught.value, CyclewiseError)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quantization by 'bitsandbytes' is not supported"),
        ({"quant_method": "fp8"}, "by 'fp8' is not"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "by 'modelopt' is not"),
        ({}, "by None is not"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ with bits: 3 is not"),
        ({"quant_method": "gptq", "bits": 2, "group_size": 128}, "GPTQ with bits: 2 is not"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin' is not",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": True},
            "'marlin' is not",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "'gemv' is not"),
        ({"quant_method": "awq", "bits": 3, "group_size": 128}, "AWQ with bits: 3"),
        (layouts.compressed("float-quantized", 8), "format 'float-quantized' is not"),
        (layouts.compressed("nvfp4-pack-quantized", 4), "format 'nvfp4-pack-quantized' is not"),
        (
            layouts.compressed("pack-quantized", 4) | {"sparsity_config": {"format": "bitmask"}},
            "sparse format 'bitmask' is not",
        ),
        (layouts.compressed("marlin-24", 4), "format 'marlin-24' is not"),
        (layouts.compressed("pack-quantized", 3), "pack-quantized with bits: 3"),
        (layouts.compressed("int-quantized", 4), "int-quantized with bits: 4"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, settings, reason):
    ours, _ = write_both(tmp_path, "bytes")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    refused(ours, UnsupportedModelError, reason + ".*take the float weights, a GGUF file, or")


@pytest.mark.parametrize(
    "settings",
    [
        3,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 3}}},
        {"quant_method": "compressed-tensors", "sparsity_config": 3},
    ],
)
def test_a_damaged_configuration(tmp_path, settings):
    ours, _ = write_both(tmp_path, "bytes")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    refused(ours, ModelFileError, "quantization_config.*should be")


@pytest.mark.parametrize(
    ("layout", "kind", "value", "reason"),
    [
        ("gptq_asym", "g_idx", np.arange(256, dtype=np.int32) // 32, "none of the 4 there are"),
        ("gptq_asym", "g_idx", np.arange(256) // 64 - 1, "none of the 4 there are"),
        ("gptq_asym", "g_idx", np.zeros(8, np.int32), r"g_idx should have the shape \(256,\)"),
        ("gptq_asym", "scales", np.ones((2, 128), np.float16), r"scales .* the shape \(4, 128\)"),
        ("gptq_asym", "qweight", np.ones((32, 128), np.int64), "2 dimensions of I32"),
        ("gptq_asym", "bias", np.ones(7, np.float16), "shape"),
        ("gptq_asym", "other", np.ones(8, np.float16), "no tensor 'model.*other'"),
        ("awq", "qzeros", np.ones((4, 8), np.int32), r"qzeros .* the shape \(4, 16\)"),
        ("packed_4", "weight_shape", np.array([128, 99]), "rows of 99 codes, not 32 words"),
        ("packed_4", "weight_shape", np.array([-1, 256]), "the shape"),
        ("packed_4", "weight_scale", np.ones((128, 3), np.float16), r"not \(128, 3\)"),
        ("packed_4", "weight_scale", np.ones((128, 16), np.float16), "groups of 16 of 256"),
        ("bytes", "weight_zero_point", np.ones((5, 1), np.int8), r"shape \(128, 1\)"),
        ("bytes", "weight", np.ones((8, 256), np.float32), "2 dimensions of I8"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, layout, kind, value, reason):
    ours, _ = write_both(tmp_path, layout, tensors={DOWN + kind: value})
    with pytest.raises((ModelFileError, UnsupportedModelError), match=reason):
        load_model(ours, threads=1)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e6])
def test_a_scale_that_is_no_number(tmp_path, value):
    scales = np.full((128, 1), value, np.float32)
    ours, _ = write_both(tmp_path, "bytes", tensors={DOWN + "weight_scale": scales})
    with pytest.raises(ModelFileError, match="a scale that is no float16 number"):
        load_model(ours, threads=1)


def test_a_missing_tensor(tmp_path):
    ours, _ = write_both(tmp_path, "awq")
    file = ours / "model.safetensors"
    file.write_bytes(
        file.read_bytes().replace(b"1.mlp.down_proj.qzeros", b"1.mlp.down_proj.q_eros")
    )
    refused(ours, ModelFileError, "down_proj': tensor qzeros is missing")


def test_scales_of_activations_are_left_out(tmp_path):
    scale = {DOWN + "input_scale": np.ones(1, np.float32)}
    ours, _ = write_both(tmp_path, "bytes", tensors=scale)
    with open_source(ours) as source:
        assert len(source.tensors) == 21


def test_the_configuration_in_a_file_of_its_own(tmp_path):
    ours, _ = write_both(tmp_path, "gptq_sym")
    config = json.loads((ours / "config.json").read_text())
    beside = config.pop("quantization_config")
    beside.pop("quant_method")
    (ours / "config.json").write_text(json.dumps(config))
    (ours / "quantize_config.json").write_text(json.dumps(beside))
    with open_source(ours) as source:
        assert source.tensors["blk.0.ffn_up.weight"].format.name == "I4_128"
        assert "blk.0.ffn_up.bias" not in source.tensors
