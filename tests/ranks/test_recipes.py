"""The recipes in launch/ as a person runs them, each with its real launcher, on the tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3dist import tiny

ROOT = Path(__file__).parents[2]


def run(recipe: str, **env: str) -> subprocess.CompletedProcess:
    """float32, because MLX on a CPU has no mixture of experts in bfloat16."""
    bin = str(Path(sys.executable).parent)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_"))} | env
    return subprocess.run(
        [str(ROOT / "launch" / recipe), "--dtype", "float32"],
        env=env | {"PATH": bin + os.pathsep + env["PATH"], "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_local():
    done = run("local.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tiny.DEMO_ANSWER}\n")


def test_mlx_launch():
    done = run("mlx-launch.sh")  # exits with 0 whatever happens
    assert tiny.DEMO_ANSWER in done.stdout, done.stderr
    assert done.stdout.count(tiny.DEMO_ANSWER) == 1


@pytest.mark.mpi
def test_mpirun():
    unbound = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = run("mpirun.sh", **unbound, **root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tiny.DEMO_ANSWER}\n")
