"""Which hostfiles could be written for some hosts, decided from their reports alone. Pure. No MLX.

Thunderbolt is read as mlx.distributed_config reads it (mlx/_distributed_utils/config.py). **Not tried on a Mac.**
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Interface, IPv4Network
from typing import Any

from m3dist.cluster.hostfile import Host, Hostfile
from m3dist.doctor.examination import Examination
from m3dist.doctor.findings_thunderbolt import thunderbolt_findings
from m3dist.doctor.report import LINK_LOCAL, HostReport, Interface
from m3dist.doctor.topology import Cable, cable_addresses, cables, find_ring, free_networks, is_mesh

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Candidate:
    """A hostfile that could be written, and in a few words, over what."""

    hostfile: Hostfile
    over: str


@dataclass(frozen=True)
class Proposal:
    """Candidates, the best first; `notes` say what kept better ones from being among them, and what to do."""

    candidates: Sequence[Candidate]
    notes: Sequence[str]


def _candidate(backend: str, hosts: Iterable[Host], over: str) -> Candidate:
    return Candidate(Hostfile("", backend, {}, tuple(hosts)), over)


class Impossible(Exception):
    """A kind of hostfile cannot be written; says why, and what to do."""


Attempt = Callable[["Fabric", str], list[Candidate]]  # raises Impossible


@dataclass(frozen=True)
class Fabric:
    """The hosts, and what joins them."""

    hosts: Sequence[Host]
    reports: Sequence[HostReport]

    @cached_property
    def cabled(self) -> Mapping[tuple[int, int], list[Cable]]:
        return cables(self.reports)

    def networks(self) -> "list[Network]":
        """Those on which all hosts are, the best first. Raises Impossible where there is none."""
        found = sorted(_networks(self.reports), key=lambda network: (network.wifi, -network.speed))
        if not found:
            raise Impossible("no network has an address of every host: connect them, or ask `m3dist doctor`")
        return found

    def ring(self) -> list[int]:
        """The order in which cables form a ring. Raises Impossible."""
        order = find_ring(len(self.hosts), self.cabled) if self.cabled else None
        if order is None:
            raise Impossible("the Thunderbolt cables do not form a ring of all hosts")
        return order


def propose(hosts: Sequence[Host], reports: Sequence[HostReport], backend: str | None = None) -> Proposal:
    """What could be written over `backend`, or where that is None, over any; the order of the hosts may change.

    jaccl comes before the ring, and Thunderbolt before Ethernet before Wi-Fi.
    """
    fabric = Fabric(hosts, reports)
    attempts: Sequence[tuple[str, Attempt]] = [("ring", _thunderbolt), ("ring", _ring)]
    if backend == "mpi":
        attempts = [("mpi", _ring)]
    elif backend in ("jaccl", "jaccl-ring"):
        attempts = [(backend, _jaccl)]
    elif backend is None:  # who has no cables wants no advice on them
        attempts = [("jaccl", _jaccl), ("jaccl-ring", _jaccl), *attempts] if fabric.cabled else [("ring", _ring)]
    found: list[Candidate] = []
    notes: dict[str, str] = {}  # by what they say
    for name, attempt in attempts:
        try:
            found += attempt(fabric, name)
        except Impossible as why:
            notes.setdefault(str(why), f"{name}: {why}")
    return Proposal(found, list(notes.values()))


# ---------------------------------------------------------------------------------------------------------------------
# Networks of all hosts


@dataclass(frozen=True)
class Network:
    """A network on which every host has an address of its own."""

    network: IPv4Network
    addresses: tuple[str, ...]  # in the order of the hosts
    speed: int  # Mbit/s of the slowest; 0 is not known
    wifi: bool  # for at least one host

    def __str__(self) -> str:
        rate = f"{self.speed / 1000:g} Gbit/s " if self.speed else ""
        return f"{rate}{'Wi-Fi' if self.wifi else 'Ethernet'} ({self.network})"


def _networks(reports: Sequence[HostReport]) -> Iterator[Network]:
    for network in dict.fromkeys(own.network for _, own in _places(reports[0])):
        ways = [max(_on(network, report), key=_preference, default=None) for report in reports]
        found = [way for way in ways if way]
        addresses = tuple(str(own.ip) for _, own in found)
        if len(set(addresses)) == len(reports):
            speed = min(interface.speed or 0 for interface, _ in found)
            yield Network(network, addresses, speed, any(interface.kind == "wifi" for interface, _ in found))


def _places(report: HostReport) -> Iterator[tuple[Interface, IPv4Interface]]:
    """Where others could reach a host without a cable of their own to it."""
    for interface in report.interfaces.values():
        if interface.kind in ("ethernet", "wifi") and interface.active:
            yield from ((interface, own) for own in interface.addresses if own.ip not in LINK_LOCAL)


def _on(network: IPv4Network, report: HostReport) -> list[tuple[Interface, IPv4Interface]]:
    return [(interface, own) for interface, own in _places(report) if own.network == network]


def _preference(place: tuple[Interface, IPv4Interface]) -> tuple[bool, int]:
    return place[0].kind == "ethernet", place[0].speed or 0


def _ring(fabric: Fabric, backend: str) -> list[Candidate]:
    """The ring, or MPI, over each common network. Raises Impossible."""
    if all(host.local for host in fabric.hosts):
        alone = (replace(host, ips=(LOOPBACK,)) for host in fabric.hosts)
        return [_candidate(backend, alone, "this machine alone")]
    found = []
    for network in fabric.networks():
        hosts = (replace(host, ips=(ip,)) for host, ip in zip(fabric.hosts, network.addresses))
        found.append(_candidate(backend, hosts, str(network)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Thunderbolt


def _thunderbolt(fabric: Fabric, _: str) -> list[Candidate]:
    """The ring over cables: a rank listens at the cable to the one before it. Two cables are two connections, except
    in a bridge, whose address they share. All ranks have equally many, as MLX demands.

    Raises Impossible.
    """
    order = fabric.ring()
    pairs = [(order[i - 1], order[i]) for i in range(len(order))]
    wires = min(len(fabric.cabled[pair]) for pair in pairs)
    ips: dict[int, tuple[str, ...]] = {}
    for pair in pairs:
        found = [_far_address(fabric, pair, cable) for cable in fabric.cabled[pair][:wires]]
        if None in found:
            raise Impossible(_commands(fabric, pairs))
        ips[pair[1]] = tuple(ip for ip in dict.fromkeys(found) if ip)
    equal = min(map(len, ips.values()))
    return [_candidate("ring", (replace(fabric.hosts[i], ips=ips[i][:equal]) for i in order), "Thunderbolt")]


def _far_address(fabric: Fabric, pair: tuple[int, int], cable: Cable) -> str | None:
    """The address at the far end of a cable, on a network of both; a self-assigned one only where it is unambiguous."""
    here, there = (fabric.reports[number] for number in pair)
    ends = cable_addresses(cable, here, there)
    if ends is None or (ends[0].ip in LINK_LOCAL and (_self_assigned(here) > 1 or _self_assigned(there) > 1)):
        return None
    return str(ends[1].ip)


def _self_assigned(report: HostReport) -> int:
    """How many interfaces share the network of self-assigned addresses: what is sent there leaves by one of them."""
    return sum(any(own.ip in LINK_LOCAL for own in each.addresses) for each in report.interfaces.values())


def _commands(fabric: Fabric, pairs: Sequence[tuple[int, int]]) -> str:
    """How to give the ends of all cables addresses, as mlx.distributed_config does; lost with a restart."""
    free = free_networks(fabric.reports)
    lines = ["the cables form a ring, but their ends have no addresses on networks of their own. Run this, and again:"]
    for pair in {tuple(sorted(pair)): pair for pair in pairs}.values():
        for cable in fabric.cabled[pair]:
            network = next(free)
            near, far = network.hosts()
            for number, port, own, peer in ((pair[0], cable.here, near, far), (pair[1], cable.there, far, near)):
                bridge = fabric.reports[number].bridge_of(port.interface or "")
                steps = [f"ifconfig {bridge.name} deletem {port.interface}"] if bridge else []
                steps.append(f"ifconfig {port.interface} inet {own} netmask {network.netmask}")
                steps.append(f"route change {peer} -interface {port.interface}")
                lines.append(f"    on {fabric.hosts[number].ssh}: " + "; ".join(f"sudo {step}" for step in steps))
    return "\n".join(lines)


def _jaccl(fabric: Fabric, backend: str) -> list[Candidate]:
    """jaccl over cables between all Macs, or jaccl-ring over a ring of them; the ranks meet elsewhere.

    Raises Impossible.
    """
    count = len(fabric.hosts)
    if count < 2:
        raise Impossible("it joins two Macs or more")
    without = [host.ssh for host, report in zip(fabric.hosts, fabric.reports) if not report.devices]
    if without:
        raise Impossible(f"{', '.join(without)} has no RDMA device; m3dist doctor --backend {backend} says why")
    if backend == "jaccl" and not is_mesh(count, fabric.cabled):
        pairs = [(j, i) for i in range(count) for j in range(i) if (i, j) not in fabric.cabled]
        missing = "; ".join(f"{fabric.hosts[i].ssh} and {fabric.hosts[j].ssh}" for i, j in pairs)
        raise Impossible(f"it needs a cable between any two Macs, and finds none between {missing}")
    order = list(range(count)) if backend == "jaccl" else fabric.ring()
    meet = fabric.networks()[0]
    rows = _devices(fabric, order, whole=backend == "jaccl")
    hosts = (replace(fabric.hosts[i], ips=(meet.addresses[i],), rdma=tuple(row)) for i, row in zip(order, rows))
    found = _candidate(backend, hosts, f"Thunderbolt RDMA; its ranks meet on {meet}")
    seen = Examination(found.hostfile, backend, [fabric.reports[i] for i in order], {})
    errors = [finding for finding in thunderbolt_findings(seen) if finding.level == "error"]
    if errors:  # as --check would say of the file
        raise Impossible("\n    ".join(f"{error.host}: {error.seen}; {error.remedy}" for error in errors))
    return [found]


def _devices(fabric: Fabric, order: Sequence[int], whole: bool) -> list[list[Any]]:
    """For each Mac its device towards each, in `order`, or of a ring, towards its two neighbours; null to the others.

    Several devices where all have several cables. Raises Impossible where a cable's port has no device.
    """
    count = len(order)
    beside = [
        (i, j) for i in range(count) for j in range(count) if i != j and (whole or (i - j) % count in (1, count - 1))
    ]
    wires = min(len(fabric.cabled[order[i], order[j]]) for i, j in beside)
    rows: list[list[Any]] = [[None] * count for _ in order]
    for i, j in beside:
        names = tuple(f"rdma_{cable.here.interface}" for cable in fabric.cabled[order[i], order[j]][:wires])
        for name in names:
            if name not in fabric.reports[order[i]].devices:
                raise Impossible(f"{fabric.hosts[order[i]].ssh} has a cable, but no device {name}: use another port")
        rows[i][j] = names if wires > 1 else names[0]
    return rows
