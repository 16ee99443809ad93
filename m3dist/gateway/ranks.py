"""The ranks as the gateway sees them: every request until it is answered, whatever becomes of them meanwhile.

A request lives here: its prompt, and its answer so far. Each life of the ranks (a connection of rank 0, link.py) is
handed all that is unfinished, and goes on after the tokens that are there. A token is shown once, when it comes first.
"""

import asyncio
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from m3dist.engine.link import TEXT_FILES
from m3dist.engine.request import Request
from m3dist.errors import M3Error
from m3dist.gateway.link import Link, LinkLost, listed, mapped, number, whole
from m3dist.gateway.metrics import Metrics
from m3dist.sampling import Sampling
from m3dist.text import Text, TextError

FALLS = 3  # falls in a row that a request may be part of without a token in between: it may be what kills the ranks
UNREAD = 1 << 17  # tokens, likeliest ones counted, that may wait for a reader: some 20 MB
LEAST_LOGPROB = -9999.0  # what OpenAI's API says for a token that was impossible
RETRY = (1.0, 300.0)  # seconds, least and most that a client is told to wait before it asks again
NOT_TAKING = ("starting", "loading", "failed", "draining")  # phases in which no new request is taken

# Where the streams that are begun by what runs here are noted (access.py): they end with the HTTP request.
STREAMS: ContextVar["list[Stream] | None"] = ContextVar("streams", default=None)


class Busy(M3Error):
    """The queue is full, or one client's share of it. `retry_after`: seconds."""

    def __init__(self, retry_after: float, who: str = "too many requests"):
        super().__init__(f"{who} are waiting; try again later")
        self.retry_after = retry_after


class Unavailable(M3Error):
    """No request is taken now; says why. `retry_after`: seconds."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class RequestFailed(M3Error):
    """A request that was taken and will not be answered; says why. `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int = 500):
        super().__init__(message)
        self.message, self.status = message, status


@dataclass
class State:
    """What the ranks are doing."""

    phase: str = "starting"  # starting, loading, ready, restarting, failed or draining
    fraction: float | None = None  # of the weights' bytes, while they are loaded
    reason: str | None = None  # why the ranks are not ready, if they were, or failed
    restarts: int = 0  # how often they were started again


@dataclass(frozen=True)
class Work:
    """What the ranks are to compute: an answer to `prompt`. Everything is valid for this model."""

    prompt: Sequence[int]
    max_tokens: int  # >= 1
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    grammar: str | None = None  # in llguidance's Lark


class Token(NamedTuple):
    """A token of an answer; with log probabilities if the request asked for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None  # (token, log probability), likeliest first


class Stream:
    """The answer to one request, token by token: `async for token in stream`, by one reader.

    The iteration raises RequestFailed after the tokens that came, and ends after `cancel`.
    """

    def __init__(self, request: Request, ended: Callable[["Stream", str], None]):
        """`ended` is called once, with "stop", "length", "cancelled" or "failed"."""
        self.request = request
        self.emitted: list[int] = list(request.emitted)
        self.cached: int | None = None  # tokens of the prompt that the ranks had in their cache; None: not begun yet
        self.finish: str | None = None  # "stop" or "length" after the end
        self.handed = self.begun = False  # to this life of the ranks; by it
        self.falls = 0  # that it was part of since its last token
        self._ended = ended
        self._over = False
        self._error: RequestFailed | None = None
        self._unread: deque[Token] = deque()
        self._unread_size = 0
        self._changed = asyncio.Event()
        self._since, self._first = time.monotonic(), True

    @property
    def suspect(self) -> bool:
        """Whether one more fall would make it the one that is taken to kill the ranks."""
        return self.falls >= FALLS - 1

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Token:
        while not self._unread:
            if self._error:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        token = self._unread.popleft()
        self._unread_size -= _size(token)
        return token

    def cancel(self) -> None:
        """The answer is no longer wanted. May be called again, and after the end."""
        self._unread.clear()
        self.end(None, "cancelled")

    def complete(self) -> None:
        """What came is the whole answer, whatever else the ranks would say. May be called again, and after the end."""
        self._unread.clear()
        self.end("stop", "stop")

    def take(self, token: Token, metrics: Metrics) -> None:
        """The ranks' next token."""
        now = time.monotonic()
        (metrics.first_token if self._first else metrics.each_token).observe(now - self._since)
        metrics.tokens_out.inc()
        self._since, self._first = now, False
        self.falls, self.begun = 0, True
        self.emitted.append(token.id)
        self._unread.append(token)
        self._unread_size += _size(token)
        self._changed.set()
        if self._unread_size > UNREAD:
            self.fail(RequestFailed("the client does not read its answer"))

    def end(self, finish: str | None, how: str) -> None:
        """No more tokens come."""
        if not self._over:
            self._over, self.finish = True, finish
            self._changed.set()
            self._ended(self, how)

    def fail(self, error: RequestFailed) -> None:
        if not self._over:
            self._error = error
            self.end(None, "failed")


def _size(token: Token) -> int:
    return 1 + len(token.top or ())


class Ranks:
    """Takes requests, and has the ranks answer them, over all their lives.

    `text` and `files` (the model's text files by name) are there once rank 0 has said hello, `facts` (its ready
    message) once the ranks were ready. For use in one event loop, by one thread.
    """

    def __init__(
        self,
        rows: int,
        queue: int,
        request_limit: float,
        metrics: Metrics | None = None,
        tell: Callable[[str], None] = lambda word: None,
    ):
        """Takes `rows` + `queue` requests at a time, each of which may take `request_limit` seconds.

        `tell` is called with "state" when it has changed (but for its fraction); in each life of the ranks with "ready"
        when they can compute, and with "answered" when they have given a token.
        """
        self.state = State()
        self.text: Text | None = None
        self.files: dict[str, str] = {}
        self.facts: dict[str, Any] | None = None
        self.stats: dict[str, Any] = {}
        self.metrics = metrics or Metrics()
        self.metrics.watch(lambda: self.waiting, lambda: self.running, lambda: self._computing)
        self._most, self._request_limit, self._tell = rows + queue, request_limit, tell
        self._rows = rows
        self._unfinished: dict[int, Stream] = {}  # in order of arrival
        self._limits: dict[int, asyncio.TimerHandle] = {}
        self._ids = itertools.count(1)
        self._link: Link | None = None
        self._computing = self._answered = False  # this life of the ranks has said that it is ready; has given a token
        self._hosts: list[str] = []
        self._loading_since = time.monotonic()
        self._starts = 0
        self._seconds = 1.0  # that a request took lately
        self._idle = asyncio.Event()
        self._idle.set()

    # -----------------------------------------------------------------------------------------------------------------
    # For those who ask

    @property
    def running(self) -> int:
        """Requests that the ranks have begun to compute."""
        return sum(stream.begun for stream in self._unfinished.values())

    @property
    def waiting(self) -> int:
        """Requests that they have not begun."""
        return len(self._unfinished) - self.running

    @property
    def takes_requests(self) -> bool:
        return self.state.phase not in NOT_TAKING

    @property
    def most(self) -> int:
        """Requests that are taken at a time."""
        return self._most

    def check(self, more: int = 1, client: str | None = None) -> None:
        """Raises Busy or Unavailable where `more` requests, of `client`, would not be taken now.

        A client that has more than half of all places gets no more, so that there are some for others.
        """
        if not self.takes_requests:
            raise Unavailable(self._why_not(), self._until_ready())
        retry_after = _within(self._seconds / self._rows, *RETRY)
        if len(self._unfinished) + more > self._most:
            raise Busy(retry_after)
        held = sum(stream.request.client == client for stream in self._unfinished.values())
        if more and 2 * held > self._most:
            raise Busy(retry_after, f"{held} requests of yours")

    def submit(self, work: Work, client: str) -> Stream:
        """Have `work` done for `client`, a name by which rows are shared out. Raises Busy and Unavailable."""
        self.check()
        request = Request(
            id=next(self._ids),
            client=client,
            prompt=tuple(work.prompt),
            max_tokens=work.max_tokens,
            stop_ids=tuple(work.stop_ids),
            sampling=work.sampling,
            grammar=work.grammar,
        )
        stream = Stream(request, self._ended)
        self._unfinished[request.id] = stream
        self._idle.clear()
        limit = RequestFailed(f"the answer took longer than {self._request_limit:g} s, this server's limit", 504)
        self._limits[request.id] = asyncio.get_running_loop().call_later(self._request_limit, stream.fail, limit)
        self.metrics.tokens_in.inc(len(request.prompt))
        if (noted := STREAMS.get()) is not None:
            noted.append(stream)
        self._hand_over()
        return stream

    def _why_not(self) -> str:
        state = self.state
        because = f": {state.reason}" if state.reason else ""
        if state.phase == "loading" and state.fraction is not None:
            return f"the model is being loaded, {state.fraction:.0%}"
        return {
            "starting": f"the server is starting{because}",
            "loading": "the model is being loaded",
            "failed": f"the server has given up{because}",
            "draining": "the server is ending",
        }[state.phase]

    def _until_ready(self) -> float:
        """Seconds, a guess."""
        if self.state.phase == "loading" and self.state.fraction:
            spent = time.monotonic() - self._loading_since
            return _within(spent * (1 - self.state.fraction) / self.state.fraction, *RETRY)
        return 10.0 if self.state.phase in ("starting", "loading") else 60.0

    def _ended(self, stream: Stream, how: str) -> None:
        id = stream.request.id
        del self._unfinished[id]
        limit = self._limits.pop(id)
        limit.cancel()
        if how in ("stop", "length"):
            taken = time.monotonic() - (limit.when() - self._request_limit)
            self._seconds += (taken - self._seconds) / 8
        if stream.handed and self._link:
            self._link.send({"cancel": id})
        self.metrics.requests.labels(how).inc()
        if not self._unfinished:
            self._idle.set()
        self._hand_over()

    # -----------------------------------------------------------------------------------------------------------------
    # From the supervisor

    def down(self, reason: str) -> None:
        """The ranks fell, or never came up; they will be started again."""
        self._fall(reason)

    def up(self) -> None:
        """The ranks are being started."""
        self._starts += 1
        if self._starts > 1:
            self.state.restarts += 1
            self.metrics.restarts.inc()
            self._tell("state")

    def failed(self, reason: str) -> None:
        """They will not be started again: no request can be answered."""
        self._fall(reason)
        self._enter("failed", reason=reason)
        self._fail_all(RequestFailed(f"the server has given up: {reason}", 503))

    async def drain(self, seconds: float) -> None:
        """Take no more requests, let those that run finish within `seconds`, then end the ranks' job."""
        self._enter("draining", reason=self.state.reason)
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            self._fail_all(RequestFailed("the server is ending", 503))
        if self._link:
            link, self._link = self._link, None  # its end will be no fall
            link.send({"stop": True})
            await link.flush()

    def _fail_all(self, error: RequestFailed) -> None:
        for stream in list(self._unfinished.values()):
            stream.fail(error)

    # -----------------------------------------------------------------------------------------------------------------
    # From rank 0

    async def live(self, link: Link) -> None:
        """One life of the ranks: returns when they fell."""
        if self._link is not None:  # the life before has not ended by itself
            self._fall("the ranks were started anew")
        self._link, reason = link, "the gateway failed over a message of rank 0"  # a mistake of ours
        try:
            while self._link is link:
                await self._take(await link.receive())
        except LinkLost as error:
            reason = str(error)
        finally:
            if self._link is link:
                self._fall(reason)

    async def _take(self, message: Mapping[str, Any]) -> None:
        """What rank 0 says. Raises LinkLost where it makes no sense."""
        kinds = {
            "tokens": self._take_tokens,
            "started": self._take_started,
            "ended": self._take_ended,
            "stats": self._take_stats,
            "loading": self._take_loading,
            "ready": self._take_ready,
        }
        if "hello" in message:
            await self._take_hello(mapped(message["hello"], "hello"))
        else:
            kind = next((kind for kind in kinds if kind in message), None)
            if kind is None or self._hosts == []:
                raise LinkLost(f"rank 0 sent what is no message: {str(message)[:80]}")
            kinds[kind](message)

    async def _take_hello(self, hello: Mapping[str, Any]) -> None:
        files = mapped(hello.get("files"), "hello: files")
        if not all(name in TEXT_FILES and isinstance(content, str) for name, content in files.items()):
            raise LinkLost("rank 0 sent files that are none of a model")
        hosts = [str(host) for host in listed(hello.get("hosts"), "hello: hosts")]
        if self.text is None:
            try:
                self.text = await asyncio.to_thread(load_text, files)
            except TextError as error:
                raise LinkLost(str(error)) from None
            self.files = dict(files)
        elif files != self.files:
            raise LinkLost("the ranks came back with other text files than before: the model was changed; start again")
        self._hosts = hosts or ["?"]
        self._loading_since = time.monotonic()
        self._enter("restarting" if self.facts else "loading", reason=self.state.reason)

    def _take_loading(self, message: Mapping[str, Any]) -> None:
        self.state.fraction = _within(number(message["loading"], "loading"), 0.0, 1.0)

    def _take_ready(self, message: Mapping[str, Any]) -> None:
        facts = mapped(message["ready"], "ready")
        for name in ("page_size", "pages", "context", "vocab_size", "rows"):
            whole(facts.get(name), f"ready: {name}", least=1)
        weights = [whole(size, "weights_bytes") for size in listed(facts.get("weights_bytes", []), "weights_bytes")]
        page_bytes = whole(facts["page_bytes"], "ready: page_bytes") if "page_bytes" in facts else None
        self.metrics.new_life(self._hosts, facts["page_size"], weights[: len(self._hosts)], page_bytes)
        self.facts, self._computing, self._answered = dict(facts), True, False
        self._enter("ready")
        self._tell("ready")
        self._hand_over()

    def _take_started(self, message: Mapping[str, Any]) -> None:
        stream = self._at_work(message["started"])
        cached = whole(message.get("cached", 0), "started: cached")
        if stream is not None:
            stream.begun = True
            if stream.cached is None:
                stream.cached = min(cached, len(stream.request.prompt))

    def _take_tokens(self, message: Mapping[str, Any]) -> None:
        for entry in listed(message["tokens"], "tokens"):
            id, token = _token(entry, self._vocab_size)
            stream = self._at_work(id)
            if stream is None:
                continue
            if len(stream.emitted) >= stream.request.max_tokens:
                raise LinkLost(f"rank 0 sent more tokens than request {id} has")
            was_suspect = stream.suspect
            stream.take(token, self.metrics)
            if not self._answered:
                self._answered = True
                self._tell("answered")
            if was_suspect:
                self._hand_over()

    def _take_ended(self, message: Mapping[str, Any]) -> None:
        stream, reason = self._at_work(message["ended"]), message.get("reason")
        if reason not in ("stop", "length", "error"):
            raise LinkLost(f"rank 0 sent {reason!r:.80} as the reason of an end")
        if stream is None:
            return
        if reason == "error":
            stream.fail(RequestFailed(str(message.get("message")), 400))
        else:
            stream.handed = False  # it is no longer with them
            stream.end(reason, reason)

    def _take_stats(self, message: Mapping[str, Any]) -> None:
        self.stats = mapped(message["stats"], "stats")
        self.metrics.take_stats(self.stats)

    def _at_work(self, id: Any) -> Stream | None:
        """The stream that this life was handed as `id`; None for one that is over here, a moment before there."""
        stream = self._unfinished.get(whole(id, "a request's id"))
        return stream if stream and stream.handed else None

    @property
    def _vocab_size(self) -> int:
        return self.facts["vocab_size"] if self.facts else 0

    # -----------------------------------------------------------------------------------------------------------------
    # Lives

    def _enter(self, phase: str, reason: str | None = None) -> None:
        """A new phase, unless the server is at its end."""
        if self.state.phase == "failed":
            return
        if self.state.phase != "draining" or phase == "failed":
            self.state.phase = phase
        self.state.fraction, self.state.reason = None, reason
        self._tell("state")

    def _hand_over(self) -> None:
        """Hand the ranks what they do not have yet, in order of arrival.

        Of the requests that may be what kills them one at a time, until it has had a token: so that only that one is
        part of the next fall.
        """
        if self._link is None or not self._computing:
            return
        trying = any(stream.handed and stream.suspect for stream in self._unfinished.values())
        for stream in self._unfinished.values():
            if stream.handed or (stream.suspect and trying):
                continue
            trying = trying or stream.suspect
            stream.handed = True
            self._link.send({"submit": replace(stream.request, emitted=tuple(stream.emitted)).to_json()})

    def _fall(self, reason: str) -> None:
        """This life of the ranks is over; or, where there is none, the reason is known."""
        if self._link is not None:
            self._link.close()
        self._link, self._computing = None, False
        self.metrics.end_life()
        suspects = set(self._part_of_fall())
        for stream in list(self._unfinished.values()):
            stream.falls += stream.request.id in suspects
            stream.handed = stream.begun = False
        self._enter("restarting" if self.facts else "starting", reason)
        for stream in list(self._unfinished.values()):
            if stream.falls >= FALLS:
                told = f"the ranks fell {FALLS} times in a row while they computed this request; last: {reason}"
                stream.fail(RequestFailed(told))
            elif len(stream.emitted) >= stream.request.max_tokens:  # only the word that it has ended was lost
                stream.end("length", "length")

    def _part_of_fall(self) -> Iterator[int]:
        """Requests that may have been its cause: what was begun; or, where nothing was, what was handed over."""
        handed = [stream for stream in self._unfinished.values() if stream.handed]
        begun = [stream for stream in handed if stream.begun]
        return (stream.request.id for stream in begun or handed)


def _token(entry: Any, vocab_size: int) -> tuple[Any, Token]:
    """An entry of a tokens message: [id, token] or [id, token, logprob, [[token, logprob], ...]]."""
    values = listed(entry, "a token")
    if len(values) not in (2, 4):
        raise LinkLost(f"rank 0 sent {values!r:.80} as a token")
    token = whole(values[1], "a token", below=vocab_size)
    if len(values) == 2:
        return values[0], Token(token)
    top = tuple(_likely(pair, vocab_size) for pair in listed(values[3], "likeliest tokens"))
    return values[0], Token(token, _logprob(values[2]), top)


def _likely(pair: Any, vocab_size: int) -> tuple[int, float]:
    if len(listed(pair, "a likely token")) != 2:
        raise LinkLost(f"rank 0 sent {pair!r:.80} as a likely token")
    return whole(pair[0], "a likely token", below=vocab_size), _logprob(pair[1])


def _logprob(value: Any) -> float:
    return LEAST_LOGPROB if value == float("-inf") else number(value, "a log probability")


def _within(value: float, least: float, most: float) -> float:
    return min(max(value, least), most)


def load_text(files: Mapping[str, str]) -> Text:
    """The text side of a model from its files by name, as Text.load reads them. Raises TextError."""
    with tempfile.TemporaryDirectory(prefix="m3dist-") as directory:
        for name, content in files.items():
            (Path(directory) / name).write_text(content, encoding="utf-8")
        return Text.load(directory)
