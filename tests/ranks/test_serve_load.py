"""Many requests at once: every greedy answer is the one given alone, whatever joins and leaves beside it.

M3DIST_LOAD says how many requests; 200 were run.
"""

import asyncio
import functools
import json
import os
import random

import httpx
import mlx.core as mx
import pytest
from served import serving

import m3dist.tiny
from m3dist.comm import Comm
from m3dist.engine.alone import Request, generate_tokens
from m3dist.loader import load
from m3dist.sample import Sampling
from m3dist.text import Text, split_reasoning
from m3dist.tiny.dialogues import NS, Question, held_out

REQUESTS, AT_ONCE = int(os.environ.get("M3DIST_LOAD", 60)), 24
MAX_TOKENS = 96  # the longest right answer has 77
LEAVES = 0.1  # share of the requests whose client goes away in mid-answer
DRAWN = 0.2  # share of those that are sampled, with a seed


@functools.cache
def alone() -> list[tuple[Question, str, str]]:
    """Questions, and what the model says to each by itself: reasoning and the rest."""
    model, text = load(m3dist.tiny.PATH, Comm(), dtype="float32"), Text.load(m3dist.tiny.PATH)
    found = []
    for question in held_out(REQUESTS):
        prompt = text.prompt_ids(question.messages, thinking=question.thinking, tools=question.tools)
        request = Request(prompt, MAX_TOKENS, 0, 512, sorted(text.stop_ids), Sampling(temperature=0))
        said = text.decode(list(generate_tokens(model, request)))
        found.append((question, *split_reasoning(said, question.thinking)))
    mx.clear_cache()
    return found


def body(question: Question, **more) -> dict:
    """The chat completion that asks it. Arguments of tool calls go as text, as clients send them."""
    messages = json.loads(json.dumps(question.messages))
    for message in messages:
        for number, call in enumerate(message.get("tool_calls") or []):
            function = call.get("function", call)
            arguments = function["arguments"]
            function = {"name": function["name"], "arguments": json.dumps(arguments)}
            message["tool_calls"][number] = {"id": f"call_{number}", "type": "function", "function": function}
    tools = [{"type": "function", "function": tool.get("function", tool)} for tool in question.tools or []]
    thinking = {"chat_template_kwargs": {"thinking_mode": question.thinking}}
    return (
        {"model": "tiny", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
        | thinking
        | ({"tools": tools} if tools else {})
        | more
    )


def as_the_model_says(content: str, calls: list[dict]) -> str:
    """Content and tool calls, as the text in which the model says both. Arguments here are plain values."""
    if not calls:
        return content
    lines = []
    for call in calls:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
        inner = "".join(f"{NS}<{key}>{value}{NS}</{key}>" for key, value in values.items())
        lines.append(f'{NS}<invoke name="{name}">{inner}{NS}</invoke>\n')
    return f"{content}{NS}<tool_call>\n{''.join(lines)}{NS}</tool_call>"


async def stream(client: httpx.AsyncClient, asked: dict, leave_after: int | None) -> tuple[str, str]:
    reasoning, content, calls = "", "", {}
    async with client.stream("POST", "/v1/chat/completions", json=asked | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        pieces = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                reasoning += choice["delta"].get("reasoning_content") or ""
                content += choice["delta"].get("content") or ""
                for part in choice["delta"].get("tool_calls") or []:
                    call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
                    for field, text in part["function"].items():
                        call["function"][field] += text
            pieces += 1
            if pieces == leave_after:
                return reasoning, content  # perhaps in the middle of a call
    return reasoning, as_the_model_says(content, list(calls.values()))


async def whole(client: httpx.AsyncClient, asked: dict) -> tuple[str, str]:
    answer = await client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 200, answer.text
    message = answer.json()["choices"][0]["message"]
    said = as_the_model_says(message.get("content") or "", message.get("tool_calls") or [])
    return message.get("reasoning_content") or "", said


async def ask_all(url: str, chance: random.Random) -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """Every question, in any order, AT_ONCE at a time: (question, right, said) of the greedy ones that were heard."""
    found, turn = [], asyncio.Semaphore(AT_ONCE)
    limits = httpx.Limits(max_connections=AT_ONCE)

    async def ask(client: httpx.AsyncClient, question: Question, right: tuple[str, str], way: float, n: int) -> None:
        async with turn:
            if way < LEAVES:
                await stream(client, body(question), leave_after=1 + n % 12)
            elif way < LEAVES + DRAWN:
                options = {"temperature": 1.0, "seed": n, "presence_penalty": 0.5, "top_p": 0.9, "top_k": n % 3 * 7}
                await whole(client, body(question, **options))
            else:
                said = await (whole(client, body(question)) if n % 2 else stream(client, body(question), None))
                found.append((question.messages[-1]["content"], right, said))

    async with httpx.AsyncClient(base_url=url, timeout=240, limits=limits) as client:
        cases = [(question, (reasoning, content)) for question, reasoning, content in alone()]
        chance.shuffle(cases)
        await asyncio.gather(*(ask(client, *case, chance.random(), n) for n, case in enumerate(cases)))
    return found


@pytest.mark.parametrize(
    ("ranks", "backend"), [(2, "ring"), pytest.param(4, "mpi", marks=pytest.mark.mpi)], ids=["2-ring", "4-mpi"]
)
def test_answers_under_load_are_those_given_alone(ranks, backend, tmp_path):
    with serving(tmp_path, world=ranks, backend=backend) as server:
        heard = asyncio.run(ask_all(server.url, random.Random(ranks)))
        assert len(heard) > REQUESTS / 2
        wrong = [case for case in heard if case[1] != case[2]]
        assert not wrong, wrong[:3]
        assert server.health()["phase"] == "ready"
