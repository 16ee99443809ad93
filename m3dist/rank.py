"""What every rank's program begins and ends with, whatever it computes: joining the others, loading, dying alone."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from m3dist import metal
from m3dist.cluster.claim import claim_addresses
from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, check_same, connect, versions
from m3dist.errors import CommunicationError, M3Error
from m3dist.fetch.store import Entry
from m3dist.loader import load, load_entry
from m3dist.model import Model
from m3dist.options import CPU_PREFILL_CHUNK, GPU_PREFILL_CHUNK
from m3dist.plan import Plan
from m3dist.progress import LoadingBar, Progress, Report
from m3dist.watchdog import EXIT_PEER_LOST, START, Watchdog, end_process, seconds

# Seconds a rank may go without finishing anything, before it ends itself: until every rank has joined; and for loading
# one tensor, one prefill chunk (two that take turns, on Macs) or one decode step (the first of which compiles kernels).
START_LIMIT = seconds(*START)
STEP_LIMIT = seconds("M3DIST_STEP_LIMIT", 120.0)
LOAD_LIMIT = seconds("M3DIST_LOAD_LIMIT", 1800.0)  # for the others, once a rank has loaded: their disks may be slower


def dtype_of_device() -> str:
    """bfloat16 on a GPU. On the CPU MLX multiplies experts in float32 only, and quantised bfloat16 ten times slower."""
    return "float32" if mx.default_device().type == mx.DeviceType.cpu else "bfloat16"


def prefill_chunk_of_device() -> int:
    """Tokens of a prompt to compute at a time."""
    return CPU_PREFILL_CHUNK if mx.default_device().type == mx.DeviceType.cpu else GPU_PREFILL_CHUNK


def run_rank(program: Callable[[Watchdog], int], launch: Launch, dtype: str | None) -> int:
    """Run `program` as one rank of the job, or all of it; returns its status.

    An error ends this process at once: else it would hold up the others. `dtype` is what --dtype said, for the advice.
    """
    watchdog = Watchdog(f"rank {launch.rank}")
    try:
        prepare_metal(launch.rank)
        status = program(watchdog)
        if launch.world == 1:
            watchdog.stop()  # this process may have more to do
        else:
            watchdog.progress("exit", START_LIMIT)  # where MPI waits for the others, which may still wait for us
        return status
    except M3Error as error:
        code = EXIT_PEER_LOST if isinstance(error, CommunicationError) else 2
        end_process(code, f"rank {launch.rank}: {error}", watchdog.abort)
    except RuntimeError as error:
        if "connection to a peer was lost" in str(error):
            end_process(EXIT_PEER_LOST, f"rank {launch.rank}: another rank is gone ({error})", watchdog.abort)
        if "[GatherMM::eval]" in str(error):  # MLX says so only when it computes
            advice = f"--dtype {dtype}: MLX's CPU backend multiplies unquantised experts in float32 only"
            end_process(2, f"rank {launch.rank}: {advice}; leave --dtype out", watchdog.abort)
        traceback.print_exc()
        end_process(1, f"rank {launch.rank}: {error}", watchdog.abort)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        traceback.print_exc()
        end_process(1, f"rank {launch.rank}: {type(error).__name__}: {error}", watchdog.abort)
    return 1


def prepare_metal(rank: int) -> None:
    """On a Mac, set what MLX reads from the environment when it first uses the GPU: before any array is made."""
    chip = metal.chip()
    os.environ.update(metal.command_buffer_limits(os.environ, chip))
    warn(rank, metal.fast_synch_risk(os.environ, chip))


def keep_resident(plan: Plan, rank: int, context: int) -> None:
    """On a Mac, have MLX keep this rank's weights, and caches of `context` tokens, resident. Raises PlanError where
    they are more than the machine's memory."""
    if mx.metal.is_available():
        needed = plan.bytes_held(rank) + context * plan.cache_bytes_per_token(rank)
        wiring = metal.wiring(mx.device_info(), needed, os.environ)
        mx.set_wired_limit(wiring.limit)
        warn(rank, wiring.warning)


def warn(rank: int, message: str | None) -> None:
    if message:
        print(f"m3dist: rank {rank} on {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


def join(launch: Launch, model: str, watchdog: Watchdog) -> Comm:
    """The world the launcher set up, once all its ranks are there, of one job and of one version, for one `model`."""
    watchdog.progress("rendezvous", START_LIMIT)
    claim_addresses(launch, os.environ.get("MLX_HOSTFILE"))
    comm, job = connect(launch.backend, launch.job, START_LIMIT)
    watchdog.who, watchdog.abort = f"rank {comm.rank} of {comm.world}", comm.abort
    check_same(comm, {"job": job, "model": model} | versions())
    return comm


def load_model(
    model: str,
    found: Path | Entry,
    comm: Comm,
    watchdog: Watchdog,
    dtype: str | None,
    context: int | Callable[[Plan], int] = 0,
    tell: Report = lambda progress: None,
    **cut: Any,
) -> tuple[Model, Plan]:
    """This rank's part of the model and the plan of all, with a bar on rank 0.

    `found`: a checkpoint's directory, cut by `cut` (see loader.load), or this rank's entry of its store, which was cut
    before. `dtype` None: the device's own; `context`: tokens its caches will hold, or what says it once there is a
    plan; `tell` hears of the progress.
    """
    plans = []
    with LoadingBar(f"loading {model}") if comm.rank == 0 else nullcontext() as bar:

        def loading(progress: Progress) -> None:
            last = progress.done == progress.total
            watchdog.progress(
                "load on the other ranks" if last else f"load of {progress}", LOAD_LIMIT if last else STEP_LIMIT
            )
            tell(progress)
            if bar:
                bar(progress)

        def planned(plan: Plan) -> None:
            keep_resident(plan, comm.rank, context(plan) if callable(context) else context)
            plans.append(plan)

        watchdog.progress("load of the checkpoint's headers", STEP_LIMIT)
        common = {"dtype": dtype or dtype_of_device(), "planned": planned, "progress": loading}
        if isinstance(found, Entry):
            loaded = load_entry(found, comm, **common)
        else:
            loaded = load(found, comm, **common, **cut)
    return loaded, plans[0]
