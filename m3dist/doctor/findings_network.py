"""What `m3dist doctor` makes of addresses and measured links. Pure. No MLX."""

from collections.abc import Iterator
from ipaddress import IPv4Address

from m3dist.doctor.examination import Examination, Finding, Look
from m3dist.doctor.report import LINK_LOCAL, HostReport, NoAnswer
from m3dist.doctor.survey import Measured
from m3dist.doctor.topology import Link, cables, needed_links

SLOW_TRIP = 1e-3  # seconds; 0.3 ms is usual over Thunderbolt (jeffgeerling.com 2025-12), Wi-Fi needs 5 and more
SLOW_CABLE = 1e9  # bytes/s over Thunderbolt; 26 Gbit/s are reported of Thunderbolt 5 (exo #2117)
SLOW = 100e6  # bytes/s; a little less than Gigabit Ethernet
SUMS = 120  # in a token of MiniMax-M3, two in each of 60 layers; half where each rank has the whole attention
NEW_HOSTFILE = "`m3dist hostfile --hosts ...` writes a hostfile from what the hosts have now"


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


def address_findings(seen: Examination) -> Iterator[Finding]:
    """Whether the hostfile's addresses are the hosts' own, each one's alone, and on the interfaces one would want."""
    links = needed_links(seen.backend, seen.hosts, seen.reports)
    needed = {(link.target, link.address) for link in links}
    for number, report in seen.reached():
        for ip in seen.hosts[number].ips:
            yield Finding("addresses", seen.names[number], *_presence(seen, report, ip, (number, ip) in needed))
    yield from _shared(seen)
    if seen.backend == "ring":
        for link in links:
            yield from (Finding("cables", seen.names[link.target], *look) for look in _place(seen, link))


def _presence(seen: Examination, report: HostReport, ip: str, needed: bool) -> Look:
    """Whether the host has the address, and on what."""
    level, problem, interface = "error" if needed else "warning", report.raw["addresses"][ip], report.interface_of(ip)
    if problem == "EADDRNOTAVAIL":
        others = [f"; it is {seen.names[i]}'s" for i, other in seen.reached() if other.interface_of(ip)]
        what = f"{ip} is no address of this host{others[0] if others else ''}. It has {_own(report) or 'none'}"
        return Look(level, what, f"correct ips; {NEW_HOSTFILE}")
    if problem:
        return Look(level, f"nothing can listen on {ip}: {problem}", f"correct ips; {NEW_HOSTFILE}")
    if interface is None:
        return Look("ok", f"{ip} is its own")
    if interface.kind == "wifi" and seen.sums_over_tcp:
        what = f"{ip} is on {interface.name}, which is Wi-Fi: every token waits for it"
        return Look("warning", what, f"connect the hosts with a cable, Thunderbolt best; then {NEW_HOSTFILE}")
    if IPv4Address(ip) in LINK_LOCAL:
        what = f"{ip} on {interface.name} is self-assigned: it changes when cables or Macs are restarted"
        return Look("note", what, "give both ends of the cable fixed addresses; `m3dist hostfile` proposes some")
    return Look("ok", f"{ip} on {interface.name} ({interface.kind})")


def _own(report: HostReport) -> str:
    """ "192.168.0.1 (en3)", for each address that others could reach."""
    outside = [each for each in report.interfaces.values() if each.kind not in ("loopback", "virtual")]
    return ", ".join(f"{own.ip} ({each.name})" for each in outside for own in each.addresses)


def _shared(seen: Examination) -> Iterator[Finding]:
    """An address that two hosts have: both may be one machine under two names."""
    owners: dict[str, tuple[int, HostReport]] = {}
    for number, report in seen.reached():
        for ip in seen.hosts[number].ips:
            if report.raw["addresses"][ip] is not None:
                continue
            other, first = owners.setdefault(ip, (number, report))
            if not seen.apart(other, number):
                continue
            what, advice = f"{ip} is an address of {seen.names[other]} too", "give each host addresses of its own"
            if first.raw["hostname"] == report.raw["hostname"]:
                what, advice = f"is the same machine as {seen.names[other]}", "give it one entry, with `ranks`"
            yield Finding("addresses", seen.names[number], "error", what, advice)


def _place(seen: Examination, link: Link) -> Iterator[Look]:
    """Whether a ring's address is at the cable from the host that connects to it: cables and addresses move.

    Where the link was measured to work all the same, a job would.
    """
    here, there = seen.first(link.source), seen.first(link.target)  # cables have machines at their ends, not entries
    source, target = seen.reports[here], seen.reports[there]
    if here == there or isinstance(source, NoAnswer) or isinstance(target, NoAnswer):
        return
    interface = target.interface_of(link.address)
    if interface is None:
        return
    cabled, peer = cables(seen.reports), seen.names[link.source]
    port = next((port for port in target.ports if port.interface == interface.name), None)
    leads = [end[1] for end, ends in cabled.items() if end[0] == there and any(c.here == port for c in ends)]
    networks = {own.network for each in source.interfaces.values() for own in each.addresses}
    level = "warning" if any(each.link == link and each.works for each in seen.measured) else "error"
    if port and leads and leads[0] != here:
        what = f"{link.address} is on {interface.name}, whose cable leads to {seen.names[leads[0]]}, not to {peer}"
        yield Look(level, what, f"swap the cables or the addresses; or {NEW_HOSTFILE}")
    elif port and not port.peer:
        yield Look(level, f"no Mac is at the cable of {interface.name}, which has {link.address}", NEW_HOSTFILE)
    elif interface.kind in ("ethernet", "wifi") and (here, there) in cabled:
        what = f"a Thunderbolt cable leads to {peer}, but {link.address} is on {interface.name}"
        yield Look("note", what, NEW_HOSTFILE)
    elif not any(own.network in networks for own in interface.addresses if str(own.ip) == link.address):
        what = f"{peer} has no address on the network of {link.address}: what it sends goes through a router"
        yield Look("warning", what, "give both an address on one network")


# ---------------------------------------------------------------------------------------------------------------------
# Links


def link_findings(seen: Examination) -> Iterator[Finding]:
    """Each measured link, and what all cost a token."""
    for measured in seen.measured:
        where = f"{seen.names[measured.link.source]} -> {seen.names[measured.link.target]}"
        yield Finding("links", where, *(_speed(seen, measured) if measured.works else _failure(seen, measured)))
    if seen.backend == "ring":
        yield from (Finding("links", "all", *look) for look in _cost(seen))


def _cost(seen: Examination) -> Iterator[Look]:
    """What the ring's sums take. Several addresses of a host are used at once: the slowest counts."""
    around: dict[tuple[int, int], float] = {}
    for measured in seen.measured:
        ends = (measured.link.source, measured.link.target)
        if measured.round_trip and seen.apart(*ends):
            around[ends] = max(around.get(ends, 0.0), measured.round_trip)
    if around:
        # A sum passes 2 (world - 1) hops of half a round trip, one after the other, around the ring.
        world, sums = seen.hostfile.world, SUMS // (2 if seen.plan and seen.plan.attention == "replicated" else 1)
        cost = sums * sum(around.values()) * (world - 1) / world
        what = f"the {sums} sums of a token of MiniMax-M3 take {cost * 1e3:.1f} ms at least over these links"
        yield Look("note", what, "m3dist bench links measures the sums themselves")


def _speed(seen: Examination, measured: Measured) -> Look:
    link, trip, target = measured.link, measured.round_trip or 0.0, seen.reports[measured.link.target]
    interface = target.interface_of(link.address) if isinstance(target, HostReport) else None
    cable = interface is not None and interface.kind in ("thunderbolt", "bridge")
    rate = f", {measured.bandwidth / 1e9:.2g} GB/s" if measured.bandwidth else ""
    found = f"{link.address}: round trip {trip * 1e3:.3f} ms{rate}"
    if not seen.apart(link.source, link.target) or not seen.sums_over_tcp:
        return Look("ok", found)
    if measured.bandwidth and measured.bandwidth < (SLOW_CABLE if cable else SLOW):
        usual = "a Thunderbolt cable does 1 GB/s and more" if cable else "less than Gigabit Ethernet"
        return Look("warning", f"{found}; {usual}", "try another cable or port, and see what else uses the network")
    if trip > SLOW_TRIP:
        advice = "use a cable instead of Wi-Fi, Thunderbolt instead of a busy network"
        return Look("warning", f"{found}; every token waits for many of them", advice)
    return Look("ok", found)


def _failure(seen: Examination, measured: Measured) -> Look:
    """Why a link failed, as its error and both ends suggest."""
    link, problem = measured.link, measured.problem
    source, target = seen.reports[link.source], seen.reports[link.target]
    if isinstance(source, NoAnswer) or isinstance(target, NoAnswer):
        return Look("note", f"{link.address} was not measured: {measured.unmeasured}")
    if problem is None:
        return Look("warning", f"{link.address} was not measured: {measured.unmeasured}", "ask again")
    # An address that the hostfile does not name may be the wrong one.
    level = "error" if link.address in seen.hosts[link.target].ips else "warning"
    if measured.listening:
        return Look(level, f"{link.address} cannot listen: {problem}", f"correct ips; {NEW_HOSTFILE}")
    failed = f"connecting to {link.address} fails: {problem}"
    if problem == "EHOSTUNREACH" and source.mac:
        return Look(level, f"{failed}, although ssh works", _local_network(seen, link))
    if problem == "ETIMEDOUT" and target.firewall:
        advice = "System Settings > Network > Firewall > Options: let Python receive connections"
        return Look(level, f"{failed}; the firewall of {seen.names[link.target]} is on", f"there: {advice}")
    return Look(level, failed, _REMEDIES.get(problem, "see that the hosts reach each other: cable, interface, netmask"))


_REMEDIES = {
    "ECONNREFUSED": "another machine has that address too, or a firewall refuses: give each host its own",
    "another program answers at this address": "another machine has that address too: give each host its own",
    "ETIMEDOUT": "is the link up? Does a firewall on either host, or between them, drop packets?",
}


def _local_network(seen: Examination, link: Link) -> str:
    """macOS's local-network privacy gives EHOSTUNREACH at once, while ssh and ping work (Apple TN3179, mlx #3755).

    What is started over ssh or from Terminal is exempt, but not what tmux, other terminals or launchd agents start.
    """
    if seen.hosts[link.source].local:
        return (
            "System Settings > Privacy & Security > Local Network: allow the program in which you started m3dist "
            "(terminal, tmux, editor), or start from Terminal or over ssh (Apple TN3179)"
        )
    return (
        "there: System Settings > Privacy & Security > Local Network (Apple TN3179); if nothing is switched off, "
        f"`route -n get {link.address}` says whether it leads to the right cable"
    )


def firewall(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """macOS's own."""
    if report.firewall:
        blocks = report.firewall == 2
        what = "macOS's firewall " + ("blocks everything that comes in" if blocks else "is on")
        advice = "if links fail: System Settings > Network > Firewall > Options, let Python receive connections"
        yield Look("warning" if blocks else "note", what, advice)
