"""A batch is sampled alike however the vocabulary is cut: equal logits, penalties, bias, masks, log probabilities."""

import numpy as np
import pytest
from world import run_world

VOCABULARY, STEPS = 333, 6
ROWS = [
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logprobs": 3},
    {"top_k": 0, "top_p": 1, "seed": 3, "logit_bias": {"7": 2.5, "330": 3.0}},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.05, "seed": 4, "frequency_penalty": -1.0, "logprobs": 0},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 0, "logit_bias": {"10": -100, "332": 5}},
]
PROMPTS = [[], [1, 2, 330, 330], [], [], [], []]
MASKS = [None, None, None, None, [0, 31, 32, 170, 332], [11, 12, 331, 332]]


@pytest.fixture(scope="module")
def alone():
    return run_world("sampled_steps", 1, **arguments())[0]


def arguments() -> dict:
    """Logits of which many are equal."""
    logits = np.random.default_rng(7).normal(0, 3, (STEPS, len(ROWS), VOCABULARY)).round(0)
    return dict(logits=logits.tolist(), samplings=ROWS, prompts=PROMPTS, masks=MASKS)


def test_one_rank_does_what_is_asked(alone):
    """Against numpy; ties go to the lowest id."""
    logits, answer = np.array(arguments()["logits"]), []
    for step, found in zip(range(STEPS), alone):
        tokens = found["tokens"].tolist()
        assert tokens[0] == logits[step, 0].argmax()
        expected = penalized(logits[step, 1], PROMPTS[1], answer, ROWS[1])
        answer.append(tokens[1])
        assert tokens[1] == expected.argmax()
        assert found["top_ids"][1].tolist() == np.argsort(-expected, kind="stable")[:3].tolist()
        assert np.isclose(found["logprobs"][1], expected.max() - np.log(np.exp(expected).sum()), atol=1e-5)
        assert tokens[4] in MASKS[4] and tokens[5] in MASKS[5]
        assert found["agree"].all()


def penalized(logits: np.ndarray, prompt: list[int], answer: list[int], row: dict) -> np.ndarray:
    """transformers' repetition penalty, then OpenAI's two."""
    seen, counts = np.unique([*prompt, *answer]), np.bincount(answer, minlength=VOCABULARY)
    logits, penalty = logits.copy(), row["repetition_penalty"]
    logits[seen] = np.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits - row["frequency_penalty"] * counts - row["presence_penalty"] * (counts > 0)


@pytest.mark.parametrize("world", [2, 3])
def test_every_world_gives_the_same(alone, world):
    ranks = run_world("sampled_steps", world, **arguments())
    for rank in ranks:
        for found, expected in zip(rank[:STEPS], alone):
            assert (found["tokens"] == expected["tokens"]).all() and (found["top_ids"] == expected["top_ids"]).all()
            assert found["agree"].all() and np.allclose(found["logprobs"], expected["logprobs"], atol=1e-5)
        assert rank[STEPS]["agree"].tolist() == [row != 1 for row in range(len(ROWS))]
