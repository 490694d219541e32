"""Where the time of each token went, as an answer says it that was asked to (`timings_per_token`).

Events of the engine come in, with what it noted of their steps (`engine/watch.py`); dictionaries
that become JSON go out, one for each step that brought an answer on. Times are in seconds.

    seconds         since the answer's last tokens, or since the request was queued
    queue           of these, waiting before the first step
    sampling        of these, choosing the tokens, with their logprobs
    steps           that the answer had tokens in: one, or as many as its prompt took
    step_seconds    of these, in those steps; they are shared with all who have tokens in them
    batch           answers in the last of them, this one included
    batch_tokens    tokens in all of them, prompts' and others'
    cached_tokens   of the prompt, found in the prefix cache; of the first tokens alone
    moments         seconds by moment in those steps, its layers together; null: not clocked
    cycles          of all moments, on one core; null where only time is counted
    limits          the least seconds of each moment; null without a machine profile
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclewise.clock.live import LiveClock
    from cyclewise.engine.job import Event

_PLACES = 8  # of a second: ten nanoseconds


class Timings:
    """Of the answers of one request."""

    def __init__(self, clock: LiveClock | None) -> None:
        self._clock = clock
        self._last: dict[int, float] = {}  # when an answer's last tokens had been chosen

    def of(self, event: Event, index: int, num_tokens: int) -> list[dict[str, Any]]:
        """Of the tokens of an event that belong to an answer; none if it was not watched.

        index       of the answer, of all those to the request
        num_tokens  0 where the token that ended the answer was chosen
        """
        spent, times = event.spent, event.job.times
        if spent is None:
            return []
        assert times.queued is not None and times.started is not None
        is_first = index not in self._last
        before = times.queued if is_first else self._last[index]
        self._last[index] = spent.chosen_at
        timing: dict[str, Any] = {
            "tokens": num_tokens,
            "seconds": _rounded(spent.chosen_at - before),
            "queue": _rounded(times.started - times.queued) if is_first else 0.0,
            "sampling": _rounded(spent.chosen_at - spent.chosen_from),
            "steps": len(spent.steps),
            "step_seconds": _rounded(sum(step.seconds for step in spent.steps)),
            "batch": spent.steps[-1].num_answers,
            "batch_tokens": sum(step.num_tokens for step in spent.steps),
            "cached_tokens": event.job.reused_tokens if is_first else 0,
        }
        return [{**timing, **self._moments([step.moments for step in spent.steps])}]

    def _moments(self, clocked: list[Any]) -> dict[str, Any]:
        if self._clock is None or None in clocked:
            return {"moments": None, "cycles": None, "limits": None}
        explained = self._clock.explain(clocked)
        limits = explained.limits
        return {
            "moments": _all_rounded(explained.seconds),
            "cycles": None if explained.cycles is None else round(explained.cycles),
            "limits": None if limits is None else _all_rounded(limits),
        }


def _rounded(seconds: float) -> float:
    return round(seconds, _PLACES)


def _all_rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in seconds.items()}
