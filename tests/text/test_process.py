from __future__ import annotations

import os
import signal

import gguf
import pytest

from cyclewise.errors import CyclewiseError, EngineError, OverloadedError, TemplateError
from cyclewise.text.chat import ChatTemplate
from cyclewise.text.process import TextProcess
from cyclewise.text.tokenizer import Tokenizer
from tests.models.tiny import add_metadata
from tests.text.vocabularies import byte_level

WAIT = 60.0  # seconds until a test is taken for hung
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if tools %}{{ raise_exception('no tools') }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hello <|im_end|> w\ud83d\ude00rld"}]


def write(path, template):
    metadata = byte_level(eos_token_id=2)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        add_metadata(writer, name, value)
    if template:
        metadata["tokenizer.chat_template"] = template
        writer.add_string("tokenizer.chat_template", template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return metadata


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "model.gguf"
    return path, write(path, CHAT)


@pytest.fixture(scope="module")
def process(model):
    process = TextProcess(model[0], max_pending=3)
    yield process
    process.close()


def test_the_ids_are_those_of_this_process(model, process):
    tokenizer = Tokenizer.from_metadata(model[1])
    for text in ("hello world", "", "x\ud800 <|im_end|>", "hello " * 50_000):
        assert process.encode(text).result(WAIT) == tokenizer.encode(text)
    template = ChatTemplate.for_model(model[1], tokenizer)
    want = tokenizer.encode_chat(template.render(MESSAGES))
    assert process.encode_chat(MESSAGES).result(WAIT) == want


def test_errors_are_what_they_were(process):
    with pytest.raises(TemplateError, match="no tools"):
        process.encode_chat(MESSAGES, tools=[{}]).result(WAIT)
    with pytest.raises(EngineError, match="TypeError"):
        process.encode(7).result(WAIT)  # type: ignore[arg-type]
    with pytest.raises(CyclewiseError, match="no JSON"):
        process.encode_chat([{"role": b"user"}]).result(WAIT)


def test_too_many(process):
    os.kill(process._child._process.pid, signal.SIGSTOP)
    asked = [process.encode("hello " * 10_000) for _ in range(3)]  # more than a pipe holds
    with pytest.raises(OverloadedError, match="3 prompts wait"):
        process.encode("hello")
    assert asked[1].cancel()
    os.kill(process._child._process.pid, signal.SIGCONT)
    assert asked[0].result(WAIT) == asked[2].result(WAIT)
    assert process.encode("hello").result(WAIT)


def test_a_child_that_dies_is_replaced(process):
    child = process._child
    os.kill(child._process.pid, signal.SIGSTOP)
    asked = process.encode("hello")
    os.kill(child._process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="has ended"):
        asked.result(WAIT)
    child._reader.join(WAIT)
    assert process.encode("hello").result(WAIT)
    assert process._child is not child


def test_close(model, tmp_path):
    process = TextProcess(model[0])
    os.kill(process._child._process.pid, signal.SIGSTOP)
    asked = process.encode("hello")
    os.kill(process._child._process.pid, signal.SIGCONT)
    process.close()
    assert asked.done()
    assert process._child._process.returncode == 0
    with pytest.raises(EngineError, match="closed"):
        process.encode("hello")


def test_close_does_not_wait_for_one_that_hangs(model, monkeypatch):
    monkeypatch.setattr("cyclewise.text.process._CLOSE_SECONDS", 0.1)
    process = TextProcess(model[0])
    os.kill(process._child._process.pid, signal.SIGSTOP)
    asked = [process.encode("hello " * 50_000) for _ in range(2)]
    process.close()
    for future in asked:
        with pytest.raises(EngineError, match="has ended"):
            future.result(WAIT)


def test_a_file_that_cannot_be_read(tmp_path, capfd):
    process = TextProcess(tmp_path / "missing.gguf")
    with pytest.raises(EngineError, match="has ended"):
        process.encode("hello").result(WAIT)
    process.close()
    assert "missing.gguf" in capfd.readouterr().err
