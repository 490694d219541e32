"""A model without weights, whose speed and logits a test chooses."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cyclewise.machine.machine import Chunk


@dataclass
class FakeMachine:
    """Logits are a fixed table: row t holds what follows token t."""

    table: np.ndarray
    num_threads: int = 2
    max_batch_tokens: int = 64
    page_tokens: int = 16
    num_pages: int = 64
    bandwidth: float = 1e9
    steps: list[int] = field(default_factory=list)
    num_probes: int = 0

    def step(
        self, token_ids: np.ndarray, chunks: list[Chunk], logit_rows: Sequence[int]
    ) -> np.ndarray:
        self.steps.append(len(token_ids))
        return self.table[token_ids[list(logit_rows)]]

    def copy_page(self, source: int, to: int) -> None:
        pass

    def read_bandwidth(self, seconds: float) -> float:
        self.num_probes += 1
        return self.bandwidth


@dataclass
class FakeConfig:
    context_length: int
    vocab_size: int


@dataclass
class FakeModel:
    machine: FakeMachine
    config: FakeConfig
    path: pathlib.Path = pathlib.Path("fake.gguf")
    kv: str = "f16"
    bytes_per_token: int = 1000
    kv_bytes_per_token: int = 10


@dataclass
class FakeVocabulary:
    bos_id: int | None = None
    add_bos: bool = False


def fake_model(vocab_size: int = 40, context: int = 512) -> FakeModel:
    table = np.random.default_rng(0).normal(size=(vocab_size, vocab_size)).astype(np.float32)
    return FakeModel(FakeMachine(table), FakeConfig(context, vocab_size))
