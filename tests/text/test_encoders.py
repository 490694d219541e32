from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclewise.errors import ModelFileError
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.text.vocabulary import TokenType
from tests.text import naive, vocabularies

CHARACTERS = "ab▁é日"
PIECES = st.dictionaries(
    st.text(CHARACTERS, min_size=1, max_size=5),
    st.integers(-6, -1).map(float),  # few scores, so that there are ties
    min_size=1,
    max_size=30,
)
TEXTS = st.text("aab b▁é日x\n", max_size=40)


@given(PIECES, TEXTS)
def test_sentencepiece_merges_as_its_twin(pieces, text):
    tokenizer = Tokenizer.from_metadata(vocabularies.sentencepiece(pieces, add_space_prefix=False))
    expected = []
    for piece in naive.sentencepiece(text.replace(" ", "▁"), pieces):
        expected += [piece] if piece in pieces else [f"<0x{byte:02X}>" for byte in piece.encode()]
    ids = tokenizer.encode(text, add_special=False)
    assert [tokenizer.token_text(index) for index in ids] == expected


@given(PIECES, TEXTS)
def test_unigram_scores_as_its_twin(pieces, text):
    pieces = {
        piece: score - len(pieces) ** 0.5 * (index + 1) / 97
        for index, (piece, score) in enumerate(pieces.items())
    }
    metadata = vocabularies.unigram(pieces, add_eos_token=False)
    tokenizer = Tokenizer.from_metadata(metadata)
    scores = metadata["tokenizer.ggml.scores"][3:].astype(float)
    wanted = naive.unigram(text.replace(" ", "▁"), dict(zip(pieces, scores, strict=True)))
    found = [tokenizer.token_text(index) for index in tokenizer.encode(text)]
    total = sum(pieces.get(piece or "", 0.0) for piece in wanted)
    assert "".join(found).replace("<unk>", "?") == "".join(p or "?" for p in wanted)
    assert sum(pieces.get(piece, 0.0) for piece in found) == pytest.approx(total)


def test_unigram_merges_spaces_and_prefixes_one():
    pieces = {"▁a": -1.0, "a": -2.0, "▁": -3.0}
    tokens = lambda text, **keys: (  # noqa: E731
        lambda t: [t.token_text(index) for index in t.encode(text)]
    )(Tokenizer.from_metadata(vocabularies.unigram(pieces, **keys)))
    assert tokens("a  a ", remove_extra_whitespaces=True) == ["▁a", "▁a", "</s>"]
    assert tokens(" a", add_space_prefix=True) == ["▁", "▁a", "</s>"]
    assert tokens("a", add_space_prefix=False) == ["a", "</s>"]


def test_unigram_text_never_becomes_a_control_token():
    metadata = vocabularies.unigram(
        {"<": -1.0, "/": -1.0, "s": -1.0, ">": -1.0}, add_eos_token=False
    )
    ids = Tokenizer.from_metadata(metadata).encode("</s>")
    assert 1 not in ids and len(ids) == 4


def charsmap(replacements: dict[str, str]) -> np.ndarray:
    """A table for single bytes: the node of byte b is entry b, its leaf entry 256 + b."""
    entries, texts = [0] * 512, b""
    for letter, replacement in replacements.items():
        byte = ord(letter)
        entries[byte] = 256 << 10 | 0x100 | byte
        entries[256 + byte] = len(texts)
        texts += replacement.encode() + b"\0"
    return np.frombuffer(struct.pack("<I512I", 2048, *entries) + texts, np.uint8)


def test_unigram_normalizes():
    pieces = {"▁a": -1.0, "a": -2.0, "é": -2.0}
    table = charsmap({"A": "a", "B": "aé", "C": ""})
    metadata = vocabularies.unigram(pieces, precompiled_charsmap=table, add_eos_token=False)
    tokenizer = Tokenizer.from_metadata(metadata)
    texts = [tokenizer.token_text(index) for index in tokenizer.encode("aABCéx")]
    assert texts == ["a", "a", "a", "é", "é", "<unk>"]


@given(st.binary(max_size=60), st.booleans())
def test_a_damaged_normalizer_is_an_error_of_ours(body, has_length):
    body = body[: len(body) // 4 * 4] + b"ab\0"
    body = struct.pack("<I", len(body) - 3) + body if has_length else body
    metadata = vocabularies.unigram({"a": -1.0}, precompiled_charsmap=np.frombuffer(body, np.uint8))
    try:
        Tokenizer.from_metadata(metadata).encode("abc")
    except ModelFileError as error:
        assert "is no normalizer" in str(error)


def test_merges_apply_in_their_order():
    tokenizer = Tokenizer.from_metadata(vocabularies.byte_level())
    ids = tokenizer.encode("hello wo  end12")
    texts = [tokenizer.token_text(index) for index in ids]
    assert texts == ["hello", "Ġwo", "Ġ", "Ġ", "end", "1", "2"]


def test_of_two_merges_alike_the_first_counts():
    merges = ["a b", "b c", "a b"]
    tokenizer = Tokenizer.from_metadata(vocabularies.byte_level(merges=merges))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abc")] == ["ab", "c"]


def test_a_byte_without_a_token_vanishes_and_keeps_its_neighbours_apart():
    metadata = vocabularies.byte_level(merges=["a b"])
    metadata["tokenizer.ggml.tokens"][metadata["tokenizer.ggml.tokens"].index("z")] = "zz"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("azb ab")] == ["a", "b", "Ġ", "ab"]


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_merges_that_make_a_control_token_do_not_let_text_become_one(pre):
    merges = ["< e", "<e n", "<en d", "<end >", "e n", "en d"]
    metadata = vocabularies.byte_level(special=["<end>", "end"], merges=merges, pre=pre)
    tokenizer = Tokenizer.from_metadata(metadata)
    for text in ("<end>", "end", "the end.", "<end><end>"):
        ids = tokenizer.encode(text)
        assert min(ids) > 1  # the control tokens are 0 and 1
        assert tokenizer.decode(ids) == text


def test_a_sentencepiece_byte_token_is_not_spelled_by_text():
    pieces = dict.fromkeys("<0xA>▁", -9.0) | {"<0": -1.0, "<0x": -1.0, "<0x0": -1.0, "<0x0A": -1.0}
    tokenizer = Tokenizer.from_metadata(vocabularies.sentencepiece(pieces))
    assert tokenizer.decode(tokenizer.encode("<0x0A>")) == "<0x0A>"


def test_a_sentencepiece_control_token_is_not_spelled_by_text():
    pieces = {"<": -1.0, "<s": -1.0, "s": -2.0, ">": -2.0, "</": -1.0, "</s": -1.0}
    tokenizer = Tokenizer.from_metadata(vocabularies.sentencepiece(pieces))
    ids = tokenizer.encode("<s></s><unk>", add_special=False)
    assert not {0, 1, 2} & set(ids)


def test_unused_and_user_defined_tokens_keep_their_places():
    metadata = vocabularies.sentencepiece({"a": -1.0, "b": -1.0, "ab": -5.0, "▁": -2.0})
    types = metadata["tokenizer.ggml.token_type"]
    types[261] = TokenType.USER_DEFINED  # "ab"
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("aabb", add_special=False) == [262, 259, 261, 262, 260]
