from __future__ import annotations

import json

import pytest

from cyclewise.serve.protocol import ChatRequest
from cyclewise.serve.tools import Said, ToolCalls, tools_of
from tests.engine.toy import scripted
from tests.serve.test_answers import CHAT
from tests.serve.toys import error_of, events

CITY = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/name"}}, "required": ["city"],
    "additionalProperties": False, "$defs": {"name": {"type": "string", "enum": ["Oslo", 'a"}b']}},
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "Says the time."}}
CHAT_REQUEST = {"messages": [{"role": "user", "content": "hi"}]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "a\\"}b"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def streamed(answer):
    """The message that the chunks of a stream add up to, as OpenAI's client adds them."""
    text, calls, reason = "", [], None
    for chunk in events(answer):
        choice = chunk["choices"][0]
        text += choice["delta"].get("content", "")
        for call in choice["delta"].get("tool_calls", ()):
            if call["index"] == len(calls):
                assert call["id"] and call["type"] == "function"
                calls.append(["", ""])
            assert call["index"] == len(calls) - 1
            calls[-1][0] += call["function"].get("name", "")
            calls[-1][1] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return text, [(name, json.loads(arguments)) for name, arguments in calls], reason


def whole(answer):
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", ())]
    found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return message["content"] or "", found, choice["finish_reason"]


@pytest.mark.parametrize(
    "said, text, calls, reason",
    [
        ("It rains.", "It rains.", [], "stop"),
        ("Let me see: " + CALL, "Let me see: ", [("weather", {"city": 'a"}b'})], "tool_calls"),
        (
            '{"name": "weather", "arguments": {"city": "Oslo"}}',
            "",
            [("weather", {"city": "Oslo"})],
            "tool_calls",
        ),
        ('{"name": "other"}', '{"name": "other"}', [], "stop"),
        ('{"name": "clock"', '{"name": "clock"', [], "stop"),
        (
            f"{CALL}\n{CLOCK_CALL}",
            "",
            [("weather", {"city": 'a"}b'}), ("clock", {})],
            "tool_calls",
        ),
    ],
)
def test_a_model_that_may_call(make, said, text, calls, reason):
    toy = make(logits=scripted(said, CHAT))
    asked = {"tools": [WEATHER, CLOCK], "temperature": 0}
    assert whole(toy.chat(**asked)) == (text, calls, reason)
    assert streamed(toy.chat(**asked, stream=True)) == (text, calls, reason)
    assert toy.prompts.asked[0][1] == {"tools": [WEATHER, CLOCK]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice, names",
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
    ],
)
def test_a_model_that_must_call(make, choice, names, stream):
    toy = make(context=2048)
    for seed in range(4):
        answer = toy.chat(
            tools=[WEATHER, CLOCK], tool_choice=choice, seed=seed, stream=stream,
            parallel_tool_calls=False, logit_bias={"257": 100},
        )  # fmt: skip
        text, calls, reason = (streamed if stream else whole)(answer)
        assert (text, len(calls), reason) == ("", 1, "tool_calls")
        assert calls[0][0] in names
        assert calls[0][1] == {} or calls[0][1]["city"] in ("Oslo", 'a"}b')


def test_none_is_to_be_called(make):
    toy = make(logits=scripted(CALL, CHAT))
    answer = toy.chat(tools=[WEATHER], tool_choice="none", temperature=0)
    assert whole(answer) == (CALL, [], "stop")
    assert toy.prompts.asked[0][1] == {}


def test_calls_or_an_answer_of_a_schema(make):
    toy = make(context=2048)
    answer = toy.chat(tools=[CLOCK], response_format={"type": "json_object"}, max_tokens=40, seed=1)
    text, calls, _ = whole(answer)
    assert text.startswith("{") or calls == [("clock", {})] * len(calls)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [CLOCK], "regex": "a"}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}]},
            "tools[0].function.parameters.type",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {
                    "properties": {"a": {"type": "x"}}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ],
)  # fmt: skip
def test_tools_that_are_wrong(make, fields, param):
    assert error_of(make().chat(**fields), 400)["param"] == param


def test_a_template_without_tools(make):
    toy = make(template="no", context=4096)
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    for before in ([], [{"role": "system", "content": "Be brief."}]):
        toy.chat(messages=before + messages, tools=[CLOCK], max_tokens=1)
        (system, *rest), variables = toy.prompts.asked.pop()
        assert variables == {} and system["role"] == "system"
        assert system["content"].startswith("Be brief." if before else "# Tools")
        assert f"<tools>\n{json.dumps(CLOCK)}\n</tools>" in system["content"]
        assert rest == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": CLOCK_CALL},
            {"role": "user", "content": "<tool_response>\nnoon\n</tool_response>"},
        ]
    toy.chat(messages=messages, max_tokens=1)
    assert toy.prompts.asked.pop()[0] == rest


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_they_come(size):
    text = f"a <b <tool_call>{CALL[11:]}\n{CLOCK_CALL}"
    calls, said = ToolCalls(["weather", "clock"]), []
    for start in range(0, len(text), size):
        said += calls.push(text[start : start + size])
    said += calls.end()
    assert "".join(each.text for each in said) == "a <b "
    assert [each.name for each in said if each.name] == ["weather", "clock"]
    for number, want in enumerate(['{"city": "a\\"}b"}', "{}"]):
        assert "".join(each.arguments for each in said if each.call == number) == want


def test_an_answer_that_is_cut_off():
    calls = ToolCalls(["f"])
    assert calls.push("x <tool_c") == [Said("x ")]
    assert calls.end() == [Said("<tool_c")]
    calls = ToolCalls(["f"])
    assert calls.push('<tool_call>\n{"name": "f", "argu') == []
    assert calls.end() == []


def test_a_function_has_no_arguments_but_its_own(make):
    def arguments(parameters):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        structure = tools_of(ChatRequest(**CHAT_REQUEST, tools=[tool])).structure
        return json.loads(structure)["functions"]["f"]

    one = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert arguments(one) == {**one, "additionalProperties": False}
    assert arguments({"properties": {}}) == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
    for open_one in (
        {"type": "object"},
        {**one, "additionalProperties": True},
        {**one, "patternProperties": {"b": True}},
        {**one, "required": ["b"]},
        {**one, "required": [["a"]]},
    ):
        assert arguments(open_one) == open_one
