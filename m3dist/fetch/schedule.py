"""Who gets which rows from where, and who passes them on: the same list on every rank. No MLX, no files.

A *block* is consecutive rows of one module, all its leaves. Every row is got once: by the rank that keeps it already,
or from the source by one rank, its owner. Rows that others want too, the owner passes on. Ranks are those that take
part, by their number in the group; what each of them holds in the end is its own affair.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from m3dist.layout import Span


@dataclass(frozen=True)
class Area:
    """Some rows of a module and some of its columns. Rows are counted with all axes but the last flattened, columns in
    values, so that an area means the same in each leaf of a quantised module."""

    rows: Span
    columns: Span


Areas = Mapping[str, Sequence[Area]]  # by module


@dataclass(frozen=True)
class State:
    """What a rank brings: what it wants, the rows of it that are in place already, what it keeps that could be given
    to any rank, and the source's files that it has on disk."""

    wanted: Areas
    done: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    kept: Areas = field(default_factory=dict)
    local: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Extent:
    """A module in the source: its columns in values, and the pieces its rows come in."""

    columns: int
    pieces: tuple["SourcePiece", ...]


@dataclass(frozen=True)
class SourcePiece:
    """Rows [start, stop) of a module lie in `files`; `row_bytes` of all leaves together are one row."""

    rows: Span
    row_bytes: int
    files: frozenset[str]


@dataclass(frozen=True)
class Block:
    """`rows` of `module`. `givers`: ranks and the columns they have of it; where it is `fetched`, the one that gets it
    from the source, whole. `takers`: ranks and the columns that they write into their files."""

    module: str
    rows: Span
    givers: tuple[tuple[int, Span], ...]
    takers: tuple[tuple[int, Span], ...]
    fetched: bool
    source_bytes: int = 0

    @property
    def shared(self) -> bool:
        """Whether it has to be passed on."""
        return any(taker != self.givers[0][0] for taker, _ in self.takers) or len(self.givers) > 1

    @property
    def owner(self) -> int:
        return self.givers[0][0]


def schedule(extents: Mapping[str, Extent], states: Sequence[State], largest: int) -> list[Block]:
    """All that has to be done so that every rank has what it wants, module by module, in the order of `extents`; a
    block is at most `largest` bytes of the source, or one row."""
    loads = [0] * len(states)
    return [block for name, extent in extents.items() for block in _module(name, extent, states, largest, loads)]


def rounds(blocks: Sequence[Block], world: int) -> list[tuple["Item | None", ...]]:
    """The exchange: in each round every rank gives one item, or nothing."""
    queues: list[list[Item]] = [[] for _ in range(world)]
    for number, block in enumerate(blocks):
        if block.shared:
            for rank, columns in block.givers:
                queues[rank].append(Item(number, columns))
    count = max(map(len, queues), default=0)
    return [tuple(queue[i] if i < len(queue) else None for queue in queues) for i in range(count)]


@dataclass(frozen=True)
class Item:
    """What one rank gives in a round: these columns of the rows of block number `block`."""

    block: int
    columns: Span


def _module(name: str, extent: Extent, states: Sequence[State], largest: int, loads: list[int]) -> Iterator[Block]:
    wanted = [_Lookup(state.wanted.get(name, ())) for state in states]
    done = [_Lookup(Area(rows, (0, extent.columns)) for rows in state.done.get(name, ())) for state in states]
    kept = [_Lookup(state.kept.get(name, ())) for state in states]
    ends = {end for lookup in (*wanted, *done, *kept) for end in lookup.ends}
    for piece in extent.pieces:
        inside = sorted({*piece.rows, *(end for end in ends if piece.rows[0] < end < piece.rows[1])})
        step = max(1, largest // piece.row_bytes)
        for start, stop in pairwise(inside):
            takers = [
                (rank, columns)
                for rank in range(len(states))
                for columns in wanted[rank].at(start)
                if not done[rank].at(start)
            ]
            having = [(rank, columns) for rank in range(len(states)) for columns in kept[rank].at(start)]
            if takers:
                for first in range(start, stop, step):
                    rows = (first, min(first + step, stop))
                    yield from _blocks(name, rows, piece, extent.columns, takers, having, states, loads)


def _blocks(
    name: str,
    rows: Span,
    piece: SourcePiece,
    columns: int,
    takers: Sequence[tuple[int, Span]],
    having: Sequence[tuple[int, Span]],
    states: Sequence[State],
    loads: list[int],
) -> Iterator[Block]:
    """For rows in which nothing changes: what each rank has itself, and then one block for all that have it not."""
    others = []
    for rank, span in takers:
        own = next((has for who, has in having if who == rank and has[0] <= span[0] and span[1] <= has[1]), None)
        if own:
            yield Block(name, rows, ((rank, own),), ((rank, span),), False)
        else:
            others.append((rank, span))
    if not others:
        return
    if all(_cover(span, having) for _, span in others):
        givers = tuple(giver for span in _union(span for _, span in others) for giver in _cover(span, having))
        yield Block(name, rows, givers, tuple(others), False)
        return
    nbytes = (rows[1] - rows[0]) * piece.row_bytes
    waiting = [rank for rank, _ in others]
    able = [rank for rank, state in enumerate(states) if piece.files <= state.local]
    nearest = [rank for rank in waiting if rank in able] or able or waiting
    owner = min(nearest, key=lambda rank: (loads[rank], rank))
    loads[owner] += nbytes
    yield Block(name, rows, ((owner, (0, columns)),), tuple(others), True, nbytes)


def _cover(needed: Span, having: Iterable[tuple[int, Span]]) -> tuple[tuple[int, Span], ...]:
    """Ranks whose columns together make `needed`, each with the part it gives; nothing where they do not."""
    found, at = [], needed[0]
    while at < needed[1]:
        rank, span = max(
            ((rank, span) for rank, span in having if span[0] <= at < span[1]),
            key=lambda has: (has[1][1], -has[0]),
            default=(0, (0, 0)),
        )
        if span[1] <= at:
            return ()
        found.append((rank, (at, min(span[1], needed[1]))))
        at = span[1]
    return tuple(found)


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same columns, in order, those that overlap or touch as one."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


class _Lookup:
    """Areas by row. Areas of the same rows may be several, of different columns; their rows never overlap in part
    once cut at `ends`."""

    def __init__(self, areas: Iterable[Area]):
        self.ends: set[int] = set()
        layers: list[list[Area]] = []  # in each, areas follow each other without overlap
        for area in sorted(areas, key=lambda area: area.rows):
            self.ends |= set(area.rows)
            layer = next((layer for layer in layers if layer[-1].rows[1] <= area.rows[0]), None)
            if layer is None:
                layers.append([area])
            else:
                layer.append(area)
        self.layers = [([area.rows[0] for area in layer], layer) for layer in layers]

    def at(self, row: int) -> list[Span]:
        """The columns of every area that has this row."""
        found = []
        for starts, layer in self.layers:
            number = bisect_right(starts, row) - 1
            if number >= 0 and row < layer[number].rows[1]:
                found.append(layer[number].columns)
        return found
