"""Sparse attention of a decode step: every row has one token, all at the same position beyond the block budget.

The same choice and the same numbers as in sparse.py, in the fewest operations: on a fast machine a step's time is
their number.
"""

import mlx.core as mx

from m3dist.config import ModelConfig
from m3dist.model.fusion import fused
from m3dist.model.positions import Step


def attend_step(
    q: mx.array, keys: mx.array, values: mx.array, index_q: mx.array, index_k: mx.array, step: Step, c: ModelConfig
) -> mx.array:
    """q [rows, kv_heads * group, 1, head_dim]; keys, values [rows, kv_heads, capacity, head_dim]; index_q [rows,
    kv_heads, 1, index_dim]; index_k float32 [rows, 1, capacity, index_dim]. Returns q's shape and dtype."""
    rows, heads, capacity, dim = keys.shape
    size, topk = c.sparse_block_size, c.sparse_topk_blocks
    scores = index_q.astype(mx.float32) @ index_k[:, :, : step.slots].swapaxes(-1, -2)
    best = scores.reshape(rows, heads, -1, size).max(axis=-1)
    order = mx.argpartition(_losses(best, step.bias), kth=max(0, topk - 2), axis=-1)
    first = mx.arange(rows * heads, dtype=mx.int32).reshape(rows, heads, 1) * (capacity // size)
    chosen = _chosen(order[..., :topk], step.last, first)

    def gather(buffer: mx.array) -> mx.array:
        blocks = buffer.reshape(-1, size, dim)[chosen]
        return blocks.reshape(rows, heads, topk * size, dim)[:, :, : step.keys]

    return attend_one(q, gather(keys), gather(values), c.head_dim**-0.5)


@fused
def _losses(scores: mx.array, bias: mx.array) -> mx.array:
    return -(scores + bias)


@fused
def _chosen(order: mx.array, last: mx.array, first: mx.array) -> mx.array:
    return mx.where(last >= 0, last, order.astype(mx.int32)) + first


def attend_one(q: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Softmax attention of one query a head over all of the keys: q [rows, heads, 1, head_dim]."""
    if mx.default_device().type != mx.DeviceType.cpu:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)
    # Without a kernel of its own for this, the heads of a group are better the queries of one product.
    grouped = q.reshape(*keys.shape[:2], -1, q.shape[-1])
    return mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(q.shape)
