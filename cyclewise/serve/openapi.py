"""`GET /openapi.json`: what the server takes and says, for programs that make clients of it.

The requests are those of `protocol.py` and `responses.py`, whose schemas pydantic writes; what is
said stands here, as classes that nothing but the schema and the tests read: `layouts.py`,
`responses.py`, `errors.py` and `app.py` write it. OpenAPI 3.1.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from cyclewise import __version__
from cyclewise.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    ToolCall,
)
from cyclewise.serve.responses import (
    FunctionTool,
    NamedFunction,
    ResponsesRequest,
    TextOptions,
)

WITHOUT_PREFIX = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models")
"""Routes of OpenAI's API, which can be asked without `/v1` too: clients are given either address as
their base."""


class Answer(BaseModel):
    """What all parts of an answer are."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None  # the field of the request that is wrong, like `messages[0].content`
    code: str | None


class ErrorAnswer(Answer):
    """Every answer whose status is not 200."""

    error: ErrorDetail


class PromptDetails(Answer):
    cached_tokens: int  # that the prefix cache held


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Answer):
    """Seconds."""

    queue: float
    prefill: float
    decode: float


class _Answers(Answer):
    id: str
    created: int  # seconds since 1970
    model: str
    system_fingerprint: str  # the same seed gives the same text where this is the same
    usage: Usage
    timings: Timings


class Token(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(Token):
    top_logprobs: list[Token]


class ChatLogprobs(Answer):
    content: list[ScoredToken]
    refusal: None


class TokenTimings(Answer):
    """Where the time of some tokens of an answer went, in seconds: see `timings.py`."""

    tokens: int
    seconds: float
    queue: float
    sampling: float
    steps: int
    step_seconds: float
    batch: int
    batch_tokens: int
    cached_tokens: int
    moments: dict[str, float] | None
    cycles: int | None
    limits: dict[str, float] | None


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    timings: list[TokenTimings] = []  # where `timings_per_token` asks for them


class ChatAnswer(_Answers):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    timings: list[TokenTimings] = []


class TextAnswer(_Answers):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[None]


class OutputMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Literal["completed", "incomplete"]


class OutputCall(Answer):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class Incomplete(Answer):
    reason: Literal["max_output_tokens"]


class OutputDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(Answer):
    id: str
    object: Literal["response"]
    created_at: int  # seconds since 1970
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputMessage | OutputCall]
    usage: ResponseUsage
    timings: Timings

    # as it was asked for
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | NamedFunction
    tools: list[FunctionTool]
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    include: list[str] = []
    prompt_cache_key: str = ""
    safety_identifier: str = ""
    service_tier: str = "auto"


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int  # seconds since 1970
    owned_by: str
    aliases: list[str]  # other names that requests may call it
    parent: str | None  # of a LoRA adapter: the model that it belongs to
    max_model_len: int  # tokens of a prompt and its answer together


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Piece(Answer):
    id: int
    piece: str | list[int]  # bytes, where they are part of a character


class TokensAnswer(Answer):
    count: int
    max_model_len: int  # tokens of a prompt and its answer together
    tokens: list[int] | list[Piece]


class DetokenizedAnswer(Answer):
    prompt: str
    content: str  # the same, as llama.cpp's server names it


class StatusAnswer(Answer):
    status: str


class BatchPages(Answer):
    """Of the KV cache."""

    total: int
    used: int  # by answers
    cached: int  # that nobody holds and that prompts could find
    free: int
    tokens: int  # that a page holds


class BatchTotals(Answer):
    """Since the start."""

    steps: int
    step_seconds: float
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    preemptions: int


class BatchAnswer(Answer):
    """One of those that wait or run: see `engine/watch.py`."""

    job: int
    index: int
    state: Literal["waiting", "prefill", "decode"]
    seconds: float
    priority: int
    prompt_tokens: int
    reused_tokens: int
    evaluated_tokens: int
    generated_tokens: int
    most_tokens: int | None
    pages: int


class Batch(Answer):
    model: str
    time: float  # seconds, by a clock of the server's own
    pages: BatchPages
    totals: BatchTotals
    answers: list[BatchAnswer]


_REQUESTS: dict[str, tuple[type[BaseModel], type[Answer], str]] = {
    "/v1/chat/completions": (ChatRequest, ChatAnswer, "Answer a chat"),
    "/v1/completions": (CompletionRequest, TextAnswer, "Continue texts"),
    "/v1/responses": (ResponsesRequest, ResponseAnswer, "Answer a chat; nothing of it is kept"),
    "/tokenize": (TokenizeRequest, TokensAnswer, "The token ids of a text or a chat"),
    "/detokenize": (DetokenizeRequest, DetokenizedAnswer, "The text of token ids"),
}
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_LOOKS: dict[str, tuple[type[Answer] | None, str, tuple[int, ...]]] = {
    "/v1/models": (ModelList, "The model that is served", ()),
    "/v1/models/{name}": (ModelCard, "A model", (404,)),
    "/health": (StatusAnswer, "Whether the process lives; needs no key", ()),
    "/ready": (StatusAnswer, "Whether it answers", (503,)),
    "/metrics": (None, "Numbers for Prometheus", ()),
    "/v1/batch": (Batch, "Who waits and who runs", ()),
    "/openapi.json": (None, "This description", ()),
}
_EVENT = {
    "description": "of each server-sent event that `stream` asks for; `data` is JSON or [DONE]",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_TEXTS = {"/metrics": "text/plain"}
_ERRORS = {
    400: "the request is wrong in itself: `param` names the field",
    401: "there is no key, or one that opens nothing",
    403: "a browser asks for a page of another site",
    404: "there is no such model",
    408: "the body did not come in time, or `timeout` was over",
    413: "the body is too long",
    415: "the body is not said to be JSON",
    421: "a server without keys was asked by another name than this computer's",
    429: "there is too much to do: `Retry-After` says when to come again",
    431: "the headers are too long",
    500: "the server failed",
    503: "the engine has failed, or the server is being ended",
}
_ALWAYS = (401, 403, 421, 431, 500)
_OF_REQUESTS = (400, 404, 408, 413, 415, 429, 503)
_PLACE = "#/components/schemas/{model}"


@cache
def document(model: str, *, keyed: bool) -> dict[str, Any]:
    """The description of a server.

    model  a name of the one that is served
    keyed  every route but `/health` asks for a key
    """
    kinds: list[type[BaseModel]] = [ErrorAnswer]
    for request, answer, _ in _REQUESTS.values():
        kinds += [request, answer]
    kinds += [look for look, _, _ in _LOOKS.values() if look is not None]
    places, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_PLACE
    )
    schemas = {kind: places[kind, "validation"] for kind in kinds}
    paths: dict[str, Any] = {}
    for path, (request, answer, summary) in _REQUESTS.items():
        body = {"required": True, "content": {"application/json": {"schema": schemas[request]}}}
        content: dict[str, Any] = {"application/json": {"schema": schemas[answer]}}
        if path in _STREAMED:
            content["text/event-stream"] = {"schema": _EVENT}
        operation = _operation(summary, content, _OF_REQUESTS, schemas[ErrorAnswer])
        paths[path] = {"post": {**operation, "requestBody": body}}
    for path, (look, summary, errors) in _LOOKS.items():
        kind = _TEXTS.get(path, "application/json")
        schema = {"type": "string" if kind == "text/plain" else "object"}
        content = {kind: {"schema": schema if look is None else schemas[look]}}
        paths[path] = {"get": _operation(summary, content, errors, schemas[ErrorAnswer])}
    name: Any = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "example": model,
    }
    paths["/v1/models/{name}"]["parameters"] = [name]
    paths["/health"]["get"]["security"] = []
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "cyclewise serve",
            "version": __version__,
            "description": "OpenAI's API, as far as docs/serving.md says. /v1 may be left out.",
        },
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {})},
    }
    if keyed:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _operation(
    summary: str, content: dict[str, Any], errors: tuple[int, ...], error: dict[str, Any]
) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    for status in sorted((*_ALWAYS, *errors)):
        what = {"application/json": {"schema": error}}
        responses[str(status)] = {"description": _ERRORS[status], "content": what}
    return {"summary": summary, "responses": responses}
