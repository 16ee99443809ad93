"""How far loading is, and showing it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 10.0  # seconds between lines where there is no terminal


@dataclass(frozen=True)
class Progress:
    """How far a rank's loading is: the tensor just read, bytes read so far, and bytes to read in all."""

    tensor: str
    done: int
    total: int

    def __str__(self) -> str:
        return self.tensor


Report = Callable[[Progress], None]


class LoadingBar:
    """Shows every Progress it is called with: a bar on a terminal, elsewhere a line now and then.

    with LoadingBar("rank 0") as bar:
        load(directory, comm, progress=bar)
    """

    def __init__(self, title: str, stream: TextIO = sys.stderr, clock: Callable[[], float] = time.monotonic):
        self.title, self.stream, self.clock = title, stream, clock
        self.began = self.said = clock()
        self.bar: RichProgress | None = None
        if stream.isatty():
            columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            text = TextColumn("{task.description}")
            self.bar = RichProgress(text, BarColumn(), *columns, console=Console(file=stream), transient=True)
            self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> "LoadingBar":
        if self.bar:
            self.bar.start()
            self.bar.console.show_cursor(True)  # a rank that is ended while it loads could not bring it back
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        if self.bar:
            self.bar.update(self.task, completed=progress.done, total=progress.total)
            return
        now = self.clock()
        if now - self.said >= PLAIN_INTERVAL or progress.done == progress.total:
            self.said = now
            rate = progress.done / max(now - self.began, 1e-9)
            left = (progress.total - progress.done) / max(rate, 1.0)
            print(
                f"{self.title}: {decimal(progress.done)} of {decimal(progress.total)},"
                f" {decimal(int(rate))}/s, {left:.0f} s left",
                file=self.stream,
                flush=True,
            )
