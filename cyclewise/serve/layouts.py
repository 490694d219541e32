"""Answers as OpenAI writes them down: whole, or as the chunks of a stream; for chats and for texts.

In: `Delta`s of `service.py`. Out: dictionaries that become JSON. One class for each route, with the
same methods, which `stream.py` calls.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cyclewise.serve.tools import Said, ToolCalls

if TYPE_CHECKING:
    from cyclewise.engine.logprobs import Score
    from cyclewise.serve.service import Delta, ScoredPrompt, Service

_LEAST = -9999.0  # OpenAI's number for what is next to impossible


Usage = dict[str, Any]
"""What `Exchange.usage` says, and `timings` beside it."""


class Layout(Protocol):
    """How answers are written down."""

    end: bytes  # of a stream that has come to its end

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        """All answers, when they have ended."""

    def begin(self) -> list[dict[str, Any]]:
        """What a stream says before the first token."""

    def more(self, delta: Delta) -> list[dict[str, Any]]:
        """What it says of one answer, as it comes."""

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        """What it says when all have ended."""


class _Chunks:
    """What chats and texts have in common: chunks of `choices`."""

    end = b"data: [DONE]\n\n"
    whole_object: str
    chunk_object: str

    def __init__(self, prefix: str, service: Service, model: str, *, wants_usage: bool) -> None:
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }
        self._wants_usage = wants_usage

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """What is said of one answer in a stream, as it comes."""
        raise NotImplementedError

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        choices = [self.choice(delta) for delta in deltas]
        return {**self._head, "object": self.whole_object, "choices": choices, **usage}

    def begin(self) -> list[dict[str, Any]]:
        return []

    def more(self, delta: Delta) -> list[dict[str, Any]]:
        return [self._chunk([choice], {"usage": None}) for choice in self.chunks(delta)]

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        return [self._chunk([], usage)] if self._wants_usage else []

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        return {**chunk, **usage} if self._wants_usage else chunk


class ChatLayout(_Chunks):
    """`/v1/chat/completions`"""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self,
        service: Service,
        model: str,
        *,
        logprobs: bool,
        tools: Sequence[str],
        wants_usage: bool,
    ) -> None:
        """model     what the answer calls it
        logprobs  wanted
        tools     what an answer may call
        """
        super().__init__("chatcmpl", service, model, wants_usage=wants_usage)
        self._service = service
        self._logprobs = logprobs
        self._tools = tools
        self._calls: dict[int, ToolCalls] = {}  # of each answer that has begun

    def choice(self, delta: Delta) -> dict[str, Any]:
        said = self._read(delta)
        text = "".join(each.text for each in said)
        calls: list[dict[str, Any]] = []
        for each in said:
            if each.name is not None:
                calls.append(self._call(delta.index, each))
            elif each.call is not None:
                calls[each.call]["function"]["arguments"] += each.arguments
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            for call in calls:
                del call["index"]
            message.update(content=text or None, tool_calls=calls)
        return self._choice(delta, "message", message, self._reason(delta))

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        chunks = []
        if delta.index not in self._calls:
            start = {"role": "assistant", "content": "", "refusal": None}
            chunks.append(self._choice(None, "delta", start, index=delta.index))
        pieces: list[dict[str, Any]] = []
        for said in self._read(delta):
            if said.call is None:
                pieces.append({"content": said.text})
            else:
                pieces.append({"tool_calls": [self._call(delta.index, said)]})
        if not pieces and (delta.scores or delta.timings):
            pieces.append({"content": ""})
        for i, piece in enumerate(pieces):  # all scores stand beside the first
            chunks.append(self._choice(None if i else delta, "delta", piece, index=delta.index))
        if delta.finish_reason is not None:
            chunks.append(self._choice(None, "delta", {}, self._reason(delta), index=delta.index))
        return chunks

    def _read(self, delta: Delta) -> list[Said]:
        calls = self._calls.setdefault(delta.index, ToolCalls(self._tools))
        if not self._tools:
            return [Said(delta.text)] if delta.text else []
        said = calls.push(delta.text)
        return said + calls.end() if delta.finish_reason is not None else said

    def _reason(self, delta: Delta) -> str | None:
        called = self._calls[delta.index].num_calls and delta.finish_reason == "stop"
        return "tool_calls" if called else delta.finish_reason

    def _call(self, index: int, said: Said) -> dict[str, Any]:
        """Some of a call, as a chunk has it."""
        assert said.call is not None
        if said.name is None:
            return {"index": said.call, "function": {"arguments": said.arguments}}
        return {
            "index": said.call,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": said.name, "arguments": said.arguments},
        }

    def _choice(
        self,
        delta: Delta | None,
        name: str,
        value: dict[str, Any],
        reason: str | None = None,
        index: int | None = None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and delta is not None:
            content = [self._token(score) for score in delta.scores]
            logprobs = {"content": content, "refusal": None}
        place = delta.index if delta is not None else index
        choice = {"index": place, name: value, "logprobs": logprobs, "finish_reason": reason}
        return {**choice, **_timings(delta)}

    def _token(self, score: Score) -> dict[str, Any]:
        top = [self._one(token_id, value) for token_id, value in score.top]
        return {**self._one(score.token_id, score.logprob), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        piece = self._service.token_bytes[token_id].removeprefix(b"\xff")
        text = self._service.tokenizer.show(token_id)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(piece)}


class TextLayout(_Chunks):
    """`/v1/completions`"""

    whole_object = chunk_object = "text_completion"

    def __init__(
        self,
        service: Service,
        model: str,
        *,
        logprobs: bool,
        before: list[str],
        wants_usage: bool,
    ) -> None:
        """model     what the answer calls it
        logprobs  wanted
        before    what each answer begins with: its prompt, or nothing
        """
        super().__init__("cmpl", service, model, wants_usage=wants_usage)
        self._service = service
        self._logprobs = logprobs
        self._before = before
        self._offsets: dict[int, int] = {}  # where the next token of an answer begins

    def choice(self, delta: Delta) -> dict[str, Any]:
        before = ""
        if delta.index not in self._offsets:
            before = self._before[delta.index]
            self._offsets[delta.index] = len(before)
        logprobs = None
        if self._logprobs:
            logprobs = self._tokens(delta)
            if delta.prompt is not None:
                first = self._prompt_tokens(delta.prompt, len(before))
                logprobs = {name: first[name] + found for name, found in logprobs.items()}
        return {
            "index": delta.index,
            "text": before + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            **_timings(delta),
        }

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        if not (delta.text or delta.scores or delta.timings or delta.finish_reason):
            return []
        return [self.choice(delta)]

    def _tokens(self, delta: Delta) -> dict[str, list[Any]]:
        tokens = [self._service.tokenizer.show(score.token_id) for score in delta.scores]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[delta.index])
            self._offsets[delta.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(score.logprob, _LEAST) for score in delta.scores],
            "top_logprobs": [self._top(score) for score in delta.scores],
            "text_offset": offsets,
        }

    def _prompt_tokens(self, prompt: ScoredPrompt, length: int) -> dict[str, list[Any]]:
        """length  characters of the prompt's text"""
        tokenizer, offsets, place = self._service.tokenizer, [], 0
        reader = tokenizer.stream()
        for token_id in prompt.token_ids:
            offsets.append(min(place, length))
            place += len(reader.push(token_id))
        return {
            "tokens": [tokenizer.show(token_id) for token_id in prompt.token_ids],
            "token_logprobs": [None, *(max(score.logprob, _LEAST) for score in prompt.scores)],
            "top_logprobs": [None, *(self._top(score) for score in prompt.scores)],
            "text_offset": offsets,
        }

    def _top(self, score: Score) -> dict[str, float]:
        show = self._service.tokenizer.show
        return {show(token_id): max(value, _LEAST) for token_id, value in reversed(score.top)}


def _timings(delta: Delta | None) -> dict[str, Any]:
    """Beside a choice, where they were asked for."""
    return {"timings": delta.timings} if delta is not None and delta.timings else {}
