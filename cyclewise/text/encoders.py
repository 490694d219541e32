"""Plain text to token ids: the three algorithms behind `Tokenizer`.

In: text in which no special token is left to find. Out: ids, none of them a control token, since
control tokens are taken out of the tables that text is looked up in. `text/tokenizer.py` makes one
encoder by `make_encoder` and calls it for each stretch of text between special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from operator import methodcaller
from typing import TYPE_CHECKING

from cyclewise.errors import ModelFileError
from cyclewise.text.pretokenizers import keeps_whole_words, patterns_of
from cyclewise.text.vocabulary import TokenType, Vocabulary

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"
"""U+2581, which stands for a space in SentencePiece vocabularies."""

Encode = Callable[[str], list[int]]

_CACHED_WORDS = 1 << 14
_CACHED_WORD_LENGTH = 64


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table: the character that stands for each byte in a byte-level vocabulary."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in visible}
    others = [byte for byte in range(256) if byte not in visible]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def make_encoder(vocabulary: Vocabulary) -> Encode:
    """The function that turns plain text into ids for this vocabulary.

    Raises `ModelFileError` where merges or the normalizer are damaged, `UnsupportedModelError`
    for an unknown pre-tokenizer.
    """
    if vocabulary.kind == "gpt2":
        return _byte_level_bpe(vocabulary)
    if vocabulary.kind == "llama":
        return SentencePieceEncoder(vocabulary).encode
    return _unigram(vocabulary)


def _plain_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Text to id without control and unknown tokens, which no plain text may become."""
    ids = dict(vocabulary.ids)
    for index in vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN):
        del ids[vocabulary.tokens[index]]
    return ids


def _byte_level_bpe(vocabulary: Vocabulary) -> Encode:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    num_tokens = len(vocabulary.tokens)
    ids = dict(vocabulary.ids)
    # Ids beyond the vocabulary stand for what text may pass through and not become: control
    # tokens, which are then taken apart again, and bytes without a token, which vanish, but only
    # after merging, since they keep their neighbours apart.
    control = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
    hidden = [vocabulary.tokens[index] for index in control]
    hidden += [character for character in byte_level_alphabet() if character not in ids]
    ids |= {text: num_tokens + index for index, text in enumerate(hidden)}

    merges = vocabulary.merges
    if len(set(merges)) != len(merges):  # the first of two alike counts; the library keeps the last
        merges = list(dict.fromkeys(merges))
    pairs = [(left, right) for left, _, right in map(methodcaller("partition", " "), merges)]
    whole_words = keeps_whole_words(vocabulary.pre)
    try:
        model = models.BPE(ids, pairs, ignore_merges=whole_words)
    except Exception as error:  # the library raises no class of its own
        raise ModelFileError(f"the model file's merges are damaged: {error}") from None
    tokenizer = Tokenizer(model)
    patterns = map(Regex, patterns_of(vocabulary.pre))
    splits = [pre_tokenizers.Split(pattern, behavior="isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    encode_hidden = _library_encoder(tokenizer)

    @cache
    def ranks() -> dict[str, int]:
        return {merge: rank for rank, merge in enumerate(merges)}

    def take_apart(text: str) -> list[int]:
        """Ids of what the merges made `text` from, if it is hidden."""
        if ids[text] < num_tokens:
            return [ids[text]]
        cuts = [(text[:middle], text[middle:]) for middle in range(1, len(text))]
        made = [cut for cut in cuts if " ".join(cut) in ranks()]
        left, right = min(made, key=lambda cut: ranks()[" ".join(cut)], default=("", ""))
        return [*take_apart(left), *take_apart(right)] if made else []

    def encode(text: str) -> list[int]:
        found = encode_hidden(text)
        if max(found, default=0) < num_tokens:
            return found
        plain: list[int] = []
        for index in found:
            is_hidden = index >= num_tokens
            plain += take_apart(hidden[index - num_tokens]) if is_hidden else [index]
        return plain

    return encode


def _library_encoder(tokenizer: tokenizers.Tokenizer) -> Encode:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode


class SentencePieceEncoder:
    """SentencePiece BPE: the best-scoring pair of neighbours is merged until none is left.

    The tokenizers library needs merges, which such files do not have, and breaks ties of score by
    another rule; so this is llama.cpp's own algorithm (`llm_tokenizer_spm`): of two pairs with one
    score the left one goes first, and a character in no token becomes its UTF-8 bytes. No token
    spans most word borders, so text is cut there first and words are remembered.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.scores is not None
        self._ids = _plain_ids(vocabulary)
        byte_ids = [vocabulary.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = [vocabulary.unknown_id if i is None else i for i in byte_ids]
        for index in vocabulary.ids_of(TokenType.BYTE):  # "<0x0A>" is text like any other
            self._ids.pop(vocabulary.tokens[index], None)
        self._costs = (-vocabulary.scores).tolist()
        # A cut between x and ▁ loses nothing unless some token holds the two side by side.
        joined = "\n".join(self._ids)
        glued = re.escape("".join(sorted(set(re.findall(f"([^{SPACE}\n]){SPACE}", joined)))))
        newline = "\n" if any(f"\n{SPACE}" in t for t in self._ids if "\n" in t) else ""
        self._cut = re.compile(f"(?<=[^{SPACE}{newline}{glued}])(?={SPACE})")
        self._remembered = lru_cache(_CACHED_WORDS)(self._merge)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; spaces may be spaces or U+2581."""
        ids: list[int] = []
        for word in self._cut.split(text.replace(" ", SPACE)):
            ids += (self._remembered if len(word) <= _CACHED_WORD_LENGTH else self._merge)(word)
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        """Ids of a word; a heap of candidate pairs, O(n log n)."""
        token_ids, costs = self._ids, self._costs
        pieces = list(word)  # an absorbed piece becomes ""
        before = list(range(-1, len(pieces) - 1))
        after = [*range(1, len(pieces)), -1]
        # (cost, left, right, length of both): the least cost first, then the leftmost.
        heap = []
        for left in range(len(pieces) - 1):
            token_id = token_ids.get(pieces[left] + pieces[left + 1])
            if token_id is not None:
                heap.append((costs[token_id], left, left + 1, 2))
        heapify(heap)
        while heap:
            _, left, right, length = heappop(heap)
            both = pieces[left] + pieces[right]
            if not pieces[left] or not pieces[right] or len(both) != length:
                continue  # one of the two has been merged with another since
            pieces[left], pieces[right] = both, ""
            follower = after[left] = after[right]
            if follower >= 0:
                before[follower] = left
                token_id = token_ids.get(both + pieces[follower])
                if token_id is not None:
                    merged_length = length + len(pieces[follower])
                    heappush(heap, (costs[token_id], left, follower, merged_length))
            leader = before[left]
            if leader >= 0:
                token_id = token_ids.get(pieces[leader] + both)
                if token_id is not None:
                    merged_length = length + len(pieces[leader])
                    heappush(heap, (costs[token_id], leader, left, merged_length))
        ids: list[int] = []
        for piece in filter(None, pieces):
            token_id = token_ids.get(piece)
            if token_id is not None:
                ids.append(token_id)
            else:  # a single character: longer pieces come from the table
                fallback = (self._byte_ids[byte] for byte in piece.encode())
                ids += [byte_id for byte_id in fallback if byte_id is not None]
        return tuple(ids)


_UNREACHABLE = "\U0010ffff"
"""A noncharacter: names the library's entries for tokens that no text may reach."""


def _unigram(vocabulary: Vocabulary) -> Encode:
    """SentencePiece unigram: the likeliest cut into tokens, by Viterbi in the library.

    User-defined tokens score 0, and what no text may become is put under a name that no text has.
    """
    import numpy as np
    from tokenizers import Tokenizer, models

    assert vocabulary.scores is not None
    types, scores = vocabulary.types, vocabulary.scores.astype(np.float64)
    normal = types == TokenType.NORMAL
    least = float(scores[normal].min()) if normal.any() else 0.0
    scores[types == TokenType.USER_DEFINED] = 0.0
    hidden = ~np.isin(types, (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED))
    scores[hidden] = least
    names = list(vocabulary.tokens)
    for index in np.flatnonzero(hidden).tolist():
        names[index] = f"{_UNREACHABLE}{index}"
    unknown_id = vocabulary.unknown_id
    if unknown_id is None:
        raise ModelFileError("the model file is damaged: its unigram vocabulary has no unknown id")
    try:
        model = models.Unigram(list(zip(names, scores.tolist(), strict=True)), unknown_id, False)
    except Exception as error:
        raise ModelFileError(f"the model file's unigram vocabulary is damaged: {error}") from None
    charsmap = CharacterMap(vocabulary.charsmap) if vocabulary.charsmap else None
    encode_normalized = _library_encoder(Tokenizer(model))

    def encode(text: str) -> list[int]:
        text = text.replace(_UNREACHABLE, "\ufffd")
        if charsmap is not None:
            text = charsmap.normalize(text)
        return encode_normalized(_escape_spaces(text, vocabulary))

    return encode


class CharacterMap:
    """SentencePiece's precompiled normalizer: replaces the longest known prefix at each place.

    The library's own panics on damaged tables. The table is a double array with entries packed in
    32 bits (llama.cpp's `xcda_array_view`): a base in bits 10 to 30 (bit 9 shifts it by 8), a leaf
    flag in bit 8, a label in bits 0 to 7; below a leaf, an entry is an offset into replacements.
    """

    def __init__(self, table: bytes) -> None:
        import numpy as np

        size = int.from_bytes(table[:4], "little")
        if size % 4 or not size or 4 + size >= len(table) or table[-1]:
            raise _DAMAGED_MAP
        self._entries: list[int] = np.frombuffer(table[4 : 4 + size], "<u4").tolist()
        self._replacements = table[4 + size :]

    def normalize(self, text: str) -> str:
        """`text` with every known sequence replaced. Raises `ModelFileError` on a damaged table."""
        data = text.encode()
        normalized = bytearray()
        start = 0
        try:
            while start < len(data):
                length, offset = self._longest(data, start)
                if length:
                    end = self._replacements.index(0, offset)
                    normalized += self._replacements[offset:end]
                    start += length
                else:
                    normalized.append(data[start])
                    start += 1
        except (IndexError, ValueError):
            raise _DAMAGED_MAP from None
        return normalized.decode("utf-8", errors="replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """Length of the longest known sequence at `start`, and where its replacement begins."""
        entries = self._entries
        node = _base(entries[0])
        length = offset = 0
        for end in range(start, len(data)):
            byte = data[end]
            node ^= byte
            entry = entries[node]
            if not byte or entry & 0x800000FF != byte:
                break
            node ^= _base(entry)
            if entry & 0x100:
                length, offset = end - start + 1, entries[node] & 0x7FFFFFFF
        return length, offset


def _base(entry: int) -> int:
    return (entry >> 10) << ((entry & 0x200) >> 6)


_DAMAGED_MAP = ModelFileError(
    "the model file is damaged: tokenizer.ggml.precompiled_charsmap is no normalizer"
)


def _escape_spaces(text: str, vocabulary: Vocabulary) -> str:
    if vocabulary.merge_spaces:
        return "".join(SPACE + word for word in text.split(" ") if word)
    if vocabulary.add_space_prefix:
        words = text.lstrip(" ")
        text = text[: len(text) - len(words)] + (" " + words if words else "")
    return text.replace(" ", SPACE)
