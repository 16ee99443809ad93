"""(token, expert) pairs brought together by expert, in blocks of one size, without asking how many each expert has."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Blocks:
    """Which pairs stand in which block. All arrays int32."""

    size: int  # rows of a block
    source: mx.array  # [blocks * size]: the pair in each row; rows left over repeat pair 0
    owner: mx.array  # [blocks]: the expert of each block
    place: mx.array  # [pairs]: the row of each pair


def in_blocks(experts: mx.array, count: int, size: int | None = None) -> Blocks:
    """Pairs with these experts [pairs], each below `count`, as blocks of one expert each.

    The number of blocks is what the worst case needs, so that shapes do not depend on the router. As in vLLM's
    moe_align_block_size. Blocks have 16, 32 or 64 rows: about what an expert gets, and the tiles of MLX's product.
    With `size` they have so many, and there are no more blocks than these pairs need, which the host waits to know.
    """
    pairs, exact = experts.size, size is not None
    size = size or next(s for s in (16, 32, 64) if s >= pairs / count or s == 64)
    order = mx.argsort(experts).astype(mx.int32)
    ordered = experts[order]
    has = (experts == mx.arange(count)[:, None]).sum(axis=1)  # pairs of each expert
    needs = (has + size - 1) // size
    ends = mx.cumsum(needs)
    blocks = ends[-1].item() if exact else pairs // size + min(count, pairs)
    row = (ends - needs)[ordered] * size + mx.arange(pairs) - (mx.cumsum(has) - has)[ordered]
    source = mx.zeros(blocks * size, dtype=mx.int32)
    source[row] = order
    place = mx.zeros(pairs, dtype=mx.int32)
    place[order] = row
    owner = mx.minimum((mx.arange(blocks)[:, None] >= ends).sum(axis=1), count - 1)
    return Blocks(size, source, owner, place)
