from __future__ import annotations

import dataclasses
import gc
import json
import re
import threading
import time

import numpy as np
import pytest

import cyclewise.llm
from cyclewise import LLM, CyclewiseError, Result, SamplingParams
from cyclewise.errors import ContextLengthError, InvalidParameterError, TemplateError
from tests.engine.toy import BOS, END, ToyModel, ToyTemplate, ToyTokenizer, hashed_logits, scripted

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def make(monkeypatch):
    """Make an LLM around a toy."""

    def make_llm(template=False, tokenizer=None, adapters=None, **toy):
        model = ToyModel(**toy)
        tokens = tokenizer or ToyTokenizer()
        monkeypatch.setattr(cyclewise.llm, "_load", lambda *_, **__: (model, tokens))
        llm = LLM("toy", adapters=adapters)
        if template:
            model.metadata["tokenizer.chat_template"] = "toy"
            llm._template = ToyTemplate()
        return llm

    return make_llm


def says(text, prompt):
    return scripted(text, prompt_tokens=1 + len(prompt.encode()))


def test_a_result_and_its_stream(make):
    llm = make(logits=says("grün und blau", "Farben: "))
    pieces = list(llm.stream("Farben: ", GREEDY))
    result = pieces[-1].result
    assert all(piece.result is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == result.text == "grün und blau"
    assert result.token_ids == list("grün und blau".encode())
    assert (result.prompt_tokens, result.reused_tokens, result.generated_tokens) == (9, 0, 14)
    assert result.finish_reason == "stop"
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
    assert result.seconds_to_first_token > 0
    assert llm.generate("Farben: ", GREEDY).text == "grün und blau"
    assert llm.tokenizer.encoded == ["Farben: "] * 2


def test_max_tokens_and_the_end_of_the_context(make):
    llm = make(context=20)
    result = llm.generate("abc", SamplingParams(temperature=0, max_tokens=5))
    assert (result.generated_tokens, result.finish_reason) == (5, "length")
    result = llm.generate("abc", SamplingParams(temperature=0, max_tokens=1))
    assert (result.generated_tokens, result.decode_tokens_per_second) == (1, 0.0)
    result = llm.generate("abc", SamplingParams(temperature=0, max_tokens=None))
    assert result.finish_reason == "length"
    assert result.generated_tokens == 20 - 4 + 1  # the last token needs no place in the cache
    result = llm.generate("x" * 19, GREEDY)
    assert (result.generated_tokens, result.finish_reason) == (1, "length")


def test_a_prompt_longer_than_the_context(make):
    llm = make(context=20)
    before = llm.generate("abc", SamplingParams(seed=1, max_tokens=4))
    for method in (llm.generate, llm.stream):
        with pytest.raises(ContextLengthError, match=r"prompt has 21 tokens.*context holds 20"):
            method("x" * 20, GREEDY)
    again = llm.generate("abc", SamplingParams(seed=1, max_tokens=4))
    assert again.text == before.text
    assert again.reused_tokens == 3  # the refused prompt did no harm to the cache


def test_an_unfinished_character_at_the_end(make):
    llm = make(logits=says("ü", "a"))
    result = llm.generate("a", SamplingParams(temperature=0, max_tokens=1))
    assert result.text == "\N{REPLACEMENT CHARACTER}"


def test_ignore_eos(make):
    llm = make(logits=says("ab", "a"))
    result = llm.generate("a", SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert result.token_ids == [*b"ab", END, END, END]
    assert (result.text, result.finish_reason) == ("ab", "length")


def test_an_empty_prompt(make):
    assert make().generate("", GREEDY).prompt_tokens == 1
    llm = make(tokenizer=ToyTokenizer(add_bos=False))
    assert llm.generate("", GREEDY).prompt_tokens == 1
    assert llm._sequence.token_ids[0] == BOS
    llm = make(tokenizer=ToyTokenizer(bos_id=None, add_bos=False))
    with pytest.raises(InvalidParameterError, match="prompt is empty"):
        llm.generate("", GREEDY)


def test_same_seed_same_text_whatever_was_cached(make):
    params = SamplingParams(seed=5, max_tokens=12, temperature=1.2, repetition_penalty=1.1)
    fresh = make().generate("Hello you", params)
    llm = make(max_batch_tokens=3, page_tokens=5)
    llm.generate("Hello there", SamplingParams(seed=9, max_tokens=20))
    again = llm.generate("Hello you", params)
    assert again.text == fresh.text
    assert again.token_ids == fresh.token_ids
    assert again.reused_tokens == 7
    assert make().generate("Hello you", SamplingParams(seed=6, max_tokens=12)).text != fresh.text


def test_stop_strings(make):
    prompt = "count: "
    for stop, text, reason in [
        (["STOP"], "one two ", "stop_string"),
        (["two S", "xyz"], "one ", "stop_string"),
        (["one"], "", "stop_string"),
        (["STOP now"], "one two STOP three", "stop"),
        (["threex"], "one two STOP three", "stop"),
        (["e"], "on", "stop_string"),
    ]:
        llm = make(logits=says("one two STOP three", prompt))
        pieces = list(llm.stream(prompt, SamplingParams(temperature=0, stop=stop)))
        assert "".join(piece.text for piece in pieces) == pieces[-1].result.text == text
        assert pieces[-1].result.finish_reason == reason


def test_chat_turns_keep_their_cache(make):
    llm = make(template=True, context=200, max_batch_tokens=64)
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=6)
    llm.model.machine.logits = scripted("Hi!", prompt_tokens=10)
    result = llm.chat(messages, params)
    assert isinstance(result, Result)
    assert (result.text, result.prompt_tokens) == ("Hi!", 10)
    messages += [
        {"role": "assistant", "content": result.text},
        {"role": "user", "content": "More"},
    ]
    llm.model.machine.logits = scripted("Yes.", prompt_tokens=23)
    *_, last = llm.chat(messages, params, stream=True)
    assert last.result.text == "Yes."
    assert last.result.prompt_tokens == 23
    assert last.result.reused_tokens == 13  # all but the end of the answer and what follows


def test_chat_without_a_template(make):
    llm = make()
    assert not llm.has_chat_template
    with pytest.raises(TemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    "messages", [[], "Hello", {"role": "user"}, ["Hello"], [{"content": "x"}], [{"role": 1}]]
)
def test_messages_that_are_none(make, messages):
    with pytest.raises(InvalidParameterError, match="messages"):
        make(template=True).chat(messages)


def test_calls_of_many_threads_queue(make):
    llm = make(context=64)
    prompts = [f"prompt {i}" for i in range(6)]
    params = SamplingParams(seed=3, max_tokens=10)
    want = [make(context=64).generate(prompt, params).text for prompt in prompts]
    busy = []

    def watch():
        assert not busy, "two threads are inside the machine"
        busy.append(1)
        time.sleep(0.0005)
        busy.pop()

    llm.model.machine.before_step = watch
    got: dict[int, str] = {}

    def call(i):
        if i % 2:
            got[i] = llm.generate(prompts[i], params).text
        else:
            got[i] = "".join(piece.text for piece in llm.stream(prompts[i], params))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert [got[i] for i in range(6)] == want


def test_a_stream_that_is_dropped_frees_the_queue(make):
    llm = make(context=64)
    stream = llm.stream("abc", GREEDY)
    next(stream)
    del stream
    gc.collect()
    assert llm.generate("abc", SamplingParams(temperature=0, max_tokens=3)).generated_tokens == 3
    stream = llm.stream("abc", GREEDY)
    next(stream)
    stream.close()
    assert llm.generate("abc", SamplingParams(temperature=0, max_tokens=3)).generated_tokens == 3


def test_a_call_inside_a_stream_is_an_error_and_no_deadlock(make):
    llm = make(context=64)
    stream = llm.stream("abc", SamplingParams(temperature=0, max_tokens=4))
    next(stream)
    with pytest.raises(CyclewiseError, match="stream that has not ended"):
        llm.generate("abc", GREEDY)
    # the stream is none the worse, and with its last piece the queue is free
    for piece in stream:
        if piece.result is not None:
            assert llm.generate("abc", SamplingParams(temperature=0, max_tokens=2)).text
    assert piece.result.generated_tokens == 4


def test_a_waiting_thread_gets_its_turn(make):
    llm = make(context=64)
    stream = llm.stream("abc", SamplingParams(temperature=0, max_tokens=4))
    next(stream)
    done = []
    thread = threading.Thread(target=lambda: done.append(llm.generate("abc", GREEDY)))
    thread.start()
    time.sleep(0.02)
    assert not done
    list(stream)
    thread.join(timeout=10)
    assert len(done) == 1


def test_an_error_inside_frees_the_queue(make):
    llm = make(context=64)

    def fail():
        raise OSError("broken")

    llm.model.machine.before_step = fail
    with pytest.raises(OSError, match="broken"):
        llm.generate("abc")
    llm.model.machine.before_step = lambda: None
    assert llm.generate("abc", GREEDY).text


def test_close(make):
    with make() as llm:
        llm.generate("abc", GREEDY)
        early = llm.stream("abc", GREEDY)
    assert llm.model.closed
    llm.close()
    for call in (
        lambda: llm.generate("abc"),
        lambda: llm.stream("abc"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: next(early),
    ):
        with pytest.raises(CyclewiseError, match="closed"):
            call()


def test_close_while_a_stream_of_this_thread_is_open(make):
    llm = make()
    stream = llm.stream("abc", GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(CyclewiseError, match="closed while a stream"):
        next(stream)
    llm.close()


@pytest.mark.parametrize(
    "arguments",
    [{"context": 0}, {"context": "4k"}, {"threads": 0}, {"threads": True}, {"kv": "q8"}],
)
def test_bad_arguments(arguments):
    with pytest.raises(InvalidParameterError, match=next(iter(arguments))):
        LLM("toy", **arguments)
    with pytest.raises(InvalidParameterError, match="model must be"):
        LLM(3)


def test_a_prompt_that_is_no_string(make):
    with pytest.raises(InvalidParameterError, match="prompt must be a string"):
        make().generate(["abc"])


def test_stop_token_ids(make):
    llm = make(logits=says("one two", "a"))
    params = SamplingParams(temperature=0, stop_token_ids=[ord("t"), 7], ignore_eos=True)
    result = llm.generate("a", params)
    assert (result.text, result.finish_reason) == ("one ", "stop")
    with pytest.raises(InvalidParameterError, match="stop_token_ids names token 260"):
        llm.generate("a", SamplingParams(stop_token_ids=[260]))


def test_logprobs(make):
    llm = make(context=40)
    params = SamplingParams(seed=1, max_tokens=6, temperature=2, logprobs=3, logit_bias={65: 5})
    result = llm.generate("abc", params)
    assert len(result.logprobs) == 6
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    before = [BOS, *b"abc"]
    for entry in result.logprobs:
        row = hashed_logits(before)  # as the model gave it
        log_total = np.logaddexp.reduce(row.astype(np.float64))
        assert entry.logprob == pytest.approx(row[entry.token_id] - log_total, abs=1e-4)
        assert [t.token_id for t in entry.top] == np.argsort(-row)[:3].tolist()
        assert entry.top[0].logprob == pytest.approx(row.max() - log_total, abs=1e-4)
        assert entry.text == llm.tokenizer.show(entry.token_id)
        before.append(entry.token_id)
    assert result.prompt_logprobs is None
    plain = llm.generate("abc", SamplingParams(max_tokens=2, logprobs=0))
    assert [entry.top for entry in plain.logprobs] == [[], []]
    assert llm.generate("abc", SamplingParams(max_tokens=2)).logprobs is None


def test_logprobs_of_a_prompt(make):
    llm = make(context=40)
    params = SamplingParams(seed=1, max_tokens=3)
    want = llm.generate("Hello", params)
    result = llm.generate("Hello", dataclasses.replace(params, prompt_logprobs=1))
    assert result.token_ids == want.token_ids
    assert result.reused_tokens == 0
    assert result.prompt_logprobs[0] is None
    assert [entry.text for entry in result.prompt_logprobs[1:]] == list("Hello")
    row = hashed_logits([BOS, *b"Hel"]).astype(np.float64)
    entry = result.prompt_logprobs[4]
    assert entry.logprob == pytest.approx(row[ord("l")] - np.logaddexp.reduce(row), abs=1e-4)
    assert entry.top[0].token_id == int(row.argmax())


def test_several_answers_are_those_of_seeds_alone(make):
    llm = make(context=64, spare_pages=64)
    params = SamplingParams(seed=5, n=4, max_tokens=9, temperature=1.5, presence_penalty=1)
    pieces = list(llm.stream("Hello", params))
    result = pieces[-1].result
    alone = [
        make(context=64).generate("Hello", dataclasses.replace(params, n=1, seed=5 + i))
        for i in range(4)
    ]
    assert [choice.text for choice in result.choices] == [each.text for each in alone]
    assert [choice.token_ids for choice in result.choices] == [each.token_ids for each in alone]
    for i in range(4):
        assert "".join(piece.text for piece in pieces if piece.index == i) == alone[i].text
    assert result.text == alone[0].text
    assert result.generated_tokens == 36
    assert len(set(map(tuple, (choice.token_ids for choice in result.choices)))) == 4
    # the pages of the others are given back
    again = llm.generate("Hello", dataclasses.replace(params, n=1))
    assert again.text == alone[0].text
    assert again.reused_tokens == 5


def test_answers_end_each_by_itself(make):
    def logits(token_ids):
        row = np.zeros(260, dtype=np.float32)
        row[[*b"ab"]] = 20
        if len(token_ids) > 8 or token_ids[-1] == ord("b"):
            row[END] = 60
        return row

    llm = make(context=64, spare_pages=64, logits=logits)
    result = llm.generate("x", SamplingParams(seed=2, n=6, temperature=1, stop="aaa"))
    texts = [choice.text for choice in result.choices]
    assert len(set(texts)) > 1
    for choice in result.choices:
        if choice.finish_reason == "stop":
            assert choice.text.endswith("b")
        else:
            assert (choice.finish_reason, bytes(choice.token_ids[-3:])) == ("stop_string", b"aaa")
    assert [
        c.text
        for c in llm.generate("x", SamplingParams(seed=2, n=6, temperature=1, stop="aaa")).choices
    ] == texts


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_structured_answers(make, temperature):
    llm = make(context=200, spare_pages=200, max_batch_tokens=64)
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [True, None]}, "b": {"type": "array", "maxItems": 2}},
        "required": ["b", "a"],
        "additionalProperties": False,
    }
    params = SamplingParams(temperature=temperature, seed=3, n=3, json_schema=schema)
    result = llm.generate("abc", params)
    alone = make(context=200).generate("abc", dataclasses.replace(params, n=1, seed=5))
    assert result.choices[2].text == alone.text
    for choice in result.choices:
        if choice.finish_reason == "stop":
            assert json.loads(choice.text).keys() == {"a", "b"}
        else:
            assert choice.finish_reason == "length"
    result = llm.generate("abc", dataclasses.replace(params, json_schema=None, regex="[0-9]{3,5} "))
    assert all(re.fullmatch("[0-9]{3,5} ", choice.text) for choice in result.choices)
    assert {choice.finish_reason for choice in result.choices} == {"stop"}


def test_a_structure_that_cannot_be_followed(make):
    llm = make(context=200)
    with pytest.raises(InvalidParameterError, match="`uniqueItems`"):
        llm.stream("abc", SamplingParams(json_schema={"uniqueItems": True}))
    assert llm.generate("abc", SamplingParams(seed=1, regex="x{9}")).text == "x" * 9


def test_guesses_within_a_structure(make):
    llm = make(context=200, max_batch_tokens=64, logits=lambda _: np.zeros(260, dtype=np.float32))
    params = SamplingParams(temperature=0, regex="(one two three ){5}")
    result = llm.generate("one two three one two three ", params)
    assert result.text == "one two three " * 5
    plain = make(context=200, logits=lambda _: np.zeros(260, dtype=np.float32))
    plain.speculate = False
    assert plain.generate("one two three one two three ", params).token_ids == result.token_ids


ADAPTERS = {"pirate": "there", "poet": "here"}


def test_an_adapter_is_chosen_by_each_request(make):
    """What another one computed is not used again."""
    want = {}
    for name in (None, "pirate", "poet"):
        fresh = make(adapters=ADAPTERS, context=64)
        want[name] = fresh.generate("abc", SamplingParams(seed=1, max_tokens=9, adapter=name)).text
    assert len(set(want.values())) == 3
    llm, before = make(adapters=ADAPTERS, context=64), "none"
    for name in (None, "pirate", "pirate", "poet", None, None, "poet"):
        result = llm.generate("abc", SamplingParams(seed=1, max_tokens=9, adapter=name))
        assert result.text == want[name]
        assert result.reused_tokens == (3 if name == before else 0)
        before = name


def test_several_answers_of_an_adapter(make):
    llm = make(adapters=ADAPTERS, context=64, spare_pages=64)
    params = SamplingParams(seed=5, n=3, max_tokens=9, adapter="poet")
    texts = [choice.text for choice in llm.generate("abc", params).choices]
    for i, text in enumerate(texts):
        alone = make(adapters=ADAPTERS, context=64)
        assert alone.generate("abc", dataclasses.replace(params, seed=5 + i, n=1)).text == text


def test_the_prompt_of_an_adapter_is_scored_with_it(make):
    llm = make(adapters=ADAPTERS, context=64)
    scores = [
        llm.generate("abc", SamplingParams(prompt_logprobs=0, adapter=name)).prompt_logprobs[-1]
        for name in (None, "poet", None)
    ]
    assert scores[0] == scores[2] != scores[1]


def test_an_unknown_adapter(make):
    llm = make(adapters=ADAPTERS)
    with pytest.raises(InvalidParameterError, match=r"called 'piratte': did you mean 'pirate'\?"):
        llm.generate("abc", SamplingParams(adapter="piratte"))
    with pytest.raises(InvalidParameterError, match="called 'xyz': known are pirate, poet;"):
        llm.stream("abc", SamplingParams(adapter="xyz"))
    with pytest.raises(InvalidParameterError, match="called 'poet': there are none;"):
        make().generate("abc", SamplingParams(adapter="poet"))


@pytest.mark.parametrize("adapters", [["x"], {"x": 1}, {"": "x"}, {1: "x"}, "x"])
def test_adapters_that_are_none(make, adapters):
    with pytest.raises(InvalidParameterError, match=r"adapters must be like \{name: path\}"):
        make(adapters=adapters)


def test_a_models_own_defaults(make):
    llm = make()
    greedy = llm.generate("abc", SamplingParams(temperature=0, max_tokens=20)).text
    llm.model.metadata["general.sampling.temp"] = 0.0
    assert llm.generate("abc", SamplingParams(max_tokens=20)).text == greedy
    warm = SamplingParams(temperature=0.8, max_tokens=20, seed=1)
    assert llm.generate("abc", warm).text == make().generate("abc", warm).text != greedy
