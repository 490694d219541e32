"""Small vocabularies, as the metadata of a model file would hold them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cyclewise.text.encoders import byte_level_alphabet
from cyclewise.text.vocabulary import TokenType

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["n d", "h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġ Ġ", "i m", "< |", "e nd"]


def metadata(kind: str, tokens: list[str], types: list[int], **keys: Any) -> dict[str, Any]:
    entries = {"model": kind, "tokens": tokens, "token_type": np.array(types, np.int32), **keys}
    return {f"tokenizer.ggml.{name}": value for name, value in entries.items()}


def byte_level(
    special: list[str] = SPECIAL,
    merges: list[str] = MERGES,
    user_defined: tuple[str, ...] = (),
    **keys: Any,
) -> dict[str, Any]:
    """Special tokens, one token for each byte, one for each merge, then user-defined ones."""
    plain = [*byte_level_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    plain = [text for text in dict.fromkeys(plain) if text not in special]
    types = [TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * len(plain)
    types += [TokenType.USER_DEFINED] * len(user_defined)
    keys = {"merges": merges, "pre": "smollm", **keys}
    return metadata("gpt2", [*special, *plain, *user_defined], types, **keys)


def sentencepiece(
    pieces: dict[str, float], special: tuple[str, ...] = (), **keys: Any
) -> dict[str, Any]:
    """`<unk>`, `<s>`, `</s>`, the bytes, then `pieces` by their scores, then control tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    types += [TokenType.CONTROL] * len(special)
    scores = np.array([0.0] * 259 + [*pieces.values()] + [0.0] * len(special), np.float32)
    return metadata("llama", [*tokens, *special], types, scores=scores, **keys)


def unigram(pieces: dict[str, float], **keys: Any) -> dict[str, Any]:
    """`<pad>`, `</s>`, `<unk>`, then `pieces` by their scores."""
    tokens = ["<pad>", "</s>", "<unk>", *pieces]
    types = [TokenType.CONTROL, TokenType.CONTROL, TokenType.UNKNOWN]
    types += [TokenType.NORMAL] * len(pieces)
    scores = np.array([0.0] * 3 + [*pieces.values()], np.float32)
    keys = {"eos_token_id": 1, "unknown_token_id": 2, **keys}
    return metadata("t5", tokens, types, scores=scores, **keys)
