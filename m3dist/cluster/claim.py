"""Keeps two jobs on one machine from sharing ring addresses. No MLX.

The ring listens with SO_REUSEPORT and greets nobody: two jobs with the same addresses (mlx.launch always begins at the
same port) get cross-connected and compute wrong sums without an error. So a rank claims its own addresses first, with a
lock that the system drops when the process ends, however it ends.
"""

import atexit
import fcntl
import hashlib
import json
import os
from pathlib import Path

from m3dist.cluster.environment import Launch, LaunchError

LOCKS = Path("/tmp")  # the same for every user and session of a machine, unlike TMPDIR


def claim_addresses(launch: Launch, hostfile: str | None) -> None:
    """Hold this rank's ring addresses until the process ends. Raises LaunchError naming one that is taken."""
    if launch.backend != "ring" or not hostfile:
        return
    own = json.loads(Path(hostfile).read_text())[launch.rank]
    for address in [own] if isinstance(own, str) else own:
        _claim(address)


def _claim(address: str) -> None:
    name = hashlib.sha256(f"{_network()} {address}".encode()).hexdigest()[:16]
    path = LOCKS / f"m3dist-{name}.lock"
    while True:
        lock = _open(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"another job on this machine uses the ring address {address}; wait for it to end, or start this one "
                "with another --starting-port (m3dist's own -n finds free ports)"
            ) from None
        if _is_current(path, lock):
            break
        os.close(lock)  # its last owner removed the file in between: lock the new one
    atexit.register(path.unlink, missing_ok=True)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except PermissionError:  # another user's file in a sticky directory may be opened, but not with O_CREAT
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_current(path: Path, lock: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def _network() -> str:
    """Which network the addresses belong to: on Linux a machine may have several (namespaces)."""
    try:
        return os.readlink("/proc/self/ns/net")
    except OSError:
        return ""
