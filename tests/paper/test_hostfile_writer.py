"""Which hostfiles are proposed for which hosts, from recorded evidence; and that what is written can be read."""

import json
import os

import pytest
from macs import MESH, RING, four, mac, two
from mlx._distributed_utils.common import Hostfile as MlxHostfile

from m3dist.cluster.hostfile import Host, read_hostfile
from m3dist.doctor.hostfile_writer import as_text, check, write
from m3dist.doctor.proposal import Proposal, propose
from m3dist.doctor.report import HostReport


def hosts(count: int) -> list[Host]:
    return [Host(f"mac{i}") for i in range(1, count + 1)]


def proposed(reports: list[HostReport], backend: str | None = None) -> Proposal:
    return propose(hosts(len(reports)), reports, backend)


def entries(proposal: Proposal, number: int = 0) -> list[tuple]:
    """(ssh, ips, rdma) of each host of a candidate."""
    return [(host.ssh, host.ips, host.rdma) for host in proposal.candidates[number].hostfile.hosts]


def kinds(proposal: Proposal) -> list[tuple[str, str]]:
    return [(str(each.hostfile.backend), each.over) for each in proposal.candidates]


ETHERNET = "10 Gbit/s Ethernet (10.0.0.0/24)"
RDMA = f"Thunderbolt RDMA; its ranks meet on {ETHERNET}"

# ---------------------------------------------------------------------------------------------------------------------
# Two Macs


def test_the_fastest_comes_first():
    found = proposed(two())
    assert kinds(found) == [("jaccl", RDMA), ("jaccl-ring", RDMA), ("ring", "Thunderbolt"), ("ring", ETHERNET)]
    assert entries(found) == [
        ("mac1", ("10.0.0.1",), (None, "rdma_en3")),
        ("mac2", ("10.0.0.2",), ("rdma_en4", None)),
    ]
    assert entries(found, 2) == [("mac1", ("192.168.0.1",), ()), ("mac2", ("192.168.0.2",), ())]
    assert entries(found, 3) == [("mac1", ("10.0.0.1",), ()), ("mac2", ("10.0.0.2",), ())]
    assert not found.notes


@pytest.mark.parametrize("backend", ["ring", "jaccl", "mpi"])
def test_a_backend_that_was_asked_for(backend):
    assert {each.hostfile.backend for each in proposed(two(), backend).candidates} == {backend}


def test_mpi_has_the_network_of_all():
    assert kinds(proposed(two(), "mpi")) == [("mpi", ETHERNET)]


def test_two_cables_are_two_connections():
    cables = {1: ("mac2", 1), 2: ("mac2", 2)}, {1: ("mac1", 1), 2: ("mac1", 2)}
    own = [{"en0": f"10.0.0.{i}/24", "en2": f"192.168.0.{i}/30", "en3": f"192.168.0.{4 + i}/30"} for i in (1, 2)]
    reports = [mac("mac1", cables[0], own[0]), mac("mac2", cables[1], own[1])]
    assert entries(proposed(reports, "ring")) == [
        ("mac1", ("192.168.0.1", "192.168.0.5"), ()),
        ("mac2", ("192.168.0.2", "192.168.0.6"), ()),
    ]
    pair = ("rdma_en2", "rdma_en3")
    assert [row for *_, row in entries(proposed(reports, "jaccl"))] == [(None, pair), (pair, None)]


def test_the_thunderbolt_bridge_joins_two():
    """mlx #1903: an address of bridge0."""
    reports = two(
        {"addresses": {"bridge0": "10.25.0.1/24"}, "bridge": ["en2", "en3"], "devices": []},
        {"addresses": {"bridge0": "10.25.0.2/24"}, "bridge": ["en3", "en4"], "devices": []},
    )
    assert entries(proposed(reports)) == [("mac1", ("10.25.0.1",), ()), ("mac2", ("10.25.0.2",), ())]


def test_two_cables_in_one_bridge_are_one_connection():
    """MLX's ring wants as many connections to the left as to the right."""
    cables = {1: ("mac2", 1), 2: ("mac2", 2)}, {1: ("mac1", 1), 2: ("mac1", 2)}
    bridged = [{"en0": f"10.0.0.{i}/24", "bridge0": f"192.168.0.{i}/24"} for i in (1, 2)]
    reports = [mac(f"mac{i + 1}", cables[i], bridged[i], bridge=["en2", "en3"]) for i in (0, 1)]
    assert entries(proposed(reports, "ring")) == [("mac1", ("192.168.0.1",), ()), ("mac2", ("192.168.0.2",), ())]
    apart = {"en0": "10.0.0.2/24", "en2": "192.168.0.2/24", "en3": "192.168.0.3/24"}
    reports[1] = mac("mac2", cables[1], apart)
    assert entries(proposed(reports, "ring")) == [("mac1", ("192.168.0.1",), ()), ("mac2", ("192.168.0.2",), ())]


def self_assigned(en0: str) -> list[HostReport]:
    return two(
        {"addresses": {"en3": "169.254.7.1/16", "en0": en0.format(1)}},
        {"addresses": {"en4": "169.254.8.2/16", "en0": en0.format(2)}},
    )


def test_self_assigned_addresses_where_only_the_cable_has_them():
    assert kinds(proposed(self_assigned("10.0.0.{}/24"), "ring"))[0] == ("ring", "Thunderbolt")
    ambiguous = proposed(self_assigned("169.254.9.{}/16"), "ring")
    assert not ambiguous.candidates and "their ends have no addresses" in ambiguous.notes[0]


def test_cables_without_addresses():
    """What to run is told, as mlx.distributed_config would run it, on networks that nobody has; Ethernet remains."""
    bare = [{"en0": f"10.0.0.{i}/24", "en5": f"192.168.0.{i}/30"} for i in (1, 2)]
    reports = two({"addresses": bare[0], "bridge": ["en2", "en3"]}, {"addresses": bare[1]})
    found = proposed(reports, "ring")
    assert kinds(found) == [("ring", ETHERNET)]
    assert found.notes[0].splitlines()[1:] == [
        "    on mac1: sudo ifconfig bridge0 deletem en3; sudo ifconfig en3 inet 192.168.0.5 netmask 255.255.255.252; "
        "sudo route change 192.168.0.6 -interface en3",
        "    on mac2: sudo ifconfig en4 inet 192.168.0.6 netmask 255.255.255.252; "
        "sudo route change 192.168.0.5 -interface en4",
    ]


def test_macs_without_rdma():
    found = proposed(two({"devices": []}))
    assert kinds(found)[0] == ("ring", "Thunderbolt")
    assert found.notes == ["jaccl: mac1 has no RDMA device; m3dist doctor --backend jaccl says why"] + found.notes[1:]
    assert not proposed(two({"devices": []}), "jaccl").candidates


def test_a_cable_at_a_port_without_a_device():
    """exo #1543: a Mac Studio's port next to Ethernet."""
    found = proposed(two({"devices": ["rdma_en4", "rdma_en5"]}), "jaccl")
    assert not found.candidates
    assert found.notes == ["jaccl: mac1 has a cable, but no device rdma_en3: use another port"]


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_one_mac_needs_no_jaccl(backend):
    found = propose([Host("mac1")], [mac("mac1", addresses={"en0": "10.0.0.1/24"})], backend)
    assert not found.candidates and found.notes == [f"{backend}: it joins two Macs or more"]


@pytest.mark.parametrize(
    "first, said",
    [
        ({"rdma_ctl": "disabled"}, "mac1: `rdma_ctl status` says disabled; restart that Mac into Recovery"),
        ({"down": ["rdma_en3"]}, "mac1: rdma_en3 towards mac2 is down; take the cable out"),
        ({"bridge": ["en2", "en3"], "addresses": {"en0": "10.0.0.1/24", "bridge0": "192.168.0.1/30"}},
         "mac1: rdma_en3 towards mac2 has no IPv4 address; the Thunderbolt Bridge bridge0 holds its port"),
    ],
)  # fmt: skip
def test_jaccl_is_not_proposed_where_check_would_refuse_it(first, said):
    """The ring over the same cables is; that jaccl-ring is refused for the same is not said again."""
    found = proposed(two(first))
    assert kinds(found) == [("ring", "Thunderbolt"), ("ring", ETHERNET)]
    [note] = found.notes
    assert note.startswith(f"jaccl: {said}")


def test_jaccl_needs_a_place_to_meet():
    reports = two({"addresses": {"en3": "192.168.0.1/30"}}, {"addresses": {"en4": "192.168.0.2/30"}})
    assert not proposed(reports, "jaccl").candidates
    assert kinds(proposed(reports)) == [("ring", "Thunderbolt")]


# ---------------------------------------------------------------------------------------------------------------------
# Four Macs


def test_a_mesh_of_four():
    devices = ["rdma_en2", "rdma_en3", "rdma_en4"]
    found = proposed(four(MESH))
    assert kinds(found)[0] == ("jaccl", RDMA)
    assert entries(found) == [
        (f"mac{i + 1}", (f"10.0.0.{i + 1}",), tuple(devices[:i] + [None] + devices[i:])) for i in range(4)
    ]


def test_a_ring_of_four():
    """The order of the hosts follows the cables, the first stays first. As hostfiles/four-macs-thunderbolt-ring.json:
    each has its address on the cable to the one before it."""
    found = proposed(four(RING))
    assert kinds(found) == [("jaccl-ring", RDMA), ("ring", "Thunderbolt"), ("ring", ETHERNET)]
    assert "finds none between mac1 and mac2; mac3 and mac4" in found.notes[0]
    assert entries(found, 1) == [
        ("mac1", ("192.168.0.5",), ()),
        ("mac3", ("192.168.0.2",), ()),
        ("mac2", ("192.168.0.13",), ()),
        ("mac4", ("192.168.0.10",), ()),
    ]
    assert [(name, row) for name, _, row in entries(found)] == [
        ("mac1", (None, "rdma_en2", None, "rdma_en3")),
        ("mac3", ("rdma_en2", None, "rdma_en3", None)),
        ("mac2", (None, "rdma_en3", None, "rdma_en2")),
        ("mac4", ("rdma_en3", None, "rdma_en2", None)),
    ]


def test_a_chain_is_no_ring():
    cables = {"mac1": {1: ("mac2", 1)}, "mac2": {1: ("mac1", 1), 2: ("mac3", 1)}, "mac3": {1: ("mac2", 2)}}
    found = proposed(four(cables), "ring")
    assert kinds(found) == [("ring", ETHERNET)]
    assert found.notes == ["ring: the Thunderbolt cables do not form a ring of all hosts"]


def test_a_drive_or_an_unknown_mac_is_no_way():
    found = proposed(two({"cables": {1: ("mac9", 1)}}))
    assert kinds(found) == [("ring", ETHERNET)] and not found.notes


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def on(number: int, **others) -> HostReport:
    return mac(f"mac{number}", **others)


def test_wires_before_wifi_and_fast_before_slow():
    both = [on(i, addresses={"en1": f"10.1.0.{i}/24", "en0": f"10.0.0.{i}/24"}, media="1000baseT") for i in (1, 2)]
    assert kinds(proposed(both)) == [
        ("ring", "1 Gbit/s Ethernet (10.0.0.0/24)"),
        ("ring", "Wi-Fi (10.1.0.0/24)"),
    ]
    mixed = [both[0], on(2, addresses={"en0": "10.0.0.2/24"}, media="10Gbase-T")]
    assert kinds(proposed(mixed)) == [("ring", "1 Gbit/s Ethernet (10.0.0.0/24)")]


@pytest.mark.parametrize(
    "first, second",
    [
        ("10.0.0.1/24", "10.9.0.2/24"),  # no common network
        ("10.0.0.1/24", "10.0.0.1/24"),  # an address twice
        ("169.254.1.1/16", "169.254.1.2/16"),  # self-assigned, on Ethernet
    ],
)
def test_no_network_of_all(first, second):
    found = proposed([on(1, addresses={"en0": first}), on(2, addresses={"en0": second})])
    assert not found.candidates and "no network has an address of every host" in found.notes[0]


def test_this_machine_alone():
    here = [Host("127.0.0.1"), Host("127.0.0.1")]
    report = on(1, addresses={"en0": "10.0.0.1/24"})
    found = propose(here, [report, report])
    assert kinds(found) == [("ring", "this machine alone")]
    assert entries(found) == [("127.0.0.1", ("127.0.0.1",), ())] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("number", range(4))
def test_what_is_written_can_be_read_by_m3dist_and_by_mlx(tmp_path, number):
    candidate = proposed(two()).candidates[number].hostfile
    path = tmp_path / "hosts.json"
    path.write_text(as_text(candidate))
    read = read_hostfile(str(path))
    assert (read.backend, read.hosts) == (candidate.backend, candidate.hosts)
    theirs = MlxHostfile.from_file(str(path))
    assert [host.ips for host in theirs.hosts] == [list(host.ips) for host in candidate.hosts]


def test_a_user_is_part_of_the_name():
    reports = [on(i, addresses={"en0": f"10.0.0.{i}/24"}) for i in (1, 2)]
    text = as_text(propose([Host("mac1", user="me"), Host("mac2")], reports).candidates[0].hostfile)
    assert [host["ssh"] for host in json.loads(text)["hosts"]] == ["me@mac1", "mac2"]


def test_the_python_of_a_host_is_written(tmp_path):
    reports = [on(i, addresses={"en0": f"10.0.0.{i}/24"}) for i in (1, 2)]
    found = propose([Host("mac1"), Host("mac2", python="~/venv/bin/python")], reports).candidates[0].hostfile
    path = tmp_path / "hosts.json"
    path.write_text(as_text(found))
    assert [host.python for host in read_hostfile(str(path)).hosts] == [None, "~/venv/bin/python"]


def test_a_host_without_that_python_gets_another_by_a_flag(tmp_path, monkeypatch, capsys):
    """The hostfile whose `python` the known cause speaks of is still to be written. This `ssh` starts things here."""
    (tmp_path / "ssh").write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nexec /bin/sh -c "$3"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert write([Host("mac1", python="/no/such/python")], None, None) == 1
    assert "=> Give the host's Python by its full path in --python, such as ~/venv/bin" in capsys.readouterr().err


def test_a_check_says_what_it_does_not_measure(tmp_path, capsys):
    path = tmp_path / "hosts.json"
    path.write_text('{"backend": "ring", "hosts": [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]}')
    assert check(str(path)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"note: no link was measured: m3dist doctor --hostfile {path} does",
        f"{path} holds",
    ]
