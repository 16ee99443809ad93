"""What a client asked, as the engine computes it: token ids only. No MLX."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from m3dist.errors import M3Error
from m3dist.sampling import Sampling

MOST_LOGPROBS = 20  # as OpenAI's API has it
WIDEST_PENALTY = 2.0  # of presence and frequency, as OpenAI's API has it
LARGEST_TOP_K = 2**31  # more than any vocabulary


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
            request = cls(**values)
            request = replace(
                request,
                prompt=tuple(request.prompt),
                emitted=tuple(request.emitted),
                stop_ids=tuple(request.stop_ids),
                sampling=Sampling.from_json(values.get("sampling", {})),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"not a request: {error}") from error
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
    s = sampling
    _need("temperature", _number(s.temperature) and s.temperature >= 0, s.temperature)
    _need("top_p", _number(s.top_p) and 0 < s.top_p <= 1, s.top_p)
    _need("top_k", _whole(s.top_k) and 0 <= s.top_k < LARGEST_TOP_K, s.top_k)
    _need("min_p", _number(s.min_p) and 0 <= s.min_p <= 1, s.min_p)
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(s, name)
        _need(name, _number(penalty) and abs(penalty) <= WIDEST_PENALTY, penalty)
    _need("repetition_penalty", _number(s.repetition_penalty) and s.repetition_penalty > 0, s.repetition_penalty)
    _need("logit_bias", all(0 <= token < vocab_size for token in s.logit_bias), "token ids outside the vocabulary")
    _need("logit_bias", all(map(_number, s.logit_bias.values())), "values that are no finite numbers")
    _need("seed", _whole(s.seed), s.seed)
    _need("logprobs", s.logprobs is None or (_whole(s.logprobs) and 0 <= s.logprobs <= MOST_LOGPROBS), s.logprobs)


def _need(name: str, good: bool, found: object) -> None:
    if not good:
        raise RequestError(f"{name}: {found}")


def _whole(value: object) -> bool:
    return type(value) is int  # true and false are ints to isinstance


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
