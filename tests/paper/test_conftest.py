"""The rules of tests/conftest.py, in a pytest of its own without mpirun: skipped here, a failure under M3DIST_CI=1."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
NEEDS_MPI = "import pytest\n@pytest.mark.mpi\ndef test(): raise AssertionError\n"
NO_MODULE = "import pytest\npytest.importorskip('no_such_module')\n"
NO_MAC = "import pytest\ndef test(): pytest.skip('machine: needs macOS')\n"


def run(folder: Path, source: str, ci: str) -> subprocess.CompletedProcess:
    shutil.copy(CONFTEST, folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\nmarkers =\n    mpi\n")
    (folder / "test_it.py").write_text("def test_nothing(): pass\n")
    (folder / "test_source.py").write_text(source)
    env = os.environ | {"PATH": str(folder), "M3DIST_CI": ci}
    command = [sys.executable, "-m", "pytest", "-rs", str(folder)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("source", "reason"), [(NEEDS_MPI, "needs mpirun on PATH"), (NO_MODULE, "no_such_module")])
def test_a_missing_tool(tmp_path, source, reason):
    done = run(tmp_path, source, ci="")
    assert done.returncode == 0 and reason in done.stdout
    done = run(tmp_path, source, ci="1")
    assert done.returncode == 1 and reason in done.stdout
    assert "skipped although M3DIST_CI=1 promises the tools" in done.stdout


def test_what_no_tool_can_change(tmp_path):
    assert run(tmp_path, NO_MAC, ci="1").returncode == 0


def test_a_failure_stays_a_failure(tmp_path):
    assert run(tmp_path, "def test(): raise AssertionError\n", ci="1").returncode == 1
