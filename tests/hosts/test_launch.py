"""The launcher over real ssh between hosts of their own: it starts, explains itself, and always ends.

It runs on host 0. Every wait has a deadline, and after every test no process and no temporary file may be left.
"""

import getpass
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from subprocess import PIPE

import pytest
from network import HostProcess, Network
from outcome import Outcome
from spec import FOUR, ODD, REFUSING, SILENT, Spec, installed_shells

from m3dist import __version__
from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT
from m3dist.watchdog import EXIT_NOT_STARTED, EXIT_STALLED, EXIT_UNREACHABLE

SPECS = FOUR
BACKENDS = ["ring", pytest.param("mpi", marks=pytest.mark.mpi)]
ANSWER = ["--model", "tiny", "--temperature", "0", "--prompt", DEMO_PROMPT]
ENDLESS = ["--model", "tiny", "--temperature", "0", "--raw", "--prompt", "the", "--max-tokens", "1000000"]
STEP_LIMIT = 4.0  # seconds, of ENDLESS
SILENCE_LIMIT = 5.0  # seconds, of ENDLESS
SSH_LIMIT = 10.0  # seconds, the launcher's own, that ssh waits for a connection
END = 10.0  # seconds over the limit that applies, within which every process on every host must be gone


class Cluster:
    """Runs launchers on host 0 of a network."""

    def __init__(self, net: Network):
        self.net = net

    def entry(self, i: int) -> dict:
        """Host i in a hostfile: "this machine" where it is the launcher's."""
        host = self.net.host(i)
        return {"ssh": "127.0.0.1", "ips": [host.address]} if i == 0 else host.entry()

    def command(self, verb: str, hosts: Sequence[int | dict], *words: str, backend: str = "ring") -> list[str]:
        """m3dist `verb` on these hosts, numbers or entries of a hostfile."""
        entries = [self.entry(host) if isinstance(host, int) else host for host in hosts]
        hostfile = "/root/hosts.json"
        self.net.host(0).path(hostfile).write_text(json.dumps({"backend": backend, "hosts": entries}))
        return [self.net.host(0).python, "-m", "m3dist", verb, "--hostfile", hostfile, *words]

    def run(self, command: list[str], timeout: float = 60.0, **options) -> subprocess.CompletedProcess[str]:
        """To the end; a second later every process must be gone."""
        done = self.net.run(0, command, timeout=timeout, **options)
        assert self.net.wait_empty(1.0) == []
        return done

    def decoding(self, hosts: Sequence[int], backend: str) -> HostProcess:
        """A launcher whose ranks have begun to decode, and will not end by themselves."""
        command = self.command("generate", hosts, *ENDLESS, backend=backend)
        env = {"M3DIST_STEP_LIMIT": str(STEP_LIMIT), "M3DIST_SILENCE_LIMIT": str(SILENCE_LIMIT)}
        launcher = self.net.popen(0, command, env=env, stdout=PIPE, stderr=PIPE)
        if len(launcher.stdout.read(20)) < 20:  # some ten tokens
            raise AssertionError(launcher.stderr.read().decode())
        return launcher

    def end_of(
        self, launcher: HostProcess, limit: float = 0.0, but: str = "nothing", what: str = "", backend: str = "ring"
    ) -> tuple[int, str]:
        """Its status and what it says on standard error, once all processes are gone from every host, END seconds
        after `limit` at the latest; where `what` has just happened, a row of the table in docs/failures.md.

        but: a command line of processes that may stay; they are ended here.
        """
        start, within = time.monotonic(), limit + END
        _, said = launcher.communicate(timeout=within)
        left = self.net.wait_empty(within - (time.monotonic() - start), but)
        assert left == [], f"after {within} s; the launcher said:\n{said.decode()}"
        seconds = time.monotonic() - start
        for i in range(len(self.net.hosts)):
            self.net.kill(i, but)
        if what:
            self.record(what, backend, limit, seconds, launcher.returncode, said.decode())
        return launcher.returncode, said.decode()

    def record(self, what: str, backend: str, limit: float, seconds: float, status: int, said: str) -> None:
        lines = [line for line in said.splitlines() if line.startswith("m3dist: ")]
        line = next((line for line in lines if "all ranks were ended" in line), "".join(lines[:1]))
        Outcome(what, backend, "m3dist over ssh", limit, seconds, status, line).record()


@pytest.fixture
def cluster(net) -> Iterator[Cluster]:
    before = temporary_files(net)
    yield Cluster(net)
    assert net.wait_empty(5.0) == []
    assert net.wait_reaped(5.0) == []
    assert temporary_files(net) == before


def temporary_files(net: Network) -> list[set[str]]:
    """Each host's; not m3dist's own lock (claim.py), nor what Open MPI leaves where its daemon is killed."""
    folders, stay = ("/tmp", "/dev/shm"), ("m3dist.lock", "ompi.")
    return [
        {name for folder in folders for name in os.listdir(host.path(folder)) if not name.startswith(stay)}
        for host in net.hosts
    ]


# ---------------------------------------------------------------------------------------------------------------------
# It starts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hosts", [(0, 1), (1, 2)])
def test_generate(cluster, hosts, backend):
    done = cluster.run(cluster.command("generate", hosts, *ANSWER, backend=backend))
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n").endswith(DEMO_ANSWER) and done.stdout.count(DEMO_ANSWER) == 1
    assert "rank 0: weights" in done.stderr and "rank 1: weights" in done.stderr
    assert "Welcome" not in done.stdout + done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_host_has_its_own_user_python_package_and_folder(cluster, backend):
    program = (
        "import getpass, m3dist, os, socket; "
        "print(socket.gethostname(), getpass.getuser(), os.getcwd(), m3dist.__file__, sep='|')"
    )
    done = cluster.run(cluster.command("launch", (0, 1, 2), "--", "python", "-c", program, backend=backend))
    assert done.returncode == 0, done.stderr
    hosts = cluster.net.hosts
    users = [getpass.getuser(), "ann", "bob"]
    folders = ["/root", hosts[1].spec.cwd_path, hosts[2].spec.cwd_path]
    expected = [
        f"[rank {rank}] node{rank}|{users[rank]}|{folders[rank]}|{hosts[rank].spec.repository_path}/m3dist/__init__.py"
        for rank in range(3)
    ]
    assert sorted(done.stdout.splitlines()) == expected


def test_several_ranks_on_a_host(cluster):
    program = "import os, socket; print(socket.gethostname(), os.environ['M3DIST_WORLD'])"
    hosts = (cluster.entry(1) | {"ranks": 2}, cluster.entry(0) | {"ranks": 2}, 2)
    done = cluster.run(cluster.command("launch", hosts, "--", "python", "-c", program))
    assert done.returncode == 0, done.stderr
    expected = [f"[rank {rank}] node{i} 5" for rank, i in enumerate((1, 1, 0, 0, 2))]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ordinary_user_after_root(cluster, backend):
    """On the same hosts, where root's claim of its addresses (claim.py) has left a file."""
    assert cluster.run(cluster.command("generate", (0, 1), *ANSWER, backend=backend)).returncode == 0
    ann = cluster.net.host(1)
    hosts = [{"ssh": "127.0.0.1", "ips": [ann.address]}, cluster.net.host(2).entry()]
    ann.path("/tmp/hosts.json").write_text(json.dumps({"backend": backend, "hosts": hosts}))
    as_ann = ["runuser", "-u", "ann", "--", ann.python, "-m", "m3dist"]
    done = cluster.net.run(1, [*as_ann, "generate", "--hostfile", "/tmp/hosts.json", *ANSWER], cwd=ann.spec.home)
    ann.path("/tmp/hosts.json").unlink()
    assert done.returncode == 0 and done.stdout.rstrip("\n").endswith(DEMO_ANSWER), done.stderr


def test_login_shells():
    shells = installed_shells()
    specs = [
        Spec(user=f"user{i}", shell=shell, python=ODD, cwd=ODD, noise="echo Welcome") for i, shell in enumerate(shells)
    ]
    with Network(Spec(), *specs) as net:
        cluster = Cluster(net)
        program = "import getpass; print(getpass.getuser())"
        done = cluster.run(cluster.command("launch", range(1, 1 + len(shells)), "--", "python", "-c", program))
        assert done.returncode == 0, done.stderr
        assert [line.split()[-1] for line in sorted(done.stdout.splitlines())] == [spec.user for spec in specs]
        assert "Welcome" not in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_standard_input_and_its_end_reach_rank_0_on_another_host(cluster, backend):
    program = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:8])"
    text = "é€😀\n" * 100_000
    done = cluster.run(cluster.command("launch", (1, 2), "--", "python", "-c", program, backend=backend), input=text)
    assert done.returncode == 0, done.stderr
    given, nothing = (hashlib.sha256(data).hexdigest()[:8] for data in (text.encode(), b""))
    assert sorted(done.stdout.splitlines()) == [f"[rank 0] {given}", f"[rank 1] {nothing}"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slow_link_changes_nothing_but_the_time(cluster, backend):
    cluster.net.delay(1, 5)
    done = cluster.run(cluster.command("generate", (0, 1), *ANSWER, backend=backend))
    assert done.returncode == 0 and done.stdout.rstrip("\n").endswith(DEMO_ANSWER), done.stderr
    speed = float(re.search("then ([0-9.]+) tokens/s", done.stderr)[1])
    assert speed < 1000 / (2 * 5)  # a step has one sum at least, and that takes two delays


def test_two_jobs_at_once(cluster):
    jobs = [cluster.net.popen(0, cluster.command("generate", (0, 1), *ANSWER), stdout=PIPE, stderr=PIPE) for _ in "ab"]
    for job in jobs:
        stdout, stderr = job.communicate(timeout=90)
        assert job.returncode == 0 and DEMO_ANSWER.encode() in stdout, stderr.decode()


# ---------------------------------------------------------------------------------------------------------------------
# It does not start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("address", "why", "seconds"), [(REFUSING, "Connection refused", 3.0), (SILENT, "Connection timed out", SSH_LIMIT)]
)
def test_an_unreachable_host(cluster, address, why, seconds, backend):
    absent = {"ssh": address, "ips": [address]}
    start = time.monotonic()
    done = cluster.run(cluster.command("generate", (0, 1, absent), *ANSWER, backend=backend))
    took = time.monotonic() - start
    assert took < seconds + END
    assert done.returncode == EXIT_UNREACHABLE, done.stderr
    assert address in done.stderr and why in done.stderr
    what = f"a host that {'refuses' if address == REFUSING else 'does not answer'}"
    cluster.record(what, backend, 0.0 if address == REFUSING else SSH_LIMIT, took, done.returncode, done.stderr)


def test_a_start_limit_bounds_an_unreachable_host(cluster):
    absent = {"ssh": SILENT, "ips": [SILENT]}
    start = time.monotonic()
    done = cluster.run(cluster.command("launch", (0, absent), "--start-limit", "2", "--", "true"))
    assert time.monotonic() - start < 2.0 + END
    assert done.returncode == EXIT_UNREACHABLE and SILENT in done.stderr, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_version(cluster, backend):
    start = time.monotonic()
    done = cluster.run(cluster.command("generate", (0, 3), *ANSWER, backend=backend))
    took = time.monotonic() - start
    cluster.record("a host with another version", backend, 0.0, took, done.returncode, done.stderr)
    assert done.returncode == EXIT_NOT_STARTED, done.stderr
    assert all(word in done.stderr for word in (cluster.net.host(3).address, "0.0.9", __version__)), done.stderr


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"python": "/no/such python"}, EXIT_NOT_STARTED, ["/no/such python", "not found"]),
        ({"python": "/usr/bin/python3"}, EXIT_NOT_STARTED, ["m3dist"]),
        ({"cwd": "/no/such; folder"}, EXIT_NOT_STARTED, ["/no/such; folder", "cwd"]),
        ({"user": "nobody-here"}, EXIT_UNREACHABLE, ["Permission denied"]),
        ({"ips": ["10.83.0.77"]}, EXIT_NOT_STARTED, ["10.83.0.77", "ips"]),
    ],
)
def test_a_wrong_entry(cluster, wrong, status, words):
    done = cluster.run(cluster.command("generate", (0, cluster.entry(1) | wrong), *ANSWER))
    assert done.returncode == status, done.stderr
    assert all(word in done.stderr for word in (cluster.net.host(1).address, *words)), done.stderr


def test_a_changed_host_key(cluster):
    known = cluster.net.host(0).path("/etc/ssh/ssh_known_hosts")
    before = known.read_text()
    lines = before.splitlines()
    known.write_text("\n".join([lines[0], lines[1].split(" ")[0] + " " + lines[2].split(" ", 1)[1], *lines[2:]]) + "\n")
    try:
        done = cluster.run(cluster.command("generate", (0, 1), *ANSWER))
    finally:
        known.write_text(before)
    assert done.returncode == EXIT_UNREACHABLE and cluster.net.host(1).address in done.stderr, done.stderr
    assert "key" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# It fails in mid-decode


@pytest.mark.parametrize(
    ("backend", "hosts"), [("ring", (0, 1)), ("ring", (1, 2)), pytest.param("mpi", (1, 2), marks=pytest.mark.mpi)]
)
def test_a_host_whose_link_goes_down(cluster, hosts, backend):
    """The launcher sees neither the host nor its rank any more; the host sees nobody, and ends its rank itself.

    Of sshd's own processes there the system knows no better than that their connection is quiet.
    """
    launcher = cluster.decoding(hosts, backend)
    cluster.net.link_down(1)
    status, said = cluster.end_of(
        launcher, SILENCE_LIMIT, "sshd: ann", f"the link of host {hosts.index(1)} of 2 goes down", backend
    )
    assert status == EXIT_UNREACHABLE, said
    assert cluster.net.host(1).address in said and "decode step" in said, said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_link_between_two_ranks_that_goes_down(cluster, backend):
    launcher = cluster.decoding((1, 2), backend)
    cluster.net.cut(1, 2)
    what = "packets between two hosts vanish; the launcher reaches both"
    status, said = cluster.end_of(launcher, STEP_LIMIT, what=what, backend=backend)
    assert status == EXIT_STALLED, said
    assert all(word in said for word in (cluster.net.host(1).address, cluster.net.host(2).address, "decode step")), said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_rank_on_another_host(cluster, backend):
    launcher = cluster.decoding((0, 1), backend)
    assert cluster.net.kill(1, ") m3dist generate")
    status, said = cluster.end_of(launcher, what="rank 1 is killed", backend=backend)
    assert status == 128 + signal.SIGKILL, said
    assert all(word in said for word in ("rank 1 on 10.83.0.2", "SIGKILL", "decode step")), said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_rank_on_another_host(cluster, backend):
    launcher = cluster.decoding((0, 1), backend)
    assert cluster.net.freeze(1, ") m3dist generate")
    status, said = cluster.end_of(launcher, STEP_LIMIT, what="rank 1 is stopped", backend=backend)
    assert status == EXIT_STALLED, said
    assert all(word in said for word in ("rank 1 on 10.83.0.2", "stopped", "decode step")), said


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_host_that_freezes_whole(cluster, backend):
    launcher = cluster.decoding((0, 1), backend)
    assert cluster.net.freeze(1)
    start = time.monotonic()
    _, said = launcher.communicate(timeout=SILENCE_LIMIT + END)
    took, what = time.monotonic() - start, "a host freezes; all ended but there, where it does when it goes on"
    cluster.record(what, backend, SILENCE_LIMIT, took, launcher.returncode, said.decode())
    assert launcher.returncode == EXIT_UNREACHABLE and "10.83.0.2" in said.decode(), said.decode()
    assert cluster.net.processes(0) == []
    cluster.net.kill(1, number=signal.SIGCONT)
    assert cluster.net.wait_empty(END) == []


@pytest.mark.parametrize(
    ("backend", "what"),
    [
        ("ring", "m3dist.cluster.agent"),
        ("ring", "sshd: "),
        pytest.param("mpi", "m3dist.cluster.agent", marks=pytest.mark.mpi),
        pytest.param("mpi", "orted", marks=pytest.mark.mpi),
    ],
)
def test_a_killed_agent_or_connection(cluster, what, backend):
    launcher = cluster.decoding((0, 1), backend)
    assert cluster.net.kill(1, what)
    name = {"sshd: ": "the connection to host 1", "orted": "mpirun's daemon on host 1"}.get(what, "host 1's agent")
    status, said = cluster.end_of(launcher, what=f"{name} is killed", backend=backend)
    assert status == EXIT_UNREACHABLE or (what == "orted" and status != 0), said
    assert "10.83.0.2" in said, said


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_the_launcher(cluster, number, backend):
    launcher = cluster.decoding((1, 2), backend)
    launcher.send_signal(number)
    status, said = cluster.end_of(launcher, what=f"the launcher gets {number.name}", backend=backend)
    assert status == (-number if number == signal.SIGKILL else 128 + number), said
    if number == signal.SIGKILL:  # the next start succeeds at once
        done = cluster.run(cluster.command("generate", (1, 2), *ANSWER, backend=backend))
        assert done.returncode == 0 and DEMO_ANSWER in done.stdout, done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("killed", [False, True])
def test_a_daemon_of_mpirun_that_never_answers(cluster, killed):
    """mpirun itself would wait for it for ever, with or without a launcher."""
    command = cluster.command("launch", (0, 1), "--start-limit", "4", "--", "true", backend="mpi")
    launcher = cluster.net.popen(0, command, stderr=PIPE)
    cluster.net.wait_for(1, "orted --daemonize")
    assert cluster.net.freeze(1, "orted")
    if killed:
        launcher.kill()
    _, said = launcher.communicate(timeout=4.0 + END)
    assert cluster.net.wait_gone(0, "mpirun", END) == []
    cluster.net.kill(1, "orted")  # frozen before it had left ssh's session, it has ended with that
    assert cluster.net.wait_empty(END) == []
    assert killed or launcher.returncode in (EXIT_UNREACHABLE, EXIT_NOT_STARTED), said
    assert killed or b"10.83.0.2" in said, said


@pytest.mark.parametrize(
    ("backend", "when", "last"),
    [
        ("ring", "ssh -T", 1),
        ("ring", "ssh -T", SILENT),
        ("ring", "m3dist generate --hostfile", 1),
        pytest.param("mpi", "mpirun", 1, marks=pytest.mark.mpi),
        pytest.param("mpi", "mpirun", SILENT, marks=pytest.mark.mpi),
        pytest.param("mpi", "m3dist.cluster.agent", 1, marks=pytest.mark.mpi),
    ],
)
def test_a_launcher_killed_while_it_starts(cluster, last, when, backend):
    """As soon as there is such a process; where a host is silent, ssh is still waiting for it."""
    hosts = (0, 2, 1 if last == 1 else {"ssh": SILENT, "ips": [SILENT]})
    launcher = cluster.net.popen(0, cluster.command("generate", hosts, *ENDLESS, backend=backend), stderr=PIPE)
    cluster.net.wait_for(0, when)
    launcher.kill()
    cluster.end_of(launcher, SSH_LIMIT + 2.0 - END)
