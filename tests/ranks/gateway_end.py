"""A test's end of the link between gateway and ranks, and the ranks that connect to it: real processes, no gateway.

As a program it is one rank: `python gateway_end.py OPTIONS` (ServeOptions as JSON), under any launcher.
"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from world import MPIRUN, ring

from m3dist.cluster.channel import Channel, ChannelClosed
from m3dist.cluster.environment import detect
from m3dist.cluster.handshake import admits
from m3dist.engine.link import GATEWAY, LONGEST, SECRET
from m3dist.options import ServeOptions

PATIENCE = 60.0  # seconds for anything that is no failure, on a busy machine


@dataclass
class Answer:
    """What the ranks said about one request. `started`: how often they did."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list]] = field(default_factory=list)
    cached: int | None = None
    started: int = 0
    reason: str | None = None
    message: str | None = None


class Server:
    """`world` ranks over `backend` that serve the tiny model with `options`, and what they say. Use with `with`."""

    def __init__(self, world: int, backend: str = "ring", **options: Any):
        self.world, self.backend, self.options = world, backend, {"dtype": "float32"} | options
        self.answers: dict[int, Answer] = {}
        self.ready: dict[str, Any] = {}
        self.hello: dict[str, Any] = {}
        self.stats: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.processes: list[subprocess.Popen] = []
        self._changed, self._next, self._closed = threading.Condition(), 0, False

    def __enter__(self) -> "Server":
        self._folder = tempfile.TemporaryDirectory()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._secret = secrets.token_hex(16)
        threading.Thread(target=self._listen, daemon=True).start()
        self._start(Path(self._folder.name))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._listener.close()
        self._folder.cleanup()

    def _start(self, folder: Path) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_", "OMPI_"))}
        host, port = self._listener.getsockname()
        ours |= {GATEWAY: f"{host}:{port}", SECRET: self._secret}
        command = [sys.executable, __file__, json.dumps(self.options)]
        if self.backend == "mpi":
            launches = [([*MPIRUN.split(), "-n", str(self.world), *command], ours)]
        else:
            launches = [(command, ours | ring(folder, self.world, rank)) for rank in range(self.world)]
        self._logs = [folder / f"log{number}" for number in range(len(launches))]
        for log, (line, env) in zip(self._logs, launches):
            with open(log, "wb") as file:
                self.processes.append(subprocess.Popen(line, env=env, stdout=file, stderr=file, start_new_session=True))

    # -----------------------------------------------------------------------------------------------------------------
    # What the ranks say

    def _listen(self) -> None:
        connection, _ = self._listener.accept()
        assert admits(connection, self._secret, 10.0)
        connection.settimeout(None)
        self._channel = Channel(connection.fileno(), connection.fileno(), LONGEST)
        self._connection = connection
        try:
            while True:
                message = self._channel.receive()
                with self._changed:
                    self._take(message)
                    self._changed.notify_all()
        except (ChannelClosed, OSError):
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if "tokens" in message:
            for id, token, *more in message["tokens"]:
                self.answers[id].tokens.append(token)
                if more:
                    self.answers[id].logprobs.append(tuple(more))
        elif "started" in message:
            answer = self.answers[message["started"]]
            answer.started += 1
            answer.cached = message["cached"] if answer.cached is None else answer.cached
        elif "ended" in message:
            answer = self.answers[message["ended"]]
            answer.reason, answer.message = message["reason"], message.get("message")
        elif "stats" in message:
            self.stats.append(message["stats"])
        elif "ready" in message:
            self.ready = message["ready"]
        elif "hello" in message:
            self.hello = message["hello"]

    def wait_for(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Until `condition`, asked after every message, is true. Raises AssertionError where the ranks end before."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._closed, patience)
            assert condition(), f"not within {patience:.0f} s, {len(self.messages)} messages\n{self.said()}"

    def wait_until_ready(self) -> "Server":
        self.wait_for(lambda: self.ready)
        return self

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self._logs)

    # -----------------------------------------------------------------------------------------------------------------
    # What they are told

    def submit(self, prompt: Sequence[int], max_tokens: int, client: str = "a", **more: Any) -> int:
        """Returns the request's id. `more`: other fields of a Request; greedy if there is no sampling."""
        with self._changed:
            self._next += 1
            number = self._next
            self.answers[number] = Answer()
        values = {"id": number, "client": client, "prompt": list(prompt), "max_tokens": max_tokens}
        self.send({"submit": values | {"sampling": {"temperature": 0}} | more})
        return number

    def send(self, message: dict[str, Any]) -> None:
        self._channel.send(message)

    def cancel(self, number: int) -> None:
        self.send({"cancel": number})

    def ends(self, *numbers: int) -> list[Answer]:
        """The requests' answers, once they have ended."""
        self.wait_for(lambda: all(self.answers[number].reason for number in numbers))
        return [self.answers[number] for number in numbers]

    def answer(self, *arguments: Any, **more: Any) -> Answer:
        """Of one request, once it has ended."""
        return self.ends(self.submit(*arguments, **more))[0]

    def stop(self) -> list[int]:
        """Tell the ranks to end; their statuses."""
        self.send({"stop": True})
        return self.statuses(PATIENCE)

    def hang_up(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)

    def statuses(self, patience: float) -> list[int]:
        """Once all processes have ended. Raises AssertionError where one does not."""
        end = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a rank still runs after {patience:.0f} s\n{self.said()}") from None
        return [process.returncode for process in self.processes]


if __name__ == "__main__":
    from m3dist.engine.program import main

    sys.exit(main(ServeOptions(**json.loads(sys.argv[1])), detect(os.environ)))
