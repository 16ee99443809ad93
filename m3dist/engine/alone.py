"""A request -> its tokens, on every rank at once. Rank 0 samples and decides when to stop; the others obey."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from m3dist.cache import LayerCache
from m3dist.errors import CommunicationError
from m3dist.model import Model
from m3dist.sample import Sampling, choose

RESERVED = 4096  # tokens of an answer that caches have room for from the start


@dataclass(frozen=True)
class Step:
    """A step under way: uint32 [1] token and stop (rank 0 says so), and whether the ranks agree."""

    token: mx.array
    stop: mx.array
    agree: mx.array


@dataclass(frozen=True)
class Request:
    """What rank 0 asks all ranks to compute; plain values, sent as JSON."""

    prompt: list[int]
    max_tokens: int
    seed: int
    prefill_chunk: int
    stop_ids: list[int]
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Request":
        return cls(**values | {"sampling": Sampling(**values["sampling"])})


def generate_tokens(
    model: Model,
    request: Request,
    finished: Callable[[int], bool] = lambda token: False,
    progress: Callable[[str], None] = lambda phase: None,
    cache: list[LayerCache] | None = None,
) -> Iterator[int]:
    """The answer's tokens, the same on every rank, without the stop token. `cache` holds what comes before the prompt.

    Rank 0 samples; its token reaches the others inside the graph (the likeliest needs no sampling: all ranks have the
    same candidates). The next step is started before this one's token is on the host. `finished` is asked on rank 0
    alone, with each token; its yes travels with the step after next, so that all ranks stop at the same step, the
    others having seen one token more. Raises CommunicationError where the ranks' hidden states are no longer equal.
    """
    comm, cache = model.comm, cache or model.make_cache()
    for layer in cache:
        layer.reserve(layer.offset + len(request.prompt) + min(request.max_tokens, RESERVED))
    key = mx.random.key(request.seed)
    stopping = False

    def step(tokens: mx.array) -> Step:
        """tokens [n] -> the next, on its way."""
        nonlocal key
        hidden = model.hidden(tokens[None], cache=cache)[0, -1]
        candidates = model.candidates(hidden, request.sampling, note=stopping)
        if request.sampling.temperature == 0:
            token = choose(candidates, request.sampling, None)  # the first of the same candidates on every rank
        else:
            key, now = mx.random.split(key)
            token = comm.from_rank_0(choose(candidates, request.sampling, now))
        mx.async_eval(token, candidates.note, candidates.agree)
        return Step(token, candidates.note, candidates.agree)

    *prompt, last = request.prompt
    size = request.prefill_chunk * model.chunks_at_once
    for first in range(0, len(prompt), size):
        progress(f"prefill of {len(request.prompt)} tokens, at {first}")
        tokens = mx.array([prompt[first : first + size]], dtype=mx.uint32)
        model.prefill(tokens, cache, request.prefill_chunk)
    progress(f"prefill of {len(request.prompt)} tokens, the last")
    current = step(mx.array([last], dtype=mx.uint32))
    for number in range(request.max_tokens):
        following = step(current.token) if number + 1 < request.max_tokens else None
        token = current.token.item()
        progress(f"decode step {number + 1}")
        if not current.agree.item():
            raise CommunicationError(
                f"the ranks' hidden states differ at step {number}: their results cannot be trusted"
            )
        if current.stop.item() or token in request.stop_ids:
            return
        if not stopping:
            yield token
            stopping = comm.rank == 0 and finished(token)
        current = following
