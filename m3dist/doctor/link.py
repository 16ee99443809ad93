"""The two ends of a link between hosts: one listens, the other connects, and both measure. Run on the hosts. No MLX.

The listener takes nobody who does not know the measurement's secret, which the launcher has told both ends over their
own channels. Round trips are timed where they start, bandwidth where the bytes arrive.
"""

import errno
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

from m3dist.cluster.handshake import admits, is_admitted, receive

CONNECT = 2.0  # seconds
HANDSHAKE = 1.0  # seconds that a stranger can take of the listener's time
PINGS, PINGING = 50, 0.3  # round trips at most, and seconds
STREAMING = 0.3  # seconds
PING, STREAM = b"p" * 64, b"s" * 64
CHUNK = 2**20


def listen(address: str, secret: str, seconds: float, listening: Callable[[int], None]) -> dict[str, Any]:
    """Be the far end on `address` for one peer that comes within `seconds`; `listening` is told the port.

    Returns {"bandwidth": bytes/s}, or {"failed": errno's name or words}.
    """
    end = time.monotonic() + seconds
    try:
        with socket.create_server((address, 0), backlog=8) as server:
            listening(server.getsockname()[1])
            while (left := end - time.monotonic()) > 0:
                server.settimeout(left)
                peer, _ = server.accept()
                with peer, suppress(OSError, EOFError):
                    if admits(peer, secret, HANDSHAKE):
                        peer.settimeout(seconds)
                        return {"bandwidth": _serve(peer)}
    except OSError as error:
        return {"failed": reason(error)}
    return {"failed": "ETIMEDOUT"}


def connect(address: str, port: int, secret: str, seconds: float) -> dict[str, Any]:
    """Be the near end. Returns {"round_trip": median seconds, "fastest": seconds}, or {"failed": ...} as `listen`."""
    try:
        with socket.create_connection((address, port), timeout=min(CONNECT, seconds)) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not is_admitted(peer, secret, seconds):
                return {"failed": "another program answers at this address"}
            peer.settimeout(seconds)
            trips = _ping(peer)
            _stream(peer)
            return {"round_trip": median(trips), "fastest": min(trips)}
    except EOFError:
        return {"failed": "the connection was closed"}
    except OSError as error:
        return {"failed": reason(error)}


def reason(error: OSError) -> str:
    """errno's name, which is the same on every system: its number is not."""
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(error.errno or 0, str(error))


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def _ping(peer: socket.socket) -> list[float]:
    """Seconds of round trips, as many as fit; the first, which wakes everything up, does not count."""
    trips: list[float] = []
    end = time.monotonic() + PINGING
    while len(trips) < 2 or (len(trips) <= PINGS and time.monotonic() < end):
        began = time.perf_counter()
        peer.sendall(PING)
        receive(peer, len(PING))
        trips.append(time.perf_counter() - began)
    return trips[1:]


def _stream(peer: socket.socket) -> None:
    """Send as much as goes in STREAMING seconds. The listener may close before it has all."""
    zeros = memoryview(bytes(CHUNK))
    peer.sendall(STREAM)
    end = time.monotonic() + STREAMING
    peer.settimeout(STREAMING)
    with suppress(OSError):
        while time.monotonic() < end:
            peer.send(zeros)
        peer.shutdown(socket.SHUT_WR)


def _serve(peer: socket.socket) -> float:
    """Answer pings; bytes/s of the stream that follows them."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while (ping := receive(peer, len(PING))) == PING:
        peer.sendall(ping)
    buffer, count, began = bytearray(CHUNK), 0, time.perf_counter()
    seconds = 0.0
    while seconds < 2 * STREAMING and (size := peer.recv_into(buffer)):
        count += size
        seconds = time.perf_counter() - began
    return count / seconds if seconds else 0.0
