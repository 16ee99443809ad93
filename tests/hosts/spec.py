"""What a host of the test bed is to be, and the files that make it so."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = str(Path(__file__).parents[2])
SILENT = "10.83.0.250"  # packets to it vanish: a machine that is switched off, a firewall
REFUSING = "10.83.0.254"  # nothing listens there: connections are refused
NOBODY = "lladdr 02:00:00:00:00:01 dev eth0 nud permanent"  # for ip neigh: where packets to an address vanish
ODD = """it's a "folder"; $HOME `id` \\ *"""
SHELLS = ["/bin/sh", "/bin/bash", "/bin/zsh", "/bin/dash", "/bin/ksh", "/bin/tcsh", "/usr/bin/fish"]  # where installed
READ_AT_LOGIN = (".profile", ".bash_profile", ".bashrc", ".zshenv", ".tcshrc", ".config/fish/config.fish", ".ssh/rc")

Keys = tuple[str, str]  # private, public
Files = dict[str, tuple[int, str]]  # by path: permissions, text


@dataclass(frozen=True)
class Spec:
    """A host's account and what is special about it.

    Folders are relative to the user's home, and may have any characters in their names but a colon in `repository`.
    """

    user: str = "root"
    shell: str = "/bin/sh"  # the login shell
    port: int = 22  # of sshd; 0: there is none
    repository: str = ""  # the folder in which the repository appears; "": where it is on the machine
    python: str = ""  # the folder of the interpreter, a script; "": the machine's, sys.executable, where that will do
    cwd: str = ""  # a folder for ranks to work in
    version: str = ""  # another __version__ of m3dist than the repository's
    noise: str = ""  # a shell command in the files that shells read at login, and in ~/.ssh/rc

    @property
    def home(self) -> str:
        return "/root" if self.user == "root" else f"/home/{self.user}"

    @property
    def cwd_path(self) -> str:
        return f"{self.home}/{self.cwd}" if self.cwd else self.home

    @property
    def repository_path(self) -> str:
        return f"{self.home}/{self.repository}" if self.repository else REPOSITORY

    @property
    def python_path(self) -> str:
        """The interpreter that finds the host's m3dist."""
        scripted = self.python or self.repository or self.version
        return f"{self.home}/{self.python or 'bin'}/python" if scripted else sys.executable


FOUR = (  # hosts that differ in all that may
    Spec(),
    Spec(user="ann", shell="/bin/bash", port=2222, python=ODD, cwd=f"{ODD} too", noise="echo Welcome"),
    Spec(user="bob", repository=ODD),
    Spec(version="0.0.9"),
)


def name_of(i: int) -> str:
    return f"node{i}"


def address_of(i: int) -> str:
    return f"10.83.0.{i + 1}"


def installed_shells() -> list[str]:
    return [shell for shell in SHELLS if shutil.which(shell)]


def make_keys(count: int) -> list[Keys]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(i)) for i in range(count)]
        for file in files:
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(file)]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=10)
        return [(file.read_text(), file.with_suffix(".pub").read_text()) for file in files]


def description(i: int, specs: Sequence[Spec], keys: Sequence[Keys]) -> dict[str, Any]:
    """What host.py reads, for host i. keys: the users', all the same, and then each host's."""
    spec = specs[i]
    keep, closed = shown(spec)
    return {
        "name": name_of(i),
        "ip": [
            "link set lo up",
            f"addr add {address_of(i)}/24 dev eth0",
            "link set eth0 up",
            f"neigh add {SILENT} {NOBODY}",
        ],
        "keep": keep,
        "closed": closed,
        "repository": [REPOSITORY, spec.repository_path],
        "user": spec.user,
        "shell": spec.shell,
        "port": spec.port,
        "files": ssh_files(i, specs, keys) | account_files(spec),
        "links": other_version(spec),
    }


def shown(spec: Spec) -> tuple[list[str], list[str]]:
    """Directories of the machine that the host's user needs, and those above them that only their owner may enter."""
    needed = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    needed = {path for path in needed if path != "/usr" and not Path(path).is_relative_to(REPOSITORY)}
    if not spec.repository:
        needed.add(REPOSITORY)
    above = {str(parent) for path in needed for parent in Path(path).parents}
    return sorted(needed), sorted(path for path in above if not os.stat(path).st_mode & 0o001)


def ssh_files(i: int, specs: Sequence[Spec], keys: Sequence[Keys]) -> Files:
    """sshd's and ssh's files on host i."""
    spec, (private, public) = specs[i], keys[0]
    hosts, known, logins = "127.0.0.1 localhost\n", "", ""
    for j, other in enumerate(specs):
        name, address, port = name_of(j), address_of(j), other.port or 22
        hosts += f"{address} {name}\n"
        known += f"{name},{address},[{name}]:{port},[{address}]:{port} {keys[1 + j][1]}"
        logins += f"Host {name}\n  User {other.user}\n  Port {port}\n"
    files = {
        "/etc/ssh/sshd_config": (0o644, sshd_config(spec)),
        "/etc/ssh/host_key": (0o600, keys[1 + i][0]),
        "/etc/ssh/banner": (0o644, "Authorised users only.\n"),
        "/etc/ssh/ssh_config": (0o644, ""),  # the defaults, whatever the machine's says
        "/etc/ssh/ssh_known_hosts": (0o644, known),
        "/etc/hosts": (0o644, hosts),
    }
    for home in {"/root", spec.home}:
        files[f"{home}/.ssh/id_ed25519"] = (0o600, private)
        files[f"{home}/.ssh/authorized_keys"] = (0o600, public)
        files[f"{home}/.ssh/config"] = (0o600, logins)
    return files


def sshd_config(spec: Spec) -> str:
    lines = [
        f"Port {spec.port}",
        "HostKey /etc/ssh/host_key",
        "UsePAM no",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "UseDNS no",
        "PidFile none",
        "LogLevel VERBOSE",
    ]
    if spec.noise:
        lines.append("Banner /etc/ssh/banner")
    return "\n".join(lines) + "\n"


def account_files(spec: Spec) -> Files:
    """The interpreter's script, the folder to work in, the other version, and what a login reads."""
    files = {}
    if spec.python_path != sys.executable:
        files[spec.python_path] = (0o755, interpreter(spec))
    if spec.version:
        source = Path(REPOSITORY, "m3dist", "__init__.py").read_text()
        files[f"{spec.home}/other/m3dist/__init__.py"] = (0o644, f"{source}\n__version__ = {spec.version!r}\n")
    if spec.cwd:
        files[f"{spec.cwd_path}/here"] = (0o644, "")
    if spec.noise:
        files |= {f"{spec.home}/{name}": (0o644, f"{spec.noise}\n") for name in READ_AT_LOGIN}
    return files


def interpreter(spec: Spec) -> str:
    """A script that runs the machine's interpreter with the host's m3dist."""
    package = f"{spec.home}/other" if spec.version else spec.repository_path
    real = Path(sys.executable)
    if real.is_relative_to(REPOSITORY):
        real = spec.repository_path / real.relative_to(REPOSITORY)
    return f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(package)}\nexec {shlex.quote(str(real))} "$@"\n'


def other_version(spec: Spec) -> dict[str, str]:
    """By path, links to the repository's files: a package m3dist in which only the version differs."""
    if not spec.version:
        return {}
    names = {path.name for path in Path(REPOSITORY, "m3dist").iterdir()} - {"__init__.py", "__pycache__"}
    return {f"{spec.home}/other/m3dist/{name}": f"{spec.repository_path}/m3dist/{name}" for name in sorted(names)}
