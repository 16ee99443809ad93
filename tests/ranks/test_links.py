"""`m3dist bench links` as people start it: real ranks over ring and MPI, a rank that sums wrongly, one that stalls."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from world import MPIRUN, ending, ring

ROOT = Path(__file__).parents[2]
LINKS = [sys.executable, "-m", "m3dist", "bench", "links"]
SIZES = [4, 12288, 300_000]  # the last is no power of two, of which ranks would send equal parts
SIZES_TEXT = "4,12KiB,300000"
LONG = ["--sizes", ",".join(["4"] * 500), "--json"]  # many seconds


def environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_"))}


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environ() | env)


@pytest.mark.parametrize(
    "launcher, world, backend",
    [
        ([], 2, "ring"),
        pytest.param(f"{MPIRUN} -n 3".split(), 3, "mpi", marks=pytest.mark.mpi),
    ],
)
def test_figures(launcher, world, backend):
    process = start([*launcher, *LINKS, "-n", str(world), "--sizes", SIZES_TEXT, "--repeats", "2", "--json"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    *tables, line = out.splitlines()
    assert tables[0].startswith(f"{world} ranks over {backend} on ")
    result = json.loads(line)
    assert (result["backend"], result["world"], result["dtype"]) == (backend, world, "bfloat16")
    assert len(result["hosts"]) == world and len(set(result["hosts"])) == 1
    assert result["complete"]
    rows = [(row["op"], row["bytes"], row["result_bytes"]) for row in result["links"]]
    assert rows == [("all_sum", n, n) for n in SIZES] + [("all_gather", n, world * n) for n in SIZES]
    for row in result["links"]:
        seconds = list(row["seconds"].values())  # from the shortest
        assert 0 < seconds[0] and seconds == sorted(seconds)
        assert row["runs"] == 2
        assert row["algorithmic_bandwidth"] > 0 and row["bus_bandwidth"] > 0
    chain = result["chain"]
    assert chain["bytes"] == 12288 and chain["seconds"] > 0


FAULTY = """
import sys
from m3dist import cli
from m3dist.comm import Comm
right = Comm.all_sum
def all_sum(self, x):
    return right(self, x).at[3].add(1) if self.rank == 1 and x.nbytes == 1024 else right(self, x)
Comm.all_sum = all_sum
sys.exit(cli.main(sys.argv[1:]))
"""


def test_wrong_sums_are_an_error_that_names_the_rank(tmp_path):
    """On every rank, also on those that have the right sum."""
    command = [sys.executable, "-c", FAULTY, "bench", "links", "--sizes", "4,1024", "--repeats", "2", "--json"]
    processes = [start(command, **ring(tmp_path, 3, rank)) for rank in range(3)]
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert f"m3dist: rank {rank}: all_sum of 1 KiB gave wrong numbers (rank 1: 1 of 512 values); is another" in err
        assert bool(out) == (rank == 0)
        if out:  # what was right until then
            result = json.loads(out.splitlines()[-1])
            assert [(row["op"], row["bytes"]) for row in result["links"]] == [("all_sum", 4)]
            assert not result["complete"]


def started() -> subprocess.Popen[str]:
    """Two ranks that have measured something."""
    process = start([*LINKS, "-n", "2", *LONG], M3DIST_STEP_LIMIT="2")
    while "all_sum of 4 B" not in (line := process.stderr.readline()):
        assert line, "it ended by itself"
    return process


def is_rank(process: psutil.Process, number: str) -> bool:
    try:
        return process.environ().get("MLX_RANK") == number
    except psutil.Error:  # it has ended meanwhile
        return False


def test_a_rank_that_stalls_ends_it():
    with ending(started()) as process:
        [stalled] = [child for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child, "1")]
        stalled.suspend()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 76, err
    assert "nothing finished for 2 s in all_sum of 4 B" in err
    assert not stalled.is_running()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cut_off(number):
    """What was measured until then is still shown, the JSON line last."""
    with ending(started()) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out.startswith("Cut off: ")
    result = json.loads(out.splitlines()[-1])
    assert not result["complete"] and result["links"] and result["chain"] is None
