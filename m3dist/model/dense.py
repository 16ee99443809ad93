"""Causal attention of many queries over everything up to their own position."""

import mlx.core as mx

from m3dist.model.positions import Positions
from m3dist.model.tuning import TUNING, backend, writes_scores_out


def attend_causal(q: mx.array, keys: mx.array, values: mx.array, positions: Positions, scale: float) -> mx.array:
    """q [rows, heads, tokens, head_dim]; keys, values [rows, kv_heads, capacity, head_dim]. Returns q's shape, dtype.

    Where MLX would write all scores out, queries come in slices, each over the keys up to its own end: 2,048 tokens
    from the start take half the time and a seventh of the memory (CPU, float32, 32 heads over 2 KV heads).
    """
    step, kind = positions.tokens, backend()
    if writes_scores_out(q.dtype, kind):
        step = max(1, TUNING[kind].scratch // (q.shape[0] * q.shape[1] * positions.end * 4))
    out: list[mx.array] = []
    for first in range(0, positions.tokens, step):
        part = q[:, :, first : first + step]
        end = max(positions.starts) + first + part.shape[2]
        # MLX evaluates breadth first: slices that do not wait for each other would all have their scores in memory.
        part = mx.depends(part, out[-1]) if out else part
        mask: str | mx.array = "causal"
        if not positions.aligned:
            mask = mx.arange(end) <= positions.array[:, None, first : first + step, None]
        seen = keys[:, :, :end], values[:, :, :end]
        out.append(mx.fast.scaled_dot_product_attention(part, *seen, scale=scale, mask=mask))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)
