"""Block formats: how many bytes hold how many weights.

The GGUF reader turns the format number of each tensor into a `Format`; `models/` and the packing of
weights read it. Numbers, names and sizes are those of ggml (`ggml_type` and its block structures).

Six formats are ours, for the integers of GPTQ, AWQ and compressed-tensors. Of 4 bits: I4_32, I4_64
and I4_128, whose blocks are 32, 64 or 128 columns of a row. A block is

    byte 0..1   float16 scale, little endian
    byte 2      uint8 zero point
    byte 3..    the codes, 16 bytes for each 32 columns: byte j of those has the code of column j in
                its low half, of column j + 16 in its high half (as in ggml's Q4_0)

and a weight is `scale * (code - zero_point)`, code in 0..15: zero point 8 for symmetric weights.
Of 8 bits: I8_32, I8_64 and I8_128 likewise, where zero point and codes are signed bytes, one code a
column: zero point 0 for symmetric weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from cyclewise.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Format:
    """A way of storing weights: `block_size` neighbours in a row share `block_bytes` bytes."""

    name: str
    ggml_id: int | None
    """None: it is not ggml's."""
    block_size: int
    block_bytes: int


FORMATS: dict[str, Format] = {
    block_format.name: block_format
    for block_format in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("BF16", 30, 1, 2),
        Format("Q8_0", 8, 32, 34),
        Format("Q4_0", 2, 32, 18),
        Format("Q4_1", 3, 32, 20),
        Format("Q5_0", 6, 32, 22),
        Format("Q5_1", 7, 32, 24),
        Format("Q2_K", 10, 256, 84),
        Format("Q3_K", 11, 256, 110),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
        Format("IQ4_NL", 20, 32, 18),
        Format("IQ4_XS", 23, 256, 136),
        Format("MXFP4", 39, 32, 17),
        Format("I4_32", None, 32, 19),
        Format("I4_64", None, 64, 35),
        Format("I4_128", None, 128, 67),
        Format("I8_32", None, 32, 35),
        Format("I8_64", None, 64, 67),
        Format("I8_128", None, 128, 131),
    )
}

_BY_ID = {found.ggml_id: found for found in FORMATS.values() if found.ggml_id is not None}

# The other numbers that ggml has given out, so that an error can say what the file holds.
_OTHER_NAMES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    40: "NVFP4",
    41: "Q1_0",
}


def format_of(ggml_id: int) -> Format:
    """The format with ggml's number `ggml_id`; any other raises UnsupportedModelError by name."""
    block_format = _BY_ID.get(ggml_id)
    if block_format is None:
        name = _OTHER_NAMES.get(ggml_id, f"number {ggml_id}")
        *names, last = [found.name for found in _BY_ID.values()]
        raise UnsupportedModelError(
            f"block format {name} is not supported; use a file whose tensors are "
            f"{', '.join(names)} or {last}"
        )
    return block_format
