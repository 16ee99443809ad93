"""Real hosts on one Linux machine: namespaces with an sshd each, joined by a bridge in a namespace of its own.

    with Network(Spec(), Spec(user="ann", shell="/bin/bash")) as net:
        net.run(0, ["ssh", "-o", "BatchMode=yes", net.host(1).name, "hostname"])
        net.link_down(1)

A host (host.py) has its own processes, addresses, sshd and host key, /etc with its own accounts, homes, /tmp and
/dev/shm; the rest of the file system is the machine's. root and the user of any host may log in as either on any other:
keys, known_hosts and ~/.ssh/config are in place there, so that plain `ssh NAME` works. Nothing of this is visible on
the machine, and all of it ends with this process, however that ends.

Needs root, unshare and nsenter (util-linux), ip, sshd and ssh; `delay` also /dev/net/tun, `rate` also tc.
"""

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from spec import NOBODY, REFUSING, Spec, address_of, description, make_keys, name_of

HERE = Path(__file__).parent
SET_UP = 10.0  # seconds for each thing that the bed itself does
ALIVE = "RSDITt"  # states of a process that has not ended


@dataclass(frozen=True)
class Host:
    spec: Spec
    name: str  # in every host's /etc/hosts and ~/.ssh/config
    address: str
    pid: int  # the first process's, on the machine
    sshd: int  # the daemon's process ID in the host; 0: there is none

    @property
    def python(self) -> str:
        """The interpreter that finds m3dist in this host."""
        return self.spec.python_path

    def path(self, name: str) -> Path:
        """The host's file `name` (absolute), to read and write from the machine."""
        return Path(f"/proc/{self.pid}/root{name}")

    def entry(self, **others: Any) -> dict[str, Any]:
        """This host in a hostfile, with everything that the launcher and ssh must be told."""
        told = {"ssh": self.address, "ips": [self.address], "user": self.spec.user, "port": self.spec.port}
        return told | {"python": self.python, "cwd": self.spec.cwd_path} | others


@dataclass(frozen=True)
class Process:
    pid: int  # on the machine
    inner: int  # in the host
    state: str  # as in /proc/PID/stat: R, S, D, T, Z, ...
    command: str  # the command line


class HostProcess(subprocess.Popen):
    """A program in a host, started and waited for by nsenter. Signals go to the program; its end is nsenter's end."""

    @cached_property
    def program(self) -> int:
        """The program's process ID on the machine."""
        end = time.monotonic() + SET_UP
        while time.monotonic() < end and self.poll() is None:
            if children := Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
                return int(children[0])
            time.sleep(0.001)
        raise ProcessLookupError(f"{self.args} has not started, or has ended")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.program, number)
            self.wake()

    def wake(self) -> None:
        """nsenter stops when its program does, and would not see it end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        self.kill()
        self.wait(SET_UP)
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Network:
    """Hosts with the addresses 10.83.0.1, 10.83.0.2, ..., in the order of `specs`. To be closed, or used with `with`.

    Raises RuntimeError, OSError or CalledProcessError if it cannot be built; what was built is removed then.
    """

    def __init__(self, *specs: Spec) -> None:
        self.hosts: list[Host] = []
        self._started: list[tuple[int, HostProcess]] = []
        self._delays: dict[int, subprocess.Popen] = {}
        self._rates: set[int] = set()
        self._cuts: set[tuple[int, int]] = set()
        self._stack = ExitStack()
        try:
            self._build(specs)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def host(self, i: int) -> Host:
        return self.hosts[i]

    def close(self) -> None:
        """End every process of every host, and with them all that the bed made."""
        with self._stack:
            for i in list(self._delays):
                self._stack.callback(_end, self._delays.pop(i))
            for _, process in self._started:
                self._stack.callback(process.end)
            self._started.clear()

    def reset(self) -> None:
        """Hosts without programs, links up and fast: what one test must not leave to the next."""
        for i in range(len(self.hosts)):
            self.kill(i)
            self.link_up(i)
            self.delay(i, 0)
            self.rate(i, 0)
        for i, j in list(self._cuts):
            self.mend(i, j)
        for _, process in self._started:
            process.end()
        self._started.clear()

    # -----------------------------------------------------------------------------------------------------------------
    # Programs

    def popen(
        self, i: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "/root", **options: Any
    ) -> HostProcess:
        """Start `argv` in host i, as root, in a session of its own, with few variables besides `env`.

        options: Popen's. Standard input is /dev/null unless they say otherwise.
        """
        variables = {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8"} | dict(env or {})
        enter = ["nsenter", f"--target={self.hosts[i].pid}", "--mount", "--uts", "--ipc", "--net", "--pid", "--"]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        process = HostProcess([*enter, "env", "-C", cwd, *argv], env=variables, **streams | options)
        self._started.append((i, process))
        return process

    def run(
        self, i: int, argv: Sequence[str], *, input: str | None = None, timeout: float = 20.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` in host i as `popen` does; its output as text. Raises TimeoutError, with the output so far."""
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        if input is not None:
            streams["stdin"] = subprocess.PIPE
        process = self.popen(i, argv, **streams | options)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired as late:
            process.end()
            said = b"".join(text for text in (late.stdout, late.stderr) if text).decode(errors="replace")
            raise TimeoutError(f"host {i}: {shlex.join(argv)} took more than {timeout} s\n{said}") from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def processes(self, i: int) -> list[Process]:
        """What runs in host i, sessions of sshd included; not the first process, sshd itself, nor zombies."""
        return [process for process in self._all(i) if process.state in ALIVE]

    def zombies(self, i: int) -> list[Process]:
        return [process for process in self._all(i) if process.state not in ALIVE]

    def wait_empty(self, seconds: float, but: str = "nothing") -> list[tuple[int, Process]]:
        """Wait for every host to have no processes but those with `but` in their command line.

        Those that are left after `seconds`, each with its host.
        """
        end, everywhere = time.monotonic() + seconds, range(len(self.hosts))
        while True:
            left = [(i, process) for i in everywhere for process in self.processes(i) if but not in process.command]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.02)

    def wait_reaped(self, seconds: float) -> list[tuple[int, Process]]:
        """As wait_empty, for zombies: a healthy parent needs a moment."""
        end = time.monotonic() + seconds
        while left := [(i, zombie) for i in range(len(self.hosts)) for zombie in self.zombies(i)]:
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        return left

    def find(self, i: int, text: str = "") -> list[Process]:
        """Processes of host i with `text` in their command line."""
        return [process for process in self.processes(i) if text in process.command]

    def wait_for(self, i: int, text: str, seconds: float = SET_UP) -> list[Process]:
        """Processes of host i with `text` in their command line, as soon as there is one. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not (found := self.find(i, text)):
            if time.monotonic() > end:
                raise TimeoutError(f"no process with {text!r} in host {i} within {seconds} s: {self.processes(i)}")
            time.sleep(0.01)
        return found

    def wait_gone(self, i: int, text: str, seconds: float) -> list[Process]:
        """The processes of host i with `text` in their command line that are left after so long."""
        end = time.monotonic() + seconds
        while (found := self.find(i, text)) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def kill(self, i: int, text: str = "", number: int = signal.SIGKILL) -> list[Process]:
        """Send a signal to the processes that `find` finds; those."""
        found = self.find(i, text)
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        for host, started in self._started:
            if host == i and number != signal.SIGSTOP:
                started.wake()
        return found

    def freeze(self, i: int, text: str = "") -> list[Process]:
        """Stop processes with SIGSTOP; `kill` with SIGCONT lets them go on."""
        return self.kill(i, text, signal.SIGSTOP)

    def _all(self, i: int) -> Iterator[Process]:
        host = self.hosts[i]
        namespace = os.readlink(f"/proc/{host.pid}/ns/pid")
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(entry / "ns/pid") != namespace:
                    continue
                process = _process(entry)
                if process.inner not in (1, host.sshd):
                    yield process

    # -----------------------------------------------------------------------------------------------------------------
    # Links

    def link_down(self, i: int) -> None:
        """Pull host i's cable: its device loses the carrier, and keeps its address."""
        self._carrier(i, "down")

    def link_up(self, i: int) -> None:
        self._carrier(i, "up")

    def _carrier(self, i: int, state: str) -> None:
        """Set it, and wait until the host has noticed, which takes the kernel up to a second."""
        _ip(self._switch, f"link set port{i} {state}")
        seen, end = self.hosts[i].path("/sys/class/net/eth0/operstate"), time.monotonic() + SET_UP
        while (seen.read_text() == "up\n") != (state == "up"):
            if time.monotonic() > end:
                raise TimeoutError(f"host {i}'s link does not go {state}")
            time.sleep(0.01)

    def cut(self, i: int, j: int) -> None:
        """Let packets between hosts i and j vanish, while both still reach the others."""
        for one, other in ((i, j), (j, i)):
            _ip(self.hosts[one].pid, f"neigh replace {self.hosts[other].address} {NOBODY}")
        self._cuts.add((i, j))

    def mend(self, i: int, j: int) -> None:
        for one, other in ((i, j), (j, i)):
            _ip(self.hosts[one].pid, f"neigh del {self.hosts[other].address} {NOBODY}")
        self._cuts.discard((i, j))

    def delay(self, i: int, milliseconds: float) -> None:
        """Let every packet from and to host i take that much longer; 0 takes the delay away. Connections survive."""
        if i in self._delays:
            _ip(self._switch, f"link set port{i} master bridge", f"link del slow{i}")
            _end(self._delays.pop(i))
        if not milliseconds:
            return
        if not os.path.exists("/dev/net/tun"):
            pytest.skip("machine: no /dev/net/tun, so no slow links")
        relay = [sys.executable, "-IS", str(HERE / "relay.py"), f"near{i}", f"far{i}", str(milliseconds / 1000)]
        self._delays[i] = _start(["nsenter", f"--target={self._switch}", "--net", "--", *relay])
        _line(self._delays[i])
        _ip(
            self._switch,
            f"link add slow{i} type bridge",
            f"link set port{i} master slow{i}",
            f"link set near{i} master slow{i}",
            f"link set far{i} master bridge",
            *(f"link set {device}{i} up" for device in ("slow", "near", "far")),
        )

    def rate(self, i: int, mbit: float) -> None:
        """Let no more than this much from and to host i pass, in 10^6 bits a second; 0 takes the limit away."""
        if not mbit and i not in self._rates:
            return
        qdisc = f"root tbf rate {mbit}mbit burst 128kb latency 50ms" if mbit else "root"
        for pid, device in ((self.hosts[i].pid, "eth0"), (self._switch, f"port{i}")):
            command = ["tc", "qdisc", "replace" if mbit else "del", "dev", device, *qdisc.split()]
            done = _inside(pid, command)
            if "Specified qdisc kind is unknown" in done.stderr:
                pytest.skip("machine: the kernel has no tbf, so no links of limited bandwidth")
            done.check_returncode()
        (self._rates.add if mbit else self._rates.discard)(i)

    # -----------------------------------------------------------------------------------------------------------------
    # Building

    def _build(self, specs: Sequence[Spec]) -> None:
        switch = self._hold(["unshare", "--net", "sh", "-c", "echo $$; exec cat"])
        unshare = ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--"]
        processes = [self._hold([*unshare, sys.executable, "-IS", str(HERE / "host.py")]) for _ in specs]
        keys = make_keys(1 + len(specs))
        self._switch = int(_line(switch))
        pids = [int(_line(process)) for process in processes]
        _ip(
            self._switch,
            "link add bridge type bridge",
            f"addr add {REFUSING}/24 dev bridge",
            "link set bridge up",
            *(f"link add port{i} type veth peer name eth0 netns {pid}" for i, pid in enumerate(pids)),
            *(f"link set port{i} master bridge up" for i in range(len(pids))),
        )
        for i, process in enumerate(processes):
            assert process.stdin
            process.stdin.write(json.dumps(description(i, specs, keys)) + "\n")
            process.stdin.flush()
        for i, process in enumerate(processes):
            self.hosts.append(Host(specs[i], name_of(i), address_of(i), pids[i], int(_line(process))))

    def _hold(self, command: Sequence[str]) -> subprocess.Popen:
        process = _start(command)
        self._stack.callback(_end, process)
        return process


# ---------------------------------------------------------------------------------------------------------------------
# Processes and namespaces


def _process(entry: Path) -> Process:
    """What /proc says of one process."""
    stat = (entry / "stat").read_text(errors="replace")
    command = (entry / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    inner = next(line for line in (entry / "status").read_text().splitlines() if line.startswith("NSpid:")).split()[-1]
    state = stat.rpartition(")")[2].split()[0]
    return Process(int(entry.name), int(inner), state, command or stat[stat.index("(") : stat.rindex(")") + 1])


def _start(command: Sequence[str]) -> subprocess.Popen:
    """A process that lives until its standard input ends."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _line(process: subprocess.Popen) -> str:
    """The next line it prints. Raises RuntimeError if there is none in time; why is on standard error."""
    readable, _, _ = select.select([process.stdout], [], [], SET_UP)
    line = process.stdout.readline() if readable and process.stdout else ""
    if not line:
        raise RuntimeError(f"{shlex.join(process.args)} did not start")
    return line


def _end(process: subprocess.Popen) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(SET_UP)
    finally:
        process.kill()
        process.wait(SET_UP)
        process.stdout.close()


def _inside(pid: int, command: Sequence[str], input: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in the network of process `pid`."""
    enter = ["nsenter", f"--target={pid}", "--net", "--"]
    return subprocess.run([*enter, *command], input=input, text=True, capture_output=True, timeout=SET_UP)


def _ip(pid: int, *lines: str) -> None:
    done = _inside(pid, ["ip", "-batch", "-"], "\n".join(lines) + "\n")
    if done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()}; in {lines}")
