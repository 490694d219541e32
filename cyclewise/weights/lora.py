"""LoRA adapters as files: what PEFT writes, and llama.cpp's GGUF adapters.

In: a directory with `adapter_config.json` and `adapter_model.safetensors`, or a GGUF file. Out: for
each matrix of the base model that is changed, by GGUF's name, the two small ones and their scale:
W x becomes W x + scale * B (A x) (Hu et al., 2021). `models/adapters.py` asks for them and compares
them with the base model. Files are hostile: the readers prove sizes, and whatever would make an
adapter compute something else than A and B say is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cyclewise.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from cyclewise.weights.gguf import GGUFFile
from cyclewise.weights.hf_config import ARCHITECTURES
from cyclewise.weights.hf_files import read_object
from cyclewise.weights.hf_names import NameMap
from cyclewise.weights.mapped import shown
from cyclewise.weights.safetensors import SafetensorsFile

MAX_RANK = 1024
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BITS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
_STEMS = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))")
_PEFT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_GGUF = re.compile(r"(.+)\.weight\.lora_([ab])")
# What changes the arithmetic. `init_lora_weights` says how training began: these begin with other
# weights of the base model than its file has.
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip
_REFUSED_BEGINNINGS = ("pissa", "olora", "loftq", "corda", "lora_ga")

Bits = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What is added to one matrix of the base model: scale * B A."""

    format: str
    """Of A and B: F32, F16 or BF16."""
    a: Bits
    """(rank, columns), in the format's bits: uint32 or uint16."""
    b: Bits
    """(rows, rank)"""
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An adapter as it lies in its file."""

    path: Path
    modules: dict[str, LoraModule]
    """By GGUF's name of the matrix: `blk.0.attn_q.weight`."""
    gguf_rows: bool
    """Rows of B are in the order of GGUF's matrices, not of the Hub's."""


def read_lora(path: Path | str, architecture: str) -> LoraFile:
    """An adapter of a model of GGUF's `architecture`.

    Raises ModelNotFoundError, ModelFileError or UnsupportedModelError.
    """
    path = Path(path)
    if path.name in (_CONFIG, _WEIGHTS):
        path = path.parent
    if path.suffix == ".gguf" and not path.is_dir():
        return _read_gguf(path, architecture)
    if not path.exists():
        raise ModelNotFoundError(f"{path}: there is no adapter of that name")
    return _read_peft(path, architecture)


# PEFT's directories


def _read_peft(path: Path, architecture: str) -> LoraFile:
    config = read_object(path / _CONFIG)
    if config is None:
        raise ModelFileError(
            f"{path}: {_CONFIG} is missing, so this is no adapter; name a directory that PEFT "
            "wrote, or a GGUF adapter"
        )
    settings = _Settings(config, path / _CONFIG)
    if not (path / _WEIGHTS).exists():
        if (path / "adapter_model.bin").exists():
            raise UnsupportedModelError(
                f"{path}: adapter_model.bin is a pickle, a program that runs when it is read, so "
                f"it is not opened here; save the adapter as {_WEIGHTS} where you trust it"
            )
        raise ModelFileError(f"{path}: {_WEIGHTS} is missing, the adapter's weights")
    model_type = next(hf for hf, gguf in ARCHITECTURES.items() if gguf == architecture)
    names = NameMap(model_type)
    with SafetensorsFile(path / _WEIGHTS) as file:
        halves: dict[str, dict[str, tuple[str, Bits]]] = {}
        scales: dict[str, tuple[int, float]] = {}
        for name, tensor in file.tensors.items():
            found = _PEFT.fullmatch(name)
            if found is None:
                raise _unknown_tensor(path / _WEIGHTS, name)
            stem = names.of_module(found[1])
            _check_stem(path / _WEIGHTS, name, stem)
            data = file.data(name)
            _put(halves, f"{stem}.weight", found[2].lower(), name, path / _WEIGHTS, tensor.dtype,
                 data, tensor.shape)  # fmt: skip
            scales[f"{stem}.weight"] = settings.rank_and_scale(found[1])
        modules = {
            name: _module(path / _WEIGHTS, name, pair, *scales[name])
            for name, pair in halves.items()
        }
    return _not_empty(LoraFile(path, modules, gguf_rows=False))


class _Settings:
    """An `adapter_config.json`, checked."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self._path = path
        if config.get("peft_type") != "LORA":
            raise UnsupportedModelError(
                f"{path}: an adapter of type {shown(config.get('peft_type'))}; only LORA is "
                "supported"
            )
        for key in _REFUSED:
            if config.get(key):
                raise UnsupportedModelError(f"{path}: adapters with {key} are not supported")
        if config.get("bias") not in (None, "none"):
            raise UnsupportedModelError(
                f"{path}: adapters with biases (bias: {shown(config['bias'])}) are not supported"
            )
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_REFUSED_BEGINNINGS):
            raise UnsupportedModelError(
                f"{path}: init_lora_weights is {shown(begun)}, which changes the base model too; "
                "convert it to a plain adapter (PEFT: path_initial_model_for_weight_conversion)"
            )
        self._rank = self._number("r", config.get("r"), whole=True)
        self._alpha = self._number("lora_alpha", config.get("lora_alpha"))
        self._root = config.get("use_rslora") is True
        self._ranks = self._patterns("rank_pattern", config.get("rank_pattern"), whole=True)
        self._alphas = self._patterns("alpha_pattern", config.get("alpha_pattern"))

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Of a module by its whole name."""
        rank = int(_of_pattern(self._ranks, module, self._rank))
        alpha = _of_pattern(self._alphas, module, self._alpha)
        return rank, alpha / (math.sqrt(rank) if self._root else rank)

    def _number(self, key: str, value: Any, *, whole: bool = False) -> float:
        wanted = f"a whole number from 1 to {MAX_RANK}" if whole else "a number"
        if type(value) not in ((int,) if whole else (int, float)) or not abs(value) < 1e6:
            raise ModelFileError(f"{self._path}: {key} should be {wanted}, not {shown(value)}")
        if whole and not 1 <= value <= MAX_RANK:
            raise ModelFileError(f"{self._path}: {key} should be {wanted}, not {shown(value)}")
        return float(value)

    def _patterns(
        self, key: str, value: Any, *, whole: bool = False
    ) -> list[tuple[re.Pattern[str], float]]:
        """PEFT's patterns of modules' names, in order."""
        if not value:
            return []
        if not isinstance(value, dict):
            raise ModelFileError(f"{self._path}: {key} should be an object, not {shown(value)}")
        found = []
        for pattern, number in value.items():
            # A file's expression is not trusted with time: no repeated groups, no look-around.
            simple = len(re.findall(r"[*+?{]", pattern)) <= 3 and not re.search(
                r"\)[*+?{]|\(\?|\\\d", pattern
            )
            try:
                compiled = re.compile(rf"(?:.*\.)?(?:{pattern})$") if simple else None
            except (re.error, OverflowError, RecursionError):
                compiled = None
            if compiled is None or len(pattern) > 1000:
                raise UnsupportedModelError(
                    f"{self._path}: {key} has the pattern {shown(pattern)}, which is not supported"
                )
            found.append((compiled, self._number(f"{key} of {pattern}", number, whole=whole)))
        return found


def _of_pattern(
    patterns: list[tuple[re.Pattern[str], float]], module: str, default: float
) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


# GGUF adapters


def _read_gguf(path: Path, architecture: str) -> LoraFile:
    with GGUFFile(path) as file:
        said = {key: file.metadata.get(key) for key in ("general.type", "adapter.type")}
        if said != {"general.type": "adapter", "adapter.type": "lora"}:
            raise ModelFileError(
                f"{path}: no LoRA adapter: general.type is {shown(said['general.type'])} and "
                f"adapter.type {shown(said['adapter.type'])}, where adapter and lora are needed"
            )
        if file.metadata.get("general.architecture") != architecture:
            raise UnsupportedModelError(
                f"{path}: an adapter for the architecture "
                f"{shown(file.metadata.get('general.architecture'))}, and the model is of "
                f"{architecture}"
            )
        if file.metadata.get("adapter.alora.invocation_tokens") is not None:
            raise UnsupportedModelError(f"{path}: adapters with alora are not supported")
        alpha = file.metadata.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ModelFileError(f"{path}: adapter.lora.alpha is {shown(alpha)}, no number")
        halves: dict[str, dict[str, tuple[str, Bits]]] = {}
        for name, tensor in file.tensors.items():
            found = _GGUF.fullmatch(name)
            if found is None:
                raise _unknown_tensor(path, name)
            _check_stem(path, name, found[1])
            _put(halves, f"{found[1]}.weight", found[2], name, path, tensor.format.name,
                 file.data(name), tensor.shape)  # fmt: skip
        modules = {}
        for name, pair in halves.items():
            rank = pair["a"][1].shape[0] if "a" in pair else 0
            # llama.cpp takes an alpha of 0 for none.
            scale = alpha / rank if alpha and rank else 1.0
            modules[name] = _module(path, name, pair, rank, scale)
    return _not_empty(LoraFile(path, modules, gguf_rows=True))


# Both


def _unknown_tensor(where: Path, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: tensor {shown(name)} is no A or B of a LoRA adapter of matrices, the only kind "
        "that is supported"
    )


def _check_stem(where: Path, name: str, stem: str | None) -> None:
    if stem is None or not _STEMS.fullmatch(stem):
        raise UnsupportedModelError(
            f"{where}: tensor {shown(name)} changes what no adapter can change here: only the "
            "matrices of attention and of feed-forwards without experts"
        )


def _put(
    halves: dict[str, dict[str, tuple[str, Bits]]], module: str, half: str, name: str, where: Path,
    format_name: str, data: npt.NDArray[np.uint8], shape: tuple[int, ...],
) -> None:  # fmt: skip
    """Copies a tensor out of its file."""
    if format_name not in _BITS:
        raise UnsupportedModelError(
            f"{where}: tensor {shown(name)} is {format_name}; an adapter's may be F32, F16 or BF16"
        )
    if len(shape) != 2 or 0 in shape:
        raise ModelFileError(
            f"{where}: tensor {shown(name)} has the shape {shape}, where a matrix is needed"
        )
    pair = halves.setdefault(module, {})
    if half in pair:
        raise ModelFileError(f"{where}: tensor {shown(name)} is there under two names")
    pair[half] = format_name, data.copy().view(_BITS[format_name]).reshape(shape)


def _module(
    where: Path, name: str, pair: dict[str, tuple[str, Bits]], rank: int, scale: float
) -> LoraModule:
    if pair.keys() != {"a", "b"}:
        raise ModelFileError(f"{where}: of {name} there is only {' and '.join(pair)} of A and B")
    (a_format, a), (b_format, b) = pair["a"], pair["b"]
    if a.shape[0] != rank or b.shape[1] != rank or rank > MAX_RANK:
        raise ModelFileError(
            f"{where}: A and B of {name} have the shapes {a.shape} and {b.shape}, where the rank "
            f"is {rank}, of at most {MAX_RANK}"
        )
    if a_format != b_format:
        a, b, a_format = widened(a_format, a), widened(b_format, b), "F32"
    if not all(np.isfinite(widened(a_format, each).view(np.float32)).all() for each in (a, b)):
        raise ModelFileError(f"{where}: A or B of {name} holds what is no finite number")
    return LoraModule(a_format, a, b, scale)


def widened(format_name: str, bits: Bits) -> Bits:
    """The same numbers as float32's bits."""
    match format_name:
        case "F16":
            return bits.view(np.float16).astype(np.float32).view(np.uint32)
        case "BF16":
            return bits.astype(np.uint32) << 16
        case _:
            return bits


def _not_empty(file: LoraFile) -> LoraFile:
    if not file.modules:
        raise ModelFileError(f"{file.path}: the adapter changes nothing: it has no tensors")
    return file
