"""A device that computes a scheduler's steps without a model, and the answers it must come to."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from m3dist.engine.pages import Pages, page_keys
from m3dist.engine.request import Request
from m3dist.engine.scheduler import Ended, Event, Scheduler, Started, Step, Token

VOCABULARY = 7  # small, so that answers meet stop tokens and each other's pages


def chain(state: int, token: int) -> int:
    """What is in the cache at a token's position: it depends on all tokens up to this one."""
    return int.from_bytes(hashlib.blake2b(f"{state} {token}".encode(), digest_size=8).digest(), "little")


def states(tokens: Iterable[int]) -> list[int]:
    """What is in the cache after these tokens, position by position."""
    held, state = [], 0
    for token in tokens:
        state = chain(state, token)
        held.append(state)
    return held


def answer(request: Request, context: int) -> tuple[list[int], str]:
    """A token after the other, alone: the answer's new tokens, and why it ends."""
    tokens, state = list(request.emitted), (states([*request.prompt, *request.emitted]))[-1]
    while len(tokens) < min(request.max_tokens, context - len(request.prompt)):
        token = state % VOCABULARY
        if token in request.stop_ids:
            return tokens[len(request.emitted) :], "stop"
        tokens.append(token)
        state = chain(state, token)
    return tokens[len(request.emitted) :], "length"


class Device:
    """Pages of cells, rows with tables. Computes each step when it is planned, as a device's queue would."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.pages = scheduler, scheduler.pages
        self.cells: list[list[int | None]] = [[None] * self.pages.page_size for _ in range(self.pages.count)]
        self.tables: dict[int, list[int]] = {}
        self.held: dict[int, list[int]] = {}  # row -> what its cache must hold
        self.last: dict[int, int] = {}  # row -> the token sampled last
        self.sampled: dict[int, int] = {}  # rows that decode -> the answer's tokens so far

    def run(self, step: Step, known: Mapping[int, list[int]]) -> dict[int, int]:
        """The tokens sampled; `known`: of each request, prompt and answer as far as rank 0 knows."""
        for row in step.close:
            del self.tables[row], self.held[row]
            self.sampled.pop(row, None)
        for opening in step.open:
            assert opening.row not in self.tables
            self.tables[opening.row], self.held[opening.row] = [], []
        for row, pages in step.pages.items():
            assert 0 not in pages
            self.tables[row] += pages
        inputs = {piece.row: (piece.start, piece.tokens) for piece in step.prefill}
        for piece in step.prefill:
            if not self.held[piece.row]:  # what the pages of others must hold
                self.held[piece.row] = states(known[piece.row][: piece.start])
        inputs |= {row: (len(self.held[row]), (self.last[row],)) for row in step.decode}
        assert len(inputs) == len(step.prefill) + len(step.decode), "a row is computed once"
        for row, (start, tokens) in inputs.items():
            self.write(row, start, tokens)
        for row in inputs:
            self.check(row)
        self.last |= {row: self.held[row][-1] % VOCABULARY for row in step.sampled}
        self.sampled |= {row: step.counts[row] + 1 for row in step.sampled}
        return {row: self.last[row] for row in step.sampled}

    def write(self, row: int, start: int, tokens: Iterable[int]) -> None:
        assert start == len(self.held[row])
        state = self.held[row][-1] if start else 0
        size, others = self.pages.page_size, {page for r, table in self.tables.items() if r != row for page in table}
        for position, token in enumerate(tokens, start):
            page = self.tables[row][position // size]
            assert page not in others, "written by one, held by two"
            state = chain(state, token)
            self.cells[page][position % size] = state
            self.held[row].append(state)

    def check(self, row: int) -> None:
        """All that the row reads is what it thinks it is."""
        read = [cell for page in self.tables[row] for cell in self.cells[page]]
        assert read[: len(self.held[row])] == self.held[row]


class Simulation:
    """Rank 0 as the runner has it, one step ahead, with what must hold at any time."""

    def __init__(self, count: int, page_size: int, rows: int, chunk: int, busy_chunk: int, context: int = 10**6):
        self.scheduler = Scheduler(Pages(count, page_size), rows, chunk, busy_chunk, context)
        self.device = Device(self.scheduler)
        self.requests: dict[int, Request] = {}
        self.known: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.started: list[int] = []
        self.cached: dict[int, int] = {}  # of the first start
        self.steps: list[Step] = []
        self.under_way: list[tuple[Step, dict[int, int]]] = []

    def submit(self, request: Request) -> None:
        self.requests[request.id], self.answers[request.id] = request, []
        self.known[request.id] = [*request.prompt, *request.emitted]
        self.scheduler.submit(request)

    def cancel(self, id: int) -> None:
        self.scheduler.cancel(id)
        if id not in self.ends:
            self.ends[id] = "cancelled"

    def turn(self, ahead: int = 1) -> bool:
        """Plans a step, and takes those before it but `ahead`. False: nothing to do."""
        step = self.scheduler.plan()
        if step is not None:
            self.planned(step)
        if step is None and not self.under_way:
            self.told(self.scheduler.drain_events())
            return False
        while len(self.under_way) > (ahead if step else 0):
            before, tokens = self.under_way.pop(0)
            self.told(self.scheduler.took(before, tokens))
        return True

    def planned(self, step: Step) -> None:
        self.check_batch(step)
        self.check_openings(step)
        self.check_decode(step)
        sent = Step.from_json(json.loads(json.dumps(step.to_json())))
        assert sent == step
        self.under_way.append((step, self.device.run(sent, self.known)))
        self.steps.append(step)
        for row in step.sampled:
            assert step.counts[row] == len(self.device.held[row]) - len(self.requests[row].prompt)
        self.check_pages()

    def told(self, events: list[Event]) -> None:
        for event in events:
            assert event.id not in self.ends or self.ends[event.id] == "cancelled"
            if isinstance(event, Started):
                assert 0 <= event.cached <= len(self.requests[event.id].prompt)
                self.started.append(event.id)
                self.cached.setdefault(event.id, event.cached)
            elif isinstance(event, Token):
                self.answers[event.id].append(event.token)
                self.known[event.id].append(event.token)
            elif isinstance(event, Ended):
                self.ends[event.id] = event.reason

    def finish(self) -> None:
        """Until nothing is left; then every answer is the one that a request gets alone, and every page is free."""
        for _ in range(10_000):
            if not self.turn():
                break
        else:
            raise AssertionError("it does not come to an end")
        for id, request in self.requests.items():
            expected, reason = answer(request, self.scheduler.context)
            if self.ends[id] == "cancelled":
                assert self.answers[id] == expected[: len(self.answers[id])]
            else:
                assert (self.answers[id], self.ends[id]) == (expected, reason)
        pages = self.scheduler.pages
        assert (pages.used, pages.available) == (0, pages.count - 1)
        assert (
            self.scheduler.stats()["running"] == self.scheduler.stats()["waiting"] == len(self.scheduler._clients) == 0
        )
        self.check_cache()

    def check_batch(self, step: Step) -> None:
        """Padding is bounded."""
        sizes = [len(piece.tokens) for piece in step.prefill]
        padded = len(sizes) * max(sizes, default=0)
        assert padded <= (self.scheduler.busy_chunk if step.decode else self.scheduler.chunk)
        assert padded <= 2 * sum(sizes)

    def check_openings(self, step: Step) -> None:
        """Ranks are told the tokens that penalties count."""
        for opening in step.open:
            request = self.requests[opening.row]
            sampling = request.sampling
            output = tuple(self.known[opening.row][len(request.prompt) :])
            assert opening.sampling == sampling
            assert opening.seen_prompt == (tuple(sorted(set(request.prompt))) if sampling.penalizes_prompt else ())
            assert opening.seen_output == (output if sampling.penalizes_answer else ())
            assert opening.masked == (request.grammar is not None)

    def check_decode(self, step: Step) -> None:
        """Every row that lacks tokens takes one, whatever else the step does; none takes one too many."""
        rows = {row: count for row, count in self.device.sampled.items() if row not in step.close}
        for row, count in rows.items():
            request = self.requests[row]
            most = min(request.max_tokens, self.scheduler.context - len(request.prompt))
            assert (row in step.decode) == (count < most)
        assert set(step.decode) <= rows.keys()

    def check_pages(self) -> None:
        tables = self.device.tables
        assert len(tables) <= self.scheduler.most_rows
        assert len({page for table in tables.values() for page in table}) == self.scheduler.pages.used

    def check_cache(self) -> None:
        """Pages found under the keys of a request's tokens hold these tokens."""
        for id, request in self.requests.items():
            tokens = [*request.prompt, *request.emitted, *self.answers[id]]
            found = self.scheduler.pages.find(page_keys(tokens, self.scheduler.pages.page_size))
            held = [cell for page in found for cell in self.device.cells[page]]
            assert held == states(tokens)[: len(held)]
