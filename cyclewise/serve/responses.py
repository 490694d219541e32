"""`POST /v1/responses`: OpenAI's later API, for answers of which nothing is kept.

A request is written as one of `/v1/chat/completions` (`as_chat`), and goes the same way; what comes
of it is written down as items: messages and calls of functions.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field

from cyclewise.serve.errors import bad
from cyclewise.serve.protocol import MAX_TOOLS, ChatRequest, Count, Fields, Off, read
from cyclewise.serve.tools import Said, ToolCalls

if TYPE_CHECKING:
    from cyclewise.serve.layouts import Usage
    from cyclewise.serve.service import Delta


class OutputFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Fields):
    format: OutputFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Fields):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Fields):
    type: Literal["function"]
    name: str


class Item(Fields):
    """A message, a call or what came of one; what a response said comes back as it was."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None


class ResponsesRequest(Fields):
    """`POST /v1/responses`"""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None

    # taken, and without effect
    store: Off | None = None
    truncation: Literal["disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    previous_response_id: None = None

    def as_chat(self) -> ChatRequest:
        """The same as a request for a chat. Raises RequestError."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items = [Item(role="user", content=self.input)] if isinstance(self.input, str) else None
        for i, item in enumerate(items or self.input):
            assert isinstance(item, Item)
            _add(messages, item, f"input[{i}]")
        tools = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in self.tools or ()
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        body = {
            "model": self.model,
            "messages": messages,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "response_format": self._format(),
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        return read(ChatRequest, body)

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text and self.text.format
        if not wanted:
            return None
        if wanted.type != "json_schema":
            return {"type": wanted.type}
        if wanted.name is None or wanted.json_schema is None:
            raise bad("a json_schema has a name and a schema", "text.format")
        schema = wanted.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}


def _add(messages: list[dict[str, Any]], item: Item, place: str) -> None:
    """Write an item down as a chat's message, or in the one before."""
    match item.type:
        case "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise bad(f"{place}: a call has call_id, name and arguments", place)
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            if item.call_id is None or item.output is None:
                raise bad(f"{place}: what came of a call has call_id and output", place)
            message = {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
            messages.append(message)
        case _:
            if item.content is None:
                raise bad(f"{place}: a message has content", f"{place}.content")
            messages.append({"role": item.role, "content": _parts(item.content)})


def _parts(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    texts = ("input_text", "output_text")
    return [
        {"type": "text", "text": part.get("text")} if part.get("type") in texts else part
        for part in content
    ]


class ResponseLayout:
    """A response, whole or as events."""

    end = b""

    def __init__(self, asked: ResponsesRequest, model: str, names: Sequence[str]) -> None:
        """names  of what may be called"""
        self._asked = asked
        self._model = model
        self._calls = ToolCalls(names) if names and asked.tool_choice != "none" else None
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._items: list[dict[str, Any]] = []  # the last one may be unfinished
        self._reason: str | None = None
        self._number = 0

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        for delta in deltas:
            self.more(delta)
        return self._response(self._status, usage)

    def begin(self) -> list[dict[str, Any]]:
        now = self._response("in_progress", {})
        return [
            self._event(f"response.{kind}", response=now) for kind in ("created", "in_progress")
        ]

    def more(self, delta: Delta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for said in self._read(delta):
            kind = "message" if said.call is None else "function_call"
            if said.name is not None or not self._items or self._items[-1]["type"] != kind:
                events += self._close_item()
                events += self._open_item(said)
            events += self._add(said)
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason
            events += self._close_item()
        return events

    def finish(self, usage: Usage) -> list[dict[str, Any]]:
        status = self._status
        return [self._event(f"response.{status}", response=self._response(status, usage))]

    @property
    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _read(self, delta: Delta) -> list[Said]:
        if self._calls is None:
            return [Said(delta.text)] if delta.text else []
        said = self._calls.push(delta.text)
        return said + self._calls.end() if delta.finish_reason is not None else said

    def _open_item(self, said: Said) -> list[dict[str, Any]]:
        token = secrets.token_hex(12)
        item: dict[str, Any] = {"id": f"msg_{token}", "type": "message", "role": "assistant",
                                "content": [], "status": "in_progress"}  # fmt: skip
        if said.call is not None:
            item = {"id": f"fc_{token}", "type": "function_call", "call_id": f"call_{token}",
                    "name": said.name, "arguments": "", "status": "in_progress"}  # fmt: skip
        self._items.append(item)
        added = self._event("response.output_item.added", output_index=self._index, item={**item})
        if said.call is not None:
            return [added]
        item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
        return [added, self._of_part("content_part.added", part={**item["content"][0]})]

    def _add(self, said: Said) -> list[dict[str, Any]]:
        item = self._items[-1]
        if said.call is None:
            item["content"][0]["text"] += said.text
            return [self._of_part("output_text.delta", delta=said.text, logprobs=[])]
        if not said.arguments:
            return []
        item["arguments"] += said.arguments
        return [self._of_item("function_call_arguments.delta", delta=said.arguments)]

    def _close_item(self) -> list[dict[str, Any]]:
        if not self._items:
            return []
        item = self._items[-1]
        item["status"] = "incomplete" if self._reason == "length" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            events = [
                self._of_part("output_text.done", text=part["text"], logprobs=[]),
                self._of_part("content_part.done", part=part),
            ]
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._of_item("function_call_arguments.done", **done)]
        last = self._event("response.output_item.done", output_index=self._index, item={**item})
        return [*events, last]

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        item_id = self._items[-1]["id"]
        return self._event(f"response.{kind}", item_id=item_id, output_index=self._index, **fields)

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _response(self, status: str, usage: Usage) -> dict[str, Any]:
        asked = self._asked
        given = asked.model_dump(by_alias=True, exclude_none=True, exclude={"input", "stream"})
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        tokens = usage.get("usage")
        return {
            "instructions": None,
            "max_output_tokens": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "temperature": 1.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "truncation": "disabled",
            "user": None,
            **given,
            "store": False,
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "error": None,
            "incomplete_details": reason,
            "output": list(self._items),
            "usage": tokens
            and {
                "input_tokens": tokens["prompt_tokens"],
                "input_tokens_details": tokens["prompt_tokens_details"],
                "output_tokens": tokens["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens["total_tokens"],
            },
            **({"timings": usage["timings"]} if usage else {}),
        }
