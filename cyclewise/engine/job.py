"""What a server asks of the engine, and what it is told: jobs and events.

A `Job` is made by whoever has a prompt's token ids, and handed to `runner.py`; `scheduler.py`
brings it on and says with `Event`s what it has gained. Nothing here knows of text or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cyclewise.engine.generation import Ending
from cyclewise.engine.logprobs import Score
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.sampler import Structure
from cyclewise.engine.watch import Spent


@dataclass(slots=True)
class Times:
    """When things happened to a job, by the scheduler's clock, in seconds; None: not yet."""

    queued: float | None = None
    started: float | None = None  # the first step that evaluated some of its prompt
    first_token: float | None = None
    ended: float | None = None


@dataclass(slots=True, eq=False)
class Job:
    """A prompt that is to be answered `params.n` times."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # tokens that end an answer and are no part of it
    structures: Sequence[Structure | None] = ()  # of each answer, its own; empty: none
    adapter: int | None = None  # the number of the LoRA adapter that `params` names
    salt: bytes = b""  # jobs of the same one share what the cache holds of their prompts
    priority: int = 0  # a greater one goes first: see `scheduler.AGEING_SECONDS`
    deadline: float | None = None  # by the scheduler's clock: when it fails if it has not ended
    watched: bool = False  # its events say where the time of their tokens went

    # set by the scheduler
    times: Times = field(default_factory=Times, init=False)
    reused_tokens: int = field(default=0, init=False)  # of the prompt, those not evaluated
    prompt_scores: list[Score] = field(default_factory=list, init=False)
    """If `params.prompt_logprobs` asks for them: of all tokens of the prompt but the first, when an
    answer has its first event.
    """


@dataclass(frozen=True, slots=True)
class Event:
    """What one answer of a job has gained in a step.

    The last event of an answer has either a reason or an error, and no other event has.
    """

    job: Job
    index: int  # of the answer, from 0 to n - 1
    time: float  # by the scheduler's clock
    token_ids: list[int]
    scores: list[Score]  # of each of them, if `params.logprobs` asks for it
    finish_reason: Ending | Literal["cancelled"] | None = None
    error: Exception | None = None
    spent: Spent | None = None  # where `Job.watched` asks for it and tokens were chosen

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None
