"""The gateway's end of the connection with rank 0: who may connect, and what comes and goes.

JSON objects, one a line. engine/link.py is rank 0's end; ranks.py knows what the messages mean. One connection is one
life of the ranks: when it ends, they fell.
"""

import asyncio
import json
import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from m3dist.cluster.channel import ChannelClosed, Message, parse
from m3dist.cluster.handshake import admits

LONGEST = 64 * 2**20  # bytes of a message: the first has the tokenizer in it
HANDSHAKE = 10.0  # seconds
STRANGERS = 16  # connections that may be in their handshake at once; ours takes milliseconds
# A host that is gone closes nothing: after so many seconds of silence TCP asks, so often, so many times.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class LinkLost(Exception):
    """Rank 0 is gone, or what it sends is no message of this protocol; says which."""


class Link:
    """A connection with a rank 0 that has proved itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    def send(self, message: Message) -> None:
        """Waits for nothing. What cannot be delivered is lost with the connection, which `receive` tells."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def flush(self) -> None:
        """Returns when nearly all that was sent is the system's."""
        with suppress(OSError):
            await self._writer.drain()

    async def receive(self) -> Message:
        """Raises LinkLost."""
        try:
            line = await self._reader.readline()
        except ValueError:
            raise LinkLost(f"rank 0 sent a message longer than {LONGEST} bytes") from None
        except OSError as error:
            raise LinkLost(f"the connection with rank 0 broke: {error}") from None
        if not line.endswith(b"\n"):
            raise LinkLost("rank 0 closed its connection with the gateway")
        try:
            return parse(line)
        except ChannelClosed as error:
            raise LinkLost(f"rank 0 sent what is {error}") from None

    def close(self) -> None:
        self._writer.close()


class Listener:
    """The port that rank 0 connects to, on `host` (an address of this machine).

    Whoever does not prove within HANDSHAKE seconds that he knows `secret` gets nothing. Raises OSError where the
    address is not this machine's.
    """

    def __init__(self, host: str, secret: str):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self._socket.setblocking(False)
        self._secret = secret
        self._pool = ThreadPoolExecutor(STRANGERS, "handshake")  # a handshake waits in a thread of its own
        self._strangers: deque[socket.socket] = deque()
        self._meetings: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens, as text: host:port."""
        return address_of(self._socket)

    async def serve(self, life: Callable[[Link], Awaitable[None]]) -> None:
        """Until cancelled: calls `life` with each connection that is admitted."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(self._socket)
                except OSError:  # a stranger left at once; or too many files are open
                    await asyncio.sleep(0.01)
                    continue
                meeting = asyncio.create_task(self._meet(connection, life))
                self._meetings.add(meeting)
                meeting.add_done_callback(self._meetings.discard)
        finally:
            self._socket.close()
            for connection in self._strangers:
                _hang_up(connection)
            for meeting in self._meetings:
                meeting.cancel()
            self._pool.shutdown(wait=False)

    async def _meet(self, connection: socket.socket, life: Callable[[Link], Awaitable[None]]) -> None:
        self._strangers.append(connection)
        if len(self._strangers) > STRANGERS:
            _hang_up(self._strangers.popleft())  # it has said nothing for longest, and keeps ours out
        connection.setblocking(True)
        admitted = await asyncio.get_running_loop().run_in_executor(
            self._pool, admits, connection, self._secret, HANDSHAKE
        )
        if connection in self._strangers:
            self._strangers.remove(connection)
        if not admitted:
            connection.close()
            return
        try:
            connection.setblocking(False)
            _keep_alive(connection)
            link = Link(*await asyncio.open_connection(sock=connection, limit=LONGEST))
        except OSError:  # it has just gone
            connection.close()
            return
        try:
            await life(link)
        finally:
            link.close()


def _hang_up(connection: socket.socket) -> None:
    """Ends a handshake that waits in its thread; who waits for the thread closes the socket."""
    with suppress(OSError):  # it has just gone
        connection.shutdown(socket.SHUT_RDWR)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:  # macOS and Linux name the first differently
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def address_of(listener: socket.socket) -> str:
    """host:port of a listening socket; an IPv6 address in brackets."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---------------------------------------------------------------------------------------------------------------------
# Values of messages: rank 0 is ours, but what it sends is looked at before it is believed


def whole(value: Any, what: str, least: int = 0, below: int = 2**63) -> int:
    """`value`, an int in least..below-1. Raises LinkLost, naming `what`."""
    if type(value) is not int or not least <= value < below:
        raise LinkLost(f"rank 0 sent {value!r:.80} as {what}")
    return value


def number(value: Any, what: str) -> float:
    """`value`, finite. Raises LinkLost, naming `what`."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise LinkLost(f"rank 0 sent {value!r:.80} as {what}")
    return float(value)


def listed(value: Any, what: str) -> list[Any]:
    """`value`, a list. Raises LinkLost, naming `what`."""
    if not isinstance(value, list):
        raise LinkLost(f"rank 0 sent {value!r:.80} as {what}")
    return value


def mapped(value: Any, what: str) -> dict[str, Any]:
    """`value`, an object. Raises LinkLost, naming `what`."""
    if not isinstance(value, dict):
        raise LinkLost(f"rank 0 sent {value!r:.80} as {what}")
    return value
