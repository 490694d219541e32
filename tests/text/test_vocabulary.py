from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.errors import CyclewiseError, ModelFileError, UnsupportedModelError
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.text.vocabulary import TokenType, read_vocabulary
from tests.text import vocabularies

KEY = "tokenizer.ggml."


def test_ids_types_and_flags_are_read():
    vocabulary = read_vocabulary(
        vocabularies.byte_level(bos_token_id=1, eos_token_id=2, add_bos_token=True)
    )
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unknown_id) == (1, 2, None)
    assert vocabulary.add_bos and not vocabulary.add_eos and not vocabulary.add_space_prefix
    assert vocabulary.ids_of(TokenType.CONTROL) == [0, 1, 2]
    assert vocabulary.stop_ids == {0, 2}  # <|endoftext|> and <|im_end|>


def test_defaults_of_each_kind():
    llama = read_vocabulary(vocabularies.sentencepiece({"▁a": -1.0}))
    assert (llama.bos_id, llama.eos_id, llama.unknown_id) == (1, 2, 0)
    assert llama.add_bos and llama.add_space_prefix and not llama.add_eos
    t5 = read_vocabulary(vocabularies.unigram({"▁a": -1.0}))
    assert t5.add_eos and not t5.add_bos
    assert not read_vocabulary(vocabularies.byte_level()).add_bos
    assert not read_vocabulary(vocabularies.byte_level(pre="llama-bpe")).add_bos  # there is none
    assert read_vocabulary(vocabularies.byte_level(pre="llama-bpe", bos_token_id=0)).add_bos


def test_end_of_turn_tokens_are_control_tokens_whatever_their_type():
    metadata = vocabularies.byte_level(user_defined=("<|eot_id|>", "<think>"))
    vocabulary = read_vocabulary(metadata)
    end, think = vocabulary.ids["<|eot_id|>"], vocabulary.ids["<think>"]
    assert vocabulary.types[end] == TokenType.CONTROL and end in vocabulary.stop_ids
    assert vocabulary.types[think] == TokenType.USER_DEFINED


def test_keys_that_name_a_stop_token():
    metadata = vocabularies.byte_level(special=["<a>", "<b>", "<c>"], eot_token_id=1)
    metadata[KEY + "fim_pad_token_id"] = 2
    assert read_vocabulary(metadata).stop_ids == {1, 2}


def test_an_end_of_message_does_not_end_a_generation_where_there_are_returns():
    special = ["<|return|>", "<|call|>", "<|end|>"]
    assert read_vocabulary(vocabularies.byte_level(special=special)).stop_ids == {0, 1}


def test_minus_one_says_that_there_is_no_such_token():
    assert read_vocabulary(vocabularies.byte_level(bos_token_id=0xFFFFFFFF)).bos_id is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": 7}, "should be a string"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": np.zeros(3)}, "array of strings"),
        ({"tokens": ["a", 1]}, "array of strings"),
        ({"tokens": ["a", "b", "a"]}, "'a' is there twice"),
        ({"token_type": np.ones(3, np.int32)}, "3 entries for"),
        ({"token_type": ["a"]}, "array of numbers"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["xq zq"]}, "merges are damaged"),
        ({"merges": ["nospace"]}, "merges are damaged"),
        ({"bos_token_id": 10_000}, "bos_token_id is 10000"),
        ({"eos_token_id": -7}, "eos_token_id is -7"),
        ({"eos_token_id": "2"}, "should be an integer"),
        ({"add_bos_token": 1}, "should be a boolean"),
        ({"pre": 3}, "should be a string"),
    ],
)
def test_damage_is_named(change, words):
    metadata = vocabularies.byte_level()
    metadata |= {KEY + name: value for name, value in change.items()}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    with pytest.raises(ModelFileError, match=words):
        Tokenizer.from_metadata(metadata)


def test_scores_are_needed_and_are_numbers():
    metadata = vocabularies.sentencepiece({"a": -1.0})
    metadata[KEY + "scores"] = np.full(260, np.nan, np.float32)
    with pytest.raises(ModelFileError, match="NaN"):
        Tokenizer.from_metadata(metadata)
    del metadata[KEY + "scores"]
    with pytest.raises(ModelFileError, match="scores is missing"):
        Tokenizer.from_metadata(metadata)


@pytest.mark.parametrize("change", [{"model": "rwkv"}, {"pre": "smolm"}])
def test_what_is_not_supported_is_named(change):
    metadata = vocabularies.byte_level() | {KEY + k: v for k, v in change.items()}
    with pytest.raises(UnsupportedModelError, match=r"rwkv|'smollm'"):
        Tokenizer.from_metadata(metadata)


def test_empty_tokens_get_a_name():
    metadata = vocabularies.byte_level()
    metadata[KEY + "tokens"][-1] = ""
    metadata[KEY + "merges"].clear()
    tokens = read_vocabulary(metadata).tokens
    assert tokens[-1] == f"[EMPTY_{len(tokens) - 1}]"


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 400),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=4), max_size=6),
    st.lists(st.integers(-3, 300), max_size=300).map(lambda x: np.array(x, np.int32)),
    st.lists(st.floats(width=32), max_size=300).map(lambda x: np.array(x, np.float32)),
)
NAMES = [
    *("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id"),
    *("unknown_token_id", "eot_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"),
    *("precompiled_charsmap", "remove_extra_whitespaces"),
]
PIECES = {"▁a": -1.0, "a": -2.0, "b": -3.0, "ab": -1.5, "▁": -4.0}


@settings(max_examples=400)
@given(
    kind=st.sampled_from(["byte_level", "sentencepiece", "unigram"]),
    changes=st.dictionaries(st.sampled_from(NAMES), ODD, min_size=1, max_size=3),
    text=st.text(max_size=20),
)
def test_damaged_metadata_gives_an_error_of_ours_or_a_tokenizer(kind, changes, text):
    make = getattr(vocabularies, kind)
    metadata = make() if kind == "byte_level" else make(PIECES)
    metadata |= {KEY + name: value for name, value in changes.items() if value is not None}
    for name in (name for name, value in changes.items() if value is None):
        metadata.pop(KEY + name, None)
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
        ids = tokenizer.encode(text, parse_special=True)
        tokenizer.decode(ids)
    except CyclewiseError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
