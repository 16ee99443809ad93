"""What is made of a host's answers, from what Macs (tests/macs.py) and Linux say."""

import json
from ipaddress import IPv4Interface
from typing import Any

import pytest
from macs import GIB, MESH, changed, domain, drive, four, mac, two

from m3dist.doctor.report import Device, HostReport, Interface, Port
from m3dist.doctor.topology import cables, find_ring, is_mesh, rounds

# ---------------------------------------------------------------------------------------------------------------------
# macOS


def test_a_mac():
    report = mac("mac1", {2: ("mac2", 3)}, {"en0": "10.0.0.1/24"}, available=100.0)
    assert (report.mac, report.macos, report.system, report.chip) == (
        True,
        (26, 4, 1),
        "macOS 26.4.1",
        "Apple M3 Ultra",
    )
    assert (report.memory, report.wired_limit, report.firewall) == (512 * GIB, 0, 0)
    assert report.available == pytest.approx(100 * GIB, abs=16384)
    assert report.rdma_enabled is True and report.thunderbolt_5 is True and report.open_mpi is None
    assert report.mlx["backends"] == ["ring", "jaccl"]


def test_interfaces_of_a_mac():
    report = mac("mac1", {2: ("mac2", 3)}, {"en0": "10.0.0.1/24", "bridge0": "10.25.0.1/24"}, bridge=["en2", "en3"])
    found = report.interfaces
    assert found["en0"] == Interface("en0", "ethernet", (IPv4Interface("10.0.0.1/24"),), 10000, True, ())
    assert found["bridge0"].kind == "bridge" and found["bridge0"].members == ("en2", "en3")
    assert found["en3"] == Interface("en3", "thunderbolt", (), None, True, ())
    assert [found[name].kind for name in ("lo0", "en1", "utun0")] == ["loopback", "wifi", "virtual"]
    assert not found["en2"].active
    assert report.bridge_of("en3") is found["bridge0"] and report.bridge_of("en0") is None
    assert report.interface_of("10.25.0.1") is found["bridge0"] and report.interface_of("10.25.0.2") is None


def test_a_dock_s_ethernet_is_no_thunderbolt():
    report = changed(mac("mac1"), ifconfig="en10: flags=8863<UP> mtu 1500\n\tinet 10.1.0.1 netmask 0xffffff00\n")
    assert report.interfaces["en10"].kind == "ethernet"


@pytest.mark.parametrize(
    "media, speed",
    [("1000baseT", 1000), ("2500Base-T", 2500), ("2.5GBase-T", 2500), ("10Gbase-T", 10000), ("none", None)],
)
def test_speeds(media, speed):
    assert mac("mac1", media=media).interfaces["en0"].speed == speed


def test_thunderbolt_ports():
    report = mac("mac1", {2: ("mac2", 3)}, receptacles=2)
    unused = Port("1", domain("mac1", 1), "en2", 120)
    assert report.ports == (Port("2", domain("mac1", 2), "en3", 80, domain("mac2", 3), True, True), unused)


def test_a_drive_is_no_peer():
    report = mac("mac1")
    buses = json.loads(report.out("thunderbolt"))
    buses["SPThunderboltDataType"][0]["_items"] = [drive()]
    assert all(port.peer is None for port in changed(report, thunderbolt=json.dumps(buses)).ports)


def test_thunderbolt_4():
    assert mac("mac1", {1: ("mac2", 1)}, cable_speed=40, port_speed=40).thunderbolt_5 is False


def test_a_slow_cable_does_not_say_what_the_port_could_do():
    every = {port: ("mac2", port) for port in range(1, 5)}
    assert mac("mac1", every, cable_speed=40).thunderbolt_5 is None
    assert mac("mac1", every, cable_speed=80).thunderbolt_5 is True
    assert mac("mac1", receptacles=0).thunderbolt_5 is None


def test_a_mac_behind_a_dock():
    report = mac("mac1", {2: ("mac2", 3)}, receptacles=2)
    told = json.loads(report.out("thunderbolt"))
    [bus] = [bus for bus in told["SPThunderboltDataType"] if "_items" in bus]
    bus["_items"] = [drive() | {"_items": bus["_items"]}]
    assert changed(report, thunderbolt=json.dumps(told)).ports == report.ports


@pytest.mark.parametrize("nothing", [None, 7, "", [None, 7]])
def test_what_a_port_does_not_say_is_not_known(nothing):
    """Nothing raises, whatever stands where."""
    report = mac("mac1", {2: ("mac2", 3)}, receptacles=2)
    for path in ("current_speed_key", "receptacle_id_key", "receptacle_1_tag", "_items", "services_title"):
        told = replaced(json.loads(report.out("thunderbolt")), path, nothing)
        assert len(changed(report, thunderbolt=json.dumps(told)).ports) == 2
    assert changed(report, thunderbolt=json.dumps({"SPThunderboltDataType": nothing})).ports == ()


def replaced(found: Any, name: str, value: Any) -> Any:
    """`found` with `value` for whatever is called `name`, however deep."""
    if isinstance(found, list):
        return [replaced(each, name, value) for each in found]
    if isinstance(found, dict):
        return {key: value if key == name else replaced(each, name, value) for key, each in found.items()}
    return found


def test_rdma_devices():
    report = mac("mac1", {2: ("mac2", 3)}, {"en3": "169.254.10.1/16"}, receptacles=2)
    assert report.devices == {
        "rdma_en2": Device("rdma_en2", False, ("fe80::347c:94ff:fecd:45c4",)),
        "rdma_en3": Device("rdma_en3", True, ("fe80::347c:94ff:fecd:45c4", "::ffff:169.254.10.1")),
    }
    assert report.devices["rdma_en3"].interface == "en3"


def test_devices_without_details():
    """mlx #2944 hides the ends of its GUIDs."""
    names = (
        "    device          \t   node GUID\n    ------          \t----------------\n    rdma_en2        \t9016aXXX\n"
    )
    report = changed(mac("mac1"), ibv_devices=names, ibv_devinfo=None)
    assert report.devices == {"rdma_en2": Device("rdma_en2")}


def test_no_devices():
    assert mac("mac1", devices=[]).devices == {}
    assert changed(mac("mac1"), ibv_devices=None, ibv_devinfo="No IB devices found\n").devices == {}


def test_garbage_is_not_known():
    """Whatever the commands print, nothing raises."""
    names = mac("mac1").raw["outputs"]
    for text in ("", "\0\n:", "{}", "[1]", '{"SPThunderboltDataType": [{}]}', "inet 1 netmask 0x", "hca_id:"):
        for report in (mac("mac1"), linux()):
            report = changed(report, **{name.replace(" ", "__"): text for name in names}, addresses=text, memory=text)
            assert (report.memory, report.available, report.macos, report.firewall) == (None, None, None, None)
            assert (report.ports, report.devices, dict(report.mlx)) == ((), {}, {})
            assert not report.interfaces and report.rdma_enabled is None and report.open_mpi is None


# ---------------------------------------------------------------------------------------------------------------------
# Linux


def linux(**raw) -> HostReport:
    """`ip -j address` as iproute2 6.1 prints it here."""
    addresses = [
        {"ifname": "lo", "flags": ["LOOPBACK", "UP"], "addr_info": [inet("127.0.0.1", 8)]},
        {"ifname": "eth0", "flags": ["BROADCAST", "UP", "LOWER_UP"], "addr_info": [inet("10.0.0.7", 24), INET6]},
        {"ifname": "wlan0", "flags": ["BROADCAST", "UP"], "addr_info": [inet("10.1.0.7", 24)]},
        {"ifname": "docker0", "flags": ["UP"], "addr_info": [inet("172.17.0.1", 16)]},
    ]
    outputs = {
        "addresses": {"status": 0, "out": json.dumps(addresses), "error": ""},
        "memory": {"status": 0, "out": "MemTotal:       24652008 kB\nMemAvailable:   24000000 kB\n", "error": ""},
        "mpirun": {"status": 0, "out": "mpirun (Open MPI) 4.1.4\n\nReport bugs to ...\n", "error": ""},
    }
    network = {"eth0": {"speed": 1000, "wifi": False}, "wlan0": {"speed": None, "wifi": True}}
    report = {"platform": "linux", "system": "Linux 6.1", "network": network, "outputs": outputs}
    return HostReport(report | raw)


def inet(ip: str, prefix: int) -> dict:
    return {"family": "inet", "local": ip, "prefixlen": prefix}


INET6 = {"family": "inet6", "local": "fe80::1", "prefixlen": 64}


def test_linux():
    report = linux()
    assert (report.memory, report.available, report.open_mpi) == (24652008 * 1024, 24000000 * 1024, "4.1.4")
    assert {name: each.kind for name, each in report.interfaces.items()} == {
        "lo": "loopback", "eth0": "ethernet", "wlan0": "wifi", "docker0": "virtual",
    }  # fmt: skip
    assert report.interfaces["eth0"].addresses == (IPv4Interface("10.0.0.7/24"),)
    assert report.interfaces["eth0"].speed == 1000
    assert report.ports == () and report.devices == {} and report.firewall is None


# ---------------------------------------------------------------------------------------------------------------------
# Who is connected with whom


def test_cables_of_two():
    found = cables(two())
    assert set(found) == {(0, 1), (1, 0)}
    [cable] = found[1, 0]
    assert (cable.here.interface, cable.there.interface) == ("en4", "en3")


def test_several_cables_are_numbered_alike_from_both_ends():
    """Crossed: the first cable of the one is the second port of the other."""
    first = mac("mac1", {1: ("mac2", 2), 2: ("mac2", 1)})
    second = mac("mac2", {1: ("mac1", 2), 2: ("mac1", 1)})
    found = cables([first, second])
    assert [(c.here.interface, c.there.interface) for c in found[0, 1]] == [("en2", "en3"), ("en3", "en2")]
    assert [(c.there.interface, c.here.interface) for c in found[1, 0]] == [("en2", "en3"), ("en3", "en2")]


def test_meshes_and_rings():
    mesh = cables(four(MESH))
    assert is_mesh(4, mesh) and find_ring(4, mesh) == [0, 1, 2, 3]
    assert len(mesh) == 12
    assert find_ring(2, cables(two())) == [0, 1]
    assert find_ring(3, cables([*two(), mac("mac3")])) is None


def test_a_machine_has_one_link_at_a_time():
    from m3dist.doctor.topology import Link

    links = [Link(i, (i + 1) % 5, "10.0.0.1") for i in range(5)]
    groups = rounds(links, list(range(5)))
    assert sorted(link.source for group in groups for link in group) == [0, 1, 2, 3, 4]
    assert len(groups) == 3
    for group in groups:
        ends = [end for link in group for end in (link.source, link.target)]
        assert len(ends) == len(set(ends))
    assert len(rounds(links, ["one machine"] * 5)) == 5
