"""Around every HTTP request: who asks, how long it may take, what is logged of it, and that it ends with its client."""

import asyncio
import json
import secrets
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from m3dist.gateway.errors import BadRequest, body_for
from m3dist.gateway.limits import Bodies, Keys, names_this_machine
from m3dist.gateway.log import note
from m3dist.gateway.metrics import Metrics
from m3dist.gateway.ranks import STREAMS, Stream

FREE = ("/health",)  # paths that need no key
GONE = 499  # in log and metrics, for clients that left before the response began; nginx' number
SHOWN = 200  # characters of a path that are logged
COMMENT_SECONDS = 10.0  # without an event, after which a stream gets a comment, so that nobody on the way closes it
COMMENT = b": keep-alive\n\n"
OVERTIME = 30.0  # seconds beyond a request's limit after which it is cut off, if it has not ended by itself
RETRY_AFTER = "10"  # seconds

Scope = Any  # as ASGI has them
Receive = Any
Send = Any


class Access:
    """The outermost ASGI application. Sets request.state.client (for fairness) and request.state.id."""

    def __init__(self, app: Any, keys: Keys, metrics: Metrics, request_limit: float, local: bool):
        """`local`: only programs of this machine may ask, and no page that a browser on it shows."""
        self.open = 0  # requests that are being answered, but for those of FREE
        self._app, self._keys, self._metrics = app, keys, metrics
        self._limit, self._local = request_limit + OVERTIME, local
        self._bodies = Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, send)
        counted = scope["path"] not in FREE
        self.open += counted
        token = STREAMS.set(exchange.streams)
        try:
            await self._answer(exchange, receive)
        finally:
            STREAMS.reset(token)
            self.open -= counted
            exchange.close()
            self._metrics.responses.labels(exchange.status).inc()

    async def _answer(self, exchange: "Exchange", receive: Receive) -> None:
        name = self._keys.name_of(exchange.scope["headers"])
        if name is None and exchange.scope["path"] not in FREE:
            challenge = {"www-authenticate": "Bearer"}
            await exchange.refuse(401, "a valid API key is needed: Authorization: Bearer KEY, or x-api-key", challenge)
            return
        if self._local and not names_this_machine(exchange.scope["headers"]):
            told = "without API keys this server answers to localhost and to addresses only; see m3dist serve --api-key"
            await exchange.refuse(403, told)
            return
        exchange.identify(name)
        body = None
        try:
            body = await self._bodies.read(exchange.scope, receive)
            if body is not None:
                await self._run(exchange, body, receive)
        except BadRequest as error:
            await exchange.refuse(
                error.status, error.message, {"retry-after": RETRY_AFTER} if error.status == 503 else {}
            )
        finally:
            self._bodies.give_back(body)

    async def _run(self, exchange: "Exchange", body: bytes, receive: Receive) -> None:
        """The application, until it has answered, or the client is gone, or the time is over."""
        gone = asyncio.create_task(_until_gone(receive))
        answer = asyncio.create_task(self._app(exchange.scope, _replayed(body, gone), exchange.send))
        try:
            await asyncio.wait({answer, gone}, timeout=self._limit, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not gone.done():
                exchange.cut_off = True
        finally:
            late = await _ended(answer)
            gone.cancel()
        if isinstance(late, Exception):
            note("error", request=exchange.id, error=type(late).__name__, at=_places(late))
            await exchange.refuse(500, "internal error")
        elif exchange.cut_off:
            await exchange.refuse(504, "the answer took too long")


async def _ended(answer: "asyncio.Task[None]") -> BaseException | None:
    """End it, if it has not ended; what it raised."""
    answer.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait({answer})
    return None if answer.cancelled() or not answer.done() else answer.exception()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replayed(body: bytes, gone: "asyncio.Task[None]") -> Receive:
    """`receive` for the application: the body as a whole, then the client's leaving."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Mapping[str, Any]:
        for message in messages:
            return message
        await asyncio.wait({gone})
        return {"type": "http.disconnect"}

    return receive


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send):
        self.scope, self.id = scope, f"req_{secrets.token_hex(12)}"
        self.status: int = GONE  # of the response, once it has begun
        self.streams: list[Stream] = []
        self.cut_off = False
        self._send, self._sending = send, asyncio.Lock()
        self._since = self._last = time.monotonic()
        self._between_events = True
        self._comments: asyncio.Task[None] | None = None
        self.client = (scope.get("client") or ("?", 0))[0]
        scope.setdefault("state", {}).update(client=self.client, id=self.id)

    def identify(self, key: str | None) -> None:
        """By its key and its address: people share keys, and share addresses."""
        if key:
            self.client = f"{key}@{self.client}"
            self.scope["state"]["client"] = self.client

    async def send(self, message: dict[str, Any]) -> None:
        """As the application sees it."""
        async with self._sending:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                # As OpenAI's clients look for it, and as Anthropic's do.
                named = [(name, self.id.encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message.get("headers", []), *named]}
            else:
                self._note_events(message)
            await self._send(message)
            self._last = time.monotonic()
        if message["type"] == "http.response.start" and _is_event_stream(message["headers"]):
            self._comments = asyncio.create_task(self._comment())

    def _note_events(self, message: Mapping[str, Any]) -> None:
        if body := message.get("body", b""):
            self._between_events = body.endswith(b"\n\n")
        if not message.get("more_body") and self._comments:
            self._comments.cancel()

    async def _comment(self) -> None:
        """Comments between events, where these are long in coming."""
        while True:
            await asyncio.sleep(max(0.0, self._last + COMMENT_SECONDS - time.monotonic()))
            async with self._sending:
                if time.monotonic() >= self._last + COMMENT_SECONDS:
                    if self._between_events:
                        await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                    self._last = time.monotonic()

    async def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """An error, where the response has not begun; where it has, the client sees that it breaks off."""
        if self.status != GONE:
            return
        body = json.dumps(body_for(self.scope["path"], status, message)).encode()
        told = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        pairs = [(name.encode(), value.encode()) for name, value in told.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """The response is complete or broken off: what still runs for it is cancelled, and the line is logged."""
        if self._comments:
            self._comments.cancel()
        for stream in self.streams:
            stream.cancel()
        note(
            "access",
            request=self.id,
            client=self.client,
            method=self.scope["method"],
            path=self.scope["path"][:SHOWN],
            status=self.status,
            seconds=round(time.monotonic() - self._since, 3),
            tokens_in=sum(len(stream.request.prompt) for stream in self.streams),
            tokens_out=sum(len(stream.emitted) for stream in self.streams),
        )


def _is_event_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def _places(error: BaseException) -> list[str]:
    """Where it was raised; not its message, which may quote a prompt."""
    return [f"{at.filename}:{at.lineno} {at.name}" for at in traceback.extract_tb(error.__traceback__)[-5:]]
