"""Slow twins of the encoders: the same answer by the shortest way to say it."""

from __future__ import annotations

from itertools import pairwise


def sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """Merges the best-scoring pair of neighbours, the leftmost of equals, until none is left."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[left + right], index)
            for index, (left, right) in enumerate(pairwise(pieces))
            if left + right in scores
        ]
        if not pairs:
            return pieces
        _, index = min(pairs)
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]


def unigram(text: str, scores: dict[str, float]) -> list[str | None]:
    """The likeliest cut; None stands for a run of characters that are in no token."""
    unknown = min(scores.values()) - 10.0
    best: list[tuple[float, list[str | None]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        ways: list[tuple[float, list[str | None]]] = []
        for start in range(end):
            before, cut = best[start]
            piece = text[start:end]
            if piece in scores:
                ways.append((before + scores[piece], [*cut, piece]))
            elif end - start == 1:
                ways.append((before + unknown, [*cut, None]))
        best.append(max(ways, key=lambda way: way[0]))
    pieces = best[-1][1]
    return [p for i, p in enumerate(pieces) if p is not None or i == 0 or pieces[i - 1] is not None]
