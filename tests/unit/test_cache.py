"""The cache against plain lists: whatever joins, leaves or is trimmed, K, V and index K stay in lockstep."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.cache import LayerCache

HEADS, DIM = 2, 3


class Rows:
    """A cache of ours and what it must hold: for each row its tokens [n, HEADS, DIM]."""

    def __init__(self, block: int, rows: int, seed: int):
        self.cache, self.rows = LayerCache(block), [np.zeros((0, HEADS, DIM), np.float32)] * rows
        self.random = np.random.default_rng(seed)

    def append(self, tokens: int) -> None:
        new = self.random.standard_normal((len(self.rows), HEADS, tokens, DIM)).astype(np.float32)
        x = mx.array(new)
        self.cache.append(x, x + 1, x[:, :1] + 2)
        self.rows = [np.concatenate([row, n.swapaxes(0, 1)]) for row, n in zip(self.rows, new, strict=True)]

    def check(self) -> None:
        cache = self.cache
        assert (cache.lengths or [0] * len(self.rows)) == [len(row) for row in self.rows]
        for buffer, added in zip(cache.state, (0, 1, 2), strict=False):
            assert buffer.shape[2] % cache.block_size == 0 and buffer.shape[0] == len(self.rows)
            for row, held in zip(self.rows, np.array(buffer), strict=True):
                wanted = row.swapaxes(0, 1)[: len(held)] + np.float32(added)
                assert np.array_equal(held[:, : len(row)], wanted)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_come_and_go(data):
    block, rows = data.draw(st.sampled_from([1, 5, 8])), Rows(1, 0, 0)
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 7, 250, 300]), min_size=1, max_size=4))
    singles = [Rows(block, 1, seed) for seed in range(len(lengths))]
    for single, length in zip(singles, lengths, strict=True):
        if length:
            single.append(length)
    rows = Rows(block, 0, 99)
    rows.cache = LayerCache.merge([single.cache for single in singles])
    rows.rows = [single.rows[0] for single in singles]
    for step in data.draw(st.lists(st.sampled_from(["append", "trim", "filter", "extend", "extract"]), max_size=6)):
        if step == "append":
            rows.append(data.draw(st.integers(1, 20)))
        elif step == "trim":
            tokens = data.draw(st.integers(0, 30))
            gone = rows.cache.trim(tokens)
            assert gone == min(tokens, max(map(len, rows.rows)))
            rows.rows = [row[: max(0, len(row) - gone)] for row in rows.rows]
        elif step == "filter":
            keep = data.draw(st.permutations(range(len(rows.rows))))[: max(1, len(rows.rows) - 1)]
            rows.cache.filter(keep)
            rows.rows = [rows.rows[i] for i in keep]
        elif step == "extend":
            other = Rows(block, 2, 7)
            other.append(data.draw(st.sampled_from([3, 600])))
            rows.cache.extend(other.cache)
            rows.rows = rows.rows + other.rows
        else:
            single = Rows(block, 0, 0)
            single.cache, single.rows = rows.cache.extract(len(rows.rows) - 1), rows.rows[-1:]
            single.check()
        rows.check()


@pytest.mark.parametrize("padded", [[3, 5, 0], [5, 5, 5]])
def test_padding_does_not_count(padded):
    rows = Rows(8, 3, 1)
    rows.append(4)
    rows.cache.prepare(padded)
    rows.append(2)
    rows.append(3)
    rows.cache.finalize()
    rows.rows = [row[: 4 + n] for row, n in zip(rows.rows, padded, strict=True)]
    rows.check()
    rows.append(1)
    rows.check()
