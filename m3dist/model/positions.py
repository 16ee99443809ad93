"""Where the tokens of one call stand, and what every layer of the call needs to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from m3dist.config import ModelConfig
from m3dist.model.fusion import on_gpu
from m3dist.paged import Table

WASTED = 8192  # slots that rows of unequal length may have read in vain, before they are read apart
GATHERED = 256 << 20  # bytes of K and V that rows read out of pages at a time; a single row's may be more
READ_AHEAD = 2048  # index keys are read in whole multiples of so many slots, or more: one shape serves many steps


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

    def pages_step(self, table: Table, dtype: mx.Dtype, c: ModelConfig) -> "PagesStep":
        """The same for rows at positions of their own, in pages."""
        if "_pages_step" not in self.__dict__:
            self.__dict__["_pages_step"] = PagesStep(self.starts, table, dtype, c)
        return self.__dict__["_pages_step"]

    def parts(self, table: Table, slot: int) -> list["Part"]:
        """Rows of like lengths together, where one read for all, padded to the longest, would waste much or, at `slot`
        bytes of K and V, take more memory than GATHERED; else none. Layers share them."""
        if "_parts" not in self.__dict__:
            ends, most = [start + self.tokens for start in self.starts], GATHERED // slot
            read = self.end * len(ends)
            parts = _alike(ends, most) if read - sum(ends) > WASTED or read > most else []
            self.__dict__["_parts"] = [Part(self, rows, table) for rows in parts] if len(parts) > 1 else []
        return self.__dict__["_parts"]

    def seen(self, slots: int, dtype: mx.Dtype) -> "Seen":
        """Of `slots` keys those that rows with one token each see, up to it; layers share it."""
        if "_seen" not in self.__dict__:
            self.__dict__["_seen"] = Seen(np.arange(slots) <= np.array(self.starts)[:, None], dtype)
        return self.__dict__["_seen"]


class Part:
    """Some rows of a call by themselves: which, their positions and their table."""

    def __init__(self, positions: Positions, rows: list[int], table: Table):
        self.rows = mx.array(rows)
        self.positions = Positions(tuple(positions.starts[row] for row in rows), positions.tokens)
        self.table = table.of(rows, -(-self.positions.end // table.page_size))


def _alike(ends: Sequence[int], most: int) -> list[list[int]]:
    """The numbers of rows, longest first; another part begins where one is less than half as long as a part's first, or
    where the part, each row as long as its first, would have more than `most` slots."""
    parts: list[list[int]] = []
    for row in sorted(range(len(ends)), key=lambda row: -ends[row]):
        longest = ends[parts[-1][0]] if parts else 0
        if not parts or 2 * ends[row] < longest or (len(parts[-1]) + 1) * longest > most:
            parts.append([])
        parts[-1].append(row)
    return parts


class Seen:
    """Which keys a query of each row sees, bool [rows, slots]: the first `keys`, but for those that `mask` hides.

    `mask` is [rows, 1, 1, keys], or None where all rows see the same. Summands on a GPU: CUDA's attention would write
    booleans out for every head.
    """

    def __init__(self, seen: np.ndarray, dtype: mx.Dtype):
        count = int(seen[0].sum())
        alike = seen[:, :count].all() and not seen[:, count:].any()
        self.keys = count if alike else seen.shape[1]
        summands = mx.array(np.where(seen, 0.0, -np.inf), dtype) if on_gpu() else mx.array(seen)
        self.mask = None if alike else summands[:, None, None]


def _blocks_read(blocks: int, size: int) -> int:
    """Of how many blocks index keys are read where `blocks` are in use: a multiple of READ_AHEAD slots, and of a
    sixteenth of the next power of two. So contexts of any length have few shapes, each of which MLX traces anew."""
    ahead = max(1, READ_AHEAD // size, (1 << (blocks - 1).bit_length()) // 16)
    return -(-blocks // ahead) * ahead


class Step:
    """One decode step beyond the block budget: the query's own block is always read, as the last of its blocks.

    So the keys of a query end where it stands, and no mask is needed. Source: document, section 4.
    """

    def __init__(self, position: int, capacity: int, c: ModelConfig):
        size, topk = c.sparse_block_size, c.sparse_topk_blocks
        own = position // size
        blocks = min(_blocks_read(own + 1, size), capacity // size)
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


class PagesStep:
    """One decode step in pages, the longest row beyond the block budget: as Step, but each row stands elsewhere.

    The own block is again the last of topk. A row of topk blocks or fewer reads all of them: they come first, and what
    stands between them and its own block is masked. So are the keys past the query's own position.
    """

    def __init__(self, starts: Sequence[int], table: Table, dtype: mx.Dtype, c: ModelConfig):
        size, topk, position = c.sparse_block_size, c.sparse_topk_blocks, np.array(starts)[:, None]
        own, numbers = position // size, table.numbers
        number = np.arange(_blocks_read(numbers.shape[1], size) if on_gpu() else numbers.shape[1])
        bias = np.where(number < own, 0.0, -np.inf)
        bias[:, : c.sparse_init_block] = 1e30
        bias[(own - c.sparse_local_block < number) & (number < own)] = np.inf
        place = np.arange(topk)
        last = np.where((place < own) & (own < topk), place, -1)
        last[:, -1:] = own
        known = np.take_along_axis(numbers, np.maximum(last, 0), axis=1)
        width = ((0, 0), (0, number.size - numbers.shape[1]))
        self.rows = mx.array(np.arange(len(starts), dtype=np.uint32)[:, None])  # their numbers, [rows, 1]
        self.choice = (  # what a choice among the pages' scores needs
            mx.array(np.pad(numbers, width), dtype=mx.uint32),  # pages [rows, blocks]
            mx.array(bias[:, None], dtype=mx.float32),  # [rows, 1, blocks], added to their scores
            mx.array(np.where(last < 0, -1, known)[:, None], dtype=mx.int32),  # pages [rows, 1, topk]; -1: the best
        )
        slot, before = np.arange(topk * size), (topk - 1) * size
        first = slot < np.minimum(own, topk - 1) * size
        self.seen = Seen(first | ((slot >= before) & (slot - before <= position % size)), dtype)  # of the pages read
