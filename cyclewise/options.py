"""What several commands share: options, loading a model, printing JSON.

`cli.py`, `text_commands.py` and `clock_commands.py` come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cyclewise.errors import InvalidParameterError

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
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="FORMAT",
        help="Of a directory of float weights: q8_0, q4_0 or q4_k, made once and kept.",
        show_default=False,
    ),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv", metavar="f16|int8", help="What the KV cache holds; int8 takes half the bytes."
    ),
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess tokens that the text has had before, and verify several at once.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="A smaller model of the same vocabulary that guesses tokens too.",
        show_default=False,
    ),
]
Lora = Annotated[
    str | None,
    typer.Option(
        "--lora",
        metavar="PATH",
        help="A LoRA adapter: a directory that PEFT wrote, or a GGUF adapter.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the model is told beforehand.")
]
_OWN = "Default: the model's own, or"
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help=f"0: the likeliest token. {_OWN} 0.8."),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="K", help=f"Only the K likeliest; 0: all. {_OWN} 40."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help=f"The likeliest of this share; 1: all. {_OWN} 0.95."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help=f"This share of the best; 0: all. {_OWN} 0.05."),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", metavar="X", help=f"On the last 64 tokens; 1: none. {_OWN} 1."
    ),
]
TypicalP = Annotated[
    float,
    typer.Option("--typical-p", metavar="P", help="Only tokens as surprising as is usual; 1: all."),
]
PresencePenalty = Annotated[
    float,
    typer.Option("--presence-penalty", metavar="X", help="On what was said already; -2 to 2."),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option("--frequency-penalty", metavar="X", help="The same for each time; -2 to 2."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Same seed, same text. Default: random."),
]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", metavar="N", help="Length of the answer; 0: no limit.")
]


NamedLoras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME=PATH",
        help="A LoRA adapter that requests call NAME. May be given repeatedly.",
        show_default=False,
    ),
]


def named_adapters(loras: Sequence[str] | None) -> dict[str, str]:
    """The paths of adapters by their names. Raises InvalidParameterError."""
    found: dict[str, str] = {}
    for text in loras or ():
        name, _, path = text.partition("=")
        if not name or not path:
            raise InvalidParameterError(f"--lora is {text!r}; here it is like NAME=PATH")
        if name in found:
            raise InvalidParameterError(f"two adapters are called {name!r}: give each its own name")
        found[name] = path
    return found


def adapters(lora: str | None) -> dict[str, str] | None:
    """What `--lora` asks to be loaded: one adapter, named by its path."""
    return None if lora is None else {lora: lora}


def load(
    model: str,
    context: int | None,
    threads: int | None,
    *,
    kv: str = "f16",
    lora: str | None = None,
    quantize: str | None = None,
) -> Model:
    """Fetches a model if need be, and loads it."""
    from cyclewise.machine.names import cache_kind
    from cyclewise.models import load_model
    from cyclewise.weights.sources import resolve

    kind = cache_kind(kv)  # before anything is fetched
    return load_model(
        resolve(model), context=context, threads=threads, kv=kind, adapters=adapters(lora),
        quantize=quantize,
    )  # fmt: skip


def read_file(path: Path, what: str) -> str:
    """The text of a UTF-8 file that an option names; `what` it is, for the error."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameterError(f"cannot read the {what} {str(path)!r}: {error}") from None


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    import json

    print(json.dumps(value, ensure_ascii=False, indent=2))


def parse_size(text: str, option: str) -> int:
    """Bytes of a size like 0, 500MB or 8GB, of powers of 1,000."""
    import re

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise InvalidParameterError(f"{option} is {text!r}; a size is like 0, 500MB or 8GB.")
    return int(float(found[1]) * 1000 ** ("kmgt".index(found[2]) + 1 if found[2] else 0))
