"""Quantized matrices as the tools that published their layouts read them: writes `published.npz`.

    python tests/weights/make_published.py AUTO_GPTQ AUTOAWQ

Runs in an interpreter that has torch, transformers and compressed-tensors; the arguments are the
unpacked archives of auto-gptq 0.7.1 and autoawq 0.2.9, of which one file each is run. Kept are the
tensors, `CASE.TENSOR`, and what the tool makes of them, `CASE.weights`, float32 (rows, columns).
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

COLUMNS = 256
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed_4_group_32": ("pack-quantized", {"num_bits": 4, "group_size": 32}),
    "packed_4_group_128_asym": (
        "pack-quantized", {"num_bits": 4, "group_size": 128, "symmetric": False}
    ),
    "packed_4_channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "packed_8_group_64_asym": (
        "pack-quantized", {"num_bits": 8, "group_size": 64, "symmetric": False}
    ),
    "packed_8_channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "bytes_channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "bytes_channel_asym": (
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}
    ),
    "bytes_tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
}  # fmt: skip


def run_file(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Any words at all: every code and zero point there is."""
    return torch.from_numpy(rng.integers(-(2**31), 2**31, shape).astype(np.int32))


def scales(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.001, 0.01, shape).astype(np.float16))


def gptq(module: Any, rng: np.random.Generator, bits: int, group_size: int) -> dict[str, Any]:
    rows, groups = 16, COLUMNS // (COLUMNS if group_size == -1 else group_size)
    linear = module.QuantLinear(bits, group_size, COLUMNS, rows, bias=False)
    linear.qweight = words(rng, COLUMNS * bits // 32, rows)
    linear.qzeros = words(rng, groups, rows * bits // 32)
    linear.scales = scales(rng, groups, rows).float()
    weights = linear(torch.eye(COLUMNS)).T
    names = ("qweight", "qzeros", "g_idx")
    made = {name: getattr(linear, name).numpy() for name in names}
    return made | {"scales": linear.scales.half().numpy(), "weights": weights.numpy()}


def awq(module: Any, rng: np.random.Generator, group_size: int) -> dict[str, Any]:
    rows, groups = 16, COLUMNS // group_size
    made = {
        "qweight": words(rng, COLUMNS, rows // 8), "qzeros": words(rng, groups, rows // 8),
        "scales": scales(rng, groups, rows),
    }  # fmt: skip
    whole = made | {"scales": made["scales"].float()}
    weights = module.dequantize_gemm(**whole, bits=4, group_size=group_size).T
    return {name: value.numpy() for name, value in (made | {"weights": weights}).items()}


def compressed(rng: np.random.Generator, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    rows = 12
    weight = torch.from_numpy(rng.standard_normal((rows, COLUMNS)).astype(np.float32) * 0.05)
    weight[3] += 0.1
    arguments = QuantizationArgs(**{"symmetric": True, **settings})
    groups = weight.reshape(rows, -1, settings.get("group_size", COLUMNS))
    low, high = groups.amin(-1), groups.amax(-1)
    if settings.get("strategy") == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    scale, zero_point = calculate_qparams(low, high, arguments)
    scale = scale.half().float()
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(kind)
    made = compressor.compress(dict(state), scheme)
    weights = compressor.decompress(dict(made), scheme)["weight"]
    made = {**made, "weight_scale": scale.half(), "weights": weights}
    return {name: value.numpy() for name, value in made.items()}


def main() -> None:
    gptq_at, awq_at = map(pathlib.Path, sys.argv[1:])
    gptq_module = run_file(gptq_at / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py")
    awq_module = run_file(awq_at / "awq/utils/packing_utils.py")
    rng = np.random.default_rng(0)
    cases: dict[str, dict[str, Any]] = {}
    for bits, size in ((4, 32), (4, 64), (4, 128), (4, -1), (8, 32), (8, 128), (8, -1)):
        cases[f"gptq_{bits}_{size}"] = gptq(gptq_module, rng, bits, size)
    for size in (64, 128):
        cases[f"awq_{size}"] = awq(awq_module, rng, size)
    for name, (kind, settings) in COMPRESSED.items():
        cases[name] = compressed(rng, kind, settings)
    arrays = {f"{case}.{name}": a for case, made in cases.items() for name, a in made.items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("published.npz"), **arrays)


if __name__ == "__main__":
    main()
