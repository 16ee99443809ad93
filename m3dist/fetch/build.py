"""Carries out a schedule: threads get blocks from the source, this thread converts, writes and passes them on.

All ranks go through the same rounds: each says how far it is and whether it failed, a few times a second, and what is
ready at all of them is exchanged. So none ever waits in a collective for another's download.
"""

import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from m3dist.checkpoint import Files, StoredTensor
from m3dist.comm import Comm
from m3dist.errors import CommunicationError
from m3dist.fetch.display import Tally
from m3dist.fetch.places import Format, Placed, Rows
from m3dist.fetch.quantize import requantise
from m3dist.fetch.schedule import Area, Block, Extent, Item, SourcePiece, rounds
from m3dist.fetch.target import slice_of
from m3dist.fetch.work import Work
from m3dist.layout import Span
from m3dist.numbers import HOLDERS, fill
from m3dist.plan import Plan
from m3dist.reads import Read
from m3dist.tensors import FLOATS, Inventory, split_name
from m3dist.translation import Assembly, Translation

TICK = 0.2  # seconds between words of the ranks to each other, while they wait for the source
SPOOLED = 32  # rounds of the exchange for which a rank fetches ahead of the others
CACHE = 256 << 20  # bytes of memory that MLX may hold back: blocks have many sizes
ROUNDS = 8  # of the exchange between two words of the ranks

Spooled = tuple[str, Span]  # module and rows


class Source:
    """A checkpoint's tensors by rows of our modules."""

    def __init__(self, files: Files, stored: Mapping[str, StoredTensor], translation: Translation):
        self.files, self.stored, self.inventory = files, stored, translation.inventory
        self.leaves: dict[str, dict[str, Assembly]] = {}
        for tensor, assembly in translation.assemblies.items():
            self.leaves.setdefault(split_name(tensor)[0], {})[tensor] = assembly
        self.starts = {t: [piece.at for piece in a.pieces] for t, a in translation.assemblies.items()}

    def extent(self, module: str, columns: int) -> Extent:
        """How a module lies in the source."""
        leaves = self.leaves[module].values()
        ends = sorted({end for leaf in leaves for piece in leaf.pieces for end in (piece.at, piece.at + piece.rows)})
        pieces = []
        for start, stop in zip(ends, ends[1:]):
            reads = [self._read(leaf, tensor, (start, stop)) for tensor, leaf in self.leaves[module].items()]
            files = {t.file.name for read in reads for t in (read.source, read.scale) if t}
            pieces.append(SourcePiece((start, stop), sum(read.row_bytes for read in reads), frozenset(files)))
        return Extent(columns, tuple(pieces))

    def fetch(self, module: str, rows: Span) -> Rows:
        """A block of one piece, all leaves, in the source's own format: arrays [rows, columns] of HOLDERS' types."""
        found = {}
        for tensor, assembly in self.leaves[module].items():
            target = np.empty((rows[1] - rows[0], assembly.spec.shape[-1]), HOLDERS[assembly.spec.dtype])
            fill(self._read(assembly, tensor, rows), target, assembly.spec.dtype, self.files)
            found[split_name(tensor)[1]] = target
        return found

    def _read(self, assembly: Assembly, tensor: str, rows: Span) -> Read:
        piece = assembly.pieces[bisect_right(self.starts[tensor], rows[0]) - 1]
        scale = self.stored[piece.scale] if piece.scale else None
        row = piece.row + rows[0] - piece.at
        return Read(tensor, self.stored[piece.tensor], row, rows[1] - rows[0], 0, scale=scale)


@dataclass(frozen=True)
class Holding:
    """What a rank has already: files of a target, of which `areas` may be relied on."""

    placed: Placed
    areas: Mapping[str, Sequence[Area]]

    @classmethod
    def of(
        cls,
        directory: Path,
        plan: Plan,
        rank: int,
        modules: Container[str],
        files: Container[str] | None = None,
        done: Mapping[str, Sequence[Span]] | None = None,
    ) -> "Holding":
        """Of `rank`'s slice in a directory `modules`, as far as they are in `files`, or in the rows that are `done`."""
        form = Format(plan.inventory.config, plan.specs)
        present = [file for file in slice_of(plan, rank) if files is None or file.name in files]
        areas = {module: areas for module, areas in form.areas(present).items() if module in modules}
        if done is not None:
            areas = {module: _within(areas[module], done[module]) for module in areas.keys() & done.keys()}
        return cls(Placed(directory, present, form), areas)

    def has(self, module: str, rows: Span, columns: Span) -> bool:
        return any(
            area.rows[0] <= rows[0] < area.rows[1] and area.columns[0] <= columns[0] and columns[1] <= area.columns[1]
            for area in self.areas.get(module, ())
        )


def _within(areas: Sequence[Area], done: Sequence[Span]) -> list[Area]:
    """The rows of areas that are in spans."""
    cut = [(max(area.rows[0], rows[0]), min(area.rows[1], rows[1]), area) for area in areas for rows in done]
    return [Area((first, last), area.columns) for first, last, area in cut if first < last]


class Build:
    """One rank's part of a schedule."""

    def __init__(
        self,
        comm: Comm,
        blocks: Sequence[Block],
        source: Source,
        target: Inventory,
        work: Work,
        kept: Sequence[Holding],
        connections: int,
    ):
        self.comm, self.blocks, self.source, self.target = comm, blocks, source, target
        self.work, self.form, self.kept, self.connections = work, work.form, kept, connections
        self.rounds = rounds(blocks, comm.world)
        self.exchanged = 0  # rounds
        rank = comm.rank
        self.parts = {n: len(b.givers) for n, b in enumerate(blocks) if any(taker == rank for taker, _ in b.takers)}
        self.wanted = len(self.parts)
        mine = [n for n, block in enumerate(blocks) if block.fetched and block.owner == rank]
        given = [(n, item.block) for n, items in enumerate(self.rounds) if (item := items[rank])]
        self.shared = deque((n, block) for n, block in given if blocks[block].fetched)  # round and block
        self.direct = deque(n for n in mine if not blocks[n].shared)
        self.copies = deque(n for n, b in enumerate(blocks) if not b.fetched and not b.shared and b.owner == rank)
        self.total, self.got = sum(blocks[n].source_bytes for n in mine), 0
        self.pending: dict[Future[Rows], int] = {}
        # What lies in the spool, by module and rows, and how many blocks are still to be given or copied out of it.
        used = [blocks[n] for n in (*self.copies, *(n for _, n in given)) if not blocks[n].fetched]
        kept = [spooled for block in used if (spooled := work.spool_of(block.module, block.rows))]
        self.spooled = Counter(kept)
        self.emptied: list[Spooled] = []
        for spooled in set(work.spooled_rows()) - set(kept):  # an interrupted run left what nobody needs any more
            work.drop(*spooled)

    def run(self, report: Callable[[list[Tally]], None]) -> None:
        """Do it all. `report` gets every rank's tally a few times a second. Raises this rank's own error, or
        CommunicationError with the first failing rank's."""
        error: Exception | None = None
        pool, before = ThreadPoolExecutor(self.connections), mx.set_cache_limit(CACHE)
        try:
            while True:
                count = self._meet(error, report)
                if count is None:
                    return
                for items in self.rounds[self.exchanged : self.exchanged + count]:
                    error = self._exchange(items, error)
                self.exchanged += count
                try:
                    self._work(pool)
                except Exception as caught:  # whatever it is, the others must not wait for this rank
                    error = error or caught
        finally:
            mx.set_cache_limit(before)
            pool.shutdown(wait=False, cancel_futures=True)  # a thread may be waiting for the hub for long

    def _work(self, pool: ThreadPoolExecutor) -> None:
        """What this rank can do alone, for about TICK seconds: a conversion may take as long by itself."""
        until = time.monotonic() + TICK
        while (left := until - time.monotonic()) > 0 and (self.copies or self.shared or self.direct or self.pending):
            self._start(pool)
            if self.copies:
                self._copy(self.copies.popleft())
                left = 0.0
            elif not self.pending:
                return  # until the others follow
            ended, _ = wait(self.pending, left, FIRST_COMPLETED)
            for future in list(ended)[:1]:  # and look at the clock: its connection waits, and the other ranks
                self._take(self.pending.pop(future), future.result())

    def _start(self, pool: ThreadPoolExecutor) -> None:
        """Keep every connection busy: with what others wait for, as long as they follow."""
        while len(self.pending) < self.connections:
            if self.shared and self.shared[0][0] < self.exchanged + SPOOLED:
                _, number = self.shared.popleft()
            elif self.direct:
                number = self.direct.popleft()
            else:
                return
            block = self.blocks[number]
            self.pending[pool.submit(self.source.fetch, block.module, block.rows)] = number

    def _take(self, number: int, fetched: Rows) -> None:
        """A block came: convert it, and put it in place or keep it for the exchange."""
        block = self.blocks[number]
        self.got += block.source_bytes
        leaves = self._converted(block.module, fetched)
        if block.shared:
            self.work.spool(block.module, block.rows, leaves)
            self.spooled[block.module, block.rows] = 1
        else:
            self._place(number, leaves, (0, self.form.columns(block.module)))

    def _converted(self, module: str, fetched: Rows) -> Rows:
        before, after = (i.quantization.get(module) for i in (self.source.inventory, self.target))
        tensors = {split_name(tensor)[1]: tensor for tensor in self.form.leaves[module]}
        if before != after:
            floats = [d for d in (self.form.specs[tensor].dtype for tensor in tensors.values()) if d in FLOATS]
            fetched = requantise(fetched, before, after, *floats[:1])
        return {tensors[leaf]: array.view(np.uint8) for leaf, array in fetched.items()}

    def _copy(self, number: int) -> None:
        """From what this rank keeps itself."""
        block = self.blocks[number]
        _, columns = block.givers[0]
        self._place(number, self._kept(block.module, block.rows, columns), columns)
        self._used(block.module, block.rows)

    def _kept(self, module: str, rows: Span, columns: Span) -> Rows:
        if leaves := self.work.unspool(module, rows):
            return _columns(self.form, leaves, columns)
        kept = next(kept for kept in self.kept if kept.has(module, rows, columns))
        return kept.placed.read(module, rows, columns)

    def _used(self, module: str, rows: Span) -> None:
        """A block has been given or copied; if it was the last one of what lies in the spool, that can go."""
        if spooled := self.work.spool_of(module, rows):
            self.spooled[spooled] -= 1
            if not self.spooled[spooled]:
                self.emptied.append(spooled)

    def _place(self, number: int, leaves: Rows, columns: Span) -> None:
        block = self.blocks[number]
        self.work.place(leaves, block.rows, columns)
        self.parts[number] -= 1
        if not self.parts[number]:
            del self.parts[number]
            self.work.note(block.module, block.rows)

    # -----------------------------------------------------------------------------------------------------------------
    # Together

    def _meet(self, error: Exception | None, report: Callable[[list[Tally]], None]) -> int | None:
        """Tell the others, and hear them. How many rounds of the exchange all are ready for; None once all are done."""
        tally = (self.got, self.total, self.wanted - len(self.parts), self.wanted)
        failed = error and f"{type(error).__name__}: {error}"
        said = self.comm.gather_objects({"failed": failed, "ready": self._ready(), "tally": tally})
        if error:
            raise error
        for rank, word in enumerate(said):
            if word["failed"]:
                raise CommunicationError(f"rank {rank} failed: {word['failed']}")
        for spooled in self.emptied:  # every rank has noted them, or it could not have come here
            self.work.drop(*spooled)
        self.emptied.clear()
        report([Tally(*word["tally"]) for word in said])
        over = all(word["tally"][2] == word["tally"][3] for word in said)
        return None if over and self.exchanged == len(self.rounds) else min(word["ready"] for word in said)

    def _ready(self) -> int:
        """How many rounds more could be gone through as far as this rank is concerned, ROUNDS at most."""
        rounds = self.rounds[self.exchanged : self.exchanged + ROUNDS]
        for count, items in enumerate(rounds):
            item = items[self.comm.rank]
            block = item and self.blocks[item.block]
            if block and block.fetched and not self.spooled[block.module, block.rows]:
                return count
        return len(rounds)

    def _exchange(self, items: Sequence[Item | None], error: Exception | None) -> Exception | None:
        """One round: every rank's item to all of them; each puts in place what it wants. A rank with an error takes
        part, so that the others need not wait for it, and says so when all meet. Returns the error."""
        areas = [
            item and (self.blocks[item.block].module, self.blocks[item.block].rows, item.columns) for item in items
        ]
        sizes = [self.form.nbytes(*area) if area else 0 for area in areas]
        given = np.zeros(max(sizes), np.uint8)
        try:
            if own := areas[self.comm.rank]:
                given[: sizes[self.comm.rank]] = self.form.join(own[0], self._kept(*own))
        except Exception as caught:
            error = error or caught
        gathered = np.array(self.comm.all_gather(mx.array(given)), copy=False)
        try:
            for item, area, size, row in zip(items, areas, sizes, gathered):
                if item and item.block in self.parts and not error:
                    self._place(item.block, self.form.split(*area, row[:size]), item.columns)
            if own:
                self._used(own[0], own[1])
        except Exception as caught:
            error = error or caught
        return error


def _columns(form: Format, leaves: Rows, columns: Span) -> Rows:
    """Some columns of whole rows."""
    spans = {tensor: form.bytes_of(tensor, columns) for tensor in leaves}
    return {tensor: data[:, spans[tensor][0] : spans[tensor][1]] for tensor, data in leaves.items()}
