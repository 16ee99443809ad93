"""What loading a 2 GB checkpoint costs a rank, measured on a process that does nothing else."""

import shutil
import sys

import pytest
from bench_loading import in_a_process
from checkpoints import synthetic
from stores import keep

from m3dist.checkpoint import open_checkpoint
from m3dist.plan import make_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="machine: reads Linux's /proc"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = synthetic(tmp_path_factory.mktemp("whole"), 2.0)
    yield made
    shutil.rmtree(made)


def test_a_rank_reads_and_holds_little_more_than_its_slice(directory):
    checkpoint = open_checkpoint(directory)
    plan = make_plan(checkpoint.translate().inventory, 4)
    held, whole = plan.bytes_held(3) / 2**20, checkpoint.nbytes / 2**20
    cost = in_a_process("m3dist", directory, 3, 4)
    assert whole > 1900 and held < 0.3 * whole
    # The promise is 1 GiB; a whole tensor of scratch here and there would already break this.
    assert cost["resident"] < held + 128 and cost["mlx"] < held + 64
    # Column cuts (w2, o_proj) read whole rows, everything else its rows alone: 1/4 of two thirds, and one third.
    assert cost["read"] < 0.52 * whole


@pytest.mark.parametrize(("world", "rank"), [(2, 1), (4, 3)])
def test_from_the_store_a_rank_reads_its_slice_alone(directory, world, rank, tmp_path, monkeypatch):
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path))
    entry = keep(directory, rank, world)
    held = entry.manifest.make_plan().bytes_held(rank) / 2**20
    cost = in_a_process("store", entry.directory, rank, world)
    shutil.rmtree(entry.directory)
    # The promises are 1.02 times what is held, and 512 MiB more than that; manifest and headers are read besides.
    assert held <= cost["read"] < 1.001 * held
    assert cost["resident"] < held + 128 and cost["mlx"] < held + 64
