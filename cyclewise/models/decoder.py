"""What the files of architectures write with: moments by name, and the tensors behind them.

`Decoder` stands between a list of moments (`llama.py`, ...) and the machine's builder: it knows
GGUF's names for tensors and the order of their rows. A bias is added where the file has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cyclewise.machine.builder import Activation, Builder
from cyclewise.machine.experts import ExpertBuilder, ExpertShape
from cyclewise.machine.packing import Matrix, Weights
from cyclewise.machine.program import Program
from cyclewise.models.config import Config, Rope
from cyclewise.models.rope import halves_order, mean_rotated, rope_tables

Floats = NDArray[np.float32]
Tables = tuple[Floats, Floats]


class Decoder:
    """Writes the moments of a decoder-only transformer, in order."""

    def __init__(self, config: Config, weights: Weights, num_threads: int) -> None:
        self.config, self.weights = config, weights
        sizes: dict[str, Any] = {
            "hidden_size": config.hidden_size, "head_dim": config.head_dim,
            "num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads,
            "num_layers": config.num_layers, "feed_forward": config.feed_forward,
            "vocab_size": config.vocab_size, "context_length": config.context_length,
            "num_threads": num_threads, "epsilon": config.norm_epsilon, "kv": config.kv,
            "adapters": weights.adapters,
            "sequences": config.sequences,
        }  # fmt: skip
        self.experts: ExpertBuilder | None = None
        if config.num_experts:
            shape = ExpertShape(
                config.num_experts, config.experts_per_token, config.expert_feed_forward
            )
            self.experts = ExpertBuilder(shape, **sizes)
        self.builder: Builder = self.experts or Builder(**sizes)
        table = (config.vocab_size, config.hidden_size)
        self._table = weights.matrix("token_embd.weight", table)

    def rope_tables(self, rope: Rope, *, factors: bool = True) -> Tables:
        """Cosines and sines; with `factors` the file's for single frequencies count."""
        return rope_tables(rope, self.config.context_length, self.weights, factors=factors)

    def embed(self, *, scale: float = 1.0) -> None:
        """hidden = scale * table[token ids]"""
        self.builder.embed("embed", self._table, scale=scale)

    def positions(self) -> None:
        """hidden += table[positions]"""
        shape = (self.config.trained_context, self.config.hidden_size)
        table = self.weights.matrix("position_embd.weight", shape)
        self.builder.positions("embed.positions", table)

    def layers(self) -> Iterator[Layer]:
        for index in range(self.config.num_layers):
            yield Layer(self, index)

    def output(self) -> None:
        """The last norm, and the output layer: the embedding table where the file has no other."""
        config = self.config
        _norm(self, "output.norm", "output_norm", of_logits=True)
        matrix = self._table
        if "output.weight" in self.weights:
            shape = (config.vocab_size, config.hidden_size)
            matrix = self.weights.matrix("output.weight", shape)
        self.builder.output("output", matrix)
        if config.logit_softcap is not None:
            self.builder.softcap("output.softcap", config.logit_softcap)

    def program(self) -> Program:
        self.weights.check_all_used()
        return self.builder.build(self.weights)


class Layer:
    """Writes the moments of one layer."""

    def __init__(self, decoder: Decoder, index: int) -> None:
        self.index = index
        self.window = decoder.config.window(index)
        self._config, self._weights, self._builder = (
            decoder.config,
            decoder.weights,
            decoder.builder,
        )
        self._decoder, self._experts = decoder, decoder.experts
        self._name, self._file = f"layers.{index}.", f"blk.{index}."
        self._key_bias: Floats | None = None

    def norm(self, name: str, tensor: str) -> None:
        """normed = RMSNorm(hidden); where the file has a bias, LayerNorm"""
        _norm(self._decoder, self._name + name, self._file + tensor)

    def add_norm(self, name: str, tensor: str) -> None:
        """hidden += RMSNorm(projected)"""
        weight = self._vector(tensor, self._config.hidden_size)
        self._builder.add_norm(self._name + name, weight)

    def qkv(self) -> None:
        """qkv = three matrices times normed"""
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        parts = (("attn_q", heads, True), ("attn_k", kv_heads, True), ("attn_v", kv_heads, False))
        matrices, biases = [], []
        for tensor, num_heads, rotated in parts:
            rows = num_heads * self._config.head_dim
            order = self._rotation_order(num_heads) if rotated else None
            shape = (rows, self._config.hidden_size)
            matrices.append(self._matrix(tensor, shape, order))
            biases.append(self._bias(tensor, rows, order))
        self._key_bias = biases[1]
        self._builder.qkv(self._name + "attention.qkv", matrices, biases)

    def fused_qkv(self) -> None:
        """qkv = one matrix times normed"""
        heads = self._config.num_heads + 2 * self._config.num_kv_heads
        rows = heads * self._config.head_dim
        matrix = self._matrix("attn_qkv", (rows, self._config.hidden_size))
        bias = self._bias("attn_qkv", rows)
        if bias is not None:
            self._key_bias = bias[self._config.num_heads * self._config.head_dim :]
        self._builder.qkv(self._name + "attention.qkv", [matrix], [bias])

    def rope(self, tables: Tables | tuple[None, None], *, norms: bool = False) -> None:
        """Queries and keys are rotated, with `norms` after an RMSNorm of each head; keys and values
        are written to the cache.
        """
        query, key = (
            self._vector(tensor, self._config.head_dim) if norms else None
            for tensor in ("attn_q_norm", "attn_k_norm")
        )
        self._builder.rope(
            self._name + "attention.rope", self.index, *tables, scale=self._config.query_scale,
            query_norm=query, key_norm=key, key_center=None if norms else self._center(tables),
        )  # fmt: skip

    def _center(self, tables: Tables | tuple[None, None]) -> Floats | None:
        """What an int8 cache takes from each key: a bias can be a hundred times what differs from
        key to key, and in pairs that turn slowly it is the same for all. A constant that is taken
        from all scores of a query changes no weight of theirs, unless they are capped.
        """
        config, bias = self._config, self._key_bias
        if config.kv == "f16" or bias is None or config.attention_softcap is not None:
            return None
        shape = config.num_kv_heads, config.head_dim
        return mean_rotated(bias[: shape[0] * shape[1]].reshape(shape), tables).copy()

    def attend(self) -> None:
        """attended = softmax(queries . keys) . values, of the keys in the layer's window"""
        self._builder.attention(
            self._name + "attention.attend", self.index, window=self.window,
            softcap=self._config.attention_softcap,
        )  # fmt: skip

    def project(self, *, apart: bool = False) -> None:
        """hidden += matrix . attended; `apart`: projected = matrix . attended"""
        hidden, queries = self._config.hidden_size, self._config.num_heads * self._config.head_dim
        self._builder.project(
            self._name + "attention.output", self._matrix("attn_output", (hidden, queries)),
            self._bias("attn_output", hidden), apart=apart,
        )  # fmt: skip

    def gate_up(self, activation: Activation) -> None:
        """gated = activation(gate . normed) * (up . normed)"""
        names = self._file + "ffn_gate.weight", self._file + "ffn_up.weight"
        shape = (self._config.feed_forward, self._config.hidden_size)
        gate, up = self._weights.pair(names, shape)
        self._builder.gated(self._name + "ffn.gate_up", gate, up, activation)

    def fused_gate_up(self, activation: Activation) -> None:
        """`gate_up` of a matrix whose first half is the gate"""
        shape = (self._config.feed_forward, self._config.hidden_size)
        gate, up = self._weights.halves(self._file + "ffn_up.weight", shape)
        self._builder.gated(self._name + "ffn.gate_up", gate, up, activation)

    def up(self) -> None:
        """gated = gelu(matrix . normed)"""
        shape = (self._config.feed_forward, self._config.hidden_size)
        bias = self._bias("ffn_up", self._config.feed_forward)
        self._builder.up(self._name + "ffn.up", self._matrix("ffn_up", shape), bias)

    def down(self, *, apart: bool = False) -> None:
        """hidden += matrix . gated; `apart`: projected = matrix . gated"""
        shape = (self._config.hidden_size, self._config.feed_forward)
        self._builder.down(
            self._name + "ffn.down", self._matrix("ffn_down", shape),
            self._bias("ffn_down", self._config.hidden_size), apart=apart,
        )  # fmt: skip

    def experts(self) -> None:
        """hidden += the weighed sum of a feed-forward network each of the experts that a token
        chooses, as `gate_up` and `down` are one.
        """
        builder, config, hidden = self._experts, self._config, self._config.hidden_size
        assert builder is not None
        name, wide = self._name + "ffn.", (config.expert_feed_forward, hidden)
        builder.router(name + "router", self._matrix("ffn_gate_inp", (config.num_experts, hidden)))
        builder.route(name + "route", normalize=config.expert_weights_normalized)
        gates, ups, downs = [], [], []
        for expert in range(config.num_experts):
            names = (f"{self._file}ffn_{kind}.{expert}.weight" for kind in ("gate", "up"))
            gate, up = self._weights.pair((next(names), next(names)), wide)
            gates.append(gate)
            ups.append(up)
            downs.append(self._matrix(f"ffn_down.{expert}", wide[::-1]))
        builder.experts_gated(name + "gate_up", gates, ups)
        builder.experts_down(name + "down", downs)

    def _matrix(
        self, tensor: str, shape: tuple[int, int], order: NDArray[np.int32] | None = None
    ) -> Matrix:
        return self._weights.matrix(f"{self._file}{tensor}.weight", shape, order)

    def _bias(
        self, tensor: str, size: int, order: NDArray[np.int32] | None = None
    ) -> Floats | None:
        name = f"{self._file}{tensor}.bias"
        return self._weights.vector(name, size, order) if name in self._weights else None

    def _vector(self, tensor: str, size: int) -> Floats:
        return self._weights.vector(f"{self._file}{tensor}.weight", size)

    def _rotation_order(self, num_heads: int) -> NDArray[np.int32] | None:
        """Which row of the file each packed row is, so that a head's halves are RoPE's pairs;
        this changes no dot product of a query and a key.
        """
        rope, head_dim = self._config.rope, self._config.head_dim
        return halves_order(rope.dim, head_dim, num_heads) if rope.neighbours else None


def _norm(decoder: Decoder, name: str, tensor: str, *, of_logits: bool = False) -> None:
    weights, width = decoder.weights, decoder.config.hidden_size
    weight = weights.vector(f"{tensor}.weight", width)
    if f"{tensor}.bias" in weights:
        bias = weights.vector(f"{tensor}.bias", width)
        decoder.builder.layer_norm(name, weight, bias, of_logits=of_logits)
    else:
        decoder.builder.norm(name, weight, of_logits=of_logits)
