"""A rank that sums in a loop, as decode steps do, until a fault is asked for. failures.py starts it.

    python faulty.py FOLDER FAULT RANK [plain]

FAULT strikes RANK where its name says (before it reports, before it joins), else as soon as FOLDER/strike exists.
FOLDER/ready.N says that rank N has come to its loop. `plain` is a program that knows nothing of m3dist.
"""

import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

PAUSE = 0.005  # seconds between sums: several jobs share the machine
GROUP_FILES = ("cgroup.procs", "tasks")  # of a control group: version 2's, version 1's


def rank_of(environ: Mapping[str, str]) -> int:
    return int(environ.get("OMPI_COMM_WORLD_RANK") or environ["MLX_RANK"])


@dataclass(frozen=True)
class Fault:
    name: str
    folder: Path
    victim: int

    @property
    def here(self) -> bool:
        return rank_of(os.environ) == self.victim

    def at(self, place: str) -> None:
        """Before "it starts" or "it joins": hang there, if this is the fault."""
        if self.here and self.name == f"never {place}":
            hang()

    def strike(self) -> None:
        """What can happen in a step."""
        if self.name in signal.Signals.__members__:
            os.kill(os.getpid(), signal.Signals[self.name])
        elif self.name.startswith("exit "):
            os._exit(int(self.name.removeprefix("exit ")))
        elif self.name == "exception":
            raise ValueError("no such expert: 128")
        elif self.name == "memory":
            take_all_memory(self.folder / "group")
        elif self.name == "hang":
            hang()


def hang() -> NoReturn:
    while True:
        time.sleep(3600)


def take_all_memory(group: Path) -> NoReturn:
    """As much as the control group that the file `group` names is allowed; without one, all that this process is."""
    if group.exists():
        control = Path(group.read_text())
        next(file for file in (control / name for name in GROUP_FILES) if file.exists()).write_text(str(os.getpid()))
    else:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
    taken = []
    while True:
        taken.append(b"1" * 2**24)


def work(fault: Fault, all_sum: Callable, step_finished: Callable[[str], None]) -> None:
    import mlx.core as mx

    x = mx.ones(3072)
    for step in itertools.count(1):
        mx.eval(all_sum(x))
        step_finished(f"decode step {step}")
        if step == 1:
            (fault.folder / f"ready.{rank_of(os.environ)}").touch()
        if fault.here and (fault.folder / "strike").exists():
            if fault.name == "return":
                return
            fault.strike()
        time.sleep(PAUSE)


def plain(fault: Fault) -> None:
    """Nothing of m3dist's."""
    fault.at("starts")
    fault.at("joins")
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend="mpi" if "OMPI_COMM_WORLD_RANK" in os.environ else "ring")
    work(fault, lambda x: mx.distributed.all_sum(x, group=group), lambda phase: None)


def ours(fault: Fault) -> int:
    """As m3dist's own programs begin and end."""
    fault.at("starts")
    from m3dist.cluster import environment, lifeline

    lifeline.watch()
    fault.at("joins")
    from m3dist.rank import STEP_LIMIT, join, run_rank

    launch = environment.detect(os.environ)

    def program(watchdog) -> int:
        comm = join(launch, "faulty", watchdog)
        work(fault, comm.all_sum, lambda phase: watchdog.progress(phase, STEP_LIMIT))
        return 0

    return run_rank(program, launch, None)


if __name__ == "__main__":
    folder, name, victim, *kind = sys.argv[1:]
    fault = Fault(name, Path(folder), int(victim))
    sys.exit(plain(fault) if kind == ["plain"] else ours(fault))
