"""How many tokens of prompts may share a step with answers that are being decoded.

Every token more makes the step longer, and with it the time until the next token of everyone who
is being answered. The scheduler notes here what each step took, and asks how much of the prompts
the next one may hold, so that a prompt makes it `STRETCH` times as long as without. Where several
prompts wait, each adds as much, up to MOST_PROMPTS: those who are being answered wait longer for a
token, but small steps would let everybody wait, since they take longer for each token of a prompt.
What a step takes without is learned from steps of as many answers, or nearly, and no prompt, of
which there is one now and then while a long prompt comes in; what a group of four more tokens adds,
from steps that hold some of a prompt.
"""

from __future__ import annotations

STRETCH = 2.0
"""How much longer a step with tokens of a prompt may take. The bound for whom it delays is 2.5; the
rest is for what measurements scatter.
"""
MOST_PROMPTS = 8
"""Prompts that may delay those who are being answered at the same time."""
_NEAR = 0.25
"""Answers more or less, as a share of them, that make no step of their own necessary."""
_NEWEST = 0.2
"""Weight of the newest measurement."""
_WORSE = 0.7
"""Its weight where a prompt's token costs more than was known: what is too much is felt at once."""
_FADING = 0.002
"""What a group is thought to take becomes so much less in a step that has room for none."""
_GROWTH = 1.5
"""What is known of a few tokens says little of many."""
_AT_ONCE = 4
"""Tokens of a group, which the machine takes at once: a step of five tokens takes as long as one of
eight, and what it adds to one of four says nothing of a token.
"""
_MIXED_IN_A_ROW = 32
"""Steps that hold tokens of a prompt, before one without shows again what that takes."""


class Pace:
    """What steps cost here, as they run."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens  of a step"""
        self._max_tokens = max_tokens
        self._plain: dict[int, float] = {}  # answers -> seconds of a step without a prompt
        self._added = 0.0  # seconds that a group adds to a step with answers; 0: unknown
        self._filling = 0.0  # what a token adds that fills the group of the last answers; likewise
        self._alone = 0.0  # seconds of a prompt's token in steps without answers; 0: unknown
        self._mixed = 0  # steps since the last one without a prompt
        self._last = 0  # groups that prompts have added to steps of late

    def chunk(self, num_answers: int, num_prompts: int = 1) -> int:
        """Tokens of so many prompts that a step may hold beside one token of each of these answers.

        0 where the next step is to show what it takes without. All that fit where there is no
        answer.
        """
        room = self._max_tokens - num_answers
        if not num_answers:
            return room
        plain = self._step(num_answers)
        if plain is None or self._mixed >= _MIXED_IN_A_ROW:
            return 0
        spare = (STRETCH - 1) * min(num_prompts, MOST_PROMPTS) * plain
        rest = -num_answers % _AT_ONCE  # of a group that the answers do not fill
        if rest and not self._filling:
            return min(rest, num_answers, room)
        if rest * self._filling > spare:
            return min(max(1, int(spare / self._filling)), room)
        groups = max(self._last + 1, int(_GROWTH * self._last))
        if self._added:
            groups = min(groups, int((spare - rest * self._filling) / self._added))
        return min(rest + _AT_ONCE * groups or _AT_ONCE, room)

    def note(self, num_answers: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step of so many answers' tokens, and so many of prompts, took so long."""
        if not num_answers:
            self._alone = _newer(self._alone, seconds / num_prompt_tokens)
            return
        if not num_prompt_tokens:
            self._mixed = 0
            self._plain[num_answers] = _newer(self._plain.get(num_answers, 0.0), seconds)
            return
        self._mixed += 1
        groups = _groups(num_answers + num_prompt_tokens) - _groups(num_answers)
        self._last = max(groups, self._last // 2)  # a prompt may just have ended
        least = 0.01 * seconds  # a prompt's tokens are never for nothing
        more = seconds - (self._step(num_answers) or seconds)
        if not groups:
            self._filling = _worse(self._filling, max(least, more) / num_prompt_tokens)
            self._added *= 1 - _FADING  # what is not measured is believed less and less
            return
        more -= -num_answers % _AT_ONCE * self._filling
        self._added = _worse(self._added, max(least, more) / groups)

    def _step(self, num_answers: int) -> float | None:
        """Seconds of a step without a prompt, if one of about as many answers was measured."""
        if num_answers in self._plain:
            return self._plain[num_answers]
        near = min(self._plain, key=lambda number: abs(number - num_answers), default=0)
        return self._plain[near] if abs(near - num_answers) <= _NEAR * num_answers else None

    def answer_token(self, num_answers: int) -> float:
        """Seconds of a step that decodes so many answers; of the nearest number that was measured.
        0 if none was.
        """
        if not self._plain:
            return 0.0
        return self._plain[min(self._plain, key=lambda number: abs(number - num_answers))]

    @property
    def prompt_token(self) -> float:
        """Seconds of a token of a prompt; 0 before the first."""
        return self._alone or self._added / _AT_ONCE


def _groups(num_tokens: int) -> int:
    return -(-num_tokens // _AT_ONCE)


def _worse(known: float, measured: float) -> float:
    return _newer(known, measured, _WORSE if measured > known else _NEWEST)


def _newer(known: float, measured: float, weight: float = _NEWEST) -> float:
    """What was known, moved towards what was measured; a step that was held up counts as twice
    the usual at most.
    """
    if not known:
        return measured
    return known + weight * (min(measured, 2 * known) - known)
