from __future__ import annotations

import json

import pytest

from tests.engine.toy import scripted
from tests.serve.test_answers import CHAT
from tests.serve.test_tools import CALL, CITY
from tests.serve.toys import error_of

WEATHER = {"type": "function", "name": "weather", "parameters": CITY}


def test_a_response(make):
    toy = make(logits=scripted("grün.", CHAT))
    body = toy.post("/v1/responses", input="hi", temperature=0).json()
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    (part,) = item["content"]
    assert (part["type"], part["text"]) == ("output_text", "grün.")
    assert (body["object"], body["status"], body["store"]) == ("response", "completed", False)
    assert body["temperature"] == 0 and body["error"] is None
    assert body["usage"]["input_tokens"] == CHAT and body["usage"]["output_tokens"] == 6
    cut = toy.post("/v1/responses", input="hi", temperature=0, max_output_tokens=2).json()
    assert cut["status"] == cut["output"][0]["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}


def test_the_events_of_a_response(make):
    toy = make(logits=scripted("Hm. " + CALL, CHAT))
    answer = toy.post("/v1/responses", input="hi", temperature=0, tools=[WEATHER], stream=True)
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    found = []
    for lines in answer.text.strip().split("\n\n"):
        name, data = lines.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert list(dict.fromkeys(kinds)) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    text = "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta")
    assert text == "Hm. "
    message, call = found[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Hm. "
    assert (call["type"], call["name"]) == ("function_call", "weather")
    assert json.loads(call["arguments"]) == {"city": 'a"}b'}
    whole = toy.post("/v1/responses", input="hi", temperature=0, tools=[WEATHER]).json()
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]


def test_items_and_formats(make):
    toy = make(context=2048)
    answer = toy.post(
        "/v1/responses",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "Hm.", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "weather",
             "arguments": '{"city": "Oslo"}', "status": "completed"},
            {"type": "function_call_output", "call_id": "1", "output": "rain"},
        ],
        text={"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["output"][0]["content"][0]["text"])["city"]
    assert toy.prompts.asked[0][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hm.", "tool_calls": [
            {"id": "1", "type": "function",
             "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call"}]}, "input[0]"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "store": True}, "store"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "x" * 300}, "input"),
        ({}, "input"),
    ],
)  # fmt: skip
def test_what_is_refused(make, fields, param):
    assert error_of(make().post("/v1/responses", **fields), 400)["param"] == param
