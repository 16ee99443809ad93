"""Generation in one process: chunks of the prompt, stopping, and randomness. Several ranks are tests/ranks's."""

from dataclasses import replace

import checkpoints
import mlx.core as mx
import pytest
from reference.ours import build

from m3dist.engine.alone import Request, generate_tokens
from m3dist.sample import Sampling

CONFIG = checkpoints.tiny_config(num_hidden_layers=2)
GREEDY = Request(list(range(50)), 8, 7, 512, [], Sampling(temperature=0))


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, checkpoints.random_tensors(CONFIG, seed=8))


@pytest.fixture(scope="module")
def greedy(model) -> list[int]:
    """The likeliest tokens after GREEDY's prompt, without a cache."""
    tokens = list(GREEDY.prompt)
    for _ in range(GREEDY.max_tokens):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    return tokens[len(GREEDY.prompt) :]


@pytest.mark.parametrize("chunk", [1, 7, 25, 49, 50, 51])
def test_the_prompt_may_come_in_any_chunks(model, greedy, chunk):
    assert list(generate_tokens(model, replace(GREEDY, prefill_chunk=chunk))) == greedy


def test_a_stop_token_ends_and_is_not_given(model, greedy):
    stop = greedy[3]
    assert list(generate_tokens(model, replace(GREEDY, stop_ids=[stop]))) == greedy[: greedy.index(stop)]


@pytest.mark.parametrize("after", [1, 5, 7, 8])
def test_finished_ends(model, greedy, after):
    asked = []

    def finished(token: int) -> bool:
        asked.append(token)
        return len(asked) == after

    assert list(generate_tokens(model, GREEDY, finished)) == greedy[:after] == asked


def test_every_step_draws_anew():
    """A head of zeros: all tokens are as likely, in every step, so that the key alone decides."""
    tensors = checkpoints.random_tensors(CONFIG, seed=8)
    tensors["language_model.lm_head.weight"] *= 0
    flat = build(CONFIG, tensors)
    request = replace(GREEDY, max_tokens=20, sampling=Sampling(1.0, 1.0, 0))
    first, again, other = (list(generate_tokens(flat, replace(request, seed=seed))) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) > 10
