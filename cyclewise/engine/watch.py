"""What those who watch the engine are told: where a token's time went, and who waits and who runs.

`scheduler.py` notes both, the first only for jobs that ask for it (`Job.watched`). What the moments
of a step took is known to a `Watch`, which whoever makes the scheduler may hand over; the engine
passes on what it says and looks at none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from cyclewise.engine.generation import Generation
    from cyclewise.engine.job import Job


class Watch(Protocol):
    """Clocks the moments of single steps, on the engine's thread."""

    def turn(self, on: bool) -> None:
        """Whether the next step is to be clocked."""

    def read(self) -> object:
        """Of the step that has just run; None if it was not clocked."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step that a watched answer had tokens in, as it was for all that shared it."""

    seconds: float  # of the machine's work
    num_answers: int  # that had tokens in it
    num_tokens: int  # of all of them
    moments: object  # what `Watch.read` said


@dataclass(frozen=True, slots=True)
class Spent:
    """Where the time of an answer's newest tokens went; times by the scheduler's clock."""

    steps: tuple[Step, ...]  # that the answer had tokens in since its last ones
    chosen_from: float  # when choosing them began
    chosen_at: float  # and ended


@dataclass(frozen=True, slots=True)
class Standing:
    """One answer of those that wait or run: numbers alone, nothing of what is said."""

    job: int  # counted from 1 on, as they came
    index: int  # of the answer
    state: Literal["waiting", "prefill", "decode"]
    seconds: float  # since its job came
    priority: int
    prompt_tokens: int
    reused_tokens: int  # of these, those that the cache held
    evaluated_tokens: int  # of the prompt, those whose keys and values it holds
    generated_tokens: int
    most_tokens: int | None  # that it may generate; None: until the context is full
    pages: int  # of the KV cache


def standing_of(
    job: Job, generation: Generation | None, now: float, *, number: int, index: int, runs: bool
) -> Standing:
    """Of an answer of a job; what is read of one that runs may be a step newer than the rest.

    generation  None: it has not begun
    now         by the scheduler's clock
    """
    held, pages, generated = 0, 0, 0
    state: Literal["waiting", "prefill", "decode"] = "waiting"
    if generation is not None:
        held, pages = len(generation.sequence), len(generation.sequence.pages)
        generated = generation.num_generated
        if runs:
            state = "decode" if generated and generation.request.num_left <= 1 else "prefill"
    return Standing(
        job=number, index=index, state=state, seconds=now - (job.times.queued or now),
        priority=job.priority, prompt_tokens=len(job.prompt_ids), reused_tokens=job.reused_tokens,
        evaluated_tokens=min(held, len(job.prompt_ids)), generated_tokens=generated,
        most_tokens=job.params.max_tokens, pages=pages,
    )  # fmt: skip
