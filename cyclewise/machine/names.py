"""What a moment's name says: `layers.12.ffn.down` is the `ffn.down` of layer 12.

`builder.py` gives the names; whoever adds moments up, by layer or over all layers, reads them here.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer that a moment belongs to; None of what comes before and after the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def collapsed(name: str) -> str:
    """The name that a moment shares with its like in all layers: `layers.*.ffn.down`."""
    return _LAYER.sub("layers.*.", name, count=1)
