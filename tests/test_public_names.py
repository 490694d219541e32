"""The public names, pinned: a change here is a change for every user."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import cyclewise
from cyclewise.llm import Choice, Logprob, TokenLogprob


def test_names():
    assert cyclewise.__all__ == [
        "LLM",
        "CyclewiseError",
        "Piece",
        "Result",
        "SamplingParams",
        "__version__",
    ]
    assert dir(cyclewise) == sorted(cyclewise.__all__)
    for name in cyclewise.__all__:
        assert getattr(cyclewise, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = cyclewise.LMM


def test_fields():
    def names(kind):
        return [field.name for field in dataclasses.fields(kind)]

    assert names(cyclewise.Piece) == ["text", "result", "index"]
    assert names(cyclewise.Result) == [
        "text",
        "token_ids",
        "prompt_tokens",
        "reused_tokens",
        "generated_tokens",
        "seconds_to_first_token",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "guessed_tokens",
        "accepted_tokens",
        "finish_reason",
        "logprobs",
        "prompt_logprobs",
        "choices",
    ]
    assert names(Choice) == ["text", "token_ids", "finish_reason", "logprobs"]
    assert names(TokenLogprob) == ["token_id", "text", "logprob", "top"]
    assert names(Logprob) == ["token_id", "text", "logprob"]
    assert names(cyclewise.SamplingParams) == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "n",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "json_schema",
        "regex",
        "grammar",
        "logprobs",
        "prompt_logprobs",
        "adapter",
    ]


def test_methods_of_llm():
    public = {
        name: str(inspect.signature(value)) if inspect.isfunction(value) else "property"
        for name, value in vars(cyclewise.LLM).items()
        if not name.startswith("_")
    }
    assert list(public) == ["context", "has_chat_template", "generate", "stream", "chat", "close"]
    parameters = inspect.signature(cyclewise.LLM).parameters
    assert list(parameters) == [
        "model", "context", "threads", "kv", "speculate", "draft", "adapters", "quantize",
    ]  # fmt: skip
    assert parameters["model"].default == "smollm2"


def test_importing_the_package_is_light():
    heavy = ["numpy", "llvmlite", "tokenizers", "huggingface_hub", "jinja2", "rich", "typer"]
    code = f"import cyclewise, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
