"""run_job with real processes: a launcher of its own for each test, and small rank programs that misbehave.

Every wait has a deadline, so a hang is a failure.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3dist.cluster import agent
from m3dist.watchdog import EXIT_NOT_STARTED

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0

LAUNCHER = """
import sys, time
from m3dist.cluster.hostfile import local_hostfile
from m3dist.cluster.supervise import Job, run_job
ranks, program, options = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
ours = ("stdin", "stdout", "stderr") if sys.stderr.isatty() else ("stdin", "stdout")
command = options.pop("command", (None, program))
hostfile, options = local_hostfile(ranks, options.pop("backend", "ring")), {"ours": ours, "end_limit": 1.0} | options
status = run_job(Job(hostfile, command, **options))
with open("cpu", "w") as file:
    print(time.process_time(), file=file)
sys.exit(status)
"""

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from m3dist.cluster import lifeline
rank, world = int(os.environ["MLX_RANK"]), int(os.environ["M3DIST_WORLD"])
lifeline.watch()
Path(f"pid{rank}").write_text(str(os.getpid()))
def all_here():
    while not all(Path(f"pid{other}").exists() for other in range(world)):
        time.sleep(0.01)
"""


class Launcher:
    """Runs a launcher in `folder`, with its temporary files in `folder`/tmp."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def start(self, program: str, ranks: int = 2, prelude: str = PRELUDE, options: dict | None = None, **streams):
        (self.folder / "program.py").write_text(prelude + program)
        (self.folder / "launcher.py").write_text(LAUNCHER)
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        return subprocess.Popen(
            [sys.executable, "launcher.py", str(ranks), "program.py", repr(options or {})],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            **streams,
        )

    def run(self, program: str, ranks: int = 2, input: bytes | None = None, **options) -> subprocess.CompletedProcess:
        """Run to the end; afterwards no rank and no temporary file may be left."""
        process = self.start(program, ranks, **options, **({} if input is None else {"stdin": subprocess.PIPE}))
        stdout, stderr = process.communicate(input, timeout=DEADLINE)
        self.check_nothing_is_left()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout.decode(), stderr.decode())

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid*")]

    def wait_for_ranks(self, count: int) -> None:
        wait_until(lambda: len([path for path in self.folder.glob("pid*") if path.read_text()]) == count)

    def check_nothing_is_left(self) -> None:
        wait_until(lambda: not any(map(alive, self.pids())))
        wait_until(lambda: not list(self.temporary.iterdir()))


@pytest.fixture
def launcher(tmp_path):
    launcher = Launcher(tmp_path)
    yield launcher
    for pid in filter(alive, launcher.pids()):
        os.kill(pid, signal.SIGKILL)


def wait_until(condition) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit, "deadline passed"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to notice its end does not."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


# ---------------------------------------------------------------------------------------------------------------------
# A job that goes well


def test_output_goes_where_it_belongs(launcher):
    done = launcher.run('print(f"out {rank}"); print(f"err {rank}", file=sys.stderr)', ranks=3)
    assert done.returncode == 0
    assert done.stdout == "out 0\n"
    assert sorted(done.stderr.splitlines()) == [
        "[rank 1] err 1", "[rank 1] out 1", "[rank 2] err 2", "[rank 2] out 2", "err 0",
    ]  # fmt: skip


def test_ranks_find_each_other_over_the_ring(launcher):
    program = """
from m3dist.cluster.environment import detect
launch = detect(os.environ)
assert (launch.launcher, launch.backend, launch.rank, launch.world) == ("m3dist", "ring", rank, world)
import mlx.core as mx
group = mx.distributed.init(strict=True, backend=launch.backend)
total = mx.distributed.all_sum(mx.array([rank + 1]), group=group).item()
print(total, launch.job)
mx.eval(mx.distributed.all_sum(mx.array([1]), group=group))
"""
    done = launcher.run(program, ranks=3)
    assert done.returncode == 0, done.stderr
    outputs = [done.stdout.strip(), *(line.partition("] ")[2] for line in done.stderr.splitlines())]
    assert len(outputs) == 3 and len(set(outputs)) == 1  # the same sum and the same job everywhere
    assert outputs[0].startswith("6 ")


def test_a_world_of_one_has_no_ring(launcher):
    program = "from m3dist.cluster.environment import detect; print(detect(os.environ).backend)"
    done = launcher.run(program, ranks=1)
    assert (done.returncode, done.stdout) == (0, "None\n")


def test_standard_input_and_its_end_reach_rank_0_only(launcher):
    done = launcher.run("print(rank, repr(sys.stdin.read()))", input="grüezi\n".encode())
    assert done.returncode == 0
    assert done.stdout == "0 'grüezi\\n'\n"
    assert done.stderr == "[rank 1] 1 ''\n"


def test_characters_split_between_writes_arrive_whole(launcher):
    program = """
for byte in "é你👋".encode() * 200:
    os.write(1, bytes([byte]))
    os.write(2, bytes([byte]))
"""
    done = launcher.run(program)
    assert done.stdout == "é你👋" * 200
    assert sorted(done.stderr.splitlines()) == ["[rank 1] " + "é你👋" * 200] * 2 + ["é你👋" * 200]


def test_rank_0_keeps_the_terminal(launcher):
    ours, theirs = pty.openpty()
    process = launcher.start("print(sys.stdout.isatty(), sys.stderr.isatty())", stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(DEADLINE) == 0
    printed = os.read(ours, 4096).decode()
    os.close(ours)
    assert sorted(printed.split("\r\n")) == ["", "True True", "[rank 1] False False"]


def test_the_launcher_sleeps_while_the_ranks_work(launcher):
    began = time.monotonic()
    done = launcher.run("time.sleep(3)", ranks=2)
    assert done.returncode == 0 and time.monotonic() - began >= 3
    assert float((launcher.folder / "cpu").read_text()) < 0.6  # imports included; a busy launcher would use 3


# ---------------------------------------------------------------------------------------------------------------------
# A rank that fails


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exit_code_ends_the_job_and_is_its_status(launcher, culprit):
    done = launcher.run(f"all_here(); sys.exit(3) if rank == {culprit} else time.sleep(60)")
    assert done.returncode == 3
    assert f"m3dist: rank {culprit} ended with exit code 3 in start; all ranks were ended" in done.stderr


def test_a_signal_death_is_named(launcher):
    done = launcher.run("all_here(); os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert done.returncode == 128 + signal.SIGKILL
    assert "m3dist: rank 1 was killed by SIGKILL" in done.stderr


def test_a_crash_shows_where(launcher):
    done = launcher.run("all_here(); os.abort() if rank == 1 else time.sleep(60)")
    assert done.returncode == 128 + signal.SIGABRT
    assert "    Fatal Python error: Aborted" in done.stderr


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_last_lines_of_the_failing_rank_are_shown_again(launcher, culprit):
    done = launcher.run(f'all_here(); time.sleep(60 * (rank != {culprit})); raise ValueError("no such tensor: é")')
    assert done.returncode == 1
    shown = done.stderr.partition(f"m3dist: the last lines of rank {culprit}:\n")[2].splitlines()
    assert shown[0] == "    Traceback (most recent call last):"
    assert shown[-1] == "    ValueError: no such tensor: é"


def test_the_rank_that_failed_is_blamed_not_the_ones_that_lost_it(launcher):
    """Rank 1's end is noticed last, as when it prints a long traceback."""
    done = launcher.run("all_here(); time.sleep(0.5) if rank == 1 else 0; sys.exit(5 if rank == 1 else 75)", ranks=3)
    assert done.returncode == 5
    assert "m3dist: rank 1 ended with exit code 5" in done.stderr


def test_a_silent_rank_is_named_by_those_that_waited_for_it(launcher):
    done = launcher.run("all_here(); time.sleep(60) if rank == 1 else sys.exit(76)")
    assert done.returncode == 76
    assert "m3dist: rank 0 ended with exit code 76 in start; still running then: rank 1" in done.stderr


def test_a_stopped_rank_is_ended_too(launcher):
    began = time.monotonic()
    done = launcher.run(
        "all_here(); os.kill(os.getpid(), signal.SIGSTOP) if rank == 1 else (time.sleep(0.3), sys.exit(76))"
    )
    assert done.returncode == 76
    assert time.monotonic() - began < 15


def test_a_rank_that_ends_early_ends_the_job(launcher):
    done = launcher.run("all_here(); time.sleep(60) if rank == 0 else sys.exit(0)")
    assert done.returncode == 1
    assert "m3dist: rank 1 ended (exit code 0) but after 1 s rank 0 had not" in done.stderr


def test_a_rank_that_ignores_sigterm_is_killed(launcher):
    began = time.monotonic()
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); all_here(); time.sleep(60) if rank else sys.exit(4)"
    done = launcher.run(program)
    assert done.returncode == 4
    assert agent.END_GRACE < time.monotonic() - began < 15


def test_a_rank_that_never_starts(launcher):
    program = "import time; time.sleep(60)"
    done = launcher.run(program, prelude="", options={"start_limit": 1.0})
    assert done.returncode == EXIT_NOT_STARTED
    assert "m3dist: ranks 0, 1 did not start within 1 s" in done.stderr


def test_a_command_that_does_not_exist(launcher):
    done = launcher.run("", options={"command": ("no-such-command",)})
    assert done.returncode == EXIT_NOT_STARTED
    assert "m3dist: cannot start rank 0: [Errno 2] No such file or directory: 'no-such-command'" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Ring addresses

CLAIMER = """
import json, sys, time
from pathlib import Path
from m3dist.cluster import claim
from m3dist.cluster.environment import Launch
claim.LOCKS = Path(sys.argv[1])
Path(sys.argv[2]).write_text(json.dumps([[f"127.0.0.1:{port}" for port in sys.argv[3:]]]))
claim.claim_addresses(Launch("mlx.launch", "ring", 0, 2), sys.argv[2])
print("claimed", flush=True)
time.sleep(60)
"""


def test_an_address_is_one_rank_s_until_it_ends(tmp_path):
    """However it ends; and nothing but one empty file is left."""
    locks = tmp_path / "locks"
    locks.mkdir()

    def claimer(*ports: str) -> subprocess.Popen:
        command = [sys.executable, "-c", CLAIMER, str(locks / "lock"), str(tmp_path / "-".join(ports)), *ports]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    first, other = claimer("1", "2"), claimer("3")
    try:
        assert first.stdout.readline() == other.stdout.readline() == "claimed\n"
        assert "uses the ring address 127.0.0.1:2;" in claimer("4", "2").communicate(timeout=DEADLINE)[1]
        first.kill()
        first.wait(DEADLINE)
        again = claimer("2")
        assert again.stdout.readline() == "claimed\n"
        again.kill()
    finally:
        first.kill()
        other.kill()
    assert [path.stat().st_size for path in locks.iterdir()] == [0]


# ---------------------------------------------------------------------------------------------------------------------
# A launcher that is ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_the_ranks(launcher, number):
    process = launcher.start("time.sleep(60)", ranks=3)
    launcher.wait_for_ranks(3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert f"m3dist: {number.name} received; all ranks were ended" in stderr.decode()
    launcher.check_nothing_is_left()


def test_a_killed_launcher_leaves_no_rank_and_no_file(launcher):
    """Ranks that never return to Python, as in a collective, end too."""
    program = "all_here(); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP]); signal.pause()"
    process = launcher.start(program, ranks=3)
    launcher.wait_for_ranks(3)
    process.kill()
    process.communicate(timeout=DEADLINE)
    launcher.check_nothing_is_left()


def test_a_reader_that_leaves_does_not_stop_the_ranks(launcher):
    """`m3dist ... 2>&1 | head`: what nobody reads is dropped."""
    program = 'print("x" * 100000, file=sys.stderr, flush=True); Path(f"done{rank}").touch()'
    process = launcher.start(program)
    process.stderr.close()
    assert process.wait(DEADLINE) == 0
    assert len(list(launcher.folder.glob("done*"))) == 2
