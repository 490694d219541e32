from __future__ import annotations

import json
import random
import struct
from typing import Any

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
from cyclewise.weights.safetensors import ITEM_BYTES, SafetensorsFile, parse
from tests.weights.build import safetensors

HUGE = 2**64 - 1


def raw(header: Any, data: bytes = b"") -> bytes:
    """A file of any header; text is written as it is."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def survives(buffer: bytes) -> bool:
    """Whether the file is let through; anything but an error of ours fails the test."""
    try:
        tensors, metadata = parse(buffer, "fuzz.safetensors")
    except CyclewiseError as error:
        assert "\n" not in str(error) and str(error).startswith("fuzz.safetensors: ")
        return False
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        assert end <= tensor.offset
        end = tensor.offset + tensor.nbytes
        assert tensor.nbytes == np.prod(tensor.shape, dtype=object) * ITEM_BYTES[tensor.dtype]
    assert end <= len(buffer)
    assert all(isinstance(value, str) for value in metadata.values())
    return True


def small_file() -> bytes:
    generator = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": generator.standard_normal((3, 5)).astype(np.float32),
        "a.b": generator.standard_normal(7).astype(np.float16),
        "scalar": np.array(3, np.int64),
        "none": np.zeros((0, 4), np.float32),
        "flags": np.array([True, False]),
    }
    return safetensors(tensors, {"format": "pt"})


def test_tensors_and_their_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    values = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([0.5, -2], np.float16),
        "scalar": np.array(-3, np.int64),
        "none": np.zeros((0, 4), np.float32),
    }
    path.write_bytes(safetensors(values, {"format": "pt"}))
    with SafetensorsFile(path) as file:
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == list(values)
        for name, expected in values.items():
            assert file.tensors[name].shape == expected.shape
            assert file.data(name).tobytes() == expected.tobytes()
            assert not file.data(name).flags.writeable
            found = file.values(name)
            assert found.dtype == expected.dtype and found.tolist() == expected.tolist()
            file.release(name)
        view = file.data("matrix")
    assert view.view(np.float32)[5] == 5.0  # still readable: the mapping goes with the last view


def test_bfloat16_and_types_that_numpy_lacks(tmp_path):
    path = tmp_path / "model.safetensors"
    header = {
        "b": entry((2,), "BF16", (0, 4)),
        "f8": entry((2,), "F8_E4M3", (4, 6)),
    }
    path.write_bytes(raw(header, np.array([0x3F80, 0xC000], np.uint16).tobytes() + b"\1\2"))
    with SafetensorsFile(path) as file:
        assert file.values("b").tolist() == [1.0, -2.0]
        assert file.data("f8").tolist() == [1, 2]
        with pytest.raises(UnsupportedModelError, match="'f8' is F8_E4M3"):
            file.values("f8")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GGUF", "only 4 bytes"),
        (b"GGUF\3\0\0\0abc", "not a safetensors file: it begins with b'GGUF"),
        (b"PK\3\4" + bytes(60), r"begins with b'PK\\x03\\x04"),
        (struct.pack("<Q", HUGE) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "ends inside its header"),
        (raw("{"), "no JSON object"),
        (raw('{"a": }'), "no JSON object"),
        (raw('{"a": NaN}'), "'NaN' is no whole number"),
        (raw('{"a": 1e999}'), "'1e999' is no whole number"),
        (raw('{"a": ' + "9" * 5000 + "}"), "no JSON object"),
        (raw('{"a": ' + "[" * 100_000), "nested too deeply"),
        (struct.pack("<Q", 3) + b'{"\xff', "no JSON object"),
        (raw('{"a": 1, "a": 1}'), "'a' occurs twice"),
        (raw({"a": 1}), "'a' should have a dtype"),
        (raw({"a": {"dtype": "F32"}}), "'a' should have a dtype"),
        (raw({"a": {**entry(), "more": 1}}), "'a' should have a dtype"),
        (raw({"__metadata__": 3}), "no table of texts"),
        (raw({"__metadata__": {"a": 3}}), "no table of texts"),
        (raw({"a": entry("2")}), "has the shape '2'"),
        (raw({"a": entry((-1,))}), "has the shape"),
        (raw({"a": entry((True,))}), "has the shape"),
        (raw({"a": entry((1,) * 9)}), "at most 8"),
        (raw({"a": entry((2**63,))}), "has the shape"),
        (raw({"a": entry(offsets=(0,))}), "has the offsets"),
        (raw({"a": entry(offsets=(8, 0))}), "has the offsets"),
        (raw({"a": entry(offsets=(0, "8"))}), "has the offsets"),
        (raw({"a": entry((2**40, 2**40))}), "has 8 bytes, where"),
        (raw({"a": entry((2**61, 2), offsets=(0, 2**62))}), "need 18446744073709551616"),
        (raw({"a": entry((3,))}, bytes(8)), "has 8 bytes, where .* need 12"),
        (raw({"a": entry()}, bytes(7)), "but the file has"),
        (raw({"a": entry(), "b": entry()}, bytes(8)), "'a' and 'b' overlap"),
        (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'a' and 'b' overlap"),
        (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "4 bytes before tensor 'a'"),
        (raw({"a": entry()}, bytes(12)), "4 bytes after the last tensor"),
    ],
)
def test_broken_files(content, reason):
    with pytest.raises(ModelFileError, match=reason):
        parse(content, "model.safetensors")


@pytest.mark.parametrize("dtype", ["F4", "U3", 7, None, ["F32"]])
def test_unknown_types(dtype):
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: tensor 'a' is of type"):
        parse(raw({"a": entry(dtype=dtype)}, bytes(8)), "model.safetensors")


def test_an_error_does_not_print_control_characters():
    with pytest.raises(ModelFileError) as caught:
        parse(raw({"\x1b[2J\n" * 100: 1}), "model.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_truncated_at_any_byte():
    content = small_file()
    assert survives(content)
    assert not any(survives(content[:length]) for length in range(len(content)))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such file"):
        SafetensorsFile(tmp_path / "missing.safetensors")
    with pytest.raises(ModelFileError, match="a directory"):
        SafetensorsFile(tmp_path)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_fuzz_anything_after_a_sound_start(content):
    survives(struct.pack("<Q", len(content) + 1) + b"{" + content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, HUGE) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
NUMBERS = st.integers(0, 16) | st.sampled_from([2**31, 2**61, 2**62, 2**63 - 1, 2**63, HUGE])
ENTRIES = st.builds(
    entry,
    st.lists(NUMBERS, max_size=4) | VALUES,
    st.sampled_from(["F32", "BF16", "U8", "F4"]) | VALUES,
    st.tuples(NUMBERS, NUMBERS) | VALUES,
)


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | VALUES),
    st.integers(0, 32),
)
def test_fuzz_structures(header, num_bytes):
    survives(raw(header, bytes(num_bytes)))


def test_fuzz_flipped_bytes():
    content = small_file()
    generator = random.Random(0)
    header_size = 8 + struct.unpack_from("<Q", content)[0]
    refused = 0
    for _ in range(5000):
        flipped = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            flipped[generator.randrange(header_size)] = generator.choice(
                (*b'0129[]{},:"', generator.randrange(256))
            )
        refused += not survives(bytes(flipped))
    assert 1000 < refused < 5000  # both ways out were taken
