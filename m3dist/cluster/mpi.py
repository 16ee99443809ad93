"""A job over MPI: mpirun starts one agent a rank, and each connects back to the launcher. No MLX.

mpirun passes on the ranks' output without saying whose it is and ends what it likes in its own order, so it starts
agents, which stay until the launcher has seen why the job ended. The port they connect to is bound to the cluster's
addresses alone, and whoever does not prove within HANDSHAKE seconds that he knows the launch's secret gets nothing.
"""

import hmac
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from m3dist.cluster.channel import Channel, ChannelClosed, Message
from m3dist.cluster.environment import MPI_RANKS, LaunchError
from m3dist.cluster.hostfile import Host
from m3dist.cluster.ssh import HOSTS, TAIL

CONTROL, SECRET = "M3DIST_CONTROL", "M3DIST_SECRET"  # where the launcher listens, and what both know
HANDSHAKE = 10.0  # seconds
STRANGERS = 64  # connections that may be in their handshake at once; ours take milliseconds
END_GRACE = 2.0  # seconds that mpirun may take to end after its agents

# Several ranks may share a core: they must not spin, and a rank computes and communicates in two threads. Every daemon
# is started from here, not one by another, which might not have the keys. OMPI_: Open MPI 4; PRTE_: 5.
SETTINGS = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
    "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
SSH_AGENTS = ("OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent")


class Mpirun:
    """mpirun, running one agent a rank on `hosts` (an entry a rank), and the port they connect to.

    `killed` is called if a signal ends it. It ends by itself after its agents, which say why.
    """

    def __init__(self, hosts: Sequence[Host], module: str, killed: Callable[[signal.Signals], None]):
        """Raises LaunchError where mpirun cannot be started."""
        self.errors: deque[str] = deque(maxlen=TAIL)
        self._killed = killed
        self._world = len(hosts)
        self._stack = ExitStack()
        self._secret = secrets.token_hex(32)
        self._arrived: dict[int, Channel] = {}
        self._changed = threading.Condition()
        self._strangers: deque[socket.socket] = deque()
        try:
            self._listen(hosts)
            self._start(hosts, module)
        except OSError as error:
            self._stack.close()
            if error.filename == "mpirun":
                raise LaunchError(
                    "mpirun is not on PATH; install Open MPI (Debian: openmpi-bin, macOS: brew)"
                ) from None
            raise LaunchError(f"mpirun: {error}") from None

    def _listen(self, hosts: Sequence[Host]) -> None:
        self.addresses = []
        for address in own_addresses(hosts):
            listener = self._stack.enter_context(socket.create_server((address, 0)))
            self.addresses.append(f"{address}:{listener.getsockname()[1]}")
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _start(self, hosts: Sequence[Host], module: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="m3dist-")
        script = Path(self._stack.enter_context(self._scratch)) / "ssh"
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m m3dist.cluster.ssh "$@"\n')
        script.chmod(0o700)
        environ = SETTINGS | {name: str(script) for name in SSH_AGENTS} | dict(os.environ)
        environ |= {CONTROL: ",".join(self.addresses), SECRET: self._secret, HOSTS: described(hosts)}
        self.process = subprocess.Popen(
            command(hosts, module),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, rank: int, timeout: float) -> Channel:
        """The channel to a rank's agent. Raises LaunchError where it does not come."""
        with self._changed:
            self._changed.wait_for(lambda: rank in self._arrived or self.process.poll() is not None, timeout)
            if rank in self._arrived:
                return self._arrived[rank]
        raise LaunchError(f"mpirun {self.how_it_ended()}" if self.process.poll() is not None else "mpirun is silent")

    def how_it_ended(self) -> str:
        said = [line for line in self.errors if line.strip(" -")]
        return f"ended with exit code {self.process.poll()}" + (f": {said[-1].strip()}" if said else "")

    def close(self) -> None:
        """End mpirun, and with it what it started."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_GRACE)
        self.process.terminate()
        try:
            self.process.wait(END_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stack.close()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.errors.append(line.decode(errors="replace").rstrip())
        code = self.process.wait()
        with self._changed:
            self._changed.notify_all()
        if code < 0:
            self._killed(signal.Signals(-code))

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = listener.accept()
                self._admit(connection)
                threading.Thread(target=self._meet, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        """Where there are too many, the one that has said nothing for longest must go: it keeps ours out."""
        with self._changed:
            self._strangers.append(connection)
            if len(self._strangers) > STRANGERS:
                with suppress(OSError):  # it has just gone
                    self._strangers.popleft().shutdown(socket.SHUT_RDWR)  # _meet closes it

    def _meet(self, connection: socket.socket) -> None:
        try:
            rank = challenge(connection, self._secret)
        except (ChannelClosed, OSError):
            connection.close()
            return
        finally:
            with self._changed, suppress(ValueError):
                self._strangers.remove(connection)
        with self._changed:
            if rank in self._arrived:
                connection.close()
                return
            descriptor = connection.detach()
            self._arrived[rank] = Channel(descriptor, descriptor)
            self._changed.notify_all()
            if len(self._arrived) == self._world:
                self._scratch.cleanup()  # all are started; a launcher that is killed leaves nothing behind


class MpiAgent:
    """One rank's agent, as supervise.Agent."""

    def __init__(self, mpirun: Mpirun, rank: int):
        self.mpirun, self.rank = mpirun, rank
        self.errors = mpirun.errors
        self.channel: Channel | None = None

    def greet(self, timeout: float, **words: float) -> Message:
        """As Remote.greet."""
        end = time.monotonic() + timeout
        self.channel = self.mpirun.wait_for(self.rank, timeout)
        try:
            self.channel.send({"hello": "", **words})
            answer = self.channel.receive(max(0.0, end - time.monotonic()))
        except ChannelClosed as error:
            raise LaunchError(f"rank {self.rank}: its agent is gone: {error}") from None
        if answer is None:
            raise LaunchError(f"rank {self.rank}: no answer of its agent within {timeout:g} s")
        return answer

    def send(self, message: Message) -> None:
        if self.channel:
            self.channel.send(message)

    def receive(self, timeout: float | None = None) -> Message | None:
        assert self.channel
        return self.channel.receive(timeout)

    def how_it_ended(self) -> str:
        return "its agent closed the connection"

    def said(self) -> str:
        return ""

    def close(self, grace: float = 0.0) -> None:
        if self.channel:
            self.channel.close()


def command(hosts: Sequence[Host], module: str) -> list[str]:
    """mpirun's: an application a rank, so that each host has its own Python."""
    words = ["mpirun"]
    for rank, host in enumerate(hosts):
        python = os.path.expanduser(host.python or sys.executable) if host.local else host.python or sys.executable
        words += [":"] if rank else []
        words += ["-n", "1", "--host", "localhost" if host.local else host.ssh]
        words += ["-x", SECRET, "-x", CONTROL, python, "-m", module]
    return words


def started_here(environ: Mapping[str, str]) -> bool:
    """Whether mpirun started this process."""
    return any(name in environ for name in MPI_RANKS)


def described(hosts: Sequence[Host]) -> str:
    """What ssh.main must know of each host."""
    return json.dumps({host.ssh: {"user": host.user, "port": host.port} for host in hosts})


def own_addresses(hosts: Sequence[Host]) -> list[str]:
    """Ours that the hosts can reach: on which we reach them. Nothing is sent for that."""
    found = []
    for host in hosts:
        there = "127.0.0.1" if host.local else (*host.ips, host.ssh)[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((there, 9))
            except OSError as error:
                raise LaunchError(f"host {host.ssh}: no way to {there}: {error.strerror}") from None
            found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------------------------
# Proving that one knows the secret, both ways, without saying it: HMAC (RFC 2104) of what both chose.


def proof(secret: str, side: str, *words: str) -> str:
    return hmac.new(secret.encode(), as_data(" ".join((side, *words))), "sha256").hexdigest()


def as_data(text: str) -> bytes:
    """Any text that JSON can hold."""
    return text.encode(errors="surrogatepass")


def challenge(connection: socket.socket, secret: str) -> int:
    """The launcher's side; returns the rank that has proved itself. Raises ChannelClosed or OSError."""
    connection.settimeout(HANDSHAKE)
    channel = Channel(connection.fileno(), connection.fileno(), longest=1024)
    ours = secrets.token_hex(16)
    channel.send({"challenge": ours})
    answer = channel.receive(HANDSHAKE) or {}
    rank, theirs, said = (answer.get(name) for name in ("rank", "challenge", "proof"))
    if not isinstance(rank, int) or not isinstance(theirs, str) or not isinstance(said, str):
        raise ChannelClosed("no answer to a challenge")
    if not hmac.compare_digest(as_data(said), as_data(proof(secret, "agent", ours, theirs, str(rank)))):
        raise ChannelClosed("a wrong answer to a challenge")
    channel.send({"proof": proof(secret, "launcher", theirs, ours)})
    connection.settimeout(None)
    return rank


def connect(environ: Mapping[str, str]) -> Channel:
    """The agent's side: to the first address that answers, proving itself and seeing the launcher's proof.

    Raises LaunchError.
    """
    rank = int(next(environ[name] for name in MPI_RANKS if name in environ))
    reasons = []
    for address in environ[CONTROL].split(","):
        host, _, port = address.rpartition(":")
        try:
            connection = socket.create_connection((host, int(port)), HANDSHAKE)
            return _answer(connection, environ[SECRET], rank)
        except (OSError, ChannelClosed) as error:
            reasons.append(f"{address}: {error}")
    raise LaunchError(f"rank {rank} on {socket.gethostname()} cannot reach the launcher: {'; '.join(reasons)}")


def _answer(connection: socket.socket, secret: str, rank: int) -> Channel:
    channel = Channel(connection.fileno(), connection.fileno())
    theirs, ours = (channel.receive(HANDSHAKE) or {}).get("challenge"), secrets.token_hex(16)
    channel.send({"rank": rank, "challenge": ours, "proof": proof(secret, "agent", str(theirs), ours, str(rank))})
    said = (channel.receive(HANDSHAKE) or {}).get("proof")
    if not hmac.compare_digest(as_data(str(said)), as_data(proof(secret, "launcher", ours, str(theirs)))):
        raise ChannelClosed("it is not our launcher that listens there")
    connection.settimeout(None)
    connection.detach()
    return channel
