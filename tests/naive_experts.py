"""The slow twins of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import naive
from tests.naive import Bytes, Doubles, Floats, Integers


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to."""

    chosen: Integers  # (tokens, chosen): the largest logit first, of equals the lower expert
    weights: Doubles  # (tokens, chosen)

    def tokens_of(self, expert: int) -> list[int]:
        """Those that chose it, ascending."""
        return np.nonzero((self.chosen == expert).any(axis=1))[0].tolist()

    @property
    def experts(self) -> list[int]:
        """Those that some token chose, ascending."""
        return np.unique(self.chosen).tolist()

    def weight(self, token: int, expert: int) -> Any:
        return self.weights[token][self.chosen[token] == expert][0]


def route(logits: NDArray[Any], num_chosen: int, *, normalize: bool = True) -> Routing:
    """Of logits (tokens, experts). Softmax over the chosen, or over all without `normalize`."""
    chosen = np.argsort(-np.asarray(logits), axis=1, kind="stable")[:, :num_chosen]
    # Which are the largest was asked above; a choice is the largest of all that there are.
    each_choice = np.repeat(logits[:, None], num_chosen, axis=1)
    largest = np.maximum.reduce(each_choice, axis=2)[:, :1]
    if normalize:
        exponentials = np.exp(np.take_along_axis(logits, chosen, axis=1) - largest)
        total = np.add.reduce(exponentials, axis=1)
    else:
        every = np.exp(logits - largest)
        total = np.add.reduce(every, axis=1)
        exponentials = np.take_along_axis(every, chosen, axis=1)
    return Routing(np.asarray(chosen), exponentials / total[:, None])


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One expert's, as they lie in a file: format and rows' bytes."""

    gate: tuple[str, Bytes]
    up: tuple[str, Bytes]
    down: tuple[str, Bytes]


def gated(expert: ExpertMatrices, x: Floats, *, fused: bool = True, bfloat: bool = False) -> Floats:
    """silu(gate . x) * (up . x), (tokens, feed-forward)."""
    gate, up = (
        naive.matmul(*matrix, x, fused=fused, bfloat=bfloat) for matrix in (expert.gate, expert.up)
    )
    return (naive.silu(gate) * up).astype(np.float32)


def add_experts(
    onto: Floats, rows: dict[int, Floats], experts: Sequence[ExpertMatrices], routing: Routing,
    weights: NDArray[np.float32], *, fused: bool = True, bfloat: bool = False,
) -> Floats:  # fmt: skip
    """onto + the experts' weighed results, expert after expert: `rows` are each expert's gated
    tokens, `weights` (tokens, experts) what the kernel weighs them by.
    """
    out = onto.copy()
    for expert, gated_rows in rows.items():
        tokens = routing.tokens_of(expert)
        result = naive.matmul(*experts[expert].down, gated_rows, fused=fused, bfloat=bfloat)
        factor = np.broadcast_to(weights[tokens, expert][:, None], result.shape)
        out[tokens] = naive.fma(factor, result, out[tokens], fused=fused)
    return out
