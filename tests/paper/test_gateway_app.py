"""The gateway over HTTP, with a router of the tests' own: errors, health, metrics, the log, odd clients."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from gateways import DEADLINE, RunningGateway
from prometheus_client.parser import text_string_to_metric_families
from scripted_ranks import answer_to

from m3dist.gateway.errors import BadRequest
from m3dist.gateway.log import flush
from m3dist.gateway.ranks import RequestFailed, Work

router = APIRouter()


@router.post("/v1/test")
@router.post("/v1/messages/test")
async def answer(request: Request, body: dict[str, Any]) -> Any:
    """Tokens of the answer to body's `prompt`, streamed where it has `stream`; other words make errors."""
    if "mistake" in body:
        raise ZeroDivisionError(f"a mistake that quotes {body['mistake']}")
    if "bad" in body:
        raise BadRequest("bad: must be good", "bad", "spoilt")
    ranks = request.app.state.services.ranks
    stream = ranks.submit(Work(body["prompt"], body.get("max_tokens", 20)), request.state.client)
    if not body.get("stream"):
        return [token.id async for token in stream]

    async def events() -> AsyncIterator[bytes]:
        try:
            async for token in stream:
                yield f"data: {token.id}{' ' * body.get('wide', 0)}\n\n".encode()
        except RequestFailed as error:
            yield f"event: error\ndata: {error}\n\n".encode()

    return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway(router) as running:
        running.start_ranks(pace=0.002)
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as connected:
        yield connected


def tokens_of(response: httpx.Response) -> list[int]:
    """The tokens of an event stream; comments are none."""
    return [int(line.removeprefix("data: ")) for line in response.iter_lines() if line.startswith("data: ")]


def ask(gateway: RunningGateway, prompt: list[int], max_tokens: int = 20) -> list[int]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{gateway.url}/v1/test", json=body, timeout=DEADLINE) as response:
        return tokens_of(response)


def connect(gateway: RunningGateway, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection over which `body` was posted."""
    data = json.dumps(body).encode()
    head = "POST /v1/test HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(DEADLINE)
    connection.connect(("127.0.0.1", gateway.port))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


# ---------------------------------------------------------------------------------------------------------------------
# Answers, and what becomes of clients


def test_answers(gateway: RunningGateway, client: httpx.Client):
    assert client.post("/v1/test", json={"prompt": [1, 2]}).json() == answer_to([1, 2], 20)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: ask(gateway, [prompt], 30), range(8)))
    assert answers == [answer_to([prompt], 30) for prompt in range(8)]


def test_streams_go_on_over_falls():
    """Three falls under four streams, and one client that asks while nothing computes."""
    with RunningGateway(router) as gateway, ThreadPoolExecutor(8) as pool:
        life = gateway.start_ranks(pace=0.01)
        streams = [pool.submit(ask, gateway, [prompt], 100) for prompt in range(4)]
        for fall in range(3):
            steps = life.steps
            gateway.wait_for(lambda: life.steps > steps + 10)  # noqa: B023
            life.fall()
            gateway.wait_for(lambda: gateway.ranks.state.phase == "restarting")
            streams.append(pool.submit(ask, gateway, [100 + fall], 20))
            health = httpx.get(f"{gateway.url}/health")
            assert (health.status_code, health.json()["phase"]) == (200, "restarting")
            life = gateway.start_ranks(pace=0.01)
        assert [stream.result() for stream in streams[:4]] == [answer_to([prompt], 100) for prompt in range(4)]
        assert [stream.result() for stream in streams[4:]] == [answer_to([100 + fall], 20) for fall in range(3)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves(gateway: RunningGateway, stream: bool):
    """Its request is cancelled at once, on the ranks too."""
    life = gateway.start_ranks(pace=0.01)
    connection = connect(gateway, {"prompt": [7], "max_tokens": 5000, "stream": stream})
    gateway.wait_for(lambda: gateway.ranks.running == 1)
    connection.close()
    began = time.monotonic()
    gateway.wait_for(lambda: gateway.ranks.running == 0 and life.cancelled != [])
    assert time.monotonic() - began < 1.0


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch):
    """Others are answered meanwhile; it is cut off after a while, and its request with it."""
    monkeypatch.setattr("m3dist.gateway.limits.WRITE_SECONDS", 1.5)
    with RunningGateway(router) as gateway:
        life = gateway.start_ranks(pace=0.001)
        lazy = connect(gateway, {"prompt": [1], "max_tokens": 8000, "stream": True, "wide": 20000}, 4096)
        gateway.wait_for(lambda: gateway.ranks.running == 1)
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            assert ask(gateway, [2]) == answer_to([2], 20)
        gateway.wait_for(lambda: gateway.ranks.running == 0)
        assert life.cancelled == [1]
        lazy.close()


def test_comments_keep_a_stream_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m3dist.gateway.access.COMMENT_SECONDS", 0.1)
    with RunningGateway(router) as gateway:
        life = gateway.start_ranks()
        life.stall()
        body = {"prompt": [1], "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/test", json=body, timeout=DEADLINE) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
            life.go_on()
            assert [int(line[6:]) for line in lines if line.startswith("data: ")] == answer_to([1], 20)


def test_a_request_that_takes_too_long():
    """A stream ends with an error event; a whole answer is a 504."""
    with RunningGateway(router, request_limit=0.3) as gateway:
        gateway.start_ranks(pace=0.05)
        url, body = f"{gateway.url}/v1/test", {"prompt": [1], "max_tokens": 5000}
        response = httpx.post(url, json=body)
        assert (response.status_code, "0.3 s" in response.json()["error"]["message"]) == (504, True)
        with httpx.stream("POST", url, json={**body, "stream": True}) as response:
            assert response.read().endswith(b"limit\n\n")


def test_a_handler_that_hangs(monkeypatch: pytest.MonkeyPatch):
    """What does not end by itself is cut off."""
    monkeypatch.setattr("m3dist.gateway.access.OVERTIME", 0.3)
    hanging = APIRouter()

    @hanging.get("/v1/hang")
    async def hang() -> None:
        await asyncio.sleep(1000)

    with RunningGateway(hanging, request_limit=0.1) as gateway:
        assert httpx.get(f"{gateway.url}/v1/hang").status_code == 504


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors_are_the_apis_json(client: httpx.Client):
    """OpenAI's objects, and on Anthropic's paths Anthropic's."""
    cases = {
        400: client.post("/v1/test", json={"bad": 1}),
        404: client.get("/v1/nothing"),
        405: client.delete("/v1/test"),
        500: client.post("/v1/test", json={"mistake": "the prompt"}),
    }
    for status, response in cases.items():
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert cases[400].json()["error"]["param"] == "bad"
    assert cases[405].headers["allow"] == "POST"
    assert "prompt" not in cases[500].text
    response = client.post("/v1/messages/test", json={"bad": 1})
    assert response.json() == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "bad: must be good"},
    }


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 50_000, b"1" * 10_000, b"nul"])
def test_bodies_that_are_no_objects(client: httpx.Client, body: bytes):
    """A 4xx, never a 5xx; and the connection goes on."""
    response = client.post("/v1/test", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert "error" in response.json()


def test_full_queue():
    with RunningGateway(router, rows=1, queue=1) as gateway, ThreadPoolExecutor(2) as pool:
        life = gateway.start_ranks(rows=1)
        life.stall()
        answers = [pool.submit(ask, gateway, [prompt]) for prompt in range(2)]
        gateway.wait_for(lambda: gateway.ranks.running + gateway.ranks.waiting == 2)
        refused = httpx.post(f"{gateway.url}/v1/test", json={"prompt": [3]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        life.go_on()
        assert sorted(answer.result() for answer in answers) == sorted(answer_to([prompt], 20) for prompt in range(2))


def test_health_is_truthful():
    """Each phase by its name; 200 only where requests are taken; and requests are refused with the same reason."""
    with RunningGateway(router) as gateway:

        def health() -> tuple[int, dict[str, Any]]:
            response = httpx.get(f"{gateway.url}/health")
            return response.status_code, response.json()

        def refused() -> str:
            response = httpx.post(f"{gateway.url}/v1/test", json={"prompt": [1]})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            return response.json()["error"]["message"]

        nothing = {"fraction": None, "reason": None, "restarts": 0, "running": 0, "waiting": 0}
        assert health() == (503, {**nothing, "phase": "starting"})
        assert "starting" in refused()
        gateway.call(gateway.ranks.up)
        life = gateway.start_ranks(ready=False)
        gateway.wait_for(lambda: gateway.ranks.state.fraction is not None)
        assert health() == (503, {**nothing, "phase": "loading", "fraction": 0.4})
        assert "40%" in refused()
        life.get_ready()
        gateway.wait_for(lambda: gateway.ranks.state.phase == "ready")
        assert health() == (200, {**nothing, "phase": "ready"})
        gateway.call(gateway.ranks.down, "rank 1 on mac2 was killed by SIGKILL")
        gateway.call(gateway.ranks.up)
        told = {"phase": "restarting", "restarts": 1, "reason": "rank 1 on mac2 was killed by SIGKILL"}
        assert health() == (200, {**nothing, **told})
        gateway.call(gateway.ranks.failed, "rank 1 on mac2 was killed 5 times")
        assert health() == (503, {**nothing, **told, "phase": "failed", "reason": "rank 1 on mac2 was killed 5 times"})
        assert "mac2 was killed 5 times" in refused()


def test_health_tells_strangers_no_reasons():
    with RunningGateway(keys=("secret-key",)) as gateway:
        gateway.call(gateway.ranks.down, "rank 1 on mac2 was killed by SIGKILL")
        assert "reason" not in httpx.get(f"{gateway.url}/health").json()
        known = {"authorization": "Bearer secret-key"}
        assert "mac2" in httpx.get(f"{gateway.url}/health", headers=known).json()["reason"]


def test_health_without_its_body(client: httpx.Client):
    response = client.head("/health")
    assert (response.status_code, response.content) == (200, b"")


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and log


def test_metrics():
    """Counted from what was done; the ranks' own figures as they told them."""
    with RunningGateway(router) as gateway:
        gateway.call(gateway.ranks.up)
        life = gateway.start_ranks(pace=0.002)
        for prompt in ([1, 2, 3], [4]):
            ask(gateway, prompt, 10)
        for hits in (30, 50):
            stats = {
                "running": 1,
                "waiting": 0,
                "pages": {"total": 1000, "used": 7, "cached": 3},
                "prefix": {"hits": hits, "misses": 2 * hits},
                "steps": 20,
                "ranks": [{"step_seconds": 0.02, "sum_seconds": 0.0001}, {"step_seconds": 0.03, "sum_seconds": None}],
            }
            life.say({"stats": stats})
        gateway.wait_for(lambda: gateway.ranks.stats.get("prefix") == {"hits": 50, "misses": 100})
        gateway.call(gateway.ranks.up)
        text = httpx.get(f"{gateway.url}/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expected = {
        ("m3dist_requests_total", "length"): 2,
        ("m3dist_requests_running",): 0,
        ("m3dist_requests_waiting",): 0,
        ("m3dist_prompt_tokens_total",): 4,
        ("m3dist_answer_tokens_total",): 20,
        ("m3dist_time_to_first_token_seconds_count",): 2,
        ("m3dist_time_per_token_seconds_count",): 18,
        ("m3dist_ranks_ready",): 1,
        ("m3dist_ranks_restarts_total",): 1,
        ("m3dist_prefix_cache_hit_tokens_total",): 50,
        ("m3dist_prefix_cache_miss_tokens_total",): 100,
        ("m3dist_cache_pages", "used"): 7,
        ("m3dist_cache_page_tokens",): 16,
        ("m3dist_rank_weights_bytes", "mac2", "1"): 200,
        ("m3dist_rank_step_seconds", "mac2", "1"): 0.03,
        ("m3dist_rank_sum_seconds", "mac1", "0"): 0.0001,
        ("m3dist_http_responses_total", "200"): 2,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert ("m3dist_rank_sum_seconds", "mac2", "1") not in found
    assert not any(name.startswith("m3dist_cache_bytes") for name, *_ in found)  # these ranks do not say it
    assert 10 * 0.001 < found[("m3dist_time_per_token_seconds_sum",)] < 5


def test_metrics_of_ranks_are_theirs():
    """Bytes of the cache where they say a page's; nothing of ranks that are down."""
    with RunningGateway() as gateway:
        life = gateway.start_ranks(ready=False)
        facts = {"page_size": 16, "pages": 1000, "context": 8192, "vocab_size": 1024, "rows": 4}
        life.say({"ready": {**facts, "weights_bytes": [100, 200], "page_bytes": 2048}})
        life.say({"stats": {"pages": {"total": 1000, "used": 7}, "ranks": [{"step_seconds": 0.02}]}})
        gateway.wait_for(lambda: gateway.ranks.stats)
        text = httpx.get(f"{gateway.url}/metrics").text
        assert 'm3dist_cache_bytes{state="used"} 14336.0' in text
        assert 'm3dist_rank_weights_bytes{host="mac2",rank="1"} 200.0' in text
        gateway.call(gateway.ranks.down, "killed")
        text = httpx.get(f"{gateway.url}/metrics").text
        assert "m3dist_ranks_ready 0.0" in text
        assert not any(f"m3dist_{name}{{" in text for name in ("cache_bytes", "cache_pages", "rank_weights_bytes"))
        assert "m3dist_rank_step_seconds{" not in text


def test_the_log(gateway: RunningGateway, client: httpx.Client, capsys: pytest.CaptureFixture[str]):
    """A line of JSON a request, with counts of tokens and without a word that the client sent."""
    named = client.post("/v1/test?secret=word", json={"prompt": [1, 2, 3], "max_tokens": 5, "word": "secret"})
    client.post("/v1/test", json={"mistake": "secret"})
    left = connect(gateway, {"prompt": [9], "max_tokens": 5000})
    gateway.wait_for(lambda: gateway.ranks.running == 1)
    left.close()
    gateway.wait_for(lambda: gateway.ranks.running == 0 and gateway.access.open == 0)
    flush()
    printed = capsys.readouterr().err
    lines = [json.loads(line) for line in printed.splitlines()]
    access = [line for line in lines if line["event"] == "access"]
    assert [line["status"] for line in access] == [200, 500, 499]
    assert named.headers["x-request-id"] == named.headers["request-id"] == access[0]["request"]
    known = ("method", "path", "client", "tokens_in", "tokens_out")
    assert [access[0][name] for name in known] == ["POST", "/v1/test", "127.0.0.1", 3, 5]
    assert 0 < access[0]["seconds"] < 5
    assert [line["error"] for line in lines if line["event"] == "error"] == ["ZeroDivisionError"]
    assert "secret" not in printed
