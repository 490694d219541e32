"""Cyclewise runs large language models on CPUs and says where every clock cycle went.

    from cyclewise import LLM, SamplingParams

    with LLM("smollm2") as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=20)).text)

The names in `__all__` are the public ones. They are imported when first asked for, so that
`cyclewise --help` does not pay for numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclewise.engine.request import SamplingParams
    from cyclewise.errors import CyclewiseError
    from cyclewise.llm import LLM, Piece, Result

__version__ = "0.1.0"

__all__ = ["LLM", "CyclewiseError", "Piece", "Result", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "cyclewise.llm",
    "CyclewiseError": "cyclewise.errors",
    "Piece": "cyclewise.llm",
    "Result": "cyclewise.llm",
    "SamplingParams": "cyclewise.engine.request",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cyclewise' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
