"""What is told of steps to those who watch, and of who waits and who runs to anybody."""

from __future__ import annotations

from cyclewise.engine.engine import Engine
from cyclewise.engine.job import Job
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.scheduler import Limits, Scheduler
from tests.engine.toy import ToyModel


class Watch:
    def __init__(self):
        self.turns = []

    def turn(self, on):
        self.turns.append(on)

    def read(self):
        return len(self.turns)


def job(length, *, watched=False, n=1, max_tokens=3):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, n=n)
    return Job(list(range(1, length + 1)), params, watched=watched)


def run(scheduler):
    found = []
    while scheduler.has_work:
        found += scheduler.step()
    return found


def test_those_who_watch_are_told_of_each_step(monkeypatch):
    watch = Watch()
    scheduler = Scheduler(Engine(ToyModel(spare_pages=64)), watch=watch)
    plain, watched = job(3), job(20, watched=True)
    scheduler.submit(plain)
    scheduler.step()
    assert watch.turns == [False]
    scheduler.submit(watched)
    events = run(scheduler)
    assert all(event.spent is None for event in events if event.job is plain)
    spent = [event.spent for event in events if event.job is watched]
    assert len(spent) == 3 and len(spent[0].steps) >= 3  # of at most 8 tokens
    for each in spent:
        assert each.chosen_from <= each.chosen_at
        for step in each.steps:
            assert watch.turns[step.moments - 1] is True
            assert step.num_answers <= step.num_tokens and step.seconds >= 0
    assert [len(each.steps) for each in spent[1:]] == [1, 1]


def test_answers_to_one_prompt_share_its_steps():
    scheduler = Scheduler(Engine(ToyModel(spare_pages=64)))
    scheduler.submit(job(20, watched=True, n=3))
    firsts = {}
    for event in run(scheduler):
        firsts.setdefault(event.index, event.spent)
    assert len(firsts) == 3
    assert firsts[0].steps == firsts[1].steps == firsts[2].steps
    assert firsts[0].steps[0].moments is None  # nobody clocks


def test_watching_changes_no_token():
    def tokens(watched):
        scheduler = Scheduler(Engine(ToyModel(spare_pages=64)), watch=Watch())
        scheduler.submit(job(20, watched=watched, max_tokens=20))
        return [token for event in run(scheduler) for token in event.token_ids]

    assert tokens(True) == tokens(False)


def test_who_waits_and_who_runs():
    scheduler = Scheduler(Engine(ToyModel(spare_pages=64)), Limits(running=2))
    assert scheduler.standings() == []
    first, second, third = job(3, max_tokens=20), job(30, max_tokens=20), job(5)
    scheduler.submit(first)
    scheduler.step()
    scheduler.step()
    scheduler.submit(second)
    scheduler.submit(third)
    standings = scheduler.standings()
    assert [each.state for each in standings] == ["decode", "waiting", "waiting"]
    scheduler.step()
    scheduler.step()
    one, two, three = scheduler.standings()
    assert [each.job for each in (one, two, three)] == [1, 2, 3]
    assert (one.state, one.generated_tokens, one.most_tokens) == ("decode", 4, 20)
    assert (one.prompt_tokens, one.evaluated_tokens) == (3, 3) and one.pages == 2
    assert two.state == "prefill" and 0 < two.evaluated_tokens < 30
    assert (three.state, three.pages, three.evaluated_tokens) == ("waiting", 0, 0)
    run(scheduler)
    assert scheduler.standings() == []
