"""Carries out a plan: reads a rank's slices of a checkpoint, and nothing else, straight into MLX's memory.

MLX allocates every tensor; a few threads fill it through a numpy view of the same memory with `preadv`. No memory map:
its pages would count as the process's own.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np

from m3dist.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.errors import CheckpointError
from m3dist.model import Model
from m3dist.plan import Plan, plan_world
from m3dist.progress import Progress, Report
from m3dist.reads import Read, plan_reads
from m3dist.tensors import FLOATS
from m3dist.translation import FP8_BLOCK, Translation

READERS = 4  # threads: one selects columns or casts while others wait for the disk
QUEUED = 1024  # reads ahead of the oldest unfinished one, so that readers are busy while MLX allocates

FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# What holds a tensor's bits, by safetensors dtype: numpy has neither bf16 nor fp8.
_MLX_HOLDERS = {"BF16": mx.uint16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}
_HOLDERS = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
    "U32": np.dtype(np.uint32),
    "F8_E4M3": np.dtype(np.uint8),
}


def load(
    directory: Path,
    comm: Comm,
    *,
    weights: Sequence[float] | None = None,
    experts: str = "columns",
    attention: str = "heads",
    dtype: str | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    progress: Report | None = None,
) -> Model:
    """This rank's part of a checkpoint's model. Every rank calls it, with the same arguments; if one fails, all raise.

    `weights`: how much each rank takes, equal by default. `experts`, `attention`: a key of layout.RULES. `dtype`:
    bfloat16, float16 or float32 to compute in, by default the checkpoint's own. `planned` gets the plan before
    anything is read, and may raise. Raises CheckpointError, ConfigError or PlanError for this rank's own failure, and
    CommunicationError naming the other rank for its.
    """
    with all_ranks(comm):
        checkpoint = open_checkpoint(directory)
        translation = checkpoint.translate(FLOAT_NAMES.get(dtype, dtype) if dtype else None)
        plan = plan_world(translation.inventory, comm.world, weights, experts, attention)
    check_same(comm, {"plan": plan.digest})
    with all_ranks(comm):
        planned(plan)
        model = Model(checkpoint.config)
        model.hold(plan, comm, load_weights(checkpoint, translation, plan, comm.rank, progress))
    return model


def load_weights(
    checkpoint: Checkpoint, translation: Translation, plan: Plan, rank: int, progress: Report | None = None
) -> dict[str, mx.array]:
    """Tensor name -> `rank`'s slice, in the plan's dtypes. MLX is used by the calling thread only.

    Takes the memory of the slices and, in each of READERS threads, a few times reads.LARGEST. Raises CheckpointError,
    naming file and tensor, where a file cannot be read or ends early.
    """
    specs = plan.held_specs(rank)
    reads = list(plan_reads(checkpoint.stored, translation, plan, rank))
    done, total = 0, sum(read.nbytes for read in reads)
    arrays: dict[str, mx.array] = {}

    def jobs(files: _Files) -> Iterator[tuple[Read, Callable[[], None]]]:
        for read in reads:
            spec = specs[read.tensor]
            if read.tensor not in arrays:
                arrays[read.tensor] = mx.zeros(spec.shape, _MLX_HOLDERS[spec.dtype])
                mx.eval(arrays[read.tensor])
                rows = np.array(arrays[read.tensor], copy=False).reshape(-1, spec.shape[-1])
            yield read, partial(_fill, read, rows[read.at : read.at + read.rows], spec.dtype, files)

    with _Files() as files:
        for read in _run(jobs(files)):
            done += read.nbytes
            if progress:
                progress(Progress(read.tensor, done, total))
    held = {name: x.view(mx.bfloat16) if specs[name].dtype == "BF16" else x for name, x in arrays.items()}
    mx.eval(held)
    return held


def _run(jobs: Iterable[tuple[Read, Callable[[], None]]]) -> Iterator[Read]:
    """Run jobs in READERS threads, drawing them in this one; yields the reads in order, as they end."""
    pending: deque[tuple[Read, Future[None]]] = deque()

    def ended(read: Read, future: Future[None]) -> Read:
        future.result()
        return read

    with ThreadPoolExecutor(READERS) as pool:
        try:
            for read, job in jobs:
                pending.append((read, pool.submit(job)))
                while pending and (len(pending) > QUEUED or pending[0][1].done()):
                    yield ended(*pending.popleft())
            while pending:
                yield ended(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the rest is not worth reading


# ---------------------------------------------------------------------------------------------------------------------
# In a reader's thread: numpy only


class _Files:
    """Checkpoint files, opened when first read from; any thread may read."""

    def __init__(self) -> None:
        self.opened: dict[Path, int] = {}
        self.lock = Lock()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)

    def read(self, tensor: StoredTensor, offset: int, into: np.ndarray) -> None:
        """Fill a contiguous array from byte `offset` of a tensor's file."""
        left = memoryview(into).cast("B")
        try:
            descriptor = self._descriptor(tensor.file)
            while left:
                count = os.preadv(descriptor, [left], offset)
                if not count:
                    raise CheckpointError(
                        f"{tensor.file}: {tensor.name}: the file now ends at byte {offset}, where it was longer when it"
                        " was opened; is something still writing it?"
                    )
                left, offset = left[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: {tensor.name}: {error}") from None

    def _descriptor(self, file: Path) -> int:
        with self.lock:
            if file not in self.opened:
                self.opened[file] = os.open(file, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):  # reading ahead would fetch the rows of other ranks
                    os.posix_fadvise(self.opened[file], 0, 0, os.POSIX_FADV_RANDOM)
            return self.opened[file]


def _fill(read: Read, target: np.ndarray, dtype: str, files: _Files) -> None:
    """Carry out one read. `target` [rows, columns] holds a rank's tensor of safetensors type `dtype`."""
    source = read.source
    cast = dtype in FLOATS and source.dtype != dtype
    if read.columns is None and not cast:
        files.read(source, read.offset, target)
        return
    raw = np.empty((read.rows, read.row_bytes), np.uint8)
    files.read(source, read.offset, raw)
    values = raw.view(_HOLDERS[source.dtype if cast else dtype])
    if read.scale:
        values = _E4M3[values] * _multipliers(read, files)
    first = 0
    for start, stop in read.columns or ((0, values.shape[1]),):
        kept = values[:, start:stop]
        if cast:
            kept = cast_floats(kept, "F32" if read.scale else source.dtype, dtype)
        target[:, first : first + stop - start] = kept
        first += stop - start


def _multipliers(read: Read, files: _Files) -> np.ndarray:
    """float32 [rows, columns]: what each FP8 value of a read is multiplied by."""
    source, scale = read.source, read.scale
    rows = np.arange(read.row, read.row + read.rows)
    height = source.shape[-2]  # blocks start again with every matrix of a stack
    block = rows // height * scale.shape[-2] + rows % height // FP8_BLOCK
    first, count = block[0], block[-1] + 1 - block[0]
    width = scale.nbytes // math.prod(scale.shape[:-1])
    raw = np.empty((count, width), np.uint8)
    files.read(scale, scale.offset + int(first) * width, raw)
    multipliers = cast_floats(raw.view(_HOLDERS[scale.dtype]), scale.dtype, "F32")
    return np.repeat(multipliers, FP8_BLOCK, axis=1)[block - first, : source.shape[-1]]


def cast_floats(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Floats of one safetensors type to another, to the nearest, ties to even: the numbers that mx.astype gives.

    BF16 is held in uint16 on either side.
    """
    if source == target:
        return values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if source == "BF16" else values.astype(np.float32)
    if target == "BF16":
        bits = wide.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):  # beyond float16 is infinity, there as here
        return wide.astype(_HOLDERS[target])


def _e4m3_values() -> np.ndarray:
    """The number each F8_E4M3 byte means, as float32: 4 exponent bits (bias 7), 3 of mantissa, no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3_values()
