"""Tiny random models as GGUF files, each with its numpy twin; and stories260K."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.kernels.target import host_target
from cyclewise.weights.formats import FORMATS as FILE_FORMATS
from tests import naive
from tests.machine.kernel_calls import llama_cpp_rows

Tensor = tuple[NDArray[np.uint8], str]
"""A file's rows as bytes, and their format."""


@dataclass(frozen=True, slots=True)
class Tiny:
    """What a tiny model is made of."""

    architecture: str = "llama"
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    feed_forward: int = 96
    layers: int = 2
    vocab: int = 100
    context: int = 256
    tied: bool = True
    biases: tuple[str, ...] = ()
    """Of `attn_q`, `attn_k`, `attn_v`, `attn_output`."""
    rope_dim: int | None = None
    rope_base: float = 10000.0
    rope_scaling: float = 1.0
    rope_factors: bool = False
    experts: int = 0
    chosen: int = 0
    normalized: bool = True
    """The weights of the chosen experts have the sum 1."""
    format: str = "F32"
    formats: dict[str, str] = field(default_factory=dict)
    """The format of a kind of matrix (`ffn_down`, `output`) where it is another one."""
    seed: int = 0


def rows_of(rng: np.random.Generator, format_name: str, rows: int, columns: int) -> Tensor:
    """A random matrix of about unit gain."""
    kind = gguf.GGMLQuantizationType[format_name]
    values = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(columns**-0.5)
    if format_name in _CODES:
        return _random_codes(rng, format_name, rows, columns), format_name
    if format_name not in ("Q4_K", "Q6_K"):
        data = gguf.quants.quantize(values, kind)
        return np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1), format_name
    # The gguf package cannot write these: random codes, and scales that give about that gain.
    block = {"Q4_K": 144, "Q6_K": 210}[format_name]
    blocks = rng.integers(0, 256, (rows, columns // 256, block)).astype(np.uint8)
    if format_name == "Q6_K":
        blocks[..., 192:208] = rng.integers(20, 60, blocks[..., 192:208].shape)
        blocks[..., 208:210] = _half(columns**-0.5 / (18 * 40))
    else:
        blocks[..., 4:16] = rng.integers(0, 64, blocks[..., 4:16].shape)
        # Scales equal to minima centre the codes; the last four share the first bytes' high bits.
        blocks[..., 8:12] = blocks[..., 4:8]
        blocks[..., 12:16] = (blocks[..., 12:16] & 15) * 17
        blocks[..., 0:2] = _half(columns**-0.5 / (4.6 * 32))
        blocks[..., 2:4] = _half(columns**-0.5 / (4.6 * 32) * 7.5)
    return blocks.reshape(rows, -1), format_name


_CODES = {
    "Q2_K": (16, 80), "Q3_K": (0, 96), "Q5_K": (16, 176), "IQ4_NL": (2, 18), "IQ4_XS": (8, 136),
}  # fmt: skip
"""Where in a block the codes lie, of other formats that the gguf package cannot write."""


def _random_codes(
    rng: np.random.Generator, format_name: str, rows: int, columns: int
) -> NDArray[np.uint8]:
    """Scales as llama.cpp chose them for weights of 0.05, and random codes."""
    block = llama_cpp_rows(format_name)[0][0, : FILE_FORMATS[format_name].block_bytes]
    blocks = np.tile(block, (rows, columns // FILE_FORMATS[format_name].block_size, 1))
    first, last = _CODES[format_name]
    blocks[..., first:last] = rng.integers(0, 256, (*blocks.shape[:2], last - first))
    return blocks.reshape(rows, -1)


def _half(value: float) -> NDArray[np.uint8]:
    return np.array([value], np.float16).view(np.uint8)


def write(path: Path, tiny: Tiny) -> naive.Transformer:
    """Writes the file; returns the model's twin."""
    tensors = make_tensors(tiny)
    write_file(path, tiny, tensors)
    return twin(tiny, tensors)


def make_tensors(tiny: Tiny) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    rng = np.random.default_rng(tiny.seed)
    queries, keys = tiny.heads * tiny.head_dim, tiny.kv_heads * tiny.head_dim
    rope_dim = tiny.rope_dim or tiny.head_dim
    shapes = {
        "attn_q": (queries, tiny.hidden), "attn_k": (keys, tiny.hidden),
        "attn_v": (keys, tiny.hidden),
        "attn_output": (tiny.hidden, queries), "ffn_gate": (tiny.feed_forward, tiny.hidden),
        "ffn_up": (tiny.feed_forward, tiny.hidden), "ffn_down": (tiny.hidden, tiny.feed_forward),
    }  # fmt: skip

    def matrix(kind: str, rows: int, columns: int) -> Tensor:
        return rows_of(rng, tiny.formats.get(kind, tiny.format), rows, columns)

    def vector(values: NDArray[np.float64]) -> Tensor:
        return values.astype(np.float32).view(np.uint8), "F32"

    def norm() -> Tensor:
        return vector(1 + 0.2 * rng.standard_normal(tiny.hidden))

    tensors = {"token_embd.weight": matrix("token_embd", tiny.vocab, tiny.hidden)}
    for layer in range(tiny.layers):
        name = f"blk.{layer}."
        tensors[name + "attn_norm.weight"] = norm()
        tensors[name + "ffn_norm.weight"] = norm()
        if tiny.experts:
            tensors[f"{name}ffn_gate_inp.weight"] = rows_of(rng, "F32", tiny.experts, tiny.hidden)
        for kind, shape in shapes.items():
            if tiny.experts and kind.startswith("ffn_"):
                for expert in range(tiny.experts):
                    tensors[f"{name}{kind}.{expert}.weight"] = matrix(kind, *shape)
                continue
            tensors[f"{name}{kind}.weight"] = matrix(kind, *shape)
            if kind in tiny.biases:
                tensors[f"{name}{kind}.bias"] = vector(rng.standard_normal(shape[0]))
    tensors["output_norm.weight"] = norm()
    if not tiny.tied:
        tensors["output.weight"] = matrix("output", tiny.vocab, tiny.hidden)
    if tiny.rope_factors:
        tensors["rope_freqs.weight"] = vector(rng.uniform(1, 8, rope_dim // 2))
    return tensors


def write_file(
    path: Path,
    tiny: Tiny,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any] | None = None,
    *,
    part: int = 0,
) -> None:
    """`part`: most tensors of one file; 0: there is one. Otherwise the model lies in `path`'s name
    with -00001-of-0000N and so on.
    """
    writer = gguf.GGUFWriter(path, tiny.architecture, split_max_tensors=part)
    writer.add_context_length(tiny.context)
    writer.add_embedding_length(tiny.hidden)
    writer.add_block_count(tiny.layers)
    writer.add_feed_forward_length(tiny.feed_forward)
    writer.add_head_count(tiny.heads)
    writer.add_head_count_kv(tiny.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(tiny.rope_base)
    for name, value in (metadata or {}).items():
        add_metadata(writer, name, value)
    if tiny.rope_dim is not None:
        writer.add_rope_dimension_count(tiny.rope_dim)
    if tiny.head_dim * tiny.heads != tiny.hidden:
        writer.add_key_length(tiny.head_dim)
        writer.add_value_length(tiny.head_dim)
    if tiny.rope_scaling != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(tiny.rope_scaling)
    if tiny.experts:
        writer.add_expert_count(tiny.experts)
        writer.add_expert_used_count(tiny.chosen)
        writer.add_expert_weights_norm(tiny.normalized)
    for name, (data, format_name) in _stacked(tensors).items():
        if format_name == "F32":
            writer.add_tensor(name, data.view(np.float32))
        else:
            kind = gguf.GGMLQuantizationType[format_name]
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    else:
        writer.add_array(name, value.tolist() if isinstance(value, np.ndarray) else value)


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's experts in one tensor, as files have them."""
    found: dict[str, list[NDArray[np.uint8]]] = {}
    formats: dict[str, str] = {}
    for name, (data, format_name) in tensors.items():
        expert = re.fullmatch(r"(.*)\.\d+(\.weight)", name)
        whole = f"{expert[1]}_exps{expert[2]}" if expert else name
        found.setdefault(whole, []).append(data)
        formats[whole] = format_name
    return {
        name: (np.stack(parts) if "_exps" in name else parts[0], formats[name])
        for name, parts in found.items()
    }


def twin(tiny: Tiny, tensors: dict[str, Tensor]) -> naive.Transformer:
    values = {name: naive.dequantize(kind, data) for name, (data, kind) in tensors.items()}
    quantized = frozenset(name for name, (_, kind) in tensors.items() if naive.is_quantized(kind))
    able = host_target().has_bf16
    bfloats = frozenset(name for name, (_, kind) in tensors.items() if able and kind == "BF16")
    return naive.Transformer(
        values, tiny.layers, tiny.heads, tiny.kv_heads, tiny.head_dim, 1e-5,
        tiny.rope_dim or tiny.head_dim, tiny.rope_base, tiny.rope_scaling,
        neighbours=tiny.architecture == "llama", quantized=quantized, bfloats=bfloats,
        num_chosen=tiny.chosen, normalized=tiny.normalized,
    )  # fmt: skip


# stories260K: the format of github.com/karpathy/llama2.c, version 0


def write_stories(source: Path, path: Path, metadata: dict[str, Any] | None = None) -> None:
    """Writes llama2.c's checkpoint as a GGUF file."""
    raw = source.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = np.frombuffer(raw, np.int32, 7).tolist()
    assert vocab > 0, "the output layer is not the embedding table"
    values, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape: int) -> NDArray[np.float32]:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return values[at - size : at].reshape(shape)

    keys = kv_heads * dim // heads
    parts = {"token_embd": take(vocab, dim)}
    stacked = {
        "attn_norm": take(layers, dim), "attn_q": take(layers, dim, dim),
        "attn_k": take(layers, keys, dim), "attn_v": take(layers, keys, dim),
        "attn_output": take(layers, dim, dim), "ffn_norm": take(layers, dim),
        "ffn_gate": take(layers, hidden, dim), "ffn_down": take(layers, dim, hidden),
        "ffn_up": take(layers, hidden, dim),
    }  # fmt: skip
    parts["output_norm"] = take(dim)
    for name, whole in stacked.items():
        parts.update({f"blk.{i}.{name}": whole[i] for i in range(layers)})
    tiny = Tiny(
        hidden=dim, heads=heads, kv_heads=kv_heads, head_dim=dim // heads, feed_forward=hidden,
        layers=layers, vocab=vocab, context=context,
    )  # fmt: skip
    tensors = {f"{name}.weight": (array.view(np.uint8), "F32") for name, array in parts.items()}
    write_file(path, tiny, tensors, metadata)


def read_pieces(source: Path) -> list[bytes]:
    """The pieces of llama2.c's tokenizer file."""
    return [piece for piece, _ in _scored_pieces(source)]


def stories_vocabulary(source: Path) -> dict[str, Any]:
    """llama2.c's tokenizer file as a GGUF file's metadata."""
    pieces, scores = zip(*_scored_pieces(source), strict=True)
    spelled = [piece.decode().replace(" ", "\u2581") for piece in pieces]
    spelled[1:3] = "<s>", "</s>"
    byte, control, unknown = 6, 3, 2
    types = [byte if re.fullmatch("<0x..>", piece) else 1 for piece in spelled]
    types[:3] = unknown, control, control
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": spelled,
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _scored_pieces(source: Path) -> list[tuple[bytes, float]]:
    raw, at, pieces = source.read_bytes(), 4, []
    while at < len(raw):
        score = float(np.frombuffer(raw, np.float32, 1, at)[0])
        size = int(np.frombuffer(raw, np.int32, 1, at + 4)[0])
        pieces.append((raw[at + 8 : at + 8 + size], score))
        at += 8 + size
    return pieces
