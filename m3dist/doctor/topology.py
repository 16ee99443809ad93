"""Who is connected with whom: which links a backend uses, and which Thunderbolt cable leads where. Pure. No MLX."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network

from m3dist.cluster.hostfile import Host
from m3dist.doctor.report import HostReport, Interface, NoAnswer, Port

Reports = Sequence[HostReport | NoAnswer]


@dataclass(frozen=True)
class Link:
    """Host `source` connects to host `target` at `address`. Hosts are numbers, in the hostfile's order."""

    source: int
    target: int
    address: str


@dataclass(frozen=True)
class Cable:
    """A Thunderbolt cable, seen from one end."""

    here: Port
    there: Port


# ---------------------------------------------------------------------------------------------------------------------
# Links


def needed_links(backend: str, hosts: Sequence[Host], reports: Reports) -> list[Link]:
    """The connections that `backend` makes over TCP, each as it makes it.

    A rank of the ring connects to the next one's addresses, the last to the first's. For jaccl and nccl every host
    connects to the first. With MPI any two may talk, wherever they reach each other.
    """
    count = len(hosts)
    if backend == "mpi":
        pairs = [(i, j) for j in range(count) for i in range(j)]
        return [Link(i, j, address) for i, j in pairs if (address := _way(i, j, hosts, reports))]
    if backend != "ring":
        return [Link(i, 0, hosts[0].ips[0]) for i in range(1, count) if hosts[0].ips]
    inside = [Link(i, i, ip) for i, host in enumerate(hosts) if host.ranks > 1 for ip in host.ips]
    around = [Link(i, (i + 1) % count, ip) for i in range(count) for ip in hosts[(i + 1) % count].ips]
    return inside + (around if count > 1 else [])


def _way(source: int, target: int, hosts: Sequence[Host], reports: Reports) -> str | None:
    """An address of host `target` that `source` should reach: the hostfile's, else one on a network of both."""
    if hosts[target].ips:
        return hosts[target].ips[0]
    here, there = reports[source], reports[target]
    if isinstance(here, NoAnswer) or isinstance(there, NoAnswer):
        return None
    networks = {own.network for interface in _wired(here) for own in interface.addresses}
    ways = (own for interface in _wired(there) for own in interface.addresses if own.network in networks)
    return next((str(own.ip) for own in ways), None)


def _wired(report: HostReport) -> Iterator[Interface]:
    """The interfaces that could lead to another host, the likeliest first."""
    for kind in ("thunderbolt", "bridge", "ethernet", "wifi"):
        yield from (each for each in report.interfaces.values() if each.kind == kind and each.active)


def rounds(links: Sequence[Link], machine: Sequence[object]) -> list[list[Link]]:
    """The links in groups that can be measured at once: in none of them has a machine more than one link.

    `machine` says for each host which machine it is on.
    """
    groups: list[tuple[set[object], list[Link]]] = []
    for link in links:
        both = {machine[link.source], machine[link.target]}
        for busy, group in groups:
            if not busy & both:
                busy |= both
                group.append(link)
                break
        else:
            groups.append((set(both), [link]))
    return [group for _, group in groups]


# ---------------------------------------------------------------------------------------------------------------------
# Cables


def cables(reports: Reports) -> dict[tuple[int, int], list[Cable]]:
    """(host, other host) -> the cables from the one to the other, in the order of the one's ports.

    Cables are numbered alike from both ends: the k-th of (i, j) is the k-th of (j, i).
    """
    place: dict[str, tuple[int, Port]] = {}
    for number, report in enumerate(reports):
        for port in () if isinstance(report, NoAnswer) else report.ports:
            place.setdefault(port.domain, (number, port))
    found: dict[tuple[int, int], list[Cable]] = {}
    for number, port in sorted(place.values(), key=lambda entry: (entry[0], entry[1].receptacle)):
        if port.peer in place:
            other, there = place[port.peer]
            if number < other:
                found.setdefault((number, other), []).append(Cable(port, there))
                found.setdefault((other, number), []).append(Cable(there, port))
    return found


def is_mesh(count: int, cabled: Mapping[tuple[int, int], list[Cable]]) -> bool:
    """Whether each host has a cable to each other."""
    return all((i, j) in cabled for i in range(count) for j in range(i))


def find_ring(count: int, cabled: Mapping[tuple[int, int], list[Cable]]) -> list[int] | None:
    """An order of all hosts, the first one first, in which each has a cable to the next, and the last to the first."""

    def extend(path: list[int]) -> list[int] | None:
        if len(path) == count:
            return path if count == 2 or (path[-1], path[0]) in cabled else None
        for other in range(count):
            if other not in path and (path[-1], other) in cabled:
                if whole := extend([*path, other]):
                    return whole
        return None

    return extend([0])


def cable_addresses(cable: Cable, here: HostReport, there: HostReport) -> tuple[IPv4Interface, IPv4Interface] | None:
    """An address of each end of a cable, on one network; those of the Thunderbolt Bridge where it holds the ports."""
    for ours in _addresses(cable.here, here):
        for theirs in _addresses(cable.there, there):
            if ours.network == theirs.network and ours.ip != theirs.ip:
                return ours, theirs
    return None


def _addresses(port: Port, report: HostReport) -> tuple[IPv4Interface, ...]:
    interface = report.interfaces.get(port.interface or "")
    bridge = report.bridge_of(port.interface or "")
    return (interface.addresses if interface else ()) + (bridge.addresses if bridge else ())


def free_networks(reports: Reports) -> Iterator[IPv4Network]:
    """Networks for the two ends of a cable that nobody has yet, from where mlx.distributed_config takes its own."""
    taken = [
        own.network
        for report in reports
        if isinstance(report, HostReport)
        for interface in report.interfaces.values()
        for own in interface.addresses
    ]
    for network in IPv4Network("192.168.0.0/16").subnets(new_prefix=30):
        if not any(network.overlaps(other) for other in taken):
            yield network
