from __future__ import annotations

import os
import random
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.errors import (
    CyclewiseError,
    ModelFileError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from cyclewise.weights.formats import FORMATS
from cyclewise.weights.gguf import GGUFFile, Header, parse
from tests.weights import build
from tests.weights.build import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64

HUGE = 2**64 - 1


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build.small_model())
    return path


def check_inside(header: Header, buffer: bytes) -> None:
    """What every header that is let through must hold: all tensors inside, none overlapping."""
    end = 0
    for tensor in sorted(header.tensors.values(), key=lambda tensor: tensor.offset):
        assert end <= tensor.offset and tensor.offset % header.alignment == 0
        end = tensor.offset + tensor.nbytes
        size = FORMATS[tensor.format.name]
        assert tensor.nbytes * size.block_size == np.prod(tensor.shape) * size.block_bytes > 0
    assert end <= len(buffer)


def survives(buffer: bytes) -> bool:
    """Whether the file is let through; anything but an error of ours fails the test."""
    try:
        header = parse(buffer, "fuzz.gguf")
    except CyclewiseError as error:
        assert "\n" not in str(error) and str(error).startswith("fuzz.gguf: ")
        return False
    check_inside(header, buffer)
    return True


def test_metadata_of_every_type(model_path):
    with GGUFFile(model_path) as file:
        metadata = dict(file.metadata)
        assert (file.path, file.version, file.alignment) == (model_path, 3, 64)
    assert metadata.pop("tokens") == ["a", "", "Ġthe", "日本", "🙂"]
    assert metadata.pop("none") == []
    scores, flags, nothing = (metadata.pop(key) for key in ("scores", "flags", "no numbers"))
    assert scores.dtype == np.float32 and scores.tolist() == [0.0, -1.5, 2.0]
    assert flags.dtype == np.bool_ and flags.tolist() == [False, True, True]
    assert nothing.dtype == np.int32 and nothing.size == 0
    assert metadata == {
        "general.architecture": "llama",
        "general.alignment": 64,
        "u8": 200,
        "i8": -100,
        "u16": 60_000,
        "i16": -30_000,
        "i32": -(2**31),
        "f32": 0.5,
        "bool": True,
        "u64": HUGE,
        "i64": -(2**63),
        "f64": 0.1,
    }


def test_tensors_and_their_bytes(model_path):
    content = model_path.read_bytes()
    with GGUFFile(model_path) as file:
        assert [
            (tensor.name, tensor.format.name, tensor.shape, tensor.nbytes)
            for tensor in file.tensors.values()
        ] == [
            ("token_embd.weight", "Q8_0", (3, 64), 6 * 34),
            ("norm.weight", "F32", (7,), 28),
            ("blk.0.ffn_down.weight", "Q4_K", (2, 256), 288),
        ]
        for name, tensor in file.tensors.items():
            view = file.data(name)
            assert (view.dtype, view.shape) == (np.uint8, (tensor.nbytes,))
            assert not view.flags.writeable and not view.flags.owndata
            file.release(name)
            assert view.tobytes() == content[tensor.offset : tensor.offset + tensor.nbytes]
    assert view[0] == content[tensor.offset]  # still readable: the mapping goes with the last view


def test_version_2(model_path):
    content = model_path.read_bytes()
    header = parse(content[:4] + struct.pack("<I", 2) + content[8:], "v2")
    assert header.version == 2 and len(header.tensors) == 3


def test_a_file_by_another_writer(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list(["<s>", "▁the", "é" * 300])
    writer.add_array("numbers", [1, -2, 3])
    values = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    writer.add_tensor("plain", values)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        assert file.metadata["llama.context_length"] == 128
        assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "▁the", "é" * 300]
        assert file.metadata["numbers"].tolist() == [1, -2, 3]
        assert file.tensors["packed"].shape == (4, 64)
        assert file.data("plain").view("<f4").tolist() == values.ravel().tolist()
        assert file.data("packed").tobytes() == packed.tobytes()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GG", "not a GGUF file"),
        (b"PK\3\4" + bytes(60), r"starts with b'PK\\x03\\x04'"),
        (build.gguf(version=1), "GGUF version 1"),
        (build.gguf(version=4), "GGUF version 4"),
        (build.gguf(version=3 << 24), "big-endian"),
        (build.gguf(num_entries=HUGE), f"claims {HUGE} metadata entries"),
        (build.gguf(num_tensors=HUGE), f"claims {HUGE} tensors"),
        (build.gguf(num_tensors=1 << 40), "more than the file can hold"),
        (build.gguf([build.entry("k", U8, 1)] * 2), "'k' occurs twice"),
        (build.gguf([build.entry(b"\xff\xfe", U8, 1)]), "metadata key is not valid UTF-8"),
        (build.gguf([build.entry("k" * 70_000, U8, 1)]), "longer than 65535"),
        (build.gguf([build.entry("k", 13, b"\0" * 64)]), "unknown value type 13"),
        (build.gguf([build.entry("k", STRING, struct.pack("<Q", HUGE))]), "ends inside .*'k'"),
        (build.gguf([build.entry("k", STRING, build.string(b"\x80"))]), "'k' is not valid UTF-8"),
        (build.gguf([build.entry("k", ARRAY, struct.pack("<IQ", 99, 0))]), "array of .* type 99"),
        (
            build.gguf([build.entry("k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, ARRAY, 1))]),
            "array of arrays",
        ),
        (
            build.gguf([build.entry("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]),
            "claims 2305843009213693952 strings",
        ),
        (
            build.gguf([build.entry("k", ARRAY, struct.pack("<IQ", U64, 2**61))]),
            "claims 2305843009213693952 values",
        ),
        (
            build.gguf([build.entry("k", ARRAY, struct.pack("<IQQ", STRING, 1, HUGE))]),
            "ends inside",
        ),
        (
            build.gguf([build.entry("k", ARRAY, struct.pack("<IQQQ", STRING, 2, HUGE - 15, 0))]),
            "ends inside",
        ),
        (
            build.gguf([build.entry("k", ARRAY, build.array(STRING, [b"ok", b"\xc3"]))]),
            "holds a string that is not valid UTF-8",
        ),
        (
            build.gguf([build.entry("k", ARRAY, build.array(STRING, [bytes(range(8))]))]),
            "as no token has",
        ),
        *(
            (build.gguf([build.entry("general.alignment", kind, value)]), "a power of two from 8")
            for kind, value in [(U32, 0), (U32, 4), (U32, 33), (I32, -32), (BOOL, 1), (STRING, "x")]
        ),
    ],
)
def test_broken_metadata(content, reason):
    with pytest.raises(ModelFileError, match=reason):
        parse(content, "model.gguf")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([build.tensor("t"), build.tensor("t", offset=128)], "'t' occurs twice"),
        ([build.tensor("a"), build.tensor("b", offset=96)], "'a' and 'b' overlap"),
        ([build.tensor("a", offset=96), build.tensor("b", offset=96)], "'a' and 'b' overlap"),
        ([build.tensor("t", offset=1024)], "ends at byte 1216, but the file has 320 bytes"),
        ([build.tensor("t", (33, 32))], "truncated or damaged"),
        ([build.tensor("t", offset=8)], "not a multiple of the alignment 32"),
        ([build.tensor("t", ())], "has 0 dimensions"),
        ([build.tensor("t", (1,) * 5)], "has 5 dimensions"),
        ([build.tensor("t", (32, 0))], "is empty"),
        ([build.tensor("t", (2**32, 2**32))], "overflow 64 bits"),
        ([build.tensor("t", (2**32, 2**31, 2**31, 2**34))], "overflow 64 bits"),
        ([build.tensor("t", (2**62,))], "overflow 64 bits"),  # its bytes do
        ([build.tensor("t", offset=HUGE - 31)], "overflow 64 bits"),
        ([build.tensor("t", (48,), 8)], "not a multiple of Q8_0's blocks of 32"),
        ([build.tensor("t", (128,), 12)], "not a multiple of Q4_K's blocks of 256"),
        ([build.tensor(b"\xff")], "name is not valid UTF-8"),
    ],
)
def test_broken_tensors(tensors, reason):
    with pytest.raises(ModelFileError, match=reason):
        parse(build.gguf(tensors=tensors, data=bytes(256)), "model.gguf")


def test_an_error_does_not_print_control_characters():
    content = build.gguf([build.entry("\x1b[2J\n" * 100, 13, b"\0" * 64)])
    with pytest.raises(ModelFileError) as caught:
        parse(content, "model.gguf")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


@pytest.mark.parametrize(("ggml_id", "name"), [(21, "IQ3_S"), (4_000_000_000, "number 4000000000")])
def test_unknown_block_format(ggml_id, name):
    content = build.gguf(tensors=[build.tensor("t", (256,), ggml_id)], data=bytes(2048))
    with pytest.raises(UnsupportedModelError, match=f"model.gguf: tensor 't': .*{name}"):
        parse(content, "model.gguf")


def experts(*tensors: bytes, nbytes: int) -> Header:
    return parse(build.gguf(tensors=list(tensors), data=bytes(nbytes)), "moe.gguf")


def test_experts_are_listed_one_by_one():
    name = "blk.7.ffn_gate_exps.weight"
    header = experts(build.tensor(name, (32, 5, 3), 8), nbytes=3 * 5 * 34)
    assert list(header.tensors) == [f"blk.7.ffn_gate.{i}.weight" for i in range(3)]
    start = header.tensors["blk.7.ffn_gate.0.weight"].offset
    for i, each in enumerate(header.tensors.values()):
        assert (each.shape, each.nbytes, each.offset) == ((5, 32), 170, start + i * 170)
    # Other names and shapes stay what they are.
    others = experts(
        build.tensor("blk.0.other_exps.weight", (2, 2, 2)),
        build.tensor("blk.0.ffn_up_exps.weight", (8,), offset=32), nbytes=64,
    )  # fmt: skip
    assert [t.shape for t in others.tensors.values()] == [(2, 2, 2), (8,)]


def test_experts_that_cannot_be():
    stacked, one = "blk.0.ffn_up_exps.weight", "blk.0.ffn_up.1.weight"
    with pytest.raises(ModelFileError, match=r"'blk.0.ffn_up.1.weight' is also part of"):
        experts(build.tensor(stacked, (2, 2, 2)), build.tensor(one, (2, 2), offset=32), nbytes=64)
    with pytest.raises(UnsupportedModelError, match="holds 1025 experts"):
        experts(build.tensor(stacked, (1, 1, 1025)), nbytes=4100)


def test_truncated_at_any_byte():
    content = build.small_model()
    assert survives(content)
    assert not any(survives(content[:length]) for length in range(len(content)))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        GGUFFile(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="a directory"):
        GGUFFile(tmp_path)
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(ModelFileError, match="is empty"):
        GGUFFile(empty)
    with pytest.raises(ModelNotFoundError):
        GGUFFile(empty / "inside.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        GGUFFile("nul\0byte.gguf")
    with pytest.raises(ModelFileError, match="cannot be read"):
        GGUFFile("n" * 5000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(ModelFileError, match="not a regular file"):
            GGUFFile(tmp_path / "pipe.gguf")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file"
)
def test_a_file_that_may_not_be_read(model_path):
    model_path.chmod(0)
    with pytest.raises(ModelFileError, match="cannot be read"):
        GGUFFile(model_path)


@settings(max_examples=1000)
@given(st.binary(max_size=400))
def test_fuzz_anything_after_a_sound_start(content):
    survives(b"GGUF" + struct.pack("<I", 3) + content)


NUMBERS = st.one_of(
    st.integers(0, 40),
    st.integers(0, HUGE),
    st.sampled_from([2**31, 2**32, 2**61, 2**63 - 1, 2**63, HUGE - 7, HUGE - 31]),
)
ENTRIES = st.builds(
    lambda key, kind, value: build.entry(key, kind, value),
    st.sampled_from(["a", "b", "general.alignment", "split.count"]),
    st.integers(0, 14),
    st.binary(max_size=24) | NUMBERS.map(lambda number: struct.pack("<QQ", 5, number)),
)
TENSORS = st.builds(
    build.tensor,
    st.sampled_from(["a", "b", "c"]),
    st.lists(NUMBERS, max_size=5).map(tuple),
    st.integers(0, 45),
    NUMBERS,
)


@settings(max_examples=200)
@given(
    st.lists(ENTRIES, max_size=4),
    st.lists(TENSORS, max_size=4),
    st.none() | NUMBERS,
    st.none() | NUMBERS,
)
def test_fuzz_structures(entries, tensors, num_entries, num_tensors):
    survives(
        build.gguf(entries, tensors, bytes(64), num_entries=num_entries, num_tensors=num_tensors)
    )


def flip_bytes(content: bytes, num_cases: int) -> int:
    """How many of `num_cases` files with a few bytes changed are refused."""
    generator = random.Random(0)
    header_size = min(tensor.offset for tensor in parse(content, "whole").tensors.values())
    refused = 0
    for _ in range(num_cases):
        flipped = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            flipped[generator.randrange(header_size)] = generator.choice(
                (0, 1, 127, 128, 255, generator.randrange(256))
            )
        refused += not survives(bytes(flipped))
    return refused


def test_fuzz_flipped_bytes_of_a_file_with_everything():
    assert 1000 < flip_bytes(build.small_model(), 6000) < 6000  # both ways out were taken


def test_fuzz_flipped_bytes_of_a_small_real_file(smollm2_path):
    with GGUFFile(smollm2_path) as file:
        entries = []
        for key, value in file.metadata.items():
            if isinstance(value, str):
                entries.append(build.entry(key, STRING, value))
            elif isinstance(value, list):
                entries.append(build.entry(key, ARRAY, build.array(STRING, value[:20])))
            elif isinstance(value, np.ndarray):
                entries.append(build.entry(key, ARRAY, build.array(I32, value[:20].tolist())))
            else:
                kind = {bool: BOOL, int: U32, float: F32}[type(value)]
                entries.append(build.entry(key, kind, value))
        norms = [tensor for tensor in file.tensors.values() if len(tensor.shape) == 1][:3]
        data = b"".join(file.data(tensor.name).tobytes() for tensor in norms)
        table = [
            build.tensor(tensor.name, tensor.shape, 0, i * tensor.nbytes)
            for i, tensor in enumerate(norms)
        ]
    assert 500 < flip_bytes(build.gguf(entries, table, data), 3000) < 3000


def test_a_real_vocabulary_with_flipped_bytes(shared_data):
    path = shared_data / "tokenizer-vectors" / "ggml-vocab-llama-spm.gguf"
    content = path.read_bytes()
    header = parse(content, "vocabulary")
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 32_000
    generator = random.Random(1)
    for _ in range(25):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        survives(bytes(flipped))


def test_real_model(smollm2_path):
    with GGUFFile(smollm2_path) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 49_152
        assert file.metadata["tokenizer.ggml.merges"][0] == "Ġ t"
        embedding = file.tensors["token_embd.weight"]
        assert (embedding.shape, embedding.format.name) == ((49_152, 576), "Q8_0")
        assert file.tensors["blk.0.ffn_up.weight"].format.name == "Q4_1"
        assert len(file.tensors) == 272
        check_inside(Header(3, 32, {}, file.tensors, file.num_tensors), smollm2_path.read_bytes())
