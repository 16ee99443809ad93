"""Ranks as processes on this machine: start them, show what they print, end all when one fails, say which. No MLX.

Everything that happens (a rank started, a rank ended, a signal) is an event on one queue, and the main thread sleeps on
it: no polling. `judge` decides from the exits alone what became of the job.
"""

import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

from m3dist.cluster.environment import MLX_BACKENDS, LaunchError
from m3dist.watchdog import EXIT_PEER_LOST, EXIT_STALLED

VICTIMS = (EXIT_PEER_LOST, EXIT_STALLED)  # statuses of ranks that ended because of another one
CAUSE_GRACE = 1.0  # seconds to wait for the rank that made the victims
STRAGGLE = 10.0  # seconds that ranks may go on after another ended with status 0
END_GRACE = 3.0  # seconds from SIGTERM to SIGKILL
DRAIN = 1.0  # seconds to wait for the rest of a dead rank's output
TAIL = 20  # lines of the failing rank's standard error that are shown again
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_local(
    argv: Sequence[str],
    ranks: int,
    *,
    backend: str = "ring",
    env: Mapping[str, str] | None = None,
    start_timeout: float | None = 60.0,
    command: Sequence[str] | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
) -> int:
    """Run `m3dist *argv` (or `command`) as `ranks` processes; returns 0, or the status of the rank that failed first.

    A rank killed by signal S counts as status 128 + S; so does a signal to this process. Rank 0 has our standard input
    and output as they are; what the others print comes on `stderr`, each line marked with the rank. Every rank must
    call `lifeline.watch` within `start_timeout` seconds (None: whenever). Raises LaunchError if one cannot be started.
    """
    if backend != "ring":
        raise LaunchError(f"ranks on this machine are started over the ring, not {backend}; for mpi use mpirun")
    command = command or [sys.executable, "-m", "m3dist", *argv]
    with ExitStack() as stack:
        shared = _job_environment(ranks, stack)
        job = _Job(stderr or sys.stderr.buffer, inherit_stderr=stderr is None and sys.stderr.isatty())
        stack.enter_context(_signals_to(job.events.put))
        stack.callback(job.end)  # whatever happens in here, no rank outlives it
        job.start(command, {**shared, **(env or {})}, ranks, stdout)
        verdict = job.wait(start_timeout)
        job.end()
        job.say(verdict)
    return verdict.status


# ---------------------------------------------------------------------------------------------------------------------
# What became of the job


@dataclass(frozen=True)
class Started:
    rank: int


@dataclass(frozen=True)
class Exit:
    rank: int
    code: int  # as subprocess has it: minus the signal's number for a signal
    at: float  # time.monotonic()

    @property
    def status(self) -> int:
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def how(self) -> str:
        return f"ended with exit code {self.code}" if self.code >= 0 else f"was killed by {_signal_name(-self.code)}"


@dataclass(frozen=True)
class Interrupted:
    signal: int


@dataclass(frozen=True)
class Verdict:
    status: int
    reason: str = ""
    rank: int | None = None  # the rank to blame


def judge(exits: Sequence[Exit], running: Collection[int], now: float) -> Verdict | float:
    """The verdict on a job with these `exits`, in order, and ranks still `running`; or the time to look again.

    The rank to blame is the first that failed by itself. Ranks with a status in VICTIMS failed because of another, so
    for CAUSE_GRACE seconds they wait for that one to turn up.
    """
    failed = [exit for exit in exits if exit.code != 0]
    ended = [exit for exit in exits if exit.code == 0]
    for exit in failed:
        if exit.code not in VICTIMS:
            return Verdict(exit.status, f"rank {exit.rank} {exit.how}", exit.rank)
    if failed:
        victim = failed[0]
        if running and now < victim.at + CAUSE_GRACE:
            return victim.at + CAUSE_GRACE
        if ended and ended[0].at <= victim.at:
            reason = f"rank {ended[0].rank} ended early (exit code 0) and rank {victim.rank} still needed it"
            return Verdict(victim.status, reason, ended[0].rank)
        still = f"; still running then: {_names(running)}" if running else ""
        return Verdict(victim.status, f"rank {victim.rank} {victim.how}{still}", victim.rank)
    if not running:
        return Verdict(0)
    if ended:
        if now < ended[0].at + STRAGGLE:
            return ended[0].at + STRAGGLE
        reason = f"rank {ended[0].rank} ended (exit code 0) but after {STRAGGLE:.0f} s {_names(running)} had not"
        return Verdict(1, reason, ended[0].rank)
    return math.inf


def _names(ranks: Collection[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# ---------------------------------------------------------------------------------------------------------------------
# The processes


class _Job:
    """The ranks' processes, and threads that turn what they do into `events` and show what they print."""

    def __init__(self, stderr: IO[bytes], inherit_stderr: bool):
        self.events: SimpleQueue[Started | Exit | Interrupted] = SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.exits: list[Exit] = []
        self.started: set[int] = set()
        self.tails: dict[int, deque[bytes]] = {}
        self._pumps: list[threading.Thread] = []
        self._stderr = stderr
        self._stderr_lock = threading.Lock()
        self._inherit_stderr = inherit_stderr
        self._lifeline: IO[bytes] | None = None

    @property
    def running(self) -> set[int]:
        return set(range(len(self.processes))) - {exit.rank for exit in self.exits}

    def start(self, command: Sequence[str], env: Mapping[str, str], ranks: int, stdout: IO[bytes] | None) -> None:
        """Start every rank, each in a session of its own: a Ctrl-C reaches us alone, and we end them in good order."""
        lifeline, ours = os.pipe()
        self._lifeline = open(ours, "wb", buffering=0)  # never written to: it closes when we die
        started, reports = os.pipe()
        self._thread(self._read_started, started)
        env = {**env, "M3DIST_LIFELINE": str(lifeline), "M3DIST_STARTED": str(reports)}
        try:
            for rank in range(ranks):
                first = rank == 0
                process = subprocess.Popen(
                    command,
                    env={**env, "MLX_RANK": str(rank)},
                    stdin=None if first else subprocess.DEVNULL,
                    stdout=stdout if first else subprocess.PIPE,
                    stderr=None if first and self._inherit_stderr else subprocess.PIPE,
                    pass_fds=(lifeline, reports),
                    start_new_session=True,
                )
                self.processes.append(process)
                self._thread(self._wait_for, rank, process)
                tail = self.tails[rank] = deque(maxlen=TAIL)
                for output, kept in ((process.stdout, None), (process.stderr, tail)):
                    if output:
                        self._pumps.append(self._thread(self._pump, rank, output, kept))
        except OSError as error:
            raise LaunchError(f"cannot start rank {len(self.processes)}: {error}") from error
        finally:
            os.close(lifeline)
            os.close(reports)

    def wait(self, start_timeout: float | None) -> Verdict:
        """Sleep until the job is over, one way or the other."""
        start_limit = math.inf if start_timeout is None else time.monotonic() + start_timeout
        while True:
            now = time.monotonic()
            verdict = judge(self.exits, self.running, now)
            if isinstance(verdict, Verdict):
                return verdict
            silent = self.running - self.started
            if silent and now >= start_limit:
                return Verdict(1, f"{_names(silent)} did not start within {start_timeout:g} s", min(silent))
            event = self._next(min(verdict, start_limit) if silent else verdict)
            if isinstance(event, Interrupted):
                return Verdict(128 + event.signal, f"{_signal_name(event.signal)} received")

    def end(self) -> None:
        """End every rank that still runs: SIGTERM, and SIGKILL after END_GRACE seconds or at a second signal to us."""
        self._signal(signal.SIGTERM)
        limit = time.monotonic() + END_GRACE
        while self.running and time.monotonic() < limit:
            if isinstance(self._next(limit), Interrupted):
                break
        self._signal(signal.SIGKILL)
        limit = time.monotonic() + END_GRACE  # a process stuck in the kernel must not keep us
        while self.running and time.monotonic() < limit:
            self._next(limit)
        limit = time.monotonic() + DRAIN  # nor a grandchild that holds the output open
        for pump in self._pumps:
            pump.join(max(0.0, limit - time.monotonic()))
        if self._lifeline:
            self._lifeline.close()

    def say(self, verdict: Verdict) -> None:
        """Tell the person at the terminal why the job ended, if not well."""
        if verdict.status == 0:
            return
        others = len(self.processes) > 1
        self._write(f"m3dist: {verdict.reason}{'; all ranks were ended' if others else ''}\n".encode())
        tail = None if verdict.rank is None else self.tails[verdict.rank]
        if tail:
            self._write(f"m3dist: the last lines of rank {verdict.rank}:\n".encode())
            self._write(b"".join(b"    " + line for line in tail))

    def _next(self, until: float) -> Started | Exit | Interrupted | None:
        """The next event, noted; None if there is none until then."""
        try:
            event = self.events.get(timeout=None if until == math.inf else max(0.0, until - time.monotonic()))
        except Empty:
            return None
        if isinstance(event, Exit):
            self.exits.append(event)
        elif isinstance(event, Started):
            self.started.add(event.rank)
        return event

    def _signal(self, number: int) -> None:
        for rank in self.running:
            with suppress(ProcessLookupError, PermissionError):  # it ended just now; macOS: and is not yet reaped
                os.killpg(self.processes[rank].pid, number)

    # Each of these is a thread of its own, for as long as there is something to read or wait for.

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def _read_started(self, started: int) -> None:
        with open(started, "rb", buffering=0) as reports:
            while rank := reports.read(1):
                self.events.put(Started(rank[0]))

    def _wait_for(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        code = process.wait()
        self.events.put(Exit(rank, code, time.monotonic()))

    def _pump(self, rank: int, output: IO[bytes], tail: deque[bytes] | None) -> None:
        """Show whole lines only, as bytes: no character is ever cut, no two ranks' lines are mixed."""
        prefix = b"[rank %d] " % rank if rank else b""
        for line in output:
            line = line if line.endswith(b"\n") else line + b"\n"
            if tail is not None:
                tail.append(line)
            self._write(prefix + line)
        output.close()

    def _write(self, data: bytes) -> None:
        with self._stderr_lock, suppress(OSError, ValueError):  # nobody reads it any more: the ranks go on without
            self._stderr.write(data)
            self._stderr.flush()


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks find when they start


def _job_environment(ranks: int, stack: ExitStack) -> dict[str, str]:
    """Our environment with the variables of the job; its files last as long as `stack`."""
    env = {name: value for name, value in os.environ.items() if name not in MLX_BACKENDS}
    # So that a rank that is killed or crashes has said all it had to say.
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    env |= {"M3DIST_LAUNCHER": "m3dist", "M3DIST_JOB": secrets.token_hex(8), "M3DIST_WORLD": str(ranks)}
    if ranks > 1:
        env["MLX_HOSTFILE"] = str(stack.enter_context(_hostfile(ranks)))
    return env


@contextmanager
def _hostfile(ranks: int) -> Iterator[Path]:
    """A ring of `ranks` on loopback ports that are free now."""
    with tempfile.NamedTemporaryFile("w", prefix="m3dist-", suffix=".json", delete=False) as file:
        json.dump([[f"127.0.0.1:{port}"] for port in free_ports(ranks)], file)
    try:
        yield Path(file.name)
    finally:
        Path(file.name).unlink(missing_ok=True)


def free_ports(count: int) -> list[int]:
    """`count` different loopback TCP ports that nobody uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _signals_to(put: Callable[[Interrupted], None]) -> Iterator[None]:
    """Inside, SIGNALS become events. Those our parent had us ignore (nohup) stay ignored."""

    def handle(number: int, frame: FrameType | None) -> None:
        put(Interrupted(number))

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)
