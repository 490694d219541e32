"""Chosen token ids become the text of an answer, up to its first stop string.

In: token ids as `engine/generation.py` gains them. Out: text that nothing has to be taken back of.
`llm.py` holds one `Answer` for each generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclewise.text.detokenizer import Detokenizer


class Answer:
    """What a generation has said so far."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self.token_ids: list[int] = []  # up to the one that completed a stop string
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All text that `push` and `end` have returned."""
        return "".join(self._texts)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come. What is pushed after it is dropped."""
        return self._stops.found

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; return the text that is certain now."""
        text = ""
        for token_id in token_ids:
            if self.stopped:
                break
            self.token_ids.append(token_id)
            text += self._stops.push(self._detokenizer.push(token_id))
        self._texts.append(text)
        return text

    def end(self) -> str:
        """No more tokens come: the text that was held back, unless a stop string has come."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self._texts.append(text)
        return text


class StopStrings:
    """Holds back text for as long as it may still become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; return what is certain to come before any stop string.

        Once one is complete, `found` is set and the rest is dropped. Of several the one that is
        complete first counts, and of those that end together the longest, so that it does not
        matter how the text is cut into tokens.
        """
        if self.found:
            return ""
        held = self._held + text
        ends = [
            (place + len(stop), place) for stop in self._stop if (place := held.find(stop)) >= 0
        ]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        keep = max((overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a stop string, but not all."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
