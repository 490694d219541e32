"""Tools: what a model may call, and what it has called.

A model's own template tells it of the tools. What it answers is held to the form that Qwen's and
Hermes' templates teach, text or calls, with arguments that obey the tool's schema (`structure.py`);
`ToolCalls` reads it again as it comes.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from cyclewise.serve.errors import bad
from cyclewise.serve.protocol import ChatRequest, NamedTool
from cyclewise.text.answer import overlap
from cyclewise.text.structure import CALL_BEGINS, CALL_ENDS

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_HEAD = re.compile(r'\s*\{"name": "([^"]*)", "arguments": ')


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools."""

    offered: list[dict[str, Any]]  # as a template reads them
    structure: str  # what the answer must be: see `Structures.compile`


def tools_of(request: ChatRequest) -> Tools | None:
    """What a request says of tools; None: nothing is to be called."""
    choice, tools = request.tool_choice, request.tools or []
    if not tools or choice == "none":
        if choice not in (None, "none", "auto"):
            raise bad("tool_choice asks for a call, and there are no tools", "tool_choice")
        return None
    if request.regex is not None or request.grammar is not None or request.ignore_eos:
        raise bad("tools do not go with regex, grammar or ignore_eos", "tools")
    functions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        function = tool.function
        schema = function.parameters or _NO_ARGUMENTS
        if function.name in functions:
            raise bad(f"two tools are named {function.name!r}", f"tools[{i}].function.name")
        if schema.setdefault("type", "object") != "object":
            raise bad("arguments are an object", f"tools[{i}].function.parameters.type")
        functions[function.name] = schema
    if isinstance(choice, NamedTool):
        chosen = choice.function.name
        if chosen not in functions:
            raise bad(f"there is no tool {chosen[:64]!r}", "tool_choice")
        functions = {chosen: functions[chosen]}
    schema_text = request.schema_text
    structure = {
        "functions": functions,
        "required": choice == "required" or isinstance(choice, NamedTool),
        "many": request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        "content": None if schema_text is None else json.loads(schema_text),
    }
    offered = [tool.model_dump(exclude_none=True) for tool in tools]
    return Tools(offered, json.dumps(structure))


@dataclass(frozen=True, slots=True)
class Said:
    """Some of an answer: text, or the beginning or more of a call."""

    text: str = ""
    call: int | None = None  # the number of the call that the rest belongs to
    name: str | None = None  # where it begins
    arguments: str = ""


class ToolCalls:
    """Finds calls in an answer that keeps to the form, as it comes."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._place = "text"
        self._held = ""
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> list[Said]:
        """Add text; what is certain now."""
        self._held += text
        said: list[Said] = []
        while self._held:
            before = self._place, len(self._held)
            found = getattr(self, f"_{self._place}")()
            if found is not None:
                said.append(found)
            if (self._place, len(self._held)) == before:
                break
        return said

    def end(self) -> list[Said]:
        """No more comes: what was held back of the text."""
        held, self._held = self._held, ""
        return [Said(held)] if held and self._place == "text" and not self.num_calls else []

    def _text(self) -> Said | None:
        text, begin, rest = self._held.partition(CALL_BEGINS)
        if begin:
            self._held, self._place = rest, "head"
        else:
            keep = overlap(text, CALL_BEGINS)
            self._held = text[len(text) - keep :]
            text = text[: len(text) - keep]
        # behind a call comes nothing but white space and calls
        return Said(text) if text and not self.num_calls else None

    def _head(self) -> Said | None:
        head = _HEAD.match(self._held)
        if head is None:
            return None
        self._held, self._place = self._held[head.end() :], "arguments"
        self._depth = 0
        self._in_string = self._escaped = False
        self.num_calls += 1
        return Said(call=self.num_calls - 1, name=head[1])

    def _arguments(self) -> Said:
        end = len(self._held)
        for i, character in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    end, self._place = i + 1, "tail"
                    break
        arguments, self._held = self._held[:end], self._held[end:]
        return Said(call=self.num_calls - 1, arguments=arguments)

    def _tail(self) -> None:
        _, end, rest = self._held.partition(CALL_ENDS)
        if end:
            self._held, self._place = rest, "text"
