"""A toy in place of a real model: it keeps the machine's contract and is strict about it.

Its KV cache holds the token ids themselves, page by page, with the number of the adapter that they
were computed with; each step reads them back through the page tables it is given, so a wrong page,
position, chunk or adapter changes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

VOCAB_SIZE = 260
BOS, END = 256, 257  # the others up to 255 are bytes
ADAPTER = 1000
"""What an adapter's number adds to a token's entry in the cache."""


def hashed_logits(token_ids: list[int]) -> np.ndarray:
    """Logits that depend on every token and its place; never the end token."""
    state = 0
    for token in token_ids:
        state = (state * 1_000_003 + token + 1) % (2**61 - 1)
    logits = np.random.default_rng(state).normal(size=VOCAB_SIZE).astype(np.float32) * 3
    logits[256:] = -20
    return logits


def scripted(text: str, prompt_tokens: int) -> Callable[[list[int]], np.ndarray]:
    """Logits whose most likely tokens spell `text` after a prompt, then end."""
    script = [*text.encode(), END]

    def logits(token_ids: list[int]) -> np.ndarray:
        row = np.zeros(VOCAB_SIZE, dtype=np.float32)
        row[script[min(len(token_ids) - prompt_tokens, len(script) - 1)]] = 30
        return row

    return logits


class ToyMachine:
    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        max_batch_tokens: int,
        logits: Callable[[list[int]], np.ndarray],
    ) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.max_batch_tokens = max_batch_tokens
        self.logits = logits
        self.kv = np.full((num_pages, page_tokens), -1, dtype=np.int64)
        self.steps: list[int] = []  # tokens of each step
        self.before_step: Callable[[], None] = lambda: None
        self._out = np.empty((max_batch_tokens, VOCAB_SIZE), dtype=np.float32)

    def copy_page(self, source, to):
        self.kv[to] = self.kv[source]

    def step(self, token_ids, chunks, logit_rows):
        self.before_step()
        assert token_ids.dtype == np.int32
        assert 1 <= len(token_ids) <= self.max_batch_tokens
        assert sum(chunk.count for chunk in chunks) == len(token_ids)
        assert logit_rows == sorted(set(logit_rows))
        self.steps.append(len(token_ids))
        before = []  # of each token of the batch: the tokens of its sequence up to it
        for chunk in chunks:
            assert chunk.start == len(before)
            end = chunk.position + chunk.count
            assert chunk.pages.dtype == np.int32
            assert len(chunk.pages) * self.page_tokens >= end
            for i in range(chunk.count):
                page, slot = divmod(chunk.position + i, self.page_tokens)
                adapter = 0 if chunk.adapter is None else chunk.adapter + 1
                self.kv[chunk.pages[page], slot] = token_ids[chunk.start + i] + ADAPTER * adapter
            tokens = self.kv[chunk.pages].reshape(-1)[:end].tolist()
            assert min(tokens) >= 0
            before += [tokens[: chunk.position + i + 1] for i in range(chunk.count)]
        for out, row in enumerate(logit_rows):
            self._out[out] = self.logits(before[row])
        return self._out[: len(logit_rows)]


class ToyModel:
    def __init__(
        self,
        context: int = 64,
        page_tokens: int = 4,
        max_batch_tokens: int = 8,
        spare_pages: int = 0,
        logits: Callable[[list[int]], np.ndarray] = hashed_logits,
    ) -> None:
        self.config = SimpleNamespace(context_length=context, vocab_size=VOCAB_SIZE, name="toy")
        self.machine = ToyMachine(
            -(-context // page_tokens) + spare_pages, page_tokens, max_batch_tokens, logits
        )
        self.metadata: dict[str, object] = {}
        self.adapters: list[object] = []
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ToyDetokenizer:
    def __init__(self) -> None:
        import codecs

        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(bytes([token_id]) if token_id < 256 else b"")

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


@dataclass
class ToyTokenizer:
    """Bytes are tokens."""

    bos_id: int | None = BOS
    eos_id: int | None = END
    stop_ids: frozenset[int] = frozenset({END})
    add_bos: bool = True
    vocab_size: int = VOCAB_SIZE
    control_tokens: tuple[str, ...] = ()
    encoded: list[str] = field(default_factory=list)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False):
        assert not parse_special
        self.encoded.append(text)
        bos = [self.bos_id] if add_special and self.add_bos else []
        return bos + list(text.encode())

    def encode_chat(self, rendered: str) -> list[int]:
        parts = rendered.split("<end>")
        ids = list(parts[0].encode())
        for part in parts[1:]:
            ids += [END, *part.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def all_bytes(self) -> list[bytes]:
        return [bytes([i]) if i < 256 else b"\xff<%d>" % i for i in range(self.vocab_size)]

    def show(self, token_id: int) -> str:
        return bytes([token_id]).decode(errors="replace") if token_id < 256 else f"<{token_id}>"

    def stream(self, prompt_ids: list[int] | None = None, *, exact: bool = False) -> ToyDetokenizer:
        return ToyDetokenizer()


class ToyTemplate:
    def render(self, messages, *, add_generation_prompt: bool = True) -> str:
        text = "".join(f"{m['role'][0]}:{m['content']}<end>" for m in messages)
        return text + "a:" if add_generation_prompt else text
