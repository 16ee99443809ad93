"""K, V and index K of all requests in pages of one pool: rows share its memory, and their common beginnings.

A page holds `page_size` tokens of every layer; a row is a table of page numbers: its token at position p stands in page
table[p // page_size]. With sparse attention a page is a block, so that choosing blocks is choosing pages. Page 0 is
scratch: what is written for padding goes there, and no row sees what it holds.

A layer's K and V are one buffer [pages, 2, kv_heads, page_size, head_dim], its index K is float32 [pages, page_size,
index_dim]. Both are kept as rows of head_dim or index_dim numbers: so one operation writes any tokens, one reads any
pages, and a larger pool begins with what the smaller one held.
"""

from collections.abc import Callable, Sequence
from copy import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

FIRST = 16  # pages that a pool begins with
GROWTH = 2  # a full pool grows by one part in so many at least: MLX copies it


class PagePool:
    """The pages of all layers of a model. Buffers are made when the first tokens come, and then grow as needed.

    `page_size` tokens a page: the model's sparse_block_size if it has sparse layers; `most` pages at most, with page 0.
    """

    def __init__(self, model: nn.Module, page_size: int, most: int):
        c = model.args
        if any(c.sparse_attention_freq) and page_size != c.sparse_block_size:
            raise ValueError(f"pages of {page_size} tokens; sparse attention needs its blocks' {c.sparse_block_size}")
        self.page_size, self.most = page_size, most
        self.pages = min(FIRST, most)  # that the buffers have room for
        self._layers = [LayerPages(self) for _ in model.layers]

    def view(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        tokens: int,
        lengths: Sequence[int] | None = None,
    ) -> list["PagedCache"]:
        """A cache for each layer, for one forward of `tokens` tokens a row; row r's stand at starts[r] and after.

        tables: each row's pages, enough for the tokens to come; rows may share pages that are not written to any more.
        lengths: each row's real tokens where the input is padded on the right. Give the model these caches, but not the
        lengths: Model.hidden(tokens, view), or Model.prefill. Raises ValueError where a table does not suffice.
        """
        table = Table(tables, starts, tokens, lengths, self.page_size)
        self._grow(int(table.numbers.max()) + 1)
        return [PagedCache(layer, table) for layer in self._layers]

    @property
    def state(self) -> list[mx.array]:
        return [x for layer in self._layers for x in layer.state]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.state)

    def _grow(self, pages: int) -> None:
        if pages <= self.pages:
            return
        if pages > self.most:
            raise ValueError(f"page {pages - 1} in a pool of {self.most} pages")
        before, self.pages = self.pages, min(self.most, max(pages, self.pages + self.pages // GROWTH))
        for layer in self._layers:  # one at a time: memory holds only one of them twice
            layer.grow(self.pages - before, before)
            mx.eval(layer.state)
            mx.clear_cache()  # else MLX keeps the old buffers, which are too small for anything to come


class LayerPages:
    """One layer's pages: `kv` [pages * 2 * kv_heads * page_size, head_dim], `index` [pages * page_size, index_dim]."""

    def __init__(self, pool: PagePool):
        self.pool = pool
        self.kv: mx.array | None = None
        self.index: mx.array | None = None  # float32; None without sparse attention

    @property
    def state(self) -> list[mx.array]:
        return [x for x in (self.kv, self.index) if x is not None]

    def make(self, keys: mx.array, index_keys: mx.array | None) -> None:
        """Room for tokens like these, [rows, heads, tokens, dim] each."""
        slots = self.pool.pages * self.pool.page_size
        self.kv = mx.zeros((slots * 2 * keys.shape[1], keys.shape[3]), keys.dtype)
        self.index = None if index_keys is None else mx.zeros((slots, index_keys.shape[3]), mx.float32)

    def grow(self, pages: int, before: int) -> None:
        """Add pages behind those `before`."""
        self.kv, self.index = (
            None if x is None else mx.pad(x, [(0, x.shape[0] // before * pages), (0, 0)]) for x in (self.kv, self.index)
        )


class PagedCache:
    """One layer's pages as the rows of one call: what attention asks of a LayerCache."""

    def __init__(self, layer: LayerPages, table: "Table"):
        self.layer, self.table = layer, table
        self._taken = 0  # tokens of this call that are written

    def starts(self, rows: int) -> list[int]:
        """The position of each row's next token."""
        return [start + self._taken for start in self.table.starts]

    @property
    def state(self) -> list[mx.array]:
        return self.layer.state

    def append(self, keys: mx.array, values: mx.array, index_keys: mx.array | None = None) -> None:
        """Write the next tokens of every row: [rows, heads, tokens, dim] each, all of them finite numbers.

        Other rows read these pages too, as padding or after this row: with no weight, but 0 times NaN would be NaN.
        """
        layer, (_, heads, tokens, _) = self.layer, keys.shape
        if layer.kv is None:
            layer.make(keys, index_keys)
        part = slice(self._taken, self._taken + tokens)
        self._taken += tokens
        layer.kv[self.table.slots(heads, 0, part)] = keys
        layer.kv[self.table.slots(heads, 1, part)] = values
        if index_keys is not None:
            layer.index[self.table.index_slots(part)] = index_keys[:, 0].astype(mx.float32)
            # As in LayerCache: below the block budget nothing reads the index keys, and their updates would pile up.
            layer.kv = mx.depends(layer.kv, layer.index)

    def wait(self, result: mx.array) -> None:
        """Let what is read from here on be read after `result`. MLX evaluates breadth first: reads that do not wait for
        each other's use would all be in memory at once."""
        layer = self.layer
        layer.kv, *rest = mx.depends(layer.state, [result])
        layer.index = rest[0] if rest else None

    @property
    def keys(self) -> mx.array:
        """[rows, kv_heads, slots, head_dim]: of all of the rows' pages, whole ones."""
        return self.gather(self.table.blocks(self.heads)[0])

    @property
    def values(self) -> mx.array:
        return self.gather(self.table.blocks(self.heads)[1])

    @property
    def index_keys(self) -> mx.array:
        """float32 [rows, 1, slots, index_dim]."""
        pages = self.index_pages[self.table.pages]
        return pages.reshape(pages.shape[0], 1, -1, pages.shape[-1])

    @property
    def index_pages(self) -> mx.array:
        """float32 [pages, page_size, index_dim]: the whole pool's."""
        return self.layer.index.reshape(-1, self.table.page_size, self.layer.index.shape[-1])

    @property
    def heads(self) -> int:
        """KV heads held."""
        return self.layer.kv.shape[0] // (self.layer.pool.pages * self.table.page_size * 2)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's K and V."""
        return 2 * self.heads * self.layer.kv.shape[-1] * self.layer.kv.itemsize

    def gather(self, blocks: mx.array) -> mx.array:
        """Blocks of K or V, [..., n] as Table numbers them, one after another: [..., n * page_size, head_dim]."""
        size, dim = self.table.page_size, self.layer.kv.shape[-1]
        return self.layer.kv.reshape(-1, size, dim)[blocks].reshape(*blocks.shape[:-1], -1, dim)


class Table:
    """Where the tokens of one call's rows stand in the pages; all layers share it. Computed on the host.

    `numbers`, int32 [rows, pages]: each row's pages up to the end of the longest row's input, 0 where it has none.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        tokens: int,
        lengths: Sequence[int] | None,
        page_size: int,
    ):
        self.starts, self.page_size = tuple(starts), page_size
        self.numbers = np.zeros((len(tables), -(-(max(starts) + tokens) // page_size)), np.int32)
        real = [tokens] * len(tables) if lengths is None else lengths
        for row, (table, start, more) in enumerate(zip(tables, starts, real)):
            needed = -(-(start + more) // page_size)
            if len(table) < needed:
                raise ValueError(f"row {row} has {len(table)} pages, its {start} + {more} tokens need {needed}")
            self.numbers[row, :needed] = table[:needed]
        number = np.arange(tokens)
        position = np.array(starts)[:, None] + number
        page = np.take_along_axis(self.numbers, position // page_size, axis=1)
        self._page = np.where(number < np.array(real)[:, None], page, 0)  # of each new token: [rows, tokens]
        self._slot = position % page_size
        self._made: dict[object, mx.array] = {}

    def of(self, rows: Sequence[int], pages: int) -> "Table":
        """Some of the rows by themselves, to be read from."""
        part = copy(self)
        part.numbers, part._made = self.numbers[list(rows), :pages], {}
        return part

    @property
    def pages(self) -> mx.array:
        """int32 [rows, pages]: `numbers`."""
        return self._once("pages", lambda: self.numbers)

    def index_slots(self, part: slice) -> mx.array:
        """int32 [rows, tokens]: where the index keys of these of the new tokens are to be written."""
        return self._once(("index", part.start), lambda: (self._page * self.page_size + self._slot)[:, part])

    def slots(self, heads: int, which: int, part: slice) -> mx.array:
        """int32 [rows, heads, tokens]: where their K (`which` 0) or V (1) are to be written."""
        page, slot, place = self._page[:, None, part], self._slot[:, None, part], _places(heads)[which]
        return self._once((which, heads, part.start), lambda: (page * 2 * heads + place) * self.page_size + slot)

    def blocks(self, heads: int) -> mx.array:
        """int32 [2, rows, heads, pages]: K and V of all of the rows' pages."""
        return self._once(("blocks", heads), lambda: self.numbers[:, None] * 2 * heads + _places(heads))

    def places(self, heads: int) -> mx.array:
        """int32 [2, 1, heads, 1]: a page's number times 2 * heads, plus this, are its blocks of K and V."""
        return self._once(("places", heads), lambda: _places(heads))

    def _once(self, name: object, make: Callable[[], np.ndarray]) -> mx.array:
        if name not in self._made:
            self._made[name] = mx.array(make().astype(np.int32))
        return self._made[name]


def _places(heads: int) -> np.ndarray:
    """Where K and V of each head stand among a page's blocks: [2, 1, heads, 1]. A page has 2 * heads of them."""
    return np.arange(2 * heads).reshape(2, 1, heads, 1)
