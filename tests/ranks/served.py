"""A server of a test's own, and clients that read its streams."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from failures import M3DIST, Trial, started

from m3dist.text import Text
from m3dist.tiny import PATH

TIMEOUT = httpx.Timeout(90.0)
NO_END = {str(token): -100 for token in Text.load(PATH).stop_ids}  # answers have the length that is asked for
LISTENING = re.compile(r"m3dist: listening on (\S+)\n")


class Serving(Trial):
    """`m3dist serve` on a free port, of the tiny model unless told otherwise."""

    def __init__(self, folder: Path, *flags: str, world: int = 2, backend: str = "ring", **env: str):
        command = [*M3DIST, "serve", "-n", str(world), "--backend", backend, "--port", "0", *flags]
        super().__init__(folder, command, backend, **env)

    @property
    def url(self) -> str:
        self.wait_for(lambda: LISTENING.search(self.out.read_text()))
        return LISTENING.search(self.out.read_text())[1]

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=TIMEOUT).json()

    def wait_until(self, phase: str) -> None:
        self.wait_for(lambda: self.health()["phase"] == phase)


@contextlib.contextmanager
def serving(folder: Path, *flags: str, **options: Any) -> Iterator[Serving]:
    """One that is ready; whatever becomes of it, nothing is left afterwards."""
    with started(Serving(folder, *flags, **options)) as server:
        server.wait_until("ready")
        yield server


class Client(threading.Thread):
    """Reads a completion of exactly `tokens` tokens as a stream; leaves after `leave_after` events. `choosing`: how
    its tokens are chosen."""

    def __init__(self, url: str, prompt: str, tokens: int, leave_after: int | None = None, **choosing: float):
        super().__init__(daemon=True)
        self.body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "logit_bias": NO_END, **choosing}
        self.body |= {"stream": True, "stream_options": {"include_usage": True}}
        self.url, self.leave_after, self.tokens = url, leave_after, tokens
        self.text, self.events, self.reason, self.error, self.usage = "", 0, None, None, {}
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=TIMEOUT) as answer:
                for line in answer.iter_lines():
                    if self.events == self.leave_after:
                        return
                    if line.startswith("data: {"):
                        self._take(json.loads(line.removeprefix("data: ")))
                if answer.is_error:
                    self.error = f"status {answer.status_code}"
        except httpx.HTTPError as error:
            self.error = repr(error)

    def _take(self, event: dict[str, Any]) -> None:
        self.events += 1
        if "error" in event:
            self.error = event["error"]["message"]
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.text += choice["text"]
            self.reason = choice["finish_reason"] or self.reason


def answers(clients: list[Client]) -> list[str]:
    """Their texts, once all have ended well."""
    for client in clients:
        client.join(TIMEOUT.read)
        assert not client.is_alive(), f"no end after {client.events} events"
        assert client.error is None, client.error
        assert (client.reason, client.usage["completion_tokens"]) == ("length", client.tokens)
    return [client.text for client in clients]
