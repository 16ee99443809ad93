"""A bench that is ended before its time still shows what it has measured. No MLX."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from m3dist.watchdog import Watchdog, end_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def shown_if_cut_off(show: Callable[[], None], watchdog: Watchdog) -> Iterator[None]:
    """Inside, an error calls `show` on its way; SIGINT and SIGTERM call it and end the process. For the main thread.

    Another thread waits for the signals, because the main one may be inside a collective that never returns.
    """
    heard, hears = os.pipe()
    turn, shown = threading.Lock(), False

    def show_once() -> None:
        nonlocal shown
        with turn:
            if not shown:
                show()
            shown = True

    def wait() -> None:
        if number := os.read(heard, 1)[0]:
            show_once()
            end_process(128 + number, f"{watchdog.who}: {signal.Signals(number).name} received", watchdog.abort)

    os.set_blocking(hears, False)  # as set_wakeup_fd wants it
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}  # without one no byte is written
    signal.set_wakeup_fd(hears)
    threading.Thread(target=wait, name="cut-off", daemon=True).start()
    try:
        yield
    except Exception:
        show_once()
        raise
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(hears, b"\0")  # nothing to wait for any more
