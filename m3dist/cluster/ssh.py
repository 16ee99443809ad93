"""Starting a Python module of ours on a host, this machine or another, and talking to it. No MLX.

ssh hands one text to the user's login shell, whichever that is. Ours is constant: a host's data (paths, commands,
environments) travels as messages, so there is nothing to quote, and no secret is ever on a command line.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from m3dist.cluster.channel import Channel, ChannelClosed, Message, parse
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.hostfile import Host

# No question is ever asked, no forwarding, no shared connection that would outlive us, and a dead link is noticed.
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "2",
    "ControlMaster": "no",
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}
# How a program of `python -c` begins that shall not import out of the folder where it happens to be: a checkout lies in
# somebody's home, where ssh starts us, and its folder m3dist is not the package.
NOT_FROM_HERE = "import sys; sys.path = [path for path in sys.path if path]; "
# Runs the module that is its first argument, as `python -m` would elsewhere. No quotes: see START.
RUN_MODULE = f"{NOT_FROM_HERE}import runpy; runpy.run_module(sys.argv.pop(1), None, __name__, True)"
# sh reads its line byte by byte and leaves the rest of standard input to Python. No ', ! or \, which shells differ on.
START = (
    "/bin/sh -c 'IFS= read -r python; "
    'case $python in "~/"*) python="$HOME/${python#"~/"}";; esac; '
    f'exec "$python" -c "{RUN_MODULE}" %s\''
)
HOSTS = "M3DIST_SSH_HOSTS"  # JSON for `main`: name -> user and port
SSH_FAILED = 255  # ssh's status where it, not the command, failed
TAIL = 20  # lines of what a host says on standard error that are kept
DESCRIPTOR = "M3DIST_CHANNEL"  # names the channel's descriptor to a module started on this machine


def python_module(module: str) -> list[str]:
    """What follows `python` to run a module of ours, whatever the working directory."""
    return ["-c", RUN_MODULE, module]


def ssh_command(host: Host, command: str) -> list[str]:
    """The ssh process that has `host` run `command`."""
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    where = [*(["-l", host.user] if host.user else []), *(["-p", str(host.port)] if host.port else [])]
    return ["ssh", "-T", *options, *where, "--", host.ssh, command]


class Unreachable(LaunchError):
    """A host to which ssh finds no way, or that does not answer."""


class Remote:
    """`python -m module` on a host, and the channel to it; the module begins with `channel_to_launcher`.

    On this machine the module has our own standard streams, on another only the channel and `errors`: the last lines
    it or ssh wrote to standard error.
    """

    def __init__(self, host: Host, module: str):
        """Raises LaunchError where the process cannot be started here; what happens there, `greet` says."""
        self.host = host
        self.errors: deque[str] = deque(maxlen=TAIL)
        python = host.python or sys.executable
        self._reading: threading.Thread | None = None
        try:
            if host.local:
                self._start_here([os.path.expanduser(python), *python_module(module)])
            else:
                self._start_there(ssh_command(host, START % module), python)
        except OSError as error:
            raise LaunchError(f"host {host.ssh}: cannot start {error.filename}: {error.strerror}") from None

    def _start_here(self, command: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environ = os.environ | {DESCRIPTOR: str(theirs.fileno())}
            # A session of its own: Ctrl-C reaches us alone, and we end everything in good order.
            self.process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()], start_new_session=True)
        descriptor = ours.detach()
        self.channel = Channel(descriptor, descriptor)

    def _start_there(self, command: list[str], python: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        assert self.process.stdin and self.process.stdout
        self.channel = Channel(os.dup(self.process.stdout.fileno()), os.dup(self.process.stdin.fileno()))
        self.process.stdin.close()
        self.process.stdout.close()
        self._reading = threading.Thread(target=self._read_errors, daemon=True)
        self._reading.start()
        with suppress(OSError):  # it is gone already: greet says so
            os.write(self.channel.writing, python.encode() + b"\n")

    def _read_errors(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.errors.append(line.decode(errors="replace").rstrip())

    def greet(self, timeout: float, **words: float) -> Message:
        """What the module says of itself. What a login shell prints before is passed over.

        Raises LaunchError with what the host said instead, Unreachable if it said nothing within `timeout` seconds.
        """
        word, end = secrets.token_hex(16), time.monotonic() + timeout
        try:
            self.send({"hello": word, **words})
            while True:
                line = self.channel.receive_line(max(0.0, end - time.monotonic()))
                if line is None:
                    raise Unreachable(f"host {self.host.ssh}: no answer within {timeout:g} s{self.said()}")
                if word.encode() in line:
                    return parse(line[line.index(b"{") :])  # a login shell may have left a line unfinished
        except ChannelClosed:
            reason = f"host {self.host.ssh}: {self.how_it_ended()}{self.said()}"
            failed = self.process.poll() == SSH_FAILED and not self.host.local
            raise (Unreachable if failed else LaunchError)(reason) from None

    def send(self, message: Message) -> None:
        """Raises ChannelClosed."""
        self.channel.send(message)

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message; None after `timeout` seconds. Raises ChannelClosed."""
        return self.channel.receive(timeout)

    def how_it_ended(self) -> str:
        """Why the channel is closed, in words."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        if self._reading:
            self._reading.join(1.0)
        what = "its agent" if self.host.local else "ssh"
        status = self.process.poll()
        if status is None:
            return f"{what} closed the connection"
        return f"{what} ended with exit code {status}" if status >= 0 else f"{what} was killed by signal {-status}"

    def said(self) -> str:
        """The last line it wrote to standard error, to end a sentence with."""
        lines = [line for line in self.errors if line.strip()]
        return f": {lines[-1].strip()}" if lines else ""

    def close(self, grace: float = 0.0) -> None:
        """Close the channel, at which the module ends; after `grace` seconds end the process itself."""
        self.channel.close()
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def channel_to_launcher() -> tuple[Channel, Message]:
    """In a module that Remote started: the channel, and the launcher's greeting, to be answered with its word.

    Standard output and input, where they are the channel, become standard error and nothing: a stray print does no
    harm. Raises ChannelClosed.
    """
    if DESCRIPTOR in os.environ:
        descriptor = int(os.environ.pop(DESCRIPTOR))
        os.set_inheritable(descriptor, False)
        channel = Channel(descriptor, descriptor)
    else:
        channel = Channel(os.dup(0), os.dup(1))
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        os.close(nothing)
    greeting = channel.receive()
    assert greeting is not None
    return channel, greeting


def main(words: Sequence[str]) -> NoReturn:
    """What mpirun calls instead of ssh: HOST COMMAND ..., with our options and what the hostfile says of HOST."""
    name, *command = words[1:] if words[0] == "-x" else words  # mpirun's own wish for no X11, which is ours too
    known = json.loads(os.environ[HOSTS]).get(name, {})
    ssh = ssh_command(Host(name, user=known.get("user"), port=known.get("port")), " ".join(command))
    os.execvp(ssh[0], ssh)


if __name__ == "__main__":
    main(sys.argv[1:])
