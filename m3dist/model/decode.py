"""Sparse attention of a decode step, beyond the block budget: every row has one token, in a LayerCache all at the same
position, in pages each at its own.

The same choice and the same numbers as in sparse.py, in the fewest operations: on a fast machine a step's time is
their number.
"""

import mlx.core as mx

from m3dist.config import ModelConfig
from m3dist.model import cpu
from m3dist.model.fusion import fused, on_gpu
from m3dist.model.positions import Positions, Seen, Step
from m3dist.paged import PagedCache

# Of so few products of query and key numbers MLX's attention on the CPU takes less than a wait for what it needs.
FEW = 1 << 18


def attend_step(
    q: mx.array, keys: mx.array, values: mx.array, index_q: mx.array, index_k: mx.array, step: Step, c: ModelConfig
) -> mx.array:
    """q [rows, kv_heads * group, 1, head_dim]; keys, values [rows, kv_heads, capacity, head_dim]; index_q [rows,
    kv_heads, 1, index_dim] and index_k [rows, 1, capacity, index_dim] float32. Returns q's shape and dtype."""
    rows, heads = keys.shape[:2]
    index_k = index_k[:, :, : step.slots]
    first = step.first(rows * heads).reshape(rows, heads, 1)
    keys, values = _gather(keys, values, index_q, index_k, step.bias, step.last, first, c.sparse_block_size)
    return attend_one(q, keys[:, :, : step.keys], values[:, :, : step.keys], c.head_dim**-0.5)


@fused
def _gather(
    keys: mx.array,
    values: mx.array,
    index_q: mx.array,
    index_k: mx.array,
    bias: mx.array,
    last: mx.array,
    first: mx.array,
    size: int,
) -> tuple[mx.array, mx.array]:
    """Keys and values of the chosen blocks, each [rows, heads, topk * size, dim], the query's own block last.

    bias float32 [blocks] and last int32 [topk] as in Step; first int32 [rows, heads, 1]: the number of each buffer's
    first block where all buffers' blocks stand in a row.
    """
    rows, heads, _, dim = keys.shape
    scores = index_q @ index_k.swapaxes(-1, -2)
    best = scores.reshape(rows, heads, -1, size).max(axis=-1)
    order = mx.argpartition(-(best + bias), kth=max(0, last.size - 2), axis=-1)[..., : last.size]
    chosen = mx.where(last >= 0, last, order.astype(mx.int32)) + first

    def gather(buffer: mx.array) -> mx.array:
        return buffer.reshape(-1, size, dim)[chosen].reshape(rows, heads, -1, dim)

    return gather(keys), gather(values)


def attend_pages(q: mx.array, index_q: mx.array, cache: PagedCache, positions: Positions, c: ModelConfig) -> mx.array:
    """The same out of pages, each row at a position of its own, some of them perhaps below the budget: shapes as above.

    Index keys are read where they stand, and of K and V the chosen pages.
    """
    step, places = positions.pages_step(cache.table, q.dtype, c), cache.table.places(cache.heads)
    # Apart from the choice, which is traced for every set of shapes: the pool's is none of its.
    scores = mx.gather_mm(index_q[:, :, 0], cache.index_pages.swapaxes(-1, -2), step.rows, step.choice[0])
    keys, values = cache.gather(_choose_blocks(scores, *step.choice, places))
    return attend_rows(q, keys, values, c.head_dim**-0.5, step.seen)


@fused
def _choose_blocks(scores: mx.array, pages: mx.array, bias: mx.array, last: mx.array, places: mx.array) -> mx.array:
    """int32 [2, rows, heads, topk]: the blocks of K and V to read, the query's own last.

    scores float32 [rows, blocks, heads, block]; the other arguments as in PagesStep.choice and Table.places.
    """
    best = scores.max(axis=-1).swapaxes(1, 2) + bias
    topk = last.shape[-1]
    order = mx.argpartition(-best, kth=max(0, topk - 2), axis=-1)[..., :topk]
    found = mx.take_along_axis(pages[:, None], order, axis=-1).astype(mx.int32)
    return mx.where(last >= 0, last, found) * places.size + places


def attend_one(q: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Softmax attention of one query a head over all of the keys: q [rows, heads, 1, head_dim]."""
    if on_gpu():
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)
    # Without a kernel of its own for this, the heads of a group are better the queries of one product.
    grouped = q.reshape(*keys.shape[:2], -1, q.shape[-1])
    return mx.fast.scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(q.shape)


def attend_rows(q: mx.array, keys: mx.array, values: mx.array, scale: float, seen: Seen) -> mx.array:
    """The same over the keys that each row sees.

    On the CPU at once, and not lazily, where numpy can: with many heads it takes a tenth of MLX's time.
    """
    keys, values = keys[:, :, : seen.keys], values[:, :, : seen.keys]
    if cpu.usable(q, keys, values) and q.size * keys.shape[2] > FEW:
        grouped = q.reshape(*keys.shape[:2], -1, 1, q.shape[-1])
        which = mx.array([True]) if seen.mask is None else seen.mask[:, None]
        return cpu.attend(grouped, keys, values, scale, which).reshape(q.shape)
    if seen.mask is None:
        return attend_one(q, keys, values, scale)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=seen.mask)
