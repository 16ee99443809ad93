"""Rank 0's end of the link to the gateway: requests come in, tokens go out; JSON objects, one a line. No MLX.

    tells   hello {world, hosts, model, files}         before the model is loaded
            loading (fraction)                         now and then
            ready {page_size, page_bytes, pages, context, vocab_size, rows, weights_bytes}
            started (id), cached (tokens)              tokens [[id, token, ...], ...]
            ended (id), reason, message                stats {...}
    hears   submit {request}    cancel (id)    stop

One connection is one life of the ranks: when it closes, the gateway gives its requests to those that come next.
"""

import json
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.cluster.handshake import is_admitted
from m3dist.errors import CommunicationError, M3Error

GATEWAY, SECRET = "M3DIST_GATEWAY", "M3DIST_GATEWAY_SECRET"  # where the gateway listens, and what both know
LONGEST = 64 * 2**20  # bytes of a message: a long prompt's tokens, a tokenizer
CONNECT = 10.0  # seconds in which a connection must be made, both ends having proved themselves
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")


class Gateway:
    """The gateway as rank 0 sees it. From `listen` on, what it says waits in order until somebody asks."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._heard: SimpleQueue[Any] = SimpleQueue()

    @classmethod
    def connect(cls, environ: Mapping[str, str]) -> "Gateway":
        """Raises CommunicationError where nobody listens, or another program than the gateway of this job."""
        if GATEWAY not in environ:
            raise CommunicationError(f"{GATEWAY} is not set: m3dist serve starts a gateway and sets it")
        try:
            return cls(dial(environ[GATEWAY], environ.get(SECRET, ""), CONNECT))
        except (OSError, EOFError, ValueError) as error:
            why = str(error) or "what listens there does not know this job's secret"
            raise CommunicationError(f"no gateway at {GATEWAY}={environ[GATEWAY]}: {why}") from None

    def listen(self, take: Callable[[Message], None]) -> None:
        """Have a thread hear it from now on, and call `take` with each message, which hands on what becomes of it."""
        threading.Thread(target=self._listen, args=(take,), name="gateway", daemon=True).start()

    def hand_on(self, heard: Any) -> None:
        """`hear` gives it in its turn. Any thread may call it."""
        self._heard.put(heard)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Raises CommunicationError where the gateway is gone, M3Error for a message too long for it to read."""
        line = json.dumps(message).encode()
        if len(line) >= LONGEST:
            raise M3Error(f"{_in_words(message)} has {len(line)} bytes; the gateway reads {LONGEST - 1}")
        try:
            self._channel.send_line(line)
        except ChannelClosed as error:
            raise CommunicationError(f"the gateway is gone: {error}") from None

    def hear(self, wait: bool) -> Any:
        """What was handed on next; None if that is nothing yet, unless told to `wait`. Raises CommunicationError where
        the gateway is gone, and RuntimeError where `take` failed."""
        try:
            heard = self._heard.get(block=wait)
        except Empty:
            return None
        if isinstance(heard, CommunicationError):
            raise heard
        if isinstance(heard, BaseException):
            raise RuntimeError(f"a message of the gateway's could not be taken: {heard}") from heard
        return heard

    def _listen(self, take: Callable[[Message], None]) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                take(message)
        except ChannelClosed as error:
            self.hand_on(CommunicationError(f"the gateway is gone: {error}"))
        except BaseException as error:  # a library's panic is no Exception; the main thread must end the job
            self.hand_on(error)


def _in_words(message: Mapping[str, Any]) -> str:
    """What there is too much of: of a hello, which has files, the longest."""
    [(kind, content), *_] = message.items()
    if kind != "hello":
        return f"the message {kind!r}"
    return f"hello, the most of it {max(content['files'], key=lambda name: len(content['files'][name]))},"


def text_files(directory: Path) -> dict[str, str]:
    """Name -> content of what Text.load reads, as far as it is there: the gateway may run on another machine."""
    return {name: (directory / name).read_text("utf-8") for name in TEXT_FILES if (directory / name).is_file()}


def dial(address: str, secret: str, limit: float, longest: int = LONGEST) -> Channel:
    """A channel, for messages of `longest` bytes, to who listens at "ip:port" (IPv6: "[ip]:port") and has proved within
    `limit` seconds that it knows `secret`, as we have.

    Raises OSError, or EOFError where another program listens there.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), limit) as connection:
        if not is_admitted(connection, secret, limit):
            raise EOFError
        return channel_of(connection, longest)


def channel_of(connection: socket.socket, longest: int = LONGEST) -> Channel:
    """The channel over a connection, which it takes over. What is sent is small, and waited for."""
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    descriptor = connection.detach()
    return Channel(descriptor, descriptor, longest)
