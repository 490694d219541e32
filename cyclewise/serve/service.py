"""What all routes share: a loaded model, the engine's thread, and the way from prompts to answers.

A route hands in an `Ask`, with token ids. `Service.begin` makes jobs of it for `engine/runner.py`,
whose events come back into the event loop through a queue; an `Exchange` gives out what is certain
of each answer (`Delta`), and `layouts.py` writes that down as OpenAI does. Nothing here that takes
long runs in the event loop: prompts are read by `text/process.py`, structures made on a thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cyclewise import __version__
from cyclewise.engine.job import Event, Job
from cyclewise.engine.runner import Runner
from cyclewise.errors import (
    ClockError,
    ContextLengthError,
    CyclewiseError,
    InvalidParameterError,
    OverloadedError,
)
from cyclewise.machine.kernels.target import host_target
from cyclewise.serve.errors import RequestError, bad, describe
from cyclewise.serve.metrics import Metrics
from cyclewise.serve.timings import Timings
from cyclewise.serve.tools import in_words
from cyclewise.text.answer import Answer
from cyclewise.text.memo import Memo, key_of
from cyclewise.text.structure import CALL_BEGINS

if TYPE_CHECKING:
    import numpy.typing as npt

    from cyclewise.clock.live import LiveClock
    from cyclewise.engine.engine import Engine
    from cyclewise.engine.logprobs import Score
    from cyclewise.engine.request import SamplingParams
    from cyclewise.engine.scheduler import Limits
    from cyclewise.text.structure import Structure, Structures
    from cyclewise.text.tokenizer import Tokenizer

MAX_ANSWERS = 128
"""Of all prompts of a request together."""
_MAX_MAKING = 16  # structures that wait to be made
_MAKERS = 4  # of these are made at once


_KNOWN_TOKENS = 1 << 20
"""Of prompts that are kept encoded: 4 bytes each."""
_ENTRY_TOKENS = 64  # that the bookkeeping of a prompt is counted as


class Prompts(Protocol):
    """Who makes token ids of prompts: `text/process.py`."""

    @property
    def ready(self) -> bool: ...

    def encode(self, text: str, *, add_special: bool = True) -> Future[list[int]]: ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], **variables: Any
    ) -> Future[list[int]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants of the engine."""

    prompts: list[list[int]]
    params: SamplingParams  # `n` answers to each prompt
    salt: bytes
    adapter: int | None = None  # the number of the LoRA adapter that the request's model names
    structure_field: str = "response_format"  # of the request: what a structure came from
    tool_calls: str | None = None  # see `Structures.make`
    priority: int = 0
    deadline: float | None = None  # by the runner's clock
    timings: bool = False  # of each token


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt, and how likely its tokens were."""

    token_ids: list[int]
    scores: list[Score]  # of all but the first


@dataclass(slots=True)
class Delta:
    """What an answer has gained; the last one of an answer has a reason."""

    index: int  # of the answer; those to the first prompt come first
    text: str = ""
    scores: list[Score] = field(default_factory=list)
    prompt: ScoredPrompt | None = None  # beside an answer's first, where it is asked for
    timings: list[dict[str, Any]] = field(default_factory=list)  # `timings.py`, if asked for
    finish_reason: str | None = None  # "stop" or "length"


class Service:
    """A model that is being served."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer,
        prompts: Prompts,
        *,
        template: str | None,
        timeless: bool = True,
        aliases: Sequence[str] = (),
        adapters: Sequence[str] = (),
        structures: Structures | None = None,
        limits: Limits | None = None,
        threads_alive: Callable[[], bool] = lambda: True,
        clock: LiveClock | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """name           of the model
        template       the model's chat template, where its file has one
        timeless       no template of its asks for the time: a chat is always written alike
        aliases        other names that requests may call it
        adapters       names of its LoRA adapters, in the order of their numbers
        structures     for its vocabulary, where it has a token that ends a text
        threads_alive  whether all of the machine's threads are
        clock          of the engine's machine, for what its moments take
        on_close       called at the end, when nothing runs any more
        """
        self.name = name
        self.aliases = tuple(aliases)
        self.adapters = tuple(adapters)
        self.fingerprint = f"b{__version__}-{host_target().name}"
        """The same seed gives the same text where this is the same."""
        self.created = int(time.time())
        self.engine = engine
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.template = template
        self.timeless = timeless
        self.draining = False
        self.clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self.runner = Runner(engine, limits, self._pass_on, clock)
        self.known_prompts: Memo[npt.NDArray[np.int32]] = Memo(_KNOWN_TOKENS)
        memos: dict[str, Memo[Any]] = {"prompts": self.known_prompts}
        if structures is not None:
            memos["structures"] = structures.known
        self.metrics = Metrics(self.runner.numbers, memos)
        self.token_bytes = tokenizer.all_bytes()
        self._structures = structures
        self._maker = ThreadPoolExecutor(_MAKERS, thread_name_prefix="cyclewise-structures")
        self._num_making = 0
        self._threads_alive = threads_alive
        self._on_close = on_close

    @property
    def trouble(self) -> str | None:
        """Why requests are not answered, or not as they should be; None: they are."""
        if self.runner.failed:
            return "the engine has failed"
        if not self._threads_alive():
            return "a thread of the engine has ended"
        if not self.prompts.ready:
            return "the process that reads prompts is being started"
        if self.draining:
            return "the server is being ended"
        return None

    def close(self, drain_seconds: float = 0.0) -> None:
        """End the engine's thread, when all is answered or the time is over; then all else."""
        self.runner.close(drain_seconds)
        self._maker.shutdown(cancel_futures=True)
        if self._structures is not None:
            self._structures.close()
        self.prompts.close()
        if self._on_close is not None:
            self._on_close()

    def adapter_of(self, name: str | None) -> int | None:
        """The number of the adapter that a request's model names; None: the model as it is.

        Raises RequestError if it is neither.
        """
        if name in (None, self.name, *self.aliases):
            return None
        if name in self.adapters:
            return self.adapters.index(name)
        known = " and ".join(map(repr, [self.name, *self.adapters][:20]))
        raise RequestError(
            404,
            f"there is no model {(name or '')[:200]!r} here, but {known}",
            param="model",
            code="model_not_found",
        )

    def shown_name(self, adapter: int | None) -> str:
        """What answers call the model with this adapter."""
        return self.name if adapter is None else self.adapters[adapter]

    def batch(self) -> dict[str, Any]:
        """Who waits and who runs, and the pages that there are, for whoever looks on: numbers
        alone, nothing of what is asked or answered.
        """
        numbers, pool = self.runner.numbers(), self.engine.pool
        return {
            "model": self.name,
            "time": self.runner.clock(),
            "pages": {
                "total": pool.num_pages,
                "used": numbers.pages_used,
                "cached": numbers.pages_cached,
                "free": numbers.pages_free,
                "tokens": pool.page_tokens,
            },
            "totals": {
                "steps": numbers.steps,
                "step_seconds": numbers.step_seconds,
                "prompt_tokens": numbers.prompt_tokens,
                "reused_tokens": numbers.reused_tokens,
                "generated_tokens": numbers.generated_tokens,
                "preemptions": numbers.preemptions,
            },
            "answers": [asdict(standing) for standing in self.runner.standings()],
        }

    async def encode(self, text: str, *, salt: bytes = b"") -> list[int]:
        """The token ids of a text to continue.

        salt  who has the same one may learn that this was asked before
        """
        key = key_of(salt, "text", text)
        token_ids = await self._encode(key, lambda: self.prompts.encode(text))
        if not token_ids:
            if self.tokenizer.bos_id is None:
                raise bad("the prompt is empty, and this model has no token that begins a text",
                          "prompt")  # fmt: skip
            token_ids = [self.tokenizer.bos_id]
        return token_ids

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        salt: bytes = b"",
    ) -> list[int]:
        """The token ids of a chat, written down with the model's own template.

        variables  that the template may read
        salt       who has the same one may learn that this was asked before
        """
        given = dict(variables)
        if CALL_BEGINS not in (self.template or ""):
            messages = in_words(messages, tools)
        elif tools is not None:
            given["tools"] = tools
        if not self.timeless:
            return await asyncio.wrap_future(self.prompts.encode_chat(messages, **given))
        key = await asyncio.to_thread(_key_of_chat, salt, messages, given)
        return await self._encode(key, lambda: self.prompts.encode_chat(messages, **given))

    async def _encode(self, key: bytes, ask: Callable[[], Future[list[int]]]) -> list[int]:
        known = self.known_prompts.find(key)
        if known is not None:
            found: list[int] = known.tolist()
            return found
        token_ids = await asyncio.wrap_future(ask())
        size = len(token_ids) + _ENTRY_TOKENS
        self.known_prompts.keep(key, np.array(token_ids, np.int32), size)
        return token_ids

    async def begin(self, ask: Ask) -> Exchange:
        """Let the engine answer. The caller closes what is returned, whatever happens.

        Raises RequestError, or an error of the engine's, if it is not taken on.
        """
        if len(ask.prompts) * ask.params.n > MAX_ANSWERS:
            raise bad(f"{MAX_ANSWERS} are the most answers of a request", "n")
        self._check_length(ask)
        self._loop = asyncio.get_running_loop()
        structures = await self._make_structures(ask)
        if ask.timings and self.clock is not None:
            with suppress(ClockError):  # then nobody knows what moments take
                await asyncio.to_thread(self.clock.prepare)
        exchange = Exchange(self, ask, structures)
        try:
            exchange.submit()
        except BaseException:
            exchange.close()
            raise
        return exchange

    def tell(self, events: asyncio.Queue[Event], event: Event) -> None:
        """Put an event into a queue of the event loop's, when the step that it is of has been told:
        on the engine's thread, which would have to wait if it woke the other for each.
        """
        self._told.append((events, event))

    def _pass_on(self) -> None:
        """On the engine's thread, when all of a step has been told."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the event loop has ended, and all who asked are gone
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._told:
            events, event = self._told.popleft()
            events.put_nowait(event)

    def _check_length(self, ask: Ask) -> None:
        longest = max(map(len, ask.prompts))
        wanted = ask.params.max_tokens
        if longest + (1 if wanted is None else wanted) > self.engine.context:
            answer = "" if wanted is None else f" and {wanted} of the answer"
            raise ContextLengthError(
                f"this model's context holds {self.engine.context} tokens; you asked for {longest} "
                f"tokens of the prompt{answer or ', which leave no room for an answer'}"
            )

    async def _make_structures(self, ask: Ask) -> list[list[Structure]]:
        """Of each answer to each prompt; empty lists where there are none."""
        if ask.tool_calls is None and ask.params.structure is None:
            return [[] for _ in ask.prompts]
        if self._num_making >= _MAX_MAKING:
            raise OverloadedError(f"{_MAX_MAKING} structures wait to be made", 1.0)
        self._num_making += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._maker, self._make, ask)
        except CyclewiseError as error:
            raise describe(error, ask.structure_field) from error
        finally:
            self._num_making -= 1

    def _make(self, ask: Ask) -> list[list[Structure]]:
        if self._structures is None:
            raise InvalidParameterError(
                "this model has no token that ends a text, so it cannot end a structure"
            )
        make, made = self._structures.make, []
        for _ in ask.prompts:
            each = [make(ask.params, ask.tool_calls, salt=ask.salt) for _ in range(ask.params.n)]
            made.append([structure for structure in each if structure is not None])
        return made


class Exchange:
    """The answers of a request, while they come."""

    def __init__(self, service: Service, ask: Ask, structures: list[list[Structure]]) -> None:
        self._service = service
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        stop_ids = ask.params.all_stop_ids(service.tokenizer.stop_ids)
        self._jobs = {
            Job(
                prompt_ids,
                ask.params,
                stop_ids,
                each,
                adapter=ask.adapter,
                salt=ask.salt,
                priority=ask.priority,
                deadline=ask.deadline,
                watched=ask.timings,
            ): number * ask.params.n
            for number, (prompt_ids, each) in enumerate(zip(ask.prompts, structures, strict=True))
        }
        self._answers: dict[int, Answer] = {}
        for job, first in self._jobs.items():
            for index in range(ask.params.n):
                detokenizer = service.tokenizer.stream(job.prompt_ids, exact=bool(job.structures))
                self._answers[first + index] = Answer(detokenizer, ask.params.stop)
        self._open = dict.fromkeys(self._answers)  # that have not ended
        self._running: dict[Job, None] = {}  # that the engine has, as far as is known here
        self._token_timings = Timings(service.clock)
        self._last_times: dict[int, float] = {}  # when an answer got its last tokens
        self._prompts_told: dict[int, None] = {}  # answers whose prompt has been given out
        self._end_time = 0.0

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return bool(self._open)

    def submit(self) -> None:
        """Hand the jobs to the engine."""
        for job in self._jobs:
            self._service.runner.submit(job, self._listen)
            self._running[job] = None

    def close(self) -> None:
        """What has not ended is wanted no more: its pages are free within a step."""
        for job in self._running:
            self._service.runner.cancel(job)
        self._running.clear()
        self._open.clear()

    async def next(self, seconds: float) -> Delta | None:
        """What comes next; None if nothing does in this time. Raises what has ended an answer."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    delta = self._read(await self._events.get())
                    if delta is not None:
                        return delta
        except TimeoutError:
            return None

    async def rest(self) -> list[Delta]:
        """All that comes, each answer in one piece."""
        whole = [Delta(index) for index in self._answers]
        while self.is_open:
            delta = await self.next(3600)
            if delta is not None:
                one = whole[delta.index]
                one.text += delta.text
                one.scores += delta.scores
                one.prompt = one.prompt or delta.prompt
                one.timings += delta.timings
                one.finish_reason = delta.finish_reason
        return whole

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens, and seconds, of an exchange that has ended."""
        prompt = sum(len(job.prompt_ids) for job in self._jobs)
        answers = sum(len(answer.token_ids) for answer in self._answers.values())
        cached = sum(job.reused_tokens for job in self._jobs)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": answers,
            "total_tokens": prompt + answers,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"usage": usage, "timings": self._timings()}

    def _timings(self) -> dict[str, float]:
        """Seconds of waiting, of reading the prompts, and of decoding."""
        times = [job.times for job in self._jobs]
        queued = min(each.queued or 0.0 for each in times)
        started = min(each.started or queued for each in times)
        first = min(each.first_token or started for each in times)
        return {
            "queue": round(started - queued, 6),
            "prefill": round(first - started, 6),
            "decode": round(max(self._end_time - first, 0.0), 6),
        }

    def _listen(self, event: Event) -> None:
        """On the engine's thread."""
        self._service.tell(self._events, event)

    def _read(self, event: Event) -> Delta | None:
        index = self._jobs[event.job] + event.index
        if index not in self._open:  # a stop string has ended it, or nobody wants it
            return None
        if event.error is not None:
            raise event.error
        answer = self._answers[index]
        num_before = len(answer.token_ids)
        text = answer.push(event.token_ids)
        self._measure(event, index)
        reason: str | None = event.finish_reason
        if answer.stopped:
            reason = "stop"
            if not event.is_last:
                self._service.runner.cancel(event.job, event.index)
        if reason is not None:
            text += answer.end()
            self._end(event, index)
        num_gained = len(answer.token_ids) - num_before
        return Delta(
            index, text, event.scores[:num_gained], self._scored_prompt(event.job, index),
            self._token_timings.of(event, index, num_gained), reason,
        )  # fmt: skip

    def _scored_prompt(self, job: Job, index: int) -> ScoredPrompt | None:
        if job.params.prompt_logprobs is None or index in self._prompts_told:
            return None
        self._prompts_told[index] = None
        return ScoredPrompt(list(job.prompt_ids), job.prompt_scores)

    def _end(self, event: Event, index: int) -> None:
        del self._open[index]
        self._end_time = event.time
        queued = event.job.times.queued
        if queued is not None:
            self._service.metrics.answer.observe(event.time - queued)
        first = self._jobs[event.job]
        if not any(first <= other < first + event.job.params.n for other in self._open):
            self._running.pop(event.job, None)

    def _measure(self, event: Event, index: int) -> None:
        if not event.token_ids:
            return
        metrics, before = self._service.metrics, self._last_times.get(index)
        queued = event.job.times.queued
        if before is not None:
            metrics.between_tokens.observe(event.time - before)
        elif queued is not None:
            metrics.first_token.observe(event.time - queued)
        self._last_times[index] = event.time


def _key_of_chat(
    salt: bytes, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> bytes:
    return key_of(salt, "chat", json.dumps([messages, variables]))
