from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclewise.errors import InvalidParameterError
from cyclewise.text.tokenizer import Tokenizer
from tests.text import vocabularies

BYTE_LEVEL = Tokenizer.from_metadata(vocabularies.byte_level(user_defined=("<think>", "née")))
PIECES = {"▁hel": -1.0, "lo": -1.5, "▁": -9.0, "h": -9.0, "e": -9.0, "l": -9.0, "o": -9.0}
PIECES |= {"▁h": -2.0, "▁he": -2.0, "el": -3.0}
SENTENCEPIECE = Tokenizer.from_metadata(vocabularies.sentencepiece(PIECES))


def printed(tokenizer, ids, prompt_ids=()):
    stream = tokenizer.stream(prompt_ids)
    return [*(stream.push(index) for index in ids), stream.flush()]


@given(st.text())
def test_a_stream_prints_the_text(text):
    ids = BYTE_LEVEL.encode(text)
    assert "".join(printed(BYTE_LEVEL, ids)) == text


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_a_stream_prints_what_decode_does_for_any_ids(tokenizer):
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    def check(ids):
        pieces = printed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)

    check()


def test_a_character_comes_out_whole():
    ids = BYTE_LEVEL.encode("é😀")
    assert printed(BYTE_LEVEL, ids) == ["", "é", "", "", "", "😀", ""]


def test_an_unfinished_character_is_replaced_at_the_end_only():
    ids = BYTE_LEVEL.encode("😀")
    assert printed(BYTE_LEVEL, ids[:3]) == ["", "", "", "\ufffd"]


def test_bytes_that_nothing_can_complete_are_replaced_at_once():
    first = BYTE_LEVEL.encode("é")[0]
    letter = BYTE_LEVEL.encode("a")[0]
    assert printed(BYTE_LEVEL, [first, letter]) == ["", "\ufffda", ""]


def test_special_tokens_print_nothing_and_user_defined_ones_their_text():
    think = BYTE_LEVEL.encode("<think>")
    assert len(think) == 1
    assert printed(BYTE_LEVEL, [0, 1, *think, 2]) == ["", "", "<think>", "", ""]
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("née")) == "née"


def test_a_special_token_does_not_break_a_character():
    first, second = BYTE_LEVEL.encode("é")
    assert printed(BYTE_LEVEL, [first, 2, second]) == ["", "", "é", ""]


def test_sentencepiece_drops_the_leading_space_it_added():
    ids = SENTENCEPIECE.encode("hello hello")
    assert SENTENCEPIECE.decode(ids) == "hello hello"
    assert "".join(printed(SENTENCEPIECE, ids)) == "hello hello"
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(" hello")) == " hello"


def test_sentencepiece_keeps_the_space_after_a_prompt():
    prompt = SENTENCEPIECE.encode("hello")
    answer = SENTENCEPIECE.encode("hello", add_special=False)
    assert "".join(printed(SENTENCEPIECE, answer, prompt)) == " hello"
    assert "".join(printed(SENTENCEPIECE, answer, [*prompt, 2])) == "hello"


def test_sentencepiece_bytes_make_characters():
    ids = SENTENCEPIECE.encode("日", add_special=False)
    assert [SENTENCEPIECE.token_text(i) for i in ids] == ["▁", "<0xE6>", "<0x97>", "<0xA5>"]
    assert printed(SENTENCEPIECE, ids) == ["", "", "", "日", ""]


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(index):
    with pytest.raises(InvalidParameterError, match="not in the vocabulary"):
        BYTE_LEVEL.stream().push(index)
