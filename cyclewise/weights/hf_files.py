"""What lies beside the weights in a Hugging Face directory: JSON, tokenizer, template, defaults.

In: a directory. Out: metadata, with GGUF's keys where GGUF has one. `directory.py` reads with
this; `text/` and the engine's defaults read what comes out.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclewise.errors import ModelFileError

TOKENIZER_JSON = "tokenizer.huggingface.json"
"""`tokenizer.json` as it is, a text."""
TOKENIZER_CONFIG = "cyclewise.tokenizer_config"
"""`tokenizer_config.json`, a dictionary."""
VOCAB_SIZE = "cyclewise.vocab_size"
"""The number of logits of a token, of which the last may have no name in the tokenizer."""
STOP_IDS = "cyclewise.stop_token_ids"
"""A list: the tokens that end a generation, as generation_config.json or config.json has them."""

_MAX_JSON = 1 << 28  # the largest known, Gemma's tokenizer.json, has 33 MB
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def read_text(path: Path) -> str | None:
    """A file of text; None where there is none.

    Raises ModelFileError for one that is too large, cannot be read or is no UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait, and a device has no end
            raise ModelFileError(f"{path}: not a regular file")
        if status.st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: over {_MAX_JSON >> 20} MB of text cannot be meant")
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        raise ModelFileError(f"{path}: the file is no UTF-8 text; fetch it again") from None
    except OSError as error:
        raise ModelFileError(f"{path}: the file cannot be read ({error.strerror})") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """A file with a JSON object; None where there is none. Raises ModelFileError."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise ModelFileError(f"{path}: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: the file is no JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: the file should hold a JSON object")
    return value


def text_metadata(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer, the chat template, the stop tokens and the defaults of sampling; of each what
    there is. `config` is config.json.
    """
    metadata: dict[str, Any] = {}
    tokenizer = read_text(folder / "tokenizer.json")
    settings = read_object(folder / "tokenizer_config.json") or {}
    if tokenizer is not None:
        metadata[TOKENIZER_JSON] = tokenizer
        metadata[TOKENIZER_CONFIG] = settings
        metadata[VOCAB_SIZE] = config.get("vocab_size")
    metadata |= _chat_templates(folder, settings)
    generation = read_object(folder / "generation_config.json") or {}
    stop_ids = generation.get("eos_token_id", config.get("eos_token_id"))
    stop_ids = [stop_ids] if type(stop_ids) is int else stop_ids
    if isinstance(stop_ids, list) and all(type(each) is int for each in stop_ids):
        metadata[STOP_IDS] = stop_ids
    return metadata | sampling_metadata(generation)


def sampling_metadata(generation: Mapping[str, Any]) -> dict[str, Any]:
    """GGUF's `general.sampling.*` from a generation_config.json.

    A value that is there holds wherever the user names none; what is not there keeps this
    package's own default. `do_sample: false`, said outright, is a temperature of 0.
    """
    metadata = {
        f"general.sampling.{to}": generation[name]
        for name, to in _SAMPLING.items()
        if type(generation.get(name)) in (int, float)
    }
    if generation.get("do_sample") is False:
        metadata["general.sampling.temp"] = 0.0
    return metadata


def _chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """GGUF's `tokenizer.chat_template`, and `tokenizer.chat_template.NAME` of others. Files of
    their own stand above tokenizer_config.json.
    """
    alone = read_text(folder / "chat_template.jinja")
    if alone is not None:
        templates = {"tokenizer.chat_template": alone}
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[f"tokenizer.chat_template.{path.stem}"] = read_text(path) or ""
        return templates
    found = settings.get("chat_template")
    if found is None:
        found = (read_object(folder / "chat_template.json") or {}).get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    templates = {}
    for entry in found if isinstance(found, list) else []:
        name, template = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        )
        if isinstance(name, str) and isinstance(template, str):
            suffix = "" if name == "default" else f".{name}"
            templates[f"tokenizer.chat_template{suffix}"] = template
    return templates
