"""The launcher's hands on one host: starts its ranks, shows what they print, sees how they fare, ends them. No MLX.

`python -m m3dist.cluster.agent`, started by supervise.py through ssh.Remote, or by mpirun. It decides nothing; but when
the launcher is gone or silent, it ends its ranks. What it is told and what it tells, each a message:

    told    ports [{ip, ...} a rank]                       tells   ports [[port, ...] a rank]
            start [{rank, command, env, files, cwd, ours}]         started rank
            input text or null (the end)                           output rank, stream, data;  taken (input)
            shown (bytes of output), perhaps unread rank           up rank, phase (of a kind that is new for the rank)
            ping                                                   pong
            end "gently" or "now"                                  stalled rank, phase, seconds, state
                                                                   exit rank, code, phase, peak, ordered, words
                                                                   failed why, rank;  alone seconds;  ended
"""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import IO

import m3dist
from m3dist.cluster import mpi
from m3dist.cluster.build import build_digest
from m3dist.cluster.channel import Channel, ChannelClosed, Message, as_bytes, as_text
from m3dist.cluster.claim import claim
from m3dist.cluster.environment import MLX_BACKENDS, LaunchError
from m3dist.cluster.lifeline import LIFELINE
from m3dist.cluster.ssh import channel_to_launcher
from m3dist.libmpi import mpi_library
from m3dist.status import DESCRIPTOR as STATUS
from m3dist.status import Page, Status, handed, new_page

LOOK = 0.25  # seconds between looks at the ranks' status pages
STATE_LOOK = 5.0  # seconds between looks at the processes of ranks that have no limit: two that find it stopped end it
SLACK = 1.0  # seconds over its limit that a rank has for ending itself
END_GRACE = 3.0  # seconds from SIGTERM to SIGKILL
DRAIN = 1.0  # seconds to wait for the rest of a dead rank's output: a grandchild may hold it open
WINDOW = 2**20  # bytes of output on their way that the launcher has not shown
CHUNK = 2**16
STREAMS = {"stdout": 1, "stderr": 2}
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Rank:
    """A process, in a session of its own, so that what it starts ends with it."""

    number: int
    process: "subprocess.Popen[bytes]"
    page: Page
    doing: str | None = None  # the first word of its phase
    stopped: float | None = None  # when its process was first found stopped
    stalled: Status | None = None
    pumps: list[threading.Thread] = field(default_factory=list)


class Window:
    """How many bytes may still be sent before the other side has taken some."""

    def __init__(self, size: int):
        self._left, self._open, self._changed = size, True, threading.Condition()

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0 or not self._open)
            self._left -= count

    def give(self, count: int) -> None:
        with self._changed:
            self._left += count
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone through: nobody takes anything any more."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Agent:
    """One thread decides (`run`); the others each wait for one thing and put it on `events`."""

    def __init__(self, channel: Channel, silence: float):
        self.channel = channel
        self.silence = silence  # seconds without a word from the launcher after which it counts as gone
        self.events: SimpleQueue[Message | None] = SimpleQueue()
        self.ranks: dict[int, Rank] = {}
        self.running: set[int] = set()
        self.window = Window(WINDOW)
        self.unread: set[int | None] = set()  # ranks whose standard output nobody reads any more
        self.input: SimpleQueue[bytes | None] = SimpleQueue()
        self.scratch: Path | None = None
        self.kill_at: float | None = None  # set while ending
        self.abandoned = False  # the launcher has gone silent
        self.outbox: SimpleQueue[Message | None] = SimpleQueue()
        self.next_state_look = 0.0
        self.lifeline, self._held = os.pipe()  # never written to: the ranks see it close when we die

    def run(self) -> None:
        """Until the launcher says `end` or is gone, and no rank is left."""
        for number in ENDINGS:
            signal.signal(number, self._interrupted)
        self._thread(self._receive)
        sender = self._thread(self._send)
        heard = time.monotonic()
        try:
            while self.kill_at is None or self.running:
                event = self._next()
                if event is not None:
                    heard = time.monotonic() if "exit" not in event else heard
                    self._handle(event)
                self._look()
                if self.kill_at is None and time.monotonic() - heard > self.silence:
                    self._tell({"alone": self.silence})  # it may only be stopped, or asleep, and hear it later
                    self.abandoned = True
                    self.end(END_GRACE)
                if self.kill_at is not None and time.monotonic() > self.kill_at:
                    self._signal(signal.SIGKILL)
                    self.kill_at = float("inf")
            self._tell({"ended": True})
            self.outbox.put(None)
            sender.join(END_GRACE)  # a launcher that takes nothing is gone
        finally:
            self._signal(signal.SIGKILL)
            if self.abandoned and mpi.started_here(os.environ):
                mpi.end_daemon()
            if self.scratch:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def end(self, grace: float) -> None:
        """SIGTERM to every rank now, SIGKILL after `grace` seconds."""
        self.window.close()
        self.kill_at = min(self.kill_at or float("inf"), time.monotonic() + grace)
        if grace:
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped process heeds nothing before

    def _next(self) -> Message | None:
        try:
            return self.events.get(timeout=LOOK)
        except Empty:
            return None

    def _handle(self, event: Message) -> None:
        if "exit" in event:
            self.running.discard(event["exit"])
            self._tell(event)
        elif "ping" in event:
            self._tell({"pong": event["ping"]})
        elif "shown" in event:
            self.window.give(event["shown"])
            self.unread.add(event.get("unread"))
        elif "input" in event:
            self.input.put(None if event["input"] is None else as_bytes(event["input"]))
        elif "end" in event:
            self.end(END_GRACE if event["end"] == "gently" else 0.0)
        elif "ports" in event:
            self._try(None, lambda: self._tell({"ports": [free_ports(ips) for ips in event["ports"]]}))
        elif "start" in event:
            for order in event["start"]:
                self._try(order["rank"], lambda order=order: self._start(order))  # type: ignore[misc]

    def _try(self, rank: int | None, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, LaunchError) as error:
            self._tell({"failed": str(error), "rank": rank})

    def _tell(self, message: Message) -> None:
        """Without waiting: a launcher that is stopped, or cut off, takes nothing."""
        self.outbox.put(message)

    # -----------------------------------------------------------------------------------------------------------------
    # Ranks

    def _start(self, order: Message) -> None:
        """Raises OSError or LaunchError."""
        number, page, ours = order["rank"], new_page(), order["ours"]
        directory = working_directory(order)
        env = self._environment(order, page)
        process = subprocess.Popen(
            [word if word is not None else sys.executable for word in order["command"]],
            env=env,
            cwd=directory,
            stdin=None if "stdin" in ours else subprocess.PIPE if order["input"] else subprocess.DEVNULL,
            stdout=None if "stdout" in ours else subprocess.PIPE,
            stderr=None if "stderr" in ours else subprocess.PIPE,
            pass_fds=(self.lifeline, page.descriptor),
            start_new_session=True,
        )
        rank = self.ranks[number] = Rank(number, process, page)
        self.running.add(number)
        for name, stream in STREAMS.items():
            if pipe := getattr(process, name):
                rank.pumps.append(self._thread(self._pump, number, stream, pipe))
        if process.stdin:
            self._thread(self._feed, process.stdin)
        self._tell({"started": number})
        self._thread(self._wait_for, rank)

    def _environment(self, order: Message, page: Page) -> dict[str, str]:
        """Ours, without what a former run may have exported, and with what the order says."""
        env = {name: value for name, value in os.environ.items() if name not in MLX_BACKENDS}
        here = os.path.dirname(sys.executable)  # so that `python` and `m3dist` are this host's own
        env["PATH"] = os.pathsep.join([here, env.get("PATH", os.defpath)])
        # So that a rank that is killed or crashes has said all it had to say.
        env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if mpi.started_here(env):
            env.setdefault("MLX_MPI_LIBNAME", mpi_library())
        env |= {LIFELINE: handed(self.lifeline), STATUS: handed(page.descriptor)} | order["env"]
        for name, content in order["files"].items():
            self.scratch = self.scratch or Path(tempfile.mkdtemp(prefix="m3dist-"))
            env |= {name: str(self.scratch / f"{name}.{order['rank']}"), "M3DIST_SCRATCH": str(self.scratch)}
            Path(env[name]).write_text(content)
        return env

    def _look(self) -> None:
        """Tell what the ranks have come to, and which have not finished in time what they do."""
        now = time.monotonic()
        for rank in (self.ranks[number] for number in self.running):
            status = rank.page.read()
            if status and status.phase.partition(" ")[0] != rank.doing:
                rank.doing = status.phase.partition(" ")[0]
                self._tell({"up": rank.number, "phase": status.phase})
            if status and status != rank.stalled and now - SLACK - status.since > status.limit:
                rank.stalled = status
                seen = {"phase": status.phase, "seconds": now - status.since, "state": state_of(rank.process.pid)}
                self._tell({"stalled": rank.number} | seen)
        if now >= self.next_state_look:
            self.next_state_look = now + STATE_LOOK
            self._look_at_processes(now)

    def _look_at_processes(self, now: float) -> None:
        """Tell of those that are stopped though they have no limit, as in a program that reports nothing."""
        for rank in (self.ranks[number] for number in self.running):
            status = rank.page.read()
            if (status and status.limit < float("inf")) or state_of(rank.process.pid) != "T":
                rank.stopped = None
            elif rank.stopped is None:
                rank.stopped = now
            else:
                seen = {"phase": status and status.phase, "seconds": now - rank.stopped, "state": "T"}
                self._tell({"stalled": rank.number} | seen)

    def _signal(self, number: int) -> None:
        for rank in self.running:
            with suppress(ProcessLookupError, PermissionError):  # it ended just now; macOS: and is not yet reaped
                os.killpg(self.ranks[rank].process.pid, number)

    # -----------------------------------------------------------------------------------------------------------------
    # Threads

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self.events.put({"end": "gently"})

    def _send(self) -> None:
        with suppress(ChannelClosed):  # _receive sees it too
            while (message := self.outbox.get()) is not None:
                self.channel.send(message)

    def _receive(self) -> None:
        with suppress(ChannelClosed):
            while True:
                self.events.put(self.channel.receive())
        self.events.put({"end": "gently"})  # the launcher is gone

    def _wait_for(self, rank: Rank) -> None:
        _, waited, usage = os.wait4(rank.process.pid, 0)
        ordered = self.kill_at is not None  # it was us, or mpirun through us
        code = rank.process.returncode = os.waitstatus_to_exitcode(waited)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)  # what it started and left
        limit = time.monotonic() + DRAIN
        for pump in rank.pumps:
            pump.join(max(0.0, limit - time.monotonic()))
        status = rank.page.read()
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        seen = {"code": code, "phase": status and status.phase, "peak": peak, "ordered": ordered}
        seen["words"] = rank.page.last_words()
        self.events.put({"exit": rank.number} | seen)

    def _pump(self, number: int, stream: int, pipe: IO[bytes]) -> None:
        while data := os.read(pipe.fileno(), CHUNK):
            self.window.take(len(data))
            self._tell({"output": number, "stream": stream, "data": as_text(data)})
            if number in self.unread and stream == STREAMS["stdout"]:
                pipe.close()  # as whoever would have read it did: the rank learns it when it writes
                return

    def _feed(self, stdin: IO[bytes]) -> None:
        """Give the rank its standard input, to the end of it. One that reads no more gets no more."""
        with suppress(OSError), stdin:
            while (data := self.input.get()) is not None:
                stdin.write(data)
                stdin.flush()
                self._tell({"taken": len(data)})


def working_directory(order: Message) -> str | None:
    """Where the rank is to run: the host's `cwd`, else the launcher's if this host has one of that name, else home."""
    if order["cwd"]:
        directory = os.path.expanduser(order["cwd"])
        if not os.path.isdir(directory):
            raise LaunchError(f"cwd {order['cwd']} is no directory here; correct `cwd` in the hostfile")
        return directory
    likely = order["launched_in"]
    return likely if os.path.isdir(likely) and os.access(likely, os.X_OK) else os.path.expanduser("~")


def state_of(pid: int) -> str:
    """One letter, as ps has it: T is stopped, D or U waits in the kernel, R runs, S sleeps."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    ps = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return ps.stdout.strip()[:1]


def free_ports(ips: list[str]) -> list[int]:
    """A TCP port for each of this host's addresses `ips` that nobody uses, claimed until this process ends.

    Raises LaunchError for an address that is not this host's.
    """
    return [_free_port(ip) for ip in ips]


def _free_port(ip: str) -> int:
    for _ in range(100):
        with socket.socket() as probe:
            try:
                probe.bind((ip, 0))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                raise LaunchError(f"{ip} is no address of this host; correct `ips` in the hostfile") from None
            port: int = probe.getsockname()[1]
        with suppress(LaunchError):  # another job has been told it, and does not listen yet
            claim(f"{ip}:{port}")
            return port
    raise LaunchError(f"no free port on {ip}")


def about() -> Message:
    """What must be equal on every host, and who this is."""
    return {
        "m3dist version": m3dist.__version__,
        "m3dist build": build_digest(),
        "mlx version": _version("mlx"),
        "host": socket.gethostname(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    try:
        if mpi.CONTROL in os.environ:
            channel = mpi.connect(os.environ)
            greeting = channel.receive() or {}
            for name in (mpi.CONTROL, mpi.SECRET):
                del os.environ[name]
        else:
            channel, greeting = channel_to_launcher()
        channel.send({"hello": greeting["hello"]} | about())
    except (ChannelClosed, LaunchError) as error:
        sys.exit(f"m3dist: {error}")
    Agent(channel, greeting["silence"]).run()


if __name__ == "__main__":
    main()
