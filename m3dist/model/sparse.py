"""MiniMax Sparse Attention: which blocks of keys a query reads, and attention over those blocks alone.

Document, section 4. Index head h selects for KV head h, per query; blocks are anchored to absolute cache slots.
"""

import mlx.core as mx

from m3dist.config import ModelConfig

# Keys and values gathered for one slice of queries; more queries at a time win nothing once this is full.
SCRATCH_BYTES = 64 << 20


def select_blocks(index_q: mx.array, index_k: mx.array, positions: mx.array, c: ModelConfig) -> mx.array:
    """The `sparse_topk_blocks` best blocks of every query: uint32 [rows, heads, queries, topk], in no order.

    index_q [rows, heads, queries, index_dim]; index_k [rows, 1, slots, index_dim], slots a multiple of the block and
    more than topk blocks; positions [rows, queries]. Scores are float32 sums. A block with no key at or before the
    query may be among them where fewer exist: the caller's causal mask drops it.
    """
    rows, heads, queries, _ = index_q.shape
    scores = index_q.astype(mx.float32) @ index_k.astype(mx.float32).swapaxes(-1, -2)
    own = positions[:, None, :, None]
    scores = mx.where(mx.arange(index_k.shape[2]) <= own, scores, -mx.inf)  # before the maximum: no future key may win
    blocks = scores.reshape(rows, heads, queries, -1, c.sparse_block_size).max(axis=-1)
    number = mx.arange(blocks.shape[-1])
    if c.sparse_init_block:
        blocks = mx.where(number < c.sparse_init_block, 1e30, blocks)
    age = own // c.sparse_block_size - number  # 0: the query's own block
    blocks = mx.where((age >= 0) & (age < c.sparse_local_block), mx.inf, blocks)
    return mx.argpartition(-blocks, kth=c.sparse_topk_blocks - 1, axis=-1)[..., : c.sparse_topk_blocks]


def attend_blocks(
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
    out = mx.fast.scaled_dot_product_attention(grouped, gather(keys), gather(values), scale=scale, mask=seen)
    return out.reshape(rows, heads, queries, group, dim).transpose(0, 1, 3, 2, 4)


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
    """Select and attend, a bounded slice of queries at a time: shapes as in the two functions above."""
    rows, heads, _, queries, dim = q.shape
    selected = rows * heads * c.sparse_topk_blocks * c.sparse_block_size * 2 * dim * keys.dtype.size
    scored = rows * heads * index_k.shape[2] * 4
    step = max(1, SCRATCH_BYTES // (selected + scored))
    out = []
    for first in range(0, queries, step):
        part = slice(first, min(first + step, queries))
        blocks = select_blocks(index_q[:, :, part], index_k, positions[:, part], c)
        piece = q[:, :, :, part], keys, values, blocks, positions[:, part]
        out.append(attend_blocks(*piece, c.sparse_block_size, scale))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=3)
