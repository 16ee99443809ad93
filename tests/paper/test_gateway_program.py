"""The gateway's process: what goes through its standard input and output, and how it ends."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from scripted_ranks import FILES, ScriptedRanks, answer_to

from m3dist.cluster.channel import Channel, ChannelClosed
from m3dist.gateway.program import listen
from m3dist.gateway.ranks import load_text

SECRET = "s" * 64
DEADLINE = 20.0  # seconds
TEXT = load_text(FILES)


class Process:
    """The gateway as its supervisor sees it."""

    def __init__(self, **options: Any):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "m3dist.gateway.program"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin and self.process.stdout
        self._channel = Channel(self.process.stdout.fileno(), self.process.stdin.fileno())
        told = {"host": "127.0.0.1", "port": 0, "api_keys": [], "secret": SECRET, **options}
        self._channel.send({"options": told})

    def listening(self) -> "Process":
        message = self.hear()
        assert set(message) == {"listening"}
        self.url, self.ranks = f"http://{message['listening']['http']}", message["listening"]["ranks"]
        return self

    def tell(self, **message: Any) -> None:
        self._channel.send(message)

    def hear(self) -> dict[str, Any]:
        message = self._channel.receive(DEADLINE)
        assert message is not None
        return message

    def start_ranks(self, **script: Any) -> ScriptedRanks:
        """A life of the ranks, once the gateway has said that it is ready."""
        life = ScriptedRanks(self.ranks, SECRET, **script)
        assert self.hear() == {"ready": True}
        return life

    def ask(self, prompt: list[int], max_tokens: int) -> str:
        """The text of a streamed completion; an error's message in angle brackets."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        text = ""
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=DEADLINE) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    text += f"<{event['error']['message']}>" if "error" in event else event["choices"][0]["text"]
        return text

    def errors(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read().decode()


@pytest.fixture
def started() -> Iterator[list[Process]]:
    """Processes that end with the test."""
    processes: list[Process] = []
    yield processes
    for process in processes:
        process.process.kill()
        process.process.wait()
        for stream in (process.process.stdin, process.process.stdout, process.process.stderr):
            assert stream
            stream.close()


@pytest.fixture
def gateway(started: list[Process]) -> Process:
    started.append(Process())
    return started[0].listening()


def expected(prompt: list[int], tokens: int) -> str:
    """The undisturbed text."""
    ids = answer_to(prompt, tokens)
    end = next((at for at, id in enumerate(ids) if id in TEXT.stop_ids), tokens)
    return TEXT.decode(ids[:end])


def test_lives(gateway: Process):
    """Two lives of the ranks, and what the supervisor is told of them."""
    assert httpx.get(f"{gateway.url}/health").json()["phase"] == "starting"
    gateway.tell(up=1)
    life = gateway.start_ranks()
    assert gateway.ask([1, 2], 20) == expected([1, 2], 20)
    assert gateway.hear() == {"answered": True}
    gateway.tell(down="rank 1 on mac2 was killed by SIGKILL", again=0.5)
    gateway.tell(up=2)
    life.fall()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(gateway.ask, [3], 20)
        second = gateway.start_ranks()
        assert waiting.result() == expected([3], 20)
    assert gateway.hear() == {"answered": True}
    health = httpx.get(f"{gateway.url}/health").json()
    assert (health["phase"], health["restarts"]) == ("ready", 1)
    second.fall()
    gateway.tell(failed="rank 1 on mac2 was killed by SIGKILL 5 times")
    while httpx.get(f"{gateway.url}/health").json()["phase"] != "failed":
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["told", "SIGTERM"])
def test_draining(gateway: Process, how: str):
    """What runs is finished, what comes is refused; then the ranks are told to end, and it ends."""
    life = gateway.start_ranks(pace=0.01)
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(gateway.ask, [prompt], 100) for prompt in range(3)]
        assert gateway.hear() == {"answered": True}
        while httpx.get(f"{gateway.url}/health").json()["running"] < 3:
            time.sleep(0.01)
        gateway.process.send_signal(signal.SIGINT)  # a terminal's, meant for the supervisor
        if how == "told":
            gateway.tell(drain=20)
        else:
            gateway.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{gateway.url}/health").json()["phase"] != "draining":
            time.sleep(0.01)
        refused = httpx.post(f"{gateway.url}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (refused.status_code, "ending" in refused.text) == (503, True)
        assert [stream.result() for stream in streams] == [expected([prompt], 100) for prompt in range(3)]
    assert gateway.hear() == {"drained": True}
    assert gateway.process.wait(DEADLINE) == 0
    assert life.told_to_stop


def test_draining_takes_only_so_long(gateway: Process):
    gateway.start_ranks(pace=0.05)
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(gateway.ask, [1], 5000)
        assert gateway.hear() == {"answered": True}
        gateway.tell(drain=0.2)
        assert stream.result().endswith("<the server is ending>")
    assert gateway.hear() == {"drained": True}
    assert gateway.process.wait(DEADLINE) == 0


def test_the_supervisor_is_gone(gateway: Process):
    """It ends at once, whatever runs."""
    life = gateway.start_ranks(pace=0.05)
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(gateway.ask, [1], 5000)
        assert gateway.hear() == {"answered": True}
        assert gateway.process.stdin
        began = time.monotonic()
        gateway.process.stdin.close()
        assert gateway.process.wait(DEADLINE) == 0
        assert time.monotonic() - began < 3
        with pytest.raises(httpx.HTTPError):
            stream.result()
    life.fall()


def test_a_port_that_is_taken(started: list[Process]):
    """It says which flag helps."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = Process(port=taken.getsockname()[1])
        started.append(process)
        with pytest.raises(ChannelClosed):
            process.hear()
        assert process.process.wait(DEADLINE) == 2
        assert "--port" in process.errors()


def test_what_it_prints(started: list[Process]):
    """Standard error has one JSON object a line; neither keys nor prompts are among it."""
    process = Process(api_keys=["secret-key"])
    started.append(process)
    process.listening()
    life = process.start_ranks()
    body = {"model": "tiny", "prompt": "secret words", "max_tokens": 3}
    for headers in ({}, {"authorization": "Bearer secret-key"}):
        httpx.post(f"{process.url}/v1/completions", json=body, headers=headers)
    assert process.hear() == {"answered": True}
    process.tell(drain=5)
    assert process.process.wait(DEADLINE) == 0
    life.fall()
    printed = process.errors()
    lines = [json.loads(line) for line in printed.splitlines()]
    access = [line for line in lines if line["event"] == "access"]
    assert [(line["status"], line["client"]) for line in access] == [(401, "127.0.0.1"), (200, "key-1@127.0.0.1")]
    assert [line["phase"] for line in lines if line["event"] == "ranks"] == ["loading", "ready", "draining"]
    assert "secret" not in printed


def test_connections_send_small_pieces_at_once():
    async def find() -> int:
        accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        with listen("127.0.0.1", 0) as http:
            server = await asyncio.start_server(lambda _, writer: accepted.put(writer), sock=http)
            with socket.create_connection(http.getsockname()):
                writer = await asyncio.wait_for(accepted.get(), DEADLINE)
                delay = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
            server.close()
        return delay

    assert asyncio.run(find()) != 0
