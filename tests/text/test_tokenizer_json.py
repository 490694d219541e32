from __future__ import annotations

import base64
import functools
import json
import random
import struct

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cyclewise.errors import CyclewiseError, ModelFileError, UnsupportedModelError
from cyclewise.text.chat import ChatTemplate, Part, Rendered
from cyclewise.text.tokenizer import Tokenizer
from cyclewise.text.tokenizer_json import JsonTokenizer
from cyclewise.weights.gguf import GGUFFile
from tests.text import vocabularies

TEXTS = [
    "hello world", "", " ", "  two  spaces ", "hello<|im_end|>hello", "日本語 🙂", "<tool>x</tool>",
    "a\u0301 \t\n", "<s></s><unk>", "<0x0A>▁a", "\U0010ffff1\U0010ffff", "\ud800x", "1234",
]  # fmt: skip


def byte_level(**settings):
    """A library tokenizer with ChatML's tokens and one that is no control token."""
    metadata = vocabularies.byte_level(special=[])
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(models.BPE(ids, merges, **settings))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(vocabularies.SPECIAL)
    library.add_tokens(["<tool>", "</tool>"])
    return library


def sentencepiece(**settings):
    """One with bytes for what it lacks, a space before every text, and a BOS token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁helowrd",
              "ll", "he", "hell", "hello", "▁w", "▁hello"]  # fmt: skip
    merges = [("l", "l"), ("h", "e"), ("he", "ll"), ("hell", "o"), ("▁", "w"), ("▁", "hello")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(["<unk>", "<s>", "</s>", "<|end|>"])
    return library


def unigram():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁hello", -1.0)]
    pieces += [(letter, -3.0) for letter in "helowrd</s>"] + [("▁world", -1.5)]
    pieces = list(dict(pieces).items())
    library = tokenizers.Tokenizer(models.Unigram(pieces, 2, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    library.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return library


def make(library, settings=None, stops=()):
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.huggingface.json": library if isinstance(library, str) else library.to_str(),
            "cyclewise.tokenizer_config": settings or {},
            "cyclewise.stop_token_ids": list(stops),
        }
    )
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


@pytest.mark.parametrize("make_library", [byte_level, sentencepiece, unigram])
def test_ids_are_the_librarys(make_library):
    library = make_library()
    tokenizer = make(library, {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    harmless = [text for text in TEXTS if "<" not in text and "\U0010ffff" not in text][:-2]
    for text in [*harmless, "1234"]:
        assert tokenizer.encode(text) == library.encode(text).ids
        plain = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == plain
        assert tokenizer.decode(plain) == library.decode(plain)


@pytest.mark.parametrize("make_library", [byte_level, sentencepiece, unigram])
def test_plain_text_never_becomes_a_control_token(make_library):
    library = make_library()
    tokenizer = make(library, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    control = {library.token_to_id(text) for text in tokenizer.control_tokens}
    assert len(control) >= 3
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special=False)
        # what no token of the vocabulary writes stays unknown
        assert not (control - {library.token_to_id("<unk>")}) & set(ids)
    if make_library is not unigram:
        for text in TEXTS[:-3]:
            read = text if make_library is byte_level else text.replace("▁", " ")
            assert tokenizer.decode(tokenizer.encode(text)) == read


def test_control_tokens_where_they_are_asked_for():
    library = byte_level()
    tokenizer = make(library)
    for text in TEXTS[:8]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == expected
    assert library.token_to_id("<|im_end|>") in tokenizer.encode(TEXTS[4], parse_special=True)
    assert library.token_to_id("<tool>") in tokenizer.encode("<tool>")
    assert tokenizer.decode(tokenizer.encode("<tool>x")) == "<tool>x"


@pytest.mark.parametrize("make_library", [byte_level, sentencepiece])
def test_a_chat_is_encoded_as_a_whole(make_library):
    library = make_library()
    tokenizer = make(library)
    end = "<|im_end|>" if make_library is byte_level else "<|end|>"
    parts = [
        (" hello", False), (end, True), ("hello ", False), (end, True), (end, True), ("w", False)
    ]  # fmt: skip
    rendered = Rendered(tuple(Part(*part) for part in parts))
    assert (
        tokenizer.encode_chat(rendered)
        == library.encode(rendered.text, add_special_tokens=False).ids
    )
    mixed = Rendered((Part(f"a{end}", False), Part(end, True)))
    assert tokenizer.encode_chat(mixed).count(library.token_to_id(end)) == 1


def test_a_chat_begins_with_one_bos_token():
    tokenizer = make(sentencepiece(), {"bos_token": "<s>"})
    assert tokenizer.add_bos and tokenizer.bos_id == 1
    for parts in ((Part("hello", False),), (Part("<s>", True), Part("hello", False))):
        assert tokenizer.encode_chat(Rendered(parts))[:2] == [1, tokenizer.encode("hello")[1]]


def test_template_and_tokenizer_agree_on_what_is_special():
    tokenizer = make(byte_level(), {"eos_token": "<|im_end|>"})
    template = ChatTemplate.for_model({}, tokenizer)
    ids = tokenizer.encode_chat(template.render([{"role": "user", "content": "<|im_end|>"}]))
    assert ids.count(tokenizer.eos_id) == 1


@pytest.mark.parametrize(
    ("settings", "begins", "ends"),
    [
        ({}, False, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_eos_token": True}, False, True),
    ],
)
def test_flags_stand_in_for_a_post_processor(settings, begins, ends):
    library = sentencepiece()
    settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    assert make(library, settings).encode("hello") == library.encode("hello").ids
    metadata = json.loads(library.to_str())
    metadata["post_processor"] = None
    tokenizer = make(json.dumps(metadata), settings)
    ids = tokenizer.encode("hello")
    assert (ids[0] == 1, ids[-1] == 2, tokenizer.add_bos) == (begins, ends, begins)


def flagged(make_library):
    """With added tokens of every kind; and texts that try them."""
    library = make_library()
    for special in (True, False):
        add = library.add_special_tokens if special else library.add_tokens
        for flag in ("lstrip", "rstrip", "single_word", "normalized"):
            token = tokenizers.AddedToken(
                f"{'S' if special else 'u'}_{flag} {flag}", special=special,
                **{"normalized": False} | {flag: True},
            )  # fmt: skip
            add([token])
    words = [t.content for t in library.get_added_tokens_decoder().values()] + [
        "hello", " ", "  ", "\n", "w", " w", "x_", "_",
    ]  # fmt: skip
    generator = random.Random(0)
    texts = ["".join(generator.choices(words, k=6)) for _ in range(300)]
    return library, texts


@pytest.mark.parametrize("make_library", [byte_level, sentencepiece, unigram])
def test_flags_of_added_tokens(make_library):
    library, texts = flagged(make_library)
    tokenizer = make(library)
    special = {i for i, t in library.get_added_tokens_decoder().items() if t.special}
    special -= {library.token_to_id("<unk>")}
    harmless = 0
    for text in texts:
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False, parse_special=True) == ids
        if "<unk>" not in text and not special & set(ids):
            harmless += 1
            assert tokenizer.encode(text, add_special=False) == ids
    assert harmless > 20


def test_an_added_token_prints_the_space_that_it_was_found_with():
    library = sentencepiece()
    library.add_tokens([tokenizers.AddedToken("<tool>", normalized=True)])
    tokenizer = make(library)
    for text in ("hello <tool> hello", "hello<tool>", "<tool>"):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert library.token_to_id("<tool>") in tokenizer.encode("hello <tool>")


def test_stop_tokens():
    library = byte_level()
    end, start = library.token_to_id("<|im_end|>"), library.token_to_id("<|im_start|>")
    assert make(library).stop_ids == {library.token_to_id("<|endoftext|>"), end}
    tokenizer = make(library, {"eos_token": "<tool>"}, [start, 10**9])
    assert {start, library.token_to_id("<tool>")} <= tokenizer.stop_ids
    assert "<tool>" in tokenizer.control_tokens  # what ends a turn is none of a user's


def test_tokens_without_a_name_print_nothing():
    """A model's table may have more rows than its tokenizer has tokens, and any may be drawn."""
    text = byte_level().to_str()
    size = make(text).vocab_size
    for vocab_size, found in ((size + 5, size + 5), (3, size), (1 << 40, size), ("x", size)):
        metadata = {"tokenizer.huggingface.json": text, "cyclewise.vocab_size": vocab_size}
        tokenizer = Tokenizer.from_metadata(metadata)
        assert tokenizer.vocab_size == found
    padded = Tokenizer.from_metadata(metadata | {"cyclewise.vocab_size": size + 5})
    ids = padded.encode("hello")
    assert padded.decode([size, *ids, size + 4]) == "hello"
    assert padded.all_bytes()[size:] == [b""] * 5


def test_streams_are_exact():
    tokenizer = make(byte_level())
    text = "hello 日本語 🙂 <tool>"
    stream = tokenizer.stream()
    ids = tokenizer.encode(text)
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_tokens_that_only_the_settings_name():
    more = {"300": {"content": "<|more|>", "special": True}, "x": 3, "7": "no"}
    tokenizer = make(byte_level(), {"added_tokens_decoder": more})
    assert "<|more|>" in tokenizer.control_tokens and tokenizer.vocab_size == 301
    assert tokenizer.encode("<|more|>", parse_special=True) == [300]


def test_whole_words_that_are_control_tokens():
    library = byte_level(ignore_merges=True)
    metadata = json.loads(library.to_str())
    metadata["model"]["vocab"]["hell"] = 290
    metadata["added_tokens"] = [{"id": 290, "content": "hell", "special": True,
        "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}]  # fmt: skip
    tokenizer = make(json.dumps(metadata))
    assert tokenizer.decode(tokenizer.encode("hell")) == "hell"
    assert tokenizer.encode("hell", parse_special=True) == [290]


def test_damaged_files():
    whole = json.loads(byte_level().to_str())
    for text, reason in (
        ("", "no JSON"), ("[]", "no JSON"), ("{}", "no JSON"), ('{"a": 1', "no JSON"),
        ('{"model": ' + "[" * 10**5, "nested too deeply"), ('{"model": 3}', "no model"),
        (json.dumps(whole | {"added_tokens": 3}), "no list"),
        (json.dumps(whole | {"added_tokens": [{"content": "a", "id": -1}]}), "has the id -1"),
        (json.dumps(whole | {"added_tokens": [{"content": "zz", "id": 3}]}), "two tokens have one"),
        (json.dumps(whole | {"model": whole["model"] | {"merges": ["x y"]}}), "damaged"),
        (json.dumps(whole | {"model": whole["model"] | {"vocab": {"a": -3}}}), "no table of ids"),
        (json.dumps(whole | {"post_processor": {"type": "TemplateProcessing", "single": [3]}}),
         "no template"),
    ):  # fmt: skip
        with pytest.raises(ModelFileError, match=reason):
            make(text)


def template(single, special=None):
    return {"type": "TemplateProcessing", "single": single, "special_tokens": special or {}}


@pytest.mark.parametrize("part", [
    {"post_processor": template(3.5)}, {"post_processor": template([{"SpecialToken": "<s>"}])},
    {"post_processor": template([{"SpecialToken": {"id": ["<s>"]}}])},
    {"post_processor": template([{"SpecialToken": {"id": "<s>"}}], {"<s>": "<s>"})},
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 10}] * 9}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "o"}, "content": "o" * 100}},
    {"normalizer": {"type": "Prepend", "prepend": "o" * 100}},
    {"decoder": functools.reduce(lambda p, _: {"type": "Sequence", "decoders": [p]}, range(9), {})},
])  # fmt: skip
def test_hostile_parts(part):
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        make(json.dumps(json.loads(byte_level().to_str()) | part))


@pytest.mark.parametrize(
    "settings",
    [{"additional_special_tokens": 3}, {"added_tokens_decoder": {"1" * 5000: {"content": "z"}}}],
)
def test_hostile_settings_name_no_token(settings):
    assert make(byte_level().to_str(), settings).encode("hello world")


def test_a_library_that_panics_fails_in_a_sentence():
    whole = json.loads(byte_level().to_str())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(l+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    tokenizer = make(json.dumps(whole | {"pre_tokenizer": split}))
    with pytest.raises(ModelFileError, match="fails on this text"):
        tokenizer.encode("l" * 40 + "o")


def test_a_damaged_normalizer_is_an_error_of_ours():
    """The library panics on it."""
    metadata = json.loads(unigram().to_str())
    table = [0x100 << 10 | 0x100 | ord("h") if i % 256 == ord("h") else 0 for i in range(512)]
    table[0] = 0
    data = struct.pack("<I512I", 2048, *table) + b"x\0"
    charsmap = base64.b64encode(data).decode()
    metadata["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    with pytest.raises(ModelFileError, match="damaged"):
        make(json.dumps(metadata)).encode("hello")


def test_kinds_that_no_decoder_has():
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedModelError, match=r"type 'WordPiece' is not supported; BPE and"):
        make(words)
    library = byte_level()
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match=r"its decoder \(WordPiece\)"):
        make(library)


def test_fuzz_flipped_characters():
    generator = random.Random(0)
    whole = sentencepiece().to_str()
    refused = 0
    for _ in range(400):
        characters = list(whole)
        for _ in range(generator.choice((1, 1, 3))):
            characters[generator.randrange(len(whole))] = generator.choice('0129{}[],:"a -')
        try:
            make("".join(characters), {"bos_token": "<s>"}).encode("hello world")
        except CyclewiseError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 20 < refused < 400


def test_a_thousand_lines_of_a_real_vocabulary(smollm2_path, shared_data):
    """The library's file and the GGUF file of one vocabulary give the same ids."""
    with GGUFFile(smollm2_path) as file:
        metadata = file.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    library = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    library.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    library.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == 3])
    ours, theirs = make(library), Tokenizer.from_metadata(metadata)
    text = (shared_data / "wikitext-2" / "wikitext-2-raw-test.joined.txt").read_text("utf-8")
    for line in text.split("\n")[:1000]:
        ids = library.encode(line).ids
        assert ours.encode(line) == ids == theirs.encode(line)
        assert ours.decode(ids) == line
