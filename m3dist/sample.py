"""Logits -> token. The vocabulary is cut over the ranks, so each sends its best candidates, never its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from m3dist.comm import Comm, agreement
from m3dist.sampling import Sampling as Sampling

UNLIKELY = -9999.0  # OpenAI's word for a log probability of almost nothing; JSON has none for minus infinity
FEW = 64  # candidates that are found without sorting a whole vocabulary; rows that want more are sampled apart
CHUNK = 64  # logits whose largest stands for them while the largest of all are looked for

# ---------------------------------------------------------------------------------------------------------------------
# One row


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens over all ranks: logits float32 [n] and ids uint32 [n], likeliest first.

    `agree` is true where all ranks computed the same hidden state, bit for bit. `note` uint32 [1]: rank 0's.
    """

    logits: mx.array
    ids: mx.array
    agree: mx.array
    note: mx.array


def gather_candidates(
    local: mx.array, first_row: int, widest: int, hidden: mx.array, wanted: int, comm: Comm, note: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """The `wanted` best logits of all ranks, as the fields of Candidates.

    local [rows held]: this rank's logits of vocabulary rows `first_row` on; `widest`: the most rows any rank holds;
    hidden: what the logits came from; note: uint32 [1]. One all_gather of 2 * candidates + 2 words a rank.
    """
    count = min(wanted, widest)
    values, ids = best(local.astype(mx.float32), first_row, count)
    packet = mx.concatenate([values.view(mx.uint32), ids, agreement(hidden), note])
    everyone = comm.all_gather(packet)
    values, ids = everyone[:, :count].view(mx.float32).reshape(-1), everyone[:, count : 2 * count].reshape(-1)
    order = largest(values, min(wanted, values.size))
    hashes = everyone[:, -2]
    return values[order], ids[order], (hashes == hashes[0]).all(), everyone[0, -1:]


def choose(candidates: Candidates, sampling: Sampling, key: mx.array | None) -> mx.array:
    """One token id, uint32 [1]. `key`: mx.random's; None only for greedy."""
    if sampling.temperature == 0:
        return candidates.ids[:1]
    logits = candidates.logits / sampling.temperature
    probabilities = mx.softmax(logits)
    # min-p is relative to the likeliest, so whether it cuts before or after top-p changes nothing.
    kept = probabilities >= sampling.min_p * probabilities[0]
    if sampling.top_p < 1:  # float32 sums over a whole vocabulary may reach 1 before its end
        # The likeliest tokens that together reach top_p: one is kept while what stands before it falls short.
        kept = kept & (mx.cumsum(probabilities) - probabilities < sampling.top_p)
    chosen = mx.random.categorical(mx.where(kept, logits, -mx.inf), key=key)
    return candidates.ids[chosen][None]


# ---------------------------------------------------------------------------------------------------------------------
# Many rows, each with its own Sampling


@dataclass(frozen=True)
class BatchCandidates:
    """The likeliest tokens of each row over all ranks: logits float32 [rows, n] and ids uint32 [rows, n], likeliest
    first, n as many as the row that needs most.

    normalizer float32 [rows]: logsumexp over the whole vocabulary, None where it was not asked for. agree bool [rows]:
    whether all ranks computed the same hidden state of this row, bit for bit.
    """

    logits: mx.array
    ids: mx.array
    normalizer: mx.array | None
    agree: mx.array


@dataclass(frozen=True)
class Sampled:
    """What a step gives of each row: its token, uint32 [rows], and `agree`, BatchCandidates'.

    Where any row asks for log probabilities: the token's, float32 [rows], and the likeliest tokens' ids and log
    probabilities, uint32 and float32 [rows, n], likeliest first; UNLIKELY for tokens that are not allowed.
    """

    tokens: mx.array
    agree: mx.array
    logprobs: mx.array | None = None
    top_ids: mx.array | None = None
    top_logprobs: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What is to be evaluated."""
        found = (self.tokens, self.agree, self.logprobs, self.top_ids, self.top_logprobs)
        return [array for array in found if array is not None]


def sample_batch(
    local: mx.array,
    first_row: int,
    widest: int,
    hidden: mx.array,
    samplings: Sequence[Sampling],
    uniforms: Sequence[float],
    vocabulary: int,
    comm: Comm,
) -> Sampled:
    """The next token of each row, the same on every rank: rank 0's, unless all rows are greedy, for which every rank
    has the same candidates. Called by all ranks, which know the same groups_of rows.

    local, first_row, widest, hidden: gather_batch's. uniforms: each row's sampling.uniform; greedy rows ignore it.
    vocabulary: of the whole model.
    """
    told = any(sampling.logprobs is not None for sampling in samplings)
    most = max(1, *(sampling.logprobs or 0 for sampling in samplings)) if told else 1
    groups, found, chosen = groups_of(samplings, vocabulary), list[BatchCandidates](), list[mx.array]()
    for rows in groups:
        own, part, states = [samplings[row] for row in rows], local, hidden
        if len(groups) > 1:
            part, states = local[mx.array(rows)], hidden[mx.array(rows)]
        if found:
            part = mx.depends(part, found[-1].ids)  # so that all ranks gather in one order
        wanted = max(most, wanted_of(own, vocabulary))
        found.append(gather_batch(part, first_row, widest, states, wanted, comm, told))
        chosen.append(_choose_as(found[-1], own, [uniforms[row] for row in rows]))
    tokens = mx.concatenate(chosen)
    if any(sampling.temperature for sampling in samplings):
        tokens = comm.from_rank_0(tokens)
    fields = [[tokens], [candidates.agree for candidates in found]]
    if told:
        split = mx.split(tokens, [len(groups[0])]) if len(groups) > 1 else [tokens]
        fields += zip(*(_log_probabilities(*each, most) for each in zip(found, split)))
    if len(groups) == 1:
        return Sampled(*(field for [field] in fields))
    order = [row for rows in groups for row in rows]
    places = mx.array([order.index(row) for row in range(len(order))])
    return Sampled(*(mx.concatenate(parts)[places] for parts in fields))


def groups_of(samplings: Sequence[Sampling], vocabulary: int) -> list[list[int]]:
    """The rows to be sampled together: those that want FEW candidates, then those that want more, for which the whole
    vocabulary is sorted. One such among many would cost as much as if all were."""
    few = [row for row, sampling in enumerate(samplings) if sampling.candidates(vocabulary) <= FEW]
    many = [row for row, sampling in enumerate(samplings) if sampling.candidates(vocabulary) > FEW]
    return [rows for rows in (few, many) if rows]


def wanted_of(samplings: Sequence[Sampling], vocabulary: int) -> int:
    """How many candidates these rows need: what the most demanding does, rounded up to a power of two, so that rows
    that come and go seldom change the shapes."""
    most = max(sampling.candidates(vocabulary) for sampling in samplings)
    return min(1 << (most - 1).bit_length(), vocabulary)


def _choose_as(candidates: BatchCandidates, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> mx.array:
    """choose_batch, as the rows' samplings say."""
    if all(sampling.temperature == 0 for sampling in samplings):
        return candidates.ids[:, 0]
    columns = [(s.temperature, s.top_k, s.top_p, s.min_p, u) for s, u in zip(samplings, uniforms, strict=True)]
    return choose_batch(candidates, *mx.array(columns, dtype=mx.float32).T)


def _log_probabilities(candidates: BatchCandidates, tokens: mx.array, most: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of each row's token [rows], and the ids and log probabilities of the `most` likeliest [rows, most]."""
    logprobs = mx.maximum(candidates.logits - candidates.normalizer[:, None], UNLIKELY)
    # The token is one of the candidates; a place where a rank had none says 0 and -inf.
    own = mx.where(candidates.ids == tokens[:, None], logprobs, UNLIKELY).max(axis=1)
    return own, candidates.ids[:, :most], logprobs[:, :most]


def gather_batch(
    local: mx.array,
    first_row: int,
    widest: int,
    hidden: mx.array,
    wanted: int,
    comm: Comm,
    normalized: bool = True,
) -> BatchCandidates:
    """The `wanted` best logits of all ranks for each row.

    local [rows, vocabulary rows held]: this rank's logits, adjusted, of vocabulary rows `first_row` on; `widest`: the
    most any rank holds; hidden [rows, hidden_size]: what the logits came from. normalized: whether the normalizer is
    wanted. One all_gather of 2 * candidates + 2 words a rank and row.
    """
    rows, count = local.shape[0], min(wanted, widest)
    local = local.astype(mx.float32)
    values, ids = best(local, first_row, count)
    columns = [values.view(mx.uint32), ids, agreement(hidden)]
    if normalized:
        columns.append(mx.logsumexp(local, axis=1, keepdims=True).view(mx.uint32))
    everyone = comm.all_gather(mx.concatenate(columns, axis=1)).swapaxes(0, 1)  # [rows, world, words]
    values = everyone[..., :count].view(mx.float32).reshape(rows, -1)
    ids, hashes = everyone[..., count : 2 * count].reshape(rows, -1), everyone[..., 2 * count]
    order = largest(values, min(wanted, values.shape[1]))
    return BatchCandidates(
        mx.take_along_axis(values, order, axis=1),
        mx.take_along_axis(ids, order, axis=1),
        mx.logsumexp(everyone[..., -1].view(mx.float32), axis=1) if normalized else None,
        (hashes == hashes[:, :1]).all(axis=1),
    )


def choose_batch(
    candidates: BatchCandidates,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    uniforms: mx.array,
) -> mx.array:
    """One token id a row, uint32 [rows]; the arguments, each [rows], are Sampling's, and a number in [0, 1) that draws
    by the inverse of the cumulated distribution. The likeliest where the temperature is 0."""
    logits, places = candidates.logits, mx.arange(candidates.logits.shape[1])
    scaled = logits / mx.where(temperature == 0, 1, temperature)[:, None]
    within = (places < top_k[:, None]) | (top_k == 0)[:, None]
    probabilities = mx.softmax(mx.where(within, scaled, -mx.inf), axis=1)
    # Of these, as `choose` keeps them; but never none.
    before = mx.cumsum(probabilities, axis=1) - probabilities
    kept = ((before < top_p[:, None]) | (top_p >= 1)[:, None]) & (
        probabilities >= min_p[:, None] * probabilities[:, :1]
    )
    cumulated = mx.cumsum(mx.where(kept | (places == 0), probabilities, 0), axis=1)
    # The first place whose sum exceeds the number. There is one: the number times the sum of all, rounded, is less.
    drawn = (cumulated <= uniforms[:, None] * cumulated[:, -1:]).sum(axis=1)
    place = mx.where(temperature == 0, 0, drawn)
    return mx.take_along_axis(candidates.ids, place[:, None], axis=1)[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The largest


def best(local: mx.array, first_row: int, count: int) -> tuple[mx.array, mx.array]:
    """A rank's `count` largest logits and their token ids, float32 and uint32 [..., count], of local float32 [..., rows
    held]; -inf and 0 for what it does not have. Where it sends all it has they come as they stand: sorting is for the
    end."""
    held = local.shape[-1]
    if count < held:
        order = largest(local, count)
        return mx.take_along_axis(local, order, axis=-1), order.astype(mx.uint32) + first_row
    ids = mx.broadcast_to(mx.arange(first_row, first_row + held, dtype=mx.uint32), local.shape)
    width = [(0, 0)] * (local.ndim - 1) + [(0, count - held)]
    return mx.pad(local, width, constant_values=-mx.inf), mx.pad(ids, width)


def largest(values: mx.array, count: int) -> mx.array:
    """Where the `count` largest of values [..., n] stand, the largest first: uint32 [..., count].

    Ties go to the lowest place, as argmax does, in every world. Only chunks that can matter are sorted: the `count`
    largest are all in the `count` chunks with the largest maxima.
    """
    if count == 1:
        return mx.argmax(values, axis=-1, keepdims=True)
    *rows, size = values.shape
    chunks = -(-size // CHUNK)
    if count >= chunks:
        return mx.argsort(-values, axis=-1)[..., :count]
    width = [(0, 0)] * len(rows) + [(0, chunks * CHUNK - size)]
    padded = mx.pad(values, width, constant_values=-mx.inf).reshape(*rows, chunks, CHUNK)
    kept = mx.sort(mx.argsort(-padded.max(axis=-1), axis=-1)[..., :count], axis=-1)
    found = mx.take_along_axis(padded, kept[..., None], axis=-2).reshape(*rows, count * CHUNK)
    order = mx.argsort(-found, axis=-1)[..., :count]
    return mx.take_along_axis(kept, order // CHUNK, axis=-1) * CHUNK + order % CHUNK
