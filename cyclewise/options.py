"""What several commands share: options, loading a model, printing JSON.

`cli.py` and `clock_commands.py` come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cyclewise.models import Model

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Short name, path, hf: or pypi:.")]
DefaultModelName = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Short name, path, hf: or pypi:.")
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="N",
        help="Most tokens of prompt and answer. Default: the model's own, at most 4096.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Default: what is best here, or all CPUs.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def load(model: str, context: int | None, threads: int | None) -> Model:
    """Fetches a model if need be, and loads it."""
    from cyclewise.models import load_model
    from cyclewise.weights.sources import resolve

    return load_model(resolve(model), context=context, threads=threads)


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    import json

    print(json.dumps(value, ensure_ascii=False, indent=2))
