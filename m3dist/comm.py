"""What ranks say to each other. The only file that initialises or calls mx.distributed.

`Comm` wraps a group; `Comm()` is the world of one, whose collectives are the identity. Every collective must be called
by all ranks, in the same order, with the same shapes: the ring does not check, it sums what arrives.
"""

import faulthandler
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

import m3dist
from m3dist.errors import CommunicationError
from m3dist.libmpi import mpi_library
from m3dist.status import own_page

GRACE = 5.0  # seconds that our launcher has for ending ranks which waited in vain for the others, and for saying why


class Comm:
    """A rank's view of its world: `rank` in 0..`world`-1, and the collectives the model uses."""

    def __init__(self, group: mx.distributed.Group | None = None, abort: Callable[[int], None] | None = None):
        self.group = group
        self.rank = group.rank() if group else 0
        self.world = group.size() if group else 1
        self.abort = abort  # ends the whole job at once, where the launcher has such a thing (MPI)
        self.muted = False  # the bench's: sends nothing, so that what communication costs can be told by leaving it out

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of every rank's `x`: same shape and dtype, same bits on every rank."""
        return x if self.world == 1 or self.muted else mx.distributed.all_sum(x, group=self.group)

    def all_gather(self, x: mx.array) -> mx.array:
        """Every rank's `x` (same shape everywhere), stacked in rank order: [world, *x.shape]."""
        if self.world == 1 or self.muted:
            return mx.broadcast_to(x[None], (self.world, *x.shape))
        return mx.distributed.all_gather(x[None], group=self.group)

    def from_rank_0(self, x: mx.array) -> mx.array:
        """Rank 0's `x`, an integer array whose shape every rank knows."""
        # Zeros that wait for x as rank 0 does, so that the collectives x rests on come first on every rank.
        return self.all_sum(x if self.rank == 0 else x * 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything JSON can hold), in rank order."""
        data = json.dumps(value).encode()
        sizes = self.all_gather(mx.array([len(data)], dtype=mx.uint32))
        padded = np.frombuffer(data.ljust(int(sizes.max().item())), np.uint8)
        return [json.loads(bytes(row)) for row in np.array(self.all_gather(mx.array(padded)), copy=False)]

    def object_from_rank_0(self, value: Any = None) -> Any:
        """Rank 0's `value` (anything JSON can hold); the others' is ignored."""
        data = json.dumps(value).encode() if self.rank == 0 else b""
        words = self.from_rank_0(mx.array([-(-len(data) // 4)], dtype=mx.uint32)).item()
        padded = np.frombuffer(data.ljust(4 * words if self.rank == 0 else 0), np.uint32)
        sent = self.from_rank_0(mx.array(padded) if self.rank == 0 else mx.zeros(words, dtype=mx.uint32))
        return json.loads(bytes(np.array(sent, copy=False)))

    def barrier(self) -> None:
        """Return when every rank is here."""
        mx.eval(self.all_sum(mx.ones(1, dtype=mx.uint32)))


def connect(backend: str | None, job: str | None = None, limit: float = 60.0) -> tuple[Comm, str]:
    """Join the world the launcher set up over `backend` (None: a world of one). Returns it and the job's id.

    The backend is always named: with "any", variables left over from another job can pick the wrong one. Under MPI the
    ranks agree on the job id through mpi4py. Raises CommunicationError, naming the backend, where it cannot start; a
    rank that is still alone after `limit` seconds ends its process.
    """
    # The router and the index scores are float32 products; in TF32 they would choose other experts and blocks.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if backend is None:
        return Comm(), job or "single"
    if backend == "mpi":
        os.environ.setdefault("MLX_MPI_LIBNAME", mpi_library())
    try:
        group = wait_for_every_rank_to_join(backend, limit)
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(f"backend {backend} did not start: {error}") from None
    if backend != "mpi":
        return Comm(group), job or ""
    mpi = _running_mpi()
    job = mpi.COMM_WORLD.bcast(job or os.urandom(8).hex(), root=0)
    supervised = os.environ.get("M3DIST_LAUNCHER") == "m3dist"  # which sees a rank end, and ends the others itself
    return Comm(group, abort=None if supervised else mpi.COMM_WORLD.Abort), job


def wait_for_every_rank_to_join(backend: str, limit: float) -> mx.distributed.Group:
    """mx.distributed.init, which waits for ever, within `limit` seconds.

    It holds Python's lock meanwhile, so no thread of ours could end it: faulthandler's does, with status 1, and its
    message is a traceback whose last line is this function's name. Our own launcher ends it before, and says who is
    missing; but it may itself be gone.
    """
    faulthandler.dump_traceback_later(limit + (GRACE if own_page() else 0.0), exit=True)
    try:
        return mx.distributed.init(strict=True, backend=backend)
    finally:
        faulthandler.cancel_dump_traceback_later()


def whole_world() -> Comm:
    """The world that mx.distributed finds by itself, for programs that mlx.launch or mpirun started."""
    return Comm(mx.distributed.init())


def _running_mpi() -> Any:
    """mpi4py over the MPI that mlx has already initialised; neither initialises nor finalises it again."""
    try:
        import mpi4py
    except ImportError:
        raise CommunicationError("the mpi backend needs mpi4py: pip install 'm3dist[mpi]'") from None
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def check_same(comm: Comm, facts: dict[str, str]) -> None:
    """Compare named facts (job, versions, plan) over the ranks, right after connecting and again once planned.

    Two jobs on one machine can be cross-connected by the ring without an error; their sums would be wrong silently.
    Raises CommunicationError naming the fact and the ranks that differ.
    """
    if comm.world == 1:
        return
    # A fixed size, so that ranks of different programs can still compare.
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    rows = comm.all_gather(mx.array(list(digest), dtype=mx.uint8)).tolist()
    if all(bytes(row) == digest for row in rows):
        return
    everyone = comm.gather_objects(facts)
    for name in facts:
        values = [other.get(name) for other in everyone]
        if len(set(values)) > 1:
            table = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise CommunicationError(f"the ranks differ in {name} ({table}); are two jobs using the same ports?")
    raise CommunicationError("the ranks sent different facts but the same values: another program is on these ports")


def versions() -> dict[str, str]:
    """What must be equal on every rank for equal results."""
    return {"m3dist version": m3dist.__version__, "mlx version": mx.__version__}


def agreement(hidden: mx.array) -> mx.array:
    """A uint32 [..., 1] that differs where the bits of a row of `hidden` [..., hidden_size] do: the sum of its words,
    each times an odd weight."""
    words = hidden.view(mx.uint16 if hidden.dtype.size == 2 else mx.uint32)
    return (words * _odd_numbers(words.shape[-1])).sum(axis=-1, keepdims=True)


@lru_cache(maxsize=4)
def _odd_numbers(count: int) -> mx.array:
    """uint32 [count]: 1, 3, 5, ..."""
    numbers = mx.arange(count, dtype=mx.uint32) * 2 + 1
    mx.eval(numbers)  # else every graph that uses them would compute them again
    return numbers


@contextmanager
def all_ranks(comm: Comm) -> Iterator[None]:
    """A step that each rank takes alone (planning, loading): where it fails on one rank, it fails on all.

    Raises the rank's own error, or CommunicationError with the first failing rank's message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, the others must not wait for this rank
        error = caught
    messages = comm.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message:
            raise CommunicationError(f"rank {rank} failed: {message}")
