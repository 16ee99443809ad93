"""Which tests this machine can run, read from their markers.

A test says what it needs with a marker (`mpi`, `torch`, `transformers`, `mlx_lm`, `hosts`); tests in tests/ranks and
tests/hosts get theirs from the folder. Where the need is not met the test is skipped with a reason. Under M3DIST_CI=1
nothing may be skipped, because .ci/run installed every tool: a skip fails the session, unless its reason starts with
"machine:", which is for what no installation can change (another operating system, a kernel without namespaces).
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

CI = os.environ.get("M3DIST_CI") == "1"
MACHINE = "machine:"
TESTS = Path(__file__).parent
FOLDER_MARKERS = ("ranks", "hosts")

os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"  # sshd and ip, for users without them on PATH
skipped_in_ci: list[str] = []


def no_command(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"needs {' and '.join(missing)} on PATH" if missing else None


def no_module(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"needs the Python package {' and '.join(missing)}" if missing else None


def no_namespaces() -> str | None:
    """Network namespaces: Linux, root, and a kernel or container that lets root make one, with processes of its own."""
    if sys.platform != "linux":
        return f"{MACHINE} needs Linux for network namespaces"
    if os.geteuid() != 0:
        return f"{MACHINE} needs root to make network namespaces"
    own = ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "true"]
    if shutil.which("unshare") and subprocess.run(own, capture_output=True).returncode:
        return f"{MACHINE} may not make network namespaces here"
    return None


NEEDS = {
    "mpi": lambda: no_command("mpirun") or no_module("mpi4py"),
    "torch": lambda: no_module("torch", "transformers"),
    "transformers": lambda: no_module("transformers"),
    "mlx_lm": lambda: no_module("mlx_lm"),
    "hosts": lambda: no_namespaces() or no_command("ip", "sshd", "ssh"),
}


@cache
def unmet(marker: str) -> str | None:
    """Why tests with `marker` cannot run on this machine, or None."""
    return NEEDS[marker]()


def pytest_configure():
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup, or in a script's background
            signal.signal(number, usual)  # what tests start inherits it, and is sent these signals


def pytest_collection_modifyitems(items):
    for item in items:
        for name in set(item.path.relative_to(TESTS).parts) & set(FOLDER_MARKERS):
            item.add_marker(name)


def pytest_runtest_setup(item):
    for marker in NEEDS:
        if item.get_closest_marker(marker) and (reason := unmet(marker)):
            pytest.skip(reason)


def note_skip(report):
    """Remember a skip that M3DIST_CI=1 does not allow. Its longrepr is (file, line, "Skipped: reason")."""
    if not (CI and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    if not reason.startswith(MACHINE):
        skipped_in_ci.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report):
    note_skip(report)


def pytest_collectreport(report):
    note_skip(report)


def pytest_sessionfinish(session):
    if skipped_in_ci and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if skipped_in_ci:
        terminalreporter.section("skipped although M3DIST_CI=1 promises the tools", red=True)
        for line in skipped_in_ci:
            terminalreporter.line(line)
