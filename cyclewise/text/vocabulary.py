"""A GGUF file's `tokenizer.ggml.*` metadata, checked and named: what every tokenizer is made from.

In: the metadata of a model file, which may be damaged or hostile. Out: a `Vocabulary`, whose every
id is in range and every array as long as its tokens. `text/tokenizer.py` calls `read_vocabulary`.
What a missing key means, and which tokens end a generation, follows llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from cyclewise.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PREFIX = "tokenizer.ggml."

KINDS = ("gpt2", "llama", "t5")
"""The tokenizer models read here: byte-level BPE, SentencePiece BPE, SentencePiece unigram."""

_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "gpt2": {},
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2},
}

# Pre-tokenizers whose models begin with a BOS token unless the file says otherwise.
_BOS_BY_DEFAULT_TEXT = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken "
    "chameleon"
)
_BOS_BY_DEFAULT = frozenset(_BOS_BY_DEFAULT_TEXT.split())

_END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's own characters)
    "[e~[",
)

# Fill-in-the-middle tokens that also end a generation, found by text where no key names them.
_FILL_END_TEXTS: dict[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

_FILL_TEXTS = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<MID>", "▁<MID>", "<|code_middle|>"),
    *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as the GGUF specification numbers them."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file says of its tokens; every id here is a valid index into `tokens`."""

    kind: str  # one of KINDS
    pre: str  # the pre-tokenizer's name, "default" where the file has none
    tokens: list[str]  # no two alike, none empty
    ids: dict[str, int]  # the inverse of `tokens`
    types: NDArray[np.int32]  # (tokens,), TokenType values
    scores: NDArray[np.float32] | None  # (tokens,), never None for "llama" and "t5"
    merges: list[str]  # "left right", best first; empty unless the kind is "gpt2"
    charsmap: bytes  # SentencePiece's precompiled normalizer; empty where there is none
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    stop_ids: frozenset[int]  # tokens that end a generation
    add_bos: bool  # never without a BOS
    add_eos: bool
    add_space_prefix: bool
    merge_spaces: bool  # unigram only: runs of spaces count as one
    strips_after_special: bool  # Phi-3: white space after most special tokens is dropped

    def ids_of(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of these types, in order."""
        import numpy as np

        return np.flatnonzero(np.isin(self.types, types)).tolist()


class _Reader:
    """Typed reads of `tokenizer.ggml.*` keys; a wrong type is a `ModelFileError` naming the key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def _get(self, name: str) -> Any:
        return self._metadata.get(_PREFIX + name)

    def text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise _wrong(name, "a boolean", value)
        return value

    def strings(self, name: str) -> list[str] | None:
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(str.__instancecheck__, value)):
            raise _wrong(name, "an array of strings", value)
        return value

    def array(self, name: str, kinds: str, length: int | None) -> NDArray[Any] | None:
        """A numeric array of a dtype kind in `kinds`, cut to `length`, which it must have."""
        import numpy as np

        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
            raise _wrong(name, "an array of numbers", value)
        if length is not None and len(value) < length:
            raise ModelFileError(
                f"the model file is damaged: {_PREFIX}{name} has {len(value)} entries for "
                f"{length} tokens"
            )
        return value[:length]

    def token_id(self, name: str, num_tokens: int, default: int | None) -> int | None:
        """A special token's id; all bits set is how files say that there is none."""
        value = self._get(f"{name}_token_id")
        if value is None:
            return default if default is not None and default < num_tokens else None
        if type(value) is not int:
            raise _wrong(f"{name}_token_id", "an integer", value)
        if value in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= value < num_tokens:
            raise ModelFileError(
                f"the model file is damaged: {_PREFIX}{name}_token_id is {value}, but there are "
                f"only {num_tokens} tokens"
            )
        return value


def _wrong(name: str, wanted: str, value: object) -> ModelFileError:
    return ModelFileError(
        f"the model file is damaged: {_PREFIX}{name} should be {wanted}, not a "
        f"{type(value).__name__}"
    )


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary in a model file's metadata.

    Raises `ModelFileError` where the metadata is damaged, `UnsupportedModelError` for a kind of
    tokenizer that is not one of `KINDS`.
    """
    import numpy as np

    reader = _Reader(metadata)
    kind = reader.text("model")
    if kind is None:
        raise ModelFileError(
            "the model has no tokenizer: tokenizer.ggml.model is missing, or tokenizer.json in a "
            "directory (transformers writes it: AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR))"
        )
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"the tokenizer kind {kind!r} is not supported (supported: {', '.join(KINDS)})"
        )
    pre = reader.text("pre") or "default"
    tokens = reader.strings("tokens")
    if not tokens:
        raise ModelFileError("the model file has no vocabulary: tokenizer.ggml.tokens is missing")
    num_tokens = len(tokens)
    if not all(tokens):
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids = dict(zip(tokens, range(num_tokens), strict=True))
    if len(ids) != num_tokens:
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ModelFileError(f"the model file is damaged: token {twice[:50]!r} is there twice")

    types = reader.array("token_type", "iu", num_tokens)
    types = np.ones(num_tokens, np.int32) if types is None else types.astype(np.int32)
    scores = reader.array("scores", "fiu", num_tokens)
    if kind != "gpt2":
        if scores is None:
            raise ModelFileError("the model file is damaged: tokenizer.ggml.scores is missing")
        scores = scores.astype(np.float32)
        if np.isnan(scores).any():
            raise ModelFileError("the model file is damaged: tokenizer.ggml.scores has a NaN")
    merges = reader.strings("merges") if kind == "gpt2" else []
    if merges is None:
        raise ModelFileError("the model file is damaged: tokenizer.ggml.merges is missing")
    charsmap = reader.array("precompiled_charsmap", "iu", None)

    defaults = _DEFAULT_IDS[kind]
    bos_id = reader.token_id("bos", num_tokens, defaults.get("bos"))
    eos_id = reader.token_id("eos", num_tokens, defaults.get("eos"))
    unknown_id = reader.token_id("unknown", num_tokens, defaults.get("unknown"))
    ends = stop_ids(metadata, ids)
    control = [*ends, *(ids[text] for text in _FILL_TEXTS if text in ids)]
    ends += [index for index in (eos_id,) if index is not None]
    # A token that ends a turn is a control token, whatever a careless conversion called it: a
    # user's text would become one otherwise.
    types[control] = TokenType.CONTROL
    for special_id in (bos_id, eos_id):
        if special_id is not None and types[special_id] == TokenType.USER_DEFINED:
            types[special_id] = TokenType.CONTROL

    add_bos = reader.flag("add_bos_token", kind == "llama" or pre in _BOS_BY_DEFAULT)
    add_eos = reader.flag("add_eos_token", kind == "t5")
    model_name = metadata.get("general.name")
    is_phi3 = isinstance(model_name, str) and any(n in model_name.lower() for n in _PHI3_NAMES)
    return Vocabulary(
        kind=kind,
        pre=pre,
        tokens=tokens,
        ids=ids,
        types=types,
        scores=scores,
        merges=merges,
        charsmap=b"" if charsmap is None else charsmap.astype(np.uint8).tobytes(),
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        stop_ids=frozenset(ends),
        add_bos=add_bos and bos_id is not None,
        add_eos=add_eos and eos_id is not None,
        # llama.cpp reads this key for byte-level files too, and then ignores it.
        add_space_prefix=reader.flag("add_space_prefix", kind == "llama") and kind != "gpt2",
        merge_spaces=reader.flag("remove_extra_whitespaces", False),
        strips_after_special=is_phi3,
    )


_PHI3_NAMES = ("phi-3", "phi3")


def fill_texts() -> tuple[str, ...]:
    """Texts of control tokens with which a gap in a text is filled in."""
    return _FILL_TEXTS


def stop_ids(metadata: Mapping[str, Any], ids: dict[str, int]) -> list[int]:
    """Tokens of `ids` that end a generation, by their texts and by the keys that name them."""
    reader = _Reader(metadata)
    found = [ids[text] for text in _END_TEXTS if text in ids]
    if {"<|return|>", "<|call|>", "<|end|>"} <= ids.keys():  # <|end|> then only ends a message
        found.remove(ids["<|end|>"])
    for name in ("eot", "eom"):
        special_id = reader.token_id(name, len(ids), None)
        found += [special_id] if special_id is not None else []
    for name, texts in _FILL_END_TEXTS.items():
        special_id = reader.token_id(name, len(ids), None)
        if special_id is None:
            special_id = next((ids[text] for text in texts if text in ids), None)
        found += [special_id] if special_id is not None else []
    return found
