"""Hugging Face's names for modules, in GGUF's.

`directory.py` asks `NameMap` about every tensor of a checkpoint. What is known to be no part of
the language model (an image encoder, tables that older versions stored) is left out; what is not
known at all is refused, since a model without it would compute something else.
"""

from __future__ import annotations

import re

_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ATTENTION = {name: to for name, to in _LLAMA.items() if not name.startswith("mlp.")}
# Of a layer, by the model's type; # is the number of an expert.
_LAYERS: dict[str, dict[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _HEAD_NORMS,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | _HEAD_NORMS,
    "phi3": {
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    "mixtral": {
        **_ATTENTION,
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.experts.#.w1": "ffn_gate.#",
        "block_sparse_moe.experts.#.w2": "ffn_down.#",
        "block_sparse_moe.experts.#.w3": "ffn_up.#",
    },
    "qwen3_moe": {
        **_LLAMA,
        **_HEAD_NORMS,
        "mlp.gate": "ffn_gate_inp",
        "mlp.experts.#.gate_proj": "ffn_gate.#",
        "mlp.experts.#.down_proj": "ffn_down.#",
        "mlp.experts.#.up_proj": "ffn_up.#",
    },
    "gpt2": {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_OUTSIDE_GPT2 = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"
}  # fmt: skip
_PREFIX = re.compile(r"(?:(?:model|language_model|transformer)\.)*")
_LAYER = re.compile(r"(?:layers|h)\.(\d{1,4})\.(.+)")
_EXPERT = re.compile(r"(?<=experts\.)(\d{1,4})(?=\.)")
_IGNORED = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\..*"
    r"|.*\.rotary_emb\.inv_freq"
    r"|(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias"
)


class NameMap:
    """The names of one type of model (`hf_config.ARCHITECTURES`)."""

    def __init__(self, model_type: str) -> None:
        self._layer = _LAYERS[model_type]
        self._outside = _OUTSIDE_GPT2 if model_type == "gpt2" else _OUTSIDE

    def is_ignored(self, tensor: str) -> bool:
        """Whether a tensor is no part of the language model."""
        return _IGNORED.fullmatch(tensor) is not None

    def of_module(self, module: str) -> str | None:
        """GGUF's name for what holds `weight`, `bias` and the like; None where it is not known."""
        module = module[_PREFIX.match(module).end() :]  # type: ignore[union-attr]  # may be empty
        layer = _LAYER.fullmatch(module)
        if layer is None:
            return self._outside.get(module)
        expert = _EXPERT.search(layer[2])
        number = "" if expert is None else str(int(expert[1]))
        name = self._layer.get(_EXPERT.sub("#", layer[2], count=1))
        return None if name is None else f"blk.{int(layer[1])}.{name.replace('#', number)}"
