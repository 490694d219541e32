from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclewise.engine.engine import Engine
from cyclewise.engine.generation import Generation, advance
from cyclewise.engine.job import Job
from cyclewise.engine.logprobs import SCORED_TOKENS, score_prompt
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.scheduler import AGEING_SECONDS, Limits, Scheduler
from cyclewise.errors import (
    ContextLengthError,
    CyclewiseError,
    DeadlineError,
    EngineError,
    InvalidParameterError,
    OverloadedError,
)
from tests.engine.toy import END, VOCAB_SIZE, ToyModel, scripted

STOPS = frozenset({END, *range(0, 256, 16)})


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(1, 255, count).tolist()


def job(prompt=(1, 2, 3), stop_ids=frozenset({END}), structures=(), **values):
    names = ("adapter", "salt", "priority", "deadline")
    own = {name: values.pop(name) for name in names if name in values}
    params = SamplingParams(**{"seed": 4, "max_tokens": 6, **values})
    return Job(list(prompt), params, stop_ids, structures, **own)


@dataclass
class Bench:
    """A scheduler of a toy, whose clock counts the tokens of its steps, and what came of jobs."""

    context: int = 64
    max_batch_tokens: int = 8
    spare_pages: int = 0
    limits: Limits = field(default_factory=Limits)
    seconds: object = staticmethod(lambda num_tokens: num_tokens)
    logits: object = None

    def __post_init__(self):
        extra = {} if self.logits is None else {"logits": self.logits}
        self.model = ToyModel(
            context=self.context, page_tokens=4, max_batch_tokens=self.max_batch_tokens,
            spare_pages=self.spare_pages, **extra,
        )  # fmt: skip
        self.engine = Engine(self.model)
        self.machine = self.model.machine
        self.now = 0.0
        self.scheduler = Scheduler(self.engine, self.limits, lambda: self.now)
        inner = self.machine.step

        def step(token_ids, chunks, logit_rows):
            self.now += self.seconds(len(token_ids))
            self.batches.append([chunk.count for chunk in chunks])
            return inner(token_ids, chunks, logit_rows)

        self.machine.step = step
        self.batches = []
        self.tokens = {}
        self.scores = {}
        self.ends = {}
        self.ended = []

    def submit(self, *jobs):
        for each in jobs:
            self.scheduler.submit(each)
        return jobs[0]

    def step(self):
        events = self.scheduler.step()
        for event in events:
            self.take(event)
        self.scheduler.check()
        return events

    def take(self, event):
        key = event.job, event.index
        assert key not in self.ends
        self.tokens.setdefault(key, []).extend(event.token_ids)
        self.scores.setdefault(key, []).extend(event.scores)
        if event.is_last:
            self.ends[key] = event.error or event.finish_reason
            self.ended.append(event.job)

    def run(self, steps=10_000):
        for _ in range(steps):
            if not self.scheduler.has_work:
                return self
            self.step()
        raise AssertionError("it does not come to an end")

    def emptied(self):
        """All pages are back, and no job is left."""
        numbers = self.scheduler.numbers()
        assert (numbers.jobs, numbers.running, numbers.waiting, numbers.queued_tokens) == (0,) * 4
        assert numbers.pages_used == 0
        assert self.engine.pool.num_free == self.engine.pool.num_pages
        return numbers


def alone(one, context=64, index=0, logits=None):
    """An answer as it is when nobody else is there: tokens, scores, and why it ended."""
    extra = {} if logits is None else {"logits": logits}
    engine = Engine(ToyModel(context=context, page_tokens=4, **extra))
    structure = one.structures[index].fresh() if one.structures else None
    generation = Generation(
        engine, engine.new_sequence(one.adapter), one.prompt_ids, one.params.of_answer(index),
        one.stop_ids, structure,
    )  # fmt: skip
    gained = []
    while generation.finish_reason is None:
        gained += advance(engine, [generation])[0]
    return gained, generation.scores, generation.finish_reason


def check_answers(bench, jobs, context=64):
    for each in jobs:
        for index in range(each.params.n):
            want = alone(each, context, index, bench.logits)
            key = each, index
            assert (bench.tokens[key], bench.scores[key], bench.ends[key]) == want


class EvenOdd:
    """A structure: tokens are even and odd in turns, and there are `count` of them."""

    def __init__(self, count):
        self.count = count
        self.taken = []

    def fresh(self):
        return EvenOdd(self.count)

    def allowed(self):
        return np.arange(VOCAB_SIZE) % 2 == len(self.taken) % 2

    def allows(self, token_id):
        return bool(self.allowed()[token_id])

    def advance(self, token_id):
        assert self.allows(token_id)
        self.taken.append(token_id)
        return len(self.taken) == self.count


def test_one_job():
    bench = Bench()
    one = bench.submit(job(tokens(20), logprobs=2))
    bench.run()
    check_answers(bench, [one])
    assert bench.batches == [[8], [8], [4], *[[1]] * 5]
    times = one.times
    assert (times.queued, times.started, times.first_token, times.ended) == (0, 0, 20, 25)
    numbers = bench.emptied()
    assert numbers.steps == 8 and numbers.step_seconds == 25
    assert (numbers.prompt_tokens, numbers.reused_tokens, numbers.generated_tokens) == (20, 0, 6)
    assert (numbers.ended, numbers.cancelled, numbers.failed, numbers.refused) == (1, 0, 0, 0)


def test_jobs_join_and_leave_at_every_step():
    bench = Bench(spare_pages=64)
    jobs = [job(tokens(1 + 3 * i, i), seed=i, max_tokens=40 - 4 * i) for i in range(6)]
    for each in jobs:
        bench.submit(each)
        bench.step()
    bench.run()
    check_answers(bench, jobs)
    assert max(map(len, bench.batches)) > 3
    assert bench.emptied().preemptions == 0


def test_why_it_ends():
    bench = Bench(context=20, logits=scripted("abc", 3))
    stops, full, long = job(temperature=0), job(temperature=0, max_tokens=2), job(max_tokens=None)
    bench.submit(stops, full)
    bench.run()
    assert bench.tokens[stops, 0] == [*b"abc"] and bench.ends[stops, 0] == "stop"
    assert bench.tokens[full, 0] == [*b"ab"] and bench.ends[full, 0] == "length"
    bench = Bench(context=10)
    bench.submit(long)
    bench.run()
    assert len(bench.tokens[long, 0]) == 8 and bench.ends[long, 0] == "length"


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("spare_pages", [0, 40])
def test_answers_share_one_prefill(n, spare_pages):
    bench = Bench(context=32, spare_pages=spare_pages)
    one = bench.submit(job(tokens(18), n=n, max_tokens=9, frequency_penalty=1, logprobs=1))
    bench.run()
    check_answers(bench, [one], 32)
    assert bench.batches[:3] == [[8], [8], [2]]
    if spare_pages and n < 8:
        assert bench.batches[3:] == [[1] * n] * 8
        assert bench.emptied().preemptions == 0
    bench.emptied()


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_whoever_came_last_makes_room_and_goes_on_as_if_nothing_had_been(temperature):
    """Eight pages for two that need seven each."""
    bench = Bench(context=32)
    values = {
        "temperature": temperature, "max_tokens": 19, "repetition_penalty": 1.2, "logprobs": 3,
        "presence_penalty": 0.5, "frequency_penalty": 0.5, "top_k": 0,
    }  # fmt: skip
    jobs = [job(tokens(9, i), seed=i, **values) for i in range(2)]
    bench.submit(*jobs)
    bench.run()
    check_answers(bench, jobs, 32)
    assert bench.ended == jobs
    numbers = bench.emptied()
    assert numbers.preemptions >= 1
    assert numbers.generated_tokens == 38
    # what was evaluated twice is less than all: full pages were found again
    evaluated = sum(map(sum, bench.batches))
    assert 2 * 27 <= evaluated < 2 * 27 + 18


def test_a_structure_goes_on_after_a_pause():
    bench = Bench(context=32)
    jobs = [
        job(tokens(9, i), seed=i, temperature=1.5, max_tokens=None, structures=[EvenOdd(18)])
        for i in range(2)
    ]
    bench.submit(*jobs)
    bench.run()
    check_answers(bench, jobs, 32)
    assert bench.emptied().preemptions >= 1
    for each in jobs:
        assert [t % 2 for t in bench.tokens[each, 0]] == [0, 1] * 9
        assert each.structures[0].taken == bench.tokens[each, 0]


def test_a_prompt_that_begins_like_another():
    bench = Bench(spare_pages=64)
    prompt = tokens(21)
    first = bench.submit(job(prompt))
    bench.run()
    again, other = job(prompt), job(prompt, salt=b"another's")
    bench.submit(again, other)
    bench.run()
    check_answers(bench, [first, again, other])
    assert (first.reused_tokens, again.reused_tokens, other.reused_tokens) == (0, 20, 0)
    numbers = bench.emptied()
    assert (numbers.prompt_tokens, numbers.reused_tokens) == (63, 20)
    assert numbers.pages_cached > 0


def test_keys_and_values_of_an_adapter_are_its_own():
    bench = Bench(spare_pages=64)
    jobs = [job(tokens(21), adapter=adapter) for adapter in (None, 0, 1, 0, None)]
    for each in jobs:
        bench.submit(each)
        bench.run()
    assert [each.reused_tokens for each in jobs] == [0, 0, 0, 20, 20]
    check_answers(bench, jobs)
    assert len({tuple(bench.tokens[each, 0]) for each in jobs}) == 3


def test_the_second_waits_for_what_the_first_is_about_to_evaluate():
    bench = Bench(spare_pages=64)
    prompt = tokens(40)
    first, second = job(prompt), job([*prompt, 1])
    bench.submit(first, second)
    bench.run()
    check_answers(bench, [first, second])
    assert second.reused_tokens == 40


# Scores of prompts


def prompt_scores(one):
    engine = Engine(ToyModel(page_tokens=4))
    sequence = engine.new_sequence(one.adapter)
    return list(score_prompt(engine, sequence, one.prompt_ids, one.params.prompt_logprobs))


@pytest.mark.parametrize("n, max_tokens", [(1, 6), (3, 6), (1, 0), (3, 0)])
@pytest.mark.parametrize("count", [1, 2, 21])
def test_scores_of_a_prompt(count, n, max_tokens):
    bench = Bench(spare_pages=64)
    values = {"n": n, "max_tokens": max_tokens, "prompt_logprobs": 2, "logprobs": 1}
    jobs = [job(tokens(count), **values), job(tokens(30, 1)), job(tokens(count), **values)]
    for each in jobs:  # the pages of the first could be found by the third
        bench.submit(each)
        bench.step()
    bench.run().emptied()
    check_answers(bench, jobs)
    for each in (jobs[0], jobs[2]):
        assert each.prompt_scores == prompt_scores(each)
        assert each.reused_tokens == 0
    assert jobs[1].prompt_scores == []
    if not max_tokens:
        assert bench.ends[jobs[0], n - 1] == "length" and not bench.tokens[jobs[0], n - 1]


def test_few_rows_of_logits_at_once():
    bench = Bench(context=400, max_batch_tokens=256, spare_pages=400)
    jobs = [job(tokens(150, i), prompt_logprobs=0, max_tokens=1) for i in range(3)]
    rows = []
    inner = bench.machine.step

    def step(token_ids, chunks, logit_rows):
        rows.append(len(logit_rows))
        return inner(token_ids, chunks, logit_rows)

    bench.machine.step = step
    bench.submit(*jobs)
    bench.run().emptied()
    assert max(rows) == SCORED_TOKENS
    assert len(rows) <= 9


def test_scores_come_once_though_the_prompt_is_evaluated_again():
    bench = Bench(context=32, seconds=lambda count: 5 * count)
    urgent, scored = (
        job(tokens(5), max_tokens=24, priority=1), job(tokens(19, 1), prompt_logprobs=1, n=2),
    )  # fmt: skip
    bench.submit(urgent)
    bench.step()
    bench.step()
    bench.submit(scored)
    for _ in range(10):
        if bench.scheduler.numbers().preemptions:
            break
        bench.step()
    assert bench.scheduler.numbers().preemptions == 1
    assert 0 < len(scored.prompt_scores) < 18
    bench.run().emptied()
    check_answers(bench, [urgent, scored], 32)
    assert scored.prompt_scores == prompt_scores(scored)
    # whoever takes the prompt on goes on with what is still to be scored
    bench = Bench()
    bench.submit(scored := job(tokens(25, 1), prompt_logprobs=1, n=2))
    bench.step()
    bench.scheduler.cancel(scored, 0)
    bench.run().emptied()
    assert scored.prompt_scores == prompt_scores(scored)
    assert bench.batches == [[8], [8], [8], [1], *[[1]] * 5]


def test_a_prompt_whose_logits_are_no_numbers():
    bench = Bench(
        spare_pages=40, logits=lambda ids: np.full(VOCAB_SIZE, np.nan if 7 in ids else 1.0, "f4")
    )
    bad, good = job([1, 7, 2], prompt_logprobs=0, n=2), job([1, 2, 3], prompt_logprobs=0)
    bench.submit(bad, good)
    bench.run().emptied()
    assert "not finite" in str(bench.ends[bad, 0]) and "not finite" in str(bench.ends[bad, 1])
    assert bench.ends[good, 0] == "length" and len(good.prompt_scores) == 2


# Fairness


def first_starts(bench, jobs):
    bench.submit(*jobs)
    bench.run()
    return sorted(jobs, key=lambda each: each.times.started)


def test_first_come_first_served():
    bench = Bench(limits=Limits(running=1))
    jobs = [job(tokens(30 - i, i)) for i in range(6)]
    assert first_starts(bench, jobs) == jobs


def test_a_priority_goes_first_but_not_for_ever():
    bench = Bench(limits=Limits(running=1), seconds=lambda num_tokens: 1.0)
    low = job(tokens(3), max_tokens=2, priority=-1)
    bench.submit(job(tokens(3, 1), max_tokens=2), low, job(tokens(3, 2), max_tokens=2))
    for i in range(30):  # there is always one of the higher priority
        bench.submit(job(tokens(3, i), max_tokens=2))
        bench.step()
        bench.step()
    assert low.times.started is not None
    assert AGEING_SECONDS <= low.times.started <= 2 * AGEING_SECONDS
    bench.run()


def test_who_ranks_lower_makes_room():
    bench = Bench(context=32)
    urgent = job(tokens(9), max_tokens=20, priority=1)
    usual = job(tokens(9, 1), max_tokens=20)
    bench.submit(usual)
    bench.step()
    bench.submit(urgent)
    bench.run()
    check_answers(bench, [usual, urgent], 32)
    assert bench.ended == [urgent, usual]


def test_nobody_overtakes_one_that_needs_many_pages():
    bench = Bench(context=32)
    running, large, small = (
        job(tokens(12), max_tokens=12), job(tokens(25, 1)), job(tokens(2, 2)),
    )  # fmt: skip
    bench.submit(running, large, small)
    bench.run()
    check_answers(bench, [running, large, small], 32)
    assert running.times.started < large.times.started <= small.times.started


class Recorded(Bench):
    def __post_init__(self):
        super().__post_init__()
        self.events = []

    def take(self, event):
        super().take(event)
        self.events.append(event)


@pytest.mark.parametrize(
    "seconds", [lambda count: 10 + count, lambda count: 1 + 0.05 * count, lambda count: 5 * count]
)
@pytest.mark.parametrize("num_running", [1, 4, 16])
def test_a_long_prompt_does_not_hold_up_those_that_are_answered(seconds, num_running):
    row = np.arange(VOCAB_SIZE, dtype=np.float32)
    bench = Recorded(
        context=1200, max_batch_tokens=256, spare_pages=4000, seconds=seconds,
        logits=lambda token_ids: row,
    )  # fmt: skip
    jobs = [
        job(tokens(3, i), stop_ids=(), max_tokens=1000, temperature=0) for i in range(num_running)
    ]
    bench.submit(*jobs)
    for _ in range(40):
        bench.step()
    long = bench.submit(job(tokens(1000, 99), stop_ids=(), max_tokens=1))
    begun = bench.now
    while long.times.ended is None:
        bench.step()
    for each in jobs:
        times = np.array([e.time for e in bench.events if e.job is each and e.token_ids])
        during = np.diff(times[times >= begun])
        assert len(during) > 3
        assert during.max() <= 2.5 * seconds(num_running)
        assert during.mean() >= 1.2 * seconds(num_running)  # and the prompt is not put off
    for each in jobs:
        bench.scheduler.cancel(each)
    bench.run().emptied()


def test_whole_chunks_where_nobody_waits_for_a_token():
    bench = Bench(context=100, max_batch_tokens=32)
    bench.submit(job(tokens(90)))
    bench.run()
    assert bench.batches[:3] == [[32], [32], [26]]


def test_a_prompt_comes_in_beside_as_many_answers_as_there_may_be():
    bench = Bench(max_batch_tokens=4, spare_pages=64, limits=Limits(running=100))
    jobs = [job(tokens(9, i), max_tokens=30) for i in range(5)]
    bench.submit(*jobs)
    bench.run()
    check_answers(bench, jobs)
    assert max(map(len, bench.batches)) <= 4


# Who is refused


def test_more_than_can_be_done():
    bench = Bench(limits=Limits(jobs=3))
    bench.submit(*(job(tokens(9, i)) for i in range(3)))
    with pytest.raises(OverloadedError, match="3 requests are being answered") as refused:
        bench.submit(job())
    assert refused.value.retry_after >= 1
    assert bench.scheduler.numbers().refused == 1
    bench.run()
    bench.submit(job())
    bench.run().emptied()


def test_more_of_prompts_than_can_be_evaluated_soon():
    bench = Bench(limits=Limits(queued_tokens=70), seconds=lambda count: 2.0 * count)
    bench.submit(job(tokens(40), max_tokens=1), job(tokens(20, 1), max_tokens=1))
    with pytest.raises(OverloadedError, match="60 tokens of prompts wait"):
        bench.submit(job(tokens(20, 2)))
    bench.step()
    assert bench.scheduler.numbers().queued_tokens == 52
    with pytest.raises(OverloadedError, match="ask again in 104 s"):
        bench.submit(job(tokens(20, 2)))
    bench.step()
    bench.submit(job(tokens(20, 2)))
    bench.run().emptied()


def test_more_than_all_pages_can_hold():
    bench = Bench(limits=Limits(page_demand=2.0))  # sixteen pages
    whole = job(max_tokens=None)
    bench.submit(whole, job(max_tokens=None))
    with pytest.raises(OverloadedError, match="memory"):
        bench.submit(job())
    bench.scheduler.cancel(whole)
    bench.step()
    bench.submit(job())
    bench.run().emptied()
    bench.submit(job(n=100, max_tokens=None))  # alone it is never too much
    bench.run().emptied()


def test_what_can_never_fit():
    bench = Bench(context=32)
    for count in (32, 33, 1000):
        with pytest.raises(ContextLengthError, match=f"{count} tokens.*context of 32"):
            bench.submit(job(tokens(count)))
    bench = Bench(context=32, spare_pages=-4)  # fewer pages than the context has
    with pytest.raises(ContextLengthError, match=r"16 tokens.*context of 16"):
        bench.submit(job(tokens(16)))
    one = job(tokens(15), max_tokens=None)
    bench.submit(one)
    bench.run().emptied()
    assert bench.ends[one, 0] == "length" and len(bench.tokens[one, 0]) == 2


def test_malformed_jobs():
    bench = Bench()
    for bad in (
        job([]), job([-1]), job([VOCAB_SIZE]), job(priority=11), job(logit_bias={VOCAB_SIZE: 1}),
        job(structures=[None], n=2),
    ):  # fmt: skip
        with pytest.raises(InvalidParameterError):
            bench.submit(bad)
    bench.emptied()
    assert not bench.scheduler.has_work
    once = bench.submit(job())
    with pytest.raises(AssertionError):
        bench.submit(once)
    bench.run().emptied()


# How it ends early


def test_cancel():
    bench = Bench()
    waiting, prefilling, decoding = job(tokens(9)), job(tokens(40, 1)), job(tokens(2, 2))
    bench.submit(decoding)
    bench.step()
    bench.submit(prefilling, waiting)
    bench.step()
    bench.step()
    assert prefilling.times.started is not None and prefilling.times.first_token is None
    for each in (waiting, prefilling, decoding):
        bench.scheduler.cancel(each)
        bench.scheduler.cancel(each)
    before = len(bench.batches)
    assert len(bench.step()) == 3
    assert set(bench.ends.values()) == {"cancelled"} and len(bench.batches) == before
    bench.emptied()
    bench.scheduler.cancel(decoding)
    bench.run().emptied()


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("which", [[0], [1], [0, 1], [2, 0], [0, 1, 2]])
def test_cancel_some_answers(steps, which):
    bench = Bench(spare_pages=40)
    one = bench.submit(job(tokens(18), n=3, max_tokens=5))
    for _ in range(steps):
        bench.step()
    for index in which:
        bench.scheduler.cancel(one, index)
    bench.run().emptied()
    for index in range(3):
        gained, _, reason = alone(one, index=index)
        if index in which:
            assert bench.ends[one, index] == "cancelled"
            got = bench.tokens[one, index]
            assert got == gained[: len(got)] and len(got) == max(0, steps - 2)
        else:
            assert (bench.tokens[one, index], bench.ends[one, index]) == (gained, reason)


def test_deadlines():
    bench = Bench(limits=Limits(running=1))
    slow, waits, quick = (
        job(max_tokens=50, deadline=20.0), job(deadline=3.5), job(deadline=100.0),
    )  # fmt: skip
    bench.submit(slow, waits, quick)
    bench.run().emptied()
    assert isinstance(bench.ends[slow, 0], DeadlineError)
    assert isinstance(bench.ends[waits, 0], DeadlineError) and not bench.tokens[waits, 0]
    assert bench.ends[quick, 0] == "length"
    assert slow.times.ended == 20


def test_a_step_that_fails():
    bench = Bench(spare_pages=40)
    failing = [job(tokens(3, i), max_tokens=20, n=2) for i in range(2)]
    bench.submit(*failing)
    bench.step()

    def fail():
        raise RuntimeError("no more")

    bench.machine.before_step = fail
    later = bench.submit(job(deadline=1e9))
    bench.step()
    bench.machine.before_step = lambda: None
    assert all(isinstance(bench.ends[each, i], EngineError) for each in failing for i in (0, 1))
    bench.run().emptied()
    again = bench.submit(job(tokens(3), max_tokens=20, n=2))
    bench.run()
    check_answers(bench, [again])
    assert (later, 0) in bench.ends


def test_an_answer_that_fails_takes_nobody_with_it():
    class Broken(EvenOdd):
        def advance(self, token_id):
            if len(self.taken) == 2:
                raise CyclewiseError("too complex")
            return super().advance(token_id)

    bench = Bench(spare_pages=40)
    bad = job(n=2, structures=[EvenOdd(5), Broken(5)])
    good = job(tokens(5))
    bench.submit(bad, good)
    bench.run().emptied()
    assert str(bench.ends[bad, 0]) == str(bench.ends[bad, 1]) == "too complex"
    check_answers(bench, [good])


def test_all_fail_when_the_engine_ends():
    bench = Bench()
    jobs = [job(n=2), job(tokens(50))]
    bench.submit(jobs[0])
    bench.step()
    bench.submit(jobs[1])
    for event in bench.scheduler.fail_all(EngineError("closed")):
        bench.take(event)
    assert len(bench.ends) == 3
    bench.scheduler.check()
    bench.emptied()


# Whatever comes

PROMPTS = [tokens(20, 0), tokens(20, 1), tokens(4, 0) + tokens(16, 2), [7] * 20]

jobs_drawn = st.builds(
    lambda base, count, **values: job(PROMPTS[base][:count], STOPS, **values),
    base=st.integers(0, 3),
    count=st.integers(1, 20),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    seed=st.integers(0, 3),
    temperature=st.sampled_from([0, 0.8, 2.0]),
    max_tokens=st.sampled_from([0, 1, 3, 8, 15, None]),
    frequency_penalty=st.sampled_from([0, 1.0]),
    logprobs=st.sampled_from([None, 1]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    priority=st.sampled_from([0, 0, 0, 2, -2]),
    salt=st.sampled_from([b"", b"", b"x"]),
)
actions_drawn = st.lists(
    st.one_of(
        jobs_drawn,
        jobs_drawn,
        st.integers(1, 5),  # steps
        st.tuples(st.integers(0, 20), st.sampled_from([None, 0, 1])),  # cancel
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=150)
@given(actions_drawn, st.integers(-1, 6), st.integers(1, 8), st.integers(3, 9))
def test_every_job_is_answered_once_and_as_if_it_were_alone(actions, spare, running, chunk):
    bench = Bench(24, chunk, spare, Limits(running=running, jobs=1000, page_demand=1e9))
    jobs, cancelled = [], set()
    for action in actions:
        if isinstance(action, Job):
            try:
                bench.submit(action)
            except ContextLengthError:
                assert len(action.prompt_ids) >= 4 * bench.machine.num_pages
            else:
                jobs.append(action)
        elif isinstance(action, int):
            for _ in range(action):
                bench.step()
        elif jobs:
            one = jobs[action[0] % len(jobs)]
            bench.scheduler.cancel(one, action[1])
            cancelled |= {(one, index) for index in range(3) if action[1] in (None, index)}
    bench.run().emptied()
    context = min(24, 4 * bench.machine.num_pages)
    for one in jobs:
        for index in range(one.params.n):
            key = one, index
            gained, scores, reason = alone(one, context, index)
            scores_of_prompt = [] if one.params.prompt_logprobs is None else prompt_scores(one)
            if bench.ends[key] == "cancelled":
                assert key in cancelled
                assert one.prompt_scores == scores_of_prompt[: len(one.prompt_scores)]
                count = len(bench.tokens[key])
                assert bench.tokens[key] == gained[:count]
                assert bench.scores[key] == scores[:count]
            else:
                assert (bench.tokens[key], bench.scores[key]) == (gained, scores)
                assert bench.ends[key] == reason
                assert one.prompt_scores == scores_of_prompt
