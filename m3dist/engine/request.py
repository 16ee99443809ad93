"""What a client asked, as the engine computes it: token ids only. No MLX."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3dist.errors import M3Error
from m3dist.sampling import Sampling

# As OpenAI's API has them.
MOST_LOGPROBS = 20
LARGEST_PENALTY = 2.0  # for presence and for frequency
LARGEST_BIAS = 100.0
# Further out float32 logits would overflow.
REPETITION_PENALTIES = (0.01, 100.0)
LARGEST_TOP_K = 2**31 - 1  # an int32 on the device


class RequestError(M3Error):
    """A request that cannot be computed; names the field. It ends that request alone."""


@dataclass(frozen=True)
class Request:
    """A prompt, what of its answer is there already, and how the answer goes on and ends."""

    id: int  # unique as long as the gateway lives
    client: str  # requests of one client wait for each other, those of others do not wait for them
    prompt: tuple[int, ...]
    emitted: tuple[int, ...] = ()  # the answer's tokens so far: after a fall of the ranks a request goes on after them
    max_tokens: int = 16  # of the whole answer, `emitted` included
    stop_ids: tuple[int, ...] = ()  # end the answer, and are no part of it
    sampling: Sampling = Sampling()
    grammar: str | None = None  # in llguidance's Lark: the whole text of the answer, its reasoning included

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "client": self.client,
            "prompt": self.prompt,
            "emitted": self.emitted,
            "max_tokens": self.max_tokens,
            "stop_ids": self.stop_ids,
            "sampling": self.sampling.to_json(),
            "grammar": self.grammar,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], vocab_size: int, context: int) -> "Request":
        """What `to_json` gave. Raises RequestError for whatever could harm the ranks: token ids that are not in the
        vocabulary of `vocab_size`, a prompt that leaves no room for an answer in `context` tokens, values out of range.
        """
        try:
            lists = {name: tuple(values.get(name, ())) for name in ("prompt", "emitted", "stop_ids")}
            sampling = Sampling.from_json(values.get("sampling", {}))
            request = cls(**{**values, **lists, "sampling": sampling})
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"a request whose fields are not what they should be: {error}") from error
        _check(request, vocab_size, context)
        _check_sampling(request.sampling, vocab_size)
        return request


def _check(request: Request, vocab_size: int, context: int) -> None:
    _need("id", _whole(request.id) and request.id >= 0, request.id)
    _need("client", isinstance(request.client, str), request.client)
    for name in ("prompt", "emitted", "stop_ids"):
        ids = getattr(request, name)
        known = not ids or (set(map(type, ids)) == {int} and 0 <= min(ids) and max(ids) < vocab_size)
        _need(name, known, f"token ids outside 0 .. {vocab_size - 1}")
    _need("prompt", len(request.prompt) > 0, "empty")
    _need("prompt", len(request.prompt) < context, f"{len(request.prompt)} tokens of a context of {context}")
    _need("max_tokens", _whole(request.max_tokens) and request.max_tokens >= 1, request.max_tokens)
    _need("grammar", request.grammar is None or isinstance(request.grammar, str), type(request.grammar).__name__)


def _check_sampling(sampling: Sampling, vocab_size: int) -> None:
    least, most = REPETITION_PENALTIES
    good = {
        "temperature": lambda value: _number(value) and value >= 0,
        "top_p": lambda value: _number(value) and 0 < value <= 1,
        "top_k": lambda value: _whole(value) and 0 <= value <= LARGEST_TOP_K,
        "min_p": lambda value: _number(value) and 0 <= value <= 1,
        "presence_penalty": lambda value: _number(value) and abs(value) <= LARGEST_PENALTY,
        "frequency_penalty": lambda value: _number(value) and abs(value) <= LARGEST_PENALTY,
        "repetition_penalty": lambda value: _number(value) and least <= value <= most,
        "seed": _whole,
        "logprobs": lambda value: value is None or (_whole(value) and 0 <= value <= MOST_LOGPROBS),
    }
    for name, is_good in good.items():
        _need(name, is_good(getattr(sampling, name)), getattr(sampling, name))
    for token, added in sampling.logit_bias.items():
        _need("logit_bias", 0 <= token < vocab_size, f"token id {token} outside 0 .. {vocab_size - 1}")
        _need("logit_bias", _number(added) and abs(added) <= LARGEST_BIAS, added)


def _need(name: str, good: bool, found: object) -> None:
    if not good:
        raise RequestError(f"{name}: {found}")


def _whole(value: Any) -> bool:
    return type(value) is int  # true and false are ints to isinstance


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # as math.isfinite, for ints of any size
