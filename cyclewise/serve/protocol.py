"""The requests of OpenAI's API, as they may come in: names, types and bounds are OpenAI's own.

A dictionary that `limits.py` has read comes in; a checked request goes out, or RequestError with
the field that is wrong. Numbers are not made of texts, nor whole ones of others, and an unknown
field is an error. What OpenAI does not have stands in `Sampling` behind what it has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cyclewise.engine.request import MAX_ANSWERS, SamplingParams
from cyclewise.engine.scheduler import MAX_PRIORITY
from cyclewise.serve.errors import bad
from cyclewise.serve.limits import name

MAX_TOOLS = 128
MAX_PROMPTS = 64
_LARGEST = 2**31 - 1

Count = Annotated[int, Field(ge=1, le=_LARGEST)]
TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]


def _boolean(value: object) -> object:
    if not isinstance(value, bool):  # Python takes 0 for False
        raise ValueError("must be false")
    return value


Off = Annotated[Literal[False], BeforeValidator(_boolean)]


class Fields(BaseModel):
    """What all parts of a request are."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Off | None = None


class JsonSchema(Fields):
    name: str = Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Fields):
    type: Literal["text"]


class JsonFormat(Fields):
    type: Literal["json_object"]
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")  # not of OpenAI's API


class SchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class Sampling(Fields):
    """What requests for text have in common."""

    model: str | None = None  # None: the one that is served
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4, fail_fast=True)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: Count | None = None
    response_format: Format | None = None

    # taken, and without effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Off | None = None

    # not of OpenAI's API
    top_k: int | None = Field(None, ge=0, le=_LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    regex: str | None = None
    grammar: str | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    timeout: float | None = Field(None, gt=0, le=86400)  # seconds
    timings_per_token: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def schema_text(self) -> str | None:
        """The schema of the answer."""
        match self.response_format:
            case JsonFormat(json_schema=None):
                return '{"type": "object"}'
            case JsonFormat(json_schema=wanted):
                return json.dumps(wanted)
            case SchemaFormat(json_schema=named):
                if named.json_schema is None:
                    raise bad("the schema is missing", "response_format.json_schema.schema")
                return json.dumps(named.json_schema)
            case _:
                return None


class Function(Fields):
    name: str = Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class FunctionName(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: FunctionName


class Part(Fields):
    """A part of a message: text is all that can be read."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Called(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    id: str
    type: Literal["function"]
    function: Called


Content = str | Annotated[list[Part], Field(fail_fast=True)]


class SystemMessage(Fields):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Fields):
    role: Literal["user"]
    content: Content
    name: str | None = None


class AssistantMessage(Fields):
    # what a server said before comes back with all that it said
    model_config = ConfigDict(extra="ignore")
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None


class ToolMessage(Fields):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Prediction(Fields):
    """What much of the answer may be: a hint that changes no token."""

    type: Literal["content"]
    content: Content


class TemplateOptions(Fields):
    """Variables that templates of models read, by vLLM's name for them. No others are passed on."""

    enable_thinking: bool | None = None  # Qwen3, SmolLM3, GLM
    thinking: bool | None = None  # Granite 3, DeepSeek V3.1
    preserve_thinking: bool | None = None  # Qwen3.6
    reasoning_effort: str | None = Field(None, max_length=32, pattern="^[a-z_]+$")  # gpt-oss
    date_string: str | None = Field(None, max_length=64)  # Llama 3
    add_generation_prompt: bool | None = None  # false: the last message is not followed by a turn


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    chat_template_kwargs: TemplateOptions | None = None  # not of OpenAI's API

    # taken, and without effect
    prediction: Prediction | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: until the context is full."""
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise bad("max_tokens and max_completion_tokens differ: give one", "max_tokens")
        return both[0] or both[1]

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to name beside each; None: no logprobs."""
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
            return None
        return self.top_logprobs or 0


class CompletionRequest(Sampling):
    """`POST /v1/completions`"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: int | None = Field(None, ge=0, le=_LARGEST)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int:
        """Of an answer."""
        if self.max_tokens == 0 and not self.echo:
            raise bad("max_tokens may be 0 together with echo alone", "max_tokens")
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more, each a text or token ids."""
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if isinstance(prompts[0], int):
            prompts = [prompts]
        if len(prompts) > MAX_PROMPTS:
            raise bad(f"{MAX_PROMPTS} are the most prompts of a request", "prompt")
        return prompts


class TokenizeRequest(Fields):
    """`POST /tokenize`: a text or a chat"""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    chat_template_kwargs: TemplateOptions | None = None

    # as llama.cpp's server has them
    content: str | None = None  # a text without what begins and ends a prompt
    add_special: bool | None = None
    with_pieces: bool | None = None


class DetokenizeRequest(Fields):
    """`POST /detokenize`"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


Request = TypeVar("Request", bound=Fields)


def read(kind: type[Request], body: Mapping[str, Any]) -> Request:
    """A request of this kind. Raises RequestError with the first field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    # of the kinds that a field may be of, the one that was meant goes wrong furthest inside
    path, first = max(((_path(body, each["loc"]), each) for each in found), key=_depth)
    place = name(path)
    if first["type"] == "extra_forbidden":
        known = [field.alias or key for key, field in kind.model_fields.items()]
        near = get_close_matches(str(path[-1]), known, n=1)
        hint = f": did you mean {near[0]!r}?" if near and len(path) == 1 else ""
        raise bad(f"unknown field {place!r}{hint}", place, "unknown_parameter")
    if first["type"] == "missing":
        raise bad(f"the field {place!r} is missing", place, "missing_required_parameter")
    raise bad(f"{place}: {first['msg']}", place, "invalid_value")


def _path(body: Any, location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place in the body; `location` names kinds of a union as well."""
    path: list[int | str] = []
    for i, key in enumerate(location):
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError):  # a kind, or what is missing
            if i < len(location) - 1 or not isinstance(body, Mapping):
                continue
        path.append(key)
    return tuple(path)


def _depth(found: tuple[tuple[int | str, ...], Any]) -> int:
    return len(found[0])


def sampling(request: ChatRequest | CompletionRequest, num_logprobs: int | None) -> SamplingParams:
    """How tokens are chosen; without extra fields, from all of them, as OpenAI does."""
    temperature, top_p = _or(request.temperature, 1.0), _or(request.top_p, 1.0)
    if top_p == 0:  # only the likeliest token is left
        temperature, top_p = 0.0, 1.0
    stop = request.stop or ()
    schema = request.schema_text
    given = {"response_format": schema, "regex": request.regex, "grammar": request.grammar}
    structures = [field for field, value in given.items() if value is not None]
    if len(structures) > 1:
        raise bad(f"{' and '.join(structures)} exclude one another", structures[1])
    if structures and request.ignore_eos:
        raise bad(f"ignore_eos would go on after the end of {structures[0]}", "ignore_eos")
    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=_or(request.top_k, 0),
        min_p=_or(request.min_p, 0.0),
        typical_p=_or(request.typical_p, 1.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_biases(request.logit_bias or {}),
        seed=None if request.seed is None else request.seed % 2**64,
        n=_or(request.n, 1),
        max_tokens=request.most_tokens,
        stop=stop,
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=bool(request.ignore_eos),
        json_schema=schema,
        regex=request.regex,
        grammar=request.grammar,
        logprobs=num_logprobs,
    )


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a template reads them. Raises RequestError if one holds more than text."""
    return [_of_template(message, i) for i, message in enumerate(messages)]


def variables(options: TemplateOptions | None) -> dict[str, Any]:
    """The same as a template reads them."""
    return {} if options is None else options.model_dump(exclude_none=True)


Value = TypeVar("Value")


def _or(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 11 and str(int(key)) == key):
            raise bad(f"logit_bias: {key[:40]!r} is no id of a token", "logit_bias")
        biases[int(key)] = bias
    return biases


def _of_template(message: Message, index: int) -> dict[str, Any]:
    place = f"messages[{index}]"
    role = "system" if message.role == "developer" else message.role
    content = message.content
    plain: dict[str, Any] = {"role": role, "content": _plain(content or "", f"{place}.content")}
    if message.name is not None:
        plain["name"] = message.name
    match message:
        case AssistantMessage(tool_calls=[_, *_] as calls):
            plain["tool_calls"] = [_call(call) for call in calls]
        case AssistantMessage(content=None):
            raise bad(f"{place} has neither content nor tool_calls", f"{place}.content")
        case ToolMessage():
            plain["tool_call_id"] = message.tool_call_id
        case _:
            pass
    return plain


def _call(call: ToolCall) -> dict[str, Any]:
    try:  # templates write arguments down as JSON themselves
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _plain(content: Content, place: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise bad(
                f"a part of a message can be text alone, not {part.type[:40]!r}: nothing is "
                f"fetched, and images and sound are not read",
                f"{place}[{i}]",
            )
        texts.append(part.text)
    return "".join(texts)
