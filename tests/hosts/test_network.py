"""The test bed is what it says: separate hosts, reached by real ssh, links that go down and slow, and nothing left."""

import json
import os
import pwd
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from network import Network
from spec import FOUR, ODD, REFUSING, REPOSITORY, SILENT, Spec, installed_shells

SPECS = FOUR
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=1"]

ECHO = """
import socket, threading
def serve(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
listener = socket.create_server(("", 7))
print("listening", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
ROUND_TRIPS = """
import socket, statistics, sys, time
connection = socket.create_connection((sys.argv[1], 7), timeout=2)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    connection.sendall(b"x" * 100)
    connection.recv(100)
    print((time.perf_counter() - start) * 1000)
"""
UPLOAD = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7), timeout=10)
size, got, start = int(sys.argv[2]), 0, time.perf_counter()
for _ in range(size // 65536):
    connection.sendall(bytes(65536))
    left = 65536
    while left:
        left -= len(connection.recv(left))
print(size * 8 / 1e6 / (time.perf_counter() - start))
"""


SUMS = """
import time
import mlx.core as mx
group, seconds = mx.distributed.init(strict=True, backend="ring"), []
for _ in range(20):
    start = time.perf_counter()
    mx.eval(mx.distributed.all_sum(mx.ones(6144), group=group, stream=mx.cpu))
    seconds.append(time.perf_counter() - start)
print(min(seconds) * 1000)  # the ring's threads spin, and slow each other down on a small machine
"""


def python(net: Network, i: int, program: str, *arguments: str, **options):
    return net.run(i, [net.host(i).python, "-IS", "-c", program, *arguments], **options)


def serve_echo(net: Network, i: int) -> None:
    server = net.popen(i, [net.host(i).python, "-IS", "-uc", ECHO], stdout=subprocess.PIPE, text=True)
    assert server.stdout.readline() == "listening\n"


def milliseconds(net: Network, i: int, j: int, count: int = 30) -> float:
    """The median round trip over TCP from host i to the echo server of host j."""
    done = python(net, i, ROUND_TRIPS, net.host(j).address, str(count))
    assert done.returncode == 0, done.stderr
    return statistics.median(map(float, done.stdout.split()))


# ---------------------------------------------------------------------------------------------------------------------
# Hosts


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("j", range(4))
def test_ssh_from_each_to_each(net, i, j):
    host = net.host(j)
    question = "id -un; hostname; echo $SHELL; readlink /proc/self/ns/net"
    done = net.run(i, [*SSH, host.name, question])
    assert done.returncode == 0, done.stderr
    user, name, shell, namespace = done.stdout.splitlines()[-4:]
    assert (user, name, shell) == (host.spec.user, host.name, host.spec.shell)
    assert namespace == os.readlink(f"/proc/{host.pid}/ns/net") != os.readlink("/proc/self/ns/net")


def test_addresses_processes_and_files_are_a_hosts_own(net):
    assert len({host.address for host in net.hosts}) == len({host.pid for host in net.hosts}) == 4
    net.popen(1, ["sleep", "60"])
    assert net.wait_for(1, "sleep 60") and not any(net.find(i, "sleep 60") for i in (0, 2, 3))
    net.host(1).path("/tmp/mine").write_text("1")
    assert [net.run(i, ["cat", "/tmp/mine"]).stdout for i in range(4)] == ["", "1", "", ""]
    assert not Path("/tmp/mine").exists()


@pytest.mark.parametrize("i", range(4))
def test_a_hosts_user_finds_m3dist_with_its_python(net, i):
    host = net.host(i)
    program = "import m3dist, os; print(m3dist.__version__, m3dist.__file__, os.getcwd(), sep='\\n')"
    command = f"cd {shlex.quote(host.spec.cwd_path)} && {shlex.join([host.python, '-c', program])}"
    done = net.run(0, [*SSH, host.name, command])
    assert done.returncode == 0, done.stderr
    version, file, cwd = done.stdout.splitlines()[-3:]
    assert (version == "0.0.9") == (i == 3) and cwd == host.spec.cwd_path
    assert Path(file).is_relative_to("/root/other" if i == 3 else host.spec.repository_path)
    assert (ODD in file) == (i == 2)
    assert done.stdout.startswith("Welcome\n") == (i == 1)


def test_a_repository_elsewhere_is_not_where_it_was(net):
    assert net.run(2, ["ls", "-A", REPOSITORY]).stdout == ""


@pytest.mark.parametrize("shell", installed_shells())
def test_login_shells(shell):
    with Network(Spec(), Spec(user="dan", shell=shell)) as net:
        done = net.run(0, [*SSH, "node1", "echo $SHELL"])
        assert (done.stdout, done.returncode) == (f"{shell}\n", 0), done.stderr


def test_a_host_without_sshd_and_addresses_without_a_host():
    with Network(Spec(), Spec(port=0)) as net:
        start = time.monotonic()
        for address in ("node1", REFUSING):
            done = net.run(0, [*SSH, address, "true"])
            assert done.returncode == 255 and "Connection refused" in done.stderr
        assert time.monotonic() - start < 1.0
        done = net.run(0, [*SSH, SILENT, "true"])
        assert done.returncode == 255 and "timed out" in done.stderr


def test_a_stranger_gets_nothing(net):
    options = ["-o", "IdentityFile=/none", "-o", "IdentitiesOnly=yes"]
    done = net.run(0, [*SSH, *options, "node2", "true"])
    assert done.returncode == 255 and "Permission denied" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_run_gives_status_output_and_input(net):
    done = net.run(2, ["sh", "-c", "cat; pwd; echo $X >&2; exit 3"], input="é\n", env={"X": "a b"}, cwd="/tmp")
    assert (done.returncode, done.stdout, done.stderr) == (3, "é\n/tmp\n", "a b\n")


def test_run_has_a_deadline(net):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="half\n"):
        net.run(1, ["sh", "-c", "echo half; sleep 60; true"], timeout=0.5)
    assert time.monotonic() - start < 5.0


def test_signals_reach_the_program(net):
    process = net.popen(1, ["sleep", "60"])
    assert process.poll() is None
    process.kill()
    assert process.wait(5) == -signal.SIGKILL
    process = net.popen(1, ["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.02; done"], stdout=-1)
    process.stdout.readline()
    process.terminate()
    assert process.wait(5) == 7


def test_a_frozen_process_stays_and_is_killed(net):
    process = net.popen(0, ["sleep", "1"])
    net.wait_for(0, "sleep 1")
    assert [frozen.state for frozen in net.freeze(0, "sleep 1")] != ["T"]  # as it was before
    time.sleep(1.2)
    assert [frozen.state for frozen in net.find(0, "sleep 1")] == ["T"]
    net.kill(0, "sleep 1", signal.SIGCONT)
    assert process.wait(5) == 0
    process = net.popen(0, ["sleep", "60"])
    net.wait_for(0, "sleep 60")
    net.freeze(0, "sleep 60")
    assert len(net.kill(0, "sleep 60")) == 1 and process.wait(5) == -signal.SIGKILL


def test_orphans_are_seen_and_zombies_told_apart(net):
    net.run(1, ["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &"])
    assert [(i, process.command) for i, process in net.wait_empty(0.1)] == [(1, "sleep 60")]
    net.kill(1)
    assert net.wait_empty(5) == [] and net.zombies(1) == []  # the first process reaps orphans
    forgetful = "import subprocess, time; child = subprocess.Popen(['true']); time.sleep(60)"
    net.popen(1, [net.host(1).python, "-IS", "-c", forgetful])
    net.wait_for(1, "time.sleep")
    end = time.monotonic() + 5
    while not net.zombies(1):
        assert time.monotonic() < end
    assert [zombie.command for zombie in net.zombies(1)] == ["(true)"]
    assert len(net.processes(1)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Links


def test_link_down_cuts_and_up_mends(net):
    serve_echo(net, 1)
    assert milliseconds(net, 0, 1) < 5
    net.link_down(1)
    done = python(net, 0, ROUND_TRIPS, net.host(1).address, "1")
    assert done.returncode and "timed out" in done.stderr
    assert net.run(0, [*SSH, "node2", "true"]).returncode == 0
    net.link_up(1)
    assert milliseconds(net, 0, 1) < 5


def test_cut_is_between_two_hosts_only(net):
    serve_echo(net, 1)
    net.cut(1, 2)
    done = python(net, 2, ROUND_TRIPS, net.host(1).address, "1")
    assert done.returncode and "timed out" in done.stderr
    assert milliseconds(net, 0, 1) < 5
    net.mend(1, 2)
    assert milliseconds(net, 2, 1) < 5


def test_delay_is_two_in_a_round_trip_and_keeps_connections(net):
    serve_echo(net, 1)
    slow = "import time\nfor _ in range(4): time.sleep(0.5); print(_, flush=True)"
    through = net.popen(0, [*SSH, "node1", shlex.join(["python3", "-ISc", slow])], stdout=subprocess.PIPE, text=True)
    assert through.stdout.readline() == "Welcome\n"
    plain = milliseconds(net, 0, 1)
    for delay in (5, 20):
        net.delay(1, delay)
        milliseconds(net, 0, 1, 1)  # the bridges learn the way
        assert plain + 2 * delay - 0.5 < milliseconds(net, 0, 1) < plain + 2 * delay + 5
    net.delay(1, 0)
    assert milliseconds(net, 0, 1) < 5
    assert through.communicate(timeout=10)[0].split()[-1] == "3" and through.returncode == 0


def test_a_rings_sum_takes_two_delays(net):
    ranks, delay = 2, 30
    addresses = json.dumps([[f"{net.host(i).address}:{32323 + i}"] for i in range(ranks)])
    for i in range(ranks):
        net.host(i).path("/tmp/ring.json").write_text(addresses)
    net.delay(1, delay)
    programs = []
    for i in range(ranks):
        env = {"MLX_HOSTFILE": "/tmp/ring.json", "MLX_RANK": str(i)}
        programs.append(net.popen(i, [net.host(i).python, "-c", SUMS], env=env, stdout=subprocess.PIPE))
    for program in programs:
        fastest = float(program.communicate(timeout=30)[0])
        assert 2 * (ranks - 1) * delay - 1 < fastest < 3 * (ranks - 1) * delay


def test_rate_limits_both_ways(net):
    serve_echo(net, 1)
    size = 4 << 20
    net.rate(1, 80)
    start = time.monotonic()
    done = python(net, 0, UPLOAD, net.host(1).address, str(size))
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start > 0.35 and float(done.stdout) < 80
    net.rate(1, 0)
    done = python(net, 0, UPLOAD, net.host(1).address, str(size))
    assert float(done.stdout) > 200


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left


def machine() -> dict[str, object]:
    """What a bed might change on the machine."""
    mounts = Path("/proc/self/mountinfo").read_text()
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    users = [entry.pw_name for entry in pwd.getpwall()]
    folders = {folder: set(os.listdir(folder)) for folder in ("/run", "/home", "/root", "/etc", "/etc/ssh")}
    return {"mounts": mounts, "links": links, "users": users, "folders": folders}


def namespaces(net: Network) -> set[str]:
    kinds = ("net", "mnt", "pid", "ipc", "uts")
    return {os.readlink(f"/proc/{host.pid}/ns/{kind}") for host in net.hosts for kind in kinds}


def inhabited(spaces: set[str]) -> list[str]:
    """Processes of the machine that are in one of these namespaces."""
    found = []
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            if os.readlink(link) in spaces:
                found.append(str(link))
        except OSError:
            pass  # it has ended meanwhile
    return found


def populate(net: Network) -> None:
    """Programs and relays of every kind that a test may leave."""
    net.popen(0, ["sleep", "60"])
    net.run(1, ["sh", "-c", "setsid sleep 61 >/dev/null 2>&1 &"])
    net.popen(0, [*SSH, "node1", "sleep 62"])
    net.wait_for(1, "sleep 62")
    net.delay(1, 1)
    net.link_down(0)


def test_nothing_is_left():
    before = machine()
    net = Network(Spec(), Spec(user="ann", cwd="work"))
    spaces = namespaces(net)
    populate(net)
    assert len(spaces) == 10 and inhabited(spaces)
    start = time.monotonic()
    net.close()
    assert time.monotonic() - start < 5.0
    assert not inhabited(spaces) and machine() == before


def test_nothing_is_left_by_a_bed_that_cannot_be_built():
    before = machine()
    with pytest.raises(RuntimeError, match="did not start"):
        Network(Spec(), Spec(user="no such user name"))
    assert machine() == before


KILLED = """
import json, sys, time
from network import Network
from spec import Spec
from test_network import namespaces, populate
net = Network(Spec(), Spec(user="ann"))
populate(net)
print(json.dumps([*namespaces(net)]), flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_tests_are_killed():
    before = machine()
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    owner = subprocess.Popen([sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": path}, stdout=-1)
    spaces = set(json.loads(owner.stdout.readline()))
    owner.kill()
    owner.wait(5)
    owner.stdout.close()
    end = time.monotonic() + 5
    while left := inhabited(spaces):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert machine() == before


def test_two_beds_do_not_meet(net):
    with Network(Spec()) as other:
        assert other.host(0).address == net.host(0).address
        serve_echo(net, 0)
        done = python(other, 0, ROUND_TRIPS, net.host(0).address, "1")
        assert done.returncode and "refused" in done.stderr
