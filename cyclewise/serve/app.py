"""READ FIRST. The routes of the server: each reads a request, asks the engine, and replies.

    body -> limits.py -> protocol.py -> text/process.py -> service.py -> layouts.py, stream.py
            bytes        fields         token ids          answers       JSON, events

Chats and texts share everything below the reading of the request. `security.py` stands before all
of it, `server.py` starts and ends it.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from cyclewise.errors import ContextLengthError, CyclewiseError
from cyclewise.serve import openapi, protocol
from cyclewise.serve.errors import RequestError, bad, describe
from cyclewise.serve.layouts import ChatLayout, Layout, TextLayout
from cyclewise.serve.limits import MAX_BODY_BYTES, Bodies
from cyclewise.serve.pages import add_pages
from cyclewise.serve.responses import ResponseLayout, ResponsesRequest
from cyclewise.serve.security import Gate, Keys
from cyclewise.serve.service import Ask, Service
from cyclewise.serve.stream import Reply
from cyclewise.serve.tools import tools_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.types import ASGIApp

    from cyclewise.engine.request import SamplingParams


def make_app(
    service: Service,
    keys: Keys | None = None,
    *,
    local_only: bool = False,
    cors: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> ASGIApp:
    """The server as an ASGI application.

    local_only  refuse requests to other hosts than this computer: for a server without keys
    cors        origins whose pages may ask
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _Routes(service, max_body_bytes, keyed=bool(keys)).add_to(app)
    app.add_exception_handler(CyclewiseError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    gate: ASGIApp = Gate(app, keys or Keys(), service.metrics, local_only=local_only)
    if not cors:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=list(cors),
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["x-request-id", "retry-after"],
    )


def _answer_error(error: RequestError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    return _answer_error(describe(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method[:16]} {request.url.path[:200]}"
    message = {404: f"there is no {what}", 405: f"{what} is not allowed"}.get(
        error.status_code, str(error.detail)
    )
    headers = dict(error.headers or {})
    return _answer_error(RequestError(error.status_code, message, headers=headers))


def _add(app: FastAPI, path: str, route: Callable[[Request], Any], method: str) -> None:
    app.add_route(path, route, methods=[method])
    if path.startswith(openapi.WITHOUT_PREFIX):
        app.add_route(path.removeprefix("/v1"), route, methods=[method])


class _Routes:
    def __init__(self, service: Service, max_body_bytes: int, *, keyed: bool) -> None:
        self._service = service
        self._bodies = Bodies(max_body_bytes)
        self._keyed = keyed

    def add_to(self, app: FastAPI) -> None:
        for path, route in {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.complete,
            "/v1/responses": self.respond,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }.items():
            _add(app, path, route, "POST")
        for path, route in {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/ready": self.ready,
            "/metrics": self.metrics,
            "/openapi.json": self.openapi,
            "/v1/batch": self.batch,
        }.items():
            _add(app, path, route, "GET")
        add_pages(app)

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, protocol.ChatRequest)
        return await self._chat(request, asked)

    async def respond(self, request: Request) -> Response:
        asked = await self._read(request, ResponsesRequest)
        layout = ResponseLayout(
            asked, request.state.model, [tool.name for tool in asked.tools or ()]
        )
        try:
            return await self._chat(request, asked.as_chat(), layout)
        except RequestError as error:
            if (error.param or "").startswith("messages"):
                error.param = "input"
            raise

    async def _chat(
        self, request: Request, asked: protocol.ChatRequest, layout: Layout | None = None
    ) -> Response:
        tools = tools_of(asked)
        num_logprobs = asked.num_logprobs
        params = protocol.sampling(asked, num_logprobs)
        messages = protocol.for_template(asked.messages)
        prompt = await self._service.encode_chat(
            messages,
            tools.offered if tools else None,
            protocol.variables(asked.chat_template_kwargs),
            salt=request.state.salt,
        )
        ask = self._ask(request, asked, [prompt], params, tools.structure if tools else None)
        layout = layout or ChatLayout(
            self._service,
            request.state.model,
            logprobs=num_logprobs is not None,
            tools=tools.names if tools else (),
            wants_usage=asked.wants_usage,
        )
        return await self._reply(asked, ask, layout)

    async def complete(self, request: Request) -> Response:
        asked = await self._read(request, protocol.CompletionRequest)
        if asked.best_of not in (None, asked.n or 1):
            raise bad("best_of must be n: all answers are returned", "best_of")
        params = protocol.sampling(asked, asked.logprobs)
        salt = request.state.salt
        prompts = [await self._prompt(prompt, salt) for prompt in asked.prompts]
        before = [""] * (len(prompts) * params.n)
        if asked.echo:
            before = [self._echo(prompt) for prompt in asked.prompts for _ in range(params.n)]
            params = replace(params, prompt_logprobs=asked.logprobs)
        ask = self._ask(request, asked, prompts, params)
        layout = TextLayout(
            self._service,
            request.state.model,
            logprobs=asked.logprobs is not None,
            before=before,
            wants_usage=asked.wants_usage,
        )
        return await self._reply(asked, ask, layout)

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(request, protocol.TokenizeRequest)
        if sum(each is not None for each in (asked.prompt, asked.content, asked.messages)) != 1:
            raise bad("give one of prompt, content and messages", "prompt")
        if asked.messages is not None:
            if asked.add_special is not None:
                raise bad("a chat has the special tokens that its template writes", "add_special")
            token_ids = await self._service.encode_chat(
                protocol.for_template(asked.messages),
                None,
                protocol.variables(asked.chat_template_kwargs),
                salt=request.state.salt,
            )
        else:
            text = asked.prompt if asked.content is None else asked.content
            special = asked.content is None if asked.add_special is None else asked.add_special
            assert text is not None
            encoding = self._service.prompts.encode(text, add_special=special)
            token_ids = await asyncio.wrap_future(encoding)
        facts = {"count": len(token_ids), "max_model_len": self._service.engine.context}
        if not asked.with_pieces:
            return JSONResponse({**facts, "tokens": token_ids})
        return JSONResponse({**facts, "tokens": [self._piece(each) for each in token_ids]})

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, protocol.DetokenizeRequest)
        self._check_ids(asked.tokens, "tokens")
        text = await asyncio.to_thread(self._service.tokenizer.decode, asked.tokens)
        return JSONResponse({"prompt": text, "content": text})

    async def models(self, request: Request) -> Response:
        adapters = [None, *range(len(self._service.adapters))]
        return JSONResponse({"object": "list", "data": list(map(self._model, adapters))})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model(self._service.adapter_of(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        trouble = self._service.trouble
        if trouble is not None:
            raise RequestError(503, trouble, code="engine_unavailable")
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        name = self._service.name
        return JSONResponse(await asyncio.to_thread(openapi.document, name, keyed=self._keyed))

    async def batch(self, request: Request) -> Response:
        return JSONResponse(self._service.batch(), headers={"cache-control": "no-store"})

    def _model(self, adapter: int | None) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.shown_name(adapter),
            "object": "model",
            "created": service.created,
            "owned_by": "cyclewise",
            "aliases": service.aliases if adapter is None else [],
            "parent": None if adapter is None else service.name,
            "max_model_len": service.engine.context,
        }

    async def _read(self, request: Request, kind: type[protocol.Request]) -> protocol.Request:
        asked = protocol.read(kind, await self._bodies.read_json(request))
        request.state.read_at = self._service.runner.clock()
        adapter = self._service.adapter_of(asked.model)  # type: ignore[attr-defined]
        request.state.adapter, request.state.model = adapter, self._service.shown_name(adapter)
        return asked

    def _check_ids(self, token_ids: list[int], field: str) -> None:
        if token_ids and max(token_ids) >= len(self._service.token_bytes):
            most = len(self._service.token_bytes) - 1
            raise bad(f"{field}: this model's token ids are from 0 to {most}", field)

    def _piece(self, token_id: int) -> dict[str, Any]:
        """A token as llama.cpp's server writes it: its text, or bytes that are part of one."""
        piece = self._service.token_bytes[token_id].removeprefix(b"\xff")
        try:
            return {"id": token_id, "piece": piece.decode()}
        except UnicodeDecodeError:
            return {"id": token_id, "piece": list(piece)}

    async def _prompt(self, prompt: str | list[int], salt: bytes) -> list[int]:
        if isinstance(prompt, str):
            return await self._service.encode(prompt, salt=salt)
        self._check_ids(prompt, "prompt")
        return prompt

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._service.tokenizer.decode(prompt)

    def _ask(
        self,
        request: Request,
        asked: protocol.Sampling,
        prompts: list[list[int]],
        params: SamplingParams,
        tool_calls: str | None = None,
    ) -> Ask:
        fields = ("regex", "grammar")
        field = next((each for each in fields if getattr(asked, each) is not None), None)
        deadline = None
        if asked.timeout is not None:
            deadline = request.state.read_at + asked.timeout
        return Ask(
            prompts,
            params,
            request.state.salt,
            request.state.adapter,
            field or ("response_format" if tool_calls is None else "tools"),
            tool_calls,
            asked.priority or 0,
            deadline,
            bool(asked.timings_per_token),
        )

    async def _reply(self, asked: protocol.Sampling, ask: Ask, layout: Layout) -> Response:
        try:
            exchange = await self._service.begin(ask)
        except ContextLengthError as error:
            field = "messages" if isinstance(asked, protocol.ChatRequest) else "prompt"
            raise describe(error, field) from error
        return Reply(exchange, layout, stream=bool(asked.stream))
