"""How the commands show things: plain text where standard output is no terminal, a little more
where it is one. `cli.py` and `repl.py` come here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclewise.engine.request import SamplingParams
    from cyclewise.llm import Piece, Result

# A model's text must not move the cursor or rename the window: only tabs and new lines act.
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def write(text: str) -> None:
    """Write a piece of a model's text at once."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show(pieces: Iterable[Piece]) -> Result:
    """Write a stream as it comes; return its result."""
    last = ""
    for piece in pieces:
        if piece.text:
            write(piece.text)
            last = piece.text
    assert piece.result is not None
    if not last.endswith("\n"):
        write("\n")
    return piece.result


def show_choices(pieces: Iterable[Piece]) -> Result:
    """Write several answers, one below the other, when all have ended; return their result."""
    *_, last = pieces
    assert last.result is not None
    for number, choice in enumerate(last.result.choices, 1):
        note(f"answer {number} of {len(last.result.choices)}")
        write(choice.text if choice.text.endswith("\n") else choice.text + "\n")
    return last.result


def note(text: str) -> None:
    """Write a remark to standard error, dim on a terminal."""
    sys.stdout.flush()
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def summary(result: Result, params: SamplingParams, context: int) -> str:
    """One line on how fast a generation was and why it ended."""
    why = {"stop": "the model ended its turn", "stop_string": "a stop string came"}.get(
        result.finish_reason,
        f"--max-tokens {params.max_tokens} reached"
        if len(result.token_ids) == params.max_tokens
        else f"the context of {context} tokens is full",
    )
    reused = f" + {result.reused_tokens} cached" if result.reused_tokens else ""
    guessed = (
        f" ({result.accepted_tokens} of {result.guessed_tokens} guessed came true)"
        if result.guessed_tokens
        else ""
    )
    return (
        f"prompt {result.prompt_tokens - result.reused_tokens}{reused} tokens at "
        f"{result.prefill_tokens_per_second:.0f} tok/s, answer {result.generated_tokens} tokens at "
        f"{result.decode_tokens_per_second:.0f} tok/s{guessed}; {why}"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns of equal width; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def size(nbytes: int | None) -> str:
    """A number of bytes as a person says it."""
    if nbytes is None:
        return "?"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
