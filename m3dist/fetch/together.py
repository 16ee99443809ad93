"""Work that each rank does alone and that takes one longer than another, such as reading all it keeps."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from m3dist.comm import Comm
from m3dist.errors import CommunicationError
from m3dist.progress import Progress, Report
from m3dist.rank import STEP_LIMIT
from m3dist.watchdog import Watchdog

TICK = 0.2  # seconds between words of the ranks to each other

Result = TypeVar("Result")


def side_by_side(comm: Comm, watchdog: Watchdog, phase: str, work: Callable[[Report], Result]) -> Result:
    """`work` in a thread, without MLX, while the ranks tell each other how far they are: what one rank's disk takes
    counts against no other rank's deadline, as long as any of them gets on.

    If one rank fails, all raise: that rank its own error, the others CommunicationError.
    """
    at = ""

    def report(progress: Progress) -> None:
        nonlocal at
        at = f"{progress}, byte {progress.done} of {progress.total}"

    pool = ThreadPoolExecutor(1)
    try:
        future, before = pool.submit(work, report), None
        watchdog.progress(phase, STEP_LIMIT)
        while True:
            wait([future], TICK)
            error = future.exception() if future.done() else None
            own = {"over": future.done(), "at": at, "failed": error and f"{type(error).__name__}: {error}"}
            said = comm.gather_objects(own)
            if error:
                raise error
            for rank, word in enumerate(said):
                if word["failed"]:
                    raise CommunicationError(f"rank {rank} failed: {word['failed']}")
            if said != before:
                before = said
                watchdog.progress(f"{phase}, at {at}" if at else phase, STEP_LIMIT)
            if all(word["over"] for word in said):
                return future.result()
    finally:
        pool.shutdown(wait=False)
