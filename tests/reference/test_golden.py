"""Our model against the stored logits of transformers: one function, however its tokens are fed. Needs no torch."""

import itertools
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from reference import golden
from reference.ours import build, feed

TOLERANCE = 1e-4  # float32 against float32; a wrong block or expert costs 1e-1, rounding 1e-6


def near(got: mx.array, wanted: np.ndarray) -> None:
    """got [..., vocabulary] against the stored subset of the vocabulary."""
    assert golden.relative_error(np.array(got)[..., golden.VOCABULARY], wanted) < TOLERANCE


@pytest.fixture(scope="module", params=golden.CASES)
def case(request):
    """answers: the stored arrays. model: ours. tokens [1, 128] and rows [4, 119]: the ids as MLX arrays."""
    answers = golden.read(request.param)
    model = build(answers.config, answers.tensors)
    tokens, rows = (mx.array(ids.astype(np.int32)) for ids in (answers.tokens[None], answers.rows))
    return SimpleNamespace(answers=answers, model=model, tokens=tokens, rows=rows)


def test_one_shot(case):
    near(case.model(case.tokens)[0], case.answers.logits)


def test_one_shot_fills_the_cache(case):
    near(case.model(case.tokens, cache=case.model.make_cache())[0], case.answers.logits)


@pytest.mark.parametrize("sizes", [(1, 7, 23, 3, 41, 53), (25, 1, 1, 101), (127, 1), (17,) * 7 + (9,)], ids=str)
def test_chunks(case, sizes):
    near(feed(case.model, case.tokens, sizes)[0], case.answers.logits)


def test_token_by_token(case):
    near(feed(case.model, case.tokens, [1] * golden.TOKENS)[0], case.answers.logits)


def test_decode_after_prefill(case):
    """Against transformers' own decode, which goes through its cache."""
    logits = feed(case.model, case.tokens, [golden.PREFILL] + [1] * (golden.TOKENS - golden.PREFILL))
    near(logits[0, golden.PREFILL :], case.answers.decode)


def test_trimmed_and_fed_again(case):
    """Wrong tokens that are forgotten leave no trace in K, V or index K."""
    cache = case.model.make_cache()
    case.model(case.tokens[:, :90], cache=cache)
    case.model(case.tokens[:, :20], cache=cache)
    for layer in cache:
        assert layer.trim(33) == 33
    near(case.model(case.tokens[:, 77:], cache=cache)[0], case.answers.logits[77:])


@pytest.mark.parametrize("edges", [(0, 113), (0, 24, 113), (0, 1, 30, 70, 113)], ids=str)
def test_rows_of_unequal_length(case, edges):
    """Right-padded rows, prefilled at once or in chunks in which some rows have nothing left, then decoded together."""
    lengths, rows = golden.ROWS, len(golden.ROWS)
    cache, last = case.model.make_cache(), [None] * rows
    for start, end in itertools.pairwise(edges):
        valid = [min(max(length - start, 0), end - start) for length in lengths]
        logits = case.model(case.rows[:, start:end], cache=cache, lengths=valid)
        for row, length in enumerate(lengths):
            if start < length <= end:
                last[row] = logits[row, length - 1 - start]
    near(mx.stack(last), case.answers.row_logits[:, 0])
    for step in range(golden.ROW_STEPS):
        tokens = mx.array([[int(ids[length + step])] for ids, length in zip(case.rows, lengths, strict=True)])
        near(case.model(tokens, cache=cache)[:, 0], case.answers.row_logits[:, step + 1])


def test_rows_do_not_touch_each_other(case):
    """A row's bits do not depend on what its padding or its neighbour holds."""
    model, lengths = case.model, list(golden.ROWS)
    end = max(lengths)
    clean = np.array(model(case.rows[:, :end], cache=model.make_cache(), lengths=lengths))
    noisy = np.array(case.rows[:, :end])
    for row, length in enumerate(lengths):
        noisy[row, length:] = 7
    dirty = np.array(model(mx.array(noisy), cache=model.make_cache(), lengths=lengths))
    for row, length in enumerate(lengths):
        assert (clean[row, :length] == dirty[row, :length]).all()
