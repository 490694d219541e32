"""LoRA adapters as models of their own: who is asked, what is shared, and the bits in company."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import InvalidParameterError
from cyclewise.llm import LLM
from cyclewise.options import named_adapters
from cyclewise.serve.server import Settings, load
from tests.models.lora_oracle import write_safetensors
from tests.models.tiny import Tiny, make_tensors, write_file
from tests.serve.test_server import end, start
from tests.serve.toys import WAIT, error_of, events
from tests.text.vocabularies import byte_level


def test_an_adapter_is_a_model(make):
    toy = make(adapters=("sql", "poet"))
    cards = toy.request("GET", "/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("toy", None), ("sql", "toy"), ("poet", "toy"),
    ]  # fmt: skip
    assert toy.request("GET", "/v1/models/poet").json() == cards[2]
    error = error_of(toy.complete(model="other"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'toy' and 'sql' and 'poet'" in error["message"]


def test_who_answers_and_what_is_shared(make):
    toy = make(adapters=("sql", "poet"))
    prompt = "a prompt of several pages"
    found = {}
    for model in ("toy", "sql", "poet", "toy", "sql", "poet"):
        body = toy.complete(prompt, model=model, temperature=0, max_tokens=8).json()
        assert body["model"] == model
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (24 if model in found else 0)
        text = body["choices"][0]["text"]
        assert found.setdefault(model, text) == text
    assert len(set(found.values())) == 3
    chunks = events(toy.complete(prompt, model="sql", temperature=0, max_tokens=8, stream=True))
    assert {chunk["model"] for chunk in chunks} == {"sql"}
    assert toy.chat(model="poet", max_tokens=1).json()["model"] == "poet"
    answer = toy.post("/v1/responses", model="sql", input="hi", max_output_tokens=1)
    assert answer.json()["model"] == "sql"


def test_names():
    assert named_adapters(["a=b=c", "d=e"]) == {"a": "b=c", "d": "e"}
    assert named_adapters(None) == {}
    for bad in (["a"], ["=a"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(InvalidParameterError):
            named_adapters(bad)
    with pytest.raises(InvalidParameterError, match="both called 'tiny'"):
        load("tiny", Settings(adapters={"tiny": "some/where"}))
    with pytest.raises(InvalidParameterError, match="kv"):
        load("tiny", Settings(kv="int4"))


def write_adapter(folder, seed):
    """An adapter of PEFT's for a Tiny's queries and values."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        for name, rows in (("q_proj", 64), ("v_proj", 32)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for half, shape in (("A", (4, 64)), ("B", (rows, 4))):
                values = (rng.standard_normal(shape) * 0.3).astype(np.float32)
                tensors[f"{key}.lora_{half}.weight"] = ("F32", values)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return str(folder)


def test_answers_in_company_are_those_of_the_library(tmp_path):
    metadata = byte_level(eos_token_id=2)
    tiny = Tiny(vocab=len(metadata["tokenizer.ggml.tokens"]), context=256, format="Q8_0")
    path = tmp_path / "tiny.gguf"
    write_file(path, tiny, make_tensors(tiny), metadata)
    adapters = {name: write_adapter(tmp_path / name, i) for i, name in enumerate(("sql", "poet"))}
    options = [part for name, path_ in adapters.items() for part in ("--lora", f"{name}={path_}")]
    process, address = start(path, "--threads", "1", "--kv", "int8", *options)

    def ask(model, seed):
        body = {
            "model": model, "prompt": "hello world " * 5, "seed": seed, "max_tokens": 24,
            "logprobs": 1, "echo": True,
        }  # fmt: skip
        answer = httpx.post(f"{address}/completions", json=body, timeout=WAIT)
        return answer.json()["choices"][0]["logprobs"]["token_logprobs"]

    asked = [(model, seed) for seed in range(3) for model in ("tiny", "sql", "poet")]
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda each: ask(*each), asked))
    finally:
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0
    with LLM(str(path), threads=1, kv="int8", adapters=adapters) as llm:
        for (model, seed), got in zip(asked, found, strict=True):
            params = SamplingParams(
                temperature=1, top_k=0, top_p=1, min_p=0, seed=seed, max_tokens=24, logprobs=1,
                prompt_logprobs=1, adapter=None if model == "tiny" else model,
            )  # fmt: skip
            want = llm.generate("hello world " * 5, params)
            entries = [*want.prompt_logprobs[1:], *want.logprobs]
            assert got == [None, *(entry.logprob for entry in entries)]
    assert len({tuple(each) for each in found}) == 9
