"""What the ranks print, shown on our standard streams. No MLX."""

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import IO

from m3dist.cluster.channel import Message, as_bytes

TAIL = 20  # lines of each rank that are kept
LONGEST = 2**16  # bytes of a line; of a longer one, such as a progress bar's, no end is in sight
STDOUT, STDERR = 1, 2


class Output:
    """Whole lines, as bytes: no character is ever cut, no two ranks' lines are mixed, and each carries its rank.

    Unless `marked`, rank 0's standard output goes out as it comes, as the program's own, and its standard error carries
    no mark; the others' standard output then goes to standard error. A thread of its own writes: whoever does not read
    us holds up the ranks that print, and nothing else.
    """

    def __init__(self, marked: bool, stdout: IO[bytes] | None = None, stderr: IO[bytes] | None = None):
        self.marked = marked
        self.streams = {STDOUT: stdout or sys.stdout.buffer, STDERR: stderr or sys.stderr.buffer}
        self._unfinished: dict[tuple[int, int], bytes] = defaultdict(bytes)
        self._tails: dict[int, deque[bytes]] = defaultdict(lambda: deque(maxlen=TAIL))
        self._queue: SimpleQueue[tuple[int, bytes, Callable[[bool], None]] | None] = SimpleQueue()
        self._given = self._written = 0
        threading.Thread(target=self._write, daemon=True).start()

    def add(self, message: Message, tell: Callable[[Message], None]) -> None:
        """Show an agent's {output: rank, stream, data}; it is told {shown: bytes} once they are, and {unread: rank} if
        nobody reads what goes out as it comes."""
        rank, stream, data = message["output"], message["stream"], as_bytes(message["data"])
        raw = rank == 0 and stream == STDOUT and not self.marked
        text = data if raw else self._lines(rank, stream, data)

        def shown(read: bool) -> None:
            self._written += 1
            tell({"shown": len(data)} | ({"unread": rank} if raw and not read else {}))

        self._given += 1
        self._queue.put((self._target(rank, stream), text, shown))

    @property
    def unread(self) -> bool:
        """Whether something that ranks printed still waits to be read."""
        return self._given > self._written

    def finish(self, shown: Callable[[bool], None]) -> None:
        """Show what is left, lines without an end too; `shown` is called once that is done. Nothing is added then."""
        for (rank, stream), rest in self._unfinished.items():
            if rest:
                self._queue.put((self._target(rank, stream), self._line(rank, stream, rest + b"\n"), lambda read: None))
        self._unfinished.clear()
        self._queue.put((STDERR, b"", shown))
        self._queue.put(None)

    def say(self, text: str) -> None:
        """A message of the launcher's own."""
        with suppress(OSError, ValueError):
            self.streams[STDERR].write(text.encode(errors="replace"))
            self.streams[STDERR].flush()

    def show_again(self, tail: bytes) -> None:
        with suppress(OSError, ValueError):
            self.streams[STDERR].write(b"".join(b"    " + line for line in tail.splitlines(keepends=True)))
            self.streams[STDERR].flush()

    def tail(self, rank: int) -> bytes:
        """The last lines that a rank printed; of what goes out as it comes, its standard output, none."""
        return b"".join(self._tails[rank]) + self._unfinished[rank, STDERR]

    def _target(self, rank: int, stream: int) -> int:
        return stream if self.marked or rank == 0 else STDERR

    def _lines(self, rank: int, stream: int, data: bytes) -> bytes:
        *whole, rest = (self._unfinished[rank, stream] + data).split(b"\n")
        if len(rest) > LONGEST:
            end = whole_characters(rest)
            whole, rest = [*whole, rest[:end]], rest[end:]
        self._unfinished[rank, stream] = rest
        return b"".join(self._line(rank, stream, line + b"\n") for line in whole)

    def _line(self, rank: int, stream: int, line: bytes) -> bytes:
        self._tails[rank].append(line)
        return b"[rank %d] %s" % (rank, line) if self.marked or rank else line

    def _write(self) -> None:
        while (piece := self._queue.get()) is not None:
            stream, data, shown = piece
            read = False
            with suppress(OSError, ValueError):  # nobody reads it any more
                self.streams[stream].write(data)
                self.streams[stream].flush()
                read = True
            shown(read)


def whole_characters(data: bytes) -> int:
    """How many bytes of `data`, UTF-8, can go out without cutting a character: perhaps the last one waits."""
    return next((len(data) - back for back in (1, 2, 3) if data[-back] >= 0xC0), len(data))
