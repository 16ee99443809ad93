"""What a fetch shows: bars on a terminal, elsewhere a plain line now and then."""

import io
import re
from functools import partial

import pytest
from rich.console import Console

from m3dist.fetch import display
from m3dist.fetch.display import FetchDisplay, Tally
from m3dist.progress import PLAIN_INTERVAL


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def gb(done: float, total: float, placed: int = 0, wanted: int = 10) -> Tally:
    return Tally(int(done * 1e9), int(total * 1e9), placed, wanted)


def lines(tallies_at: list[tuple[float, list[Tally]]]) -> list[str]:
    """What is written where there is no terminal."""
    clock, stream = Clock(), io.StringIO()
    with FetchDisplay("fetching owner/name", len(tallies_at[0][1]), stream, clock) as shown:
        for seconds, tallies in tallies_at:
            clock.now = 100.0 + seconds
            shown(tallies)
    return stream.getvalue().splitlines()


def test_a_line_has_bytes_rate_and_time_left():
    """Of all ranks; and each one's share of its own."""
    assert lines([(10, [gb(3, 4), gb(1, 4)])]) == [
        "fetching owner/name: 4.0 GB of 8.0 GB, 400.0 MB/s, 10 s left"
        " (rank 0 3.0 GB of 4.0 GB, rank 1 1.0 GB of 4.0 GB)"
    ]
    assert lines([(10, [gb(3, 4)])]) == ["fetching owner/name: 3.0 GB of 4.0 GB, 300.0 MB/s, 3 s left"]


def test_a_rank_that_fetches_nothing_is_not_listed():
    assert lines([(10, [gb(1, 4), gb(0, 0), gb(4, 4)])])[0].endswith(
        "(rank 0 1.0 GB of 4.0 GB, rank 2 4.0 GB of 4.0 GB)"
    )


def test_lines_come_now_and_then_and_at_the_end():
    some = [(t / 5, [gb(t / 1000, 1, t // 100)]) for t in range(1000)]  # five times a second
    said = lines([*some, (200, [gb(1, 1, 10)])])
    assert len(said) == 200 / PLAIN_INTERVAL and said[-1].startswith("fetching owner/name: 1.0 GB of 1.0 GB")
    assert lines([(0.2, [gb(0.5, 1)]), (0.4, [gb(1, 1, 9)])]) == []


def test_nothing_to_fetch():
    """All of it was on the disks already."""
    assert lines([(0.0, [Tally(0, 0, 3, 3)])]) == [
        "fetching owner/name: 0 bytes of 0 bytes, 0 bytes/s, 3 of 3 blocks in place"
    ]


def test_nothing_has_come_yet():
    """Nobody knows how long it will take."""
    assert lines([(10, [gb(0, 1), gb(0, 1)])]) == [
        "fetching owner/name: 0 bytes of 2.0 GB, 0 bytes/s (rank 0 0 bytes of 1.0 GB, rank 1 0 bytes of 1.0 GB)"
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_bars(monkeypatch, ranks):
    """One for each rank and one for all, with bytes, rate and time left; and the cursor stays."""
    wide = partial(Console, width=120, force_terminal=True, color_system=None)
    monkeypatch.setattr(display, "Console", wide)
    stream = Terminal()
    with FetchDisplay("fetching owner/name", ranks, stream) as shown:
        shown([gb(1, 4), gb(3, 4)][:ranks])
        shown.bars.refresh()
        found = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    own, both = ["rank 0 1.0/4.0 GB", "rank 1 3.0/4.0 GB"], "fetching owner/name 4.0/8.0 GB"
    wanted = ["fetching owner/name 1.0/4.0 GB"] if ranks == 1 else [*own, both]
    parts = [
        re.fullmatch(r"([\w /]+?) +[━╸╺ ]+ (\S+ GB) (\?|[\d.]+ .?B/s) +(-:--:--|\d+:\d+:\d+) *", line) for line in found
    ]
    assert [f"{part[1]} {part[2]}" for part in parts if part][-len(wanted) :] == wanted
    assert "\x1b[?25h" in stream.getvalue()
