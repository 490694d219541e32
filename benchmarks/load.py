"""Requests to a server of OpenAI's API: which, when, and what came of each. `serve.py` drives it.

Arrivals and lengths are those of two published traces, scaled: times so that the mean rate is the
one asked for, lengths by a factor for each trace, so that a small machine is loaded as a large one
was. A trace's order, its bursts, the ratio of its lengths and the beginnings that its prompts share
stay as they are. Prompts are pieces of a text; each server gets the same bytes.

The generator shares the machine with the server it measures, so it does next to nothing while the
server runs: request bytes are made before, and what arrives is kept with its time and read
afterwards. What it used of the processor is part of the result.
"""

from __future__ import annotations

import asyncio
import csv
import datetime
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

TRACES = ("azure", "mooncake")
FIRST = 200  # requests of a trace that are left out: prompts of its first seconds share nothing yet
BLOCK = 512  # tokens of a prompt that one number of Mooncake's trace stands for
TICK = 3.0  # seconds to which Mooncake's times are rounded
DRAIN_SECONDS = 10.0  # after the last arrival, for what still runs


class Words(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Call:
    """A request of a trace."""

    at: float  # seconds from the beginning of the run
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()  # what its prompt consists of; none: a text of its own


@dataclass(frozen=True, slots=True)
class Scale:
    """How much shorter than in the trace prompts and answers are."""

    azure: int = 16
    mooncake: int = 128  # its prompts are seven times as long
    answer: int = 16
    most: int = 1000  # tokens of a prompt and its answer together


def read_traces(data: Path, scale: Scale, seed: int) -> dict[str, list[Call]]:
    """All requests of each trace, with its own times."""
    azure = []
    with (data / "azure-llm-trace-2023/AzureLLMInferenceTrace_conv.csv").open() as file:
        for row in csv.DictReader(file):
            seconds = datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            prompt, answer = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            azure.append(_call(seconds, prompt / scale.azure, answer / scale.answer, (), scale))
    mooncake = []
    draw = random.Random(seed)
    with (data / "mooncake-trace/conversation_trace.jsonl").open() as file:
        for line in file:
            row = json.loads(line)
            seconds = row["timestamp"] / 1e3 + draw.uniform(0, TICK)
            prompt, answer = row["input_length"], row["output_length"]
            mooncake.append(
                _call(seconds, prompt / scale.mooncake, answer / scale.answer,
                      tuple(row["hash_ids"]), scale)
            )  # fmt: skip
    mooncake.sort(key=lambda call: call.at)
    return {"azure": azure[FIRST:], "mooncake": mooncake[FIRST:]}


def _call(
    at: float, prompt: float, answer: float, blocks: tuple[int, ...], scale: Scale
) -> Call:  # fmt: skip
    answer_tokens = max(2, min(round(answer), scale.most // 2))
    return Call(at, max(4, min(round(prompt), scale.most - answer_tokens)), answer_tokens, blocks)


def arrivals(traces: dict[str, list[Call]], rate: float, seconds: float) -> list[Call]:
    """The first requests of the traces, as many of each, at so many a second in all."""
    count = max(1, round(rate * seconds / len(traces)))
    found = []
    for calls in traces.values():
        chosen = calls[: count + 1]  # the last one only says where the window ends
        begin, length = chosen[0].at, chosen[-1].at - chosen[0].at
        for call in chosen[:-1]:
            at = (call.at - begin) / length * seconds
            found.append(Call(at, call.prompt_tokens, call.answer_tokens, call.blocks))
    return sorted(found, key=lambda call: call.at)


class Prompts:
    """Texts of as many tokens as are asked for, from one long text."""

    def __init__(self, words: Words, text: str, scale: Scale, seed: int) -> None:
        self._words = words
        self._ids = words.encode(text)
        self._block = BLOCK // scale.mooncake
        self._draw = random.Random(seed)

    def of(self, call: Call) -> str:
        """The prompt of a request; equal blocks are equal texts."""
        if not call.blocks:
            return self._piece(self._draw, call.prompt_tokens)
        parts = [self._piece(random.Random(block), self._block) for block in call.blocks]
        kept = self._words.encode("".join(parts))[: call.prompt_tokens]
        return self._words.decode(kept)

    def _piece(self, draw: random.Random, count: int) -> str:
        start = draw.randrange(len(self._ids) - count)
        return self._words.decode(self._ids[start : start + count])


def body_of(model: str, prompt: str, answer_tokens: int, **values: Any) -> bytes:
    """A streamed request that nothing ends but its number of tokens."""
    fields = {
        "model": model, "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, **values,
    }  # fmt: skip
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@dataclass(slots=True, eq=False)
class Sent(asyncio.Protocol):
    """One request on its way: what it sends, and what comes, with the times."""

    request: bytes
    answer_tokens: int
    start: float = 0.0
    end: float | None = None
    times: list[float] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    transport: Any = None
    stopped: bool = False  # by the generator, at the end of a run

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.end = time.perf_counter()
        self.over.set()


async def send(sent: Sent, port: int) -> None:
    """Send it, and return when the connection is closed."""
    sent.start = time.perf_counter()
    try:
        await asyncio.get_running_loop().create_connection(lambda: sent, "127.0.0.1", port)
    except OSError:
        sent.over.set()
    await sent.over.wait()


@dataclass(slots=True)
class Answer:
    """What came of a request."""

    start: float
    first: float | None  # when its first token came; None: it did not
    times: list[float]  # of each event with text
    tokens: int | None  # as the server counts them; None: it did not come to its end
    prompt_tokens: int | None
    problem: str | None  # what is wrong with an answer that has ended
    text: str


def read(sent: Sent) -> Answer:
    """Take apart what a server has sent (HTTP/1.1, chunks, server-sent events)."""
    answer = Answer(sent.start, None, [], None, None, None, "")
    data, ends = b"".join(sent.pieces), np.cumsum([len(piece) for piece in sent.pieces])
    head, _, _ = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        if data or not sent.stopped:
            answer.problem = f"{data[:400]!r}" if data else "there is no answer"
        return answer
    finished = done = False
    for place, payload in _events(data, len(head) + 4):
        if payload == b"[DONE]":
            done = True
            continue
        try:
            event = json.loads(payload)
        except ValueError:
            answer.problem = f"no JSON: {payload[:200]!r}"
            return answer
        if "error" in event:
            answer.problem = str(event["error"])
            return answer
        for choice in event["choices"]:
            if choice["text"]:
                when = sent.times[int(np.searchsorted(ends, place))]
                answer.times.append(when)
                answer.text += choice["text"]
            finished |= choice["finish_reason"] == "length"
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
            answer.prompt_tokens = event["usage"]["prompt_tokens"]
    answer.first = answer.times[0] if answer.times else None
    if done and not finished:
        answer.problem = "it has no finish_reason"
    elif done and answer.tokens != sent.answer_tokens:
        answer.problem = f"{answer.tokens} tokens instead of {sent.answer_tokens}"
    elif not done and not sent.stopped:
        answer.problem = "it broke off"
    return answer


def _events(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Where each event ends in the stream of bytes, and its payload."""
    text, places = bytearray(), []  # places: (where a chunk begins in the text, and in the stream)
    while at < len(data):
        line = data.find(b"\r\n", at)
        if line < 0:
            break
        size = int(data[at:line], 16)
        places.append((len(text), line + 2))
        text += data[line + 2 : line + 2 + size]
        at = line + 2 + size + 2
        if size == 0:
            break
    starts = [start for start, _ in places]
    begin = 0
    while (end := text.find(b"\n\n", begin)) >= 0:
        payload = bytes(text[begin:end])
        index = int(np.searchsorted(starts, end + 1, side="right")) - 1
        place = places[index][1] + end + 1 - places[index][0]
        begin = end + 2
        if payload.startswith(b"data: "):
            yield place, payload[6:]


@dataclass(slots=True)
class Run:
    """What a run of the generator has measured."""

    sent: list[Sent]
    begin: float
    end: float
    cpu_seconds: float  # of the generator
    cut_short: bool = False  # since more requests were late than the bound allows

    def answers(self) -> list[Answer]:
        return [read(sent) for sent in self.sent if sent.start]


async def open_loop(
    port: int, calls: list[tuple[float, Sent]], *, give_up: float | None = None
) -> Run:
    """Send each request at its time, whatever becomes of the others.

    give_up  end when more than a twentieth of all have waited longer than this many seconds
    """
    begin, cpu = time.perf_counter(), time.process_time()
    tasks: list[asyncio.Task[None]] = []
    late, cut = 0, False
    watched = 0
    waiting: list[Sent] = []
    for at, sent in calls:
        while (left := begin + at - time.perf_counter()) > 0:
            await asyncio.sleep(min(left, 1.0))
            if give_up is not None and time.perf_counter() - begin > watched + 1:
                watched += 1
                waiting, more = _late(waiting, give_up)
                late += more
                cut = late > len(calls) / 20
            if cut:
                break
        if cut:
            break
        tasks.append(asyncio.create_task(send(sent, port)))
        waiting.append(sent)
    if not cut and tasks:
        await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
    run = Run([sent for _, sent in calls], begin, time.perf_counter(), 0.0, cut)
    run.cpu_seconds = time.process_time() - cpu
    await _stop(tasks, run.sent)
    return run


def _late(waiting: list[Sent], bound: float) -> tuple[list[Sent], int]:
    """Those that may still come in time, and how many have not. An answer has begun when more than
    its head has come.
    """
    now = time.perf_counter()
    left, late = [], 0
    for sent in waiting:
        begun = next((at for at, piece in zip(sent.times, sent.pieces, strict=True)
                      if b"data:" in piece), None)  # fmt: skip
        if (begun or now) - sent.start > bound:
            late += 1
        elif begun is None:
            left.append(sent)
    return left, late


async def closed_loop(port: int, clients: list[list[Sent]], seconds: float) -> Run:
    """Clients that send their next request when the last one is answered."""
    begin, cpu = time.perf_counter(), time.process_time()

    async def go_on(requests: list[Sent]) -> None:
        for sent in requests:
            if time.perf_counter() - begin > seconds:
                break
            await send(sent, port)

    tasks = [asyncio.create_task(go_on(requests)) for requests in clients]
    await asyncio.wait(tasks, timeout=seconds)
    run = Run([sent for requests in clients for sent in requests], begin, time.perf_counter(), 0.0)
    run.cpu_seconds = time.process_time() - cpu
    await _stop(tasks, run.sent)
    return run


async def _stop(tasks: list[asyncio.Task[None]], sent: list[Sent]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for each in sent:
        if each.transport is not None and each.end is None:
            each.stopped = True
            each.transport.abort()
    await asyncio.sleep(0)
