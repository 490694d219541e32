"""Requests of all kinds at random times, some of which nobody waits for: `make soak`.

    python -m tests.soak MODEL --requests 500 --seconds 600

A server is started and asked. Each request is answered or refused exactly once, at the end no
page is held and none is lost, the server has counted as many requests as were made, and its memory
is what it was after a tenth of them, with the KV cache full. What is not so ends the program with
status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

WAIT = 300.0  # seconds until a request is taken for hung
CANCELLED = 0.3  # of the requests
MEMORY = 64 << 20  # bytes that it may grow by
ADDRESS = re.compile(r"serving (\S+) at (http://\S+)/v1")
WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "because",
    "light",
    "of",
    "short",
    "waves",
    "is",
    "scattered",
    "more",
    "by",
    "air",
    "than",
    "red",
]
SCHEMA = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
}  # fmt: skip


@dataclass
class Report:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, before and after
    seconds: float = 0.0


def requests(rng: random.Random, count: int) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Path, body, and how many answers are to come; none where it is to be refused."""
    for _ in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
        chat = {"messages": [{"role": "user", "content": text}]}
        n, longest = rng.choice([1, 1, 1, 2, 3]), rng.randint(1, 80)
        common = {"n": n, "max_tokens": longest, "stream": rng.random() < 0.6}
        common |= {"priority": rng.randint(-3, 3), "seed": rng.randrange(1000)}
        schema = {"name": "x", "schema": {**SCHEMA, "$comment": text}}
        yield rng.choice(
            [
                ("/v1/chat/completions", {**common, **chat}, n),
                ("/v1/chat/completions", {**common, **chat, "temperature": 0}, n),
                ("/v1/completions", {**common, "prompt": text, "logprobs": 3}, n),
                ("/v1/completions", {**common, "prompt": [text, "x"], "stop": ["a"]}, 2 * n),
                ("/v1/completions", {**common, "prompt": text, "regex": "[a-z ]{5,40}"}, n),
                ("/v1/chat/completions", {**common, **chat, "response_format": {
                    "type": "json_schema", "json_schema": schema}}, n),
                ("/v1/completions", {**common, "prompt": text, "timeout": 0.3}, n),
                ("/v1/completions", {**common, "prompt": text * 500}, 0),
                ("/v1/completions", {**common, "prompt": text, "temperature": -1}, 0),
                ("/v1/completions", {**common, "prompt": text, "regex": "("}, 0),
                ("/v1/chat/completions", {**common, **chat, "response_format": {
                    "type": "json_schema", "json_schema": {"name": "x", "schema": {
                        "type": "integer", "multipleOf": 99_999_989}}}}, 0),
            ]
        )  # fmt: skip


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], answers: int) -> str:
    """What came of a request. Raises AssertionError unless it was answered or refused once."""
    async with client.stream("POST", path, json=body) as answer:
        text = (await answer.aread()).decode()
    if answer.status_code != 200:
        assert json.loads(text)["error"]["message"]
        allowed = (400,) if not answers else (408, 429)
        assert answer.status_code in allowed, f"{answer.status_code}: {text[:300]}"
        return f"refused {answer.status_code}"
    assert answers, f"answered, and should have been refused: {body}"
    if not body["stream"]:
        ended = [choice["index"] for choice in json.loads(text)["choices"]]
    else:
        *events, last, rest = text.split("\n\n")
        assert rest == ""
        chunks = [json.loads(event[6:]) for event in events if event.startswith("data: ")]
        if last != "data: [DONE]":
            assert "timeout" in body and json.loads(last[6:])["error"]["code"] == "timeout", last
            return "refused 408"
        choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
        ended = [choice["index"] for choice in choices if choice["finish_reason"]]
    assert sorted(ended) == list(range(answers)), f"{ended} of {answers}"
    return "answered"


async def ask_all(address: str, name: str, count: int, seconds: float, seed: int) -> Report:
    """Ask at random times."""
    report, rng = Report(), random.Random(seed)

    async def one(
        path: str, body: dict[str, Any], answers: int, at: float, patience: float
    ) -> None:
        await asyncio.sleep(at)
        try:
            async with asyncio.timeout(patience):
                outcome = await ask(client, path, {**body, "model": name}, answers)
        except TimeoutError:
            outcome = "cancelled"
            if patience >= WAIT:
                report.wrong.append(f"no answer to {path} {str(body)[:200]}")
        except (AssertionError, httpx.HTTPError) as error:
            outcome = "wrong"
            report.wrong.append(f"{path} {str(body)[:200]}: {error!r}")
        report.outcomes[outcome] += 1

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=address, timeout=WAIT, limits=limits) as client:
        begin, tasks = time.monotonic(), []
        for path, body, answers in requests(rng, count):
            patience = rng.expovariate(1.0) if rng.random() < CANCELLED else WAIT
            tasks.append(one(path, body, answers, rng.uniform(0, seconds), patience))
        await asyncio.gather(*tasks)
        report.seconds = time.monotonic() - begin
    return report


def numbers(address: str) -> dict[str, float]:
    """What the server says of itself, when nothing runs any more."""
    for _ in range(600):
        lines = httpx.get(f"{address}/metrics", timeout=WAIT).text.splitlines()
        found = {key: float(value) for key, value in
                 (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}  # fmt: skip
        if found["cyclewise_jobs"] == 0:
            return found
        time.sleep(0.1)
    raise AssertionError("jobs do not come to an end")


def fill(address: str, name: str) -> None:
    """Use every page once: memory of the KV cache is committed then."""
    rng = random.Random(0)
    for _ in range(1000):
        if numbers(address)["cyclewise_pages_free"] < 2:
            return
        prompt = [rng.randrange(10, 200) for _ in range(900)]
        body = {"model": name, "prompt": prompt, "max_tokens": 1}
        httpx.post(f"{address}/v1/completions", json=body, timeout=WAIT).raise_for_status()
    raise AssertionError("there is always a page that holds nothing")


def asked(found: dict[str, float]) -> float:
    return sum(value for key, value in found.items() if "requests_total" in key and "/v1" in key)


def pages(found: dict[str, float]) -> tuple[float, float]:
    """Those that are held, and all."""
    used, cached, free = (found[f"cyclewise_pages_{each}"] for each in ("used", "cached", "free"))
    return used, used + cached + free


def memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(model: str, *arguments: str) -> Iterator[tuple[int, str, str]]:
    """A server: its process's number, the model's name and the address. It must end in order."""
    command = [sys.executable, "-m", "cyclewise", "serve", model, "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = ADDRESS.search(process.stdout.readline())
        assert found, "the server did not start"
        yield process.pid, found[1], found[2]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(WAIT)
        process.stdout.close()
    assert code == 0, f"the server ended with {code}"


def soak(model: str, *arguments: str, count: int, seconds: float, seed: int = 0) -> Report:
    """Ask a tenth and fill the cache, so that memory is what it will be; then ask all."""
    run: Callable[[Awaitable[Report]], Report] = asyncio.run  # type: ignore[assignment]
    with serving(model, *arguments) as (pid, name, address):
        warm = run(ask_all(address, name, max(10, count // 10), seconds / 20, seed + 1))
        fill(address, name)
        before, sizes = numbers(address), [memory(pid)]
        report = run(ask_all(address, name, count, seconds, seed))
        after = numbers(address)
        report.memory = [*sizes, memory(pid)]
    wrong = report.wrong
    wrong += warm.wrong
    if report.outcomes.total() != count:
        wrong.append(f"{report.outcomes.total()} outcomes of {count} requests")
    unread = report.outcomes["cancelled"]  # the server need not have seen those
    if not count - unread <= asked(after) - asked(before) <= count:
        wrong.append(f"{asked(after) - asked(before)} requests were counted of {count}")
    if pages(after) != (0, pages(before)[1]):
        wrong.append(f"pages held and all: {pages(after)}, and {pages(before)} before")
    if report.memory[1] - report.memory[0] > MEMORY:
        wrong.append(f"memory grew from {report.memory[0] >> 20} to {report.memory[1] >> 20} MiB")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = soak(
        given.model, "--context", "1024", "--parallel", "4",
        count=given.requests, seconds=given.seconds, seed=given.seed,
    )  # fmt: skip
    before, after = (size / (1 << 20) for size in report.memory)
    outcomes = ", ".join(f"{count} {each}" for each, count in sorted(report.outcomes.items()))
    print(f"{given.requests} requests in {report.seconds:.0f} s: {outcomes}")
    print(f"memory {before:.0f} MiB after a tenth of it, {after:.0f} MiB at the end")
    for each in report.wrong:
        print(f"WRONG: {each}")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
