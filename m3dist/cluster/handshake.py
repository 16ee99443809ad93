"""Proving to each other, over a new connection, that one knows a secret, without saying it. No MLX.

Each end chooses random bytes and wants HMAC-SHA256 (RFC 2104) of them and of the other's role: so no answer serves
twice, nor in the other direction. Whoever listens proves nothing to one who has not proved himself first.
"""

import hmac
import secrets
import socket
import time
from contextlib import suppress

NONCE, DIGEST = 32, 32  # bytes
LISTENS, CONNECTS = b"listen", b"connect"


def admits(peer: socket.socket, secret: str, seconds: float) -> bool:
    """As the one who listens: whether `peer` has proved within `seconds` in all that it knows the secret."""
    end, ours = time.monotonic() + seconds, secrets.token_bytes(NONCE)
    with suppress(OSError, EOFError):
        _send(peer, ours, end)
        answer = receive(peer, DIGEST + NONCE, end)
        if hmac.compare_digest(answer[:DIGEST], proof(secret, CONNECTS, ours)):
            _send(peer, proof(secret, LISTENS, answer[DIGEST:]), end)
            return True
    return False


def is_admitted(peer: socket.socket, secret: str, seconds: float) -> bool:
    """As the one who connects: whether the listener is the one that was meant.

    Raises OSError, or EOFError where it closes the connection: it does not admit us, or is another program.
    """
    end, ours = time.monotonic() + seconds, secrets.token_bytes(NONCE)
    theirs = receive(peer, NONCE, end)
    _send(peer, proof(secret, CONNECTS, theirs) + ours, end)
    return hmac.compare_digest(receive(peer, DIGEST, end), proof(secret, LISTENS, ours))


def proof(secret: str, role: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), role + nonce, "sha256")


def receive(peer: socket.socket, size: int, end: float | None = None) -> bytes:
    """Exactly `size` bytes, and not one more, by the time `end` (time.monotonic's).

    Raises EOFError where there are fewer, TimeoutError and OSError.
    """
    data = b""
    while len(data) < size:
        _allow(peer, end)
        piece = peer.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _send(peer: socket.socket, data: bytes, end: float) -> None:
    _allow(peer, end)
    peer.sendall(data)


def _allow(peer: socket.socket, end: float | None) -> None:
    if end is not None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        peer.settimeout(left)
