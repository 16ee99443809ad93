"""What a rank is doing, where its agent can read it even when the rank is stopped or was killed. No MLX.

One page of memory that both map: the rank writes after each collective and each tensor it finishes, which costs a
microsecond and wakes nobody; the agent looks when it has a reason to. Its file has no name: nothing is left behind.
"""

import mmap
import os
import struct
import tempfile
import time
from dataclasses import dataclass
from functools import cache

DESCRIPTOR = "M3DIST_STATUS"  # names the page's descriptor to the rank
SIZE = mmap.PAGESIZE
WORDS = SIZE // 2  # where the last words begin
HEADER = struct.Struct("<QQddH")  # writes begun, writes ended, since, limit, bytes of the phase, which follow


@dataclass(frozen=True)
class Status:
    """`phase` began at `since` (time.monotonic(), one clock for a machine's processes) and must end within `limit`."""

    phase: str
    since: float
    limit: float

    def overdue(self, now: float) -> bool:
        return now - self.since > self.limit


class Page:
    """The memory behind file descriptor `descriptor`, which is kept open."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, SIZE)
        self._writes = 0

    def write(self, phase: str, limit: float) -> None:
        """One writer only."""
        text = phase.encode()[: WORDS - HEADER.size]
        self._writes += 1
        since = time.monotonic()
        # Copied as a whole: pack_into would write zeros first, which a reader takes for a limit long past.
        self._memory[: HEADER.size] = HEADER.pack(self._writes, self._writes - 1, since, limit, len(text))
        self._memory[HEADER.size : HEADER.size + len(text)] = text
        self._memory[: HEADER.size] = HEADER.pack(self._writes, self._writes, since, limit, len(text))

    def read(self) -> Status | None:
        """None if the rank has not written yet. A rank stopped within a write gives what it was writing."""
        for _ in range(3):  # unless it is stopped, the writer is done a microsecond later
            begun, ended, since, limit, size = HEADER.unpack_from(self._memory)
            phase = bytes(self._memory[HEADER.size : HEADER.size + size])
            if begun == ended == HEADER.unpack_from(self._memory)[0]:
                break
        return Status(phase.decode(errors="replace"), since, limit) if begun else None

    def leave_words(self, text: str) -> None:
        """Why the rank ends: the launcher does not see what a rank writes to a terminal."""
        data = text.encode(errors="replace")[: SIZE - WORDS]
        self._memory[WORDS : WORDS + len(data)] = data

    def last_words(self) -> str:
        return bytes(self._memory[WORDS:]).rstrip(b"\0").decode(errors="replace")


def new_page() -> Page:
    """An empty page, its descriptor inheritable."""
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return Page(os.dup(file.fileno()))


@cache
def own_page() -> Page | None:
    """The page that this rank's agent reads; None where no agent started this process."""
    descriptor = inherited(DESCRIPTOR)
    return None if descriptor is None else Page(descriptor)


def handed(descriptor: int) -> str:
    """A descriptor as a variable names it to a process that inherits it."""
    return f"{descriptor}:{os.fstat(descriptor).st_ino}"


def inherited(variable: str) -> int | None:
    """The descriptor that `variable` names, which is not passed on; None where there is none.

    A program between the agent and us may have closed it, and its number may be another file's by now.
    """
    number, _, inode = os.environ.get(variable, "").partition(":")
    try:
        descriptor = int(number)
        if str(os.fstat(descriptor).st_ino) != inode:
            return None
    except (ValueError, OSError):
        return None
    os.set_inheritable(descriptor, False)
    return descriptor
