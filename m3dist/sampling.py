"""How a token is chosen, as a request asks for it: the half of sampling that knows no MLX."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """What a request asks of the choice of its tokens.

    Bias and penalties change the logits; then, in transformers' order, temperature, top-k, top-p and min-p say which
    tokens may be drawn, and how likely each is. Temperature 0 is greedy.
    """

    temperature: float = 1.0
    top_p: float = 0.95  # 1 is off
    top_k: int = 40  # 0 is off
    min_p: float = 0.0  # 0 is off
    presence_penalty: float = 0.0  # taken from the logit of every token that the answer has, as OpenAI defines it
    frequency_penalty: float = 0.0  # the same, times how often the answer has it
    repetition_penalty: float = 1.0  # over prompt and answer, as transformers defines it; 1 is off
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id -> added to its logit
    seed: int = 0
    logprobs: int | None = None  # log probability of the chosen token and of so many of the likeliest; None: of none

    @property
    def penalizes_answer(self) -> bool:
        """Whether the answer's tokens so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.penalizes_prompt

    @property
    def penalizes_prompt(self) -> bool:
        """Whether the prompt's tokens change the logits."""
        return self.repetition_penalty != 1

    def candidates(self, vocabulary: int) -> int:
        """How many of the largest logits of a `vocabulary` can matter."""
        drawn = 1 if self.temperature == 0 else self.top_k or vocabulary
        return min(max(drawn, self.logprobs or 0), vocabulary)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not at their default, for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(DEFAULT, name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Sampling":
        """What `to_json` gave, after a journey as JSON, which spells the token ids of a bias as text."""
        bias = {int(token): added for token, added in values.get("logit_bias", {}).items()}
        return cls(**{**values, "logit_bias": bias})


DEFAULT = Sampling()


def uniform(seed: int, count: int) -> float:
    """The number in [0, 1) that draws the token after the first `count` of an answer.

    A function of both alone, so that a request goes on with the same numbers after a fall of the ranks, and whatever
    else is computed beside it. A multiple of 2^-24, which float32 keeps exactly: rounding must not make it 1.
    """
    digest = hashlib.blake2b(f"{seed} {count}".encode(), digest_size=3).digest()
    return int.from_bytes(digest, "little") / 2**24
