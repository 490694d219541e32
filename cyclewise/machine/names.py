"""What a moment's name says: `layers.12.ffn.down` is the `ffn.down` of layer 12; and what a KV
cache may hold.

`builder.py` gives the names; whoever adds moments up, by layer or over all layers, reads them here.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from cyclewise.errors import InvalidParameterError

CacheKind = Literal["f16", "int8"]
"""What a KV cache holds: float16, or int8 codes with a scale for each token and head."""

_LAYER = re.compile(r"layers\.(\d+)\.")


def cache_kind(text: object) -> CacheKind:
    """Raises InvalidParameterError unless it is one."""
    for kind in get_args(CacheKind):
        if text == kind:
            found: CacheKind = kind
            return found
    raise InvalidParameterError(f"kv is {text!r}; a KV cache holds f16 or int8.")


def layer_of(name: str) -> int | None:
    """The layer that a moment belongs to; None of what comes before and after the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def collapsed(name: str) -> str:
    """The name that a moment shares with its like in all layers: `layers.*.ffn.down`."""
    return _LAYER.sub("layers.*.", name, count=1)
