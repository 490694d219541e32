"""One token after another: generations, and the step that brings each of them on.

A `Generation` is a sequence, a sampler and the conditions that end it; it chooses token ids and
knows nothing of text. `advance` runs one step of the engine for any number of them at once and
gives back what each has gained: none while its prompt is still being evaluated, one when it
decodes, and several when tokens that were guessed (`Generation.draft`) turn out to be those that
would have been chosen one by one. `llm.py` makes text of them, and ends at stop strings;
`scheduler.py` brings on those of many users, which may have to give their pages up for a while.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from cyclewise.engine.engine import Engine, Logits, Request
from cyclewise.engine.kvcache import Sequence
from cyclewise.engine.logprobs import PromptScores, Score, score
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.sampler import REPETITION_WINDOW, Sampler, Structure

if TYPE_CHECKING:
    import numpy.typing as npt

Ending = Literal["stop", "length"]


class Generation:
    """Tokens that follow a prompt, until a token ends it or there is no more room."""

    def __init__(
        self,
        engine: Engine,
        sequence: Sequence,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        structure: Structure | None = None,
        scored: PromptScores | None = None,
    ) -> None:
        """Reserve room for what is left of a prompt; nothing runs yet.

        sequence   what of the prompt lies in the KV cache already
        token_ids  the rest of the prompt, at least one token
        stop_ids   tokens that end the generation and are no part of it
        structure  what its tokens must spell; its own
        scored     of the prompt, where that is asked for: steps bring all rows of logits until it
                   is complete

        Raises ContextLengthError if the prompt does not fit.
        """
        self.sequence = sequence
        self.finish_reason: Ending | None = None
        self.num_generated = 0
        self.num_guessed = 0  # tokens that steps have verified
        self.num_accepted = 0  # those of them that came true
        self.scores: list[Score] = []  # of each token generated, if `params.logprobs` asks for it
        self.scored = scored
        self.request = engine.request(sequence, token_ids, self._wanted)  # the next steps run it
        self._engine = engine
        self._max_tokens = params.max_tokens
        self._num_top = params.logprobs
        self._stop_ids = stop_ids
        self._structure = structure
        self._sampler = Sampler(params)
        self._drafted: list[int] = []

    @property
    def num_missing(self) -> int:
        """Free pages that `reserve` would take."""
        return self.sequence.num_missing(len(self.sequence) + self.request.num_left)

    def reserve(self) -> None:
        """Take the pages that the request needs, which the next steps run.

        Raises CyclewiseError if other sequences leave too few.
        """
        self.sequence.reserve(len(self.sequence) + self.request.num_left)

    def suspend(self) -> None:
        """Give back all pages, between two steps. Nothing that was chosen is lost: the request is
        to evaluate all tokens again.
        """
        token_ids = np.array(self.token_ids, dtype=np.int32)
        self._engine.free(self.sequence)
        self.request = Request(self.sequence, token_ids, "last")

    def resume(self) -> None:
        """Begin again after `suspend`, with those pages that can be found; none is reserved."""
        token_ids = self.request.token_ids
        known: SequenceOf[int] = token_ids.tolist()
        if self.scored is not None:
            known = self.scored.cacheable(known)
        self.sequence.reuse(known)
        self.request = Request(self.sequence, token_ids[len(self.sequence) :], self._wanted)

    @property
    def _wanted(self) -> Logits:
        return "last" if self.scored is None or self.scored.is_complete else "all"

    def fork(self, params: SamplingParams, structure: Structure | None = None) -> Generation:
        """Another answer to the same prompt, when a step has completed that and before the first
        token is chosen. It accepts the same logits.
        """
        assert not (self.num_generated or self.request.num_left)
        other = copy.copy(self)
        other.scores = []
        other._structure = structure
        other._sampler = Sampler(params)
        other.sequence = self.sequence.fork()  # last: nobody would give its pages back
        other.request = replace(self.request, sequence=other.sequence)
        return other

    @property
    def token_ids(self) -> list[int]:
        """The prompt, and all that was generated: a list of the caller's own."""
        rest: list[int] = self.request.token_ids[self.request.num_done :].tolist()
        return self.sequence.token_ids + rest

    def copy_sampler(self) -> Sampler:
        """A sampler that would choose what this one will: with its random numbers to come."""
        return self._sampler.copy()

    def draft(self, token_ids: SequenceOf[int]) -> int:
        """Guess what follows the token chosen last; the next step verifies it. Returns how many of
        the guesses it will verify.

        To be called between a step that gained tokens and the next. Guesses beyond the context,
        `max_tokens` or a step's tokens are dropped. All that a step is given must fit into it.
        """
        last = self.request.token_ids[-1:].tolist()
        room = (
            min(self._engine.context - len(self.sequence), self._engine.machine.max_batch_tokens)
            - 1
        )
        if self._max_tokens is not None:
            room = min(room, self._max_tokens - self.num_generated - 1)
        self._drafted = list(token_ids[: max(0, room)])
        self.request = self._engine.request(self.sequence, last + self._drafted, "all")
        return len(self._drafted)

    @property
    def num_rows(self) -> int:
        """Rows of logits that the step which completes the request brings."""
        return 1 + len(self._drafted)

    def accept(self, logits: npt.NDArray[np.float32]) -> list[int]:
        """Choose the next tokens, at least one unless the first ends the generation or none is to
        be chosen.

        logits  (num_rows, vocab_size): those that follow the request's last token that was not
                guessed, and those that follow each that was

        Rows are sampled one by one for as long as the guesses come true, so that tokens and random
        numbers are those of decoding without guesses (Leviathan et al. 2022, arXiv:2211.17192, for
        a draft that is certain of its tokens). The sequence forgets the rest.
        """
        sequence = self.sequence
        if self._max_tokens == 0:
            self.finish_reason = "length"
            return []
        first = len(sequence) - len(self._drafted)  # tokens before the one to choose
        token_ids = sequence.token_ids[max(0, first - REPETITION_WINDOW) : first]
        chosen: list[int] = []
        num_right = 0
        for row, guess in zip(logits, [*self._drafted, None], strict=True):
            token_id = self._sampler.sample(row, token_ids, self._structure)
            if token_id in self._stop_ids:
                self.finish_reason = "stop"
                break
            chosen.append(token_id)
            token_ids.append(token_id)
            self.num_generated += 1
            if self._num_top is not None:
                self.scores.append(score(row, token_id, self._num_top))
            if self._structure and self._structure.advance(token_id):
                self.finish_reason = "stop"
                break
            in_cache = first + len(chosen) - 1
            if self.num_generated == self._max_tokens or in_cache == self._engine.context:
                self.finish_reason = "length"
                break
            if token_id != guess:
                break
            num_right += 1
        sequence.truncate(first + num_right)
        self.num_guessed += len(self._drafted)
        self.num_accepted += num_right
        self._drafted = []
        if self.finish_reason is None:
            last = np.array(chosen[-1:], dtype=np.int32)
            self.request = Request(sequence, last, "last")
        return chosen


def advance(engine: Engine, generations: SequenceOf[Generation]) -> list[list[int]]:
    """Run one step of generations that have not ended; return the tokens that each has gained.

    The same tokens come out in whatever company a generation runs. Raises CyclewiseError, before
    anything ran, if there are too few pages.
    """
    for generation in generations:
        generation.reserve()
    logits = engine.step([generation.request for generation in generations])
    gained: list[list[int]] = []
    row = 0
    for generation in generations:
        if generation.request.num_left:
            gained.append([])
            continue
        rows = logits[row : row + generation.num_rows]
        row += len(rows)
        gained.append(generation.accept(rows))
    return gained
