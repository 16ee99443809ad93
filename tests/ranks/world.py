"""Runs a function of programs.py in real rank processes and returns what each rank found.

Every run has a deadline; when a rank fails or time is up all are killed and the failing rank's own output is the error.
"""

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).with_name("programs.py")
MPIRUN = "mpirun --allow-run-as-root --oversubscribe --bind-to none --mca mpi_yield_when_idle 1"
# For more ranks than cores: a ring's sockets spin, and each of its sums takes tens of milliseconds there.
CROWDED = "mpi" if shutil.which("mpirun") else "ring"
PORTS = range(20_000, 30_000)  # below those that a system chooses from


def run_world(function: str, world: int, backend: str = "ring", deadline: float = 240, **arguments: Any) -> list[Any]:
    """programs.`function`(comm, **arguments) on every rank of a world over `backend`; the results in rank order."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        command = [sys.executable, str(PROGRAMS), function, scratch, json.dumps(arguments)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_"))}
        if backend == "mpi":
            launches = [([*MPIRUN.split(), "-n", str(world), *command], environ)]
        else:
            launches = [(command, environ | ring(out, world, rank)) for rank in range(world)]
        processes = []
        for number, (line, env) in enumerate(launches):
            log = open(out / f"log{number}", "wb")
            processes.append(subprocess.Popen(line, env=env, stdout=log, stderr=log, start_new_session=True))
        try:
            wait(processes, out, time.monotonic() + deadline)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [pickle.loads((out / f"result{rank}").read_bytes()) for rank in range(world)]


def ring(out: Path, world: int, rank: int) -> dict[str, str]:
    """The environment of one rank of a ring on free loopback ports; a world of one has no ring."""
    if world == 1:
        return {}
    hostfile = out / "hosts.json"
    if rank == 0:
        first = free_port(world)
        hostfile.write_text(json.dumps([[f"127.0.0.1:{first + other}"] for other in range(world)]))
    return {"MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank), "MLX_WORLD": str(world)}


@contextlib.contextmanager
def ending(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A process that is killed where its test fails, for which `with process` alone would wait for ever."""
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def free_port(count: int = 1) -> int:
    """The first of so many free ports of 127.0.0.1 in a row.

    Until a rank binds it, a second later, another test may be given one that the system chooses, but none of these.
    """
    while True:
        first = random.choice(PORTS)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def wait(processes: list[subprocess.Popen], out: Path, end: float) -> None:
    """Until all have ended well. Raises AssertionError with the output of the first that failed."""
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            time.sleep(1.0)  # the cause may still be writing
            break
        time.sleep(0.02)
    states = [process.poll() for process in processes]
    if all(state == 0 for state in states):
        return
    logs = [f"--- process {n}, exit {states[n]}\n" + (out / f"log{n}").read_text() for n in range(len(states))]
    raise AssertionError("ranks failed or ran out of time\n" + "\n".join(log[-4000:] for log in logs))
