"""Sampling: the distribution that temperature, top-k, top-p and min-p ask for, and no other."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.comm import Comm, agreement
from m3dist.sample import Candidates, Sampling, choose, gather_candidates

VOCABULARY = 12
HIDDEN = mx.zeros(4)
NOTE = mx.array([7], dtype=mx.uint32)


def wanted(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """transformers' order, in float64: temperature, top-k, top-p over what is left, min-p."""
    scaled = logits.astype(np.float64) / s.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = np.zeros(len(logits), dtype=bool)
    kept[order[: s.top_k or len(logits)]] = True
    p = np.where(kept, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    kept[order[before >= s.top_p]] = False
    kept &= p >= s.min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


def candidates(logits: np.ndarray, s: Sampling):
    found = gather_candidates(mx.array(logits), 0, VOCABULARY, HIDDEN, s.candidates(VOCABULARY), Comm(), NOTE)
    return Candidates(*found)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, 1.0, 0, 0.0),
        Sampling(0.7, 1.0, 4, 0.0),
        Sampling(1.3, 0.6, 0, 0.0),
        Sampling(1.0, 0.8, 5, 0.0),
        Sampling(1.0, 1.0, 0, 0.3),
        Sampling(2.0, 0.9, 8, 0.2),
    ],
)
def test_frequencies(sampling):
    logits = np.random.default_rng(1).normal(0, 1.5, VOCABULARY).astype(np.float32)
    found = candidates(logits, sampling)
    draws = 4000
    tokens = [choose(found, sampling, key) for key in mx.random.split(mx.random.key(3), draws)]
    counts = np.bincount(np.array(mx.concatenate(tokens)), minlength=VOCABULARY)
    expected = wanted(logits, sampling)
    assert (counts[expected == 0] == 0).all()
    spread = np.sqrt(draws * expected * (1 - expected))
    assert (np.abs(counts - draws * expected) <= 5 * spread + 1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=VOCABULARY, max_size=VOCABULARY))
def test_greedy_takes_the_first_of_the_largest(values):
    logits = np.array(values, dtype=np.float32)
    greedy = Sampling(temperature=0)
    assert choose(candidates(logits, greedy), greedy, None).tolist() == [int(logits.argmax())]


def test_top_p_stops_at_the_token_that_reaches_it():
    half = mx.array([0.0, -100.0, 0.0] + [-100.0] * (VOCABULARY - 3))
    found = candidates(np.array(half), Sampling(1.0, 0.5, 0))
    assert {choose(found, Sampling(1.0, 0.5, 0), key).item() for key in mx.random.split(mx.random.key(0), 20)} == {0}


class Gathered(Comm):
    """Rank after rank in one process: each leaves its packet, and the last finds those of all."""

    def __init__(self):
        super().__init__()
        self.packets = []

    def all_gather(self, x):
        self.packets.append(x)
        return mx.stack(self.packets)


def over_ranks(logits: np.ndarray, rows: list[int], hidden: list[mx.array], s: Sampling):
    comm, ends = Gathered(), np.cumsum(rows)
    for end, n, state in zip(ends.tolist(), rows, hidden, strict=True):
        local, wanted = mx.array(logits[end - n : end]), s.candidates(VOCABULARY)
        found = Candidates(*gather_candidates(local, end - n, max(rows), state, wanted, comm, NOTE))
    return found


@pytest.mark.parametrize("rows", [[6, 6], [5, 1, 6], [1, 1, 1, 9]])
@pytest.mark.parametrize("top_k", [0, 1, 4, 8])
def test_the_same_candidates_however_the_vocabulary_is_cut(rows, top_k):
    """Also where a rank has fewer rows than candidates are wanted, all logits are negative and some are equal."""
    logits = np.random.default_rng(4).integers(-9, -2, VOCABULARY).astype(np.float32)
    for s in (Sampling(top_k=top_k), Sampling(temperature=0)):
        one, cut = candidates(logits, s), over_ranks(logits, rows, [HIDDEN] * len(rows), s)
        assert one.ids.tolist() == cut.ids.tolist() and one.logits.tolist() == cut.logits.tolist()
        assert one.agree.item() and cut.agree.item()


def test_ranks_that_do_not_agree_are_seen():
    logits, other = np.zeros(VOCABULARY, np.float32), mx.array([0.0, 0.0, 1e-30, 0.0])
    for states in ([HIDDEN, other, HIDDEN], [HIDDEN, HIDDEN, other], [other, HIDDEN, HIDDEN]):
        assert not over_ranks(logits, [4, 4, 4], states, Sampling()).agree.item()


def test_agreement_sees_one_bit_and_an_exchange():
    for dtype in (mx.float32, mx.bfloat16):
        x = mx.array(np.random.default_rng(2).standard_normal(64), dtype=dtype)
        y = mx.array(x)
        y[5] = y[5] * 1.01
        swapped = mx.concatenate([x[1:2], x[:1], x[2:]])
        assert agreement(x).item() == agreement(mx.array(x)).item()
        assert len({agreement(v).item() for v in (x, y, swapped)}) == 3
