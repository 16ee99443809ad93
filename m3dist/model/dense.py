"""Causal attention of many queries over everything up to their own position."""

import mlx.core as mx

from m3dist.model import cpu
from m3dist.model.positions import Positions
from m3dist.model.tuning import TUNING, backend, writes_scores_out


def attend_causal(q: mx.array, keys: mx.array, values: mx.array, positions: Positions, scale: float) -> mx.array:
    """q [rows, heads, tokens, head_dim]; keys, values [rows, kv_heads, capacity, head_dim]. Returns q's shape, dtype.

    Where all scores would be written out, or rows at positions of their own need a mask, queries come in slices, each
    over the keys up to its own end: half the arithmetic of 2,048 tokens from the start, and little memory.
    """
    step, kind = positions.tokens, backend()
    written = q.shape[1] if writes_scores_out(q.dtype, kind) else 0 if positions.aligned else 1  # numbers a key
    if written:
        step = max(1, TUNING[kind].scratch // (q.shape[0] * written * positions.end * 4))
    out: list[mx.array] = []
    for first in range(0, positions.tokens, step):
        part = q[:, :, first : first + step]
        end = max(positions.starts) + first + part.shape[2]
        # MLX evaluates breadth first: slices that do not wait for each other would all have their scores in memory.
        part = mx.depends(part, out[-1]) if out else part
        out.append(_attend(part, keys[:, :, :end], values[:, :, :end], positions, first, scale))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)


def _attend(q: mx.array, keys: mx.array, values: mx.array, positions: Positions, first: int, scale: float) -> mx.array:
    """The queries from the `first` token on, over keys and values that end with the last of them."""
    own = positions.array[:, None, first : first + q.shape[2], None]
    if cpu.usable(q, keys, values):
        newest = mx.arange(min(positions.starts) + first, keys.shape[2])  # all these queries see all slots before
        grouped = q.reshape(q.shape[0], keys.shape[1], -1, *q.shape[2:])
        return cpu.attend(grouped, keys, values, scale, newest <= own[:, None]).reshape(q.shape)
    mask = "causal" if positions.aligned else summands(mx.arange(keys.shape[2]) <= own, q.dtype)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)


def summands(seen: mx.array, dtype: mx.Dtype) -> mx.array:
    """What hides the keys that are not seen, to be added to scores of `dtype`.

    Not booleans: CUDA's attention would first write them out for every head.
    """
    return mx.where(seen, mx.array(0, dtype), mx.array(-mx.inf, dtype))
