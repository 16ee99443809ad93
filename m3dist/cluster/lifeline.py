"""A rank's tie to its launcher: when the launcher dies, even by SIGKILL, the rank ends. No MLX.

The launcher holds the write end of a pipe and never writes; each rank inherits the read end, as M3DIST_LIFELINE=fd.
End of file means that the launcher is gone. A second pipe, M3DIST_STARTED=fd, tells the launcher that a rank is up.
"""

import os
import threading
from pathlib import Path

from m3dist.watchdog import EXIT_PEER_LOST


def watch() -> None:
    """Call once when a rank starts. Does nothing in a process that `m3dist.cluster.local` did not start."""
    if "M3DIST_LIFELINE" not in os.environ:
        return
    lifeline = int(os.environ["M3DIST_LIFELINE"])
    os.set_inheritable(lifeline, False)
    threading.Thread(target=_end_with_launcher, args=(lifeline,), name="lifeline", daemon=True).start()
    _report_started()


def _end_with_launcher(lifeline: int) -> None:
    """Wait for the launcher's end, then end at once.

    os._exit, not an exception: the main thread may be inside a collective that never returns.
    """
    os.read(lifeline, 1)
    if hostfile := os.environ.get("MLX_HOSTFILE"):
        Path(hostfile).unlink(missing_ok=True)  # the launcher can no longer do it
    os._exit(EXIT_PEER_LOST)


def _report_started() -> None:
    """Tell the launcher that this rank runs: one byte, the rank."""
    started = int(os.environ["M3DIST_STARTED"])
    os.write(started, bytes([int(os.environ["MLX_RANK"])]))
    os.close(started)
