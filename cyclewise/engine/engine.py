"""READ FIRST. The engine is three lines: schedule, run, sample.

Token ids come in, for a sequence whose earlier tokens lie in the KV cache; logits go out, and the
sampler makes the next token id of them:

    while any(request.num_left for request in requests):
        logits = engine.step(requests)      # schedule: who runs, on how many tokens; then run
        ... sample, or keep the logits ...

A long prompt takes several steps, one after the other (chunked prefill: Agrawal et al. 2024,
arXiv:2403.02310), and a batch may hold chunks of any sequences: `generation.py` brings those that
decode together, `evaluate` one, for benchmarks and perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from cyclewise.engine.kvcache import PagePool, Sequence
from cyclewise.engine.request import Batch, Model
from cyclewise.errors import InvalidParameterError
from cyclewise.machine.machine import Chunk

if TYPE_CHECKING:
    import numpy.typing as npt

Logits = Literal["last", "all", "none"]


@dataclass(slots=True)
class Request:
    """Tokens to append to a sequence."""

    sequence: Sequence  # its pages are reserved by the engine before the request is scheduled
    token_ids: npt.NDArray[np.int32]  # (tokens,), those still to run included
    logits: Logits  # of which of them the logits are wanted
    num_done: int = 0  # set by the engine after each step

    @property
    def num_left(self) -> int:
        return len(self.token_ids) - self.num_done


def schedule(
    requests: list[Request], max_tokens: int, counts: SequenceOf[int] | None = None
) -> Batch:
    """Fill one step with tokens of the requests: as many of each as `counts` says, or first come,
    first served.
    """
    token_ids: list[npt.NDArray[np.int32]] = []
    chunks: list[Chunk] = []
    logit_rows: list[int] = []
    start = 0
    for i, request in enumerate(requests):
        count = min(request.num_left, max_tokens - start) if counts is None else counts[i]
        if count == 0:
            continue
        first = request.num_done
        token_ids.append(request.token_ids[first : first + count])
        sequence = request.sequence
        chunks.append(Chunk(start, count, len(sequence), sequence.pages, sequence.adapter))
        if request.logits == "all":
            logit_rows.extend(range(start, start + count))
        elif request.logits == "last" and count == request.num_left:
            logit_rows.append(start + count - 1)
        start += count
    return Batch(np.concatenate(token_ids), chunks, logit_rows)


class Engine:
    """Runs a loaded model on sequences of tokens. One thread at a time may use it."""

    def __init__(self, model: Model) -> None:
        self.machine = model.machine
        self.vocab_size = model.config.vocab_size
        self.pool = PagePool(
            self.machine.num_pages, self.machine.page_tokens, self.machine.copy_page
        )
        self.context = min(model.config.context_length, self.pool.num_tokens)

    def new_sequence(self, adapter: int | None = None, salt: bytes | None = None) -> Sequence:
        """Begin an empty sequence. It owns no page until tokens come.

        adapter  the number of the LoRA adapter that its tokens have
        salt     sequences of the same one share what they have in common (`prefix.py`); None: no
                 other sequence finds what this one holds
        """
        return Sequence(self.pool, self.context, adapter, salt)

    def free(self, sequence: Sequence) -> None:
        """Give back all pages of a sequence. It is empty then."""
        sequence.truncate(0)

    def evaluate(
        self, sequence: Sequence, token_ids: SequenceOf[int], logits: Logits = "last"
    ) -> npt.NDArray[np.float32]:
        """Append tokens to a sequence and return the logits that follow them.

        token_ids  the tokens, each below the vocabulary's size
        logits     "last": of the last token, (1, vocab_size); "all": of each token,
                   (tokens, vocab_size); "none": (0, vocab_size)

        The array is the caller's own. Raises ContextLengthError, before anything ran, if the
        tokens do not fit into the context. Ctrl-C is honoured between steps; the sequence then
        holds the tokens of the steps that are done.
        """
        request = self.request(sequence, token_ids, logits)
        num_rows = {"last": min(1, request.num_left), "all": request.num_left, "none": 0}[logits]
        wanted = np.empty((num_rows, self.vocab_size), dtype=np.float32)
        row = 0
        while request.num_left:
            rows = self.step([request])
            wanted[row : row + len(rows)] = rows
            row += len(rows)
        return wanted

    def request(
        self, sequence: Sequence, token_ids: SequenceOf[int], logits: Logits = "last"
    ) -> Request:
        """Reserve a sequence's pages for tokens to append to it, which `step` then runs.

        Raises what `evaluate` raises; nothing is reserved then.
        """
        checked = self.check(token_ids)
        sequence.reserve(len(sequence) + len(checked))
        return Request(sequence, checked, logits)

    def step(
        self, requests: list[Request], counts: SequenceOf[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Run one step of requests whose pages are reserved, and note what of each is done.

        counts  tokens of each, at least one; None: as many as the machine takes

        Returns the logits (logit rows, vocab_size) in the order of the requests, valid until the
        next step.
        """
        batch = schedule(requests, self.machine.max_batch_tokens, counts)
        logits = self.machine.step(batch.token_ids, batch.chunks, batch.logit_rows)
        running = (request for request in requests if request.num_left)
        for chunk, request in zip(batch.chunks, running, strict=False):
            done = batch.token_ids[chunk.start : chunk.start + chunk.count]
            request.sequence.token_ids.extend(done.tolist())
            request.sequence.publish()
            request.num_done += chunk.count
        return logits

    def check(self, token_ids: SequenceOf[int]) -> npt.NDArray[np.int32]:
        """Token ids as the machine takes them. Raises InvalidParameterError if they are none of the
        model's.
        """
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.ndim != 1:
            raise InvalidParameterError(f"token ids must be a flat list, not of shape {ids.shape}")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise InvalidParameterError(
                f"token ids must be from 0 to {self.vocab_size - 1}, not {ids.min()} or {ids.max()}"
            )
        return ids.astype(np.int32)
