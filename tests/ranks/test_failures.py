"""Whatever happens to a job, it ends in time, says why, with the right status, and leaves nothing: real ranks.

Each test is a row of the table in docs/failures.md. Tests that mostly wait run over both backends at once.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from failures import FAULTY, M3DIST, Trial, by_mlx_launch, by_mpirun, faulty, phase, started
from world import ending

from m3dist.cluster.agent import STATE_LOOK
from m3dist.cluster.handshake import DIGEST, NONCE
from m3dist.cluster.mpi import SECRET
from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT, PATH

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="machine: reads /proc")
BACKENDS = ("ring", "mpi")
each_backend = pytest.mark.parametrize("backend", ["ring", pytest.param("mpi", marks=pytest.mark.mpi)])
GENERATE = [*M3DIST, "generate", "--raw", "--temperature", "0", "--max-tokens", "8000"]  # for a minute
LONG_PROMPT = "Hello " * 3000
OWN_DISK = Path(__file__).with_name("own_disk.py")


def both_backends(test: Callable[[Path, str], None]) -> Callable[[Path], None]:
    """Run `test`(folder, backend) over ring and MPI at the same time."""

    @pytest.mark.mpi
    @functools.wraps(test)
    def both(tmp_path: Path) -> None:
        with ThreadPoolExecutor() as pool:
            runs = [pool.submit(test, tmp_path / backend, backend) for backend in BACKENDS]
        for run in runs:
            run.result()

    del both.__wrapped__  # or pytest would ask for its arguments
    return both


def generate(folder: Path, backend: str, *flags: str, world: int = 2, **env: str) -> Trial:
    command = [*GENERATE, "--model", "tiny", "-n", str(world), "--backend", backend, *flags]
    return Trial(folder, command, backend, **env)


# ---------------------------------------------------------------------------------------------------------------------
# A rank that dies

DEATHS = {
    "SIGKILL": (
        "is killed by SIGKILL",
        137,
        "rank 1 was killed by SIGKILL in decode step",
        "or the system for want of",
    ),
    "SIGTERM": ("is killed by SIGTERM", 143, "rank 1 was killed by SIGTERM in decode step", ""),
    "SIGSEGV": ("crashes: SIGSEGV", 139, "rank 1 was killed by SIGSEGV in decode step", "crashed in native code"),
    "exit 3": ("ends with exit code 3", 3, "rank 1 ended with exit code 3 in decode step", ""),
    "exception": (
        "raises an exception",
        1,
        "rank 1 ended with exit code 1 in decode step",
        "ValueError: no such expert",
    ),
    "memory": (
        "finds no memory left (RLIMIT_AS)",
        1,
        "rank 1 ended with exit code 1 in decode",
        "has no memory left for",
    ),
}


@each_backend
@pytest.mark.parametrize("fault", DEATHS)
def test_a_rank_dies(tmp_path, backend, fault):
    what, status, line, cause = DEATHS[fault]
    with started(faulty(tmp_path, backend, fault)) as trial:
        trial.wait_for_ranks()
        trial.check(f"rank 1 {what}", trial.strike(), status=status, line=f"^m3dist: {line} .*; all ranks were ended")
        assert cause in trial.said()


@each_backend
def test_of_three_ranks_the_first_dies_and_the_next_start_succeeds(tmp_path, backend):
    with started(faulty(tmp_path, backend, "SIGKILL", rank=0, world=3)) as trial:
        trial.wait_for_ranks(3)
        line = "^m3dist: rank 0 was killed by SIGKILL in decode step"
        trial.check("rank 0 of 3 is killed by SIGKILL", trial.strike(), status=137, line=line)
    command = [*M3DIST, "generate", "-n", "3", "--backend", backend, "--temperature", "0", "--prompt", DEMO_PROMPT]
    again = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.endswith(f"{DEMO_ANSWER}\n"), again.stderr


@pytest.fixture
def small_group(tmp_path) -> Iterator[None]:
    """A control group with 32 MiB of memory, whose folder FOLDER/group names; for Linux's out-of-memory killer."""
    for root, limits in (
        ("/sys/fs/cgroup/memory", {"memory.limit_in_bytes": "32M"}),
        ("/sys/fs/cgroup", {"memory.max": "32M", "memory.swap.max": "0"}),
    ):
        group = Path(root, f"m3dist-test-{os.getpid()}")
        try:
            group.mkdir()
            for name, value in limits.items():
                (group / name).write_text(value)
            break
        except OSError:
            shutil.rmtree(group, ignore_errors=True)
    else:
        pytest.skip("machine: may not make a control group with a memory limit")
    (tmp_path / "group").write_text(str(group))
    yield
    group.rmdir()


@each_backend
def test_the_system_kills_a_rank_for_want_of_memory(tmp_path, backend, small_group):
    with started(faulty(tmp_path, backend, "memory")) as trial:
        trial.wait_for_ranks()
        what, line = (
            "rank 1 is killed by Linux for want of memory",
            "^m3dist: rank 1 was killed by SIGKILL in decode step",
        )
        trial.check(what, trial.strike(), status=137, line=line)
        assert "or the system for want of memory" in trial.said()


EARLY = r"^m3dist: rank 1 ended early \(exit code 0\) and rank 0 still needed it"


def check_an_early_end(folder: Path, backend: str, fault: str, what: str) -> None:
    mpi = backend == "mpi"
    with started(faulty(folder, backend, fault, M3DIST_STEP_LIMIT="2")) as trial:
        trial.wait_for_ranks()
        trial.check(what, trial.strike(), 2.0 * mpi, status=76 if mpi else 75, line=EARLY)


@both_backends
def test_a_rank_ends_too_early(folder, backend):
    """Over MPI nobody notices before the deadline; over the ring the others lose it."""
    check_an_early_end(folder, backend, "exit 0", "rank 1 ends too early, exit code 0")


@both_backends
def test_a_rank_returns_too_early(folder, backend):
    """Over MPI it waits in MPI_Finalize for the others, which wait for it."""
    check_an_early_end(folder, backend, "return", "rank 1's program returns too early")


# ---------------------------------------------------------------------------------------------------------------------
# A rank that stalls, or does not come


@both_backends
def test_a_stopped_rank(folder, backend):
    with started(faulty(folder, backend, "SIGSTOP", world=3, M3DIST_STEP_LIMIT="2")) as trial:
        trial.wait_for_ranks(3)
        line = r"^m3dist: rank 1 finished nothing for \d s in decode step \d+; its process is stopped \(SIGSTOP\)"
        trial.check("rank 1 of 3 is stopped (SIGSTOP)", trial.strike(), 2.0, status=76, line=line)


@both_backends
def test_a_collective_that_never_completes(folder, backend):
    """Nobody can know which of two ranks should have gone on; each says where it was."""
    with started(faulty(folder, backend, "hang", M3DIST_STEP_LIMIT="2")) as trial:
        trial.wait_for_ranks()
        line = r"^m3dist: the ranks waited for each other in decode step \d+: .* one hangs"
        what = "rank 1 hangs: a collective never completes"
        trial.check(what, trial.strike(), 2.0, status=76, line=line)
        place = r"^\[rank 1\] m3dist: rank 1 of 2: nothing finished for 2 s in decode .* \(at line .*hang\)"
        assert re.search(place, trial.said(), re.MULTILINE), trial.said()


@both_backends
def test_a_rank_never_starts(folder, backend):
    since = time.monotonic()
    with started(faulty(folder, backend, "never starts", flags=["--start-limit", "3"])) as trial:
        line = "^m3dist: rank 1 did not start within 3 s"
        trial.check("rank 1 never starts", since, 3.0, status=78, line=line)


@both_backends
def test_a_rank_never_joins(folder, backend):
    since = time.monotonic()
    with started(faulty(folder, backend, "never joins", M3DIST_START_LIMIT="3")) as trial:
        line = r"^m3dist: rank 1 did not join the others, which waited \d s in rendezvous"
        trial.check("rank 1 never joins the others", since, 3.0, status=78, line=line)


@both_backends
def test_a_stopped_rank_of_a_program_that_reports_nothing(folder, backend):
    """It has no steps that could be late, but its process is seen to be stopped."""
    with started(faulty(folder, backend, "SIGSTOP", plain=True)) as trial:
        trial.wait_for_ranks()
        line = r"^m3dist: rank 1 finished nothing for \d+ s in a program that reports no steps; its process is stopped"
        what = "rank 1 of a program of anybody's is stopped (SIGSTOP)"
        trial.check(what, trial.strike(), 2 * STATE_LOOK, status=76, line=line)


@both_backends
def test_a_rank_of_any_program_dies(folder, backend):
    with started(faulty(folder, backend, "SIGKILL", plain=True)) as trial:
        trial.wait_for_ranks()
        line = "^m3dist: rank 1 was killed by SIGKILL; all ranks were ended"
        trial.check("rank 1 of a program of anybody's is killed", trial.strike(), status=137, line=line)


# ---------------------------------------------------------------------------------------------------------------------
# While a model is loaded, in prefill and in decode


def on_own_disks(folder: Path, backend: str, **env: str) -> Trial:
    """`m3dist generate`, each rank with its own copy of the model, as on hosts of their own."""
    for rank in range(2):
        shutil.copytree(PATH, folder / f"disk{rank}" / "model")
    command = ["python", str(OWN_DISK), str(folder), "generate", "--model", "model", "--prompt", "Hello"]
    return Trial(folder, [*M3DIST, "launch", "-n", "2", "--backend", backend, "--", *command], backend, **env)


@each_backend
def test_a_damaged_file_on_one_host(tmp_path, backend):
    trial = on_own_disks(tmp_path, backend)
    file = tmp_path / "disk1" / "model" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    since = time.monotonic()
    with started(trial):
        line = "^m3dist: rank 1 ended with exit code 2 in load of the checkpoint's headers"
        trial.check("rank 1's model file is cut off", since, status=2, line=line)
        assert "    m3dist: rank 1: model/model.safetensors: 1000 bytes are missing at the end" in trial.said()


@both_backends
def test_a_disk_that_no_longer_answers(folder, backend):
    trial = on_own_disks(folder, backend, M3DIST_STEP_LIMIT="2")
    (folder / "disk1" / "stalls").touch()
    with started(trial):
        trial.wait_for((folder / "disk1" / "stalled").exists)
        line = r"^m3dist: rank 1 ended with exit code 76 in load of \S+\.layers\.\d"
        what = "rank 1's disk stops answering while it loads"
        trial.check(what, time.monotonic(), 2.0, status=76, line=line)


@both_backends
def test_a_rank_is_stopped_when_it_has_loaded(folder, backend):
    trial = on_own_disks(folder, backend, M3DIST_LOAD_LIMIT="2")
    (folder / "disk1" / "stalls").touch()
    with started(trial):
        trial.wait_for((folder / "disk1" / "stalled").exists)
        trial.wait_for(lambda: phase(trial.ranks()[0]) == "load on the other ranks")
        since = trial.send(signal.SIGSTOP, trial.ranks()[0])
        line = r"^m3dist: rank 0 finished nothing for \d s in load on the other ranks; its process is stopped"
        what = "rank 0 has loaded and is stopped while rank 1 loads"
        trial.check(what, since, 2.0, status=76, line=line)


def in_prefill(trial: Trial) -> list[psutil.Process]:
    """Its ranks, once all are."""
    trial.wait_for(lambda: len(trial.ranks()) == 2 and all("prefill" in phase(rank) for rank in trial.ranks()))
    return trial.ranks()


@each_backend
def test_killed_in_prefill(tmp_path, backend):
    with started(generate(tmp_path, backend, "--prefill-chunk", "64", "--prompt", LONG_PROMPT)) as trial:
        since = trial.send(signal.SIGKILL, in_prefill(trial)[1])
        line = "^m3dist: rank 1 was killed by SIGKILL in prefill of 6000 tokens, at "
        trial.check("generate: rank 1 is killed in prefill", since, status=137, line=line)


@each_backend
def test_killed_in_decode(tmp_path, backend):
    with started(generate(tmp_path, backend, "--prompt", "Hello")) as trial:
        trial.wait_for(lambda: trial.out.stat().st_size > 10)
        since = trial.send(signal.SIGKILL, trial.ranks()[1])
        line = r"^m3dist: rank 1 was killed by SIGKILL in decode step \d+"
        trial.check("generate: rank 1 is killed in decode", since, status=137, line=line)


@both_backends
def test_stopped_in_prefill(folder, backend):
    trial = generate(folder, backend, "--prefill-chunk", "64", "--prompt", LONG_PROMPT, M3DIST_STEP_LIMIT="3")
    with started(trial):
        since = trial.send(signal.SIGSTOP, in_prefill(trial)[0])
        line = r"^m3dist: rank 0 finished nothing for \d s in prefill of 6000 tokens, at .*; its process is stopped"
        trial.check("generate: rank 0 is stopped in prefill", since, 3.0, status=76, line=line)


# ---------------------------------------------------------------------------------------------------------------------
# The launcher


@each_backend
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_the_launcher(tmp_path, backend, number):
    killed = number == signal.SIGKILL
    with started(faulty(tmp_path, backend)) as trial:
        trial.wait_for_ranks()
        since = trial.send(number, psutil.Process(trial.process.pid))
        line = "" if killed else f"^m3dist: {number.name} received; all ranks were ended"
        trial.check(f"the launcher gets {number.name}", since, status=-9 if killed else 128 + number, line=line)


@each_backend
def test_the_terminal_is_closed(tmp_path, backend):
    ours, theirs = os.openpty()
    trial = faulty(tmp_path, backend)
    trial.on_a_terminal()
    with started(trial, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True):
        os.close(theirs)
        trial.wait_for_ranks()
        since = time.monotonic()
        os.close(ours)
        trial.check("the launcher's terminal is closed", since, status=128 + signal.SIGHUP, line="")


def test_a_rank_s_words_on_a_terminal_are_known_too():
    """There rank 0 writes to the terminal itself: the launcher does not see it, and yet says what to do."""
    ours, theirs = os.openpty()
    command = [*M3DIST, "generate", "-n", "2", "--model", "nobody/nothing", "--fetch", "--prompt", "Hello"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with ending(subprocess.Popen(command, env=env, **streams)) as job:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # Linux: the end
            while data := os.read(ours, 4096):
                said += data
        os.close(ours)
        assert job.wait(60) == 2
    assert b"m3dist: rank 0: nobody/nothing is no directory here" in said and b"m3dist: what to do: Copy the" in said


@both_backends
def test_a_stopped_launcher(folder, backend):
    """As with Ctrl-Z, or a laptop that sleeps: its ranks end without it, and it says so when it goes on."""
    with started(faulty(folder, backend, flags=["--silence-limit", "5"])) as trial:
        trial.wait_for_ranks()
        launcher = psutil.Process(trial.process.pid)
        since = trial.send(signal.SIGSTOP, launcher)
        ranks = trial.ranks()
        _, alive = psutil.wait_procs(ranks, timeout=5 + 10)
        assert not alive
        trial.send(signal.SIGCONT, launcher)
        line = "^m3dist: host 127.0.0.1 was lost: (it had )?no word from "
        trial.check("the launcher is stopped (SIGSTOP)", since, 5.0, status=77, line=line)


@both_backends
def test_a_stopped_launcher_of_ranks_that_print(folder, backend):
    """It takes nothing they print any more: that must not keep its agents from ending them."""
    program = "while True: print('x' * 1000)"
    command = [
        *M3DIST,
        "launch",
        "-n",
        "2",
        "--backend",
        backend,
        "--silence-limit",
        "5",
        "--",
        "python",
        "-c",
        program,
    ]
    with started(Trial(folder, command, backend)) as trial:
        trial.wait_for(lambda: trial.out.stat().st_size > 2**20)
        launcher = psutil.Process(trial.process.pid)
        since = trial.send(signal.SIGSTOP, launcher)
        _, alive = psutil.wait_procs(trial.ranks(), timeout=5 + 10)
        assert not alive
        trial.send(signal.SIGCONT, launcher)
        line = "^m3dist: host 127.0.0.1 was lost: (it had )?no word from "
        trial.check("the launcher of ranks that print is stopped (SIGSTOP)", since, 5.0, status=77, line=line)


@each_backend
def test_the_reader_of_an_answer_leaves(tmp_path, backend):
    with started(generate(tmp_path, backend, "--prompt", "Hello"), stdout=subprocess.PIPE) as trial:
        assert trial.process.stdout.read(10)
        since = time.monotonic()
        trial.process.stdout.close()
        line = "^m3dist: rank 0: standard output: Broken pipe"
        trial.check("generate: the reader of its output leaves", since, status=2, line=line)


@each_backend
def test_a_command_that_does_not_exist(tmp_path, backend):
    since = time.monotonic()
    command = [*M3DIST, "launch", "-n", "2", "--backend", backend, "--", "no-such-command"]
    with started(Trial(tmp_path, command, backend)) as trial:
        line = "^m3dist: cannot start rank [01]: .*No such file or directory: 'no-such-command'"
        trial.check("the command does not exist", since, status=78, line=line)


# ---------------------------------------------------------------------------------------------------------------------
# Agents, and mpirun


@each_backend
def test_a_killed_agent(tmp_path, backend):
    with started(faulty(tmp_path, backend)) as trial:
        trial.wait_for_ranks()
        since = trial.send(signal.SIGKILL, trial.agents()[-1])
        line = "^m3dist: host 127.0.0.1 was lost: its agent (was killed|closed the connection)"
        trial.check("an agent gets SIGKILL", since, status=77, line=line)


@both_backends
def test_a_stopped_agent(folder, backend):
    with started(faulty(folder, backend, flags=["--silence-limit", "5"])) as trial:
        trial.wait_for_ranks()
        since = trial.send(signal.SIGSTOP, trial.agents()[-1])
        line = "^m3dist: host 127.0.0.1 was lost: no word from it for 5 s"
        trial.check("an agent is stopped (SIGSTOP)", since, 5.0, status=77, line=line)


@pytest.mark.mpi
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_mpirun(tmp_path, number):
    """Killed outright, it leaves its own folder, and each rank's shared memory."""
    killed = number == signal.SIGKILL
    with started(faulty(tmp_path, "mpi")) as trial:
        trial.wait_for_ranks()
        since = trial.send(number, trial.mpirun())
        status, line = (
            (77, "mpirun was killed by SIGKILL") if killed else (143, "rank . was killed by SIGTERM in decode")
        )
        trial.check(f"mpirun gets {number.name}", since, status=status, line=f"^m3dist: {line}", files=3 * killed)


# ---------------------------------------------------------------------------------------------------------------------
# Under plain mlx.launch and mpirun a program ends by itself

PLAIN_GENERATE = [*GENERATE, "--model", "tiny", "--prompt", "Hello"]
PLAIN = {"mlx.launch": by_mlx_launch, "mpirun": by_mpirun}
plain_launchers = pytest.mark.parametrize("launcher", ["mlx.launch", pytest.param("mpirun", marks=pytest.mark.mpi)])


@plain_launchers
def test_a_killed_rank_without_our_launcher(tmp_path, launcher):
    with started(PLAIN[launcher](tmp_path, *PLAIN_GENERATE)) as trial:
        trial.wait_for(lambda: trial.out.read_bytes().count(b"wo") > 10)
        since = trial.send(signal.SIGKILL, trial.ranks()[1])
        status, line = (0, "rank 1 exited with code -9") if launcher == "mlx.launch" else (137, "rank 1 .* on signal 9")
        trial.check(f"{launcher}: generate: rank 1 is killed", since, status=status, line=line, files=4)


@plain_launchers
def test_a_stopped_rank_without_our_launcher(tmp_path, launcher):
    """mlx.launch leaves a stopped process stopped, and waits for it; but no other rank hangs."""
    with started(PLAIN[launcher](tmp_path, *PLAIN_GENERATE, M3DIST_STEP_LIMIT="2")) as trial:
        trial.wait_for(lambda: trial.out.read_bytes().count(b"wo") > 10)
        rank_0, rank_1 = trial.ranks()
        since = trial.send(signal.SIGSTOP, rank_1)
        rank_0.wait(2 + 10)
        trial.send(signal.SIGCONT, rank_1)
        line, status = "rank 0 of 2: nothing finished for 2 s in decode step", 0 if launcher == "mlx.launch" else 76
        trial.check(f"{launcher}: generate: rank 1 is stopped", since, 2.0, status=status, line=line, files=4)


@plain_launchers
@pytest.mark.parametrize("fault", ["exception", "return", "hang"])
def test_a_rank_that_leaves_or_hangs_without_our_launcher(tmp_path, launcher, fault):
    words = {"exception": "raises an exception", "return": "returns too early", "hang": "hangs"}
    env = {"M3DIST_STEP_LIMIT": "2"}
    program = [sys.executable, FAULTY, str(tmp_path), fault, "1"]
    with started(PLAIN[launcher](tmp_path, *program, **env)) as trial:
        trial.wait_for_ranks()
        limit = 2.0 if fault == "hang" or (fault, launcher) == ("return", "mpirun") else 0.0
        status = 0 if launcher == "mlx.launch" else 1 if fault == "exception" else 76
        line = {"exception": "rank 1: ValueError: no such expert", "hang": "nothing finished for 2 s in decode"}.get(
            fault
        )
        line = line or ("another rank is gone" if launcher == "mlx.launch" else "rank 0 of 2: nothing finished for 2 s")
        trial.check(f"{launcher}: rank 1 {words[fault]}", trial.strike(), limit, status=status, line=line, files=4)


# ---------------------------------------------------------------------------------------------------------------------
# What is no failure

SUMS = """
import sys
import mlx.core as mx
from m3dist.cluster import environment
import os
launch = environment.detect(os.environ)
group = mx.distributed.init(strict=True, backend=launch.backend)
for _ in range(20):
    total = mx.distributed.all_sum(mx.array([int(sys.argv[1])]), group=group).item()
    assert total == 2 * int(sys.argv[1]), total
print(total)
"""


@pytest.mark.mpi
def test_jobs_at_the_same_time_never_mix(tmp_path):
    for attempt in range(2):
        jobs = {}
        for number, backend in enumerate(("ring", "mpi", "ring", "mpi"), start=1):
            command = ["launch", "-n", "2", "--backend", backend, "--", "python", "-c", SUMS, str(number)]
            folder = tmp_path / f"{attempt}.{number}"
            jobs[number] = Trial(folder, [*M3DIST, *command], backend).start()
        try:
            for number, job in jobs.items():
                assert job.process.wait(60) == 0, job.said()
                assert sorted(job.out.read_text().split("\n")) == [
                    "",
                    f"[rank 0] {2 * number}",
                    f"[rank 1] {2 * number}",
                ]
        finally:
            for job in jobs.values():
                job.end()


ECHO = """
import sys
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(line)
print("the end")
"""


@each_backend
def test_standard_input_and_its_end_reach_rank_0_only(backend):
    command = [*M3DIST, "launch", "-n", "2", "--backend", backend, "--", "python", "-c", ECHO]
    given = [f"grüezi {number}" for number in range(20_000)]
    done = subprocess.run(command, input="\n".join([*given, ""]).encode(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert [line for line in lines if "[rank 0] " in line] == [f"[rank 0] {line}" for line in (*given, "the end")]
    assert [line for line in lines if "[rank 0] " not in line] == ["[rank 1] the end"]


BYTE_BY_BYTE = """
import os
for byte in "é你👋".encode() * 100 + b"\\n" + "é你👋".encode() * 20_000:
    os.write(1, bytes([byte]))
"""


@each_backend
def test_characters_are_never_cut(backend):
    """Nor in a line so long that it goes out in parts."""
    command = [*M3DIST, "launch", "-n", "2", "--backend", backend, "--", "python", "-c", BYTE_BY_BYTE]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    for rank in range(2):
        own = [line.removeprefix(f"[rank {rank}] ") for line in lines if line.startswith(f"[rank {rank}] ")]
        assert own[0] == "é你👋" * 100 and "".join(own[1:]) == "é你👋" * 20_000


@both_backends
def test_what_a_good_job_printed_waits_for_a_slow_reader(folder, backend):
    program = "for number in range(3000): print(f'{number:>98}')"
    command = [*M3DIST, "launch", "-n", "1", "--backend", backend, "--", "python", "-c", program]
    with ending(subprocess.Popen(command, stdout=subprocess.PIPE)) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        assert process.stdout.read().splitlines() == [b"[rank 0] %98d" % number for number in range(3000)]
        assert process.wait(60) == 0


@both_backends
def test_the_launcher_and_its_agents_cost_next_to_nothing(folder, backend):
    with started(faulty(folder, backend)) as trial:
        trial.wait_for_ranks()
        ours = [psutil.Process(trial.process.pid), *trial.agents()]
        before = [sum(process.cpu_times()[:2]) for process in ours]
        began = time.monotonic()
        time.sleep(3)
        used = sum(sum(process.cpu_times()[:2]) for process in ours) - sum(before)
        assert used / (time.monotonic() - began) < 0.05, f"{used:.2f} s in 3 s"


@both_backends
def test_ranks_that_wait_for_a_reader_are_not_late(folder, backend):
    """Rank 0 cannot end before what it prints is read, long after rank 1 has ended."""
    program = "import os\nif 'ZERO' in os.environ: [print(f'{number:>98}') for number in range(40_000)]"
    only_0 = 'MLX_RANK=${OMPI_COMM_WORLD_RANK:-$MLX_RANK}; [ $MLX_RANK = 0 ] && export ZERO=1; exec python -c "$0"'
    command = [
        *M3DIST,
        "launch",
        "-n",
        "2",
        "--backend",
        backend,
        "--end-limit",
        "2",
        "--",
        "sh",
        "-c",
        only_0,
        program,
    ]
    trial = Trial(folder, command, backend)
    with started(trial, stdout=subprocess.PIPE):
        with pytest.raises(subprocess.TimeoutExpired):
            trial.process.wait(6)
        assert len(trial.process.communicate(timeout=60)[0].splitlines()) == 40_000
        assert trial.process.returncode == 0, trial.said()


WRAPPER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"  # closes what it inherits but 0 to 2


@each_backend
def test_a_wrapper_that_closes_descriptors(backend):
    command = ["m3dist", "generate", "--temperature", "0", "--prompt", DEMO_PROMPT]
    wrapped = ["launch", "-n", "2", "--backend", backend, "--", "python", "-c", WRAPPER, *command]
    done = subprocess.run([*M3DIST, *wrapped], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"[rank 0] {DEMO_ANSWER}" in done.stdout, done.stderr


@each_backend
def test_a_folder_called_m3dist_where_it_starts(tmp_path, backend):
    """As in a home with a checkout, where ssh starts us: it is not the package."""
    (tmp_path / "m3dist").mkdir()
    (tmp_path / "copy.py").write_text("raise SystemExit('not this one')")
    m3dist = str(Path(sys.executable).with_name("m3dist"))
    command = [m3dist, "generate", "-n", "2", "--backend", backend, "--temperature", "0", "--prompt", DEMO_PROMPT]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith(f"{DEMO_ANSWER}\n"), done.stderr


FLOOD = """
import sys
from m3dist.cluster import lifeline
lifeline.watch()
for number in range(30_000):
    print(f"{number:>98}", flush=True)
"""


@both_backends
def test_ranks_that_print_while_nobody_reads_wait(folder, backend):
    """Longer than a host may be silent: it is not lost, and not a line is."""
    command = [*M3DIST, "launch", "-n", "2", "--backend", backend, "--silence-limit", "5"]
    trial = Trial(folder, [*command, "--", "python", "-c", FLOOD], backend)
    with started(trial, stdout=subprocess.PIPE):
        with pytest.raises(subprocess.TimeoutExpired):
            trial.process.wait(8)
        lines = trial.process.communicate(timeout=60)[0].splitlines()
        assert trial.process.returncode == 0, trial.said()
    for rank in range(2):
        own = [line for line in lines if line.startswith(b"[rank %d] " % rank)]
        assert own == [b"[rank %d] %98d" % (rank, number) for number in range(30_000)]


@pytest.mark.mpi
def test_strangers_at_the_control_port(tmp_path):
    """Which is bound to this machine's own loopback; 200 mute ones before the agents come, garbage while they run."""
    with started(faulty(tmp_path, "mpi", "exit 3")) as trial:
        launcher = psutil.Process(trial.process.pid)
        trial.wait_for(lambda: listening(launcher))
        [address] = listening(launcher)
        assert address[0] == "127.0.0.1"
        strangers = [socket.create_connection(address, 5) for _ in range(200)]
        trial.wait_for_ranks()
        strangers += [socket.create_connection(address, 5) for _ in range(200)]
        for garbage in (b"GET / HTTP/1.1\r\n" * 10, b"[" * 60_000, b"x" * 2**20, bytes(DIGEST + NONCE)):
            with socket.create_connection(address, 5) as stranger:
                assert len(stranger.recv(1000)) == NONCE  # a random number, and then the end
                try:
                    stranger.sendall(garbage)
                    assert stranger.recv(1000) == b""
                except (BrokenPipeError, ConnectionResetError):
                    pass
        assert trial.process.poll() is None
        processes = trial.processes()
        secret = trial.mpirun().environ()[SECRET]
        assert not any(secret in word for process in processes for word in process.cmdline())
        assert not any(SECRET in rank.environ() for rank in trial.ranks())
        trial.check(
            "strangers at the control port, then exit code 3", trial.strike(), status=3, line="^m3dist: rank 1 "
        )
        assert "Traceback" not in trial.said()
        for stranger in strangers:
            stranger.close()


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    return [tuple(one.laddr) for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
