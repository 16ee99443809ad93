"""MiniMax Sparse Attention of many queries: which blocks of keys each reads, and attention over those blocks alone.

Document, section 4. Index head h selects for KV head h, per query; blocks are anchored to absolute cache slots. One
query a row at one position, a decode step, is decode.py's.
"""

from collections.abc import Callable

import mlx.core as mx

from m3dist.config import ModelConfig
from m3dist.model import cpu
from m3dist.model.dense import summands
from m3dist.model.tuning import TUNING, backend, writes_scores_out


def select_blocks(index_q: mx.array, index_k: mx.array, positions: mx.array, c: ModelConfig) -> mx.array:
    """The `sparse_topk_blocks` best blocks of every query: uint32 [rows, heads, queries, topk], in no order.

    index_q [rows, heads, queries, index_dim]; index_k [rows, 1, slots, index_dim], slots a multiple of the block and
    more than topk blocks; positions [rows, queries]. Scores are float32 sums. A block with no key at or before the
    query may be among them where fewer exist: the caller's causal mask drops it.
    """
    best = _block_scores(index_q, index_k, positions, c)
    number = mx.arange(best.shape[-1])
    age = positions[:, None, :, None] // c.sparse_block_size - number  # 0: the query's own block
    best = mx.where(age >= 0, best, -mx.inf)
    if c.sparse_init_block:
        best = mx.where(number < c.sparse_init_block, 1e30, best)
    best = mx.where((age >= 0) & (age < c.sparse_local_block), mx.inf, best)
    return mx.argpartition(-best, kth=c.sparse_topk_blocks - 1, axis=-1)[..., : c.sparse_topk_blocks]


def _block_scores(index_q: mx.array, index_k: mx.array, positions: mx.array, c: ModelConfig) -> mx.array:
    """The largest score of each block: float32 [rows, heads, queries, blocks].

    Scores of all queries with some of the slots at a time: never more than the scratch (or one block) of them, and each
    index key is read once.
    """
    (rows, heads, queries, dim), slots, size = index_q.shape, index_k.shape[2], c.sparse_block_size
    step = max(1, TUNING[backend()].scratch // (rows * heads * queries * size * 4)) * size
    q = index_q.reshape(rows, heads * queries, dim).astype(mx.float32)  # so that the products' sums are, too
    # Keys times queries is what a CPU computes faster; the other way round below 16 queries. A GPU does not mind.
    wide = heads * queries >= 16
    q = mx.contiguous(q.swapaxes(-1, -2)) if wide else q
    best = []
    for first in range(0, slots, step):
        k = index_k[:, 0, first : first + step]
        k = mx.depends(k, best[-1]) if best else k
        scores = cpu.matmul(k, q) if wide else (q @ k.swapaxes(-1, -2)).swapaxes(-1, -2)
        scores = scores.reshape(rows, -1, size, heads, queries)
        if not c.sparse_local_block:  # else the own block is read whatever its score, and later ones are dropped whole
            slot = mx.arange(first, first + k.shape[1]).reshape(-1, size, 1, 1)
            scores = mx.where(slot <= positions[:, None, None, None], scores, -mx.inf)
        best.append(scores.max(axis=2))
    return mx.concatenate(best, axis=1).transpose(0, 2, 3, 1)


def attend_gathered(
    q: mx.array, keys: mx.array, values: mx.array, blocks: mx.array, positions: mx.array, block_size: int, scale: float
) -> mx.array:
    """Softmax attention of every query over its own blocks: reads those keys and values, no others.

    q [rows, kv_heads, group, queries, head_dim]; keys, values [rows, kv_heads, slots, head_dim], slots a multiple of
    the block; blocks [rows, kv_heads, queries, topk]; positions [rows, queries]. Returns q's shape and dtype.
    """
    rows, heads, group, queries, dim = q.shape
    per_head = keys.shape[2] // block_size
    base = (mx.arange(rows * heads, dtype=mx.uint32) * per_head).reshape(rows, heads, 1, 1)
    index = (blocks.astype(mx.uint32) + base).reshape(-1, blocks.shape[-1])

    def gather(buffer: mx.array) -> mx.array:
        return buffer.reshape(-1, block_size, dim)[index].reshape(rows * heads * queries, 1, -1, dim)

    slots = blocks[..., None].astype(mx.int32) * block_size + mx.arange(block_size)
    seen = (slots <= positions[:, None, :, None, None]).reshape(rows * heads * queries, 1, 1, -1)
    # The query heads of a group stand where queries usually stand, so that K and V are read once for all of them.
    grouped = q.transpose(0, 1, 3, 2, 4).reshape(-1, 1, group, dim)
    if cpu.usable(q, keys, values):
        out = cpu.attend(grouped[:, :, None], gather(keys), gather(values), scale, seen[:, :, None])
    else:
        out = mx.fast.scaled_dot_product_attention(grouped, gather(keys), gather(values), scale=scale, mask=seen)
    return out.reshape(rows, heads, queries, group, dim).transpose(0, 1, 3, 2, 4)


def attend_masked(
    q: mx.array, keys: mx.array, values: mx.array, blocks: mx.array, positions: mx.array, block_size: int, scale: float
) -> mx.array:
    """The same attention over all slots, with a mask on those that were not selected."""
    rows, heads, group, queries, dim = q.shape
    slots = keys.shape[2]
    selected = mx.zeros((rows, heads, queries, slots // block_size), dtype=mx.bool_)
    selected = mx.put_along_axis(selected, blocks, mx.array(True), axis=-1)
    seen = mx.repeat(selected, block_size, axis=-1) & (mx.arange(slots) <= positions[:, None, :, None])
    out = mx.fast.scaled_dot_product_attention(
        q.reshape(rows * heads, group, queries, dim),
        keys.reshape(rows * heads, 1, slots, dim),
        values.reshape(rows * heads, 1, slots, dim),
        scale=scale,
        mask=summands(seen, q.dtype).reshape(rows * heads, 1, queries, slots),
    )
    return out.reshape(q.shape)


def attend_sparse(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    index_q: mx.array,
    index_k: mx.array,
    positions: mx.array,
    c: ModelConfig,
    scale: float,
) -> mx.array:
    """Select and attend, a bounded slice of queries at a time: shapes as in the functions above."""
    size, kind = c.sparse_block_size, backend()
    blocks = select_blocks(index_q, index_k, positions, c)
    slots, attend = index_k.shape[2], choose_method(index_k.shape[2], q.dtype, kind)
    if attend is attend_masked:
        keys, values = keys[:, :, :slots], values[:, :, :slots]
        bytes_per_slot, slots_per_query = 4, slots
    else:
        bytes_per_slot, slots_per_query = 2 * q.shape[-1] * keys.itemsize, c.sparse_topk_blocks * size
    step = max(1, TUNING[kind].scratch // (blocks.shape[0] * blocks.shape[1] * slots_per_query * bytes_per_slot))
    out: list[mx.array] = []
    for first in range(0, q.shape[3], step):
        part = slice(first, first + step)
        # MLX evaluates breadth first: slices that do not wait for each other would all be gathered before any is used.
        chosen = mx.depends(blocks[:, :, part], out[-1]) if out else blocks[:, :, part]
        out.append(attend(q[:, :, :, part], keys, values, chosen, positions[:, part], size, scale))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=3)


def choose_method(slots: int, dtype: mx.Dtype, kind: str) -> Callable[..., mx.array]:
    """attend_gathered or attend_masked, whichever is faster for queries of `dtype` on a backend among `slots` keys."""
    # Written out, the scores of all query heads with all slots would not fit the scratch.
    if slots > TUNING[kind].masked_slots or writes_scores_out(dtype, kind):
        return attend_gathered
    return attend_masked
