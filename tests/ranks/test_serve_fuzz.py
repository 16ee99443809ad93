"""Odd requests, thousands of them: none is answered with a 5xx, and the cluster is healthy and right after them.

Bodies come from our own OpenAPI document, through schemathesis: such as it allows and such as it does not; and from a
list of what is known to hurt servers. M3DIST_FUZZ says how many (5,000 were run; by default fewer).
"""

import asyncio
import json
import os
import random
import socket
import warnings
from collections import Counter

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.generation import GenerationMode
from served import Serving, serving

from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT

COUNT = int(os.environ.get("M3DIST_FUZZ", 400))
SEED = int(os.environ.get("M3DIST_SEED", 0))
AT_ONCE = 32
VOCABULARY = 1024
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
DEEP = "[" * 100_000
HUGE = 10**400


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ("--context", "192", "--rows", "32", "--queue", "1000")
    with serving(tmp_path_factory.mktemp("fuzz"), *flags) as served:
        yield served


def answered_rightly(server: Serving) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": DEMO_PROMPT}], "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == DEMO_ANSWER
    health = server.health()
    assert (health["phase"], health["restarts"]) == ("ready", 0), health


# ---------------------------------------------------------------------------------------------------------------------
# From our OpenAPI document


def cases(server: Serving, count: int) -> list[dict]:
    """So many requests, as httpx takes them: half of them such as the document allows."""
    document = httpx.get(f"{server.url}/openapi.json", timeout=10).json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    operations = [operation for operation in operations if operation.path.startswith("/v1/")]
    assert {operation.path for operation in operations} >= {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    }  # fmt: skip
    found: list[dict] = []
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    for operation in operations:
        for mode in modes:
            if operation.method.lower() == "get" and mode is GenerationMode.NEGATIVE:
                continue  # nothing but a path
            found += drawn(operation, mode, -(-count // (2 * len(operations))), server.url)
    return found


def drawn(operation, mode: GenerationMode, count: int, url: str) -> list[dict]:
    found: list[dict] = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def draw(case) -> None:
        if isinstance(case.body, dict):
            case.body |= {"model": "tiny"} if mode is GenerationMode.POSITIVE else {}
            if operation.path not in ANTHROPIC and isinstance(case.body.get("n"), int):
                case.body["n"] = min(case.body["n"], 4)  # else the model would do little else
        found.append(case.as_transport_kwargs(base_url=url))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw()
    return found


async def send_all(requests: list[dict]) -> Counter:
    """How often each status came. An answer that streams is read to its end, where no error may stand."""
    statuses: Counter = Counter()
    turn = asyncio.Semaphore(AT_ONCE)
    unsent, harmed = [], []

    async def send(client: httpx.AsyncClient, request: dict) -> None:
        async with turn:
            request = {name: value for name, value in request.items() if name != "cookies"}
            try:
                if isinstance(request.get("data"), bytes | str):
                    request["content"] = request.pop("data")
                built = client.build_request(**request)
            except (TypeError, ValueError, httpx.InvalidURL) as error:  # no bytes for a wire
                unsent.append(error)
                return
            answer = await client.send(built)
            statuses[answer.status_code] += 1
            if answer.status_code >= 500 or (answer.is_success and "event: error" in answer.text):
                harmed.append((str(built.url), built.content[:500], answer.status_code, answer.text[-500:]))

    async with httpx.AsyncClient(timeout=240, limits=httpx.Limits(max_connections=AT_ONCE)) as client:
        await asyncio.gather(*(send(client, request) for request in requests))
    assert not harmed, harmed
    assert len(unsent) < len(requests) / 10, unsent[:3]
    return statuses


def test_bodies_of_our_document(server):
    requests = cases(server, COUNT)
    random.Random(SEED).shuffle(requests)
    statuses = asyncio.run(send_all(requests))
    print(f"seed {SEED}: {dict(statuses)}")
    assert statuses[200] > COUNT / 20 and statuses[400] > COUNT / 20, statuses
    assert 429 not in statuses, statuses
    answered_rightly(server)


# ---------------------------------------------------------------------------------------------------------------------
# By hand


def chat(**more) -> dict:
    return HELLO | more


def user(content: object) -> dict:
    return chat(messages=[{"role": "user", "content": content}])


NASTY_CHATS = [
    # of field.md D4: each of these takes an mlx_lm.server cluster down
    chat(top_k=VOCABULARY, temperature=1.0),
    chat(top_k=10**9, temperature=1.0),
    chat(stop=[5]),
    # numbers
    *(chat(**{name: value}) for name in ("temperature", "top_p", "max_tokens", "seed", "n", "top_logprobs", "min_p")
      for value in (-1, 0, HUGE, 1e308, "1", None, [], {}, True)),
    chat(temperature=1e-300), chat(temperature=5e-324), chat(temperature=2, top_p=1e-300, top_k=0),
    chat(repetition_penalty=0), chat(repetition_penalty=1e-30), chat(repetition_penalty=HUGE),
    chat(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1.5, top_k=0),
    chat(logprobs=True, top_logprobs=20, top_k=1), chat(logprobs=True, top_logprobs=20, top_k=0),
    chat(logit_bias={"0": -100}), chat(logit_bias={"-1": 1}), chat(logit_bias={str(VOCABULARY): 1}),
    chat(logit_bias={"x": 1}), chat(logit_bias={str(n): -100 for n in range(VOCABULARY)}), chat(logit_bias=[1]),
    chat(seed=-(2**63)), chat(seed=2**64), chat(seed=1.5),
    # text
    user(""), user("\0"), user("\ud800"), user("]~b]ai\n</mm:think>[e~["), user("]<]image[>["), user("\U0010ffff" * 50),
    user(None), user(5), user([]), user([{}]), user([{"type": "text"}]), user([{"type": "text", "text": 5}]),
    user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]), user("a" * 100_000),
    chat(messages=[]), chat(messages=None), chat(messages={}), chat(messages=[5]), chat(messages=[{}]),
    chat(messages=[{"role": "tool", "content": "x", "tool_call_id": "none"}]),
    chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function":
        {"name": "f", "arguments": "no json"}}]}]),
    chat(messages=[{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function":
        {"name": "f", "arguments": "[1]"}}]}, {"role": "tool", "tool_call_id": "b", "content": ""}]),
    chat(messages=[{"role": "nobody", "content": "x"}]),
    # what is to be matched
    chat(stop=""), chat(stop=[""]), chat(stop=["x"] * 1000), chat(stop=["\0"]), chat(stop=["a" * 100_000]),
    chat(stop={"a": 1}), chat(stop=[None]),
    # grammars
    chat(response_format={"type": "json_object"}), chat(response_format={"type": "yaml"}), chat(response_format="json"),
    chat(response_format={"type": "json_schema"}), chat(response_format={"type": "json_schema", "json_schema": 5}),
    *(chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}) for schema in (
        {}, True, False, {"type": "unheard"}, {"$ref": "#"}, {"$ref": "#/nowhere"}, {"$ref": "http://127.0.0.1/x"},
        {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "("}, {"not": {}},
        {"type": "string", "maxLength": 10**9}, {"type": "array", "minItems": 10**9},
        {"enum": [str(n) for n in range(10_000)]}, {"type": "integer", "minimum": 5, "maximum": 4},
        {"anyOf": [{"type": "string"}] * 1000}, {"type": "object", "required": ["a"], "additionalProperties": False},
        json.loads('{"properties":{"a":' * 200 + "{}" + "}}" * 200),
    )),
    # tools
    chat(tools=[]), chat(tools=[{}]), chat(tools=5), chat(tool_choice="required"), chat(tool_choice="what"),
    chat(tool_choice={"type": "function", "function": {"name": "missing"}}),
    *(chat(tools=[{"type": "function", "function": {"name": name, "parameters": parameters}}], tool_choice=choice)
      for choice in ("auto", "required") for name, parameters in (
        ("f", {}), ("f", None), ("f", 5), ("", {}), ("f" * 1000, {}), ('"><', {}), ("f", {"properties": {"]<]": {}}}),
        ("f", {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}), ("f", {"required": ["b"]}))),
    # the rest
    chat(model="other"), chat(model=""), chat(model=None), chat(model=5), chat(model="../../etc/passwd"),
    chat(stream="yes"), chat(stream=True, stream_options=5), chat(stream_options={"include_usage": True}),
    chat(n=16), chat(n=17), chat(user="x" * 100_000), chat(unknown_field={"a": 1}), chat(reasoning_effort="unheard"),
    chat(chat_template_kwargs={"thinking_mode": "wild"}), chat(chat_template_kwargs=5),
    [], 5, None, "text", {},
]  # fmt: skip
NASTY_BODIES = [
    b"", b"\0", b"{", b"\xff\xfe", b"nul", b'{"model": "tiny", "messages": ' + DEEP.encode(), b"[" * 1000 + b"]" * 1000,
    json.dumps(HELLO).encode("utf-16"), b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"temperature": NaN, "model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
    b'{"temperature": Infinity, "model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
    b'{"max_tokens": 1e400, "model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "tiny", "model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}',
    b'{"seed": ' + b"9" * 5000 + b', "model": "tiny", "messages": [{"role": "user", "content": "a"}]}',
]  # fmt: skip
NASTY_WIRES = [
    b"\0\0\0\0\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET /v1/models/%ff%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
]  # fmt: skip


def test_nasty_bodies(server):
    url = f"{server.url}/v1/chat/completions"
    json_header = {"Content-Type": "application/json"}
    bodies = [json.dumps(body).encode() for body in NASTY_CHATS] + NASTY_BODIES
    requests = [{"method": "POST", "url": url, "content": body, "headers": json_header} for body in bodies]
    for path in ("/v1/completions", "/v1/responses", *ANTHROPIC):
        requests += [
            {"method": "POST", "url": server.url + path, "content": body, "headers": json_header}
            for body in NASTY_BODIES + [json.dumps(body).encode() for body in ([], 5, None, {}, HELLO)]
        ]
    requests += [
        {"method": "POST", "url": url, "content": json.dumps(HELLO).encode(), "headers": {"Content-Type": kind}}
        for kind in ("", "text/plain", "application/xml", "multipart/form-data", "application/json; charset=utf-99")
    ]
    requests += [{"method": method, "url": url} for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")]
    asyncio.run(send_all(requests))
    answered_rightly(server)


def test_nasty_wires(server):
    """Bytes that are no HTTP, or half of it: the connection ends or waits, and nobody else notices."""
    host, port = server.url.removeprefix("http://").split(":")
    held = []
    for data in NASTY_WIRES:
        peer = socket.create_connection((host, int(port)), timeout=10)
        held.append(peer)
        try:
            peer.sendall(data)
            peer.settimeout(0.3)
            answer = peer.recv(65536)
        except (TimeoutError, ConnectionError):
            answer = b""  # it waits for more, or has closed
        assert not answer.startswith(b"HTTP/1.1 5"), (data[:100], answer)
    answered_rightly(server)  # with half a request on several connections
    for peer in held:
        peer.close()


def test_a_seed_and_a_client_that_leaves(server):
    """field.md D4 a: after which mlx_lm.server's ranks are out of step."""
    for seed in range(8):
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", timeout=30,
                          json=chat(seed=seed, stream=True, max_tokens=150, temperature=1)) as answer:  # fmt: skip
            for _ in zip(range(1 + seed), answer.iter_lines()):
                pass
    answered_rightly(server)
