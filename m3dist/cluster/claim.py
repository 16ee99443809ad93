"""Keeps two jobs on one machine from sharing ring addresses. No MLX.

The ring listens with SO_REUSEPORT and greets nobody: two jobs with the same addresses (mlx.launch always begins at the
same port) get cross-connected and compute wrong sums without an error. So a rank claims its own addresses first, with a
lock that the system drops when the process ends, however it ends. All claims of a machine are locks on single bytes of
one empty file, so that ranks that are killed leave nothing behind.
"""

import fcntl
import hashlib
import json
import os
from functools import cache
from pathlib import Path

from m3dist.cluster.environment import Launch, LaunchError

LOCKS = Path("/tmp/m3dist.lock")  # the same for every user and session of a machine, unlike TMPDIR


def claim_addresses(launch: Launch, hostfile: str | None) -> None:
    """Hold this rank's ring addresses until the process ends. Raises LaunchError naming one that is taken."""
    if launch.backend != "ring" or launch.launcher == "m3dist" or not hostfile:
        return  # under m3dist the agent holds them
    own = json.loads(Path(hostfile).read_text())[launch.rank]
    for address in [own] if isinstance(own, str) else own:
        claim(address)


def claim(address: str) -> None:
    """Hold "ip:port" until the process ends. Raises LaunchError where another process holds it."""
    digest = hashlib.sha256(f"{_network()} {address}".encode()).digest()
    try:
        fcntl.lockf(_locks(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int.from_bytes(digest[:7], "big"))
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, as the system likes
        raise LaunchError(
            f"another job on this machine uses the ring address {address}; wait for it to end, or start this one "
            "with another --starting-port (m3dist launch finds free ports)"
        ) from None


@cache
def _locks() -> int:
    """Opened once and never closed: that would drop every lock this process has on the file."""
    return _open(LOCKS)


def _open(path: Path) -> int:
    """The file that every user may lock. Another user's, in a sticky directory, opens only without O_CREAT."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        locks = os.open(path, flags | os.O_CREAT)
        os.fchmod(locks, 0o666)
        return locks


def _network() -> str:
    """Which network the addresses belong to: on Linux a machine may have several (namespaces)."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
