"""The recipes in launch/ as a person runs them, each with its real launcher, on the tiny model."""

import os
import plistlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from failures import Trial, started

from m3dist import tiny
from m3dist.cluster.agent import END_GRACE
from m3dist.cluster.hostfile import read_hostfile
from m3dist.options import ServeOptions
from m3dist.serve import STOP_LIMIT

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
UNBOUND = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_"))} | env
    return subprocess.run(
        command,
        env=env | {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_recipe(recipe: str, **env: str) -> subprocess.CompletedProcess:
    """float32, because MLX on a CPU has no mixture of experts in bfloat16."""
    return run(LAUNCH / recipe, "--dtype", "float32", **env)


def test_there_is_a_recipe_for_each_launcher():
    recipes = {path.name for path in LAUNCH.iterdir()}
    programs = {"local.sh", "m3dist-launch.sh", "mlx-launch.sh", "mpirun.sh"}
    assert recipes == programs | {"serve.sh", "dist.m3dist.serve.plist"}


@pytest.mark.parametrize("recipe", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_any_shell_can_read_it(recipe):
    assert recipe.read_text().startswith("#!/bin/sh\n")
    assert os.access(recipe, os.X_OK)
    assert run("sh", "-n", recipe).returncode == 0


def test_local():
    done = run_recipe("local.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tiny.DEMO_ANSWER}\n")


def test_m3dist_launch():
    done = run_recipe("m3dist-launch.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"[rank 0] {tiny.DEMO_ANSWER}\n")


def test_m3dist_launch_with_a_wrong_hostfile():
    done = run_recipe("m3dist-launch.sh", HOSTFILE="launch/local.sh")
    assert (done.returncode, done.stdout) == (2, "")
    assert "launch/local.sh line 3: " in done.stderr  # the first that is no comment


def test_mlx_launch():
    done = run_recipe("mlx-launch.sh")  # exits with 0 whatever happens
    assert tiny.DEMO_ANSWER in done.stdout, done.stderr
    assert done.stdout.count(tiny.DEMO_ANSWER) == 1


@pytest.mark.mpi
def test_mpirun():
    done = run_recipe("mpirun.sh", **UNBOUND, **ROOT_MAY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{tiny.DEMO_ANSWER}\n")


@pytest.mark.mpi
@pytest.mark.parametrize(
    "hosts", ["localhost slots=2", "# one\nlocalhost slots = 3 max-slots=4 # b", "localhost\n" * 3]
)
def test_mpirun_reads_hostfiles_as_we_do(tmp_path, hosts):
    """It starts one process a slot."""
    path = tmp_path / "hosts"
    path.write_text(f"{hosts}\n")
    done = run("mpirun", "--hostfile", path, "--bind-to", "none", "echo", "here", **ROOT_MAY)
    assert done.stdout.split() == ["here"] * read_hostfile(str(path)).world, done.stderr


def test_serve(tmp_path):
    check_server(tmp_path, LAUNCH / "serve.sh")


def check_server(folder: Path, *command: str | Path) -> None:
    """It serves, and ends well when it is told to."""
    trial = Trial(folder, [*map(str, command), "--port", "0"], PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    with started(trial) as server:
        server.wait_for(lambda: "m3dist: ready: http://127.0.0.1:" in server.said())
        server.process.terminate()
        assert server.process.wait(30) == 0, server.said()


# ---------------------------------------------------------------------------------------------------------------------
# launchd's


@pytest.fixture
def daemon() -> dict:
    return plistlib.loads((LAUNCH / "dist.m3dist.serve.plist").read_bytes(), fmt=plistlib.FMT_XML)


def test_the_daemon_is_called_as_its_file(daemon):
    """launchctl finds it by its label."""
    assert daemon["Label"] == "dist.m3dist.serve"
    comment = (LAUNCH / "dist.m3dist.serve.plist").read_text().partition("-->")[0]
    assert set(re.findall(r"system/(\S+)", comment)) == {"dist.m3dist.serve"}


def test_the_daemon_is_installed_where_launchd_starts_it_at_boot():
    """What is in a LaunchAgents folder waits for somebody to log in."""
    comment = (LAUNCH / "dist.m3dist.serve.plist").read_text().partition("-->")[0]
    assert set(re.findall(r"\S+/Launch[A-Z]\w+", comment)) == {"/Library/LaunchDaemons"}


def test_the_daemon_is_not_root(daemon):
    """Its paths are in the home directory of the one whose name it has."""
    assert daemon["WorkingDirectory"].startswith(f"/Users/{daemon['UserName']}/")


def test_the_daemon_has_absolute_paths_only(daemon):
    """launchd knows neither ~ nor a login shell's PATH."""
    command = daemon["ProgramArguments"]
    paths = [command[0], command[command.index("--hostfile") + 1], daemon["WorkingDirectory"]]
    paths += [daemon["StandardOutPath"], daemon["StandardErrorPath"]]
    assert all(path.startswith("/Users/me/") for path in paths)
    assert (ROOT / Path(paths[1]).relative_to("/Users/me/m3dist")).is_file()


def test_the_daemon_starts_at_boot_and_again_after_a_failure(daemon):
    assert daemon["RunAtLoad"] is True
    assert daemon["KeepAlive"] == {"SuccessfulExit": False}


def test_what_the_daemon_runs(daemon, tmp_path):
    """Its own command, with this checkout in the place of /Users/me/m3dist."""
    command = [word.replace("/Users/me/m3dist/.venv/bin", str(BIN)) for word in daemon["ProgramArguments"]]
    check_server(tmp_path, *(word.replace("/Users/me/m3dist", str(ROOT)) for word in command))


def test_the_daemon_has_time_to_finish(daemon):
    """launchd's SIGKILL comes after all that the server may take, with its defaults."""
    assert daemon["ExitTimeOut"] > ServeOptions().drain + STOP_LIMIT + 2 * END_GRACE
