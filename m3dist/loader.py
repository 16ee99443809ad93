"""Carries out a plan: reads a rank's slices, and nothing else, straight into MLX's memory.

They come out of a whole checkpoint, or of a store's entry, which holds just them. MLX allocates every tensor; a few
threads fill it through a numpy view of the same memory with `preadv`. No memory map: its pages would count as the
process's own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from m3dist.checkpoint import Checkpoint, Files, Folder, StoredTensor, open_checkpoint, read_header
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.errors import StoreError
from m3dist.fetch.command import refetch_command
from m3dist.fetch.store import Entry, check
from m3dist.model import Model
from m3dist.numbers import fill
from m3dist.plan import Plan, plan_world
from m3dist.progress import Progress, Report
from m3dist.reads import Read, plan_reads, sequential_reads
from m3dist.tensors import TensorSpec
from m3dist.translation import Translation

READERS = 4  # threads: one selects columns or casts while others wait for the disk
QUEUED = 1024  # reads ahead of the oldest unfinished one, so that readers are busy while MLX allocates

FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# numbers.HOLDERS in MLX.
_MLX_HOLDERS = {"BF16": mx.uint16, "F16": mx.float16, "F32": mx.float32, "U8": mx.uint8, "U32": mx.uint32}


def _float_name(dtype: str | None) -> str | None:
    return FLOAT_NAMES.get(dtype, dtype) if dtype else None


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
        translation = checkpoint.translate(_float_name(dtype))
        plan = plan_world(translation.inventory, comm.world, weights, experts, attention)
    weights_of = partial(load_weights, checkpoint, translation, plan, comm.rank, progress)
    return _build(plan, "none", comm, planned, weights_of)


def load_entry(
    entry: Entry,
    comm: Comm,
    *,
    dtype: str | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    progress: Report | None = None,
) -> Model:
    """`load` of this rank's entry in its store, which was cut before. Every rank calls it, each with its own entry.

    Raises StoreError, naming the file and the command that fetches it again, where an entry is not whole or another's.
    """
    with all_ranks(comm):
        plan, rank = plan_of(entry, dtype), entry.manifest.rank
        if (rank, plan.world) != (comm.rank, comm.world):
            raise StoreError(f"{entry.directory} is for rank {rank} of {plan.world}, not {comm.rank} of {comm.world}")
    return _build(plan, entry.manifest.revision, comm, planned, partial(load_entry_weights, entry, plan, progress))


def _build(
    plan: Plan,
    revision: str,
    comm: Comm,
    planned: Callable[[Plan], None],
    weights_of: Callable[[], dict[str, mx.array]],
) -> Model:
    """The model, once all ranks have the same plan and revision."""
    check_same(comm, {"plan": plan.digest, "revision": revision})
    with all_ranks(comm):
        planned(plan)
        model = Model(plan.inventory.config)
        model.hold(plan, comm, weights_of())
    return model


def load_weights(
    checkpoint: Checkpoint, translation: Translation, plan: Plan, rank: int, progress: Report | None = None
) -> dict[str, mx.array]:
    """Tensor name -> `rank`'s slice of a whole checkpoint, in the plan's dtypes. See `read_weights`."""
    with Folder(checkpoint.directory) as files:
        return read_weights(
            plan.held_specs(rank), plan_reads(checkpoint.stored, translation, plan, rank), files, progress
        )


# ---------------------------------------------------------------------------------------------------------------------
# A store's entry


def plan_of(entry: Entry, dtype: str | None = None) -> Plan:
    """The plan an entry was cut by, with the floats that the model computes in: by default the checkpoint's own.

    It is not made anew: the cut also depends on how many bytes a float takes. Raises StoreError, naming the field.
    """
    plan = entry.manifest.make_plan()
    name = _float_name(dtype)
    return replace(plan, inventory=replace(plan.inventory, dtype=name)) if name else plan


def load_entry_weights(entry: Entry, plan: Plan, progress: Report | None = None) -> dict[str, mx.array]:
    """Tensor name -> the slice of the entry's rank, in the plan's dtypes; every file is read from its start to its end.
    See `open_entry` and `read_weights`."""
    reads = sequential_reads(open_entry(entry))
    with Folder(entry.directory, ahead=True) as files:
        return read_weights(plan.held_specs(entry.manifest.rank), reads, files, progress)


def open_entry(entry: Entry) -> list[StoredTensor]:
    """What an entry's files hold: just what its plan gives its rank, in the checkpoint's own dtypes.

    Raises StoreError naming the file, and the command that fetches it again, where one is truncated, missing or wrong.
    """
    for problem in check(entry):
        advice = f"on this host, `{refetch_command(entry.manifest)}` makes it whole again"
        raise StoreError(f"{entry.directory / problem.file}: {problem.what}; {advice}")
    names = [kept.name for kept in entry.manifest.files if kept.name.endswith(".safetensors")]
    return [tensor for name in names for tensor in read_header(entry.directory / name).values()]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_weights(
    specs: Mapping[str, TensorSpec], reads: Iterable[Read], files: Files, progress: Report | None = None
) -> dict[str, mx.array]:
    """Carry out `reads`, which fill the tensors of `specs`, one after the other. MLX is used by this thread only.

    Takes the memory of the tensors and, in each of READERS threads, a few times reads.LARGEST. Raises CheckpointError,
    naming file and tensor, where a file cannot be read or ends early.
    """
    reads = list(reads)
    done, total = 0, sum(read.nbytes for read in reads)
    arrays: dict[str, mx.array] = {}

    def jobs() -> Iterator[tuple[Read, Callable[[], None]]]:
        for read in reads:
            spec = specs[read.tensor]
            if read.tensor not in arrays:
                arrays[read.tensor] = mx.zeros(spec.shape, _MLX_HOLDERS[spec.dtype])
                mx.eval(arrays[read.tensor])
                rows = np.array(arrays[read.tensor], copy=False).reshape(-1, spec.shape[-1])
            yield read, partial(fill, read, rows[read.at : read.at + read.rows], spec.dtype, files)

    for read in _run(jobs()):
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
