"""Who gets which rows from where, held against a count of every single value."""

import os
import subprocess
import sys
from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from m3dist.fetch.schedule import Area, Block, Extent, Item, SourcePiece, State, rounds, schedule
from m3dist.layout import Span

ROWS, COLUMNS = 8, 4
FILES = ("a", "b")
ALL = (0, COLUMNS)


def spans(end: int) -> st.SearchStrategy[Span]:
    """Part of 0 .. `end`, never nothing."""
    return st.tuples(st.integers(0, end - 1), st.integers(1, end)).map(lambda s: (min(s), max(s[1], s[0] + 1)))


def apart(end: int) -> st.SearchStrategy[list[Span]]:
    """Some spans that do not overlap, in order; they may touch."""
    ends = st.lists(st.integers(0, end), unique=True, max_size=4).map(sorted)
    return st.builds(lambda ends, first: list(pairwise(ends))[first :: 1 + first], ends, st.integers(0, 1))


AREAS = st.builds(Area, spans(ROWS), spans(COLUMNS))
WANTED = apart(ROWS).flatmap(lambda rows: st.tuples(*(st.builds(Area, st.just(r), spans(COLUMNS)) for r in rows)))


@st.composite
def states(draw) -> State:
    """What a rank may bring; what it keeps may overlap."""
    return State(
        {"m": draw(WANTED)},
        {"m": draw(apart(ROWS))},
        {"m": draw(st.lists(AREAS, max_size=3))},
        draw(st.frozensets(st.sampled_from(FILES))),
    )


@st.composite
def extents(draw) -> Extent:
    ends = [0, *draw(st.lists(st.integers(1, ROWS - 1), unique=True, max_size=3).map(sorted)), ROWS]
    files = st.frozensets(st.sampled_from(FILES), min_size=1)
    return Extent(COLUMNS, tuple(SourcePiece(s, draw(st.integers(1, 9)), draw(files)) for s in pairwise(ends)))


EVERY = settings(deadline=None)
JOBS = st.tuples(extents(), st.lists(states(), min_size=1, max_size=4), st.integers(1, 30))
WHOLE = Extent(COLUMNS, (SourcePiece((0, ROWS), 6, frozenset("a")),))


def cells(rows: Span, columns: Span) -> set[Span]:
    return {(row, column) for row in range(*rows) for column in range(*columns)}


def all_cells(areas) -> set[Span]:
    return {cell for area in areas for cell in cells(area.rows, area.columns)}


def needed(state: State) -> set[Span]:
    """The values that a rank lacks."""
    done = {row for rows in state.done.get("m", ()) for row in range(*rows)}
    return {cell for cell in all_cells(state.wanted.get("m", ())) if cell[0] not in done}


def kept(state: State) -> set[Span]:
    return all_cells(state.kept.get("m", ()))


@EVERY
@given(JOBS)
def test_everything_wanted_is_placed_once(job):
    extent, states, largest = job
    blocks = schedule({"m": extent}, states, largest)
    for rank, state in enumerate(states):
        placed = [cell for b in blocks for taker, span in b.takers if taker == rank for cell in cells(b.rows, span)]
        assert sorted(placed) == sorted(needed(state))


@EVERY
@given(JOBS)
# Ranks 0 and 2 lack columns that each other has, and nobody has those between.
@example((WHOLE, [State({"m": [Area((0, 1), (2 * r, 2 * r + 1))]}, {},
                        {"m": [Area((0, 1), (2 - 2 * r, 3 - 2 * r))]}) for r in range(2)], 30))  # fmt: skip
def test_what_somebody_keeps_is_not_fetched(job):
    """A row is fetched, once, if and only if a rank lacks a value of it that none keeps."""
    extent, states, largest = job
    blocks = schedule({"m": extent}, states, largest)
    fetched = [row for block in blocks if block.fetched for row in range(*block.rows)]
    having = set().union(*(kept(state) for state in states))
    assert sorted(fetched) == sorted({row for state in states for row, column in needed(state) - having})


@EVERY
@given(JOBS)
def test_givers_have_what_they_give(job):
    """Each value from one of them; and whoever keeps all that it lacks of a row gives it to itself."""
    extent, states, largest = job
    for block in schedule({"m": extent}, states, largest):
        taken = set().union(*(cells(block.rows, span) for _, span in block.takers))
        given = [cell for _, span in block.givers for cell in cells(block.rows, span)]
        assert taken <= set(given) and len(set(given)) == len(given)
        if block.fetched:
            assert block.givers == ((block.owner, ALL),)
        else:
            assert all(cells(block.rows, span) <= kept(states[rank]) for rank, span in block.givers)
            assert not block.shared or set(given) == taken
        for rank, span in block.takers:
            if cells(block.rows, span) <= all_cells([area for area in states[rank].kept["m"] if covers(area, span)]):
                assert block.givers[0][0] == rank and not block.shared


def covers(area: Area, columns: Span) -> bool:
    return area.columns[0] <= columns[0] and columns[1] <= area.columns[1]


@EVERY
@given(JOBS)
def test_blocks_are_of_one_piece_and_not_too_large(job):
    extent, states, largest = job
    for block in schedule({"m": extent}, states, largest):
        inside = [p for p in extent.pieces if p.rows[0] <= block.rows[0] and block.rows[1] <= p.rows[1]]
        nbytes = (block.rows[1] - block.rows[0]) * inside[0].row_bytes
        assert nbytes <= largest or block.rows[1] - block.rows[0] == 1
        assert block.source_bytes == (nbytes if block.fetched else 0)


@EVERY
@given(JOBS)
def test_who_fetches(job):
    """A rank that has the files on its disk, if one has; one of those that want it, if it can be."""
    extent, states, largest = job
    for block in schedule({"m": extent}, states, largest):
        if block.fetched:
            files = next(p.files for p in extent.pieces if p.rows[0] <= block.rows[0] < p.rows[1])
            able = {rank for rank, state in enumerate(states) if files <= state.local}
            takers = {rank for rank, _ in block.takers}
            assert block.owner in (takers & able or able or takers)


@EVERY
@given(JOBS)
def test_rounds(job):
    """Every shared block once, from each of its givers, in each rank's order of blocks."""
    extent, states, largest = job
    blocks = schedule({"m": extent}, states, largest)
    exchanged = rounds(blocks, len(states))
    assert all(len(items) == len(states) and any(items) for items in exchanged)
    given = [(item.block, rank, item.columns) for items in exchanged for rank, item in enumerate(items) if item]
    wanted = [(n, rank, span) for n, block in enumerate(blocks) if block.shared for rank, span in block.givers]
    assert sorted(given) == sorted(wanted)
    for rank in range(len(states)):
        of_this = [items[rank] for items in exchanged]
        numbers = [item.block for item in of_this if item]
        assert numbers == sorted(numbers) and None not in of_this[: len(numbers)]
    for block in blocks:
        if not block.shared:
            assert len(block.givers) == 1 and {rank for rank, _ in block.takers} == {block.owner}


@EVERY
@given(extents(), st.integers(2, 5), st.integers(1, 30), st.integers(1, 5))
def test_loads_are_level(extent, world, largest, bias):
    """Of what all want, each rank fetches as much as the others, but for one block; also where one has had to fetch
    more, for itself."""
    first = Extent(COLUMNS, (SourcePiece((0, ROWS), bias, frozenset("a")),))
    state = State({"m": [Area((0, ROWS), ALL)]})
    states = [State({**state.wanted, "first": [Area((0, bias), ALL)]}), *[state] * (world - 1)]
    blocks = schedule({"first": first, "m": extent}, states, largest)
    loads = [sum(b.source_bytes for b in blocks if b.owner == rank) for rank in range(world)]
    own = [sum(b.source_bytes for b in blocks if b.owner == r and b.module == "first") for r in range(world)]
    block = max(b.source_bytes for b in blocks if b.module == "m")
    assert max(loads) - min(loads) <= max(block, max(own) - min(loads))
    assert sum(loads) == sum(own) + sum((p.rows[1] - p.rows[0]) * p.row_bytes for p in extent.pieces)


def test_a_column_cut_is_fetched_once_and_exchanged():
    """The plain case, in full: two ranks, half of the columns each, of 8 rows at most 4 at a time."""
    halves = [(0, 2), (2, 4)]
    states = [State({"m": [Area((0, 8), half)]}) for half in halves]
    blocks = schedule({"m": WHOLE}, states, 4 * 6 + 5)
    takers = tuple(enumerate(halves))
    assert blocks == [
        Block("m", (0, 4), ((0, ALL),), takers, True, 24),
        Block("m", (4, 8), ((1, ALL),), takers, True, 24),
    ]
    assert rounds(blocks, 2) == [(Item(0, ALL), Item(1, ALL))]


def test_a_row_cut_is_not_exchanged():
    states = [State({"m": [Area(rows, ALL)]}) for rows in ((0, 3), (3, 8))]
    blocks = schedule({"m": WHOLE}, states, 1000)
    assert [(b.rows, b.owner, b.fetched) for b in blocks] == [((0, 3), 0, True), ((3, 8), 1, True)]
    assert not any(block.shared for block in blocks) and rounds(blocks, 2) == []


def test_files_on_one_disk_are_read_there():
    """Also by a rank that wants nothing of them; and who has them reads its own part itself."""
    states = [State({"m": [Area((0, 4), ALL)]}), State({"m": [Area((4, 8), ALL)]}, local=frozenset("a")), State({})]
    assert [block.owner for block in schedule({"m": WHOLE}, states, 1000)] == [1, 1]
    everywhere = [State(state.wanted, local=frozenset("a")) for state in states]
    blocks = schedule({"m": WHOLE}, everywhere, 12)
    assert [(block.owner, block.shared) for block in blocks] == [(0, False)] * 2 + [(1, False)] * 2


SAME = """
from m3dist.fetch.schedule import Area, Extent, SourcePiece, State, rounds, schedule
files = [f"model-{n}.safetensors" for n in range(9)]
states = [State({"m": [Area((0, 9), (rank, 4 + rank))]}, {"m": [(1, 3)]},
                {"m": [Area((rank, rank + 3), (0, 5)), Area((7, 9), (1, 2))]}, frozenset(files[rank:]))
          for rank in range(3)]
extent = Extent(7, tuple(SourcePiece((n, n + 3), 2, frozenset(files[n : n + 3])) for n in (0, 3, 6)))
blocks = schedule({"m": extent}, states, 5)
print(blocks, rounds(blocks, 3))
"""


def test_the_same_list_in_every_process():
    """Python orders sets otherwise in each."""
    seeds = [os.environ | {"PYTHONHASHSEED": str(seed)} for seed in (1, 2, 3)]
    said = {subprocess.run([sys.executable, "-c", SAME], env=e, capture_output=True, check=True).stdout for e in seeds}
    assert len(said) == 1 and said.pop().startswith(b"[Block(")
