"""The gateway's process: `python -m m3dist.gateway.program`, started by process.py, which says what goes through its
standard input and output. It ends when it is told to drain, or when its standard input ends.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any

import prometheus_client
import uvicorn

from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.gateway.app import Services, create_access, create_app
from m3dist.gateway.limits import HEADERS, IDLE_SECONDS, Keys, Protocol
from m3dist.gateway.link import Listener, address_of
from m3dist.gateway.log import flush, note
from m3dist.gateway.ranks import Ranks
from m3dist.options import ServeOptions

FILES = 4096  # descriptors to allow: macOS' 256 are few for connections
LAST_WORDS = 5.0  # seconds in which clients may read the end of their answers once all are computed


class Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours to handle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """Whose connections send at once. asyncio turns Nagle's algorithm off where a socket says that it speaks TCP, which
    Python's own do not: the second of two small pieces would wait 40 ms for the client's system to confirm the first.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host, port), family=family, backlog=1024)
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=server.detach())


class Gateway:
    """All of the process, while it runs."""

    def __init__(self, channel: Channel, told: Message):
        """`told`: the options. Raises OSError where an address cannot be listened on."""
        names = {f.name for f in fields(ServeOptions)}
        self.options = options = ServeOptions(**{name: value for name, value in told.items() if name in names})
        self._channel = channel
        self.ranks = Ranks(options.rows, options.queue, options.request_limit, tell=self._tell)
        self._listener = Listener(told.get("ranks_host", "127.0.0.1"), told["secret"])
        self._http = listen(options.host, options.port)
        services = Services(self.ranks, options, Keys(told["api_keys"]))
        self._access = create_access(services, create_app(services))
        self._draining: asyncio.Task[None] | None = None
        self._server = Server(
            uvicorn.Config(
                self._access,
                http=Protocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEADERS,
                timeout_keep_alive=int(IDLE_SECONDS),
                timeout_graceful_shutdown=1,
            )
        )

    async def run(self) -> None:
        """Until the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, lambda: None)  # the supervisor's, who tells us what to do
        loop.add_signal_handler(signal.SIGTERM, self._drain, self.options.drain)
        threading.Thread(target=self._listen, args=(loop.call_soon_threadsafe,), daemon=True).start()
        serving = asyncio.create_task(self._listener.serve(self.ranks.live))
        self._send({"listening": {"http": address_of(self._http), "ranks": self._listener.address}})
        await self._server.serve([self._http])
        serving.cancel()

    # -----------------------------------------------------------------------------------------------------------------
    # The supervisor

    def _listen(self, soon: Callable[..., Any]) -> None:
        """In a thread: what comes through standard input."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            try:
                while (message := self._channel.receive()) is not None:
                    soon(self._hear, message)
            except ChannelClosed:
                soon(self._end)

    def _hear(self, message: Message) -> None:
        if "down" in message:
            self.ranks.down(str(message["down"]))
        elif "up" in message:
            self.ranks.up()
        elif "failed" in message:
            self.ranks.failed(str(message["failed"]))
        elif "drain" in message:
            self._drain(float(message["drain"]))

    def _tell(self, word: str) -> None:
        """A word of the ranks'."""
        if word == "state":
            note("ranks", **asdict(self.ranks.state))
        else:
            self._send({word: True})

    def _send(self, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):  # our standard input says so too
            self._channel.send(message)

    def _drain(self, seconds: float) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._finish(seconds))

    async def _finish(self, seconds: float) -> None:
        """Finish what runs, and end."""
        await self.ranks.drain(seconds)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._answered(), LAST_WORDS)
        self._send({"drained": True})
        self._server.should_exit = True

    async def _answered(self) -> None:
        """Returns once no response is under way."""
        while self._access.open:
            await asyncio.sleep(0.02)

    def _end(self) -> None:
        """The supervisor is gone: end without waiting for anybody."""
        self._server.should_exit = self._server.force_exit = True


def own_channel() -> Channel:
    """Standard input and output as a channel; whatever else is printed goes to standard error from now on."""
    reading, writing = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    return Channel(reading, writing)


def allow_files() -> None:
    """As many descriptors as FILES, or as we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(channel: Channel, told: Message) -> int:
    """Run the gateway; its exit status."""
    try:
        gateway = Gateway(channel, told)
    except OSError as error:
        where = f"{told['host']}:{told['port']}"
        print(f"m3dist: cannot listen on {where}: {error}; choose others by --host and --port", file=sys.stderr)
        return 2
    await gateway.run()
    flush()
    return 0


def main() -> int:
    channel = own_channel()
    logging.disable(logging.CRITICAL)  # uvicorn's and asyncio's: ours is log.py
    prometheus_client.disable_created_metrics()
    allow_files()
    try:
        message = channel.receive()
    except ChannelClosed:
        return 0
    assert message is not None  # there was no time limit
    return asyncio.run(serve(channel, message["options"]))


if __name__ == "__main__":
    sys.exit(main())
