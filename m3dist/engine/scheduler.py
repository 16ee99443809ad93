"""Which rows compute what in the next step, and in which pages. No MLX, no clock: a function of what it was told.

A request becomes a *row* when it is admitted: its prompt goes into the cache in pieces, then it takes a token a step.
Steps are planned one ahead: the tokens of the step before are not known yet, only which rows get one. An end by length
is seen coming. An end by a stop token is seen a step late: the row's next result is ignored. What that step still
writes to the row's pages does no harm to whoever has them next, because devices compute the steps in order.

Between clients it is round robin, and where rows are scarce they go to who has fewer of them; for each client it is
first come, first served. Every running row takes its token in every step; of prompts a step takes as many tokens beside
that as its budget allows.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from m3dist.engine.pages import Pages, page_keys
from m3dist.engine.request import Request, RequestError
from m3dist.sampling import Sampling

OPENED = 2**20  # values that the openings of a step tell of tokens, after which it opens no more: some 30 MB as JSON


@dataclass(frozen=True)
class Opening:
    """A row begins, or begins again after it gave its pages away. `seen_prompt`: the tokens that the prompt has, each
    once; `seen_output`: the answer's so far, each as often as it came; only where a penalty counts them."""

    row: int  # its request's id
    sampling: Sampling
    seen_prompt: tuple[int, ...] = ()
    seen_output: tuple[int, ...] = ()
    masked: bool = False  # by a grammar: its steps wait for the mask

    @property
    def values(self) -> int:
        """What it tells of tokens: it is as long as this says, whatever the prompt's length."""
        return len(self.seen_prompt) + len(self.seen_output) + len(self.sampling.logit_bias)


@dataclass(frozen=True)
class Piece:
    """`tokens` of a row's prompt, from position `start` on, to be taken into the cache. A row that begins again has
    the answer so far in its prompt. `last`: the logits of the piece's last token give the row's next token."""

    row: int
    start: int
    tokens: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class Step:
    """What all ranks compute next, in this order: forget the rows of `close`, know those of `open`, append `pages` to
    the rows' tables, take in `prefill` (one batch, padded on the right), then `decode`: each of these rows takes in the
    token it sampled last. `counts`: for each row that samples, the answer's tokens before the one it samples."""

    close: tuple[int, ...]
    open: tuple[Opening, ...]
    pages: Mapping[int, tuple[int, ...]]  # shared ones too, when a row opens
    prefill: tuple[Piece, ...]
    decode: tuple[int, ...]
    counts: Mapping[int, int]

    @property
    def sampled(self) -> tuple[int, ...]:
        """The rows that get a token from this step: those of last pieces, then those of decode."""
        return (*(piece.row for piece in self.prefill if piece.last), *self.decode)

    def to_json(self) -> list[Any]:
        """Lists, in the order of the fields; the counts in the order of `sampled`."""
        return [
            self.close,
            [(o.row, o.sampling.to_json(), o.seen_prompt, o.seen_output, o.masked) for o in self.open],
            list(self.pages.items()),
            [(p.row, p.start, p.tokens, p.last) for p in self.prefill],
            self.decode,
            [self.counts[row] for row in self.sampled],
        ]

    @classmethod
    def from_json(cls, values: list[Any]) -> "Step":
        close, opened, pages, prefill, decode, counts = values
        step = cls(
            close=tuple(close),
            open=tuple(
                Opening(row, Sampling.from_json(sampling), tuple(prompt), tuple(output), masked)
                for row, sampling, prompt, output, masked in opened
            ),
            pages={row: tuple(numbers) for row, numbers in pages},
            prefill=tuple(Piece(row, start, tuple(tokens), last) for row, start, tokens, last in prefill),
            decode=tuple(decode),
            counts={},
        )
        return cls(**vars(step) | {"counts": dict(zip(step.sampled, counts, strict=True))})


@dataclass(frozen=True)
class Started:
    """The request is a row now; `cached` of its prompt's tokens were in the cache. Once more after each preemption."""

    id: int
    cached: int


@dataclass(frozen=True)
class Token:
    id: int
    token: int


@dataclass(frozen=True)
class Ended:
    """`reason`: "stop" or "length"."""

    id: int
    reason: str


Event = Started | Token | Ended


@dataclass(eq=False)
class Row:
    """A request on its way: waiting (no table), with its prompt partly in the cache, or decoding."""

    request: Request
    limit: int  # tokens of the whole answer
    tokens: list[int]  # the prompt and the answer, as far as they are known
    sampled: int  # tokens of the answer, those included that steps under way will give
    keys: list[bytes]  # of the full pages of `tokens`
    seen: tuple[int, ...]  # Opening.seen_prompt, found once: a long prompt takes longer than planning may
    awaited: int = 0  # tokens that steps under way will give
    ended: bool = False
    table: list[int] = field(default_factory=list)
    length: int = 0  # tokens in the cache, once the steps planned so far are done; 0 while it waits
    goal: int = 0  # tokens to take in before it decodes
    kept: int = 0  # of its pages are full, their tokens known, and kept under their keys

    @property
    def id(self) -> int:
        return self.request.id

    @property
    def unfinished(self) -> bool:
        return self.sampled < self.limit


@dataclass(eq=False)
class Client:
    """What one client waits for. `started` is the row whose prompt is partly in the cache: at most one of a client,
    as its next request starts when the whole prompt is."""

    started: Row | None = None
    waiting: deque[Row] = field(default_factory=deque)


class Batch:
    """The pieces of a step: rows times longest at most `budget` tokens, and at most half of that padding."""

    def __init__(self, budget: int):
        self.budget = budget
        self.pieces: list[Piece] = []
        self.rows: list[Row] = []
        self._longest = self._total = 0

    @property
    def full(self) -> bool:
        return (len(self.rows) + 1) * max(self._longest, 1) > self.budget

    def fit(self, missing: int) -> int:
        """How many of the `missing` tokens of a prompt go into this step: beside others all of them or none, so that
        long prompts are computed alone, in pieces as large as they can be."""
        if not self.rows:
            return min(missing, self.budget)
        padded = (len(self.rows) + 1) * max(self._longest, missing)
        return missing if padded <= self.budget and padded <= 2 * (self._total + missing) else 0

    def add(self, row: Row, taken: int) -> None:
        tokens = tuple(row.tokens[row.length : row.length + taken])
        self.pieces.append(Piece(row.id, row.length, tokens, last=row.length + taken == row.goal))
        self.rows.append(row)
        self._longest, self._total = max(self._longest, taken), self._total + taken


class Scheduler:
    """Plans steps for at most `rows` rows at a time. A step takes in at most `chunk` tokens of prompts, padding
    included, or `busy_chunk` beside rows that decode. `context`: the most tokens of a prompt and its answer; never
    more than all pages hold, so that a row alone always gets to its end."""

    def __init__(self, pages: Pages, rows: int, chunk: int, busy_chunk: int, context: int):
        self.pages, self.most_rows, self.chunk, self.busy_chunk = pages, rows, chunk, busy_chunk
        self.context = min(context, pages.capacity)
        self.steps = self.hits = self.misses = 0  # steps planned; tokens of prompts found in the cache, and not found
        self._requests: dict[int, Row] = {}  # all that have not ended
        self._rows: dict[int, Row] = {}  # those admitted, in that order
        self._clients: OrderedDict[str, Client] = OrderedDict()  # those with work waiting or started; next first
        self._under_way: deque[tuple[Step, list[Row]]] = deque()  # each with the rows that it gives tokens
        self._closed: list[int] = []  # since the last step
        self._openings: list[Opening] = []
        self._tables: dict[int, list[int]] = {}  # pages appended to rows' tables in the step that is being planned
        self._events: list[Event] = []
        self._stuck = False  # the next request could not be admitted, and nothing has changed since

    def submit(self, request: Request) -> None:
        """The request waits its turn. Raises RequestError where its id is taken, or nothing of `context` is left."""
        if request.id in self._requests:
            raise RequestError(f"id: {request.id} is being computed already")
        if len(request.prompt) >= self.context:
            raise RequestError(f"prompt: {len(request.prompt)} tokens of a context of {self.context}")
        limit = min(request.max_tokens, self.context - len(request.prompt))
        if len(request.emitted) >= limit:
            self._events.append(Ended(request.id, "length"))
            return
        tokens = [*request.prompt, *request.emitted]
        seen = tuple(sorted(set(request.prompt))) if request.sampling.penalizes_prompt else ()
        row = Row(request, limit, tokens, len(request.emitted), page_keys(tokens, self.pages.page_size), seen)
        self._requests[row.id] = row
        self._clients.setdefault(request.client, Client()).waiting.append(row)

    def cancel(self, id: int) -> None:
        """The request is no more, without an event. Unknown ids are ignored: it may just have ended."""
        if id in self._requests:
            self._end(self._requests[id])

    def plan(self) -> Step | None:
        """The next step, while those planned before and not `took` yet are under way. None: nothing to compute, before
        the tokens of a step under way are known or a request comes; rows closed until then are in a later step."""
        decode = self._decode()
        batch = Batch(self.busy_chunk if decode else self.chunk)
        self._fill(batch)
        if not decode and not batch.pieces:
            return None
        sampling = [row for row, piece in zip(batch.rows, batch.pieces) if piece.last] + decode
        step = Step(
            close=tuple(self._closed),
            open=tuple(self._openings),
            pages={id: tuple(pages) for id, pages in self._tables.items()},
            prefill=tuple(batch.pieces),
            decode=tuple(row.id for row in decode),
            counts={row.id: row.sampled for row in sampling},
        )
        self._closed, self._openings, self._tables = [], [], {}
        self._advance(batch, decode, sampling)
        self._under_way.append((step, sampling))
        self.steps += 1
        return step

    def took(self, step: Step, tokens: Mapping[int, int]) -> list[Event]:
        """The tokens that `step`, the oldest under way, sampled: row -> token. Returns all events since the last call.

        Raises ValueError for a step that is not the oldest under way.
        """
        if not self._under_way or self._under_way[0][0] is not step:
            raise ValueError("steps are taken in the order in which they were planned")
        for row in self._under_way.popleft()[1]:
            row.awaited -= 1
            if row.ended:
                continue
            if not row.table:  # preempted: it waits for this token
                self._stuck = False
            token = tokens[row.id]
            row.tokens.append(token)
            self._keep(row)
            if token in row.request.stop_ids:
                self._end(row, "stop")
                continue
            self._events.append(Token(row.id, token))
            if len(row.tokens) == len(row.request.prompt) + row.limit:
                self._end(row, "length")
        return self.drain_events()

    def drain_events(self) -> list[Event]:
        """What happened since events were last given out. `took` calls it; else it is for when `plan` gives None."""
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, Any]:
        """As the link to the gateway has them."""
        pages = self.pages
        return {
            "running": len(self._rows),
            "waiting": sum(len(client.waiting) for client in self._clients.values()),
            "pages": {"total": pages.count - 1, "used": pages.used, "cached": pages.cached},
            "prefix": {"hits": self.hits, "misses": self.misses},
            "steps": self.steps,
        }

    def _decode(self) -> list[Row]:
        """The rows that take a token in this step. Each has a page for it, if need be one of the row admitted last."""
        decode: list[Row] = []
        for row in list(self._rows.values()):
            if row.length < row.goal or not row.unfinished:
                continue
            if row.length == len(row.table) * self.pages.page_size:
                while not self.pages.available and row.table:
                    self._preempt(next(reversed(self._rows.values())))
                if not row.table:  # it was the last itself
                    break
                self._append(row, [self.pages.take()])
            decode.append(row)
        return decode

    def _fill(self, batch: Batch) -> None:
        """Puts prompts into the batch, one client's after another's. Whose does not fit comes early the next time."""
        if not self._admits and all(row.length >= row.goal for row in self._rows.values()):
            return  # however many wait
        names = deque(self._clients)
        while names and not batch.full:
            name = names.popleft()
            client = self._clients[name]
            row = client.started or self._admit(client, batch)
            if row is None or not (taken := batch.fit(row.goal - row.length)):
                continue
            batch.add(row, taken)
            client.started = row if row.length + taken < row.goal else None
            if client.started or client.waiting:
                self._clients.move_to_end(name)
                names.append(name)
            else:
                del self._clients[name]

    @property
    def _admits(self) -> bool:
        return len(self._rows) < self.most_rows and not self._stuck

    def _admit(self, client: Client, batch: Batch) -> Row | None:
        """Makes a row of the client's next request, if it can go into this batch and memory has room for it."""
        if not self._admits or not client.waiting or sum(opening.values for opening in self._openings) >= OPENED:
            return None
        row = client.waiting[0]
        if not self._has_turn(row.request.client):
            return None
        size = self.pages.page_size
        row.keys += page_keys(row.tokens, size, row.keys)  # it may have got tokens since it was preempted
        most = (len(row.tokens) - 1) // size  # the last token is computed in any case
        shared = self.pages.find(row.keys[:most])
        if len(shared) < most and self._computed_by_another(len(shared), row.keys[len(shared)]):
            return None
        if row.awaited or not self._has_room(row, shared):
            self._stuck = True  # all others wait too, lest it wait for ever
            return None
        if not batch.fit(len(row.tokens) - len(shared) * size):
            return None
        self._open(client.waiting.popleft(), shared)
        return row

    def _has_turn(self, name: str) -> bool:
        """Whether a row for this client leaves one for each of the others that wait to begin and have fewer: a client
        with many requests, or with long answers, would get nearly all rows by taking turns."""
        held = Counter(row.request.client for row in self._rows.values())
        if not held[name]:
            return True
        others = (other for other, client in self._clients.items() if client.waiting and not client.started)
        return len(self._rows) + sum(held[other] < held[name] for other in others) < self.most_rows

    def _computed_by_another(self, number: int, key: bytes) -> bool:
        """Whether a row is about to compute the page that is its `number`-th and has this key."""
        return any(row.kept <= number < len(row.keys) and row.keys[number] == key for row in self._rows.values())

    def _has_room(self, row: Row, shared: list[int]) -> bool:
        """Whether there are pages for all known tokens and one more, with one to spare for each row there is."""
        most = self.pages.cover(len(row.request.prompt) + row.limit - 1)  # the last token is not taken in
        missing = min(self.pages.cover(len(row.tokens)) + 1, most) - len(shared)
        return missing + self.pages.idle_among(shared) + len(self._rows) <= self.pages.available

    def _open(self, row: Row, shared: list[int]) -> None:
        """The request becomes a row, with pages for all its tokens, the first of them `shared` ones."""
        prompt, sampling = row.request.prompt, row.request.sampling
        self.pages.hold(shared)
        self._rows[row.id] = row
        row.goal = len(row.tokens)
        row.kept, row.length = len(shared), len(shared) * self.pages.page_size
        self._append(row, shared + [self.pages.take() for _ in range(self.pages.cover(row.goal) - len(shared))])
        self._openings.append(
            Opening(
                row.id,
                sampling,
                seen_prompt=row.seen,
                seen_output=tuple(row.tokens[len(prompt) :]) if sampling.penalizes_answer else (),
                masked=row.request.grammar is not None,
            )
        )
        self.hits, self.misses = self.hits + row.length, self.misses + row.goal - row.length
        self._events.append(Started(row.id, min(row.length, len(prompt))))

    def _append(self, row: Row, pages: list[int]) -> None:
        row.table += pages
        self._tables.setdefault(row.id, []).extend(pages)

    def _advance(self, batch: Batch, decode: list[Row], sampling: list[Row]) -> None:
        """The rows as they are once the step is done. What it fills is for others from the next step on."""
        for row, piece in zip(batch.rows, batch.pieces):
            row.length += len(piece.tokens)
        for row in decode:
            row.length += 1
        for row in sampling:
            row.sampled += 1
            row.awaited += 1
        for row in batch.rows + decode:
            self._keep(row)

    def _keep(self, row: Row) -> None:
        """Keeps the row's pages that are full and known by now under their keys."""
        size = self.pages.page_size
        full = min(row.length, len(row.tokens)) // size
        if full > row.kept:
            row.keys += page_keys(row.tokens, size, row.keys)
            for number in range(row.kept, full):
                self.pages.keep(row.table[number], row.keys[number])
            row.kept = full

    def _preempt(self, row: Row) -> None:
        """The row gives its pages away, to be admitted again first, if the token it awaits is not its last."""
        self._close(row)
        self._clients.setdefault(row.request.client, Client()).waiting.appendleft(row)
        self._clients.move_to_end(row.request.client, last=False)

    def _end(self, row: Row, reason: str | None = None) -> None:
        row.ended = True
        del self._requests[row.id]
        client = self._clients.get(row.request.client)
        if row.table:
            self._close(row)
        elif client and row in client.waiting:
            client.waiting.remove(row)
            self._stuck = False
        if client and not client.started and not client.waiting:
            del self._clients[row.request.client]
        if reason:
            self._events.append(Ended(row.id, reason))

    def _close(self, row: Row) -> None:
        """The row is none any more. A step under way may still write to its pages, before any later step does."""
        del self._rows[row.id]
        self.pages.release(row.table, row.keys[: row.kept])
        row.table, row.length = [], 0
        self._closed.append(row.id)
        self._stuck = False
        client = self._clients.get(row.request.client)
        if client and client.started is row:
            client.started = None
