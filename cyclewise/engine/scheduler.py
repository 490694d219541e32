"""Who runs in the next step: continuous batching, in which jobs join and leave at every step.

Jobs come in from `runner.py`; events with the tokens they gain go out. A step (`Scheduler.step`)
holds the next token of every answer that is being decoded (Orca: Yu et al. 2022, OSDI) and, beside
them, as much of the prompts that come in as `pace.py` allows (Agrawal et al. 2024,
arXiv:2403.02310). What happens between two steps:

1. jobs that were submitted join those that wait; cancelled and late ones leave;
2. every running answer gets the page that its next token needs. If pages run out, the answer that
   ranks last gives all of its own back and waits: what it has chosen stays, and its tokens are
   evaluated again later, but for those whose pages can still be found (`prefix.py`);
3. what waits and ranks first begins, if there are pages for all of it; nobody overtakes it.

Answers rank by when their job came, one of a priority p as if it had come p * AGEING_SECONDS
earlier: first come, first served within a priority, and whoever waits is overtaken for a limited
time only. Of those that run, the one that ranks first goes on whatever comes, so all end. Which
tokens an answer gains depends on none of this: the same token gets the same bits in every batch,
and the sampler is asked once for each.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from cyclewise.engine.generation import Generation
from cyclewise.engine.job import Event, Job
from cyclewise.engine.logprobs import SCORED_TOKENS, PromptScores
from cyclewise.engine.pace import Pace
from cyclewise.engine.request import check_integer
from cyclewise.engine.watch import Spent, Standing, Step, Watch, standing_of
from cyclewise.errors import (
    ContextLengthError,
    CyclewiseError,
    DeadlineError,
    EngineError,
    InvalidParameterError,
    OverloadedError,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from cyclewise.engine.engine import Engine
    from cyclewise.engine.request import SamplingParams

AGEING_SECONDS = 10.0
"""How much earlier a job seems to have come for each step of its priority."""
MAX_PRIORITY = 10
"""Priorities are from -MAX_PRIORITY to MAX_PRIORITY."""
_RETRY_SECONDS = (1.0, 300.0)
"""Least and most that a job which is refused is told to wait."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Beyond what a job is refused with OverloadedError."""

    running: int = 64  # answers that are evaluated at once; more than these wait
    jobs: int = 256  # that run or wait
    queued_tokens: int = 1 << 17  # of prompts, still to be evaluated
    page_demand: float = 16.0  # pages that jobs may come to need, over those that there are


@dataclass(slots=True)
class Numbers:
    """What observers want to know, at one moment."""

    jobs: int = 0  # that run or wait
    running: int = 0  # answers that are evaluated or decoded
    waiting: int = 0  # answers that wait, for the first time or again
    queued_tokens: int = 0  # of prompts, still to be evaluated
    pages_used: int = 0
    pages_cached: int = 0  # that nobody holds and that prompts could find
    pages_free: int = 0
    # since the start
    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # of jobs that have begun
    reused_tokens: int = 0  # of these, those that the cache held
    generated_tokens: int = 0
    preemptions: int = 0  # answers that gave their pages up for a while
    ended: int = 0  # answers with a reason of the model's or the parameters'
    cancelled: int = 0  # answers
    failed: int = 0  # answers with an error
    refused: int = 0  # jobs


@dataclass(slots=True, eq=False)
class _Answer:
    """One answer of a job."""

    job: Job
    index: int
    rank: tuple[float, int, int]
    generation: Generation | None = None  # from when it first begins
    state: Literal["new", "waiting", "running", "ended"] = "new"
    steps: list[Step] = field(default_factory=list)  # since its last tokens, if it is watched

    @property
    def num_left(self) -> int:
        """Tokens that are still to be evaluated."""
        assert self.generation is not None
        return self.generation.request.num_left

    @property
    def wants_rows(self) -> bool:
        """Whether each of them brings a row of logits."""
        assert self.generation is not None
        return self.generation.request.logits == "all"


@dataclass(slots=True, eq=False)
class _Open:
    """What is known of a job until all of its answers have ended."""

    answers: list[_Answer]
    pages: int  # that it may come to need
    queued: int  # tokens of its prompt that are still to be evaluated
    scored: PromptScores | None  # where those of its prompt are asked for


@dataclass(slots=True)
class _Plan:
    """A step."""

    num_decoding: int
    answers: list[_Answer]  # those that decode come first
    counts: list[int]  # tokens of each

    def without_ended(self) -> _Plan:
        left = [
            (answer, count)
            for answer, count in zip(self.answers, self.counts, strict=True)
            if answer.state == "running"
        ]
        num_decoding = sum(each.state == "running" for each in self.answers[: self.num_decoding])
        return _Plan(num_decoding, [each for each, _ in left], [count for _, count in left])


class Scheduler:
    """Brings jobs on. `submit` and `cancel` may be called by any thread, the rest by one."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        watch: Watch | None = None,
    ) -> None:
        """engine  for this scheduler alone
        watch   told before and after each step
        """
        self.clock = clock
        self._watch = watch
        self._engine = engine
        self._limits = limits or Limits()
        max_tokens = engine.machine.max_batch_tokens
        # a prompt finds room in every step
        self._max_running = max(1, min(self._limits.running, max_tokens - 1))
        self._pace = Pace(max_tokens)
        self._waiting: list[_Answer] = []  # in the order of their ranks
        self._running: list[_Answer] = []  # likewise
        self._open: dict[Job, _Open] = {}
        self._arrivals: deque[tuple[Job, _Open]] = deque()
        self._cancels: deque[tuple[Job, int | None]] = deque()
        self._events: list[Event] = []
        self._lock = threading.Lock()  # of what follows, which `submit` reads and adds to
        self._numbers = Numbers()
        self._num_submitted = 0
        self._pages_demanded = 0
        self._retry_after = _RETRY_SECONDS[0]

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._arrivals or self._cancels or self._open)

    def submit(self, job: Job) -> None:
        """Take a job on, once. The events of coming steps tell what becomes of it.

        Raises OverloadedError if there is too much to do, ContextLengthError if it could never fit,
        InvalidParameterError if it is malformed.
        """
        assert job.times.queued is None
        self._check(job)
        size, params = self._engine.pool.page_tokens, job.params
        length = len(job.prompt_ids) + self._most_tokens(params)
        shared = len(job.prompt_ids) // size
        own = -(-min(length, self._engine.context) // size) - shared
        pages = shared + params.n * own
        with self._lock:
            numbers = self._numbers
            reason = self._reason_against(pages, len(job.prompt_ids))
            if reason is not None:
                numbers.refused += 1
                raise OverloadedError(reason, self._retry_after)
            numbers.jobs += 1
            numbers.queued_tokens += len(job.prompt_ids)
            self._pages_demanded += pages
            self._num_submitted += 1
            number = self._num_submitted
        now = job.times.queued = self.clock()
        seeming = now - job.priority * AGEING_SECONDS
        answers = [_Answer(job, index, (seeming, number, index)) for index in range(params.n)]
        scored = None
        if params.prompt_logprobs is not None:
            scored = PromptScores(job.prompt_ids, params.prompt_logprobs, job.prompt_scores)
        self._arrivals.append((job, _Open(answers, pages, len(job.prompt_ids), scored)))

    def cancel(self, job: Job, index: int | None = None) -> None:
        """End an answer of a job, or all, before the next step. What has ended is left alone."""
        self._cancels.append((job, index))

    def step(self) -> list[Event]:
        """Run one step, if there is something to run; what jobs have gained, and how they ended."""
        self._update()
        plan = self._plan()
        if plan.answers:
            self._run(plan)
        self._estimate()
        events, self._events = self._events, []
        return events

    def fail_all(self, error: Exception) -> list[Event]:
        """End all jobs with an error."""
        self._update()
        for job in list(self._open):
            self._fail(job, error)
        events, self._events = self._events, []
        return events

    def numbers(self) -> Numbers:
        """What observers want to know; any thread may ask."""
        pool, numbers = self._engine.pool, self._numbers
        numbers.running, numbers.waiting = len(self._running), len(self._waiting)
        numbers.pages_cached = pool.num_cached
        numbers.pages_used = pool.num_pages - pool.num_free
        numbers.pages_free = pool.num_free - pool.num_cached
        with self._lock:
            return replace(numbers)

    def standings(self) -> list[Standing]:
        """Who runs and who waits, in the order of their ranks; any thread may ask."""
        now = self.clock()
        # each list is copied at once; what is read of an answer may be a step newer
        arrived = [known.answers[0] for _, known in list(self._arrivals)]
        queues = (self._running.copy(), self._waiting.copy(), arrived)
        return [
            standing_of(
                answer.job, answer.generation, now, number=answer.rank[1], index=answer.index,
                runs=answer.state == "running",
            )
            for queue in queues
            for answer in queue
        ]  # fmt: skip

    def check(self) -> None:
        """Assert that the books are right, between two steps: pages, queues and what is noted of
        jobs.
        """
        answers = [answer for known in self._open.values() for answer in known.answers]
        generations = [answer.generation for answer in answers if answer.generation is not None]
        self._engine.pool.check(generation.sequence for generation in generations)
        for state, queue in (("waiting", self._waiting), ("running", self._running)):
            ranked = [answer for answer in answers if answer.state == state]
            assert queue == sorted(ranked, key=_rank), f"the answers that are {state}"
        arrivals = [known for _, known in self._arrivals]
        known_jobs = [*self._open.values(), *arrivals]
        assert self._numbers.jobs == len(known_jobs)
        assert self._numbers.queued_tokens == sum(known.queued for known in known_jobs)
        assert self._pages_demanded == sum(known.pages for known in known_jobs)

    # What any thread may do

    def _check(self, job: Job) -> None:
        params = job.params
        if not len(job.prompt_ids):
            raise InvalidParameterError("the prompt has no token")
        self._engine.check(job.prompt_ids)
        params.check_token_ids(self._engine.vocab_size)
        check_integer(
            "priority", job.priority, -MAX_PRIORITY, MAX_PRIORITY, "a greater one goes first"
        )
        if len(job.structures) not in (0, params.n):
            raise InvalidParameterError(f"{len(job.structures)} structures for {params.n} answers")
        least = 0 if params.max_tokens == 0 else 1
        if len(job.prompt_ids) + least > self._engine.context:
            raise ContextLengthError(
                f"the prompt has {len(job.prompt_ids)} tokens, and with {least} of an answer the "
                f"context of {self._engine.context} does not hold them: shorten it, or load the "
                f"model with a larger `context`"
            )

    def _most_tokens(self, params: SamplingParams) -> int:
        """Of an answer."""
        return self._engine.context if params.max_tokens is None else params.max_tokens

    def _reason_against(self, pages: int, num_tokens: int) -> str | None:
        """Why no job of so many pages and tokens of a prompt can be taken on now."""
        numbers, limits = self._numbers, self._limits
        if numbers.jobs >= limits.jobs:
            return f"{numbers.jobs} requests are being answered or wait, as many as are taken on"
        if not numbers.jobs:  # one alone is never too much
            return None
        if numbers.queued_tokens + num_tokens > limits.queued_tokens:
            return f"{numbers.queued_tokens} tokens of prompts wait to be evaluated"
        if self._pages_demanded + pages > limits.page_demand * self._engine.pool.num_pages:
            return "what is being answered or waits may need all memory that there is for it"
        return None

    # Between two steps

    def _update(self) -> None:
        """Jobs that came join, those that were cancelled or are late leave."""
        while self._arrivals:
            job, known = self._arrivals.popleft()
            self._open[job] = known
            self._wait(known.answers[0])
        while self._cancels:
            job, index = self._cancels.popleft()
            if job in self._open:
                for answer in list(self._open[job].answers):
                    if index in (None, answer.index) and answer.state != "ended":
                        self._end(
                            answer, Event(job, answer.index, self.clock(), [], [], "cancelled")
                        )
        now = self.clock()
        late = [job for job in self._open if job.deadline is not None and job.deadline <= now]
        for job in late:
            self._fail(job, DeadlineError("the answer was not complete in time"))

    def _plan(self) -> _Plan:
        """Reserve pages for the next step, and choose what it holds."""
        running, pool = self._running, self._engine.pool
        while len(running) > self._max_running:
            self._suspend(running[-1])
        for answer in list(running):
            if answer.state == "ended":  # with another one of its job, just now
                continue
            generation = answer.generation
            assert generation is not None
            while answer.state == "running" and generation.num_missing > pool.num_free:
                self._suspend(running[-1])
            if answer.state != "running":
                break  # and so are all that rank behind it
            try:
                generation.reserve()
            except Exception as error:
                self._break(answer.job, "taking pages", error)
        decoding = [answer for answer in running if answer.num_left == 1]
        plan = _Plan(len(decoding), decoding, [1] * len(decoding))
        prompts = [answer for answer in running if answer.num_left > 1]
        if not (prompts or self._waiting):
            return plan
        num_prompts = len(prompts) + len(self._waiting)
        room, rows = self._pace.chunk(len(decoding), num_prompts), SCORED_TOKENS
        while room and rows:
            try:
                prompt = prompts.pop(0) if prompts else self._begin()
            except Exception as error:
                self._break(self._waiting[0].job, "beginning an answer", error)
                return plan.without_ended()  # other answers of its job may be in it
            if prompt is None:
                break
            count = min(room, prompt.num_left)
            if prompt.wants_rows:
                count = min(count, rows)
                rows -= count
            room -= count
            plan.answers.append(prompt)
            plan.counts.append(count)
        return plan

    def _begin(self) -> _Answer | None:
        """Let the answer that waits and ranks first run, if there are pages for all that it is to
        evaluate, and one for each that runs.
        """
        running, pool = self._running, self._engine.pool
        if not self._waiting or len(running) >= self._max_running:
            return None
        answer = self._waiting[0]
        generation = answer.generation
        if generation is None:
            generation = self._new_generation(answer, len(running))
            if generation is None:
                return None
            answer.generation = generation
        else:
            generation.resume()
            if generation.num_missing + len(running) > pool.num_free:
                generation.suspend()
                return None
            generation.reserve()
        del self._waiting[0]
        answer.state = "running"
        insort(running, answer, key=_rank)
        return answer

    def _new_generation(self, answer: _Answer, spare: int) -> Generation | None:
        job, engine = answer.job, self._engine
        sequence, scored = engine.new_sequence(job.adapter, job.salt), self._open[job].scored
        try:
            sequence.reuse(job.prompt_ids if scored is None else scored.cacheable(job.prompt_ids))
            if sequence.num_missing(len(job.prompt_ids)) + spare > engine.pool.num_free:
                engine.free(sequence)
                return None
            reused = len(sequence)
            generation = Generation(
                engine, sequence, job.prompt_ids[reused:], job.params.of_answer(answer.index),
                job.stop_ids, job.structures[answer.index] if job.structures else None, scored,
            )  # fmt: skip
        except BaseException:
            engine.free(sequence)  # nobody else knows it
            raise
        if job.times.started is None:
            job.times.started = self.clock()
            job.reused_tokens = reused
            self._numbers.prompt_tokens += len(job.prompt_ids)
            self._numbers.reused_tokens += reused
            self._evaluated(job, reused)
        return generation

    def _wait(self, answer: _Answer) -> None:
        answer.state = "waiting"
        insort(self._waiting, answer, key=_rank)

    def _suspend(self, answer: _Answer) -> None:
        assert answer.generation is not None
        self._running.remove(answer)
        answer.generation.suspend()
        self._wait(answer)
        self._numbers.preemptions += 1

    # A step

    def _run(self, plan: _Plan) -> None:
        requests = [a.generation.request for a in plan.answers if a.generation is not None]
        begin = self.clock()
        all_rows = [answer.wants_rows for answer in plan.answers]
        watched = [answer for answer in plan.answers if answer.job.watched]
        if self._watch is not None:
            self._watch.turn(bool(watched))
        try:
            logits = self._engine.step(requests, plan.counts)
        except Exception as error:
            failure = EngineError(f"a step of the engine failed: {error}")
            failure.__cause__ = error
            for job in dict.fromkeys(answer.job for answer in plan.answers):
                if job in self._open:
                    self._fail(job, failure)
            return
        complete, scored, row = [], [], 0
        for answer, count, wants_rows in zip(plan.answers, plan.counts, all_rows, strict=True):
            self._evaluated(answer.job, count)
            is_complete = not answer.num_left
            rows = logits[row : row + (count if wants_rows else is_complete)]
            row += len(rows)
            if is_complete:
                complete.append((answer, rows[-1:]))
            if wants_rows:
                scored.append((answer, rows))
        for answer, rows in scored:
            self._score_prompt(answer, rows)
        now = self.clock()
        self._numbers.steps += 1
        self._numbers.step_seconds += now - begin
        if watched:
            moments = self._watch.read() if self._watch is not None else None
            step = Step(now - begin, len(plan.answers), sum(plan.counts), moments)
            for answer in watched:
                answer.steps.append(step)
        self._pace.note(plan.num_decoding, sum(plan.counts) - plan.num_decoding, now - begin)
        for answer, rows in complete:
            try:
                forks = self._fork(answer)
            except Exception as error:
                self._break(answer.job, "beginning an answer", error)
                continue
            for each in [answer, *forks]:
                if each.state == "running":  # its job may have failed with another of its answers
                    self._accept(each, rows, now)

    def _score_prompt(self, answer: _Answer, rows: npt.NDArray[np.float32]) -> None:
        generation = answer.generation
        assert generation is not None and generation.scored is not None
        try:
            generation.scored.take(rows, len(generation.sequence))
        except CyclewiseError as error:
            self._fail(answer.job, error)
        except Exception as error:
            self._break(answer.job, "scoring a prompt", error)

    def _fork(self, answer: _Answer) -> list[_Answer]:
        """The other answers of a job whose prompt has just been evaluated."""
        if answer.state != "running":
            return []
        job, generation = answer.job, answer.generation
        assert generation is not None
        forks = [other for other in self._open[job].answers if other.state == "new"]
        for other in forks:
            structure = job.structures[other.index] if job.structures else None
            other.generation = generation.fork(job.params.of_answer(other.index), structure)
            other.state = "running"
            other.steps = answer.steps.copy()
            insort(self._running, other, key=_rank)
        return forks

    def _accept(self, answer: _Answer, rows: npt.NDArray[np.float32], now: float) -> None:
        job, generation = answer.job, answer.generation
        assert generation is not None
        begin = self.clock()
        try:
            gained = generation.accept(rows)
        except CyclewiseError as error:
            self._fail(job, error)
            return
        except Exception as error:
            self._break(job, "choosing a token", error)
            return
        self._numbers.generated_tokens += len(gained)
        if job.times.first_token is None:
            job.times.first_token = now
        scores = generation.scores[len(generation.scores) - len(gained) :]
        if job.params.logprobs is None:
            scores = []
        spent = None
        if job.watched:
            spent = Spent(tuple(answer.steps), begin, self.clock())
            answer.steps.clear()
        event = Event(job, answer.index, now, gained, scores, generation.finish_reason, spent=spent)
        if event.is_last:
            self._end(answer, event)
        else:
            self._events.append(event)

    # How it ends

    def _break(self, job: Job, what: str, error: Exception) -> None:
        """End a job that something of ours went wrong for; the others go on."""
        failure = EngineError(f"{what} failed: {error}")
        failure.__cause__ = error
        self._fail(job, failure)

    def _fail(self, job: Job, error: Exception) -> None:
        for answer in list(self._open[job].answers):
            if answer.state != "ended":
                self._end(answer, Event(job, answer.index, self.clock(), [], [], None, error))

    def _end(self, answer: _Answer, event: Event) -> None:
        """Give back what an answer holds; its job ends with its last answer."""
        self._events.append(event)
        numbers = self._numbers
        if event.error is not None:
            numbers.failed += 1
        elif event.finish_reason == "cancelled":
            numbers.cancelled += 1
        else:
            numbers.ended += 1
        if answer.state == "waiting":
            self._waiting.remove(answer)
        elif answer.state == "running":
            self._running.remove(answer)
        answer.state = "ended"
        if answer.generation is not None:
            self._engine.free(answer.generation.sequence)
            answer.generation = None
        job = answer.job
        known = self._open[job]
        left = [other for other in known.answers if other.state != "ended"]
        if not left:
            self._evaluated(job, known.queued)
            del self._open[job]
            job.times.ended = event.time
            with self._lock:
                numbers.jobs -= 1
                self._pages_demanded -= known.pages
        elif event.error is None and all(other.state == "new" for other in left):
            self._wait(left[0])  # in place of the one that was to evaluate the prompt for all

    def _evaluated(self, job: Job, count: int) -> None:
        """So many tokens of a prompt wait no more."""
        known = self._open[job]
        count = min(count, known.queued)
        known.queued -= count
        with self._lock:
            self._numbers.queued_tokens -= count

    def _estimate(self) -> None:
        """When a job that is refused now might be taken on: the prompts are evaluated by then, and
        the answer that ends first has ended.
        """
        left = [
            self._most_tokens(answer.job.params) - answer.generation.num_generated
            for answer in self._running
            if answer.generation is not None
        ]
        seconds = self._numbers.queued_tokens * self._pace.prompt_token
        seconds += min(left, default=0) * self._pace.answer_token(len(left))
        least, most = _RETRY_SECONDS
        self._retry_after = min(max(seconds, least), most)


def _rank(answer: _Answer) -> tuple[float, int, int]:
    return answer.rank
