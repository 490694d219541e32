"""LoRA adapters beside a base model: files become what the machine packs.

`load_model` comes here when adapters are asked for. What `weights/lora.py` read is compared with
the base model's matrices, and rows of B are brought into the order in which those are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cyclewise.errors import UnsupportedModelError
from cyclewise.machine.adapters import Adapters
from cyclewise.models.config import Config
from cyclewise.models.rope import halves_order
from cyclewise.weights.lora import LoraFile, read_lora
from cyclewise.weights.source import Source


def load_adapters(paths: Mapping[str, str | Path], source: Source, config: Config) -> Adapters:
    """Reads adapters by name.

    Raises ModelNotFoundError, ModelFileError or UnsupportedModelError, also where one was made for
    another model.
    """
    files = []
    for path in paths.values():
        file = read_lora(path, config.architecture)
        _compare(file, source)
        files.append(_in_packed_order(file, config))
    return Adapters(dict(zip(paths, files, strict=True)))


def _compare(file: LoraFile, source: Source) -> None:
    for name, module in file.modules.items():
        base = source.tensors.get(name)
        if base is None:
            raise UnsupportedModelError(
                f"{file.path}: the adapter changes {name}, which the model {source.path} does not "
                "have; it was made for another model"
            )
        shape = len(module.b), module.a.shape[1]
        if tuple(base.shape) != shape:
            raise UnsupportedModelError(
                f"{file.path}: the adapter changes {name} of shape {shape}, which in the model "
                f"{source.path} is {tuple(base.shape)}; it was made for another model"
            )


def _in_packed_order(file: LoraFile, config: Config) -> LoraFile:
    """GGUF's Llamas have queries and keys in an order of their own; packed matrices, as the Hub's,
    have the halves of a head as RoPE's pairs.
    """
    if not file.gguf_rows or config.architecture != "llama":
        return file
    modules = dict(file.modules)
    for name, module in file.modules.items():
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[2])
        if heads is not None:
            order = halves_order(config.rope.dim, config.head_dim, heads)
            modules[name] = replace(module, b=module.b[order])
    return replace(file, modules=modules)
