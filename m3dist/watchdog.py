"""Ends a rank that waits for ever. No MLX.

A collective whose peer stalls never returns and cannot be interrupted from Python, so a thread watches the clock and
ends the process. Progress is what the rank's own work reports (a collective done, a tensor loaded), never a heartbeat.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from m3dist.errors import M3Error
from m3dist.status import own_page

EXIT_PEER_LOST = 75  # another rank is gone: that rank's own message says why
EXIT_STALLED = 76  # nothing finished within the limit
EXIT_UNREACHABLE = 77  # a host cannot be reached, or was lost
EXIT_NOT_STARTED = 78  # a rank or a host did not start in time, or is not as it must be
LONGEST = 1e7  # seconds that a limit may be: four months
START = ("M3DIST_START_LIMIT", 60.0, 0.0)  # for `seconds`: until a rank has come up, and until all have met


def end_process(code: int, message: str, abort: Callable[[int], None] | None = None) -> None:
    """Say why and leave at once, without the exit handlers that would wait for lost peers.

    `abort` ends a whole MPI job: an early exit alone leaves the other ranks of one waiting in finalize.
    """
    line = f"m3dist: {message}\n"
    if page := own_page():
        page.leave_words(line)
    with suppress(OSError):  # nobody reads it, or the disk is full: that must not keep us here
        sys.stderr.write(line)  # at once, so that no other rank's line gets in between
        sys.stderr.flush()
    with suppress(OSError):
        sys.stdout.flush()
    if abort:
        abort(code)
    os._exit(code)


def seconds(name: str, default: float, least: float = 0.0) -> float:
    """The limit that environment variable `name` sets. Raises M3Error, naming it, where it is no time to wait."""
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not within_bounds(value, least):
        raise M3Error(f"{name} must be a number of seconds, {bounds(least)}, not {text!r}")
    return value


def within_bounds(value: float, least: float) -> bool:
    """Whether so many seconds are a limit."""
    return 0 < value <= LONGEST and value >= least


def bounds(least: float) -> str:
    """Which numbers are, in words."""
    return f"{f'{least:g} or more' if least else 'more than 0'}, at most {LONGEST:.0f}"


class Watchdog:
    """Ends the process when `progress` was not called for `limit` seconds; where an agent started the process, it can
    read the same from the rank's status page, also when this process is stopped. Watches from `start` to `stop`."""

    def __init__(self, who: str, abort: Callable[[int], None] | None = None):
        self.who, self.abort = who, abort
        self._phase, self._limit, self._since = "start", float("inf"), time.monotonic()
        self._changed, self._page = threading.Condition(), own_page()
        threading.Thread(target=self._watch, name="m3dist-watchdog", daemon=True).start()

    def progress(self, phase: str, limit: float) -> None:
        """Something finished; now `phase` begins and must report within `limit` seconds."""
        with self._changed:
            earlier = limit < self._limit
            self._phase, self._limit, self._since = phase, limit, time.monotonic()
            if self._page:
                self._page.write(phase, limit)
            if earlier:
                self._changed.notify()

    def stop(self) -> None:
        """No limit until the next `progress`."""
        self.progress("idle", float("inf"))

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = self._since + self._limit - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if left == float("inf") else left)
        message = f"{self.who}: nothing finished for {self._limit:.0f} s in {self._phase}; a peer stalled or is gone"
        end_process(EXIT_STALLED, f"{message} ({_where_the_program_is()})", self.abort)


def _where_the_program_is() -> str:
    """The line that the main thread has come to."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"at line {frame.f_lineno} of {frame.f_code.co_filename}, {frame.f_code.co_name}"
