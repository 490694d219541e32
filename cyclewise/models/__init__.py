"""Models: a file becomes a configuration, packed weights and a program.

`load_model` is called by `llm.py`; one short file an architecture writes the list of moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cyclewise.errors import ModelFileError, UnsupportedModelError
from cyclewise.machine.names import cache_kind
from cyclewise.models.config import Config, read_config


@dataclass(frozen=True, slots=True)
class Model:
    """A model ready to run."""

    path: Path
    config: Config
    metadata: dict[str, Any]
    """The file's metadata; its token tables make the tokenizer."""
    machine: Any
    format_bytes: dict[str, int]
    """Bytes of the file's tensors by block format."""
    adapters: list[Any] = field(default_factory=list)
    """Of each LoRA adapter, in the order of their numbers, an `AdapterFacts`."""

    @property
    def program(self) -> Any:
        return self.machine.program

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a token of decode streams."""
        return int(self.program.weight_bytes)

    @property
    def kv(self) -> str:
        """What the KV cache holds."""
        return self.config.kv

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token adds to the KV cache."""
        return int(self.program.kv_bytes_per_token)

    def close(self) -> None:
        self.machine.close()


def load_model(
    path: Path | str,
    *,
    context: int | None = None,
    threads: int | None = None,
    kv: str = "f16",
    adapters: Mapping[str, Path | str] | None = None,
    quantize: str | None = None,
    sequences: int = 1,
) -> Model:
    """Reads a model's files, packs its weights and starts the machine.

    Args:
        path: a GGUF file, or a Hugging Face directory.
        context: tokens that a sequence may hold; the model's own, at most 4,096, if None.
        threads: threads to run; None: as the machine profile says, or one for each CPU that the
            process may use. Never more than those.
        kv: what the KV cache holds, `f16` or `int8`.
        adapters: LoRA adapters by name: PEFT's directories or GGUF files.
        quantize: "q8_0", "q4_0" or "q4_k": what a directory's float matrices become.
        sequences: how many of the whole context the KV cache holds at once. Memory is committed as
            it is used.

    Raises:
        ModelFileError: a file is damaged or lacks something.
        UnsupportedModelError: its architecture or a format is not known here, or an adapter is of
            another model or another kind.
        ModelNotFoundError: there is no such adapter.
        InvalidParameterError: the context, the number of threads or `kv` is out of range,
            `quantize` is none of these, or the weights are not float.
    """
    from cyclewise.machine.builder import load_kernels
    from cyclewise.machine.host import available_cpus
    from cyclewise.machine.machine import Machine, resolve_threads
    from cyclewise.machine.packing import Weights
    from cyclewise.models import gemma2, gemma3, gpt2, llama, mixtral, phi3, qwen3, qwen3moe
    from cyclewise.weights.mapped import shown
    from cyclewise.weights.source import open_source

    builders = {
        "llama": llama.build, "qwen2": llama.build, "qwen3": qwen3.build, "gemma2": gemma2.build,
        "gemma3": gemma3.build, "qwen3moe": qwen3moe.build, "phi3": phi3.build, "gpt2": gpt2.build,
    }  # fmt: skip
    num_threads, kind = resolve_threads(threads), cache_kind(kv)
    with open_source(path, quantize) as source:
        architecture = source.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in builders:
            raise UnsupportedModelError(
                f"{path}: architecture {shown(architecture)} is not supported; "
                f"known are {', '.join(builders)}."
            )
        table = source.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise ModelFileError(f"{path}: the embedding table token_embd.weight is missing.")
        config = read_config(source.metadata, architecture, table.shape[0], context, kind)
        config = replace(config, sequences=sequences)
        load_kernels(t.format.name for t in source.tensors.values() if len(t.shape) == 2)
        packed = None
        if adapters:
            from cyclewise.models.adapters import load_adapters

            packed = load_adapters(adapters, source, config)
        with Weights(source, available_cpus(), packed) as weights:
            build = builders[architecture]
            if architecture == "llama" and config.num_experts:
                build = mixtral.build
            program = build(config, weights, available_cpus())
        formats: dict[str, int] = {}
        for tensor in source.tensors.values():
            formats[tensor.format.name] = formats.get(tensor.format.name, 0) + tensor.nbytes
        return Model(
            Path(path), config, source.metadata, Machine(program, num_threads), formats,
            packed.finish() if packed else [],
        )  # fmt: skip
