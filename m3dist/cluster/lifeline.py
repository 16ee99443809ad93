"""A rank's tie to its agent: when the agent dies, even by SIGKILL, the rank ends. No MLX.

The agent holds the write end of a pipe and never writes; each rank inherits the read end, which M3DIST_LIFELINE names.
End of file means that the agent is gone.
"""

import os
import shutil
import threading

from m3dist.status import inherited, own_page
from m3dist.watchdog import EXIT_PEER_LOST, START, seconds

LIFELINE = "M3DIST_LIFELINE"


def watch() -> None:
    """Call once when a rank starts. Does nothing in a process that no agent of m3dist started."""
    lifeline = inherited(LIFELINE)
    if lifeline is None:
        return
    threading.Thread(target=_end_with_agent, args=(lifeline,), name="lifeline", daemon=True).start()
    if page := own_page():
        page.write("start", seconds(*START))


def _end_with_agent(lifeline: int) -> None:
    """Wait for the agent's end, then end at once.

    os._exit, not an exception: the main thread may be inside a collective that never returns.
    """
    os.read(lifeline, 1)
    if scratch := os.environ.get("M3DIST_SCRATCH"):
        shutil.rmtree(scratch, ignore_errors=True)  # the agent can no longer do it
    os._exit(EXIT_PEER_LOST)
