"""Sparse attention: the right blocks, and nothing but them."""

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.model import ModelArgs
from m3dist.model import sparse as module
from m3dist.model.sparse import attend_blocks, attend_sparse, select_blocks

BLOCK, TOPK, HEADS, GROUP, DIM = 8, 3, 4, 2, 32


def config(**sparse) -> ModelArgs:
    return ModelArgs.from_dict(checkpoints.tiny_config(sparse_block_size=BLOCK, sparse_topk_blocks=TOPK, **sparse))


def random(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


def best_blocks(index_q, index_k, position: int, local: int, init: int) -> set[int]:
    """One query of one head, from the document's rules, in numpy: q [dim], k [slots, dim]."""
    scores = index_k[: position + 1] @ index_q
    best = [scores[first : first + BLOCK].max() for first in range(0, position + 1, BLOCK)]
    for block in range(min(init, len(best))):
        best[block] = 1e30
    for block in range(max(0, position // BLOCK - local + 1), position // BLOCK + 1):
        best[block] = np.inf
    return set(np.argsort(best)[::-1][:TOPK].tolist())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 9), st.sampled_from([(1, 0), (0, 0), (2, 0), (1, 1), (1, 2)]), st.data())
def test_selection_follows_the_document(seed, blocks, forced, data):
    local, init = forced
    c = config(sparse_local_block=local, sparse_init_block=init)
    positions = data.draw(st.lists(st.integers(0, blocks * BLOCK - 1), min_size=1, max_size=5))
    index_q = random(1, HEADS, len(positions), DIM, seed=seed)
    index_k = random(1, 1, blocks * BLOCK, DIM, seed=seed + 1)
    chosen = np.array(select_blocks(index_q, index_k, mx.array([positions]), c))
    for head in range(HEADS):
        for query, position in enumerate(positions):
            causal = {int(b) for b in chosen[0, head, query] if b * BLOCK <= position}
            q, k = np.array(index_q)[0, head, query], np.array(index_k)[0, 0]
            assert causal == best_blocks(q, k, position, local, init)


def test_bfloat16_scores_are_float32_sums():
    """Sums rounded to bfloat16 would make ties of near-ties, and other blocks."""
    index_q = random(1, HEADS, 200, DIM, seed=10).astype(mx.bfloat16)
    index_k, positions = random(1, 1, 10 * BLOCK, DIM, seed=11).astype(mx.bfloat16), mx.full((1, 200), 79)
    narrow = select_blocks(index_q, index_k, positions, config())
    wide = select_blocks(index_q.astype(mx.float32), index_k.astype(mx.float32), positions, config())
    assert mx.array_equal(mx.sort(narrow), mx.sort(wide))


@pytest.mark.parametrize("queries", [1, 5])
def test_blocks_that_were_not_selected_are_never_read(queries):
    """Not-a-number in every other block would reach the result through any mask: 0 times NaN is NaN."""
    slots, positions = 10 * BLOCK, mx.array([[75 - queries + i for i in range(queries)]])
    q = random(1, HEADS, GROUP, queries, DIM, seed=0)
    keys, values = random(1, HEADS, slots, DIM, seed=1), random(1, HEADS, slots, DIM, seed=2)
    # All queries of a head read the same blocks here, so that the others are nobody's.
    index_q = mx.broadcast_to(random(1, HEADS, 1, DIM, seed=3), (1, HEADS, queries, DIM))
    index_k = random(1, 1, slots, DIM, seed=4)
    blocks = select_blocks(index_q, index_k, positions, config())
    clean = attend_blocks(q, keys, values, blocks, positions, BLOCK, DIM**-0.5)
    poison = np.full((1, HEADS, slots // BLOCK), np.nan, dtype=np.float32)
    for head in range(HEADS):
        poison[0, head, np.array(blocks)[0, head].reshape(-1)] = 0
    poison = mx.repeat(mx.array(poison), BLOCK, axis=-1)[..., None]
    assert mx.isnan(poison).sum().item() > 0
    poisoned = attend_blocks(q, keys + poison, values + poison, blocks, positions, BLOCK, DIM**-0.5)
    assert mx.array_equal(clean, poisoned)


def test_equal_to_masked_attention_over_everything():
    slots, queries = 10 * BLOCK, 7
    positions = mx.array([list(range(70, 70 + queries)), list(range(33, 33 + queries))])
    q = random(2, HEADS, GROUP, queries, DIM, seed=5)
    keys, values = random(2, HEADS, slots, DIM, seed=6), random(2, HEADS, slots, DIM, seed=7)
    index_q, index_k = random(2, HEADS, queries, DIM, seed=8), random(2, 1, slots, DIM, seed=9)
    out = attend_sparse(q, keys, values, index_q, index_k, positions, config(), DIM**-0.5)
    blocks = np.array(select_blocks(index_q, index_k, positions, config()))
    seen = np.zeros((2, HEADS, queries, slots), dtype=bool)
    for row, head, query in np.ndindex(2, HEADS, queries):
        for block in blocks[row, head, query]:
            seen[row, head, query, block * BLOCK : (block + 1) * BLOCK] = True
    seen &= np.arange(slots) <= np.array(positions)[:, None, :, None]
    scores = (q @ keys[:, :, None].swapaxes(-1, -2)) * DIM**-0.5
    weights = mx.softmax(mx.where(mx.array(seen)[:, :, None], scores, -mx.inf), axis=-1)
    assert mx.allclose(out, weights @ values[:, :, None], atol=1e-5)


def test_slices_of_queries_change_nothing(monkeypatch):
    slots, queries = 12 * BLOCK, 9
    positions = mx.array([list(range(slots - queries, slots))])
    arguments = (
        random(1, HEADS, GROUP, queries, DIM, seed=1),
        random(1, HEADS, slots, DIM, seed=2),
        random(1, HEADS, slots, DIM, seed=3),
        random(1, HEADS, queries, DIM, seed=4),
        random(1, 1, slots, DIM, seed=5),
        positions,
        config(),
        DIM**-0.5,
    )
    at_once = attend_sparse(*arguments)
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)
    assert mx.array_equal(at_once, attend_sparse(*arguments))
