"""What a host's answers to probe.py mean: memory, interfaces, Thunderbolt ports, RDMA devices. Pure. No MLX.

The formats of macOS's commands are from public issues and documentation (tests/macs.py names them): **no Mac was asked
by us**. What cannot be read is not known, never an error.
"""

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Interface
from typing import Any

LINK_LOCAL = ipaddress.IPv4Network("169.254.0.0/16")  # addresses that a system gives itself
VIRTUAL = re.compile(r"(utun|awdl|llw|anpi|ap|gif|stf|vmnet|docker|br-|virbr|veth|cni|flannel|tun|tap|wg|tailscale)")
RDMA_PROTOCOL = 64087  # of the Thunderbolt service that a Mac with RDMA enabled offers to the other end of a cable


@dataclass(frozen=True)
class Interface:
    """A network interface. `kind`: "thunderbolt", "bridge" (of Thunderbolt ports), "ethernet", "wifi", "loopback",
    "virtual". `speed` in Mbit/s, where it says."""

    name: str
    kind: str
    addresses: tuple[IPv4Interface, ...] = ()
    speed: int | None = None
    active: bool = True
    members: tuple[str, ...] = ()  # of a bridge


@dataclass(frozen=True)
class Port:
    """A Thunderbolt port. `domain` and `peer` are UUIDs, of this end of a cable and of the Mac at the other."""

    receptacle: str
    domain: str
    interface: str | None
    speed: int | None  # Gbit/s: of the cable, or at most where there is none
    peer: str | None = None
    peer_offers_rdma: bool = False
    in_use: bool = False  # something is at the other end, and `speed` no longer says what the port could do


@dataclass(frozen=True)
class Device:
    """An RDMA device, rdma_en3 for the interface en3. None is not known."""

    name: str
    active: bool | None = None
    addresses: tuple[str, ...] | None = None  # its GIDs

    @property
    def interface(self) -> str:
        return self.name.removeprefix("rdma_")


@dataclass(frozen=True)
class NoAnswer:
    """A host that did not answer, and why; `said` is what it or ssh wrote, `greeted` that ssh and the probe work."""

    why: str
    said: str = ""
    greeted: bool = False


@dataclass(frozen=True)
class HostReport:
    """A host that answered. `raw` is describe's answer of probe.py; `skew`: seconds its clock is ahead of ours."""

    raw: Mapping[str, Any] = field(repr=False)
    skew: float | None = None

    @property
    def mac(self) -> bool:
        return bool(self.raw["platform"] == "darwin")

    def out(self, name: str) -> str:
        """What a command printed; nothing where it does not exist or failed."""
        return str(self.raw["outputs"].get(name, {}).get("out", ""))

    def status(self, name: str) -> int | None:
        """Its exit status; 127 where it does not exist, 124 where it took too long."""
        status = self.raw["outputs"].get(name, {}).get("status")
        return status if isinstance(status, int) else None

    # -----------------------------------------------------------------------------------------------------------------
    # The machine

    @cached_property
    def macos(self) -> tuple[int, ...] | None:
        """(26, 2)."""
        match = re.search(r"ProductVersion:\s*([\d.]+)", self.out("sw_vers"))
        return tuple(int(part) for part in match[1].split(".") if part) if match else None

    @property
    def system(self) -> str:
        """Such as "macOS 26.2"."""
        return f"macOS {'.'.join(map(str, self.macos))}" if self.macos else str(self.raw["system"])

    @property
    def chip(self) -> str:
        """Such as "Apple M3 Ultra"; of another machine, what MLX computes on."""
        return self._sysctl("machdep.cpu.brand_string") or str(self.mlx.get("device", {}).get("device_name", ""))

    @property
    def memory(self) -> int | None:
        """Bytes."""
        if self.mac:
            size = self._sysctl("hw.memsize")
            return int(size) if size.isdecimal() else None
        return self._meminfo("MemTotal")

    @property
    def available(self) -> int | None:
        """Bytes that programs can still get without others losing theirs: free, or only a copy of what is on disk."""
        if not self.mac:
            return self._meminfo("MemAvailable")
        text = self.out("vm_stat")
        page = re.search(r"page size of (\d+) bytes", text)
        pages = re.findall(r"^Pages (?:free|inactive|speculative): +(\d+)\.", text, re.MULTILINE)
        return int(page[1]) * sum(map(int, pages)) if page and pages else None

    @property
    def wired_limit(self) -> int | None:
        """MiB that the user lets the GPU keep; 0 is macOS's own choice."""
        limit = self._sysctl("iogpu.wired_limit_mb")
        return int(limit) if limit.isdecimal() else None

    @cached_property
    def mlx(self) -> Mapping[str, Any]:
        """What MLX says of itself there; empty where it cannot be imported."""
        lines = self.out("mlx").splitlines()
        return next((found for line in reversed(lines) for found in _objects(line) if "version" in found), {})

    @cached_property
    def store(self) -> Mapping[str, Any]:
        """What kept.py says of the store there; empty where it was not asked, or could not say."""
        lines = self.out("store").splitlines()
        return next((found for line in reversed(lines) for found in _objects(line) if "entries" in found), {})

    @property
    def firewall(self) -> int | None:
        """macOS's: 0 is off, 1 on, 2 blocks everything that comes in."""
        match = re.search(r"State = (\d)", self.out("firewall"))
        return int(match[1]) if match else None

    @property
    def open_mpi(self) -> str | None:
        """Its version."""
        match = re.search(r"\(Open MPI\) (\S+)", self.out("mpirun"))
        return match[1] if match else None

    def _sysctl(self, name: str) -> str:
        match = re.search(rf"^{re.escape(name)}: (.*)$", self.out("sysctl"), re.MULTILINE)
        return match[1].strip() if match else ""

    def _meminfo(self, name: str) -> int | None:
        match = re.search(rf"^{name}: +(\d+) kB$", self.out("memory"), re.MULTILINE)
        return int(match[1]) * 1024 if match else None

    # -----------------------------------------------------------------------------------------------------------------
    # The network

    @cached_property
    def interfaces(self) -> Mapping[str, Interface]:
        """By name."""
        found = self._macos_interfaces() if self.mac else self._linux_interfaces()
        return {interface.name: interface for interface in found}

    def interface_of(self, address: str) -> Interface | None:
        """The one that has `address`."""
        for interface in self.interfaces.values():
            if any(str(own.ip) == address for own in interface.addresses):
                return interface
        return None

    def bridge_of(self, interface: str) -> Interface | None:
        """The bridge that holds `interface`: the Thunderbolt Bridge, bridge0."""
        return next((bridge for bridge in self.interfaces.values() if interface in bridge.members), None)

    @cached_property
    def hardware_ports(self) -> Mapping[str, str]:
        """Interface -> the name of its port, such as "Thunderbolt 2" for en3."""
        pairs = re.findall(r"^ *Hardware Port: (.*)\n *Device: (\S+)", self.out("hardware ports"), re.MULTILINE)
        return {device: name.strip() for name, device in pairs}

    def _macos_interfaces(self) -> Iterator[Interface]:
        for block in re.split(r"^(?=\S+: flags=)", self.out("ifconfig"), flags=re.MULTILINE):
            name = block.partition(":")[0]
            addresses = re.findall(r"\binet (\S+) netmask 0x([0-9a-f]{8})", block)
            if not re.match(r"\S+: flags=", block):
                continue
            members = tuple(re.findall(r"\bmember: (\S+)", block))
            yield Interface(
                name,
                self._macos_kind(name, members),
                tuple(IPv4Interface((ip, int(mask, 16).bit_count())) for ip, mask in addresses),
                _media_speed(block),
                "status: inactive" not in block,
                members,
            )

    def _macos_kind(self, name: str, members: tuple[str, ...]) -> str:
        if name.startswith("lo"):
            return "loopback"
        port = self.hardware_ports.get(name, "")
        if re.fullmatch(r"Thunderbolt \d+", port):  # "Thunderbolt Ethernet Slot 0" is a dock's Ethernet
            return "thunderbolt"
        if port in ("Wi-Fi", "AirPort"):
            return "wifi"
        if any(re.fullmatch(r"Thunderbolt \d+", self.hardware_ports.get(member, "")) for member in members):
            return "bridge"
        return "ethernet" if port and not VIRTUAL.match(name) else "virtual"

    def _linux_interfaces(self) -> Iterator[Interface]:
        for link in _objects(self.out("addresses")):
            name = link.get("ifname")
            if not name:  # old versions of ip print an empty object for an interface that they leave out
                continue
            more = self.raw["network"].get(name, {})
            own = [each for each in link.get("addr_info", []) if each.get("family") == "inet"]
            addresses = tuple(IPv4Interface(f"{each['local']}/{each['prefixlen']}") for each in own)
            kind = "virtual" if VIRTUAL.match(name) else "wifi" if more.get("wifi") else "ethernet"
            kind = (
                "loopback" if "LOOPBACK" in link.get("flags", []) else "thunderbolt" if "thunderbolt" in name else kind
            )
            yield Interface(name, kind, addresses, more.get("speed"), "UP" in link.get("flags", []))

    # -----------------------------------------------------------------------------------------------------------------
    # Thunderbolt

    @cached_property
    def ports(self) -> tuple[Port, ...]:
        """The Thunderbolt ports, as mlx.distributed_config reads them (mlx/_distributed_utils/config.py)."""
        buses = [bus for found in _objects(self.out("thunderbolt")) for bus in _parts(found, "SPThunderboltDataType")]
        interfaces = {name: interface for interface, name in self.hardware_ports.items()}
        return tuple(_port(bus, interfaces) for bus in buses if "domain_uuid_key" in bus)

    @property
    def thunderbolt_5(self) -> bool | None:
        """Whether any port does more than the 40 Gbit/s of Thunderbolt 3 and 4; None where none says.

        One in use may do more than the cable and what is at its other end.
        """
        speeds = [(port.speed, port.in_use) for port in self.ports if port.speed]
        if any(speed > 40 for speed, _ in speeds):
            return True
        return None if all(in_use for _, in_use in speeds) else False

    @cached_property
    def devices(self) -> Mapping[str, Device]:
        """The RDMA devices, by name."""
        names = re.findall(r"^\s*(\w+)\s+[0-9a-fA-FxX:]{8,}\s*$", self.out("ibv_devices"), re.MULTILINE)
        details = {name: Device(name) for name in names}
        for block in re.split(r"^(?=\s*hca_id:)", self.out("ibv_devinfo"), flags=re.MULTILINE):
            name = re.match(r"\s*hca_id:\s*(\S+)", block)
            state = re.search(r"^\s*state:\s*(PORT_\w+)", block, re.MULTILINE)
            gids = re.findall(r"GID\[\s*\d+\]:\s*([0-9a-fA-F:.]+)", block)
            if name:
                details[name[1]] = Device(name[1], state and state[1] == "PORT_ACTIVE", tuple(gids) if gids else None)
        return details

    @property
    def rdma_enabled(self) -> bool | None:
        """What `rdma_ctl status` says; None where there is no such command, or it says something else."""
        return {"enabled": True, "disabled": False}.get(self.out("rdma_ctl").strip())


def _objects(text: str) -> list[Mapping[str, Any]]:
    """The JSON object, or the objects of the list, that a command printed; none where it printed something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    return [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, dict)]


def _parts(found: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects in a list, as far as there is one."""
    parts = found.get(name)
    return [each for each in parts if isinstance(each, dict)] if isinstance(parts, list) else []


def _port(bus: Mapping[str, Any], interfaces: Mapping[str, str]) -> Port:
    tag = bus["receptacle_1_tag"] if isinstance(bus.get("receptacle_1_tag"), dict) else {}
    says = str(tag.get("current_speed_key") or "")  # "80 Gb/s", or where nothing is plugged in, "Up to 80 Gb/s"
    speed = re.search(r"(\d+) Gb/s", says)
    peer: Mapping[str, Any] = next((item for item in _items(bus) if "domain_uuid_key" in item), {})
    services = [service.get("protocol_id_key") for service in _parts(peer, "services_title")]
    receptacle = str(tag.get("receptacle_id_key", ""))
    return Port(
        receptacle,
        bus["domain_uuid_key"],
        interfaces.get(f"Thunderbolt {receptacle}"),
        int(speed[1]) if speed else None,
        peer.get("domain_uuid_key"),
        RDMA_PROTOCOL in services,
        bool(says) and not says.startswith("Up to"),
    )


def _items(bus: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What is plugged into a port, and into that: a Mac may be behind a dock."""
    for item in _parts(bus, "_items"):
        yield item
        yield from _items(item)


def _media_speed(block: str) -> int | None:
    """Mbit/s, from what ifconfig calls 1000baseT, 2500Base-T, 2.5GBase-T or 10Gbase-T."""
    match = re.search(r"media:.*?\b(\d+(?:\.\d+)?)(g?)base", block, re.IGNORECASE)
    return round(float(match[1]) * (1000 if match[2] else 1)) if match else None
