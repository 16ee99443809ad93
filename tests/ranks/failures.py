"""Jobs that fail: start one, let a fault strike, see what becomes of it. Every wait has a deadline.

A job's processes are found by a variable of their environment, whatever they are called and whoever is their parent by
then.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from faulty import rank_of
from outcome import TABLE, Outcome
from world import MPIRUN, free_port

from m3dist.cluster.supervise import AGENT
from m3dist.status import DESCRIPTOR as STATUS
from m3dist.status import Page

BOUND = 10.0  # seconds from the deadline that applies until every process must have ended
PATIENCE = 60.0  # seconds for anything that is no failure, such as a start on a busy machine
MARK = "FAILURE_TEST_JOB"
FAULTY = str(Path(__file__).with_name("faulty.py"))
M3DIST = [sys.executable, "-m", "m3dist"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "failures.md"

ON_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Trial:
    """A job of its own, with its own temporary folder; what it prints goes to the files `out` and `err`."""

    def __init__(
        self, folder: Path, command: Sequence[str], backend: str = "ring", launcher: str = "m3dist", **env: str
    ):
        self.folder, self.backend, self.launcher = folder, backend, launcher
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.command = list(command)
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_", "OMPI_"))}
        self.env = ours | {MARK: self.mark, "TMPDIR": str(self.temporary)} | env
        self._shared: set[Path] = set()
        self._others: set[int] = set()  # processes, which need not be looked at again

    def start(self, **options: Any) -> "Trial":
        streams = {"stdin": subprocess.DEVNULL, "stdout": open(self.out, "wb"), "stderr": open(self.err, "wb")}
        self.process = subprocess.Popen(self.command, env=self.env, **streams | options)
        for name in ("stdout", "stderr"):
            streams[name].close()
        return self

    def on_a_terminal(self) -> None:
        """Its standard input will be one: let it be the terminal that controls it, whose end ends it."""
        self.command = [sys.executable, "-c", ON_A_TERMINAL, *self.command]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def err(self) -> Path:
        return self.folder / "err"

    def said(self) -> str:
        return self.err.read_text(errors="replace")

    # -----------------------------------------------------------------------------------------------------------------
    # Its processes

    def processes(self) -> list[psutil.Process]:
        """All that run. One that only waits for its parent to notice its end has no environment any more."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        found = {self.process.pid} if self.process.poll() is None else set()
        for pid in pids - self._others:
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                if self.mark.encode() in environ:
                    found.add(pid)
                elif environ:  # else it may just be about to begin
                    self._others.add(pid)
        processes = []
        for pid in sorted(found):
            with contextlib.suppress(psutil.Error):
                processes.append(psutil.Process(pid))
        return processes

    def agents(self) -> list[psutil.Process]:
        return [process for process in self.processes() if is_agent(process)]

    def mpirun(self) -> psutil.Process:
        [mpirun] = [process for process in self.processes() if process.name() == "mpirun"]
        return mpirun

    def ranks(self) -> list[psutil.Process]:
        """In rank order."""
        numbered = {}
        for process in self.processes():
            with contextlib.suppress(KeyError, psutil.Error):
                if not is_agent(process):
                    numbered[rank_of(process.environ())] = process
        return [numbered[rank] for rank in sorted(numbered)]

    # -----------------------------------------------------------------------------------------------------------------
    # What happens to it

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Raises AssertionError where it ends before, or takes too long."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"it ended with {self.process.poll()}:\n{self.said()}"
            assert time.monotonic() < limit, f"not within {PATIENCE:.0f} s:\n{self.said()}"
            time.sleep(0.05)

    def wait_for_ranks(self, world: int = 2) -> None:
        """Until all are in their loop."""
        self.wait_for(lambda: len(list(self.folder.glob("ready.*"))) == world)
        self.note_shared_memory()

    def note_shared_memory(self) -> None:
        """What the ranks share by name, which somebody must remove."""
        for rank in self.ranks():
            with contextlib.suppress(psutil.Error):
                maps = {Path(part.path) for part in rank.memory_maps()} if sys.platform == "linux" else set()
                self._shared |= {path for path in maps if path.parent == Path("/dev/shm")}

    def strike(self) -> float:
        """Let the fault happen; returns when."""
        since = time.monotonic()
        (self.folder / "strike").touch()
        return since

    def send(self, number: signal.Signals, *processes: psutil.Process) -> float:
        """A signal to them; returns when."""
        since = time.monotonic()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return since

    def outcome(self, what: str, since: float, limit: float = 0.0, line: str = "", patience: float = BOUND) -> Outcome:
        """Once no process is left, or `limit` + `patience` seconds after `since`. `line`: a pattern of what is read."""
        left = self._left(since + limit + patience)
        seconds = None if left else time.monotonic() - since
        if not left:
            self.process.wait(1)
        found = next((text for text in self.said().splitlines() if line and re.search(line, text)), "")
        files = [*self.temporary.iterdir(), *filter(Path.exists, self._shared)]
        status = self.process.poll()
        return Outcome(what, self.backend, self.launcher, limit, seconds, status, found.strip(), len(left), len(files))

    def _left(self, until: float) -> list[psutil.Process]:
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return left

    def check(self, what: str, since: float, limit: float = 0.0, *, status: int, line: str, files: int = 0) -> None:
        """It ended in time with `status`, said `line` (a pattern), and left nothing but `files` files."""
        outcome = self.outcome(what, since, limit, line)
        outcome.record()
        said = self.said()[-4000:]
        assert outcome.left == 0, f"{limit:g} + {BOUND:g} s later still there: {self.processes()}\n{said}"
        assert outcome.status == status, said
        assert outcome.line or not line, f"nothing like {line!r} in:\n{said}"
        assert outcome.files <= files, list(self.temporary.rglob("*"))
        assert TABLE in os.environ or f"| {what} |" in DOCUMENT.read_text(), "make the table of docs/failures.md again"

    def end(self) -> None:
        for _ in range(3):  # one may start another just now
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait()


def phase(rank: psutil.Process) -> str:
    """What the rank is doing, as its agent sees it."""
    with contextlib.suppress(psutil.Error, OSError, KeyError):
        descriptor = rank.environ()[STATUS].partition(":")[0]
        with open(f"/proc/{rank.pid}/fd/{descriptor}", "r+b") as file:
            status = Page(os.dup(file.fileno())).read()
        return status.phase if status else ""
    return ""


def is_agent(process: psutil.Process) -> bool:
    """mpirun, which has the word on its command line too, is none."""
    return AGENT in process.cmdline() and process.name() != "mpirun"


@contextlib.contextmanager
def started(trial: Trial, **options: Any) -> Iterator[Trial]:
    """Whatever becomes of it, nothing is left afterwards."""
    trial.start(**options)
    try:
        yield trial
    finally:
        trial.end()


def faulty(
    folder: Path,
    backend: str,
    fault: str = "",
    rank: int = 1,
    world: int = 2,
    flags: Sequence[str] = (),
    plain: bool = False,
    **env: str,
) -> Trial:
    """`m3dist launch` of faulty.py; `plain`: as a program that knows nothing of m3dist."""
    program = ["python", FAULTY, str(folder), fault, str(rank), *(["plain"] if plain else [])]
    return Trial(
        folder, [*M3DIST, "launch", "-n", str(world), "--backend", backend, *flags, "--", *program], backend, **env
    )


def by_mlx_launch(folder: Path, *command: str, world: int = 2, **env: str) -> Trial:
    """Plain mlx.launch, over the ring."""
    launcher = str(Path(sys.executable).with_name("mlx.launch"))
    line = [launcher, "--backend", "ring", "-n", str(world), "--starting-port", str(free_port(world)), "--", *command]
    return Trial(folder, line, "ring", "mlx.launch", **env)


def by_mpirun(folder: Path, *command: str, **env: str) -> Trial:
    """Plain mpirun, two ranks."""
    return Trial(folder, [*MPIRUN.split(), "-n", "2", *command], "mpi", "mpirun", **env)
