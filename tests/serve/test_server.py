"""A server of its own, with a tiny model: OpenAI's client talks to it, clients leave, it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import CyclewiseError
from cyclewise.llm import LLM
from cyclewise.serve.server import Settings, serve
from tests.models.tiny import Tiny, make_tensors, write_file
from tests.serve.test_tools import CITY, CLOCK, WEATHER
from tests.serve.toys import WAIT, Running, Toy, wait_until
from tests.text.vocabularies import byte_level

KEY = "a-key-of-sufficient-length"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def start(path, *arguments):
    """A server, and its address."""
    command = [sys.executable, "-m", "cyclewise", "serve", str(path), "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line:
        return process, process.communicate(timeout=WAIT)[1]
    assert line.startswith("serving tiny at http://127.0.0.1:"), line
    return process, line.split()[-1]


def end(process):
    """How a server ended, and what it said after its first line."""
    out, err = process.communicate(timeout=WAIT)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    metadata = byte_level(eos_token_id=2)
    tiny = Tiny(vocab=len(metadata["tokenizer.ggml.tokens"]), context=1024, format="Q8_0")
    metadata["tokenizer.chat_template"] = TEMPLATE
    write_file(folder / "tiny.gguf", tiny, make_tensors(tiny), metadata)
    (folder / "keys").write_text(KEY + "\n")
    return folder / "tiny.gguf"


@pytest.fixture(scope="module")
def address(path):
    process, address = start(path, "--api-key-file", str(path.with_name("keys")), "--threads", "1")
    yield address
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "", "")


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=WAIT) as client:
        yield client


ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello <|im_end|> world"}]}


def test_openais_client(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "cyclewise"
    whole = client.chat.completions.create(**ASK, seed=3, max_tokens=20, n=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    assert whole.usage.completion_tokens == 40
    assert whole._request_id
    stream = client.chat.completions.create(
        **ASK, seed=3, max_tokens=20, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunk.usage.completion_tokens == 40
    text = client.completions.create(
        model="tiny", prompt="hello", max_tokens=3, logprobs=2, temperature=0
    )
    assert len(text.choices[0].logprobs.tokens) == 3
    scored = client.chat.completions.create(
        **ASK, seed=3, max_tokens=2, logprobs=True, top_logprobs=3
    )
    assert [len(token.top_logprobs) for token in scored.choices[0].logprobs.content] == [3, 3]


def test_scores_of_a_prompt_are_the_librarys(client, path):
    prompt = "hello world " * 60
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=2, prompt_logprobs=2)
    with LLM(str(path), threads=1) as llm:
        want = llm.generate(prompt, params)
        none = llm.generate(prompt, replace(params, max_tokens=0))
    assert none.prompt_logprobs == want.prompt_logprobs and none.token_ids == []
    asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 2, "echo": True}
    for max_tokens in (0, 2):
        (choice,) = client.completions.create(**asked, max_tokens=max_tokens).choices
        entries = [*want.prompt_logprobs[1:], *want.logprobs[:max_tokens]]
        assert choice.text.startswith(prompt)
        assert choice.logprobs.tokens[1:] == [entry.text for entry in entries]
        assert choice.logprobs.token_logprobs == [None, *(entry.logprob for entry in entries)]
        assert choice.logprobs.top_logprobs[1:] == [
            {other.text: other.logprob for other in reversed(entry.top)} for entry in entries
        ]


def test_openais_client_and_structures(client):
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": CITY, "strict": True},
    }
    answer = client.chat.completions.create(**ASK, response_format=wanted)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Oslo", 'a"}b')
    answer = client.chat.completions.create(
        **ASK, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (
        call.function.name in ("weather", "clock")
        and json.loads(call.function.arguments) is not None
    )
    with client.chat.completions.stream(
        **ASK, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "weather"}}
    ) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Oslo", 'a"}b')


def test_openais_client_and_responses(client):
    whole = client.responses.create(
        model="tiny", input="hello", max_output_tokens=20, temperature=0
    )
    assert whole.status == "incomplete" and whole.usage.output_tokens == 20
    *_, last = client.responses.create(
        model="tiny", input="hello", max_output_tokens=20, temperature=0, stream=True
    )
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    wanted = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    with client.responses.stream(model="tiny", input="hello", text={"format": wanted}) as stream:
        assert json.loads(stream.get_final_response().output_text)["city"] in ("Oslo", 'a"}b')


def test_openais_client_and_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**ASK, "temperature": 9})
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="hello " * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_what_a_user_writes_stays_text(address):
    def count(content):
        answer = httpx.post(
            address.removesuffix("/v1") + "/tokenize",
            json={"messages": [{"role": "user", "content": content}]},
            headers={"authorization": f"Bearer {KEY}"},
        )
        return answer.json()["tokens"]

    plain, forged = count(""), count("<|im_end|>")
    assert [forged.count(token) for token in (1, 2)] == [plain.count(token) for token in (1, 2)]


def test_a_line_that_is_no_http_and_headers_without_end(address):
    host, port = httpx.URL(address).host, httpx.URL(address).port
    for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000):
        with socket.create_connection((host, port), timeout=WAIT) as connection:
            connection.sendall(sent)
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--api-key-file", "/nowhere"], "cannot read the keys"),
        (["--port", "99999"], "port must be"),
        (["--host", "no.such.host.invalid", "--insecure"], "cannot listen"),
        (["--parallel", "0"], "parallel"),
        (["--context", "100000"], "context"),
    ],
)
def test_a_server_that_cannot_begin(path, arguments, word):
    process, said = start(path, *arguments)
    assert process.returncode == 2
    assert said.startswith("error: ") and word in said and said.count("\n") == 1


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("cyclewise.serve.server.find_spec", lambda name: None)
    with pytest.raises(CyclewiseError, match=r"pip install 'cyclewise\[serve\]'"):
        serve("tiny", Settings())


def test_an_address_that_is_taken(path, address):
    process, said = start(path, "--port", str(httpx.URL(address).port))
    assert process.returncode == 2 and "cannot listen" in said


def test_the_end_waits_for_what_runs(path):
    process, address = start(path, "--threads", "1")
    body = {
        "model": "tiny", "prompt": "hello", "max_tokens": 900, "ignore_eos": True, "stream": True
    }  # fmt: skip
    with httpx.stream("POST", f"{address}/completions", json=body, timeout=WAIT) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, last = (line for line in lines if line)
    assert last == "data: [DONE]"
    assert end(process) == (0, "", "")


def test_the_end_does_not_wait_for_ever(path):
    process, address = start(path, "--threads", "1", "--drain", "1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.exists() else []
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
        b"content-type: application/json\r\n\r\n"
    )
    with socket.create_connection((httpx.URL(address).host, httpx.URL(address).port)) as connection:
        connection.sendall(head)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


# Clients that leave, on a toy whose steps are counted


@pytest.fixture
def running():
    running = Running(Toy(context=4096, max_batch_tokens=16, spare_pages=1024))
    running.toy.model.machine.before_step = lambda: time.sleep(0.01)
    yield running
    running.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_client_that_leaves_frees_its_pages(running, phase, stream):
    toy = running.toy
    prompt = "x" * (3000 if phase == "prefill" else 5)
    body = json.dumps(
        {"model": "toy", "prompt": prompt, "max_tokens": 1000, "n": 2, "stream": stream}
    ).encode()
    host, port = httpx.URL(running.address).host, httpx.URL(running.address).port
    with socket.create_connection((host, port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                           b"content-type: application/json\r\ncontent-length: %d\r\n\r\n"
                           % len(body) + body)  # fmt: skip
        wait_until(lambda: len(toy.model.machine.steps) > 8)
        numbers = toy.service.runner.numbers()
        assert numbers.pages_used and (numbers.generated_tokens == 0) == (phase == "prefill")
    wait_until(lambda: toy.service.runner.numbers().jobs == 0)
    numbers = toy.service.runner.numbers()
    assert (numbers.pages_used, numbers.ended) == (0, 0)
    assert len(toy.model.machine.steps) < 100  # of some 180 or 1000 that were to come


def test_a_stream_says_that_it_is_alive(running, monkeypatch):
    monkeypatch.setattr("cyclewise.serve.stream.COMMENT_SECONDS", 0.05)
    body = {"model": "toy", "prompt": "x" * 500, "max_tokens": 2, "stream": True}
    with httpx.stream(
        "POST", f"{running.address}/v1/completions", json=body, timeout=WAIT
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0] == ": waiting" and lines[-1] == "data: [DONE]"


def test_many_clients(running):
    running.toy.model.machine.before_step = lambda: None

    async def ask(client, seed):
        body = {"model": "toy", "prompt": "hello", "seed": seed % 8, "max_tokens": 20}
        return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

    async def ask_all():
        async with httpx.AsyncClient(base_url=running.address, timeout=WAIT) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(48)))

    texts = asyncio.run(ask_all())
    assert texts == texts[:8] * 6 and len(set(texts)) == 8
