"""A job over MPI: mpirun starts one agent a rank, and each connects back to the launcher. No MLX.

mpirun passes on the ranks' output without saying whose it is and ends what it likes in its own order, so it starts
agents, which stay until the launcher has seen why the job ended. The port they connect to is bound to the cluster's
addresses alone, and whoever does not prove within HANDSHAKE seconds that he knows the launch's secret gets nothing.
"""

import json
import os
import re
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
from m3dist.cluster.handshake import admits, is_admitted
from m3dist.cluster.hostfile import Host
from m3dist.cluster.ssh import HOSTS, TAIL, Unreachable, python_module

CONTROL, SECRET = "M3DIST_CONTROL", "M3DIST_SECRET"  # where the launcher listens, and what both know
HANDSHAKE = 10.0  # seconds
STRANGERS = 64  # connections that may be in their handshake at once; ours take milliseconds
DAEMONS = ("orted", "prted")  # Open MPI 4's, 5's: on hosts other than mpirun's own
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

# What ssh, told to be silent but for errors, says where it fails itself. mpirun writes screens of text after it.
SSH_SAYS = re.compile(
    r"^ssh: |Permission denied \(|^Host key verification failed|^Connection (closed|reset|timed out)|^Timeout, server |"
    r"^kex_exchange_identification"
)

# Outlives a launcher that is killed, as mpirun does, which would wait for ever for a host that does not answer. Its
# standard input brings mpirun's process number, and ends with the launcher; then mpirun has 4 s to end after its
# agents, 4 s to end when asked, and is killed. $1 is a folder of the launcher's.
GUARD = """
read -r mpirun
read -r _
for signal in 0 TERM KILL; do
    kill -$signal $mpirun
    tries=20
    while kill -0 $mpirun && [ $tries -gt 0 ]; do
        sleep 0.2
        tries=$((tries - 1))
    done
done
rm -rf "$1"
"""


class Mpirun:
    """mpirun, running one agent a rank on `hosts` (an entry a rank), and the port they connect to.

    `killed` is called if a signal ends it. It ends by itself after its agents, which say why.
    """

    def __init__(self, hosts: Sequence[Host], module: str, killed: Callable[[signal.Signals], None]):
        """Raises LaunchError where mpirun cannot be started."""
        self.errors: deque[str] = deque(maxlen=TAIL)
        self._killed = killed
        self._hosts = hosts
        self._ssh_said = ""  # the first reason of ssh's why it found no way to a host
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
        check_names(hosts)
        self.addresses = []
        for address in own_addresses(hosts):
            listener = self._stack.enter_context(socket.create_server((address, 0)))
            self.addresses.append(f"{address}:{listener.getsockname()[1]}")
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _start(self, hosts: Sequence[Host], module: str) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="m3dist-")
        script = Path(self._stack.enter_context(self._scratch)) / "ssh"
        path = os.environ.get("PATH", os.defpath)
        replacement = shlex.join([sys.executable, *python_module("m3dist.cluster.ssh")])
        script.write_text(f'#!/bin/sh\nPATH={shlex.quote(path)} exec {replacement} "$@"\n')
        script.chmod(0o700)
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "sh", self._scratch.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._stack.callback(self._dismiss_guard)
        assert self._guard.stdin
        environ = SETTINGS | dict(os.environ) | {"PATH": f"{script.parent}{os.pathsep}{path}"}
        environ |= {CONTROL: ",".join(self.addresses), SECRET: self._secret, HOSTS: described(hosts)}
        self.process = subprocess.Popen(
            command(hosts, module),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._guard.stdin.write(b"%d\n" % self.process.pid)
        self._guard.stdin.flush()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def wait_for(self, rank: int, timeout: float) -> Channel:
        """The channel to a rank's agent. Raises LaunchError where it does not come."""
        with self._changed:
            self._changed.wait_for(lambda: rank in self._arrived or self.process.poll() is not None, timeout)
            if rank in self._arrived:
                return self._arrived[rank]
            late = {host.ssh: None for number, host in enumerate(self._hosts) if number not in self._arrived}
        if self.process.poll() is None:
            raise Unreachable(f"mpirun has started no agent on {', '.join(late)} within {timeout:g} s")
        self._reading.join(1.0)
        if self._ssh_said:
            raise Unreachable(f"mpirun did not reach every host: {self._ssh_said}")
        raise LaunchError(f"mpirun {self.how_it_ended()}")

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

    def _dismiss_guard(self) -> None:
        self._guard.kill()
        self._guard.communicate()

    def _read(self) -> None:
        assert self.process.stdout
        for data in self.process.stdout:
            line = data.decode(errors="replace").rstrip()
            self.errors.append(line)
            self._ssh_said = self._ssh_said or (line if SSH_SAYS.search(line) else "")
        code = self.process.wait()
        with self._changed:
            self._changed.notify_all()
        if code < 0:
            self._killed(signal.Signals(-code))

    def _accept(self, listener: socket.socket) -> None:
        while listener.fileno() >= 0:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed; or a stranger left at once; or too many files are open
                time.sleep(0.01)
                continue
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
            rank, channel = meet(connection, self._secret)
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
            connection.detach()
            self._arrived[rank] = channel
            self._changed.notify_all()
            if len(self._arrived) == len(self._hosts):
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
        words += ["-x", SECRET, "-x", CONTROL, python, *python_module(module)]
    return words


def check_names(hosts: Sequence[Host]) -> None:
    """Raises LaunchError for hosts that mpirun cannot tell apart: it knows a host by its name alone, once."""
    known: dict[str, Host] = {}
    for host in hosts:
        other = known.setdefault(host.ssh, host)
        if (other.user, other.port) != (host.user, host.port):
            raise LaunchError(f"host {host.ssh}: mpirun can start ranks there as one user, on one port of ssh's, only")
        if set(host.ssh) & set(",:"):
            raise LaunchError(f"host {host.ssh}: a name with , or : means something else to mpirun; use another name")


def started_here(environ: Mapping[str, str]) -> bool:
    """Whether mpirun started this process."""
    return any(name in environ for name in MPI_RANKS)


def end_daemon() -> None:
    """End the daemon of mpirun that started this process: cut off from mpirun, it would stay for ever."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text()
    except OSError:  # macOS
        name = subprocess.run(["ps", "-o", "comm=", "-p", str(parent)], capture_output=True, text=True).stdout
    if os.path.basename(name.strip()) in DAEMONS:
        os.kill(parent, signal.SIGTERM)


def described(hosts: Sequence[Host]) -> str:
    """What ssh.main must know of each host."""
    return json.dumps({host.ssh: {"user": host.user, "port": host.port} for host in hosts})


def own_addresses(hosts: Sequence[Host]) -> list[str]:
    """Ours that the hosts can reach: on which we reach them. Nothing is sent for that.

    On another host 127.0.0.1 would be whoever listens there.
    """
    found = []
    for host in [host for host in hosts if not host.local] or hosts[:1]:
        there = "127.0.0.1" if host.local else (*host.ips, host.ssh)[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((there, 9))
            except OSError as error:
                advice = "" if host.ips else "; give its address in the hostfile, as `ips`"
                raise LaunchError(f"host {host.ssh}: no way to {there}: {error.strerror}{advice}") from None
            found.append(probe.getsockname()[0])
    return list(dict.fromkeys(found))


def meet(connection: socket.socket, secret: str) -> tuple[int, Channel]:
    """The launcher's side of a new connection: the rank whose agent it is, and the channel to it.

    Raises ChannelClosed where it is a stranger.
    """
    if not admits(connection, secret, HANDSHAKE):
        raise ChannelClosed("a stranger")
    connection.settimeout(None)
    channel = Channel(connection.fileno(), connection.fileno())
    message = channel.receive(HANDSHAKE)
    if message is None:
        raise ChannelClosed("it does not say whose agent it is")
    return message["rank"], channel


def connect(environ: Mapping[str, str]) -> Channel:
    """The agent's side: to the first address that answers, both having proved themselves. Raises LaunchError."""
    rank = int(next(environ[name] for name in MPI_RANKS if name in environ))
    reasons = []
    for address in environ[CONTROL].split(","):
        host, _, port = address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), HANDSHAKE) as connection:
                if not is_admitted(connection, environ[SECRET], HANDSHAKE):
                    raise EOFError
                connection.settimeout(None)
                descriptor = connection.detach()
            channel = Channel(descriptor, descriptor)
            channel.send({"rank": rank})
            return channel
        except EOFError:
            reasons.append(f"{address}: it is not our launcher that listens there")
        except (OSError, ChannelClosed) as error:
            reasons.append(f"{address}: {error}")
    raise LaunchError(f"rank {rank} on {socket.gethostname()} cannot reach the launcher: {'; '.join(reasons)}")
