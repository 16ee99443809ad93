"""The gateway's log: a JSON object a line on standard error, never a word of a prompt, an answer or a key.

A thread writes it: whoever holds up standard error, as a terminal does after Ctrl-S, holds up nobody's answer.
"""

import json
import sys
import threading
import time
from contextlib import suppress
from queue import Full, Queue
from typing import Any

MOST = 10_000  # lines that may wait; beyond that they are lost

_lines: Queue[str] = Queue(MOST)
_writer: threading.Thread | None = None


def note(event: str, **values: Any) -> None:
    """A line. Waits for nothing."""
    global _writer
    if _writer is None:
        _writer = threading.Thread(target=_write, name="log", daemon=True)
        _writer.start()
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with suppress(Full):
        _lines.put_nowait(json.dumps({"time": now, "event": event, **values}))


def flush(seconds: float = 1.0) -> None:
    """Returns once all lines are written, or after `seconds`."""
    end = time.monotonic() + seconds
    while _lines.unfinished_tasks and time.monotonic() < end:
        time.sleep(0.005)


def _write() -> None:
    while True:
        line = _lines.get()
        with suppress(OSError, ValueError):  # nobody reads it any more
            print(line, file=sys.stderr, flush=True)
        _lines.task_done()
