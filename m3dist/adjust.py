"""A row's logits as its request wants them changed, before any candidate is chosen: penalties, bias and grammar.

Each rank changes the logits of the vocabulary rows it holds. What has been said so far is counted on the device, so
that the next step can be started before this one's token is on the host.
"""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from m3dist.sampling import Sampling


class RowState:
    """What changes one row's logits, for the vocabulary rows from `first_row` on of which this rank holds `held`.

    seen_prompt, seen_output: tokens of the prompt and of the answer so far, needed where Sampling.penalizes_prompt and
    penalizes_answer say so. A row without bias and penalties costs nothing.
    """

    def __init__(
        self, sampling: Sampling, seen_prompt: Sequence[int], seen_output: Sequence[int], first_row: int, held: int
    ):
        self._sampling, self._first_row, self._held = sampling, first_row, held
        self._bias = self._dense(sampling.logit_bias) if sampling.logit_bias else None
        self._counts = self._count(seen_output) if sampling.penalizes_answer else None  # of the answer's tokens
        self._prompted = self._count(seen_prompt) > 0 if sampling.penalizes_prompt else None

    @property
    def plain(self) -> bool:
        """Whether logits stay as they are."""
        return self._bias is None and self._counts is None

    def adjust(self, logits: mx.array, mask: bytes | None = None) -> mx.array:
        """This rank's logits [held] of any dtype -> float32 [held], -inf where `mask` forbids.

        The repetition penalty comes first, on the model's own logits as transformers defines it: it divides positive
        ones and multiplies negative ones. Then presence and frequency penalty as OpenAI defines them, the bias, and the
        mask: packed bits as grammar.Matcher gives them, for the whole vocabulary.
        """
        s, logits = self._sampling, logits.astype(mx.float32)
        if self._prompted is not None:
            penalized = mx.where(logits < 0, logits * s.repetition_penalty, logits / s.repetition_penalty)
            logits = mx.where(self._prompted | (self._counts > 0), penalized, logits)
        if s.presence_penalty or s.frequency_penalty:
            logits = logits - self._counts * s.frequency_penalty - (self._counts > 0) * s.presence_penalty
        if self._bias is not None:
            logits = logits + self._bias
        return logits if mask is None else mx.where(allowed(mask, self._first_row, self._held), logits, -mx.inf)

    def took(self, token: mx.array) -> None:
        """Count one more token of the answer: uint32 [] or [1], which need not be evaluated yet."""
        if self._counts is not None:
            here = mx.arange(self._first_row, self._first_row + self._held, dtype=mx.uint32) == token
            self._counts = self._counts + here

    def _count(self, tokens: Sequence[int]) -> mx.array:
        """float32 [held]: how often `tokens` have each token of this rank."""
        local = np.asarray(tokens, dtype=np.int64) - self._first_row
        local = local[(local >= 0) & (local < self._held)]
        return mx.array(np.bincount(local, minlength=self._held).astype(np.float32))

    def _dense(self, values: Mapping[int, float]) -> mx.array:
        """float32 [held]: the value of each token of this rank, 0 where it has none."""
        dense = np.zeros(self._held, np.float32)
        for token, value in values.items():
            if 0 <= token - self._first_row < self._held:
                dense[token - self._first_row] = value
        return mx.array(dense)


def adjust_rows(local: mx.array, states: Sequence[RowState], masks: Sequence[bytes | None]) -> mx.array:
    """This rank's logits of all rows [rows, held], each adjusted by its own state and mask: float32, or `local` itself
    where nothing is to be done."""
    if all(state.plain for state in states) and not any(masks):
        return local
    return mx.stack([state.adjust(row, mask) for row, state, mask in zip(local, states, masks, strict=True)])


def allowed(mask: bytes, first_row: int, held: int) -> mx.array:
    """The bits of a packed mask, uint32 words with the lowest bit first, for vocabulary rows from `first_row` on: bool
    [held]."""
    places = mx.arange(first_row, first_row + held)
    words = mx.array(np.frombuffer(mask, np.uint32))
    return (words[places // 32] >> (places % 32).astype(mx.uint32)) & 1 == 1
