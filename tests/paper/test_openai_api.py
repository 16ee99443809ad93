"""OpenAI's API over a real socket, driven by OpenAI's own client; the ranks' answers are scripted."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from gateways import DEADLINE, RunningGateway
from scripted_answers import CITY, TEXT, THOUGHT_AND_CALLS, Script, calls

from m3dist.gateway.prompts import LARGE, Encoder, TooLong
from m3dist.gateway.schemas_openai import ChatCompletion, Completion, ModelList
from m3dist.gateway.schemas_responses import Response
from m3dist.sampling import Sampling
from m3dist.text import Text

WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}}
HI: Any = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": HI}


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE) as connected:
        yield connected


@pytest.fixture(scope="module")
def http(gateway: RunningGateway, script: Script) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as connected:
        yield connected


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    return http.post(path, content=body if isinstance(body, str | bytes) else json.dumps(body), headers=JSON)


JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Chat completions


def test_an_answer_has_reasoning_content_and_calls_apart(client: openai.OpenAI, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    answer = client.chat.completions.create(**CHAT, tools=[WEATHER])
    message = answer.choices[0].message
    assert message.content == "Let me see."
    assert message.reasoning_content == "hm, ü"  # type: ignore[attr-defined]
    arguments = [json.loads(call.function.arguments) for call in message.tool_calls or ()]  # type: ignore[union-attr]
    assert arguments == [{"city": "Paris", "days": 3}, {"city": "Rome"}]
    assert answer.choices[0].finish_reason == "tool_calls"
    usage = answer.usage
    assert usage and usage.prompt_tokens == len(script.asked().prompt)
    assert usage.completion_tokens == len(TEXT.encode(THOUGHT_AND_CALLS))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2
    assert usage.completion_tokens_details and 0 < (usage.completion_tokens_details.reasoning_tokens or 0) < 10


def test_a_streamed_answer_is_the_whole_one(client: openai.OpenAI, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    asked: Any = {**CHAT, "tools": [WEATHER], "n": 2}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.usage == whole.usage
    for one, other in zip(streamed.choices, whole.choices, strict=True):
        assert one.index == other.index and one.finish_reason == other.finish_reason
        assert one.message.content == other.message.content
        assert one.message.reasoning_content == other.message.reasoning_content  # type: ignore[attr-defined]
        assert [call.function.arguments for call in one.message.tool_calls or ()] == [
            call.function.arguments for call in other.message.tool_calls or () if call.type == "function"
        ]


def test_a_call_is_streamed_as_a_name_and_its_arguments(client: openai.OpenAI, script: Script) -> None:
    script.says(calls({"city": "Oslo"}))
    chunks = list(client.chat.completions.create(**CHAT, tools=[WEATHER], stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(delta.index, delta.function and delta.function.name) for delta in deltas] == [(0, "weather"), (0, None)]
    assert deltas[0].id and deltas[1].id is None
    assert deltas[1].function and json.loads(deltas[1].function.arguments or "") == {"city": "Oslo"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert all(chunk.usage is None for chunk in chunks)


def test_tools_are_called_and_answered(client: openai.OpenAI, script: Script) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    script.says("<mm:think>two cities</mm:think>" + calls({"city": "Paris"}, {"city": "Rome"}))
    first = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER]).choices[0].message
    messages.append(first)
    for call, weather in zip(first.tool_calls or (), ("rain", "sun"), strict=True):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": weather})
    script.says("</mm:think>Rain, and sun.")
    second = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "Rain, and sun."
    prompt = script.prompt()
    assert "<mm:think>two cities</mm:think>" + calls({"city": "Paris"}, {"city": "Rome"}) in prompt
    assert prompt.index("<response>rain</response>") < prompt.index("<response>sun</response>")


def test_a_long_conversation_keeps_every_turn(client: openai.OpenAI, script: Script) -> None:
    messages: list[Any] = []
    for turn in range(30):
        messages.append({"role": "user", "content": f"question {turn}"})
        script.says(f"</mm:think>answer {turn}")
        answer = client.chat.completions.create(model="tiny", messages=messages).choices[0].message
        assert answer.content == f"answer {turn}"
        messages.append(answer.to_dict())
    prompt = script.prompt()
    assert all(f"question {turn}" in prompt for turn in range(30))
    assert all(f"</mm:think>answer {turn}[e~[" in prompt for turn in range(29))
    assert list(script.asked().prompt) == TEXT.prompt_ids(messages[:-1])


def test_fields_of_sampling_reach_the_ranks(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>x")
    client.chat.completions.create(
        **CHAT,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"7": -100, "8": 3},
        seed=40,
        n=3,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=4,
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [9]},
    )
    expected = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.05,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {7: -100, 8: 3},
        "logprobs": 4,
    }
    assert [asked.sampling for asked in script.ranks.submitted] == [
        Sampling(**expected, seed=40 + i)  # type: ignore[arg-type]
        for i in range(3)
    ]
    assert script.asked().max_tokens == 9
    assert set(script.asked().stop_ids) == TEXT.stop_ids | {9}


def test_what_is_not_said_is_the_models_default(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>x")
    client.chat.completions.create(**CHAT)
    first = script.asked()
    client.chat.completions.create(**CHAT)
    second = script.asked()
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 0.95, 40)
    assert first.sampling.seed != second.sampling.seed
    assert first.max_tokens == 8192 - len(first.prompt)
    assert first.grammar is None


@pytest.mark.parametrize(
    ("asked", "end"),
    [
        ({}, "]~b]ai\n"),
        ({"reasoning_effort": "none"}, "]~b]ai\n</mm:think>"),
        ({"reasoning_effort": "low"}, "]~b]ai\n<mm:think>"),
        ({"chat_template_kwargs": {"thinking_mode": "adaptive"}, "reasoning_effort": "low"}, "]~b]ai\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "]~b]ai\n</mm:think>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "]~b]ai\n<mm:think>"),
    ],
)
def test_thinking_is_the_clients_choice(client: openai.OpenAI, script: Script, asked: Any, end: str) -> None:
    script.says("</mm:think>x")
    client.chat.completions.create(**CHAT, extra_body=asked)
    assert script.prompt().endswith(end)


def test_an_answer_ends_at_a_stop_string_or_its_length(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>one two three" + " four" * 500)
    answer = client.chat.completions.create(**CHAT, stop=["three", "never"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one two ", "stop")
    assert answer.usage and answer.usage.completion_tokens < 50
    answer = client.chat.completions.create(**CHAT, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage and answer.usage.completion_tokens == 5


def test_log_probabilities_of_every_token(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>aé")
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in logprobs.content) == "</mm:think>aé".encode()
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * len(logprobs.content)
    assert {token.logprob for token in logprobs.content} == {-0.5}
    chunks = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for one in streamed if one for token in one.content or ()] == logprobs.content
    script.says("</mm:think>x")
    answer = client.chat.completions.create(**CHAT, logprobs=True)
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert answer.choices[0].logprobs.content[-1].top_logprobs == []


def test_formats_and_forced_calls_become_grammars(client: openai.OpenAI, script: Script) -> None:
    script.says('</mm:think>{"a": 1}')
    schema: Any = {"name": "a", "schema": {"type": "object", "properties": {"abc": {"type": "integer"}}}}
    client.chat.completions.create(**CHAT, response_format={"type": "json_schema", "json_schema": schema})
    assert "abc" in (script.asked().grammar or "")
    client.chat.completions.create(**CHAT, response_format={"type": "json_object"})
    assert script.asked().grammar
    client.chat.completions.create(**CHAT, response_format={"type": "text"})
    assert script.asked().grammar is None
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        client.chat.completions.create(**CHAT, tools=[WEATHER], tool_choice=choice)
        assert "weather" in (script.asked().grammar or "")
    client.chat.completions.create(**CHAT, tools=[WEATHER], tool_choice="none")
    assert script.asked().grammar is None and "<tools>" not in script.prompt()


def test_a_grammar_ends_at_the_stop_tokens_whatever_the_client_ignores(http: httpx.Client, script: Script) -> None:
    """Only they are allowed after its end: the answer would go on with them, unseen, to its full length."""
    script.says("</mm:think>{}")
    for more, stop_ids in (({}, ()), ({"response_format": {"type": "json_object"}}, tuple(sorted(TEXT.stop_ids)))):
        assert post(http, "/v1/chat/completions", {**CHAT, "ignore_eos": True, **more}).status_code == 200
        assert script.asked().stop_ids == stop_ids


def test_an_answer_that_a_stop_string_ended_has_ended(
    gateway: RunningGateway, http: httpx.Client, script: Script
) -> None:
    """It is not counted among those that clients gave up."""

    def counted(how: str) -> float:
        line = f'm3dist_requests_total{{end="{how}"}} '
        return sum(
            float(each.removeprefix(line)) for each in http.get("/metrics").text.splitlines() if each.startswith(line)
        )

    before = counted("stop"), counted("cancelled")
    script.says("</mm:think>one two " + "three " * 100)
    answer = post(http, "/v1/chat/completions", {**CHAT, "stop": "two"}).json()["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("one ", "stop")
    assert (counted("stop"), counted("cancelled")) == (before[0] + 1, before[1])
    gateway.wait_for(lambda: script.asked().id in script.ranks.cancelled)


def test_more_answers_than_a_server_can_take_are_400() -> None:
    """Not 429: the client would ask again for ever."""
    with RunningGateway(rows=2, queue=2) as gateway, httpx.Client(base_url=gateway.url, timeout=DEADLINE) as http:
        gateway.start_ranks()
        for path, fields, param in (
            ("/v1/chat/completions", {"messages": HI, "n": 5}, "n"),
            ("/v1/completions", {"prompt": ["a", "b", "c"], "n": 2}, "n"),
            ("/v1/completions", {"prompt": ["a", "b", "c", "d", "e"]}, "prompt"),
        ):
            response = post(http, path, {"model": "tiny", **fields})
            assert (response.status_code, error_of(response)["param"]) == (400, param)
        assert post(http, "/v1/completions", {"model": "tiny", "prompt": "a", "n": 4}).status_code == 200


def test_fields_that_are_not_known_are_ignored(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>x")
    answer = client.chat.completions.create(
        **CHAT, user="me", store=True, metadata={"a": "b"}, service_tier="auto", extra_body={"zzz": [1]}
    )
    assert answer.choices[0].message.content == "x"


def test_answers_are_as_documented(http: httpx.Client, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    asked = {**CHAT, "tools": [WEATHER], "logprobs": True}
    bodies = {
        ChatCompletion: post(http, "/v1/chat/completions", asked).json(),
        Completion: post(http, "/v1/completions", {"model": "tiny", "prompt": "x", "logprobs": 1}).json(),
        Response: post(http, "/v1/responses", {"model": "tiny", "input": "x"}).json(),
        ModelList: http.get("/v1/models").json(),
    }
    for model, body in bodies.items():
        assert model.model_validate(body).model_dump(exclude_unset=True, by_alias=True) == body


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_an_answer_that_breaks_off_says_why(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>" + "word " * 1000)
    stream = client.chat.completions.create(**CHAT, stream=True)
    next(stream)
    next(stream)  # with the first token, which is of a row
    script.ranks.say({"ended": script.asked().id, "reason": "error", "message": "the grammar is too large"})
    with pytest.raises(openai.APIError, match="the grammar is too large") as caught:
        list(stream)
    assert caught.value.type == "invalid_request_error"  # the request's own fault


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=HI)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 8192  # type: ignore[attr-defined]


def test_a_prompt_that_is_too_long_says_the_count_and_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="9000 tokens.* 8192") as caught:
        client.completions.create(model="tiny", prompt=[1] * 9000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"


def test_a_prompt_that_is_much_too_long_is_not_encoded(
    client: openai.OpenAI, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a grammar made for it. 15 MB would take 8 s and 2 GB."""
    encoded: list[int] = []
    encode = Text.encode
    monkeypatch.setattr(Text, "encode", lambda self, text: encoded.append(len(text)) or encode(self, text))
    monkeypatch.setattr("m3dist.gateway.answering.grammar_of", lambda conversation: pytest.fail("a grammar was made"))
    text = "word \u00fcber " * 100_000
    asked: Any = {"response_format": {"type": "json_object"}}
    for path, field, body in (
        ("/v1/completions", "prompt", {"model": "tiny", "prompt": text}),
        (
            "/v1/chat/completions",
            "messages",
            {"model": "tiny", "messages": [{"role": "user", "content": text}], **asked},
        ),
        ("/v1/responses", "input", {"model": "tiny", "input": text}),
    ):
        response = post(http, path, body)
        assert response.status_code == 400
        error = error_of(response)
        assert "more than 8192 tokens" in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)
    assert encoded and max(encoded) <= LARGE


def test_large_prompts_are_encoded_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are as they would be in one piece; others are not kept waiting."""
    at_work: list[int] = []
    most_at_work = 0

    class Counted:
        def encode(self, text: str) -> list[int]:
            nonlocal most_at_work
            if len(text) > 4:
                at_work.append(1)
                most_at_work = max(most_at_work, len(at_work))
                time.sleep(0.01)
                at_work.pop()
            return [ord(character) for character in text]

    monkeypatch.setattr("m3dist.gateway.prompts.LARGE", 4)

    async def test() -> None:
        encoder, texts = Encoder(), ["abc", *("abcdefgh" * i for i in range(1, 6))]
        found = await asyncio.gather(*(encoder.encode(Counted(), text, 100) for text in texts))  # type: ignore[arg-type]
        assert found == [Counted().encode(text) for text in texts]
        with pytest.raises(TooLong):
            await encoder.encode(Counted(), "abcdefgh", 7)  # type: ignore[arg-type]

    asyncio.run(test())
    assert most_at_work == 1


def called(arguments: Any) -> list[Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "x"}]


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1024": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {str(i): 1 for i in range(9000)}}, "logit_bias"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [1024]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": called("[1]")}, "messages[1].tool_calls[0].function.arguments"),
        ({"messages": called('{"a": NaN}')}, "messages[1].tool_calls[0].function.arguments"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": schema({"type": "nonsense"})}, "response_format"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking_mode": "x"}}, "chat_template_kwargs.thinking_mode"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"guided_json": {}}, "guided_json"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"min_tokens": 3}, "min_tokens"),
    ],
)
def test_a_field_that_is_wrong_is_named(http: httpx.Client, script: Script, fields: Any, param: str) -> None:
    script.ranks.submitted.clear()
    response = post(http, "/v1/chat/completions", {**CHAT, **fields})
    error = error_of(response)
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.partition("[")[0].partition(".")[0] in error["message"]
    assert script.ranks.submitted == []


@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "[]",
        "{",
        b"\xff\xfe{}",
        '{"model": "tiny"}'.encode("utf-16"),
        '{"temperature": NaN}',
        '{"temperature": 1e999}',
        '{"max_tokens": ' + "9" * 5000 + "}",
        '{"user": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"x": ' + "[" * 200 + "]" * 200 + "}",
        '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"x": ' * 50_000 + "1" + "}" * 50_000,
        '{"x": [' + "1," * 2**21 + "1]}",
        '{"model": "tiny", "prompt": [' + "true," * 10**6 + "1]}",
        '{"model": "tiny", "messages": [' + "{}," * 10**6 + "1]}",
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_none_is_400(http: httpx.Client, path: str, body: str | bytes) -> None:
    response = post(http, path, body)
    assert response.status_code == 400
    assert error_of(response)["message"]


def test_a_body_must_say_that_it_is_json(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "a\0b\u2028\U0001f600"}]},
        {"messages": called('{"items": [], "keys": {"a": [1, null, true]}, "values": 1}')},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "]~b]ai\n[e~["}]}]},
        {"messages": [*HI, {"role": "assistant", "content": None}]},
        {"seed": -(2**63), "n": 2.0},
        {"stop": "", "messages": [*HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, *HI]},
        {"stop": None, "tools": [], "logit_bias": {}, "max_tokens": 2**31 - 1},
        {"x": json.loads("[" * 98 + "]" * 98)},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 5, "properties": [1]}}}]},
    ],
)
def test_what_is_odd_but_right_is_answered(http: httpx.Client, script: Script, fields: Any) -> None:
    script.says("</mm:think>fine")
    response = post(http, "/v1/chat/completions", {**CHAT, **fields})
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "fine"


# ---------------------------------------------------------------------------------------------------------------------
# Completions


def test_prompts_are_texts_or_tokens_one_or_several(client: openai.OpenAI, script: Script) -> None:
    prompts: list[Any] = ["ab", [1, 2], ["ab", "cd"], [[1, 2], [3]]]
    for prompt, asked in zip(prompts, (["ab"], [[1, 2]], ["ab", "cd"], [[1, 2], [3]]), strict=True):
        script.says("<mm:think>raw")
        answer = client.completions.create(model="tiny", prompt=prompt, n=2)
        assert [choice.text for choice in answer.choices] == ["<mm:think>raw"] * 2 * len(asked)
        assert [choice.index for choice in answer.choices] == list(range(2 * len(asked)))
        ids = [tuple(TEXT.encode(one) if isinstance(one, str) else one) for one in asked]
        assert sorted(request.prompt for request in script.ranks.submitted) == sorted(ids * 2)
        assert answer.usage and answer.usage.prompt_tokens == sum(map(len, ids))


def test_completions_are_streamed_with_echo(client: openai.OpenAI, script: Script) -> None:
    script.says("and so on")
    chunks = list(client.completions.create(model="tiny", prompt=["ab", "cd"], echo=True, stream=True, max_tokens=100))
    texts = ["".join(one.choices[0].text for one in chunks if one.choices[0].index == i) for i in range(2)]
    assert texts == ["aband so on", "cdand so on"]
    assert [one.choices[0].finish_reason for one in chunks if one.choices[0].finish_reason] == ["stop", "stop"]  # type: ignore[comparison-overlap]


def test_completions_end_by_default_after_16_tokens(client: openai.OpenAI, script: Script) -> None:
    script.says("x y z " * 100)
    answer = client.completions.create(model="tiny", prompt="ab")
    assert answer.usage and answer.usage.completion_tokens == 16


def test_log_probabilities_of_completions(client: openai.OpenAI, script: Script) -> None:
    script.says("aéb")
    logprobs = client.completions.create(model="tiny", prompt="ab", logprobs=2).choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.top_logprobs
    assert logprobs.tokens[0] == "a" and logprobs.tokens[-1] == "b"
    assert logprobs.text_offset == sorted(logprobs.text_offset or ()) and (logprobs.text_offset or [])[-1] == 2
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="tiny", prompt="ab", logprobs=2, echo=True)


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [-1], [1024], [True], None, 5, ["a"] * 129, [[1], "a"]])
def test_a_prompt_that_is_none_is_400(http: httpx.Client, prompt: Any) -> None:
    response = post(http, "/v1/completions", {"model": "tiny", "prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["param"].startswith("prompt")


# ---------------------------------------------------------------------------------------------------------------------
# Responses

TOOL: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": None}


def test_a_streamed_response_is_the_whole_one(client: openai.OpenAI, script: Script) -> None:
    script.says(THOUGHT_AND_CALLS)
    whole = client.responses.create(model="tiny", input="hi", tools=[TOOL])
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output_text == "Let me see." and whole.status == "completed"
    with client.responses.stream(model="tiny", input="hi", tools=[TOOL]) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "hm, ü"
    assert streamed.output_text == whole.output_text and streamed.usage == whole.usage
    arguments = [[item.arguments for item in one.output if item.type == "function_call"] for one in (streamed, whole)]
    assert arguments[0] == arguments[1] == ['{"city": "Paris", "days": 3}', '{"city": "Rome"}']


def test_a_conversation_of_items(client: openai.OpenAI, script: Script) -> None:
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    script.says(THOUGHT_AND_CALLS)
    first = client.responses.create(model="tiny", instructions="Be brief.", input=items, tools=[TOOL])
    items += [item.to_dict() for item in first.output]
    for item in first.output:
        if item.type == "function_call":
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": "rain"})
    script.says("</mm:think>Rain.")
    second = client.responses.create(model="tiny", instructions="Be brief.", input=items, tools=[TOOL])
    assert second.output_text == "Rain."
    assert f"]~b]ai\n{THOUGHT_AND_CALLS}[e~[" in script.prompt()
    assert "<response>rain</response>\n<response>rain</response>" in script.prompt()
    assert "]~b]developer\nBe brief." in script.prompt()


def test_refusals_are_text(http: httpx.Client, script: Script) -> None:
    script.says("</mm:think>fine")
    parts = [{"type": "refusal", "refusal": "I would rather not."}]
    conversation = [*HI, {"role": "assistant", "content": parts}, *HI]
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        assert post(http, path, {"model": "tiny", field: conversation}).status_code == 200
        assert "I would rather not.[e~[" in script.prompt()


def test_a_response_that_was_cut_is_incomplete(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>" + "word " * 100)
    answer = client.responses.create(model="tiny", input="hi", max_output_tokens=4, reasoning={"effort": "none"})
    assert answer.status == "incomplete"
    assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
    assert script.prompt().endswith("</mm:think>")
    events = list(client.responses.create(model="tiny", input="hi", max_output_tokens=4, stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_response_of_a_format_with_log_probabilities(client: openai.OpenAI, script: Script) -> None:
    script.says('</mm:think>{"abc": 1}')
    format: Any = {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"abc": {}}}}
    answer = client.responses.create(model="tiny", input="hi", text={"format": format}, top_logprobs=1)
    assert "abc" in (script.asked().grammar or "")
    part = answer.output[0].content[0]  # type: ignore[union-attr, index]
    assert "".join(token.token for token in part.logprobs or ()).endswith('{"abc": 1}')  # type: ignore[union-attr]


def test_a_response_that_breaks_off_says_why(client: openai.OpenAI, script: Script) -> None:
    script.says("</mm:think>" + "word " * 1000)
    stream = client.responses.create(model="tiny", input="hi", stream=True)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    script.ranks.say({"ended": script.asked().id, "reason": "error", "message": "no more"})
    last = list(stream)[-1]
    assert last.type == "response.failed"
    assert last.response.error and last.response.error.message == "no more"
    assert last.response.error.code == "invalid_prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": []}]}, "input[0]"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        ({"instructions": "x", "input": [{"type": "function_call_output", "call_id": "1", "output": "f"}]}, "input[0]"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"input": "x " * 20000}, "input"),
    ],
)
def test_a_field_of_a_response_that_is_wrong_is_named(http: httpx.Client, fields: Any, param: str) -> None:
    response = post(http, "/v1/responses", {"model": "tiny", "input": "hi", **fields})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
