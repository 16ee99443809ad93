"""Where the tokens of one call stand, and what every layer of the call needs to know of it."""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from m3dist.config import ModelConfig

READ_AHEAD = 2048  # index keys are read in whole multiples of so many slots: one shape serves many steps


@dataclass(frozen=True)
class Positions:
    """Row r's tokens stand at starts[r], starts[r] + 1, ..."""

    starts: tuple[int, ...]
    tokens: int

    @cached_property
    def aligned(self) -> bool:
        """All rows start at the same position."""
        return len(set(self.starts)) == 1

    @cached_property
    def end(self) -> int:
        """Slots in use after this call, of the longest row."""
        return max(self.starts) + self.tokens

    @cached_property
    def offset(self) -> mx.array:
        """int32: where the first token stands; [rows], or [] where several rows start at the same position."""
        return mx.array(self.starts[0] if self.aligned and len(self.starts) > 1 else self.starts, dtype=mx.int32)

    @cached_property
    def array(self) -> mx.array:
        """int32 [rows, tokens]."""
        return mx.array(self.starts, dtype=mx.int32)[:, None] + mx.arange(self.tokens, dtype=mx.int32)

    def step(self, capacity: int, c: ModelConfig) -> "Step":
        """What sparse attention needs where every row has one token at the same position; layers share it."""
        if "_step" not in self.__dict__:
            self.__dict__["_step"] = Step(self.starts[0], capacity, c)
        return self.__dict__["_step"]


class Step:
    """One decode step beyond the block budget: the query's own block is always read, as the last of its blocks.

    So the keys of a query end where it stands, and no mask is needed. Source: document, section 4.
    """

    def __init__(self, position: int, capacity: int, c: ModelConfig):
        size, topk = c.sparse_block_size, c.sparse_topk_blocks
        own, ahead = position // size, max(1, READ_AHEAD // size)
        blocks = min(-(-(own + 1) // ahead) * ahead, capacity // size)
        number = np.arange(blocks)
        bias = np.where(number < own, 0.0, -np.inf)  # the own block is chosen apart, later ones not at all
        bias[: c.sparse_init_block] = 1e30
        bias[max(0, own + 1 - c.sparse_local_block) : own] = np.inf
        self.slots = blocks * size  # index keys to score
        self.bias = mx.array(bias, dtype=mx.float32)  # [blocks], added to their scores
        self.last = mx.array(np.where(np.arange(topk) == topk - 1, own, -1), dtype=mx.int32)  # [topk]; -1: the best
        self.keys = (topk - 1) * size + position % size + 1  # that the query attends to
        self._blocks, self._first = capacity // size, mx.zeros(0)

    def first(self, buffers: int) -> mx.array:
        """int32 [buffers]: the number of each buffer's first block, where all their blocks stand in a row."""
        if self._first.size != buffers:
            self._first = mx.array(np.arange(buffers) * self._blocks, dtype=mx.int32)
        return self._first
