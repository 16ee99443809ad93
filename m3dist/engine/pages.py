"""Who holds which page of the cache, and what the pages that nobody holds still know. No MLX: numbers of pages only.

A page is `page_size` tokens of K, V and index K, of all layers. A full page whose tokens are known has a key, made of
the key of the page before it and its own tokens, so that equal keys mean equal tokens from the very first on. Under its
key it is shared: rows that begin with these tokens hold it too, and it stays when nobody does, until its place is
needed. Shared pages are never written; a row writes only pages that it alone holds.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain, repeat

KEY_BYTES = 16  # nobody finds two prompts with one key


def page_keys(tokens: Sequence[int], page_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The keys of the full pages of `tokens` that come after the `known` ones."""
    keys, parent = [], known[-1] if known else b""
    for start in range(len(known) * page_size, len(tokens) - page_size + 1, page_size):
        digest = hashlib.blake2b(parent, digest_size=KEY_BYTES)
        digest.update(array("I", tokens[start : start + page_size]))
        parent = digest.digest()
        keys.append(parent)
    return keys


class Pages:
    """`count` pages in all. Page 0 is scratch, where padding is written: it is never given out.

    Every other page is free, or held by rows, or idle: kept under its key and held by none. Of the idle ones the least
    recently used goes first, and a page never before those that continue it.
    """

    def __init__(self, count: int, page_size: int):
        self.count, self.page_size = count, page_size
        self._free = list(range(count - 1, 0, -1))
        self._holders = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._pages: dict[bytes, int] = {}  # key -> page
        self._keys: dict[int, bytes] = {}  # page -> key

    @property
    def capacity(self) -> int:
        """Tokens that all pages together hold."""
        return (self.count - 1) * self.page_size

    @property
    def available(self) -> int:
        """How many pages can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """How many pages rows hold."""
        return self.count - 1 - self.available

    @property
    def cached(self) -> int:
        """How many pages have a key, held or idle."""
        return len(self._pages)

    def cover(self, tokens: int) -> int:
        """How many pages `tokens` tokens need."""
        return -(-tokens // self.page_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The pages kept under the first of `keys`, as far as they go without a gap. They are not held yet."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def idle_among(self, pages: Iterable[int]) -> int:
        return sum(1 for page in pages if self._holders[page] == 0)

    def hold(self, pages: Iterable[int]) -> None:
        """One more row holds these pages, which `find` found."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def take(self) -> int:
        """A page for one row to write. The caller has seen that one is `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def keep(self, page: int, key: bytes) -> None:
        """A held page is full, and its tokens are those of `key`. Where another page has that key, it stays private."""
        if key not in self._pages:
            self._pages[key], self._keys[page] = page, key

    def release(self, table: Sequence[int], keys: Sequence[bytes]) -> None:
        """A row no longer holds the pages of its table, the first of which have become full, with these keys.

        From the last to the first, so that a page goes only after those that continue it. For the same reason a page
        whose equal was kept instead of it counts as a use of that one, and takes its place if it is gone.
        """
        padded = chain(repeat(None, len(table) - len(keys)), reversed(keys))
        for page, key in zip(reversed(table), padded):
            if key is not None:
                self.keep(page, key)
                kept = self._pages[key]
                if kept in self._idle:
                    self._idle.move_to_end(kept)
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)
