"""The tables of docs/failures.md, measured on this machine: what the tests see, and mlx.launch.

    python tests/failure_table.py

runs tests/ranks/test_failures.py and tests/hosts/test_launch.py, then does the same to a plain MLX program under
mlx.launch, waits WAITED seconds for it to end, and writes it all between the marks of docs/failures.md. Linux only, as
root; takes some ten minutes.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "ranks")]

import psutil  # noqa: E402
from failures import DOCUMENT, FAULTY, Trial, by_mlx_launch, started  # noqa: E402
from outcome import TABLE, Outcome  # noqa: E402

WAITED = 20.0  # seconds
BEGIN, END = "<!-- tests/failure_table.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Injection:
    """What is done to two ranks under mlx.launch: in the words of the tests, a fault of faulty.py, or by `do`."""

    what: str
    fault: str = ""
    do: Callable[[Trial], object] | None = None
    ready: bool = True  # it is done once both ranks are in their loop, else from the start
    terminal: bool = False  # the launcher has one of its own


def to_launcher(number: signal.Signals) -> Callable[[Trial], object]:
    return lambda trial: trial.send(number, psutil.Process(trial.process.pid))


INJECTIONS = (
    Injection("rank 1 is killed by SIGKILL", "SIGKILL"),
    Injection("rank 1 is killed by SIGTERM", "SIGTERM"),
    Injection("rank 1 crashes: SIGSEGV", "SIGSEGV"),
    Injection("rank 1 ends with exit code 3", "exit 3"),
    Injection("rank 1 raises an exception", "exception"),
    Injection("rank 1 finds no memory left (RLIMIT_AS)", "memory"),
    Injection("rank 1 ends too early, exit code 0", "exit 0"),
    Injection("rank 1's program returns too early", "return"),
    Injection("rank 1 of 3 is stopped (SIGSTOP)", "SIGSTOP"),
    Injection("rank 1 hangs: a collective never completes", "hang"),
    Injection("rank 1 never starts", "never starts", ready=False),
    Injection("rank 1 never joins the others", "never joins", ready=False),
    *(
        Injection(f"the launcher gets {number.name}", do=to_launcher(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    ),
    Injection("the launcher's terminal is closed", terminal=True),
    Injection("the command does not exist", "no-such-command", ready=False),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = tested(Path(folder, "rows"))
        others = {}
        for number, injection in enumerate(INJECTIONS):
            print(f"mlx.launch: {injection.what}", file=sys.stderr)
            others[injection.what] = under_mlx_launch(injection, Path(folder, str(number)))
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    tables = "\n".join(document(rows, others))
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}")


def tested(file: Path) -> list[Outcome]:
    """What the tests have seen, in their order; ring before MPI."""
    files = [str(TESTS / "ranks" / "test_failures.py"), str(TESTS / "hosts" / "test_launch.py")]
    command = [sys.executable, "-m", "pytest", "-q", *files]
    subprocess.run(command, env=os.environ | {TABLE: str(file)}, cwd=TESTS.parent, stdout=sys.stderr, check=True)
    rows = [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]
    order = list(dict.fromkeys(row.what for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.what), row.backend != "ring"))


def under_mlx_launch(injection: Injection, folder: Path) -> Outcome:
    folder.mkdir()
    world = 3 if " of 3 " in injection.what else 2
    command = [sys.executable, FAULTY, str(folder), injection.fault, "1", "plain"]
    trial = by_mlx_launch(folder, *(["no-such-command"] if "command" in injection.fault else command), world=world)
    ours, theirs = os.openpty()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    if injection.terminal:
        trial.on_a_terminal()
    with started(trial, **options if injection.terminal else {}):
        os.close(theirs)
        since = time.monotonic()
        if injection.ready:
            trial.wait_for_ranks(world)
            since = trial.strike()
        if injection.do:
            injection.do(trial)
        if injection.terminal:
            os.close(ours)
        return trial.outcome(injection.what, since, patience=WAITED)


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def document(rows: Iterable[Outcome], others: dict[str, Outcome]) -> Iterator[str]:
    ours = [row for row in rows if row.launcher == "m3dist"]
    between = [row for row in rows if row.launcher == "m3dist over ssh"]
    plain = [row for row in rows if row.launcher in ("mlx.launch", "mpirun")]
    yield f"Measured on Linux with {os.cpu_count()} cores, MLX {version('mlx')}, {mpi_version()}."
    yield "\n### m3dist\n"
    yield from table("what happens", "backend", "deadline", "all ended after", "status", "the user reads", "left")
    for row in ours:
        yield line(row.what, row.backend, limit(row), seconds(row), row.status, said(row), left(row))
    yield "\n### m3dist between hosts, over ssh\n"
    yield from table("what happens", "backend", "deadline", "all ended after", "status", "the user reads")
    for row in between:
        yield line(row.what, row.backend, limit(row), seconds(row), row.status, said(row))
    yield "\n### mlx.launch beside it, ring\n"
    yield from table(
        "what happens", "m3dist: ended after", "status", "left", "mlx.launch: ended after", "status", "left"
    )
    for what, other in others.items():
        [own] = [row for row in ours if (row.what, row.backend) == (what, "ring")]
        yield line(what, seconds(own), own.status, left(own), seconds(other), status(other), left(other))
    yield "\n### m3dist's programs under plain mlx.launch and mpirun\n"
    yield from table("what happens", "deadline", "all ended after", "status", "the user reads")
    for row in plain:
        yield line(row.what, limit(row), seconds(row), row.status, said(row))


def table(*heads: str) -> Iterator[str]:
    yield line(*heads)
    yield line(*("---" for _ in heads))


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def limit(row: Outcome) -> str:
    return f"{row.limit:g} s" if row.limit else "at once"


def status(row: Outcome) -> str:
    return "still running" if row.status is None else str(row.status)


def said(row: Outcome) -> str:
    """Without colours, and as if the project were the current folder."""
    text = re.sub(r"\x1b?\[\d*m", "", row.line).replace(f"{TESTS.parent}/", "").strip()
    return f"`{text}`" if text else ""


def seconds(row: Outcome) -> str:
    return f"never (waited {WAITED:g} s)" if row.seconds is None else f"{row.seconds:.1f} s"


def left(row: Outcome) -> str:
    return f"{row.left} processes, {row.files} files" if row.left or row.files else "nothing"


def mpi_version() -> str:
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    return said.splitlines()[0].removeprefix("mpirun (").replace(")", "")


if __name__ == "__main__":
    main()
