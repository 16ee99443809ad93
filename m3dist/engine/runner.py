"""The steps on a rank: what the scheduler planned -> tokens. Every rank runs the same steps, in the same order.

A step takes pieces of prompts into the cache, evaluated before it goes on; then one token of each row that is to have
a next one, all rows together: the last token of its prompt, or the one that was sampled last, which need not have
reached the host. So the graph of a decode step never holds a prefill, and its shapes depend on the rows alone.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from m3dist.adjust import RowState, adjust_rows
from m3dist.engine.scheduler import Piece, Step
from m3dist.errors import CommunicationError
from m3dist.model import Model
from m3dist.paged import PagePool
from m3dist.sample import Sampled, sample_batch
from m3dist.sampling import Sampling, uniform

NEVER = -9999.0  # the log probability of a token that cannot come, as OpenAI's API has it: JSON knows no infinity


@dataclass
class Row:
    """A request that is being computed. `place`: where its last token stands among all rows'; `length`: tokens that the
    cache holds of it."""

    place: int
    sampling: Sampling
    state: RowState
    masked: bool
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class Forward:
    """A step whose rows have been computed but not sampled: hidden [rows, hidden_size], None where it has none."""

    step: Step
    hidden: mx.array | None


@dataclass(frozen=True)
class Token:
    """A sampled token; its log probability, and the likeliest tokens with theirs, where the row asks for them."""

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Pending:
    """What a step samples, under way on the device."""

    def __init__(self, rows: Sequence[int], samplings: Sequence[Sampling], sampled: Sampled | None):
        self._rows, self._samplings, self._sampled = rows, samplings, sampled

    def read(self) -> dict[int, Token]:
        """Row -> its token, once they are there. Raises CommunicationError where the ranks' hidden states differ."""
        sampled = self._sampled
        if sampled is None:
            return {}
        if not all(sampled.agree.tolist()):
            raise CommunicationError("the ranks' hidden states differ: their results cannot be trusted")
        tokens = sampled.tokens.tolist()
        if sampled.logprobs is None:
            return {row: Token(token) for row, token in zip(self._rows, tokens)}
        columns = (x.tolist() for x in (sampled.logprobs, sampled.top_ids, sampled.top_logprobs))
        found = {}
        for row, sampling, token, logprob, ids, values in zip(self._rows, self._samplings, tokens, *columns):
            if sampling.logprobs is None:
                found[row] = Token(token)
                continue
            top = [(id, value) for id, value in zip(ids[: sampling.logprobs], values) if value > NEVER]
            found[row] = Token(token, max(NEVER, logprob), top)
        return found


class Runner:
    """A rank's rows and their cache. `most`: rows at a time; `chunk`: tokens of a prompt computed at a time."""

    def __init__(self, model: Model, pool: PagePool, most: int, chunk: int):
        self.model, self.pool, self.chunk = model, pool, chunk
        self.rows: dict[int, Row] = {}
        self._places = list(range(most))  # that no row has
        self._last = mx.zeros(most, dtype=mx.uint32)  # each row's last token
        self._first, self._held = model.language_model.model.first_row, model.vocabulary[model.comm.rank]

    def run(self, step: Step, masks: Mapping[int, bytes] | None = None) -> Pending:
        """Both halves of a step."""
        return self.sample(self.forward(step), masks or {})

    def forward(self, step: Step) -> Forward:
        """Everything up to the hidden states from which the step samples; those are on their way."""
        self._update(step)
        for piece in step.prefill:
            self.rows[piece.row].length = piece.start + len(piece.tokens) - piece.last
        self._prefill([piece for piece in step.prefill if len(piece.tokens) > piece.last])
        if not step.sampled:
            return Forward(step, None)
        ends = [piece for piece in step.prefill if piece.last]
        tokens = mx.array([piece.tokens[-1] for piece in ends], dtype=mx.uint32)
        if step.decode:
            before = self._last[mx.array([self.rows[row].place for row in step.decode])]
            tokens = mx.concatenate([tokens, before]) if ends else before
        rows = [self.rows[row] for row in step.sampled]
        view = self.pool.view([row.pages for row in rows], [row.length for row in rows], 1)
        hidden = self.model.hidden(tokens[:, None], view)[:, 0]
        for row in rows:
            row.length += 1
        mx.async_eval(hidden)  # and with it what it wrote into the pool, which it has read
        return Forward(step, hidden)

    def waits_for_masks(self, step: Step) -> bool:
        """Whether a row that `step` samples has a grammar; to be asked after `forward`."""
        return any(self.rows[row].masked for row in step.sampled)

    def sample(self, forward: Forward, masks: Mapping[int, bytes]) -> Pending:
        """The next token of the step's rows, on its way. `masks`: row -> the tokens its grammar allows."""
        step, hidden = forward.step, forward.hidden
        if hidden is None:
            return Pending((), (), None)
        rows = [self.rows[row] for row in step.sampled]
        states, samplings = [row.state for row in rows], [row.sampling for row in rows]
        local = adjust_rows(self.model.local_logits(hidden), states, [masks.get(row) for row in step.sampled])
        uniforms = [uniform(s.seed, step.counts[row]) for s, row in zip(samplings, step.sampled)]
        model, widest = self.model, max(self.model.vocabulary)
        whole = model.args.vocab_size
        sampled = sample_batch(local, self._first, widest, hidden, samplings, uniforms, whole, model.comm)
        self._last[mx.array([row.place for row in rows])] = sampled.tokens
        for number, row in enumerate(rows):
            if not row.state.plain:
                row.state.took(sampled.tokens[number])
        mx.async_eval(sampled.arrays, self._last)
        return Pending(step.sampled, samplings, sampled)

    def time_sum(self) -> float:
        """Seconds that summing one hidden state over the ranks takes; all ranks call it."""
        comm, dtype = self.model.comm, self.model.language_model.model.norm.weight.dtype
        hidden = mx.zeros(self.model.args.hidden_size, dtype)
        mx.eval(hidden)
        comm.barrier()
        began = time.perf_counter()
        mx.eval(comm.all_sum(hidden))
        return time.perf_counter() - began

    def _update(self, step: Step) -> None:
        """Take note of the rows that go and come, and of the pages that rows get."""
        for number in step.close:
            self._places.append(self.rows.pop(number).place)
        for opening in step.open:
            state = RowState(opening.sampling, opening.seen_prompt, opening.seen_output, self._first, self._held)
            self.rows[opening.row] = Row(self._places.pop(), opening.sampling, state, opening.masked)
        for number, pages in step.pages.items():
            self.rows[number].pages.extend(pages)

    def _prefill(self, pieces: Sequence[Piece]) -> None:
        """Take pieces of prompts into the cache, but not the last token of a prompt."""
        if not pieces:
            return
        rows = [self.rows[piece.row] for piece in pieces]
        tokens = [piece.tokens[:-1] if piece.last else piece.tokens for piece in pieces]
        lengths, starts = [len(part) for part in tokens], [piece.start for piece in pieces]
        longest = max(lengths)
        padded = mx.array([[*part, *[0] * (longest - len(part))] for part in tokens], dtype=mx.uint32)
        view = self.pool.view([row.pages for row in rows], starts, longest, lengths)
        self.model.prefill(padded, view, self.chunk)
