"""Hostfiles: on which hosts a job runs and how they reach each other; read, and distrusted. No MLX.

Three formats, told apart by their content; hostfiles/README.md says what each field means:

    mlx.launch   JSON: {"backend": ..., "envs": [...], "hosts": [{"ssh": ..., "ips": [...], "rdma": [...]}]},
                 or the list of hosts alone
    m3dist       YAML or JSON with the same fields and, for each host, the others of `Host`
    MPI          a line a host, `host slots=N` as for Open MPI or `host:N` as for MPICH; the backend is mpi
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import yaml

from m3dist.cluster.environment import MLX_BACKENDS, MPI_RANKS
from m3dist.cluster.hostfile_values import HostfileError, Value, compose, quoted
from m3dist.options import MAX_RANKS

BACKENDS = ("ring", "jaccl", "jaccl-ring", "mpi", "nccl")
LARGEST_FILE = 1 << 16  # bytes; parsing it takes a second at most
LARGEST_MEMORY = 1e6  # GiB

# What the launchers tell a rank: set by a hostfile, it would only be wrong.
LAUNCHER_VARIABLES = {"MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "NCCL_HOST_IP", "NCCL_PORT"} | {
    name for name in (*MLX_BACKENDS, *MPI_RANKS, *MPI_RANKS.values(), "PMIX_NAMESPACE") if name
}
LIMITS = ("M3DIST_START_LIMIT", "M3DIST_STEP_LIMIT", "M3DIST_LOAD_LIMIT")
USER_VARIABLES = (*LIMITS, "M3DIST_WIRED_LIMIT_MB", "M3DIST_STORE")  # no other that begins so


@dataclass(frozen=True)
class Host:
    """One entry of a hostfile: `ranks` processes on one machine."""

    ssh: str  # a name or address that ssh knows
    ips: tuple[str, ...] = ()  # numeric IPv4; with_backend sees to it that there are as many as it needs
    rdma: tuple[Any, ...] = ()  # towards each host None, a device, or a tuple of devices
    user: str | None = None
    port: int | None = None  # of ssh
    python: str | None = None  # an absolute path, ~/path, or a command
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)  # wins over the hostfile's own
    memory_gb: float | None = None  # GiB, as memory is sold
    ranks: int = 1
    lines: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)  # field -> line; "": the host's

    @property
    def local(self) -> bool:
        """Whether this is the launcher's own machine, where nothing is started over ssh."""
        return self.ssh in ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Hostfile:
    """The hosts in rank order: the first host has rank 0 and the following ones, the second the next."""

    path: str  # for messages; "-n N" where no file was given
    backend: str | None  # one of BACKENDS; None where the file names none
    env: Mapping[str, str]  # for every host
    hosts: tuple[Host, ...]  # at least one

    @property
    def world(self) -> int:
        """The number of ranks, 1 to MAX_RANKS."""
        return sum(host.ranks for host in self.hosts)

    def with_backend(self, backend: str) -> "Hostfile":
        """The same hosts over `backend`. Raises HostfileError where they lack what it needs."""
        if backend not in BACKENDS:
            raise HostfileError(f"backend must be one of {', '.join(BACKENDS)}, not {quoted(backend)}")
        _check_needs(self, backend)
        return replace(self, backend=backend)

    def error(self, host: int, name: str, problem: str) -> HostfileError:
        """That field `name` of host number `host` has this `problem`."""
        lines = self.hosts[host].lines
        line = lines.get(name.partition("[")[0], lines.get(""))
        return HostfileError(f"{self.path}{f' line {line}' if line else ''}: hosts[{host}].{name} {problem}")


def read_hostfile(path: str) -> Hostfile:
    """The hostfile at `path`, checked as far as it goes: what a backend needs, only if the file names the backend.

    Raises HostfileError, whatever the file holds.
    """
    text = _read_text(path)
    start = _first_line(text)
    if not start:
        raise HostfileError(f"{path}: is empty; it must list hosts (hostfiles/README.md)")
    if YAML_START.match(start):
        return _checked(_from_yaml(path, text))
    return _checked(Hostfile(path, "mpi", {}, _from_mpi(path, text)))


def local_hostfile(ranks: int, backend: str) -> Hostfile:
    """`ranks` processes on this machine, as -n asks for. Raises HostfileError where `backend` cannot have them."""
    return _checked(Hostfile(f"-n {ranks}", backend, {}, (Host("127.0.0.1", ips=("127.0.0.1",), ranks=ranks),)))


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no system has
        raise HostfileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST_FILE:
        raise HostfileError(f"{path}: is larger than {LARGEST_FILE} bytes; that is no hostfile")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise HostfileError(f"{path} line {line}: is not text in UTF-8") from None
    if "\0" in text:
        raise HostfileError(f"{path} line {text.count(chr(10), 0, text.index(chr(0))) + 1}: is not text")
    return text


# JSON and YAML begin with a bracket, a quote or another sign, a dash, or "key:". No line of an MPI hostfile does.
YAML_START = re.compile(r"""[\[\]{}"'%&*!|>?@`,]|-(\s|$)|---|[^\s:]+\s*:(\s|$)""")


def _first_line(text: str) -> str:
    """The first line that is neither empty nor a comment; "" if there is none."""
    lines = (line.strip() for line in text.split("\n"))
    return next((line for line in lines if line and not line.startswith("#")), "")


# ---------------------------------------------------------------------------------------------------------------------
# The fields of JSON and YAML


def _from_yaml(path: str, text: str) -> Hostfile:
    root = compose(path, text)
    if isinstance(root.node, yaml.SequenceNode):  # mlx.launch takes the hosts alone too
        return Hostfile(path, None, {}, _hosts(replace(root, name="hosts")))
    fields = root.fields("a hostfile", ("backend", "envs", "hosts"))
    if "hosts" not in fields:
        raise root.error("hosts is missing: the list of hosts")
    backend = _backend(fields["backend"]) if "backend" in fields else None
    return Hostfile(path, backend, _envs(fields["envs"]) if "envs" in fields else {}, _hosts(fields["hosts"]))


def _backend(value: Value) -> str | None:
    allowed = f"one of {', '.join(BACKENDS)}"
    backend = value.text(allowed)
    if backend and backend not in BACKENDS:  # mlx.launch's own hostfiles say "" for none
        raise value.must_be(allowed)
    return backend or None


def _envs(value: Value) -> dict[str, str]:
    env: dict[str, str] = {}
    for item in value.items('a list of "NAME=value"'):
        name, equals, setting = item.text('"NAME=value"').partition("=")
        if not equals:
            raise item.must_be('"NAME=value"')
        _check_variable(item, name)
        if name in env:
            raise item.error(f"sets {name} for the second time; one must go")
        env[name] = setting
    return env


def _hosts(value: Value) -> tuple[Host, ...]:
    hosts = tuple(_host(item) for item in value.items("a list of hosts"))
    if not hosts:
        raise value.error("must list at least one host")
    return hosts


def _host(value: Value) -> Host:
    fields = value.fields("a host", tuple(_FIELDS))
    if "ssh" not in fields:
        raise value.error("needs ssh: the name that ssh knows, or 127.0.0.1 for this machine")
    values = {name: _FIELDS[name](field) for name, field in fields.items()}
    user, at, name = values["ssh"].rpartition("@")
    if at and "user" in values:
        raise fields["user"].error(f"must be left out where ssh is {quoted(values['ssh'])}, which names one")
    lines = {name: field.line for name, field in fields.items()}
    if at:
        values["user"], lines["user"] = user, lines["ssh"]
    return Host(**values | {"ssh": name, "lines": lines | {"": value.line}})


def _check_variable(value: Value, name: str) -> None:
    """Whether a hostfile may set environment variable `name`."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise value.error(f"must set a variable named with letters, digits and _, not {quoted(name)}")
    if name in LAUNCHER_VARIABLES:
        raise value.error(f"must not set {name}: the launcher does")
    if name.startswith("M3DIST_") and name not in USER_VARIABLES:
        raise value.error(f"must not set {name}; of these variables, only {', '.join(USER_VARIABLES)}")


# A leading - would be an option to ssh, and white space or a control character is never part of a name.
WORD = re.compile(r"[^\s/@-][^\s/@]*")
DESTINATION = re.compile(f"({WORD.pattern}@)?{WORD.pattern}")


def _name(value: Value, allowed: str, pattern: re.Pattern[str] = WORD) -> str:
    text = value.text(allowed)
    if not pattern.fullmatch(text) or not text.isprintable():
        raise value.must_be(allowed)
    return text


def _ssh(value: Value) -> str:
    return _name(value, "a name that ssh knows, such as mac1.local or me@mac1.local", DESTINATION)


def _user(value: Value) -> str:
    return _name(value, "a user's name, without spaces, / and @, that does not begin with -")


def _ips(value: Value) -> tuple[str, ...]:
    return tuple(_ip(item) for item in value.items("a list of IPv4 addresses"))


def _ip(value: Value) -> str:
    """A numeric IPv4 address: the ring knows no IPv6 and no names."""
    allowed = "an IPv4 address of this host in numbers, such as 192.168.1.11"
    try:
        address = ipaddress.IPv4Address(value.text(allowed))
    except ValueError:
        raise value.must_be(allowed) from None
    if address.is_unspecified or address.is_multicast or address.is_reserved:
        raise value.must_be(allowed)
    return str(address)


def _rdma(value: Value) -> tuple[Any, ...]:
    return tuple(_wires(item) for item in value.items("a list with a device towards each host, null towards itself"))


def _wires(value: Value) -> str | tuple[str, ...] | None:
    """The RDMA device towards one host, several for several cables, None for no cable."""
    device = 'a device such as "rdma_en2", a list of devices, or null'
    if isinstance(value.node, yaml.SequenceNode) and value.node.value:
        return tuple(_name(item, 'a device such as "rdma_en2"') for item in value.items(device))
    if isinstance(value.node, yaml.ScalarNode) and value.node.style is None and value.node.value == "null":
        return None
    return _name(value, device)


def _path(value: Value) -> str:
    """Anything in one line: spaces, quotes and ; are data."""
    text = value.text("a path")
    if not text or "\n" in text:
        raise value.must_be("a path, in one line")
    return text


PYTHON = re.compile(r"~?/.*|[^-/\n][^/\n]*")
PYTHONS = "an absolute path, a path that begins with ~/, or a command such as python3"


def _python(value: Value) -> str:
    path = _path(value)
    if not PYTHON.fullmatch(path):
        raise value.must_be(PYTHONS)
    return path


def _env(value: Value) -> dict[str, str]:
    members = value.members("a mapping, NAME: value")
    for name, member in members.items():
        _check_variable(member, name)
    return {name: member.text() for name, member in members.items()}


def _memory(value: Value) -> float:
    allowed = f"a number of GB, more than 0 and at most {LARGEST_MEMORY:.0f}, such as 512 or 191.5"
    if not isinstance(value.node, yaml.ScalarNode) or value.node.style is not None:
        raise value.must_be(allowed)
    text = value.node.value
    if not re.fullmatch(r"(0|[1-9][0-9]*)(\.[0-9]+)?", text) or not 0 < float(text) <= LARGEST_MEMORY:
        raise value.must_be(allowed)
    return float(text)


_FIELDS: dict[str, Callable[[Value], Any]] = {
    "ssh": _ssh,
    "ips": _ips,
    "rdma": _rdma,
    "user": _user,
    "port": lambda value: value.whole(1, 65535),
    "python": _python,
    "cwd": _path,
    "env": _env,
    "memory_gb": _memory,
    "ranks": lambda value: value.whole(1, MAX_RANKS),
}


# ---------------------------------------------------------------------------------------------------------------------
# MPI hostfiles

MPI_HOST = re.compile(r"(?:(?P<user>[^@:/^+-][^@:/]*)@)?(?P<ssh>[^@:/^+-][^@:/]*)(?::(?P<slots>.*))?")
AS_MPI = " (read as an MPI hostfile: it does not begin as JSON or YAML do)"


def _from_mpi(path: str, text: str) -> tuple[Host, ...]:
    """Open MPI's and MPICH's lines. A host without a number has one slot, as in MPICH."""
    hosts = []
    for number, line in enumerate(text.split("\n"), 1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if words:
            hosts.append(_mpi_host(f"{path} line {number}", words, {"": number}))
    return tuple(hosts)


def _mpi_host(where: str, words: list[str], lines: dict[str, int]) -> Host:
    """One line. Slots are ranks here; max_slots counts where slots is missing, as in Open MPI."""
    match = MPI_HOST.fullmatch(words[0])
    if not match or not words[0].isprintable():
        raise HostfileError(f"{where}: must begin with host, user@host or host:slots, not {quoted(words[0])}{AS_MPI}")
    slots: dict[str, int] = {}
    settings = [("slots", match["slots"])] if match["slots"] is not None else []
    for word in words[1:]:
        name, equals, value = word.partition("=")
        name = {"max-slots": "max_slots", "slots_max": "max_slots", "slots-max": "max_slots"}.get(name, name)
        if name not in ("slots", "max_slots") or not equals:
            raise HostfileError(f"{where}: {quoted(word)} is unknown; allowed are slots=N and max_slots=N{AS_MPI}")
        settings.append((name, value))
    for name, value in settings:
        high = MAX_RANKS if name == "slots" else 10**6
        if name in slots:
            raise HostfileError(f"{where}: {name} is given twice; one must go")
        if not re.fullmatch("[1-9][0-9]{0,6}", value) or int(value) > high:
            allowed = f"a whole number from 1 to {high}"
            raise HostfileError(f"{where}: {name} must be {allowed}, not {quoted(value)}{AS_MPI}")
        slots[name] = int(value)
    ranks = slots.get("slots", slots.get("max_slots", 1))
    if ranks > slots.get("max_slots", ranks):
        raise HostfileError(f"{where}: max_slots must be at least slots, {ranks}, not {slots['max_slots']}")
    return Host(match["ssh"], user=match["user"], ranks=ranks, lines=lines)


# ---------------------------------------------------------------------------------------------------------------------
# Hosts with each other, and with the backend


def _checked(hostfile: Hostfile) -> Hostfile:
    """The hostfile itself. Raises HostfileError where its hosts cannot be one job's."""
    for i, world in enumerate(accumulate(host.ranks for host in hostfile.hosts)):
        if world > MAX_RANKS:
            raise hostfile.error(i, "ranks", f"makes {world} in all; at most {MAX_RANKS} can share a model")
    machines = {"" if host.local else host.ssh for host in hostfile.hosts}
    for i, host in enumerate(hostfile.hosts):
        if host.local and (host.user or host.port):
            name = "user" if host.user else "port"
            problem = f"is for ssh, and {host.ssh} means this machine, without ssh; leave it out, or name the host"
            raise hostfile.error(i, name, problem)
        loopback = [ip for ip in host.ips if ipaddress.IPv4Address(ip).is_loopback]
        if loopback and len(machines) > 1:
            problem = f"has {loopback[0]}, which is each machine's own; give the address where others reach this one"
            raise hostfile.error(i, "ips", problem)
    return hostfile.with_backend(hostfile.backend) if hostfile.backend else hostfile


def _check_needs(hostfile: Hostfile, backend: str) -> None:
    """What mlx.launch asks of a hostfile: its launch_ring, launch_jaccl and launch_nccl."""
    jaccl = backend in ("jaccl", "jaccl-ring")
    if (jaccl or backend == "nccl") and not hostfile.hosts[0].ips:
        raise hostfile.error(0, "ips", f"is missing: {backend} needs an IPv4 address where the others reach rank 0")
    for i, host in enumerate(hostfile.hosts):
        if backend == "ring" and not host.ips and hostfile.world > 1:
            raise hostfile.error(i, "ips", f"is missing: the ring needs an IPv4 address of {host.ssh}")
        if jaccl:
            _check_rdma(hostfile, backend, i)


def _check_rdma(hostfile: Hostfile, backend: str, i: int) -> None:
    """Host number i: a device towards every other host, or to its two neighbours, and null towards itself."""
    host, count = hostfile.hosts[i], len(hostfile.hosts)
    if host.ranks != 1:
        raise hostfile.error(i, "ranks", f"must be 1: {backend} has one rank a host, not {host.ranks}")
    if len(host.rdma) != count:
        problem = f"must have {count} entries for {backend}, one towards each host, not {len(host.rdma)}"
        raise hostfile.error(i, "rdma", problem)
    if host.rdma[i] is not None:
        raise hostfile.error(i, f"rdma[{i}]", "must be null: a host has no device towards itself")
    peers = {(i - 1) % count, (i + 1) % count} if backend == "jaccl-ring" else set(range(count))
    for peer in sorted(peers - {i}):
        if host.rdma[peer] is None:
            problem = f"must be a device of {host.ssh} towards {hostfile.hosts[peer].ssh}, not null"
            raise hostfile.error(i, f"rdma[{peer}]", problem)
