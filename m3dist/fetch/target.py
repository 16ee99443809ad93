"""What is to be written: safetensors files, laid out before a byte of them is there, and where each row of our tensors
goes in them. A rank's entry in the store and a converted checkpoint are both such a target. No MLX."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from m3dist.layout import COLUMNS, Span
from m3dist.plan import Plan
from m3dist.reads import kept_rows
from m3dist.tensors import BYTES, TensorSpec, split_name

LARGEST_FILE = 1 << 30  # bytes of a store's file: as much is fetched again where one is damaged


@dataclass(frozen=True)
class Part:
    """Rows of a whole tensor of ours, all axes but the last flattened; of each row the stored elements `columns`."""

    tensor: str
    rows: Span
    columns: Span | None = None


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of a file, as the file says; the rows of its parts, in order, fill it."""

    name: str
    spec: TensorSpec
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Place:
    """Where a part goes: its first kept byte to byte `offset` of `file`, then row after row of `row_bytes`."""

    part: Part
    file: str
    offset: int
    row_bytes: int


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file to be: its first bytes, its size, and its tensors in order."""

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[OutputTensor, ...] = field(repr=False)

    def places(self) -> Iterator[Place]:
        """Where everything in this file goes."""
        offset = len(self.header)
        for tensor in self.tensors:
            row_bytes = tensor.spec.shape[-1] * BYTES[tensor.spec.dtype]
            for part in tensor.parts:
                yield Place(part, self.name, offset, row_bytes)
                offset += (part.rows[1] - part.rows[0]) * row_bytes


def lay_out(
    tensors: Sequence[OutputTensor], largest: int, names: Callable[[int], Sequence[str]]
) -> tuple[OutputFile, ...]:
    """Files for `tensors`, in order, each of at most `largest` bytes of tensors unless a single module has more: the
    tensors of a module are fetched together.

    `names` gives as many file names as it is asked for.
    """
    groups: list[list[OutputTensor]] = []
    size = 0
    for _, module in groupby(tensors, key=lambda tensor: split_name(tensor.name)[0]):
        together = list(module)
        nbytes = sum(tensor.spec.nbytes for tensor in together)
        if not groups or size + nbytes > largest:
            groups.append([])
            size = 0
        groups[-1] += together
        size += nbytes
    return tuple(_file(name, group) for name, group in zip(names(len(groups)), groups, strict=True))


def numbered(count: int) -> list[str]:
    """File names as Hugging Face's libraries give them."""
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def slice_of(plan: Plan, rank: int) -> tuple[OutputFile, ...]:
    """The files of what `rank` holds: a tensor for each of ours, in the order of the forward."""
    slices, held = plan.slices(rank), plan.held_specs(rank)
    tensors = []
    for name, spec in plan.specs.items():
        part = slices[name]
        columns = part.spans[0] if part.axis == COLUMNS else None  # a cut of columns has one part
        rows = kept_rows(part, spec.shape)
        tensors.append(OutputTensor(name, held[name], tuple(Part(name, span, columns) for span in rows)))
    return lay_out(tensors, LARGEST_FILE, numbered)


def _file(name: str, tensors: Iterable[OutputTensor]) -> OutputFile:
    """The format: 8 bytes little-endian N, N bytes of JSON padded with spaces to a multiple of 8, the tensors."""
    tensors, entries, end = tuple(tensors), {}, 0
    for tensor in tensors:
        start, end = end, end + tensor.spec.nbytes
        entry = {"dtype": tensor.spec.dtype, "shape": tensor.spec.shape, "data_offsets": [start, end]}
        entries[tensor.name] = entry
    data = json.dumps({"__metadata__": {"format": "mlx"}} | entries, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    header = len(data).to_bytes(8, "little") + data
    return OutputFile(name, header, len(header) + end, tensors)
