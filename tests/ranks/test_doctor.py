"""m3dist doctor and hostfile with real probes: on this machine, and behind an `ssh` that starts them here too."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from m3dist.cluster.hostfile import Host, Hostfile, read_hostfile
from m3dist.doctor import survey
from m3dist.doctor.examination import Examination, Finding
from m3dist.doctor.findings import find
from m3dist.doctor.program import as_json, examine
from m3dist.doctor.report import HostReport, NoAnswer
from m3dist.doctor.survey import Survey

ROOT = Path(__file__).parents[2]
DEADLINE = 40.0
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
cd /
case "$2" in
    off*) echo "ssh: connect to host $2 port 22: Connection refused" >&2; exit 255 ;;
    silent*) exec sleep 60 ;;
    noisy*) echo "Welcome to $2"; printf "no newline: " ;;
esac
exec /bin/sh -c "$3"
"""


def m3dist(*argv: str, **others) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "m3dist", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE, **others)


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def ssh(tmp_path, monkeypatch):
    """An `ssh` that starts everything on this machine; hosts are as their names say."""
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "ssh", SSH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(survey, "GREETING", 3.0)


def examined(*hosts: Host, backend: str = "ring") -> tuple[Examination, list[Finding]]:
    """As with a hostfile, which could not have loopback addresses for several hosts."""
    seen = examine(Hostfile("hosts.json", backend, {}, hosts))
    return seen, find(seen)


def host(name: str, **others) -> Host:
    return Host(name, ips=("127.0.0.1",), **others)


def errors(found: list[Finding]) -> list[tuple[str, str]]:
    """But for one: all hosts are this machine, and doctor sees that."""
    return [(f.check, f.host) for f in found if f.level == "error" and not f.seen.startswith("is the same machine")]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_this_machine():
    done = m3dist("doctor", "-n", "2", "--model", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A launch would work." in done.stdout and not done.stderr


def test_json_holds_the_evidence():
    """From which the same findings follow."""
    done = m3dist("doctor", "-n", "2", "--json")
    told = json.loads(done.stdout)
    assert told["works"] is True and (told["backend"], told["world"]) == ("ring", 2)
    [link] = told["links"]
    assert (link["address"], link["interface"]) == ("127.0.0.1", "lo0" if sys.platform == "darwin" else "lo")
    assert link["round_trip"] > 0 and link["bandwidth"] > 1e6
    reports = [HostReport(each["report"], each["skew"]) for each in told["hosts"]]
    hostfile = Hostfile("-n 2", "ring", {}, (host("127.0.0.1", ranks=2),))
    again = [vars(f) for f in find(Examination(hostfile, "ring", reports, told["launcher"]))]
    assert again == [f for f in told["findings"] if f["check"] != "links"]


def test_a_model_that_does_not_fit():
    done = m3dist("doctor", "-n", "2", "--model", "MiniMaxAI/MiniMax-M3", "--context", "1000000")
    assert done.returncode == 1
    assert "A launch would not work" in done.stdout and "weights, cache and activations need" in done.stdout


@pytest.mark.parametrize(
    "ranks, model, status, level, seen",
    [
        ("9", "tiny", 1, "error", "Use at most 8 ranks"),
        ("2", "an/unknown-model-of-the-hub", 0, "warning", "neither a directory"),
        ("2", "no/such/directory", 1, "warning", "neither a directory"),
    ],
)
def test_a_cut_that_cannot_be_made_or_a_model_that_is_not_known(ranks, model, status, level, seen):
    done = m3dist("doctor", "-n", ranks, "--model", model, "--json")
    [finding] = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "plan"]
    assert (done.returncode, finding["level"]) == (status, level) and seen in finding["seen"] and finding["remedy"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["doctor", "--hostfile", "no-such-file"], "no-such-file: cannot be read"),
        (["doctor", "-n", "2", "--weights", "1,2,3"], "--weights: needs one number for each of the 2 ranks"),
        (["hostfile", "--hosts", "mac1,-oProxyCommand=x"], "--hosts: must be names that ssh knows"),
        (["hostfile", "--check", "no-such-file"], "no-such-file: cannot be read"),
        (["hostfile"], "one of the arguments --hosts --check is required"),
        (["hostfile", "--check", "a", "-o", "b"], "--check: not allowed with -o"),
    ],
)
def test_wrong_input(argv, message):
    done = m3dist(*argv)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


def test_a_hostfile_is_written_and_holds(tmp_path):
    path = str(tmp_path / "hosts.json")
    done = m3dist("hostfile", "--hosts", "127.0.0.1,127.0.0.1", "-o", path)
    assert (done.returncode, done.stdout) == (0, "") and "this machine alone" in done.stderr
    assert read_hostfile(path).world == 2
    done = m3dist("hostfile", "--check", path)
    assert done.returncode == 0 and done.stdout.endswith("holds\n")
    assert m3dist("doctor", "--hostfile", path).returncode == 0


def test_an_address_that_is_gone(tmp_path):
    path = tmp_path / "hosts.json"
    path.write_text('{"backend": "ring", "hosts": [{"ssh": "127.0.0.1", "ips": ["192.0.2.1"], "ranks": 2}]}')
    for argv in (["hostfile", "--check", str(path)], ["doctor", "--hostfile", str(path)]):
        done = m3dist(*argv)
        assert done.returncode == 1 and "192.0.2.1 is no address of this host" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Hosts behind ssh


def test_hosts_that_are_well(ssh):
    seen, found = examined(host("alpha"), host("noisy"), host("127.0.0.1"))
    assert errors(found) == []
    assert [m.works for m in seen.measured] == [True] * 3
    assert all(isinstance(report, HostReport) and abs(report.skew) < 1.0 for report in seen.reports)


def test_one_host_that_cannot_be_reached_is_a_finding(ssh):
    began = time.monotonic()
    seen, found = examined(host("alpha"), host("off"), host("silent"), host("beta"))
    assert errors(found) == [("ssh", "off"), ("ssh", "silent")]
    assert time.monotonic() - began < 15.0
    assert [isinstance(report, NoAnswer) for report in seen.reports] == [False, True, True, False]
    remedy = next(f.remedy for f in found if f.host == "off")
    assert "Remote Login" in remedy
    assert [m.works for m in seen.measured] == [False, False, False, True]  # beta to alpha
    assert json.dumps(as_json(seen, found, 1.0))


@pytest.mark.mpi
def test_mpi_needs_more_of_a_name_than_ssh(ssh, tmp_path, monkeypatch):
    """A name that ~/.ssh/config alone knows leads ssh to the host, but not the launcher, which starts mpirun."""
    seen, found = examined(Host("alpha.invalid", python=sys.executable), Host("127.0.0.1"), backend="mpi")
    [finding] = [f for f in found if f.level == "error" and f.check == "mpi"]
    assert finding.host == "launcher" and finding.seen.startswith("alpha.invalid: no way to alpha.invalid: ")
    assert isinstance(seen.reports[0], HostReport)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert survey.launcher(seen.hostfile, "mpi")["mpirun"] is None


def test_a_host_without_m3dist(ssh, tmp_path):
    bare = script(tmp_path / "python", "#!/bin/sh\necho '/usr/bin/python3: No module named m3dist' >&2\nexit 1\n")
    _, found = examined(host("alpha"), host("beta", python=str(bare)))
    [finding] = [f for f in found if f.host == "beta" and f.check == "ssh"]
    assert finding.level == "error" and "No module named m3dist" in finding.seen and "python" in finding.remedy


def test_a_python_that_is_not_there(ssh):
    _, found = examined(host("alpha"), host("beta", python="/no/such/python"))
    [finding] = [f for f in found if f.host == "beta" and f.check == "ssh"]
    assert finding.level == "error" and "/no/such/python" in finding.seen


def test_another_build(ssh, tmp_path):
    copy = tmp_path / "copy" / "m3dist"
    shutil.copytree(ROOT / "m3dist", copy, ignore=shutil.ignore_patterns("__pycache__", "checkpoint"))
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "\n# changed\n")
    other = script(tmp_path / "python", f'#!/bin/sh\nexec env PYTHONPATH={copy.parent} {sys.executable} "$@"\n')
    _, found = examined(host("alpha"), host("beta"), host("gamma", python=str(other)))
    assert errors(found) == [("versions", "gamma")]


def test_a_working_directory_that_is_missing(ssh):
    _, found = examined(host("alpha"), host("beta", cwd="/no/such"))
    assert errors(found) == [("disk", "beta")]


def test_nothing_is_left(ssh, tmp_path):
    """Neither probes nor what they started, here a command that takes too long; nor what hangs in ssh."""
    before = set(psutil.Process().children(recursive=True))
    script(tmp_path / "bin" / "mpirun", "#!/bin/sh\nexec sleep 60\n")
    with Survey(Hostfile("", "ring", {}, (host("alpha"), host("127.0.0.1"), host("silent"))), 5.0) as asked:
        asked.describe()
        left = [child for child in psutil.Process().children(recursive=True) if child not in before]
        assert sum("sleep" in child.cmdline() for child in left) == 2
    _, alive = psutil.wait_procs(left, timeout=5.0)
    assert not alive
