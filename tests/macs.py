"""What Macs say of themselves, for tests without a Mac: outputs of macOS's commands in the formats of public sources.

Shortened to what is read, names, addresses and identifiers replaced. No Mac was asked by us. From where:

    thunderbolt     `system_profiler SPThunderboltDataType -json`: jundot/omlx, tests of omlx.cluster.topology (a
                    MacBook Pro with M5 Max, cabled to a Mac Studio with M3 Ultra); osaurus-ai/osaurus,
                    DistributedFixtures.swift (two of the former, macOS 27.0, RDMA enabled on one)
    hardware ports  `networksetup -listallhardwareports`: osaurus, as above; a dock's Ethernet: exo's tests
    ifconfig        the bridge: ml-explore/mlx #1903; speeds: how several parsers on GitHub know ifconfig's media lines
    ibv_devices     ml-explore/mlx #2944; of a Mac without RDMA or with Thunderbolt 4: jundot/omlx #3037, mlx #3777
    ibv_devinfo     osaurus, as above; GIDs: mlx #4191 and #3467, antirez/ds4's notes on testing over Thunderbolt
    rdma_ctl        mlx #2944, omlx #3037
    firewall        `socketfilterfw --getglobalstate`: guides and tests in many repositories
    vm_stat, sysctl, sw_vers  likewise; iogpu.wired_limit_mb 0 is macOS's own choice
    which Mac has a cable to which: mlx #3755 (four M3 Ultra, each with each)
"""

import copy
import ipaddress
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from m3dist.doctor.report import HostReport

GIB = 2**30
ABOUT = {"m3dist version": "0.1.0", "m3dist build": "0123456789ab", "mlx version": "0.32.4"}


def domain(name: str, receptacle: int) -> str:
    """The UUID of a port."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{name}.{receptacle}")).upper()


def interface(receptacle: int) -> str:
    """As on a Mac Studio: "Thunderbolt 1" is en2."""
    return f"en{receptacle + 1}"


def mac(
    name: str,
    cables: Mapping[int, tuple[str, int]] | None = None,
    addresses: Mapping[str, str] | None = None,
    *,
    receptacles: int = 4,
    cable_speed: int = 80,
    port_speed: int = 120,
    peers_offer_rdma: bool = True,
    bridge: Sequence[str] = (),
    wifi: str = "en1",
    media: str = "10Gbase-T",
    rdma_ctl: str | None = "enabled",
    devices: Sequence[str] | None = None,
    down: Sequence[str] = (),
    macos: str = "26.4.1",
    chip: str = "Apple M3 Ultra",
    memory: int = 512,
    available: float = 480.0,
    firewall: int = 0,
    skew: float = 0.0,
    **raw: Any,
) -> HostReport:
    """A Mac called `name`. `cables`: receptacle -> (another Mac, its receptacle). `addresses`: interface -> ip/prefix.

    Its devices are all of its ports', unless given; those with a cable are up unless `down`, and have the GIDs of the
    port's addresses. `memory` and `available` in GiB. `raw` replaces parts of the report.
    """
    cables, addresses = cables or {}, addresses or {}
    ports = range(1, receptacles + 1)
    names = [f"rdma_{interface(port)}" for port in ports] if devices is None else devices
    cabled = {interface(port) for port in cables}
    outputs = {
        "sw_vers": f"ProductName:\t\tmacOS\nProductVersion:\t\t{macos}\nBuildVersion:\t\t25E253\n",
        "sysctl": f"hw.memsize: {memory * GIB}\nhw.model: Mac15,14\nmachdep.cpu.brand_string: {chip}\n"
        "iogpu.wired_limit_mb: 0\n",
        "vm_stat": vm_stat(available),
        "ifconfig": ifconfig(ports, addresses, bridge, cabled, wifi, media),
        "hardware ports": hardware_ports(ports, wifi),
        "thunderbolt": thunderbolt(name, ports, cables, cable_speed, port_speed, peers_offer_rdma),
        "rdma_ctl": rdma_ctl and f"{rdma_ctl}\n",
        "ibv_devices": "    device          \t   node GUID\n    ------          \t----------------\n"
        + "".join(f"    {device:<16}\t9016a1b2c3d4e5f6\n" for device in names),
        "ibv_devinfo": "\n".join(devinfo(each, each[5:] in cabled and each not in down, addresses) for each in names),
        "firewall": f"Firewall is {'enabled' if firewall else 'disabled'}. (State = {firewall})\n",
        "mpirun": None,
        "mlx": json.dumps(mlx(chip, memory)),
    }
    report = {
        "platform": "darwin",
        "system": "Darwin 25.4.0",
        "hostname": f"{name}.local",
        "user": "me",
        "python": {"path": "/Users/me/venv/bin/python3", "version": "3.12.11"},
        "packages": {"m3dist": "0.1.0", "mlx": "0.32.4", "mlx-metal": "0.32.4", "numpy": "2.4.6"},
        "about": ABOUT,
        "environ": {},
        "directory": {"path": "/Users/me", "problem": None},
        "model": None,
        "addresses": {str(ipaddress.ip_interface(own).ip): None for own in addresses.values()},
        "network": {},
        "outputs": {command: output(text) for command, text in outputs.items()},
    }
    return HostReport(report | raw, skew)


def output(text: str | None) -> dict[str, Any]:
    """What probe.run says of a command that printed `text`; None: that does not exist."""
    if text is None:
        return {"status": 127, "out": "", "error": "not found"}
    return {"status": 0, "out": text, "error": ""}


def changed(report: HostReport, **outputs: str | None) -> HostReport:
    """With other outputs; __ in a name stands for a space."""
    raw = copy.deepcopy(dict(report.raw))
    raw["outputs"] |= {name.replace("__", " "): output(text) for name, text in outputs.items()}
    return HostReport(raw, report.skew)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def vm_stat(available: float) -> str:
    pages = int(available * GIB / 16384)
    return (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        f"Pages free:                               {pages - 5000}.\n"
        "Pages active:                             468148.\n"
        "Pages inactive:                             4000.\n"
        "Pages speculative:                          1000.\n"
        "Pages wired down:                         251554.\n"
        "Pages purgeable:                            6528.\n"
    )


def ifconfig(
    ports: Sequence[int],
    addresses: Mapping[str, str],
    bridge: Sequence[str],
    cabled: set[str],
    wifi: str,
    media: str,
) -> str:
    def block(name: str, status: str, media: str, more: str = "") -> str:
        own = ipaddress.IPv4Interface(addresses[name]) if name in addresses else None
        line = f"\tinet {own.ip} netmask {int(own.netmask):#010x} broadcast {own.network[-1]}\n" if own else ""
        return (
            f"{name}: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500\n"
            f"\toptions=63<RXCSUM,TXCSUM,TSO4,TSO6>\n\tether 36:6a:0f:f5:b0:80\n"
            f"\tinet6 fe80::1442:a0bf:3f10:95ba%{name} prefixlen 64 secured scopeid 0x12\n{line}{more}"
            f"\tnd6 options=201<PERFORMNUD,DAD>\n\tmedia: {media}\n\tstatus: {status}\n"
        )

    text = "lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n\tinet 127.0.0.1 netmask 0xff000000\n"
    text += block("en0", "active" if "en0" in addresses else "inactive", f"autoselect ({media} <full-duplex>)")
    text += block(wifi, "active" if wifi in addresses else "inactive", "autoselect")
    for name in map(interface, ports):
        text += block(name, "active" if name in cabled else "inactive", "autoselect <full-duplex>")
    if bridge:
        members = "".join(
            f"\tmember: {member} flags=3<LEARNING,DISCOVER>\n\t        ifmaxaddr 0 port 11 priority 0 path cost 0\n"
            for member in bridge
        )
        text += block("bridge0", "active", "autoselect", f"\tConfiguration:\n\t\tid 0:0:0:0:0:0 priority 0\n{members}")
    tunnel = "\tinet 100.64.0.1 --> 100.64.0.1 netmask 0xffffffff\n"
    return text + f"utun0: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 1380\n{tunnel}"


def hardware_ports(ports: Sequence[int], wifi: str) -> str:
    named = {"en0": "Ethernet", "bridge0": "Thunderbolt Bridge", wifi: "Wi-Fi", "en10": "Thunderbolt Ethernet Slot 0"}
    named |= {interface(port): f"Thunderbolt {port}" for port in ports}
    each = (
        f"Hardware Port: {name}\nDevice: {device}\nEthernet Address: 02:00:00:00:00:01\n"
        for device, name in named.items()
    )
    return "\n" + "\n".join(each) + "\nVLAN Configurations\n===================\n"


def thunderbolt(
    name: str,
    ports: Sequence[int],
    cables: Mapping[int, tuple[str, int]],
    cable_speed: int,
    port_speed: int,
    peers_offer_rdma: bool,
) -> str:
    buses = []
    for port in reversed(ports):
        connected = port in cables
        bus: dict[str, Any] = {
            "_name": f"thunderboltusb4_bus_{port - 1}",
            "device_name_key": "Mac Studio",
            "domain_uuid_key": domain(name, port),
            "receptacle_1_tag": {
                "current_speed_key": f"{cable_speed} Gb/s" if connected else f"Up to {port_speed} Gb/s",
                "link_status_key": "0x2" if connected else "0x100",
                "receptacle_id_key": str(port),
                "receptacle_status_key": f"receptacle_{'' if connected else 'no_devices_'}connected",
            },
            "route_string_key": "0",
            "vendor_name_key": "Apple Inc.",
        }
        if connected:
            bus["_items"] = [peer(*cables[port], peers_offer_rdma)]
        buses.append(bus)
    return json.dumps({"SPThunderboltDataType": buses})


def peer(name: str, receptacle: int, offers_rdma: bool) -> dict[str, Any]:
    """Another Mac, as the one at this end of the cable sees it."""
    services: list[dict[str, Any]] = [{"_name": "service_ip", "protocol_id_key": 1, "protocol_version_key": 1}]
    if offers_rdma:
        services.append({"_name": "unknown_xd_service", "protocol_id_key": 64087, "protocol_version_key": 1})
    return {
        "_name": "Mac Studio",
        "device_id_key": "0xA",
        "device_name_key": "Mac15,14",
        "domain_uuid_key": domain(name, receptacle),
        "services_title": services,
        "vendor_id_key": "0x0A27",
    }


def drive() -> dict[str, Any]:
    """What is at the other end of a cable that leads to no Mac."""
    return {"_name": "Envoy Ultra", "device_id_key": "0xDE7B", "mode_key": "usb_four_v2", "route_string_key": "1"}


def devinfo(device: str, active: bool, addresses: Mapping[str, str]) -> str:
    own = addresses.get(device[5:])
    gids = ["fe80::347c:94ff:fecd:45c4", *([f"::ffff:{ipaddress.ip_interface(own).ip}"] if own else [])]
    lines = "".join(f"\t\t\tGID[{number:3}]:\t\t{gid}\n" for number, gid in enumerate(gids))
    return (
        f"hca_id:\t{device}\n\ttransport:\t\t\tThunderbolt (100)\n\tnode_guid:\t\t\t0000:0000:0000:0002\n"
        f"\tphys_port_cnt:\t\t\t1\n\t\tport:\t1\n\t\t\tstate:\t\t\t{'PORT_ACTIVE (4)' if active else 'PORT_DOWN (1)'}\n"
        f"\t\t\tmax_mtu:\t\t4096 (5)\n\t\t\tlink_layer:\t\tThunderbolt\n{lines}"
    )


def mlx(chip: str, memory: int) -> dict[str, Any]:
    """As probe.MLX prints it; device_info of an M3 Ultra has the three quarters of test_metal.py."""
    device = {
        "device_name": chip,
        "memory_size": memory * GIB,
        "max_recommended_working_set_size": memory * GIB * 3 // 4,
    }
    return {"version": "0.32.4", "device": device, "metal": True, "cuda": False, "backends": ["ring", "jaccl"]}


# ---------------------------------------------------------------------------------------------------------------------
# Clusters


def two(first: Mapping[str, Any] | None = None, second: Mapping[str, Any] | None = None) -> list[HostReport]:
    """mac1 and mac2, a cable between their second and third ports; all on one Ethernet."""
    one = {"cables": {2: ("mac2", 3)}, "addresses": {"en0": "10.0.0.1/24", "en3": "192.168.0.1/30"}}
    other = {"cables": {3: ("mac1", 2)}, "addresses": {"en0": "10.0.0.2/24", "en4": "192.168.0.2/30"}}
    return [mac("mac1", **one | dict(first or {})), mac("mac2", **other | dict(second or {}))]


# Each Mac's cables by receptacle: receptacle 1 of mac1 to receptacle 1 of mac2, and so on.
MESH = {
    "mac1": {1: ("mac2", 1), 2: ("mac3", 1), 3: ("mac4", 1)},
    "mac2": {1: ("mac1", 1), 2: ("mac3", 2), 3: ("mac4", 2)},
    "mac3": {1: ("mac1", 2), 2: ("mac2", 2), 3: ("mac4", 3)},
    "mac4": {1: ("mac1", 3), 2: ("mac2", 3), 3: ("mac3", 3)},
}
RING = {
    "mac1": {1: ("mac3", 1), 2: ("mac4", 2)},
    "mac2": {1: ("mac4", 1), 2: ("mac3", 2)},
    "mac3": {1: ("mac1", 1), 2: ("mac2", 2)},
    "mac4": {1: ("mac2", 1), 2: ("mac1", 2)},
}  # around: mac1, mac3, mac2, mac4


def four(
    cables: Mapping[str, Mapping[int, tuple[str, int]]], addressed: bool = True, **others: Any
) -> list[HostReport]:
    """mac1 to mac4, cabled as given; where `addressed`, each cable is a network of its own."""
    ends = sorted({tuple(sorted([(name, port), other])) for name, row in cables.items() for port, other in row.items()})
    given: dict[str, dict[str, str]] = {name: {"en0": f"10.0.0.{name[3:]}/24"} for name in cables}
    for network, pair in enumerate(ends if addressed else []):
        for last, (name, port) in enumerate(pair, 1):
            given[name][interface(port)] = f"192.168.0.{4 * network + last}/30"
    return [mac(name, row, given[name], **others) for name, row in cables.items()]
