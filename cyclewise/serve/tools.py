"""Tools: what a model may call, and what it has called.

A model's own template tells it of the tools, or a system message where the template knows of none
(`in_words`). What it answers is held to the form that Qwen's and
Hermes' templates teach, text or calls, with arguments that obey the tool's schema (`structure.py`);
`ToolCalls` reads it again as it comes.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

Small models forget the lines around it. An answer that begins like the line between is a call too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cyclewise.serve.errors import bad
from cyclewise.serve.protocol import ChatRequest, NamedTool
from cyclewise.text.answer import overlap
from cyclewise.text.structure import CALL_BEGINS, CALL_ENDS, call_head

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_CLOSED = {"type", "properties", "required", "title", "description", "$defs", "$schema"}
"""What a schema may hold whose `properties` are all that it names."""
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_HEAD = re.compile(r'\s*\{"name": "([^"]*)", "arguments": ')


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools."""

    offered: list[dict[str, Any]]  # as a template reads them
    structure: str  # what the answer must be: see `Structures.make`
    names: list[str]  # that may be called


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
        functions[function.name] = _closed(schema)
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
    return Tools(offered, json.dumps(structure), list(functions))


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same for arguments: a function has none beside those that it names, though JSON Schema
    would let more through.
    """
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not schema.keys() <= _CLOSED:
        return schema
    required = schema.get("required", [])
    if not isinstance(required, list) or any(
        not isinstance(each, str) or each not in properties for each in required
    ):
        return schema
    return {**schema, "additionalProperties": False}


def in_words(
    messages: Sequence[dict[str, Any]], offered: Sequence[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Messages for a template that knows nothing of tools: what they are, what was called and what
    came of it stands in the texts, in Qwen's words.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            content += f"\n{CALL_BEGINS}\n{json.dumps(call['function'])}\n{CALL_ENDS}"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        plain.append({"role": role, "content": content.removeprefix("\n")})
    if offered is not None:
        told = _INSTRUCTIONS.format("\n".join(map(json.dumps, offered)))
        if plain[0]["role"] == "system":
            told = f"{plain.pop(0)['content']}\n\n{told}"
        plain.insert(0, {"role": "system", "content": told})
    return plain


@dataclass(frozen=True, slots=True)
class Said:
    """Some of an answer: text, or the beginning or more of a call."""

    text: str = ""
    call: int | None = None  # the number of the call that the rest belongs to
    name: str | None = None  # where it begins
    arguments: str = ""


class ToolCalls:
    """Finds calls in an answer that keeps to the form, as it comes."""

    def __init__(self, names: Sequence[str]) -> None:
        """names  of what may be called"""
        self.num_calls = 0
        self._heads = [call_head(name) for name in names]
        self._place = "start"
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
        is_text = self._place in ("start", "text") and not self.num_calls
        return [Said(held)] if held and is_text else []

    def _start(self) -> None:
        if any(self._held.startswith(head) for head in self._heads):
            self._place = "head"
        elif not any(head.startswith(self._held) for head in self._heads):
            self._place = "text"

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
