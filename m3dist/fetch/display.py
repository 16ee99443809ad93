"""How far a fetch is, on all ranks: bars on a terminal, elsewhere a line now and then. No MLX."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from m3dist.progress import PLAIN_INTERVAL


@dataclass(frozen=True)
class Tally:
    """How far a rank is: bytes got of those it gets from the source, blocks in place of those it wants."""

    done: int
    total: int
    placed: int
    wanted: int


class FetchDisplay:
    """Shows every list of tallies, one a rank, that it is called with."""

    def __init__(
        self, title: str, ranks: int, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic
    ):
        self.title, self.stream, self.clock = title, stream, clock
        self.began, self.said = clock(), -1.0
        self.bars: Progress | None = None
        if stream.isatty():
            columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self.bars = Progress(text, BarColumn(), *columns, console=Console(file=stream), transient=True)
            names = [title] if ranks == 1 else [*(f"rank {rank}" for rank in range(ranks)), title]
            self.tasks = [self.bars.add_task(name, total=None) for name in names]

    def __enter__(self) -> "FetchDisplay":
        if self.bars:
            self.bars.start()
            self.bars.console.show_cursor(True)  # a rank that is ended meanwhile could not bring it back
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, tallies: Sequence[Tally]) -> None:
        done, total = sum(t.done for t in tallies), sum(t.total for t in tallies)
        if self.bars:
            lines = [*tallies, Tally(done, total, 0, 0)][-len(self.tasks) :]
            for task, tally in zip(self.tasks, lines, strict=True):
                self.bars.update(task, completed=tally.done, total=tally.total)
            return
        now = self.clock()
        over = all(tally.placed == tally.wanted for tally in tallies)
        if now - max(self.said, self.began) < PLAIN_INTERVAL and not over:
            return
        self.said = now
        rate = done / max(now - self.began, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        each = [f"rank {r} {decimal(t.done)} of {decimal(t.total)}" for r, t in enumerate(tallies) if t.total]
        line = f"{self.title}: {decimal(done)} of {decimal(total)}, {decimal(int(rate))}/s{left}"
        if done == total:  # what is left comes from the other ranks, or from this disk
            placed, wanted = (sum(getattr(tally, name) for tally in tallies) for name in ("placed", "wanted"))
            line += f", {placed} of {wanted} blocks in place"
        elif len(tallies) > 1 and each:
            line += f" ({', '.join(each)})"
        print(line, file=self.stream, flush=True)
