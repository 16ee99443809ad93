"""Rows of our tensors in files: found, read and written. What a rank keeps and what it is about to hold. No MLX."""

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError
from m3dist.fetch.schedule import Area
from m3dist.fetch.target import OutputFile, Place
from m3dist.layout import Span
from m3dist.tensors import BYTES, TensorSpec, modules, split_name

OPENED = 32  # files of one directory at a time: macOS allows a process 256, of a source, a target and what is kept
Rows = dict[str, np.ndarray]  # tensor of ours -> uint8 [rows, bytes of the columns]: a block, all its leaves


class Format:
    """The modules of a target and their leaves: which bytes of a row some columns are."""

    def __init__(self, config: ModelConfig, specs: Mapping[str, TensorSpec]):
        self.modules = modules(config)
        self.leaves: dict[str, list[str]] = {}
        for tensor in specs:
            self.leaves.setdefault(split_name(tensor)[0], []).append(tensor)
        self.specs = specs

    def columns(self, module: str) -> int:
        """How many values a row of a module has."""
        return self.modules[module].shape[-1]

    def bytes_of(self, tensor: str, columns: Span) -> Span:
        """Where values `columns` of a row begin and end in this leaf."""
        spec, values = self.specs[tensor], self.columns(split_name(tensor)[0])
        width = spec.shape[-1] * BYTES[spec.dtype]
        return columns[0] * width // values, columns[1] * width // values

    def nbytes(self, module: str, rows: Span, columns: Span) -> int:
        """Bytes of an area, all leaves together."""
        spans = [self.bytes_of(tensor, columns) for tensor in self.leaves[module]]
        return (rows[1] - rows[0]) * sum(stop - start for start, stop in spans)

    def split(self, module: str, rows: Span, columns: Span, data: np.ndarray) -> Rows:
        """The leaves of an area out of `join`'s bytes."""
        found, at, count = {}, 0, rows[1] - rows[0]
        for tensor in self.leaves[module]:
            start, stop = self.bytes_of(tensor, columns)
            found[tensor] = data[at : at + count * (stop - start)].reshape(count, stop - start)
            at += count * (stop - start)
        return found

    def join(self, module: str, leaves: Rows) -> np.ndarray:
        """One row of bytes for an area: leaf after leaf."""
        return np.concatenate([leaves[tensor].reshape(-1) for tensor in self.leaves[module]])

    def area(self, place: Place) -> Area:
        """What a place holds. Its columns are whole quantisation groups, so this is exact."""
        module = split_name(place.part.tensor)[0]
        values, width = self.columns(module), self.specs[place.part.tensor].shape[-1]
        start, stop = place.part.columns or (0, width)
        return Area(place.part.rows, (start * values // width, stop * values // width))

    def areas(self, files: Iterable[OutputFile]) -> dict[str, list[Area]]:
        """Module -> what of it these files hold, judged by its first leaf: all leaves are cut alike."""
        found: dict[str, list[Area]] = {}
        for file in files:
            for place in file.places():
                module = split_name(place.part.tensor)[0]
                if place.part.tensor == self.leaves[module][0]:
                    found.setdefault(module, []).append(self.area(place))
        return found


class Placed:
    """Files of a target in a directory: reads and writes rows by the tensor's name and row numbers."""

    def __init__(self, directory: Path, files: Sequence[OutputFile], form: Format, flags: int = os.O_RDONLY):
        self.directory, self.form, self.flags = directory, form, flags
        self.descriptors: dict[str, int] = {}
        by_tensor: dict[str, list[Place]] = {}
        for file in files:
            for place in file.places():
                by_tensor.setdefault(place.part.tensor, []).append(place)
        self.places = {name: sorted(places, key=lambda p: p.part.rows) for name, places in by_tensor.items()}
        self.starts = {name: [place.part.rows[0] for place in places] for name, places in self.places.items()}

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def read(self, module: str, rows: Span, columns: Span) -> Rows:
        """An area of a module, which must be here. Raises CheckpointError, naming the file that cannot be read."""
        found = {}
        for tensor in self.form.leaves[module]:
            first, last = self.form.bytes_of(tensor, columns)
            out = np.empty((rows[1] - rows[0], last - first), np.uint8)
            for place, start, stop in self._overlaps(tensor, rows):
                begin, _ = self._held(place)
                raw = np.empty((stop - start, place.row_bytes), np.uint8)
                offset = place.offset + (start - place.part.rows[0]) * place.row_bytes
                left = raw.data.cast("B")
                while left:
                    count = self._call(place.file, tensor, os.preadv, [left], offset)
                    if not count:
                        raise CheckpointError(f"{self.directory / place.file}: {tensor}: ends at byte {offset}")
                    left, offset = left[count:], offset + count
                out[start - rows[0] : stop - rows[0]] = raw[:, first - begin : last - begin]
            found[tensor] = out
        return found

    def write(self, leaves: Rows, rows: Span, columns: Span) -> None:
        """Put an area, of which these are the leaves, where it belongs, as far as there is a place for its columns."""
        for tensor, data in leaves.items():
            first, last = self.form.bytes_of(tensor, columns)
            for place, start, stop in self._overlaps(tensor, rows):
                begin, end = self._held(place)
                low, high = max(first, begin), min(last, end)
                part = data[start - rows[0] : stop - rows[0], low - first : high - first]
                offset = place.offset + (start - place.part.rows[0]) * place.row_bytes
                if high - low == place.row_bytes:
                    self._write(place.file, tensor, np.ascontiguousarray(part), offset)
                elif high > low:  # some columns only: from several givers, after a change of plan
                    for number, row in enumerate(np.ascontiguousarray(part)):
                        self._write(place.file, tensor, row, offset + number * place.row_bytes + low - begin)

    def _write(self, file: str, tensor: str, data: np.ndarray, offset: int) -> None:
        left = data.data.cast("B")
        while left:
            count = self._call(file, tensor, os.pwritev, [left], offset)
            left, offset = left[count:], offset + count

    def _held(self, place: Place) -> Span:
        """The bytes of a whole row that a place has."""
        return self.form.bytes_of(place.part.tensor, self.form.area(place).columns)

    def _overlaps(self, tensor: str, rows: Span) -> Iterator[tuple[Place, int, int]]:
        """Places with some of the rows: each, and which of the rows (first, last + 1)."""
        places = self.places.get(tensor, [])
        number = max(0, bisect_right(self.starts.get(tensor, []), rows[0]) - 1)
        for place in places[number:]:
            if place.part.rows[0] >= rows[1]:
                return
            start, stop = max(rows[0], place.part.rows[0]), min(rows[1], place.part.rows[1])
            if start < stop:
                yield place, start, stop

    def _call(self, file: str, tensor: str, call, buffers: list, offset: int) -> int:  # type: ignore[no-untyped-def]
        try:
            if file not in self.descriptors:
                if len(self.descriptors) == OPENED:
                    self.close()
                self.descriptors[file] = os.open(self.directory / file, self.flags)
            return int(call(self.descriptors[file], buffers, offset))
        except OSError as error:
            raise CheckpointError(f"{self.directory / file}: {tensor}: {error.strerror or error}") from None
