"""m3dist doctor and hostfile over real ssh between hosts of their own: whatever the hosts do, within 30 s."""

import json
import time
from subprocess import PIPE, CompletedProcess

import pytest
from network import Network
from spec import FOUR, REFUSING, SILENT, Spec

SPECS = (*FOUR, Spec())
LIMIT = 30.0  # seconds


def m3dist(net: Network, *words: str) -> CompletedProcess[str]:
    """Run on host 0, with nothing left of it anywhere when it ends."""
    done = net.run(0, [net.host(0).python, "-m", "m3dist", *words], timeout=LIMIT + 5)
    assert net.wait_empty(2.0) == []
    return done


def doctor(net: Network, *hosts: int | dict, backend: str = "ring") -> tuple[int, dict]:
    """Its exit status and what --json says, about hosts by their numbers, or entries of a hostfile."""
    entries = [net.host(host).entry() if isinstance(host, int) else host for host in hosts]
    net.host(0).path("/root/hosts.json").write_text(json.dumps({"backend": backend, "hosts": entries}))
    began = time.monotonic()
    done = m3dist(net, "doctor", "--hostfile", "/root/hosts.json", "--json")
    assert time.monotonic() - began < LIMIT, done.stderr
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def of_level(told: dict, *levels: str) -> list[dict]:
    return [finding for finding in told["findings"] if finding["level"] in levels]


def error(told: dict) -> dict:
    [finding] = of_level(told, "error")
    return finding


# ---------------------------------------------------------------------------------------------------------------------
# Doctor


def test_hosts_that_are_well(net):
    status, told = doctor(net, {"ssh": "127.0.0.1", "ips": [net.host(0).address]}, 1, 2)
    assert status == 0 and of_level(told, "error", "warning") == []
    assert [host["report"]["hostname"] for host in told["hosts"]] == [net.host(i).name for i in range(3)]
    assert [host["report"]["user"] for host in told["hosts"]][1:] == ["ann", "bob"]
    assert all(abs(host["skew"]) < 0.5 for host in told["hosts"])
    assert len(told["links"]) == 3
    for link in told["links"]:
        assert 0 < link["round_trip"] < 0.05 and link["bandwidth"] > 1e6


def test_the_table(net):
    doctor(net, 1, 2)
    done = m3dist(net, "doctor", "--hostfile", "/root/hosts.json")
    assert done.returncode == 0 and "A launch would work." in done.stdout
    assert net.host(1).address in done.stdout and "GB/s" in done.stdout


@pytest.mark.parametrize(
    "address, said",
    [(SILENT, "timed out"), (REFUSING, "Connection refused"), ("no-such-host.invalid", "Could not resolve")],
)
def test_one_host_that_cannot_be_reached(net, address, said):
    ips = [address if address[0].isdigit() else SILENT]
    status, told = doctor(net, 1, {"ssh": address, "ips": ips}, 2)
    found = error(told)
    assert status == 1
    assert (found["check"], found["host"]) == ("ssh", address) and said in found["seen"] and found["remedy"]
    assert [host["answers"] for host in told["hosts"]] == [True, False, True]
    assert [bool(link["round_trip"]) for link in told["links"]] == [False, False, True]


def test_a_host_that_falls_silent(net):
    """Its probe is stopped as soon as it is there; the others' answers count."""
    hosts = [net.host(i).entry() for i in (1, 2)]
    net.host(0).path("/root/hosts.json").write_text(json.dumps({"backend": "ring", "hosts": hosts}))
    command = [net.host(0).python, "-m", "m3dist", "doctor", "--hostfile", "/root/hosts.json", "--json"]
    process = net.popen(0, command, stdout=PIPE)
    net.wait_for(2, "m3dist.doctor.probe")
    net.freeze(2, "m3dist.doctor.probe")
    out, _ = process.communicate(timeout=LIMIT)
    net.kill(2, "m3dist.doctor.probe")
    told = json.loads(out)
    assert process.returncode == 1
    assert error(told)["check"] in ("ssh", "answer")  # it may be stopped before it has greeted us
    assert error(told)["host"] == net.host(2).address
    assert [host["answers"] for host in told["hosts"]] == [True, False]


def test_another_version(net):
    status, told = doctor(net, 1, 2, 3)
    found = of_level(told, "error")
    assert status == 1
    assert {(f["check"], f["host"]) for f in found} == {("versions", net.host(3).address)}


def test_a_python_without_m3dist(net):
    status, told = doctor(net, 1, net.host(2).entry(python="/usr/bin/python3"))
    found = error(told)
    assert (status, found["check"], found["host"]) == (1, "ssh", net.host(2).address)
    assert "m3dist" in found["seen"] and "python" in found["remedy"]


def test_an_address_of_another_host(net):
    status, told = doctor(net, 1, net.host(2).entry(ips=[net.host(3).address]))
    found = [f for f in of_level(told, "error") if f["check"] == "addresses"]
    assert status == 1 and f"{net.host(3).address} is no address of this host" in found[0]["seen"]


def test_a_link_that_is_cut(net):
    """ssh reaches both hosts, but they do not reach each other."""
    net.cut(1, 2)
    status, told = doctor(net, 0, 1, 2)
    found = error(told)
    assert (status, found["check"]) == (1, "links")
    assert found["host"] == f"{net.host(1).address} -> {net.host(2).address}" and "ETIMEDOUT" in found["seen"]


def test_a_slow_link(net):
    net.delay(2, 20.0)
    status, told = doctor(net, 1, 2)
    warnings = of_level(told, "warning")
    assert status == 0 and {f["check"] for f in warnings} == {"links"}
    assert all(0.03 < link["round_trip"] < 0.2 for link in told["links"])


def test_a_narrow_link(net):
    net.rate(2, 50.0)
    _, told = doctor(net, 1, 2)
    bandwidths = [link["bandwidth"] for link in told["links"]]
    assert all(1e6 < bandwidth < 12e6 for bandwidth in bandwidths)
    assert "less than Gigabit Ethernet" in of_level(told, "warning")[0]["seen"]


def test_a_model_that_a_host_s_user_may_not_look_into(net):
    """It is that host's disk which is in the way, not ssh."""
    secret = net.host(1).path("/home/secret")  # a host's own; most of its other folders are the machine's
    secret.mkdir(mode=0o700)
    doctor(net, 1, 0)
    done = m3dist(net, "doctor", "--hostfile", "/root/hosts.json", "--model", "/home/secret/m3", "--json")
    secret.rmdir()
    found = [f for f in of_level(json.loads(done.stdout), "error") if f["host"] == net.host(1).address]
    assert [(f["check"], f["seen"]) for f in found] == [("disk", "/home/secret/m3: Permission denied")]
    assert "let ann read it there" in found[0]["remedy"]


@pytest.mark.mpi
def test_mpi_has_no_addresses(net):
    """Where the hostfile names none, those are tried on which two hosts share a network."""
    entries = [{name: value for name, value in net.host(i).entry().items() if name != "ips"} for i in (0, 1, 2)]
    status, told = doctor(net, *entries, backend="mpi")
    assert status == 0, of_level(told, "error")
    assert [link["address"] for link in told["links"]] == [net.host(i).address for i in (1, 2, 2)]
    assert all(link["round_trip"] for link in told["links"])


# ---------------------------------------------------------------------------------------------------------------------
# Hostfile


def test_a_hostfile_is_written_and_holds_until_an_address_changes(net):
    """Users and ports of names are those of ~/.ssh/config."""
    one, other, path = net.host(0), net.host(4), "/root/new.json"
    done = m3dist(net, "hostfile", "--hosts", f"{one.name},{other.name}", "-o", path)
    assert done.returncode == 0 and "10.83.0.0/24" in done.stderr, done.stderr
    written = json.loads(one.path(path).read_text())
    hosts = [{"ssh": host.name, "ips": [host.address]} for host in (one, other)]
    assert written == {"backend": "ring", "hosts": hosts}
    assert m3dist(net, "hostfile", "--check", path).returncode == 0
    hosts[1]["ips"] = ["10.83.0.99"]
    one.path(path).write_text(json.dumps(written | {"hosts": hosts}))
    done = m3dist(net, "hostfile", "--check", path)
    assert done.returncode == 1
    assert f"10.83.0.99 is no address of this host. It has {other.address} (eth0)" in done.stdout


def test_no_hostfile_for_hosts_that_cannot_be_reached(net):
    done = m3dist(net, "hostfile", "--hosts", f"127.0.0.1,{REFUSING}", "-o", "/root/none.json")
    assert done.returncode == 1 and "Connection refused" in done.stderr
    assert not net.host(0).path("/root/none.json").exists()
