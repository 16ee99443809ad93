"""Logits -> token. The vocabulary is cut over the ranks, so each sends its best candidates, never its logits."""

from dataclasses import dataclass

import mlx.core as mx

from m3dist.comm import Comm, agreement
from m3dist.sampling import Sampling as Sampling

CHUNK = 64  # logits whose largest stands for them while the largest of all are looked for


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
    local = local.astype(mx.float32)
    order = largest(local, count)
    values, ids = local[order], order.astype(mx.uint32) + first_row
    if missing := count - ids.size:
        values = mx.pad(values, (0, missing), constant_values=-mx.inf)
        ids = mx.pad(ids, (0, missing))
    packet = mx.concatenate([values.view(mx.uint32), ids, agreement(hidden), note])
    everyone = comm.all_gather(packet)
    values, ids = everyone[:, :count].view(mx.float32).reshape(-1), everyone[:, count : 2 * count].reshape(-1)
    order = largest(values, min(wanted, values.size))
    hashes = everyone[:, -2]
    return values[order], ids[order], (hashes == hashes[0]).all(), everyone[0, -1:]


def largest(values: mx.array, count: int) -> mx.array:
    """Where the `count` largest of values [n] stand, the largest first: uint32 [count].

    Ties go to the lowest place, as argmax does, in every world. Only chunks that can matter are sorted: the `count`
    largest are all in the `count` chunks with the largest maxima.
    """
    if count == 1:
        return mx.argmax(values, keepdims=True)
    chunks = -(-values.size // CHUNK)
    if count >= chunks:
        return mx.argsort(-values)[:count]
    padded = mx.pad(values, (0, chunks * CHUNK - values.size), constant_values=-mx.inf).reshape(chunks, CHUNK)
    kept = mx.sort(mx.argsort(-padded.max(axis=1))[:count])
    order = mx.argsort(-padded[kept].reshape(-1))[:count]
    return kept[order // CHUNK] * CHUNK + order % CHUNK


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
