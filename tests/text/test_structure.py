from __future__ import annotations

import builtins
import json
import re

import numpy as np
import pytest

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import CyclewiseError, InvalidParameterError
from cyclewise.text.structure import Structures
from cyclewise.text.tokenizer import Tokenizer
from tests.engine.toy import END, VOCAB_SIZE, ToyTokenizer
from tests.text.vocabularies import byte_level, sentencepiece


@pytest.fixture
def structures():
    made = Structures(ToyTokenizer(), VOCAB_SIZE)
    yield made
    made.close()


def allowed(structure):
    return np.flatnonzero(structure.allowed()).tolist()


def test_what_may_come_next(structures):
    structure = structures.make(SamplingParams(regex="ab?[cd]"))
    assert allowed(structure) == [*b"a"]
    assert not structure.advance(ord("a"))
    assert allowed(structure) == [*b"bcd"]
    assert not structure.advance(ord("b"))
    assert allowed(structure) == [*b"cd"]
    assert structure.advance(ord("c"))  # nothing can follow, and so it ends


def test_the_end_is_allowed_where_the_text_is_complete_alone(structures):
    structure = structures.make(SamplingParams(grammar='start: "x"+'))
    assert allowed(structure) == [*b"x"]
    assert not structure.advance(ord("x"))
    assert allowed(structure) == [*b"x", END]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_token_alone_may_be_asked_for(structures, temperature):
    structure = structures.make(SamplingParams(regex="ab*", temperature=temperature))
    assert [structure.allows(token) for token in (*b"ab", END)] == [True, False, False]
    structure.advance(ord("a"))
    assert [structure.allows(token) for token in (*b"ab", END)] == [False, True, True]


def test_each_structure_is_at_its_own_place(structures):
    params = SamplingParams(json_schema={"enum": ["one", "two"]})
    first, second = structures.make(params), structures.make(params)
    first.advance(ord('"'))
    first.advance(ord("t"))
    assert allowed(first) == [*b"w"]
    assert allowed(second) == [*b'"']
    assert structures.make(SamplingParams()) is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"regex": "(a"}, r"^regex cannot be followed: .*unclosed group$"),
        ({"regex": "(?=a)b"}, r"^regex cannot be followed: .*look-ahead.*not supported$"),
        ({"grammar": "start: x"}, r"^grammar cannot be followed: .*unknown name"),
        ({"grammar": "nothing"}, r"^grammar cannot be followed"),
        ({"json_schema": "{"}, r"^json_schema is no JSON"),
        ({"json_schema": {"pattern": "(?=a)b"}}, r"^json_schema uses `pattern`.*look-ahead"),
        ({"json_schema": {"patternProperties": {"a": {}, "b": {}}}}, r"uses `patternProperties`"),
        ({"regex": "x" * 2_000_000}, r"^regex has 2000000 characters, and 1048576 are the most"),
    ],
)
def test_what_cannot_be_followed(structures, values, sentence):
    with pytest.raises(InvalidParameterError, match=sentence):
        structures.make(SamplingParams(**values))


@pytest.mark.parametrize("values", [
    {"regex": "\ud800"}, {"grammar": 'start: "\ud800"'}, {"json_schema": {"const": "\ud800"}},
    {"json_schema": '{"const": ' + "9" * 4000 + "}"}, {"json_schema": {"$anchor": []}},
])  # fmt: skip
def test_what_the_library_cannot_read(structures, values):
    with pytest.raises(InvalidParameterError, match=r"cannot be followed|no schema") as caught:
        structures.make(SamplingParams(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 1, END + 1, 200, VOCAB_SIZE + 40])
def test_a_tokenizer_with_more_tokens_than_the_model_or_fewer(vocab_size):
    made = Structures(ToyTokenizer(), vocab_size)
    structure = made.make(SamplingParams(regex="ab?"))
    assert structure.allowed().shape == (vocab_size,)
    assert allowed(structure) == [*b"a"]
    made.close()


def test_a_structure_that_grows_too_complex(structures):
    many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(600)}}
    structure = structures.make(SamplingParams(json_schema=many))
    with pytest.raises(CyclewiseError, match=r"any further: .*max is 2000.*make it simpler"):
        for token_id in b'{"p1":1':
            structure.allowed()
            structure.advance(token_id)


@pytest.mark.parametrize(
    "values", [{"regex": "a", "grammar": "b"}, {"json_schema": True, "regex": ""}]
)
def test_one_structure_at_a_time(values):
    with pytest.raises(InvalidParameterError, match="an answer has one structure"):
        SamplingParams(**values)


def test_parameters_of_structures():
    assert SamplingParams(json_schema={"type": "null"}).structure == (
        "json_schema",
        '{"type": "null"}',
    )
    assert SamplingParams(json_schema=True).json_schema == "true"
    with pytest.raises(InvalidParameterError, match="ignore_eos"):
        SamplingParams(regex="a", ignore_eos=True)
    for values in ({"regex": 3}, {"grammar": b"x"}, {"json_schema": {"a": {1}}}):
        with pytest.raises(InvalidParameterError, match=next(iter(values))):
            SamplingParams(**values)


TOKENIZERS = {
    "byte level": Tokenizer.from_metadata(byte_level(user_defined=("<tool>",))),
    "sentencepiece": Tokenizer.from_metadata(
        sentencepiece({"▁": -1.0, "he": -2.0, "▁he": -3.0, "llo": -4.0}, ("<end_of_turn>",))
    ),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_vocabulary(kind):
    """Of every token: it is allowed if, and only if, what it prints may come."""
    tokenizer = TOKENIZERS[kind]
    structures = Structures(tokenizer, tokenizer.vocab_size + 40)  # logits without a token
    structure = structures.make(SamplingParams(regex="[a-z ]{1,4}[0-9]"))
    prints = tokenizer.all_bytes()
    wanted = re.compile(rb"[a-z ]{1,4}|[a-z ]{1,4}[0-9]")
    assert allowed(structure) == [i for i, piece in enumerate(prints) if wanted.fullmatch(piece)]
    structures.close()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_shown_is_what_was_asked_for(kind):
    tokenizer = TOKENIZERS[kind]
    text = " hello, <tool>\x7f é☃"
    structures = Structures(tokenizer, tokenizer.vocab_size)
    structure = structures.make(SamplingParams(grammar=f"start: {json.dumps(text)}"))
    detokenizer = tokenizer.stream([tokenizer.bos_id or 0], exact=True)
    left, shown = text.encode(), ""
    while left:
        token_id = allowed(structure)[0]
        piece = tokenizer.all_bytes()[token_id]
        assert left.startswith(piece)
        left = left[len(piece) :]
        shown += detokenizer.push(token_id)
        assert structure.advance(token_id) == (not left)
    assert shown == text
    structures.close()


def test_without_the_package(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **others):
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CyclewiseError, match=r"pip install 'cyclewise\[structured\]'"):
        Structures(ToyTokenizer(), VOCAB_SIZE)


def test_a_model_without_an_end():
    with pytest.raises(CyclewiseError, match="no token that ends a text"):
        Structures(ToyTokenizer(stop_ids=frozenset()), VOCAB_SIZE)


def test_a_text_is_compiled_once_for_each_salt(structures, monkeypatch):
    compiled = []
    inner = structures.compile

    def compile_(kind, text):
        compiled.append(text)
        return inner(kind, text)

    monkeypatch.setattr(structures, "compile", compile_)
    for _ in range(250):
        for regex in ("ab", "cd"):
            for salt in (b"", b"other"):
                structure = structures.make(SamplingParams(regex=regex), salt=salt)
                assert allowed(structure) == [ord(regex[0])]
    assert compiled == ["ab", "ab", "cd", "cd"]
    assert structures.known.lookups.hits == 996
    for _ in range(2):  # what cannot be followed is found out anew
        with pytest.raises(InvalidParameterError):
            structures.make(SamplingParams(regex="("))
    assert len(compiled) == 6
    for i in range(100):
        structures.make(SamplingParams(regex=f"x{i}"))
    assert len(structures.known) == 64
    structures.make(SamplingParams(regex="ab"))
    assert compiled[-1] == "ab"
