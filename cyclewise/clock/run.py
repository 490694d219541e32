"""A clocked run: prompts in, tokens out, with every stage between two ticks.

`profile.py` and the command line come here. The run takes the path that a user's request takes
(template, tokenizing, scheduling, the machine, sampling, detokenizing, writing), for a batch of
sequences at once, and keeps the raw ticks: what they mean is computed elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cyclewise.clock.account import Span
from cyclewise.clock.counter import Calibration, Counter, between
from cyclewise.clock.pmu import Counts, close_groups, open_groups
from cyclewise.engine.engine import Engine, Request
from cyclewise.engine.request import SamplingParams
from cyclewise.engine.sampler import Sampler
from cyclewise.errors import InvalidParameterError, TemplateError
from cyclewise.machine.costs import BatchShape
from cyclewise.machine.stamps import Stamps

if TYPE_CHECKING:
    from cyclewise.models import Model
    from cyclewise.text.chat import ChatTemplate
    from cyclewise.text.tokenizer import Tokenizer

STAGES = ("template", "tokenizing", "scheduling", "sampling", "detokenizing", "writing")
"""What happens outside the forward pass, as moments of the report."""
PROBE_SECONDS = 0.1
_TEXT = (
    "Inference is a sequence of moments. Encode the input, attend, feed forward, and decode; each "
    "moment costs cycles, and the cycles can be counted. "
)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run: the prefill up to its first tokens, or the decode after them."""

    name: str
    """`prefill` or `decode`."""
    ticks: NDArray[np.int64]
    """(steps, threads, moments + 1, 2), see `Stamps.ticks`."""
    shapes: tuple[BatchShape, ...]
    """Of each step."""
    spans: tuple[Span, ...]
    window: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """One repeat of a run."""

    prefill: Phase
    decode: Phase
    calibration: Calibration
    """From right before and right after."""
    counts: tuple[Counts, ...]
    """What the processor counted on each thread; empty where it does not."""
    bandwidths: tuple[float, float]
    """Bytes a second read from memory, right before and right after, from as large a buffer as the
    weights: what the caches keep of one they keep of the other.
    """


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does."""

    prompt_tokens: int = 512
    generate_tokens: int = 64
    batch: int = 1
    repeats: int = 5


class _Laps:
    """What Python did and when, in nanoseconds; a lap begins where the one before it ended."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, int, int]] = []
        self.start = self.last = perf_counter_ns()

    def mark(self, name: str) -> None:
        """What was done since the last mark."""
        now = perf_counter_ns()
        self.laps.append((name, self.last, now))
        self.last = now


class ClockedRun:
    """Runs a model under the clock. Closing the run gives the machine back to the plain loop."""

    def __init__(self, model: Model, tokenizer: Tokenizer, counter: Counter) -> None:
        self.model, self.tokenizer, self.counter = model, tokenizer, counter
        self.engine = Engine(model)
        self._sink = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._template = _template(model, tokenizer)
        threads = model.machine.threads.thread_ids if counter.source == "pmu" else ()
        self._groups = open_groups(threads)

    def __enter__(self) -> ClockedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the clock."""
        self.model.machine.clock(None)
        self._sink.close()
        close_groups(self._groups)

    def turns(
        self, settings: Settings, progress: Callable[[str], None] = lambda _: None
    ) -> list[Turn]:
        """Runs the settings `repeats` times, after a short warm-up.

        Raises InvalidParameterError, before anything runs, for counts out of range.
        """
        self._check(settings)
        machine = self.model.machine
        machine.read_bandwidth(0)
        num_moments = len(machine.program.moments)
        prefill_steps = -(-settings.prompt_tokens * settings.batch // machine.max_batch_tokens)
        capacity = prefill_steps + settings.batch + settings.generate_tokens
        stamps = Stamps(num_moments, machine.num_threads, capacity)
        machine.clock(stamps)
        text = self._text(settings.prompt_tokens)
        progress("warming up")
        warm = Settings(min(64, settings.prompt_tokens), 3, settings.batch, 1)
        self._turn(warm, self._text(warm.prompt_tokens), stamps)
        turns = []
        for repeat in range(settings.repeats):
            progress(f"repeat {repeat + 1} of {settings.repeats}")
            turns.append(self._turn(settings, text, stamps))
        progress("")
        return turns

    def _check(self, settings: Settings) -> None:
        for name, least in (
            ("prompt_tokens", 1),
            ("generate_tokens", 2),
            ("batch", 1),
            ("repeats", 1),
        ):
            if getattr(settings, name) < least:
                raise InvalidParameterError(
                    f"{name} must be at least {least}, not {getattr(settings, name)}."
                )
        machine, context = self.model.machine, self.model.config.context_length
        longest = settings.prompt_tokens + settings.generate_tokens
        pages = settings.batch * -(-longest // machine.page_tokens)
        if longest > context or pages > machine.num_pages:
            raise InvalidParameterError(
                f"{settings.batch} x {longest} tokens of prompt and answer do not fit into the "
                f"context of {context}: ask for fewer, or give a larger --context."
            )
        if settings.batch > machine.max_batch_tokens:
            raise InvalidParameterError(
                f"batch must be at most {machine.max_batch_tokens}, not {settings.batch}."
            )

    def _text(self, num_tokens: int) -> str:
        """A user's message of about that many tokens."""
        per_text = max(1, len(self.tokenizer.encode(_TEXT, add_special=False)))
        return _TEXT * -(-num_tokens // per_text)

    def _turn(self, settings: Settings, text: str, stamps: Stamps) -> Turn:
        machine = self.model.machine
        weight_bytes = self.model.bytes_per_token
        bandwidth_before = machine.read_bandwidth(PROBE_SECONDS, weight_bytes)
        before = self.counter.calibrate(machine.threads)
        machine.settle()
        stamps.clear()
        counted = [group.read() for group in self._groups]
        anchor = self.counter.anchor()
        laps = _Laps()
        prompt = self._encode(settings, text, laps)
        sequences = [self.engine.new_sequence() for _ in range(settings.batch)]
        samplers = [Sampler(SamplingParams(seed=i)) for i in range(settings.batch)]
        readers = [self.tokenizer.stream(prompt.tolist()) for _ in range(settings.batch)]
        following = [0] * settings.batch
        requests = [Request(sequence, prompt, "last") for sequence in sequences]
        for sequence in sequences:
            sequence.reserve(settings.prompt_tokens + settings.generate_tokens)
        laps.mark("scheduling")

        def step() -> None:
            """One step, and a token for each request that ends with it."""
            waiting = [i for i, request in enumerate(requests) if request.num_left]
            logits = self.engine.step(requests)
            laps.mark("scheduling")
            indices = [i for i in waiting if not requests[i].num_left]
            for row, index in enumerate(indices):
                following[index] = samplers[index].sample(logits[row], sequences[index].token_ids)
            laps.mark("sampling")
            texts = [readers[index].push(following[index]) for index in indices]
            laps.mark("detokenizing")
            for piece in texts:
                self._sink.write(piece)
            self._sink.flush()
            laps.mark("writing")

        while any(request.num_left for request in requests):
            step()
        first, border = stamps.count, laps.last
        for _ in range(settings.generate_tokens - 1):
            requests[:] = [
                Request(sequence, np.array([token_id], np.int32), "last")
                for sequence, token_id in zip(sequences, following, strict=True)
            ]
            step()
        machine.settle()
        to_ticks = self.counter.mapping(anchor)
        ticks, shapes, calls = stamps.ticks.copy(), stamps.shapes, stamps.calls
        for sequence in sequences:
            self.engine.free(sequence)
        spans = _spans(laps.laps, calls, to_ticks)
        split = to_ticks(border)
        pairs = zip(self._groups, counted, strict=True)
        counts = tuple(group.read().since(earlier) for group, earlier in pairs)
        after = self.counter.calibrate(machine.threads)
        bandwidth_after = machine.read_bandwidth(PROBE_SECONDS, weight_bytes)
        return Turn(
            Phase(
                "prefill", ticks[:first], shapes[:first],
                tuple(span for span in spans if span.start < split),
                (to_ticks(laps.start), split),
            ),
            Phase(
                "decode", ticks[first:], shapes[first:],
                tuple(span for span in spans if span.start >= split),
                (split, to_ticks(laps.last)),
            ),
            between(before, after, counts),
            counts,
            (bandwidth_before, bandwidth_after),
        )  # fmt: skip

    def _encode(self, settings: Settings, text: str, laps: _Laps) -> NDArray[np.int32]:
        """A prompt of exactly as many tokens as wanted."""
        if self._template is None:
            token_ids = self.tokenizer.encode(text)
        else:
            message = {"role": "user", "content": text}
            rendered = self._template.render([message], add_generation_prompt=True)
            laps.mark("template")
            token_ids = self.tokenizer.encode_chat(rendered)
        exact = np.resize(np.array(token_ids or [0], np.int32), settings.prompt_tokens)
        laps.mark("tokenizing")
        return exact


def _template(model: Model, tokenizer: Tokenizer) -> ChatTemplate | None:
    from cyclewise.text.chat import ChatTemplate

    try:
        template = ChatTemplate.for_model(model.metadata, tokenizer)
        template.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except TemplateError:
        return None
    return template


def _spans(
    laps: list[tuple[str, int, int]], calls: NDArray[np.int64], to_ticks: Callable[[int], int]
) -> list[Span]:
    """Laps in ticks, without the calls into compiled code that lie in them."""
    spans = []
    inside = iter([*calls.tolist(), None])
    call = next(inside)
    for name, start, end in laps:
        at = start
        while call is not None and call[0] < end:
            spans.append(Span(name, to_ticks(at), to_ticks(call[0])))
            at, call = call[1], next(inside)
        spans.append(Span(name, to_ticks(at), to_ticks(end)))
    return spans
