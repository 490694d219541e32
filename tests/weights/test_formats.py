from __future__ import annotations

import gguf
import pytest

from cyclewise.errors import UnsupportedModelError
from cyclewise.weights.formats import FORMATS, format_of


def test_formats_agree_with_ggml():
    of_ggml = {name: found for name, found in FORMATS.items() if found.ggml_id is not None}
    assert set(FORMATS) - set(of_ggml) == {
        "I4_32", "I4_64", "I4_128", "I8_32", "I8_64", "I8_128"
    }  # fmt: skip
    for name, block_format in of_ggml.items():
        kind = gguf.GGMLQuantizationType[name]
        assert format_of(kind.value) is block_format
        assert (block_format.name, block_format.ggml_id) == (name, kind.value)
        assert (block_format.block_size, block_format.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_every_other_format_is_refused_by_its_name():
    others = [kind for kind in gguf.GGMLQuantizationType if kind.name not in FORMATS]
    assert others
    for kind in others:
        with pytest.raises(UnsupportedModelError, match=f"block format {kind.name} is not"):
            format_of(kind.value)
    with pytest.raises(UnsupportedModelError, match="block format number 12345 is not"):
        format_of(12345)
