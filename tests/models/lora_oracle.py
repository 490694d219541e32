"""LoRA adapters of small random models whose logits transformers and PEFT have computed.

Base models are those of `oracle.py`. An adapter's A and B come from a generator of numpy;
`write_peft` writes them as PEFT does, and `make_lora_oracle.py` has PEFT read that and keeps logits
in `lora_oracle.npz`. `write_gguf` writes what llama.cpp's converter would.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.models import oracle
from tests.models.oracle import VOCAB, Floats

FIXTURE = Path(__file__).with_name("lora_oracle.npz")
LENGTHS = (41, 7)
KEPT = ((0, 31, 40), (6,))
"""Positions of the sequences whose logits are kept."""
MOST = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = MOST[:4]


@dataclass(frozen=True, slots=True)
class Adapted:
    """An adapter and its base model."""

    base: str
    """Of `oracle.CASES`."""
    modules: tuple[str, ...] = MOST
    rank: int = 4
    alpha: float = 8
    dtype: str = "F32"
    config: dict[str, Any] = field(default_factory=dict)
    """Of `adapter_config.json`, beyond what all have."""


ADAPTERS: dict[str, Adapted] = {
    "llama": Adapted("llama"),
    "llama_other": Adapted("llama", ("q_proj", "v_proj", "down_proj"), 24, 12, "F16"),
    "llama_tied": Adapted("llama_tied", ATTENTION, 16, 16, "BF16"),
    "mistral": Adapted(
        "mistral", ("q_proj", "v_proj"), 9, 6, "F16", {"use_rslora": True}
    ),
    "qwen2": Adapted(
        "qwen2", rank=16, dtype="BF16",
        config={
            "rank_pattern": {"k_proj": 20, r"layers\.1\.self_attn\.q_proj": 3, "mlp.up_proj": 8},
            "alpha_pattern": {"down_proj": 20, "^model.layers.0.mlp.gate_proj": 2},
        },
    ),
    "qwen3": Adapted("qwen3", rank=40, alpha=20, dtype="F16"),
    "gemma2": Adapted("gemma2", rank=8, dtype="F16"),
    "gemma3": Adapted("gemma3"),
    "phi3": Adapted("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), 8),
    "gpt2": Adapted("gpt2", ("c_attn", "c_proj", "c_fc"), 8, config={"fan_in_fan_out": True}),
    "mixtral": Adapted("mixtral", ATTENTION, 8),
    "qwen3_moe": Adapted("qwen3_moe", ATTENTION, 8, dtype="F16"),
}  # fmt: skip


def token_ids(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    return ids


def stored_logits(name: str) -> list[Floats]:
    """Of each sequence, float32 (kept rows, vocabulary)."""
    with np.load(FIXTURE) as fixture:
        whole: Floats = fixture[name]
    return np.split(whole, np.cumsum([len(rows) for rows in KEPT])[:-1])


def rank_and_scale(adapted: Adapted, module: str) -> tuple[int, float]:
    """Of a module, as PEFT finds them; the patterns here are names, or nearly."""
    rank, alpha = adapted.rank, adapted.alpha
    for pattern, value in adapted.config.get("rank_pattern", {}).items():
        if module.endswith(pattern.replace("\\", "").removeprefix("^")):
            rank = value
    for pattern, value in adapted.config.get("alpha_pattern", {}).items():
        if module.endswith(pattern.replace("\\", "").removeprefix("^")):
            alpha = value
    return rank, alpha / (rank**0.5 if adapted.config.get("use_rslora") else rank)


def halves(name: str) -> dict[str, tuple[Floats, Floats]]:
    """A (rank, columns) and B (rows, rank) by the module's whole name, as their type holds them."""
    adapted = ADAPTERS[name]
    rng = np.random.default_rng(zlib.crc32(f"lora {name}".encode()))
    found = {}
    for tensor, values in oracle.weights(adapted.base).items():
        module = tensor.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in adapted.modules or values.ndim != 2:
            continue
        rows, columns = values.shape[::-1] if adapted.base == "gpt2" else values.shape
        rank, scale = rank_and_scale(adapted, module)
        size = 0.4 * float(values.std()) * columns**0.5 / scale * rank**-0.5
        a = rng.standard_normal((rank, columns)).astype(np.float32) * np.float32(columns**-0.5)
        b = rng.standard_normal((rows, rank)).astype(np.float32) * np.float32(size)
        found[module] = rounded(a, adapted.dtype), rounded(b, adapted.dtype)
    return found


def rounded(values: Floats, dtype: str) -> Floats:
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return values


def peft_config(name: str) -> dict[str, Any]:
    adapted = ADAPTERS[name]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapted.base,
        "r": adapted.rank, "lora_alpha": adapted.alpha, "lora_dropout": 0.05, "bias": "none",
        "target_modules": list(adapted.modules), "inference_mode": True, "use_dora": False,
        "modules_to_save": None, "init_lora_weights": True, **adapted.config,
    }  # fmt: skip


def write_peft(
    path: Path, name: str, *, infix: str = "", config: dict[str, Any] | None = None
) -> Path:
    """A directory as PEFT writes it; `infix` as older versions have the adapter's name."""
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(peft_config(name) | (config or {})))
    tensors = {}
    for module, pair in halves(name).items():
        for half, values in zip("AB", pair, strict=True):
            tensor = f"base_model.model.{module}.lora_{half}{infix}.weight"
            tensors[tensor] = ADAPTERS[name].dtype, values
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def write_gguf(path: Path, name: str, **said: str) -> Path:
    """As llama.cpp's `convert_lora_to_gguf.py` writes an adapter without patterns."""
    import gguf

    adapted = ADAPTERS[name]
    case = oracle.CASES[adapted.base]
    architecture = {a: number for number, a in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    names = gguf.get_tensor_name_map(architecture, case.full["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, said.get("architecture", case.architecture))
    writer.add_string("general.type", said.get("type", "adapter"))
    writer.add_string("adapter.type", said.get("adapter_type", "lora"))
    writer.add_float32("adapter.lora.alpha", adapted.alpha)
    for module, (a, b) in halves(name).items():
        to = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        kept = np.float16 if adapted.dtype == "F16" else np.float32
        writer.add_tensor(f"{to}.lora_a", a.astype(kept))
        writer.add_tensor(
            f"{to}.lora_b", oracle._converted(case, f"{module}.weight", b).astype(kept)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
    """float32 arrays as F32, F16 or BF16; other arrays as they are."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        match dtype:
            case "F16":
                raw = values.astype(np.float16).tobytes()
            case "BF16":
                raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            case _:
                raw = values.tobytes()
        ends = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": ends}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
