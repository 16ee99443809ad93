"""Sampling of many rows at once: each row as if it were alone, against numpy in float64."""

import mlx.core as mx
import numpy as np
import pytest

from m3dist import sample
from m3dist.adjust import RowState, adjust_rows, allowed
from m3dist.comm import Comm
from m3dist.sample import UNLIKELY, gather_batch, largest, sample_batch, wanted_of
from m3dist.sampling import Sampling, uniform

VOCABULARY = 300  # several CHUNKs of sample.py


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    """float32 [rows, VOCABULARY], rounded so that some are equal."""
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCABULARY)).astype(np.float32).round(1)


def sampled(logits: np.ndarray, samplings: list[Sampling], uniforms: list[float]):
    hidden = mx.zeros((len(logits), 4))
    return sample_batch(mx.array(logits), 0, VOCABULARY, hidden, samplings, uniforms, VOCABULARY, Comm())


def distribution(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """What a row is to be drawn from: transformers' order, in float64."""
    scaled = logits.astype(np.float64) / s.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: s.top_k or len(order)]
    p = np.zeros(len(scaled))
    p[kept] = np.exp(scaled[kept] - scaled.max())
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= s.top_p]] = 0
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("count", [1, 2, 4, 5, 64, 299, 300])
def test_largest_of_every_row(count):
    logits = random_logits(7)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    assert largest(mx.array(logits), count).tolist() == expected.tolist()


def test_greedy_rows_take_argmax_whatever_the_others():
    logits = random_logits(5)
    greedy, other = Sampling(temperature=0), Sampling(temperature=2.0, top_k=50)
    expected = logits.argmax(axis=1).tolist()
    assert sampled(logits, [greedy] * 5, [0.99] * 5).tokens.tolist() == expected
    found = sampled(logits, [greedy, other, greedy, other, greedy], [0.99] * 5).tokens.tolist()
    assert found[::2] == expected[::2] and found[1] != expected[1]


KINDS = [
    Sampling(1.0, 1.0, 0),
    Sampling(0.7, 1.0, 4),
    Sampling(1.3, 0.6, 0),
    Sampling(1.0, 0.8, 5),
    Sampling(1.0, 1.0, 0, 0.3),
    Sampling(2.0, 0.9, 8, 0.2),
]


def test_frequencies():
    """Chi-square of 2000 draws of each kind in one batch; and nothing that is cut away is ever drawn."""
    draws, logits = 2000, random_logits(1, seed=4)[0]
    samplings = [kind for kind in KINDS for _ in range(draws)]
    numbers = [uniform(seed, 0) for seed in range(len(samplings))]
    tokens = np.array(sampled(np.tile(logits, (len(samplings), 1)), samplings, numbers).tokens).reshape(-1, draws)
    for kind, row in zip(KINDS, tokens):
        expected = draws * distribution(logits, kind)
        counts = np.bincount(row, minlength=VOCABULARY)
        assert (counts[expected == 0] == 0).all()
        large = expected >= 5
        seen = np.append(counts[large], counts[~large].sum())
        wanted = np.append(expected[large], max(expected[~large].sum(), 1e-9))
        square, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1
        assert square < freedom + 5 * np.sqrt(2 * freedom) + 5, kind


def test_a_row_s_token_depends_on_its_own_number_alone():
    logits = random_logits(6, seed=2)
    numbers = [uniform(9, t) for t in range(6)]
    together = sampled(logits, KINDS, numbers).tokens.tolist()
    for row in range(6):
        alone = sampled(logits[row : row + 1], KINDS[row : row + 1], numbers[row : row + 1]).tokens.tolist()
        assert alone == together[row : row + 1]


@pytest.mark.parametrize("s", [*KINDS, Sampling(1.0, 0.0, 0), Sampling(1e-3, 0.5, 2)])
def test_the_ends_of_the_unit_interval(s):
    """0 draws the likeliest, the largest number below 1 the last that is kept (its probability is far above 2^-24)."""
    logits = random_logits(1, seed=3)
    first, last = (sampled(logits, [s], [number]).tokens.item() for number in (0.0, 1 - 2**-24))
    assert first == logits[0].argmax()
    p = distribution(logits[0], s) if s.top_p else np.eye(VOCABULARY)[first]
    assert p[last] > 0


def test_uniform_is_even_and_a_function_of_seed_and_count():
    numbers = np.array([uniform(seed, count) for seed in range(40) for count in range(100)])
    assert (numbers >= 0).all() and (numbers < 1).all() and (np.float32(numbers) == numbers).all()
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 50  # 19 degrees of freedom
    assert len(set(numbers)) > 3990 and uniform(3, 5) == uniform(3, 5) != uniform(5, 3)


def test_log_probabilities():
    logits = random_logits(3)
    samplings = [Sampling(logprobs=0), Sampling(temperature=0, logprobs=5), Sampling(0.5, 1.0, 3)]
    found = sampled(logits, samplings, [0.3, 0.5, 0.7])
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    tokens, order = np.array(found.tokens), np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert np.allclose(found.logprobs, exact[range(3), tokens], atol=1e-5)
    assert np.array(found.top_ids).tolist() == order.tolist()
    assert np.allclose(found.top_logprobs, np.take_along_axis(exact, order, 1), atol=1e-5)


def test_log_probabilities_of_a_whole_vocabulary_sum_to_one():
    found = gather_batch(mx.array(random_logits(4)), 0, VOCABULARY, mx.zeros((4, 2)), VOCABULARY, Comm())
    sums = mx.exp(found.logits - found.normalizer[:, None]).sum(axis=1)
    assert np.allclose(sums, 1, atol=1e-5)


def test_candidates_are_as_few_as_the_batch_allows():
    greedy = Sampling(temperature=0)
    assert wanted_of([greedy] * 3, VOCABULARY) == 1
    assert wanted_of([greedy, Sampling(temperature=0, logprobs=20)], VOCABULARY) == 32
    assert wanted_of([greedy, Sampling(top_k=40)], VOCABULARY) == 64
    assert wanted_of([Sampling(top_k=0), greedy], VOCABULARY) == VOCABULARY


def test_only_rows_that_want_a_whole_vocabulary_sort_it(monkeypatch):
    """Beside others that do not, with log probabilities as wide for all."""
    gathered = []

    def noting(local, first_row, widest, hidden, wanted, *rest):
        gathered.append((local.shape[0], wanted))
        return gather_batch(local, first_row, widest, hidden, wanted, *rest)

    monkeypatch.setattr(sample, "gather_batch", noting)
    whole, few, greedy = Sampling(1.0, 0.9, 0), Sampling(1.0, 0.95, 40), Sampling(temperature=0, logprobs=1)
    samplings, numbers = [few, whole, greedy, few, whole], [uniform(7, t) for t in range(5)]
    logits = random_logits(5, seed=6)
    for told in (False, True):
        if told:
            samplings[4] = Sampling(1.0, 0.9, 0, logprobs=5)
        found = sampled(logits, samplings, numbers)
        assert gathered == [(3, 64), (2, VOCABULARY)]
        gathered.clear()
        for row in range(5):
            one = sampled(logits[row : row + 1], samplings[row : row + 1], numbers[row : row + 1])
            assert one.tokens.tolist() == [found.tokens[row].item()]
            if samplings[row].logprobs:
                most = samplings[row].logprobs
                assert np.allclose(one.logprobs, found.logprobs[row])
                assert one.top_ids[0].tolist() == found.top_ids[row, :most].tolist()
                assert np.allclose(one.top_logprobs[0], found.top_logprobs[row, :most])
        gathered.clear()


# -- penalties, bias, masks -------------------------------------------------------------------------------------------


def transformers_repetition(scores: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    """RepetitionPenaltyLogitsProcessor: scores = where(score < 0, score * penalty, score / penalty), once a token."""
    scores = scores.copy()
    for token in set(seen):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    return scores


def openai_penalties(scores: np.ndarray, answer: list[int], frequency: float, presence: float) -> np.ndarray:
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c of the answer's tokens."""
    counts = np.bincount(answer, minlength=len(scores))
    return scores - counts * frequency - (counts > 0) * presence


def test_penalties_and_bias():
    logits, prompt, answer = random_logits(1)[0], [1, 1, 7, 250], [3, 7, 7, 9]
    bias = {3: 4.5, 100: -100.0}
    s = Sampling(presence_penalty=0.6, frequency_penalty=-0.4, repetition_penalty=1.3, logit_bias=bias)
    expected = transformers_repetition(logits.astype(np.float64), prompt + answer, 1.3)
    expected = openai_penalties(expected, answer, -0.4, 0.6)
    for token, value in bias.items():
        expected[token] += value
    state = RowState(s, prompt, answer[:2], 0, VOCABULARY)
    for token in answer[2:]:
        state.took(mx.array(token, dtype=mx.uint32))
    assert np.allclose(state.adjust(mx.array(logits)), expected, atol=1e-5)
    cut = RowState(s, prompt, answer, 5, 90).adjust(mx.array(logits[5:95]))
    assert np.allclose(cut, expected[5:95], atol=1e-5)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_each_penalty_alone(name):
    logits = random_logits(1)[0]
    state = RowState(Sampling(**{name: 1.5}), [4], [], 0, VOCABULARY)
    state.took(mx.array([6], dtype=mx.uint32))
    state.took(mx.array([6], dtype=mx.uint32))
    expected = {
        "presence_penalty": openai_penalties(logits, [6, 6], 0, 1.5),
        "frequency_penalty": openai_penalties(logits, [6, 6], 1.5, 0),
        "repetition_penalty": transformers_repetition(logits, [4, 6, 6], 1.5),
    }[name]
    assert np.allclose(state.adjust(mx.array(logits)), expected, atol=1e-5)


def packed(bits: np.ndarray) -> bytes:
    """bool [n] -> uint32 words, the lowest bit first."""
    return np.packbits(np.pad(bits, (0, -len(bits) % 32)), bitorder="little").tobytes()


@pytest.mark.parametrize(("first_row", "held"), [(0, VOCABULARY), (0, 33), (31, 2), (64, 32), (77, 223), (299, 1)])
def test_masks_are_cut_with_the_vocabulary(first_row, held):
    bits = np.random.default_rng(5).random(VOCABULARY) < 0.5
    assert allowed(packed(bits), first_row, held).tolist() == bits[first_row : first_row + held].tolist()


def test_rows_are_adjusted_each_by_its_own():
    logits = random_logits(3)
    states = [RowState(s, [], [], 0, VOCABULARY) for s in (Sampling(), Sampling(logit_bias={8: 50.0}), Sampling())]
    bits = np.zeros(VOCABULARY, bool)
    bits[[11, 12]] = True
    adjusted = np.array(adjust_rows(mx.array(logits), states, [None, None, packed(bits)]))
    assert (adjusted[0] == logits[0]).all() and adjusted[1].argmax() == 8
    assert np.isfinite(adjusted[2]).nonzero()[0].tolist() == [11, 12]
    tokens = sampled(adjusted, [Sampling(top_k=0)] * 3, [0.999] * 3).tokens.tolist()
    assert tokens[1] == 8 and tokens[2] in (11, 12)
    local = mx.array(logits)
    assert adjust_rows(local, [states[0]] * 3, [None] * 3) is local


def test_log_probabilities_are_of_what_is_allowed():
    bits = np.zeros(VOCABULARY, bool)
    bits[[11, 12]] = True
    logits = random_logits(1)
    state = RowState(Sampling(), [], [], 0, VOCABULARY)
    masked = np.array(adjust_rows(mx.array(logits), [state], [packed(bits)]))
    found = sampled(masked, [Sampling(temperature=0, logprobs=3)], [0.0])
    exact = logits[0, [11, 12]] - np.logaddexp(logits[0, 11], logits[0, 12])
    assert np.allclose(found.top_logprobs.tolist()[0][:2], sorted(exact, reverse=True), atol=1e-5)
    assert found.top_logprobs[0, 2].item() == UNLIKELY
