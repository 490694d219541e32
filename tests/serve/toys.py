"""A server around a toy: what its parts are, and a client in the same process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import Future

import httpx
import uvicorn

from cyclewise.engine.engine import Engine
from cyclewise.serve.app import make_app
from cyclewise.serve.server import uvicorn_config
from cyclewise.serve.service import Service
from cyclewise.text.structure import Structures
from tests.engine.toy import ToyModel, ToyTemplate, ToyTokenizer

TEMPLATE = "... <tool_call> ..."
WAIT = 60.0  # seconds until a test is taken for hung


def wait_until(condition):
    """What is cancelled ends before the engine's next step, and not before the next request."""
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class InlinePrompts:
    """Reads prompts at once, in this process."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = []  # chats
        self.texts = []
        self.ready = True
        self.error = None

    def encode(self, text, *, add_special=True):
        self.texts.append(text)
        return self._done(self.tokenizer.encode(text, add_special=add_special))

    def encode_chat(self, messages, **variables):
        self.asked.append((messages, variables))
        return self._done(self.tokenizer.encode_chat(ToyTemplate().render(messages)))

    def _done(self, token_ids):
        if self.error is not None:
            raise self.error
        future = Future()
        future.set_result(token_ids)
        return future

    def close(self):
        pass


class Toy:
    """A service around a toy model, and requests to it."""

    def __init__(
        self,
        *,
        keys=None,
        limits=None,
        template=TEMPLATE,
        app=None,
        adapters=(),
        timeless=True,
        **values,
    ):
        self.model = ToyModel(**{"context": 256, "spare_pages": 128, **values})
        self.tokenizer = ToyTokenizer()
        self.prompts = InlinePrompts(self.tokenizer)
        self.service = Service(
            "toy", Engine(self.model), self.tokenizer, self.prompts,
            template=template, adapters=adapters, timeless=timeless, limits=limits,
            structures=Structures(self.tokenizer, self.model.config.vocab_size),
        )  # fmt: skip
        self.app = make_app(self.service, keys, **(app or {}))

    def request(self, method, path, body=None, *, headers=None, content=None):
        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                given = {} if body is None else {"json": body}
                if content is not None:
                    given = {"content": content}
                    headers_ = {"content-type": "application/json", **(headers or {})}
                else:
                    headers_ = headers
                return await client.request(method, path, headers=headers_, **given)

        return asyncio.run(ask())

    def post(self, path, **fields):
        return self.request("POST", path, {"model": "toy", **fields})

    def chat(self, text="hi", **fields):
        fields.setdefault("messages", [{"role": "user", "content": text}])
        return self.post("/v1/chat/completions", **fields)

    def complete(self, prompt="hi", **fields):
        return self.post("/v1/completions", prompt=prompt, **fields)

    def close(self):
        self.service.close()


class Running:
    """A toy at a real socket, in a thread."""

    def __init__(self, toy, port=0):
        self.toy = toy
        listener = socket.create_server(("127.0.0.1", port))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn_config(toy.app, 30))
        serve = self.server.serve([listener])
        self.thread = threading.Thread(target=asyncio.run, args=(serve,))
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join(WAIT)
        self.toy.close()


def connect(running, receive_buffer=None):
    address = httpx.URL(running.address)
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(WAIT)
    connection.connect((address.host, address.port))
    return connection


def request(path="/v1/completions", **fields):
    body = json.dumps({"model": "toy", "prompt": "hi", **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def events(answer):
    """The chunks of a stream that has come to its end."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error_of(answer, status):
    """The error of an answer, of OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str) and error["message"]
    assert answer.headers["x-request-id"]
    return error
