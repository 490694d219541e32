"""Blocks made by llama.cpp's own quantizer, for the tests of formats: writes `blocks.npz` beside.

    python tests/weights/make_blocks.py

Runs in an interpreter that has llama-cpp-python and gguf (which the tests do not need for it). A
file with one random matrix for each format goes through `llama_model_quantize`; what comes out is
kept with the values that llama.cpp dequantizes it to: `NAME.blocks` uint8 (rows, row bytes) and
`NAME.values` float32 (rows, columns).
"""

from __future__ import annotations

import ctypes
import pathlib
import tempfile

import gguf
import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np

FORMATS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS", "MXFP4",
)  # fmt: skip
ROWS, COLUMNS = 4, 256


def matrix(rng: np.random.Generator) -> np.ndarray:
    """Rows as weights are, one of them far from zero, one with few large values."""
    values = rng.standard_normal((ROWS, COLUMNS)) * 0.05
    values[1] += 0.1
    values[2, rng.integers(0, COLUMNS, 5)] *= 20
    return values.astype(np.float32)


def write_source(path: pathlib.Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(len(FORMATS))
    writer.add_context_length(32)
    writer.add_embedding_length(COLUMNS)
    writer.add_feed_forward_length(COLUMNS)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    rng = np.random.default_rng(0)
    for layer in range(len(FORMATS)):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", matrix(rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: pathlib.Path, target: pathlib.Path) -> None:
    """Every layer's matrix in the format that its number stands for."""
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype = api.LLAMA_FTYPE_MOSTLY_Q8_0
    overrides = (api.llama_model_tensor_override * (len(FORMATS) + 1))()
    for layer, name in enumerate(FORMATS):
        overrides[layer].pattern = rf"blk\.{layer}\.ffn_up\.weight".encode()
        overrides[layer].type = gguf.GGMLQuantizationType[name].value
    parameters.tt_overrides = ctypes.cast(
        overrides, ctypes.POINTER(api.llama_model_tensor_override)
    )
    status = api.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    if status:
        raise RuntimeError(f"llama.cpp returned {status}")


def dequantized(name: str, blocks: np.ndarray) -> np.ndarray:
    """What llama.cpp makes of the rows."""
    library = next((pathlib.Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so"))
    small = name.lower().replace("_k", "_K")
    convert = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{small}")
    values = np.zeros((ROWS, COLUMNS), np.float32)
    for row, out in zip(blocks, values, strict=True):
        convert(ctypes.c_void_p(row.ctypes.data), ctypes.c_void_p(out.ctypes.data),
                ctypes.c_int64(COLUMNS))  # fmt: skip
    return values


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = (pathlib.Path(folder) / name for name in ("source.gguf", "target.gguf"))
        write_source(source)
        quantize(source, target)
        kept = {}
        for tensor in gguf.GGUFReader(target).tensors:
            name = FORMATS[int(tensor.name.split(".")[1])]
            assert tensor.tensor_type.name == name, (name, tensor.tensor_type)
            blocks = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(ROWS, -1)
            kept[f"{name}.blocks"], kept[f"{name}.values"] = blocks, dequantized(name, blocks)
    np.savez_compressed(pathlib.Path(__file__).with_name("blocks.npz"), **kept)


if __name__ == "__main__":
    main()
