"""Anthropic's API over a real socket, driven by Anthropic's own client; the ranks' answers are scripted."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from gateways import DEADLINE, RunningGateway
from scripted_answers import CITY, TEXT, THOUGHT_AND_CALLS, Script, calls

from m3dist.gateway.ranks import RequestFailed
from m3dist.gateway.schemas_anthropic import MessageAnswer, TokenCount

WEATHER: Any = {"name": "weather", "description": "of a city", "input_schema": CITY}
HI: Any = [{"role": "user", "content": "hi"}]
ASK: Any = {"model": "tiny", "max_tokens": 300, "messages": HI}
ADAPTIVE: Any = {"type": "adaptive"}


@pytest.fixture(scope="module")
def client(gateway: RunningGateway, script: Script) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0, timeout=DEADLINE) as connected:
        yield connected


def test_a_message_has_thinking_text_and_tool_use(client: anthropic.Anthropic, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    message = client.messages.create(**ASK, tools=[WEATHER], thinking=ADAPTIVE)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = message.content
    assert thinking.type == "thinking" and (thinking.thinking, thinking.signature) == ("hm, ü", "")
    assert text.type == "text" and text.text == "Let me see."
    assert first.type == "tool_use" and first.name == "weather" and first.input == {"city": "Paris", "days": 3}
    assert second.type == "tool_use" and second.input == {"city": "Rome"}
    assert first.id.startswith("toolu_") and first.id != second.id
    assert message.stop_reason == "tool_use" and message.stop_sequence is None
    prompt, usage = len(script.asked().prompt), message.usage
    assert usage.cache_read_input_tokens == prompt // 2
    assert (
        usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0) == prompt
    )
    assert usage.output_tokens == len(TEXT.encode(THOUGHT_AND_CALLS))


def test_a_streamed_message_is_the_whole_one(client: anthropic.Anthropic, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    whole = client.messages.create(**ASK, tools=[WEATHER], thinking=ADAPTIVE)
    with client.messages.stream(**ASK, tools=[WEATHER], thinking=ADAPTIVE) as stream:
        events = list(stream)
        streamed = stream.get_final_message()
    assert "".join(event.thinking for event in events if event.type == "thinking") == "hm, ü"
    assert "".join(event.text for event in events if event.type == "text") == "Let me see."
    assert streamed.usage == whole.usage and streamed.stop_reason == whole.stop_reason
    for one, other in zip(streamed.content, whole.content, strict=True):
        left, right = one.to_dict(), other.to_dict()
        assert {**left, "id": 0, "parsed_output": 0} == {**right, "id": 0, "parsed_output": 0}


def test_events_come_in_their_order(client: anthropic.Anthropic, script: Script) -> None:
    script.says("</mm:think>A" + calls({"city": "Oslo"}))
    events = list(client.messages.create(**ASK, tools=[WEATHER], stream=True))
    kinds = [event.type for event in events]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    started = events[0]
    assert started.type == "message_start"
    assert (started.message.usage.cache_read_input_tokens or 0) == len(script.asked().prompt) // 2


def test_tools_are_called_and_answered(client: anthropic.Anthropic, script: Script) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather?"}]
    script.says(THOUGHT_AND_CALLS)
    asked: Any = {"model": "tiny", "max_tokens": 300, "tools": [WEATHER], "thinking": ADAPTIVE, "system": "Be brief."}
    first = client.messages.create(**asked, messages=messages)
    uses = [block for block in first.content if block.type == "tool_use"]
    results: list[Any] = [{"type": "tool_result", "tool_use_id": use.id, "content": use.input["city"]} for use in uses]
    results[1] |= {"content": None, "is_error": True}
    messages += [{"role": "assistant", "content": first.content}]
    messages += [{"role": "user", "content": [*reversed(results), {"type": "text", "text": "Go on."}]}]
    script.says("</mm:think>Rain.")
    second = client.messages.create(**asked, messages=messages)
    assert second.content[0].type == "text" and second.content[0].text == "Rain."
    assert second.stop_reason == "end_turn"
    prompt = script.prompt()
    assert f"]~b]ai\n{THOUGHT_AND_CALLS}[e~[" in prompt
    assert "<response>Paris</response>\n<response>error</response>[e~[\n]~b]user\nGo on." in prompt
    assert "]~b]developer\nBe brief." in prompt


def test_a_long_conversation_keeps_every_turn(client: anthropic.Anthropic, script: Script) -> None:
    messages: list[Any] = []
    for turn in range(20):
        messages.append({"role": "user", "content": f"question {turn}"})
        script.says(f"answer {turn}")
        answer = client.messages.create(model="tiny", max_tokens=50, messages=messages)
        messages.append({"role": "assistant", "content": answer.content})
    assert list(script.asked().prompt) == TEXT.prompt_ids(
        [
            {"role": message["role"], "content": f"{kind} {i // 2}"}
            for i, (message, kind) in enumerate(zip(messages[:-1], ("question", "answer") * 20, strict=False))
        ],
        "disabled",
    )


@pytest.mark.parametrize(
    ("thinking", "end"),
    [
        ({}, "]~b]ai\n</mm:think>"),
        ({"thinking": {"type": "disabled"}}, "]~b]ai\n</mm:think>"),
        ({"thinking": {"type": "adaptive"}}, "]~b]ai\n"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "]~b]ai\n<mm:think>"),
    ],
)
def test_thinking_is_asked_for(client: anthropic.Anthropic, script: Script, thinking: Any, end: str) -> None:
    script.says("x")
    message = client.messages.create(**ASK, **thinking)
    assert script.prompt().endswith(end)
    assert message.content[0].type == ("thinking" if end.endswith("<mm:think>") else "text")


def test_why_a_message_ends(client: anthropic.Anthropic, script: Script) -> None:
    script.says("one two three")
    message = client.messages.create(**ASK, stop_sequences=["never", "two"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "two")
    assert message.content[0].type == "text" and message.content[0].text == "one "
    with client.messages.stream(**ASK, stop_sequences=["never", "two"]) as stream:
        assert stream.get_final_message().stop_sequence == "two"
    assert client.messages.create(**{**ASK, "max_tokens": 2}).stop_reason == "max_tokens"
    assert client.messages.create(**ASK).stop_reason == "end_turn"


def test_an_empty_answer_has_no_blocks(client: anthropic.Anthropic, script: Script) -> None:
    script.says("")
    assert client.messages.create(**ASK).content == []
    with client.messages.stream(**ASK) as stream:
        assert stream.get_final_message().content == []


def test_fields_reach_the_ranks(client: anthropic.Anthropic, script: Script) -> None:
    script.says("x")
    client.messages.create(**ASK, extra_body={"temperature": 0, "top_k": 7, "top_p": 0.5, "zzz": 1})
    sampling = script.asked().sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 7, 0.5)
    assert script.asked().max_tokens == 300
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        client.messages.create(**ASK, tools=[WEATHER], tool_choice=choice)
        assert "weather" in (script.asked().grammar or "")
    format: Any = {"type": "json_schema", "schema": {"type": "object", "properties": {"abc": {"type": "string"}}}}
    client.messages.create(**ASK, output_config={"format": format})
    assert "abc" in (script.asked().grammar or "")


def test_tokens_are_counted_as_they_are_asked(client: anthropic.Anthropic, script: Script) -> None:
    script.says("x")
    asked: Any = {"model": "tiny", "messages": HI, "system": "Be brief.", "tools": [WEATHER], "thinking": ADAPTIVE}
    client.messages.create(**asked, max_tokens=1)
    assert client.messages.count_tokens(**asked).input_tokens == len(script.asked().prompt)


def test_answers_are_as_documented(gateway: RunningGateway, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    asked = {**ASK, "tools": [WEATHER], "thinking": ADAPTIVE}
    message = httpx.post(f"{gateway.url}/v1/messages", json=asked).json()
    assert MessageAnswer.model_validate(message).model_dump(exclude_unset=True) == message
    count = httpx.post(f"{gateway.url}/v1/messages/count_tokens", json=asked).json()
    assert TokenCount.model_validate(count).model_dump() == count


def test_a_message_that_breaks_off_says_why(client: anthropic.Anthropic, script: Script) -> None:
    script.says("word " * 200)
    with client.messages.stream(**ASK) as stream:
        events = iter(stream)
        assert next(events).type == "message_start"
        script.ranks.say({"ended": script.asked().id, "reason": "error", "message": "no more"})
        with pytest.raises(anthropic.APIStatusError, match="no more"):
            list(events)


@pytest.mark.parametrize(
    ("status", "type"),
    [(400, "invalid_request_error"), (500, "api_error"), (503, "overloaded_error"), (504, "timeout_error")],
)
def test_a_message_that_breaks_off_has_the_type_of_its_status(
    gateway: RunningGateway, client: anthropic.Anthropic, script: Script, status: int, type: str
) -> None:
    script.says("word " * 200)
    with client.messages.stream(**ASK) as stream:
        events = iter(stream)
        next(events)
        under_way = gateway.ranks._unfinished[script.asked().id]
        gateway.call(under_way.fail, RequestFailed("no more", status))
        with pytest.raises(anthropic.APIStatusError) as caught:
            list(events)
    assert caught.value.body["error"] == {"type": type, "message": "no more"}  # type: ignore[index]


def test_an_unknown_model_is_404(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(**{**ASK, "model": "claude"})
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "the model 'claude' does not exist; served: tiny"},
    }
    assert [model.id for model in client.models.list()] == ["tiny"]


RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": [""]}, r"stop_sequences\[0\]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: the last"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [{"role": "user", "content": [5]}]}, r"messages\[0\]\.content\[0\]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": ""}]}]},
            r"content\[0\].*thinking",
        ),
        ({"system": "x", "messages": [*HI, {"role": "user", "content": [RESULT]}]}, r"messages\[1\].*tool"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "input_schema": {}}]}, r"tools\[0\]\.type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, r"tools\[0\]\.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"messages": [{"role": "user", "content": "x " * 20000}]}, "tokens.* 8192"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    client: anthropic.Anthropic, script: Script, fields: dict[str, Any], named: str
) -> None:
    script.ranks.submitted.clear()
    with pytest.raises(anthropic.BadRequestError, match=named) as caught:
        client.messages.create(**ASK, extra_body=fields)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert script.ranks.submitted == []


@pytest.mark.parametrize("body", ["", "[]", '{"x": NaN}', '{"x": "\\ud800"}', '{"x": ' * 10**5], ids=repr)
def test_a_body_that_is_none_is_400(gateway: RunningGateway, body: str) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        response = httpx.post(gateway.url + path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert json.loads(response.content)["error"]["type"] == "invalid_request_error"
