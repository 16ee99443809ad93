"""K, V and index K of sequences, always in lockstep; rows may differ in length.

Row r of a batch holds `lengths[r]` tokens in slots 0..lengths[r]-1. Slots are absolute positions, because sparse
attention anchors its blocks to them: nothing is ever shifted or padded on the left. Slots past a row's length hold
leftovers of padding, which no query may see: attention masks every slot beyond the query's own position.

The class also answers what mlx-lm asks of a cache (`state`, `trim`, and for its batches `merge`, `prepare`, `finalize`,
`filter`, `extend`, `extract`), so that its generators drive our model.
"""

import math
from collections.abc import Sequence

import mlx.core as mx

GROWTH = 256  # a capacity is a multiple of it
SPARE = 8  # a full buffer grows by an eighth at least: MLX copies it, and each new shape is traced anew


class LayerCache:
    """One layer's cache. Buffers are [rows, heads, capacity, head_dim]; index K has one head. None until first used."""

    def __init__(self, block_size: int = 1):
        self.block_size = block_size  # capacity is a multiple of it, so that blocks are a reshape
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.index_keys: mx.array | None = None
        self.lengths: list[int] = []
        self._reserved = 0  # capacity to take when growing
        self._pending: list[int] | None = None  # rows' real tokens still to come while padded input is fed

    @property
    def offset(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def starts(self, rows: int) -> list[int]:
        """The position of each row's next token."""
        return self.lengths or [0] * rows

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens a row from the next growth on, so that shapes stay as they are until then."""
        self._reserved = tokens

    def append(self, keys: mx.array, values: mx.array, index_keys: mx.array | None = None) -> None:
        """Add the same number of tokens to every row: [rows, heads, tokens, head_dim] each.

        After `prepare`, a row's tokens past its real ones are padding and do not count.
        """
        rows, tokens = keys.shape[0], keys.shape[2]
        starts = self.starts(rows)
        if index_keys is not None:
            # Scores are float32 sums: kept so, the index keys need not be converted whole in every step.
            index_keys = index_keys.astype(mx.float32)
        self._grow(max(starts) + tokens, keys, values, index_keys)
        self.keys = _write(self.keys, keys, starts)
        self.values = _write(self.values, values, starts)
        if index_keys is not None:
            # Below the block budget nothing reads the index keys. Tied to the keys, they are still computed with every
            # step; a chain of pending updates would otherwise grow for as long as the prompt is short.
            self.index_keys = _write(self.index_keys, index_keys, starts)
            self.keys = mx.depends(self.keys, self.index_keys)
        real = [tokens] * rows
        if self._pending is not None:
            real = [min(tokens, left) for left in self._pending]
            self._pending = [left - n for left, n in zip(self._pending, real)]
        self.lengths = [start + n for start, n in zip(starts, real)]

    def _grow(self, tokens: int, *new: mx.array | None) -> None:
        if tokens <= self.capacity:
            return
        step = math.lcm(GROWTH, self.block_size)
        wanted = max(tokens, self._reserved, self.capacity + self.capacity // SPARE)
        extra = -(-wanted // step) * step - self.capacity
        buffers = (self.keys, self.values, self.index_keys)
        self.keys, self.values, self.index_keys = (
            None if like is None else _widen(buffer, like, extra) for buffer, like in zip(buffers, new)
        )

    # -- what mlx-lm asks of a cache ------------------------------------------------------------------------------

    @property
    def state(self) -> list[mx.array]:
        return [x for x in (self.keys, self.values, self.index_keys) if x is not None]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.state)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, tokens: int) -> int:
        """Forget the last `tokens` of every row (fewer where a row is shorter); returns how many at most."""
        trimmed = min(self.offset, tokens)
        self.lengths = [max(0, n - trimmed) for n in self.lengths]
        return trimmed

    def prepare(self, lengths: Sequence[int], right_padding: Sequence[int] | None = None) -> None:
        """The next tokens are padded on the right: row r has `lengths[r]` real ones."""
        self._pending = list(lengths)

    def finalize(self) -> None:
        """The padded input is over."""
        self._pending = None

    @classmethod
    def merge(cls, caches: Sequence["LayerCache"]) -> "LayerCache":
        """One cache with the rows of all."""
        merged = cls(caches[0].block_size)
        for cache in caches:
            merged.extend(cache)
        return merged

    def extend(self, other: "LayerCache") -> None:
        """Add the rows of `other` behind ours."""
        if other.keys is None:
            # A row that has seen nothing yet has no buffers; it gets zeros as soon as a neighbour has some.
            self.lengths = self.lengths + (other.lengths or [0])
            if self.keys is not None:
                self._take([*range(self.keys.shape[0]), *[0] * len(other.lengths or [0])])
            return
        if self.keys is None:
            mine = len(self.lengths)
            self.keys, self.values, self.index_keys = other.keys, other.values, other.index_keys
            self._take([0] * mine + list(range(other.keys.shape[0])))
            self.lengths = self.lengths + other.lengths
            return
        capacity = max(self.capacity, other.capacity)
        self.keys, self.values, self.index_keys = (
            None if a is None else mx.concatenate([_to_capacity(a, capacity), _to_capacity(b, capacity)])
            for a, b in zip((self.keys, self.values, self.index_keys), (other.keys, other.values, other.index_keys))
        )
        self.lengths = self.lengths + other.lengths

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        keep = [int(row) for row in keep]
        self.lengths = [self.lengths[row] for row in keep] if self.lengths else []
        if self.keys is not None:
            self._take(keep)

    def extract(self, row: int) -> "LayerCache":
        """A cache of its own with one row."""
        single = LayerCache(self.block_size)
        single.keys, single.values, single.index_keys = self.keys, self.values, self.index_keys
        single.lengths = list(self.lengths)
        single.filter([row])
        return single

    def _take(self, rows: list[int]) -> None:
        index = mx.array(rows)
        self.keys, self.values, self.index_keys = (
            None if x is None else x[index] for x in (self.keys, self.values, self.index_keys)
        )


def _write(buffer: mx.array, new: mx.array, starts: list[int]) -> mx.array:
    """`buffer` with `new` written from slot starts[r] on in row r."""
    tokens = new.shape[2]
    if len(set(starts)) == 1:
        buffer[:, :, starts[0] : starts[0] + tokens] = new
    else:
        for row, start in enumerate(starts):
            buffer[row, :, start : start + tokens] = new[row]
    return buffer


def _widen(buffer: mx.array | None, like: mx.array, extra: int) -> mx.array:
    rows, heads, _, dim = like.shape
    room = mx.zeros((rows, heads, extra, dim), dtype=like.dtype)
    return room if buffer is None else mx.concatenate([buffer, room], axis=2)


def _to_capacity(buffer: mx.array, capacity: int) -> mx.array:
    missing = capacity - buffer.shape[2]
    return _widen(buffer, buffer, missing) if missing else buffer
