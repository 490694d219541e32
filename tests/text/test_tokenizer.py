from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyclewise.text.tokenizer import Tokenizer
from cyclewise.weights.gguf import GGUFFile
from tests.text import vocabularies

BYTE_LEVEL = Tokenizer.from_metadata(
    vocabularies.byte_level(user_defined=("<think>", "  "), bos_token_id=0, eos_token_id=2)
)
VECTORS = (
    *("deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-spm", "mpt", "phi-3"),
    *("refact", "starcoder", "command-r", "llama-bpe", "qwen2", "qwen35"),
)


def vocabulary_path(name, shared_data) -> Path:
    """A vocabulary that lies with the test data, or in llama.cpp's `models` folder."""
    path = shared_data / "tokenizer-vectors" / f"ggml-vocab-{name}.gguf"
    if path.exists():
        return path
    folder = os.environ.get("CYCLEWISE_VOCABULARIES")
    if folder is None:
        pytest.skip(
            f"{path.name} is not with the test data: set CYCLEWISE_VOCABULARIES to llama.cpp's "
            "folder `models` (the source distribution of llama-cpp-python has it)"
        )
    path = Path(folder) / path.name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module", params=VECTORS)
def vectors(request, shared_data):
    """A real vocabulary, with texts and the ids that llama.cpp gives them."""
    path = vocabulary_path(request.param, shared_data)
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    answers = path.with_suffix(".gguf.out").read_text().split("\n")
    with GGUFFile(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    pairs = zip(texts, answers, strict=True)
    return tokenizer, [(text, [int(word) for word in answer.split()]) for text, answer in pairs]


def test_vectors(vectors):
    tokenizer, cases = vectors
    assert len(cases) > 40
    for text, ids in cases:
        assert tokenizer.encode(text, add_special=False) == ids
        assert tokenizer.decode(ids) == text


def test_text_of_a_real_vocabulary_streams_back(vectors):
    tokenizer, cases = vectors
    for text, _ in cases:
        stream = tokenizer.stream()
        pieces = [stream.push(index) for index in tokenizer.encode(text)]
        assert "".join(pieces) + stream.flush() == text


@given(st.text())
def test_decoding_what_was_encoded_gives_it_back(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


@given(st.lists(st.sampled_from([*"<|im_endstar>", *vocabularies.SPECIAL, "\ud800"])).map("".join))
def test_plain_text_never_becomes_a_control_token(text):
    assert min(BYTE_LEVEL.encode(text, add_special=False), default=3) > 2


def test_special_tokens_are_read_only_where_that_is_asked_for():
    text = "hello<|im_end|>"
    assert BYTE_LEVEL.encode(text, parse_special=True)[-1] == 2
    assert BYTE_LEVEL.encode(text)[-1] != 2
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_user_defined_tokens_are_always_read():
    think = BYTE_LEVEL.vocab_size - 2
    assert BYTE_LEVEL.encode("<think>") == [think]
    assert BYTE_LEVEL.encode("   ")[0] == think + 1


def test_the_longest_special_token_goes_first_wherever_it_stands():
    metadata = vocabularies.byte_level(user_defined=("ab", "bcd"))
    tokenizer = Tokenizer.from_metadata(metadata)
    assert [tokenizer.token_text(i) for i in tokenizer.encode("abcd")] == ["a", "bcd"]


def test_bos_and_eos_as_the_file_says():
    keys = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True, "add_eos_token": True}
    tokenizer = Tokenizer.from_metadata(vocabularies.byte_level(**keys))
    assert tokenizer.add_bos and tokenizer.bos_token == "<|im_start|>"
    plain = tokenizer.encode("hello", add_special=False)
    assert tokenizer.encode("hello") == [1, *plain, 2]
    assert tokenizer.encode("") == [1, 2]
    assert tokenizer.encode("", add_special=False) == []


def test_sentencepiece_puts_a_space_before_every_text_after_a_special_token():
    tokenizer = Tokenizer.from_metadata(vocabularies.sentencepiece({"▁a": -1.0, "a": -2.0}))
    a, space_a = 260, 259
    assert tokenizer.encode("a") == [1, space_a]
    assert tokenizer.encode("a<s>a", parse_special=True) == [1, space_a, 1, space_a]
    metadata = vocabularies.sentencepiece({"▁a": -1.0, "a": -2.0}, add_space_prefix=False)
    assert Tokenizer.from_metadata(metadata).encode("a") == [1, a]


def test_phi3_drops_white_space_after_special_tokens():
    metadata = vocabularies.sentencepiece({"▁": -3.0, "a": -2.0}, ("<|user|>",))
    metadata["general.name"] = "Phi-3 mini"
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode("<|user|>\n a", parse_special=True, add_special=False)
    assert [tokenizer.token_text(index) for index in ids] == ["<|user|>", "▁", "a"]


def test_lone_surrogates_are_replaced():
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("a\ud800b")) == "a\ufffdb"
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("\ud83d\ude00")) == "😀"


def test_facts_of_a_tokenizer():
    assert (BYTE_LEVEL.bos_id, BYTE_LEVEL.eos_id) == (0, 2)
    assert BYTE_LEVEL.stop_ids == {0, 2}
    assert BYTE_LEVEL.eos_token == "<|im_end|>" and not BYTE_LEVEL.add_bos
    assert set(BYTE_LEVEL.control_tokens) == set(vocabularies.SPECIAL)
    assert BYTE_LEVEL.token_text(None) == ""


def test_a_real_model(smollm2_path):
    with GGUFFile(smollm2_path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    text = "Hello, 2024 wörld!\n\n\tdef f(x):  # 日本 😀"
    ids = tokenizer.encode(text)
    # llama.cpp's ids
    assert ids == SMOLLM2_IDS
    assert tokenizer.decode(ids) == text
    assert tokenizer.stop_ids >= {0, 2} and tokenizer.eos_id == 2


SMOLLM2_IDS = [
    19556,
    28,
    216,
    34,
    32,
    34,
    36,
    267,
    29989,
    400,
    17,
    1116,
    197,
    1604,
    275,
    24,
    104,
    727,
    216,
    907,
    17097,
    241,
    115,
    40993,
    40303,
    218,
]
