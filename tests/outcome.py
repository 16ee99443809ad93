"""What became of a job that something was done to. tests/failure_table.py makes tables of these."""

import json
import os
from dataclasses import asdict, dataclass

TABLE = "M3DIST_FAILURE_TABLE"  # names the file that each outcome is added to, where it is set


@dataclass(frozen=True)
class Outcome:
    """`seconds` from the fault until no process was left, or None where some are."""

    what: str  # was done to it
    backend: str
    launcher: str
    limit: float  # seconds from the fault to the deadline that applies
    seconds: float | None
    status: int | None
    line: str  # that the user reads
    left: int = 0  # processes
    files: int = 0  # in the temporary folder, and shared memory of the ranks

    def record(self) -> None:
        if TABLE in os.environ:
            with open(os.environ[TABLE], "a") as table:
                table.write(json.dumps(asdict(self)) + "\n")
