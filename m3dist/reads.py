"""Which bytes of which files a rank needs: a translation and a plan, or a store's entry -> `Read`s. No MLX.

The loader carries them out. Of a whole checkpoint, a cut of rows or of experts reads only what it keeps. A cut of
columns reads whole rows, of which the rank's part is a few KiB, less than the disk would fetch for it anyway.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from m3dist.checkpoint import StoredTensor
from m3dist.layout import COLUMNS, Slice, Span
from m3dist.plan import Plan
from m3dist.translation import Piece, Translation

LARGEST = 4 << 20  # bytes a read, unless one row is longer: what a reader holds besides the rank's own arrays


@dataclass(frozen=True)
class Read:
    """Rows `row` .. `row + rows` of a stored tensor, for the rows from `at` of this rank's slice of `tensor`.

    Rows are counted with all axes but the last flattened. Of each row the rank keeps `columns`, spans of elements of
    our tensor, or all where that is None. `scale` is the stored tensor of block multipliers, for FP8 in blocks.
    """

    tensor: str
    source: StoredTensor
    row: int
    rows: int
    at: int
    columns: tuple[Span, ...] | None = None
    scale: StoredTensor | None = None

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self.source)

    @property
    def offset(self) -> int:
        """The first byte, counted from the start of the file."""
        return self.source.offset + self.row * self.row_bytes

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def plan_reads(stored: Mapping[str, StoredTensor], translation: Translation, plan: Plan, rank: int) -> Iterator[Read]:
    """Everything `rank` has to read, tensor by tensor; together the reads of a tensor fill its slice."""
    slices = plan.slices(rank)
    for name, assembly in translation.assemblies.items():
        part = slices[name]
        columns = part.spans if part.axis == COLUMNS else None
        for piece, row, rows, at in _overlaps(assembly.pieces, kept_rows(part, assembly.spec.shape)):
            source = stored[piece.tensor]
            scale = stored[piece.scale] if piece.scale else None
            for first, count in _steps(source, rows):
                yield Read(name, source, row + first, count, at + first, columns, scale)


def sequential_reads(stored: Iterable[StoredTensor]) -> Iterator[Read]:
    """All of tensors that are a rank's slices already, under our names, in the order in which the files hold them."""
    for tensor in sorted(stored, key=lambda t: (t.file, t.offset)):
        for first, count in _steps(tensor, math.prod(tensor.shape[:-1])):
            yield Read(tensor.name, tensor, first, count, first)


def kept_rows(part: Slice, shape: tuple[int, ...]) -> list[Span]:
    """The rows of a whole tensor that a slice keeps, in order; all of them where it cuts columns or nothing."""
    rows = math.prod(shape[:-1])
    if part.axis is None or part.axis == COLUMNS:
        return [(0, rows)]
    extent, inner = shape[part.axis], math.prod(shape[part.axis + 1 : -1])
    outer = range(0, rows, extent * inner)
    return [(first + start * inner, first + stop * inner) for first in outer for start, stop in part.spans]


def _overlaps(pieces: Iterable[Piece], spans: Iterable[Span]) -> Iterator[tuple[Piece, int, int, int]]:
    """Both in ascending order -> (piece, first row in the stored tensor, rows, first row among the kept)."""
    queue, at = iter(spans), 0
    start, stop = next(queue, (0, 0))
    for piece in pieces:
        end = piece.at + piece.rows
        while start < min(stop, end):
            rows = min(stop, end) - start
            yield piece, piece.row + start - piece.at, rows, at
            start, at = start + rows, at + rows
            if start == stop:
                start, stop = next(queue, (stop, stop))


def _steps(source: StoredTensor, rows: int) -> Iterator[Span]:
    """So many rows of a stored tensor, in reads: (first, count)."""
    step = max(1, LARGEST // _row_bytes(source))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _row_bytes(tensor: StoredTensor) -> int:
    return tensor.nbytes // math.prod(tensor.shape[:-1])
