"""Sparse attention: the right blocks, and nothing but them."""

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak

from m3dist.model import ModelArgs
from m3dist.model import sparse as module
from m3dist.model.sparse import attend_gathered, attend_masked, attend_sparse, choose_method, select_blocks
from m3dist.model.tuning import TUNING, Tuning, backend

pytestmark = pytest.mark.usefixtures("library")

BLOCK, TOPK, HEADS, GROUP, DIM = 8, 3, 4, 3, 32
METHODS = [attend_gathered, attend_masked]
FORCED = [(1, 0), (0, 0), (2, 0), (1, 1), (1, 2), (0, 1)]  # sparse_local_block, sparse_init_block


def config(**sparse) -> ModelArgs:
    return ModelArgs.from_dict(checkpoints.tiny_config(sparse_block_size=BLOCK, sparse_topk_blocks=TOPK, **sparse))


def random(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


def scratch(monkeypatch, size: int) -> None:
    monkeypatch.setitem(TUNING, backend(), Tuning(size, masked_slots=0))


class Case:
    """Random heads of rows at their own positions [rows, queries], the longest of which ends in the middle of a block.

    K and V have room for `spare` blocks more than index K, as the cache's buffers do.
    """

    def __init__(self, starts: list[int], queries: int, seed: int, spare: int = 2):
        self.positions = mx.array([[start + i for i in range(queries)] for start in starts])
        rows, self.slots = len(starts), -(-(max(starts) + queries) // BLOCK) * BLOCK
        self.q = random(rows, HEADS, GROUP, queries, DIM, seed=seed)
        self.keys = random(rows, HEADS, self.slots + spare * BLOCK, DIM, seed=seed + 1)
        self.values = random(rows, HEADS, self.slots + spare * BLOCK, DIM, seed=seed + 2)
        self.index_q = random(rows, HEADS, queries, DIM, seed=seed + 3)
        self.index_k = random(rows, 1, self.slots, DIM, seed=seed + 4)

    def attend(self, c: ModelArgs, dtype: mx.Dtype = mx.float32) -> mx.array:
        heads = (x.astype(dtype) for x in (self.q, self.keys, self.values))
        return attend_sparse(*heads, self.index_q, self.index_k, self.positions, c, DIM**-0.5)

    def by_hand(self, c: ModelArgs) -> np.ndarray:
        """One query at a time, from the document's rules, in numpy."""
        q, keys, values = (np.array(x, np.float64) for x in (self.q, self.keys, self.values))
        index_q, index_k, out = np.array(self.index_q), np.array(self.index_k), np.zeros(q.shape)
        for row, head, query in np.ndindex(q.shape[0], HEADS, q.shape[3]):
            position = self.positions[row, query].item()
            blocks = best_blocks(index_q[row, head, query], index_k[row, 0], position, c)
            seen = [slot for slot in range(position + 1) if slot // BLOCK in blocks]
            weights = np.exp(q[row, head, :, query] @ keys[row, head, seen].T * DIM**-0.5)
            out[row, head, :, query] = weights / weights.sum(-1, keepdims=True) @ values[row, head, seen]
        return out


def best_blocks(index_q: np.ndarray, index_k: np.ndarray, position: int, c: ModelArgs) -> set[int]:
    """One query of one head: q [dim], k [slots, dim]."""
    scores = index_k[: position + 1] @ index_q
    best = [scores[first : first + BLOCK].max() for first in range(0, position + 1, BLOCK)]
    for block in range(min(c.sparse_init_block, len(best))):
        best[block] = 1e30
    for block in range(max(0, position // BLOCK - c.sparse_local_block + 1), position // BLOCK + 1):
        best[block] = np.inf
    return set(np.argsort(best)[::-1][:TOPK].tolist())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 9), st.sampled_from(FORCED), st.sampled_from([1, 1 << 20]), st.data())
def test_selection_follows_the_document(seed, blocks, forced, size, data):
    """Also one block of slots at a time, and with few queries, whose product goes another way."""
    c = config(sparse_local_block=forced[0], sparse_init_block=forced[1])
    positions = data.draw(st.lists(st.integers(0, blocks * BLOCK - 1), min_size=1, max_size=6))
    index_q = random(1, HEADS, len(positions), DIM, seed=seed)
    index_k = random(1, 1, blocks * BLOCK, DIM, seed=seed + 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        scratch(monkeypatch, size)
        chosen = np.array(select_blocks(index_q, index_k, mx.array([positions]), c))
    for head in range(HEADS):
        for query, position in enumerate(positions):
            causal = {int(b) for b in chosen[0, head, query] if b * BLOCK <= position}
            assert causal == best_blocks(np.array(index_q)[0, head, query], np.array(index_k)[0, 0], position, c)


def test_bfloat16_scores_are_float32_sums():
    """Sums rounded to bfloat16 would make ties of near-ties, and other blocks."""
    index_q = random(1, HEADS, 200, DIM, seed=10).astype(mx.bfloat16)
    index_k, positions = random(1, 1, 10 * BLOCK, DIM, seed=11).astype(mx.bfloat16), mx.full((1, 200), 79)
    narrow = select_blocks(index_q, index_k, positions, config())
    wide = select_blocks(index_q.astype(mx.float32), index_k.astype(mx.float32), positions, config())
    assert mx.array_equal(mx.sort(narrow), mx.sort(wide))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("starts", [[61], [70, 0, 33, 19]], ids=["one row", "rows of unequal length"])
def test_methods_compute_what_the_document_says(monkeypatch, starts, forced, method):
    """Rows of 0 to 10 blocks, some below the budget of 3, all ending inside a block; slices that leave a remainder."""
    monkeypatch.setattr(module, "choose_method", lambda *_: method)
    c, case = config(sparse_local_block=forced[0], sparse_init_block=forced[1]), Case(starts, 7, seed=5)
    wanted = case.by_hand(c)
    assert np.abs(np.array(case.attend(c)) - wanted).max() < 1e-5
    slices_of = TOPK * BLOCK * 2 * DIM * 4 if method is attend_gathered else case.slots * 4
    for queries in (1, 3):
        scratch(monkeypatch, queries * len(starts) * HEADS * slices_of)
        assert np.abs(np.array(case.attend(c)) - wanted).max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(monkeypatch, method):
    monkeypatch.setattr(module, "choose_method", lambda *_: method)
    case = Case([50, 66], 6, seed=6)
    out = case.attend(config(), mx.float16)
    assert out.dtype == mx.float16
    assert np.abs(np.array(out.astype(mx.float32)) - case.by_hand(config())).max() < 1e-2


@pytest.mark.parametrize("queries", [1, 5])
def test_blocks_that_were_not_selected_are_never_read(queries):
    """Not-a-number in every other block would reach the result through any mask: 0 times NaN is NaN."""
    case = Case([75 - queries], queries, seed=0, spare=0)
    # All queries of a head read the same blocks here, so that the others are nobody's.
    index_q = mx.broadcast_to(case.index_q[:, :, :1], case.index_q.shape)
    blocks = select_blocks(index_q, case.index_k, case.positions, config())
    poison = np.full((1, HEADS, case.slots // BLOCK), np.nan, dtype=np.float32)
    for head in range(HEADS):
        poison[0, head, np.array(blocks)[0, head].reshape(-1)] = 0
    poison = mx.repeat(mx.array(poison), BLOCK, axis=-1)[..., None]
    assert mx.isnan(poison).sum().item() > 0
    arguments = blocks, case.positions, BLOCK, DIM**-0.5
    clean = attend_gathered(case.q, case.keys, case.values, *arguments)
    poisoned = attend_gathered(case.q, case.keys + poison, case.values + poison, *arguments)
    assert mx.array_equal(clean, poisoned)


def test_slices_are_gathered_one_after_another(monkeypatch):
    """Keys and values are 96 MiB for all queries, 3 for a slice; MLX, running ahead, would have 42 of them at once."""
    size, slots, queries, dim = 128, 24 * 128, 128, 128
    c = ModelArgs.from_dict(checkpoints.tiny_config(sparse_block_size=size, sparse_topk_blocks=TOPK))
    keys, index_k = random(1, 2, slots, dim, seed=1), random(1, 1, slots, DIM, seed=2)
    q, index_q = random(1, 2, 1, queries, dim, seed=3), random(1, 2, queries, DIM, seed=4)
    positions = mx.arange(slots - queries, slots)[None]
    mx.eval(keys, index_k, q, index_q, positions)
    scratch(monkeypatch, 3 << 20)
    assert peak(lambda: attend_sparse(q, keys, keys, index_q, index_k, positions, c, 1.0)) < 20 << 20


def test_scores_are_made_a_few_blocks_at_a_time(monkeypatch):
    """Those of all slots are 64 MiB, of a block 1; MLX, running ahead, would have 30 of them at once."""
    slots, queries = 64 * 128, 512
    c = ModelArgs.from_dict(checkpoints.tiny_config(sparse_block_size=128, sparse_topk_blocks=TOPK))
    index_q, index_k = random(1, HEADS, queries, DIM, seed=1), random(1, 1, slots, DIM, seed=2)
    positions = mx.arange(slots - queries, slots)[None]
    mx.eval(index_q, index_k, positions)
    scratch(monkeypatch, 1 << 20)
    assert peak(lambda: select_blocks(index_q, index_k, positions, c)) < 20 << 20


def test_choice_of_method(monkeypatch):
    monkeypatch.setitem(TUNING, "cuda", Tuning(scratch=1, masked_slots=4096))
    assert choose_method(4096, mx.bfloat16, "cuda") is attend_masked
    assert choose_method(4097, mx.bfloat16, "cuda") is attend_gathered
    assert choose_method(4096, mx.float32, "cuda") is attend_gathered
    monkeypatch.setitem(TUNING, "cpu", Tuning(scratch=1, masked_slots=4096))
    assert choose_method(4096, mx.bfloat16, "cpu") is attend_gathered
