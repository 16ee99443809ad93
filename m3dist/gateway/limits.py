"""What a client may send, how much of it and how slowly; and who may send at all."""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import sys
from collections.abc import Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from m3dist.gateway.errors import BadRequest, body_for

HEADERS = 32 * 2**10  # bytes of a request's line and headers
BODY = 16 * 2**20  # bytes of a body
BODIES = 256 * 2**20  # bytes of all bodies whose requests are not answered yet
CONNECTIONS = 1000
HEADERS_SECONDS = 20.0  # for the line and headers, from the connection's first moment or the request's first byte
BODY_SECONDS = 60.0
WRITE_SECONDS = 60.0  # for a client to read the 48 KiB between asyncio's high and low water marks
IDLE_SECONDS = 75.0  # between two requests of a connection

Headers = Sequence[tuple[bytes, bytes]]


class Keys:
    """The API keys; with none, anybody may ask."""

    def __init__(self, keys: Sequence[str] = ()):
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        """Whether one is needed."""
        return bool(self._digests)

    def name_of(self, headers: Headers) -> str | None:
        """Which key `headers` bring ("key-1", by order), "" where none is needed; None: the client may not ask.

        The time this takes says nothing about a key: digests are compared, in constant time, and all of them.
        """
        if not self._digests:
            return ""
        given = _digest(_key_in(headers))
        found = [number for number, digest in enumerate(self._digests, 1) if hmac.compare_digest(digest, given)]
        return f"key-{found[0]}" if found else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key_in(headers: Headers) -> bytes:
    """From `Authorization: Bearer`, as OpenAI's clients send it, or `x-api-key`, as Anthropic's do."""
    values = dict(headers)
    scheme, _, key = values.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else values.get(b"x-api-key", b"")


def names_this_machine(headers: Headers) -> bool:
    """Whether the Host header is localhost or an address.

    A page can have its own name resolved to 127.0.0.1, and then read our answers as its own origin's: it cannot have
    an address.
    """
    host = dict(headers).get(b"host", b"").decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True


class Bodies:
    """Reads bodies, and bounds the memory that all of them take."""

    def __init__(self) -> None:
        self.held = 0  # bytes

    async def read(self, scope: Any, receive: Any) -> bytes | None:
        """The body of the request; None where the client has gone. `give_back` must follow.

        Raises BadRequest with status 408, 413, 431 or 503.
        """
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADERS:
            raise BadRequest(f"the headers are longer than {HEADERS} bytes", status=431)
        if int(headers.get(b"content-length", b"0")) > BODY:
            raise too_large()
        try:
            return await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise BadRequest(f"the request's body took longer than {BODY_SECONDS:g} s", status=408) from None

    async def _read(self, receive: Any) -> bytes | None:
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.give_back(body)
                    return None
                body += message.get("body", b"")
                self.held += len(message.get("body", b""))
                if len(body) > BODY:
                    raise too_large()
                if self.held > BODIES:
                    raise BadRequest("too many large requests at a time; try again later", status=503)
                if not message.get("more_body"):
                    break
        except BaseException:
            self.give_back(body)
            raise
        return bytes(body)

    def give_back(self, body: bytes | bytearray | None) -> None:
        """The request is answered."""
        self.held -= len(body or b"")


def too_large() -> BadRequest:
    return BadRequest(f"the request's body is larger than {BODY} bytes", status=413)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with limits for those who send or read too slowly, and errors in JSON."""

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(503, "too many connections; try again later")
        else:
            self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_timer, self._write_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_headers()

    def _time_headers(self) -> None:
        """Run the timer while a request's headers are awaited that have begun, or must now begin; and while a body
        comes in that was refused, which is let by so that the client reads why."""
        awaited = self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE
        awaited = awaited and not self.transport.is_closing()
        if awaited and self._headers_timer is None:
            late = f"the request's headers took longer than {HEADERS_SECONDS:g} s"
            self._headers_timer = self.loop.call_later(HEADERS_SECONDS, self._refuse, 408, late)
        elif not awaited and self._headers_timer:
            self._headers_timer.cancel()
            self._headers_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not close(), which would wait for the client to read the rest.
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer:
            self._write_timer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this where it handles h11's error, which knows a better status."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            self._refuse(431, f"the headers are longer than {HEADERS} bytes")
        else:
            self._refuse(status, f"not HTTP/1.1: {error}" if error else msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self.transport.is_closing():
            self.transport.abort()  # a response has begun
            return
        body = json.dumps(body_for("", status, message)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES.get(status, b""))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
