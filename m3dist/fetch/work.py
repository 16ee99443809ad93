"""A target that is being written: its files at full length, a journal of the rows in place, and rows to pass on. Killed
at any moment, it goes on from there. No MLX.

    DIRECTORY/model-00001-of-00002.safetensors ...   every row at its final place
    DIRECTORY/.journal                               a line for each block that is in place
    DIRECTORY/.plan.json                             what it is part of, as a manifest says it
    DIRECTORY/.spool/MODULE@FIRST-LAST               a block, whole, that other ranks wait for
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np

from m3dist.errors import StoreError
from m3dist.fetch import store
from m3dist.fetch.places import Format, Placed, Rows
from m3dist.fetch.schedule import Area
from m3dist.fetch.target import OutputFile
from m3dist.layout import Span

JOURNAL, SPOOL, PLAN = ".journal", ".spool", ".plan.json"
ADVICE = "make room (m3dist store ls, m3dist store rm), or set M3DIST_STORE to a larger disk there, and start again"
SYNC_INTERVAL = 30.0  # seconds: as much is fetched again after a power cut; after a kill nothing is


class Work:
    """The work directory at `directory`, made or gone on with: `files` of the target.

    `identity`, one line, says what is being written; there must be nothing of another identity. `intact` are files
    that are there already, elsewhere. `plan` is kept beside, for whoever can use what is in place.
    """

    def __init__(
        self,
        directory: Path,
        files: Sequence[OutputFile],
        form: Format,
        identity: str,
        intact: Mapping[str, Path] = MappingProxyType({}),
        plan: str = "",
    ):
        self.directory, self.form = directory, form
        self.open_files = [file for file in files if file.name not in intact]
        self.done: dict[str, list[Span]] = {}
        self.spools: dict[str, list[Span]] = {}
        self.synced = time.monotonic()
        with disk_errors(directory):
            lines = _read_journal(directory)
            if lines and lines[0] != identity:
                raise StoreError(f"{directory} holds something else, unfinished; remove it, or name another directory")
            (directory / SPOOL).mkdir(parents=True, exist_ok=True)
            if lines is None or not _same_boot(lines):
                for path in (directory / SPOOL).iterdir():
                    path.unlink()  # it may have its length, and not its bytes
            for file in self.open_files:
                self._prepare(file, anew=lines is None)
            for name, path in intact.items():
                _link(path, directory / name)
            if lines is None:  # a new one, or one that was killed while it was being made
                (directory / PLAN).write_text(plan)
                made = directory / f"{JOURNAL}.new"
                made.write_text(f"{identity}\n")
                os.rename(made, directory / JOURNAL)
            else:
                self.done = _noted(lines)
            self.journal = os.open(directory / JOURNAL, os.O_RDWR | os.O_APPEND)
            self._drop_half_a_line()
            self._note(f"boot {boot()}")
            self._find_spools()
        self.placed = Placed(directory, self.open_files, form, os.O_RDWR)

    @staticmethod
    def identity(directory: Path) -> str | None:
        """What is being written in a work directory; None where there is none."""
        lines = _read_journal(directory)
        return lines[0] if lines else None

    @staticmethod
    def noted(directory: Path) -> dict[str, list[Span]]:
        """Module -> the rows in place in a work directory."""
        return _noted(_read_journal(directory) or [""])

    def place(self, leaves: Rows, rows: Span, columns: Span) -> None:
        """Write an area's rows; they count as there once `note` says so."""
        self.placed.write(leaves, rows, columns)

    def note(self, module: str, rows: Span) -> None:
        """All that is wanted of these rows is in place."""
        self._note(f"{module} {rows[0]} {rows[1]}")
        if time.monotonic() - self.synced > SYNC_INTERVAL:
            self.sync()

    def sync(self) -> None:
        """What is noted survives a power cut from here on."""
        with disk_errors(self.directory):
            store.sync_all(self.directory)  # also what only a process before this one wrote
            self._note("synced")
            store.sync(self.journal)
        self.synced = time.monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # Blocks for others

    def spool(self, module: str, rows: Span, leaves: Rows) -> None:
        """Keep a block until the others have it."""
        path = self._spooled(module, rows)
        made = path.with_name(f".{path.name}")
        with disk_errors(self.directory):
            self.form.join(module, leaves).tofile(made)
            os.rename(made, path)
        self.spools.setdefault(module, []).append(rows)

    def _find_spools(self) -> None:
        """Every whole block kept for others."""
        for path in sorted((self.directory / SPOOL).iterdir()):
            match = re.fullmatch(r"([^.].*)@(\d+)-(\d+)", path.name)
            if match and match[1] in self.form.leaves:
                rows, columns = (int(match[2]), int(match[3])), (0, self.form.columns(match[1]))
                if path.stat().st_size == self.form.nbytes(match[1], rows, columns):
                    self.spools.setdefault(match[1], []).append(rows)

    def unspool(self, module: str, rows: Span) -> Rows | None:
        """Rows that were kept, whole, or None."""
        if not (found := self.spool_of(module, rows)):
            return None
        _, kept = found
        data = np.fromfile(self._spooled(module, kept), np.uint8)
        leaves = self.form.split(module, kept, (0, self.form.columns(module)), data)
        return {tensor: leaf[rows[0] - kept[0] : rows[1] - kept[0]] for tensor, leaf in leaves.items()}

    def spool_of(self, module: str, rows: Span) -> tuple[str, Span] | None:
        """The block of the spool that has these rows."""
        for kept in self.spools.get(module, ()):
            if kept[0] <= rows[0] and rows[1] <= kept[1]:
                return module, kept
        return None

    def spooled_rows(self) -> list[tuple[str, Span]]:
        """Every block of the spool: module and rows."""
        return [(module, rows) for module, spans in self.spools.items() for rows in spans]

    def drop(self, module: str, rows: Span) -> None:
        """Every rank has it."""
        self.spools[module].remove(rows)
        self._spooled(module, rows).unlink()

    def _spooled(self, module: str, rows: Span) -> Path:
        return self.directory / SPOOL / f"{module}@{rows[0]}-{rows[1]}"

    def spooled(self) -> dict[str, list[Area]]:
        """Module -> what is kept for others."""
        columns = {module: (0, self.form.columns(module)) for module in self.spools}
        return {module: [Area(rows, columns[module]) for rows in spans] for module, spans in self.spools.items()}

    # -----------------------------------------------------------------------------------------------------------------

    def missing_bytes(self) -> int:
        """Disk that the files will still take."""
        held = sum((self.directory / file.name).stat().st_blocks * 512 for file in self.open_files)
        return max(0, sum(file.nbytes for file in self.open_files) - held)

    def put(self, files: Mapping[str, bytes]) -> None:
        """Whole small files, beside those of the target."""
        with disk_errors(self.directory):
            for name, data in files.items():
                (self.directory / name).write_bytes(data)

    def close(self) -> None:
        self.placed.close()
        if self.journal >= 0:
            os.close(self.journal)
            self.journal = -1

    def remove(self) -> None:
        """There is nothing more to do here."""
        self.close()
        shutil.rmtree(self.directory)

    def _prepare(self, file: OutputFile, anew: bool) -> None:
        """Its header and its length, which may not have come to the disk when the machine went down."""
        path = self.directory / file.name
        if anew:
            path.unlink(missing_ok=True)  # it may be the same as an entry's
        with open(path, "r+b" if path.exists() else "wb") as made:
            made.write(file.header)
            made.truncate(file.nbytes)

    def _drop_half_a_line(self) -> None:
        """The last line may have been cut off."""
        written = (self.directory / JOURNAL).read_bytes()
        os.ftruncate(self.journal, written.rfind(b"\n") + 1)

    def _note(self, line: str) -> None:
        with disk_errors(self.directory):
            os.write(self.journal, line.encode() + b"\n")


def tidy(directory: Path) -> None:
    """Leave nothing but the files, once nothing is to be written any more."""
    shutil.rmtree(directory / SPOOL, ignore_errors=True)
    for name in (PLAN, JOURNAL):
        (directory / name).unlink(missing_ok=True)


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """What the disk refuses, as a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        full = f"; {ADVICE}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StoreError(f"{error.filename or directory}: {error.strerror or error}{full}") from None


def _link(path: Path, to: Path) -> None:
    """The same file, or where the disk's format has no links, such as exFAT, a copy."""
    to.unlink(missing_ok=True)
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def _read_journal(directory: Path) -> list[str] | None:
    """Its whole lines, of which the first is the identity; None where there is none, or it never came to the disk."""
    try:
        text = (directory / JOURNAL).read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return text[: text.rfind("\n") + 1].splitlines() or None  # the last line may be cut off


def _same_boot(lines: Sequence[str]) -> bool:
    """Whether the machine has run ever since."""
    return [line for line in lines[1:] if line.startswith("boot ")][-1:] in ([], [f"boot {boot()}"])


def _noted(lines: Sequence[str]) -> dict[str, list[Span]]:
    """Module -> rows that can be relied on: noted since the machine started, or on the disk before it went down."""
    running = ""
    sure: list[str] = []
    fresh: list[str] = []
    for line in (*lines[1:], f"boot {boot()}"):
        if line == "synced":
            sure, fresh = sure + fresh, []
        elif line.startswith("boot "):
            if line != running:
                running, fresh = line, []
        elif re.fullmatch(r"\S+ \d+ \d+", line):
            fresh.append(line)
    found: dict[str, list[Span]] = {}
    for line in sure + fresh:
        module, first, last = line.split()
        found.setdefault(module, []).append((int(first), int(last)))
    return found


def boot() -> str:
    """A word that is another one after each start of the machine."""
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True)
        return asked.stdout.strip() or os.urandom(8).hex()  # then nothing unsynced is relied on
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def identity_of(**facts: object) -> str:
    """One line for what is being written."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))
