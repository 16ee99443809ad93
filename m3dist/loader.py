"""Carries out a plan: reads a rank's slices of a checkpoint, and nothing else, straight into MLX's memory.

MLX allocates every tensor; a few threads fill it through a numpy view of the same memory with `preadv`. No memory map:
its pages would count as the process's own.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np

from m3dist.checkpoint import Checkpoint, open_checkpoint
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.errors import CheckpointError
from m3dist.model import Model
from m3dist.numbers import fill
from m3dist.plan import Plan, plan_world
from m3dist.progress import Progress, Report
from m3dist.reads import Read, plan_reads
from m3dist.translation import Translation

READERS = 4  # threads: one selects columns or casts while others wait for the disk
QUEUED = 1024  # reads ahead of the oldest unfinished one, so that readers are busy while MLX allocates

FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# numbers.HOLDERS in MLX.
_MLX_HOLDERS = {"BF16": mx.uint16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}


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
            yield read, partial(fill, read, rows[read.at : read.at + read.rows], spec.dtype, files)

    with _Files(checkpoint.directory) as files:
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


class _Files:
    """The files of a directory, opened when first read from; any thread may read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opened: dict[str, int] = {}
        self.lock = Lock()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self.opened.values():
            os.close(descriptor)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill `into` from byte `offset` of a file."""
        try:
            descriptor = self._descriptor(name)
            while into:
                count = os.preadv(descriptor, [into], offset)
                if not count:
                    raise CheckpointError(
                        f"{self.directory / name}: the file now ends at byte {offset}, where it was longer when it"
                        " was opened; is something still writing it?"
                    )
                into, offset = into[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self.directory / name}: {error}") from None

    def _descriptor(self, name: str) -> int:
        with self.lock:
            if name not in self.opened:
                self.opened[name] = os.open(self.directory / name, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):  # reading ahead would fetch the rows of other ranks
                    os.posix_fadvise(self.opened[name], 0, 0, os.POSIX_FADV_RANDOM)
            return self.opened[name]
