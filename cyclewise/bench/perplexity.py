"""Perplexity of a model on a text, scored exactly as llama.cpp's `perplexity` tool does.

The engine and a text's token ids come in, from `cyclewise perplexity` or `benchmarks/quality.py`;
one number goes out. The text is cut into chunks of `context` tokens, each evaluated from an empty
context, and only the second half of each is scored, so that every scored token has at least half a
chunk before it (llama.cpp, `tools/perplexity/perplexity.cpp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cyclewise.errors import InvalidParameterError

if TYPE_CHECKING:
    import numpy.typing as npt

    from cyclewise.engine.engine import Engine

ROWS_AT_ONCE = 128  # bounds the memory that logits take


class Vocabulary(Protocol):
    """What decides on a beginning-of-text token."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Perplexity:
    """The result; `as_dict` is the JSON of the command."""

    perplexity: float
    tokens: int  # that were scored
    chunks: int
    context: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def perplexity(
    engine: Engine,
    token_ids: Sequence[int],
    *,
    vocabulary: Vocabulary,
    context: int = 512,
    chunks: int = 32,
    adapter: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Perplexity:
    """The exponential of the mean negative log-likelihood of the scored tokens.

    token_ids   the text's, with the special tokens that the model adds to any text
    vocabulary  the tokenizer: if it adds a beginning-of-text token, that takes the place of the
                first token of every chunk
    context     tokens of a chunk
    chunks      how many, from the start of the text
    adapter     the number of the LoRA adapter that the model has

    Raises InvalidParameterError if the text is too short for that many chunks.
    """
    loss, count = 0.0, 0
    for index, chunk in enumerate(cut(token_ids, vocabulary, context, chunks)):
        progress(f"chunk {index + 1} of {chunks}")
        for first, logits in scored_logits(engine, chunk, adapter):
            targets = chunk[first + 1 : first + 1 + len(logits)]
            loss += sum(
                -float(log_softmax(row)[target])
                for row, target in zip(logits, targets, strict=True)
            )
            count += len(logits)
    progress("")
    return Perplexity(float(np.exp(loss / count)), count, chunks, context)


def cut(
    token_ids: Sequence[int], vocabulary: Vocabulary, context: int, chunks: int
) -> list[list[int]]:
    """The first `chunks` chunks of a text, each beginning with the token that the model wants."""
    if context < 4:
        raise InvalidParameterError(f"context must be at least 4 tokens, not {context}.")
    if chunks < 1:
        raise InvalidParameterError(f"chunks must be at least 1, not {chunks}.")
    if len(token_ids) < context * chunks:
        raise InvalidParameterError(
            f"the text has {len(token_ids)} tokens, which is {len(token_ids) // context} chunks of "
            f"{context} and not {chunks}: give a longer text, or ask for fewer chunks."
        )
    parts = [list(token_ids[index * context :][:context]) for index in range(chunks)]
    if vocabulary.add_bos and vocabulary.bos_id is not None:
        for part in parts:
            part[0] = vocabulary.bos_id
    return parts


def scored_logits(
    engine: Engine, chunk: Sequence[int], adapter: int | None = None
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Evaluate a chunk; yield (position of the first row, logits (rows, vocab_size)), in order.

    Rows are those of positions n/2 to n-2 of a chunk of n tokens: each predicts the next token.
    """
    sequence = engine.new_sequence(adapter)
    first, last = len(chunk) // 2, len(chunk) - 1
    engine.evaluate(sequence, chunk[:first], "none")
    for start in range(first, last, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, last)
        yield start, engine.evaluate(sequence, chunk[start:stop], "all")
    engine.free(sequence)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The log-probabilities of one row of logits (vocab_size,), in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
