"""Messages between the launcher and what it starts on the hosts: JSON objects, one a line. No MLX.

Plain values only, never pickle: whatever arrives can at worst be a wrong message.
"""

import json
import os
import select
import threading
import time
from collections.abc import Mapping
from typing import Any

LONGEST = 16 * 2**20  # bytes of a message; a longer one is no message of ours

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other side is gone, or what it sends is not a message."""


class Channel:
    """Two file descriptors, or one of a socket. Any thread may send; one thread receives."""

    def __init__(self, reading: int, writing: int, longest: int = LONGEST):
        self.reading, self.writing, self.longest = reading, writing, longest
        self._received = bytearray()
        self._sending, self._closed = threading.Lock(), False

    def send(self, message: Mapping[str, Any]) -> None:
        """Returns when the system has taken it. Raises ChannelClosed."""
        self.send_line(json.dumps(message).encode())

    def send_line(self, line: bytes) -> None:
        """As send, of a message that is JSON already."""
        data = memoryview(line + b"\n")
        with self._sending:
            if self._closed:  # the descriptors may be others' by now
                raise ChannelClosed("closed here")
            try:
                while data:
                    data = data[os.write(self.writing, data) :]
            except (OSError, ValueError) as error:
                raise ChannelClosed(str(error)) from None

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None when `timeout` seconds brought none. Raises ChannelClosed."""
        line = self.receive_line(timeout)
        return None if line is None else parse(line)

    def receive_line(self, timeout: float | None = None) -> bytes | None:
        """As receive, before it is known to be a message."""
        end = None if timeout is None else time.monotonic() + timeout
        searched = 0
        while (newline := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            if searched > self.longest:
                raise ChannelClosed(f"no line ends within {self.longest} bytes")
            if end is not None and not select.select([self.reading], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            try:
                data = os.read(self.reading, 65536)
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not data:
                raise ChannelClosed("the other side has closed")
            self._received += data
        line = bytes(self._received[:newline])
        del self._received[: newline + 1]
        return line

    def close(self) -> None:
        self._closed = True
        for descriptor in {self.reading, self.writing}:
            os.close(descriptor)


def parse(line: bytes) -> Message:
    """The message in a line. Raises ChannelClosed where there is none: nothing sensible can follow."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ChannelClosed(f"not a message: {line[:80]!r}")
    return message


def as_text(data: bytes) -> str:
    """Any bytes as text that JSON can hold, a character a byte; `as_bytes` is the way back."""
    return data.decode("latin-1")


def as_bytes(text: str) -> bytes:
    return text.encode("latin-1")
