"""Causal attention, whole and in slices, against the definition."""

import mlx.core as mx
import numpy as np
import pytest

from m3dist.model import cpu, dense
from m3dist.model.dense import attend_causal
from m3dist.model.positions import Positions
from m3dist.model.tuning import TUNING, Tuning, backend, writes_scores_out

pytestmark = pytest.mark.usefixtures("library")

HEADS, KV_HEADS, DIM, SPARE = 6, 2, 16, 5


def heads(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


@pytest.mark.parametrize("starts", [(0,), (37,), (0, 0), (11, 40, 0)])
@pytest.mark.parametrize("queries", [1, 3, 1000], ids=lambda n: f"{n} at a time")
def test_every_query_sees_the_keys_up_to_its_own(monkeypatch, starts, queries):
    positions, tokens = Positions(starts, 10), 10
    rows, capacity = len(starts), max(starts) + tokens + SPARE
    q, keys = heads(rows, HEADS, tokens, DIM, seed=1), heads(rows, KV_HEADS, capacity, DIM, seed=2)
    values = heads(rows, KV_HEADS, capacity, DIM, seed=3)
    monkeypatch.setitem(TUNING, backend(), Tuning(queries * rows * HEADS * positions.end * 4, masked_slots=0))
    out = np.array(attend_causal(q, keys, values, positions, DIM**-0.5))
    for row, head, token in np.ndindex(rows, HEADS, tokens):
        end, kv = starts[row] + token + 1, head // (HEADS // KV_HEADS)
        scores = np.array(q)[row, head, token] @ np.array(keys)[row, kv, :end].T * DIM**-0.5
        weights = np.exp(scores) / np.exp(scores).sum()
        assert np.abs(out[row, head, token] - weights @ np.array(values)[row, kv, :end]).max() < 1e-5


def test_scores_are_never_all_in_memory(monkeypatch):
    """Those of all queries are 32 MiB, of a slice 1; MLX, running ahead, would have 20 of them at once."""
    positions, query_heads = Positions((4096 - 256,), 256), 8
    q, keys = heads(1, query_heads, 256, DIM, seed=1), heads(1, KV_HEADS, 4096, DIM, seed=2)
    mx.eval(q, keys)
    monkeypatch.setitem(TUNING, backend(), Tuning(1 << 20, masked_slots=0))
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend_causal(q, keys, keys, positions, 1.0))
    assert mx.get_peak_memory() - held < 10 << 20


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_masks_of_rows_apart_are_summands_and_never_large(monkeypatch, dtype):
    """Where attention writes no scores out, as on a GPU, what is left are masks: here of up to 128 KiB a query."""
    masks = []

    def attend(q, keys, values, *, scale, mask):
        masks.append(mask)
        return q

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(dense, "writes_scores_out", lambda *_: False)
    monkeypatch.setattr(cpu, "usable", lambda *_: False)
    monkeypatch.setitem(TUNING, backend(), Tuning(1 << 20, masked_slots=0))
    positions = Positions((8192 - 60, 8192 - 64, 0, 5), 60)
    q, keys = heads(4, 2, 60, DIM, seed=1).astype(dtype), heads(4, 1, 8192, DIM, seed=2).astype(dtype)
    assert attend_causal(q, keys, keys, positions, 1.0).shape == q.shape
    assert sum(mask.shape[2] for mask in masks) == 60
    assert all(mask.dtype == dtype and mask.nbytes <= 1 << 20 for mask in masks)
    aligned = Positions((8192 - 60,) * 4, 60)
    attend_causal(q, keys, keys, aligned, 1.0)
    assert masks[-1] == "causal" and masks[-2] != "causal"


def test_where_scores_are_written_out():
    assert writes_scores_out(mx.float32, "cpu") and writes_scores_out(mx.bfloat16, "cpu")
    assert writes_scores_out(mx.float32, "cuda") and not writes_scores_out(mx.bfloat16, "cuda")
    assert not writes_scores_out(mx.bfloat16, "metal")
