"""What `m3dist doctor` makes of Thunderbolt cables and RDMA devices. Pure. **Not tried on a Mac.** No MLX.

Of these, users of mlx, exo and omlx have reported most: mlx #3207, #3467, #3777, #4191, omlx #3037, exo #1543, #1881.
"""

from collections.abc import Iterator

from m3dist.doctor.examination import Examination, Finding, Look
from m3dist.doctor.report import Device, HostReport
from m3dist.doctor.topology import Cable, cables, find_ring
from m3dist.machines import LARGEST_MESH

TIMED_OUT = 124  # as probe.run says it
OLDEST_RDMA, LARGE_FRAMES = (26, 2), (26, 3)  # macOS
NEW_HOSTFILE = "`m3dist hostfile --hosts ... --backend jaccl` finds the devices"
USE_RING = "use the ring (TCP) over the same cables: `m3dist hostfile --hosts ... --backend ring`"
RECOVERY = "restart that Mac into Recovery, open Terminal there, run `rdma_ctl enable`, and restart"


def thunderbolt_findings(seen: Examination) -> Iterator[Finding]:
    """For jaccl, each Mac's devices as the hostfile has them; always, cables that are slow or form a circle."""
    if seen.backend.startswith("jaccl"):
        for number, report in seen.reached():
            look_at = _rdma if report.mac else _elsewhere
            yield from (Finding("rdma", seen.names[number], *look) for look in look_at(seen, number, report))
        yield from (Finding("rdma", "all", *look) for look in _mesh(seen))
    yield from _slow_cables(seen)
    yield from (Finding("cables", "all", *look) for look in _circle(seen))


def _mesh(seen: Examination) -> Iterator[Look]:
    """All Macs together. jaccl sends frames of 4 KB on macOS before 26.3, larger ones since."""
    if seen.backend == "jaccl" and len(seen.hosts) > LARGEST_MESH:
        what = f"jaccl joins {LARGEST_MESH} Macs at most, not {len(seen.hosts)}"
        yield Look("error", what, "use jaccl-ring, or the ring")
    if len({report.macos >= LARGE_FRAMES for _, report in seen.reached() if report.macos}) > 1:
        what = "some Macs have macOS 26.3 or newer and some do not: jaccl's frames differ in size"
        yield Look("warning", what, "bring all Macs to the same macOS")


def _rdma(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """Whether a Mac can do RDMA at all; and if so, each device that the hostfile gives it."""
    late = [name for name in ("thunderbolt", "ibv_devices", "ibv_devinfo") if report.status(name) == TIMED_OUT]
    if late:
        what = f"cables and devices could not be read: no answer in time ({', '.join(late)})"
        yield Look("warning", what, "ask again")
    if report.macos and report.macos < OLDEST_RDMA:
        yield Look("error", f"{report.system} has no RDMA over Thunderbolt", f"update to macOS 26.2, or {USE_RING}")
    elif report.thunderbolt_5 is False:
        # `rdma_ctl enable` succeeds there too, and changes nothing (mlx #3777, omlx #3037).
        most = max(port.speed or 0 for port in report.ports)
        yield Look("error", f"its ports are Thunderbolt 4 or older ({most} Gb/s): RDMA needs Thunderbolt 5", USE_RING)
    elif report.rdma_enabled is False:
        yield Look("error", "`rdma_ctl status` says disabled", RECOVERY)
    elif not report.devices and not late:
        what = f"`rdma_ctl status` says {report.out('rdma_ctl').strip() or 'nothing'}, `ibv_devices` lists no device"
        yield Look("error", what, f"{RECOVERY}; after an update of macOS perhaps again; or {USE_RING}")
    elif report.devices:
        for other, name in _named(seen, number):
            yield _device(seen, number, other, report, name)


def _elsewhere(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """Not a Mac: whether the devices are there; nothing is known of how jaccl would do there."""
    if report.status("ibv_devices") != 0:
        said = report.raw["outputs"].get("ibv_devices", {}).get("error", "").strip() or "nothing"
        what = f"its RDMA devices could not be read: `ibv_devices` says {said}"
        yield Look("warning", what, "install it there (Debian: ibverbs-utils), and ask again")
        return
    for other, name in _named(seen, number):
        yield _missing(seen, other, report, name) or Look("ok", f"{name} towards {seen.names[other]} exists")


def _named(seen: Examination, number: int) -> Iterator[tuple[int, str]]:
    """The devices that the hostfile gives a host, and the host that each is towards."""
    for other, wires in enumerate(seen.hosts[number].rdma):
        for name in () if wires is None else (wires,) if isinstance(wires, str) else wires:
            yield other, name


# ---------------------------------------------------------------------------------------------------------------------
# The hostfile's devices


def _device(seen: Examination, number: int, other: int, report: HostReport, name: str) -> Look:
    """Whether a device is there, at the right cable, up, and has an address."""
    if missing := _missing(seen, other, report, name):
        return missing
    device, towards = report.devices[name], f"towards {seen.names[other]}"
    cabled = cables(seen.reports)
    leads = [end[1] for end, ends in cabled.items() if end[0] == seen.first(number) and _is_at(ends, device)]
    if leads and leads[0] != seen.first(other):
        what = f"the cable at {name} leads to {seen.names[leads[0]]}, not {towards}"
        return Look("error", what, NEW_HOSTFILE)
    if device.active is False:
        return Look("error", f"{name} {towards} is down", _why_down(report, device))
    return _address(report, device, towards)


def _missing(seen: Examination, other: int, report: HostReport, name: str) -> Look | None:
    if name in report.devices:
        return None
    there = f"there are {', '.join(report.devices)}: names change with restarts" if report.devices else "there is none"
    return Look("error", f"{name} towards {seen.names[other]} does not exist; {there}", NEW_HOSTFILE)


def _is_at(ends: list[Cable], device: Device) -> bool:
    return any(cable.here.interface == device.interface for cable in ends)


def _why_down(report: HostReport, device: Device) -> str:
    port = next((port for port in report.ports if port.interface == device.interface), None)
    if port is None or port.peer is None:
        return "no Mac is at the other end of its cable: plug one in, with a cable for Thunderbolt 5"
    if not port.peer_offers_rdma:
        return f"the Mac at the other end offers no RDMA: {RECOVERY.replace('that Mac', 'that one')}"
    return (
        "take the cable out and in again, and restart both Macs after a crash; a Mac Studio's port next to Ethernet "
        "(en2) does no RDMA: use another"
    )


def _address(report: HostReport, device: Device, towards: str) -> Look:
    """jaccl names a device by its IPv4 address; where it has none: errno 22 (mlx #3467, #4191).

    The Thunderbolt Bridge takes the address, but not if the port is given one of its own.
    """
    interface, bridge = report.interfaces.get(device.interface), report.bridge_of(device.interface)
    found = bool(interface and interface.addresses)
    if device.addresses is not None:
        found = any(gid.lower().startswith("::ffff:") for gid in device.addresses)
    held = f"; the Thunderbolt Bridge {bridge.name} holds its port" if bridge else ""
    if found:
        up = "is up and " if device.active else ""  # or not known
        return Look("note" if bridge else "ok", f"{device.name} {towards} {up}has an IPv4 address{held}")
    release = f"sudo ifconfig {bridge.name} deletem {device.interface}; " if bridge else ""
    give = f"sudo ifconfig {device.interface} inet 169.254.0.1 netmask 255.255.0.0 alias"
    what = f"{device.name} {towards} has no IPv4 address{held}: jaccl would fail with errno 22"
    return Look("error", what, f"there: {release}{give} (with another last number on each Mac)")


# ---------------------------------------------------------------------------------------------------------------------
# Cables


def _slow_cables(seen: Examination) -> Iterator[Finding]:
    """Thunderbolt 5 at both ends, and less between them (exo #1881)."""
    for (i, j), ends in cables(seen.reports).items():
        fast = all(isinstance(end, HostReport) and end.thunderbolt_5 for end in (seen.reports[i], seen.reports[j]))
        for cable in ends if i < j and fast else ():
            if 0 < (cable.here.speed or 0) <= 40:
                what = f"the cable at {cable.here.interface} runs at {cable.here.speed} Gb/s, both ends could do 80"
                where = f"{seen.names[i]} -> {seen.names[j]}"
                yield Finding("cables", where, "warning", what, "use a cable made for Thunderbolt 5")


def _circle(seen: Examination) -> Iterator[Look]:
    """Bridges pass frames on: around a circle of cables they never end."""
    bridged = [
        number
        for number, report in seen.reached()
        if any(interface.kind == "bridge" for interface in report.interfaces.values())
    ]
    count = len(seen.reports)
    if count >= 3 and len(bridged) == count and find_ring(count, cables(seen.reports)):
        what = (
            "the cables form a circle, and each Mac's Thunderbolt Bridge passes frames on: they may go round for ever"
        )
        advice = "on each: sudo networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off"
        yield Look("warning", what, f"{advice}; and give each port an address of its own")
