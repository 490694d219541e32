"""A small Llama in the published layouts of quantized weights, written code by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.weights.directories import Arrays, config, write

HIDDEN, WIDE, VOCAB = 128, 256, 96
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (64, HIDDEN),
    "self_attn.v_proj": (64, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
CONFIG = config(
    "llama", hidden_size=HIDDEN, intermediate_size=WIDE, vocab_size=VOCAB, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


class Integers:
    """A random matrix of codes, and scales and zero points of its groups."""

    def __init__(
        self, rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, asym: bool
    ) -> None:
        groups = columns // group if group > 0 else 1
        self.bits, self.group = bits, columns // groups
        self.groups = np.arange(columns, dtype=np.int32) // np.int32(self.group)
        self.codes = rng.integers(0, 1 << bits, (rows, columns))
        half = 1 << (bits - 1)
        spread = half // 2 if asym else 0
        self.zero_points = half + rng.integers(-spread, spread + 1, (rows, groups))
        size = columns**-0.5 / half * 1.5
        self.scales = (size * rng.uniform(0.5, 1.5, (rows, groups))).astype(np.float16)

    @property
    def weights(self) -> NDArray[np.float32]:
        zero_points, scales = self.zero_points[:, self.groups], self.scales[:, self.groups]
        return (self.codes - zero_points).astype(np.float32) * scales.astype(np.float32)


def words(codes: NDArray[Any], bits: int, order: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Each row's codes in words; `order`: which of a word's codes comes first, second, ..."""
    per_word = 32 // bits
    found = np.zeros((len(codes), -(-codes.shape[1] // per_word)), np.uint32)
    for place in range(found.shape[1] * per_word):
        word, within = divmod(place, per_word)
        column = word * per_word + (within if order is None else order[within])
        if column < codes.shape[1]:
            found[:, word] |= codes[:, column].astype(np.uint32) << np.uint32(bits * within)
    return found.view(np.int32)


def gptq(made: Integers, version: int = 1) -> Arrays:
    stored = (made.zero_points - (version == 1)) & ((1 << made.bits) - 1)
    return {
        "qweight": words(made.codes, made.bits).T.copy(),
        "qzeros": words(stored.T.copy(), made.bits), "scales": made.scales.T.copy(),
        "g_idx": made.groups,
        "bias": np.zeros(len(made.codes), np.float16),
    }  # fmt: skip


def awq(made: Integers) -> Arrays:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(made.codes.T.copy(), 4, order),
        "qzeros": words(made.zero_points.T.copy(), 4, order), "scales": made.scales.T.copy(),
    }  # fmt: skip


def packed(made: Integers) -> Arrays:
    found = {
        "weight_packed": words(made.codes, made.bits), "weight_scale": made.scales,
        "weight_shape": np.array(made.codes.shape, np.int64),
    }  # fmt: skip
    if (np.diff(made.groups) < 0).any():
        found["weight_g_idx"] = made.groups
    if (made.zero_points != 1 << (made.bits - 1)).any():
        found["weight_zero_point"] = words(made.zero_points.T.copy(), made.bits).T.copy()
    return found


def signed_bytes(made: Integers) -> Arrays:
    found = {"weight": (made.codes - 128).astype(np.int8), "weight_scale": made.scales}
    if (made.zero_points != 128).any():
        found["weight_zero_point"] = (made.zero_points - 128).astype(np.int8)
    return found


def compressed(kind: str, bits: int) -> dict[str, Any]:
    """compressed-tensors' `quantization_config`."""
    weights = {"num_bits": bits, "type": "int"}
    return {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


LAYOUTS: dict[str, tuple[dict[str, Any], Any, tuple[int, int, bool]]] = {
    "gptq_sym": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, gptq, (4, 128, False)),
    "gptq_asym": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, gptq, (4, 64, True)),
    "gptq_v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        lambda made: gptq(made, 2), (4, 32, True),
    ),
    "gptq_8": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": True}, gptq,
        (8, -1, True),
    ),
    "gptq_order": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq,
        (4, 32, True),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, awq,
        (4, 64, True),
    ),
    "packed_4": (compressed("pack-quantized", 4), packed, (4, 128, False)),
    "packed_4_asym": (compressed("pack-quantized", 4), packed, (4, 32, True)),
    "packed_8_order": (
        compressed("pack-quantized", 8) | {"actorder": "group"}, packed, (8, 64, True),
    ),
    "packed_8": (compressed("pack-quantized", 8), packed, (8, 64, True)),
    "bytes": (compressed("int-quantized", 8), signed_bytes, (8, -1, False)),
    "bytes_asym": (compressed("int-quantized", 8), signed_bytes, (8, -1, True)),
}  # fmt: skip
"""`quantization_config`, what writes a matrix, and bits, group size and asymmetry of it."""


def write_both(folder: Path, layout: str, **changes: Any) -> tuple[Path, Path]:
    """Writes a model in a layout, and another of its weights as float32; returns their folders.

    The last layer's o_proj is not quantized.
    """
    settings, write_matrix, shape = LAYOUTS[layout]
    rng = np.random.default_rng(0)

    def values(*shape: int, size: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    whole: Arrays = {
        "model.embed_tokens.weight": values(VOCAB, HIDDEN, size=1.0),
        "model.norm.weight": values(HIDDEN, size=0.2) + 1,
        "lm_head.weight": values(VOCAB, HIDDEN, size=HIDDEN**-0.5),
    }
    quantized = dict(whole)
    for layer in (0, 1):
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            whole[f"{name}{norm}.weight"] = quantized[f"{name}{norm}.weight"] = (
                values(HIDDEN, size=0.2) + 1
            )
        for part, sizes in SHAPES.items():
            made = Integers(rng, *sizes, *shape)
            if layout.endswith("order"):
                rng.shuffle(made.groups)
            whole[f"{name}{part}.weight"] = made.weights
            tensors = write_matrix(made)
            if layer == 1 and part == "self_attn.o_proj":
                tensors = {"weight": made.weights}
            quantized |= {f"{name}{part}.{kind}": tensor for kind, tensor in tensors.items()}
    quantized |= changes.pop("tensors", {})
    folders = folder / layout, folder / f"{layout}-float"
    write(folders[0], CONFIG | {"quantization_config": {**settings, **changes}}, quantized)
    write(folders[1], CONFIG, whole)
    return folders
