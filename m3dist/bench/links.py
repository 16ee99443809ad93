"""`m3dist bench links`: what sums and gathers between the ranks take, by size, and whether they are right. No model."""

import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx

import m3dist
from m3dist.bench import links_report
from m3dist.bench.cutoff import shown_if_cut_off
from m3dist.bench.machine import SUMS, sum_latency, timed
from m3dist.cluster.environment import Launch
from m3dist.comm import Comm
from m3dist.errors import CommunicationError
from m3dist.options import DECODE_SUM, LinksOptions
from m3dist.rank import STEP_LIMIT, join, run_rank
from m3dist.watchdog import Watchdog

DTYPE, DTYPE_NAME = mx.bfloat16, "bfloat16"  # what ranks with GPUs send
BUDGET = 2.0  # seconds for the runs of one size: slow ones are fewer
FEWEST = 3  # runs of one size
HASH = 2654435761  # Knuth's multiplier for 32 bits


def main(options: LinksOptions, launch: Launch) -> int:
    """Be one rank of the measurement."""
    return run_rank(partial(_run, options, launch), launch, None)


def _run(options: LinksOptions, launch: Launch, watchdog: Watchdog) -> int:
    comm = join(launch, f"none, {options}", watchdog)
    result = {
        "m3dist": m3dist.__version__,
        "mlx": mx.__version__,
        "backend": launch.backend,
        "world": comm.world,
        "hosts": comm.gather_objects(socket.gethostname()),
        "dtype": DTYPE_NAME,
        "complete": False,
        "links": [],
        "chain": None,
    }
    links = Links(options, comm, lambda phase: watchdog.progress(phase, STEP_LIMIT))
    with shown_if_cut_off(partial(show, options, result), watchdog) if comm.rank == 0 else nullcontext():
        links.measure(result)
        links.progress("the end")
        comm.barrier()
    watchdog.stop()
    if comm.rank == 0:
        show(options, result | {"complete": True})
    return 0


class Links:
    """The measurements, in the order in which they are printed. Every rank makes each; rank 0 says so as it goes."""

    def __init__(self, options: LinksOptions, comm: Comm, progress: Callable[[str], None]):
        self.options, self.comm, self.progress = options, comm, progress
        self.began = time.monotonic()

    def measure(self, found: dict[str, Any]) -> None:
        """Everything goes into `found`, as it stands in the JSON: each figure once it is whole."""
        for name in ("all_sum", "all_gather"):
            for size in self.options.sizes:
                found["links"].append(self.link(name, size))
                self.say(links_report.link_line(found["links"][-1]))
        found["chain"] = self.chain()
        self.say(links_report.chain_line(found["chain"]))

    def link(self, name: str, size: int) -> dict[str, Any]:
        """One collective, each rank giving `size` bytes. A run ends when its last rank has the result.

        Raises CommunicationError where a rank has a wrong result.
        """
        phase = f"{name} of {links_report.binary(size)}"
        x = numbers(self.comm.rank, size)
        mx.eval(x)

        def collective() -> mx.array:
            return getattr(self.comm, name)(x)

        self.progress(f"{phase}, check")
        check(self.comm, phase, collective(), expected(self.comm.world, name, size))
        self.progress(f"{phase}, first run")
        runs = self.runs(collective)
        self.progress(f"{phase}, {runs} runs")
        seconds = self.comm.gather_objects(timed(collective, self.comm, runs))
        return links_report.figures(name, size, self.comm.world, [max(ranks) for ranks in zip(*seconds)])

    def runs(self, compute: Callable[[], mx.array], times: int = 1) -> int:
        """How many runs, `times` times as long as `compute` each, fit into BUDGET: the same number on every rank."""
        once = max(self.comm.gather_objects(timed(compute, self.comm, repeats=1)[0]))
        return min(self.options.repeats, max(FEWEST, int(BUDGET / (once * times))))

    def chain(self) -> dict[str, Any]:
        """Dependent sums in one graph, as a decode step has them, so that nothing waits for Python: seconds a sum.

        On a GPU this counts handing the array to the CPU and back, which a sum of the tables does not have.
        """
        self.progress("chain of sums, one sum")
        x = numbers(self.comm.rank, DECODE_SUM)
        runs = self.runs(lambda: self.comm.all_sum(x), SUMS)
        self.progress(f"chain of sums, {runs} runs")
        seconds = max(self.comm.gather_objects(sum_latency(x.size, DTYPE, self.comm, runs)))
        return {"op": "all_sum", "bytes": DECODE_SUM, "sums": SUMS, "runs": runs, "seconds": seconds}

    def say(self, line: str) -> None:
        if self.comm.rank == 0:
            print(f"{time.monotonic() - self.began:.1f} s: {line}", file=sys.stderr, flush=True)


def numbers(rank: int, size: int) -> mx.array:
    """`size` bytes of whole numbers from 0 to 15, other ones on every rank; bfloat16 holds any 16 ranks' sum exactly.

    The upper bits of a multiplicative hash of the index: in integers, so that every device makes the same.
    """
    index = mx.arange(1, size // DTYPE.size + 1, dtype=mx.uint32)
    factor = mx.array(HASH * (2 * rank + 1) % 2**32, dtype=mx.uint32)
    return ((index * factor) >> 28).astype(DTYPE)


def expected(world: int, name: str, size: int) -> mx.array:
    """What collective `name` of every rank's `numbers` must give: [n] or [world, n]."""
    everyone = mx.stack([numbers(rank, size) for rank in range(world)])
    return everyone.sum(axis=0) if name == "all_sum" else everyone


def check(comm: Comm, what: str, result: mx.array, right: mx.array) -> None:
    """Compare on every rank. Raises CommunicationError, on all, naming the ranks whose `result` is not `right`."""
    wrong = comm.gather_objects(int((result != right).sum().item()))
    bad = [f"rank {rank}: {count} of {right.size} values" for rank, count in enumerate(wrong) if count]
    if bad:
        raise CommunicationError(
            f"{what} gave wrong numbers ({', '.join(bad)}); is another job using the same ports? If not, "
            "this backend, a driver or a cable is at fault: try another backend, then other cables"
        )


def show(options: LinksOptions, result: dict[str, Any]) -> None:
    """Rank 0's output: the tables, and for programs one JSON line, the last."""
    print(links_report.as_text(result), flush=True)
    if options.json:
        print(json.dumps(result), flush=True)
