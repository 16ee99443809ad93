"""Which launcher started this process, as which rank, over which backend: read from the environment. No MLX.

The backend is always named, never "any": MLX's own search (nccl, ring, mpi, jaccl) is led astray by variables that a
former run exported, and without any launcher it starts MPI, which can abort the process.

What the launchers set:

    m3dist        M3DIST_LAUNCHER, M3DIST_JOB, M3DIST_WORLD, MLX_RANK, MLX_HOSTFILE
    mlx.launch    MLX_RANK and, by backend
                    ring   MLX_HOSTFILE: a file, JSON, each rank's list of "ip:port"; empty for one rank
                    jaccl  MLX_IBV_DEVICES: a file, JSON, each rank's list of devices; MLX_JACCL_COORDINATOR "ip:port"
                    nccl   NCCL_HOST_IP, NCCL_PORT, MLX_WORLD_SIZE
    mpirun        OMPI_COMM_WORLD_RANK and _SIZE (Open MPI), PMIX_RANK (PMIx, Slurm), PMI_RANK and PMI_SIZE (PMI)
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3dist.errors import M3Error

MPI_RANKS = {"OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE", "PMIX_RANK": None, "PMI_RANK": "PMI_SIZE"}
MLX_BACKENDS = {"MLX_HOSTFILE": "ring", "MLX_IBV_DEVICES": "jaccl", "MLX_WORLD_SIZE": "nccl"}


class LaunchError(M3Error):
    """Launcher variables that are wrong or contradict each other, or ranks that could not be started."""


@dataclass(frozen=True)
class Launch:
    """This process's place in the job. A world of 1 has no backend: there is nobody to talk to."""

    launcher: str  # "single", "m3dist", "mlx.launch" or "mpirun"
    backend: str | None = None  # "ring", "jaccl", "nccl", "mpi"
    rank: int = 0
    world: int | None = 1  # None: the launcher does not say, the backend will
    job: str | None = None  # the same text on all ranks of one job, another in every other job


def detect(environ: Mapping[str, str]) -> Launch:
    """Read `environ` and the files it names. Raises LaunchError, naming the variable that is wrong."""
    mpi = next((name for name in MPI_RANKS if name in environ), None)
    mlx = next((name for name in ("MLX_RANK", *MLX_BACKENDS) if name in environ), None)
    if mpi and mlx:
        raise LaunchError(
            f"{mpi} (mpirun) and {mlx} (mlx.launch) are both set; if a former run exported {mlx}, unset it"
        )
    if mpi:
        return _from_mpi(environ, mpi)
    if mlx:
        return _from_mlx(environ)
    return Launch("single")


# ---------------------------------------------------------------------------------------------------------------------
# mpirun


def _from_mpi(environ: Mapping[str, str], rank_name: str) -> Launch:
    world_name = MPI_RANKS[rank_name]
    world = _number(environ, world_name, low=1) if world_name else None
    rank = _rank(environ, rank_name, world)
    # MLX refuses an MPI world of one.
    return Launch("mpirun", None if world == 1 else "mpi", rank, world, environ.get("PMIX_NAMESPACE"))


# ---------------------------------------------------------------------------------------------------------------------
# mlx.launch, and m3dist's own launcher, which speaks the same variables


def _from_mlx(environ: Mapping[str, str]) -> Launch:
    launcher = "m3dist" if environ.get("M3DIST_LAUNCHER") == "m3dist" else "mlx.launch"
    world, backend = _mlx_world(environ, launcher)
    rank = _rank(environ, "MLX_RANK", world)
    return Launch(launcher, None if world == 1 else backend, rank, world, environ.get("M3DIST_JOB"))


def _mlx_world(environ: Mapping[str, str], launcher: str) -> tuple[int, str | None]:
    """The number of ranks and the backend, from whichever backend's variable is set."""
    named = [name for name in MLX_BACKENDS if name in environ]
    told = _number(environ, "M3DIST_WORLD", low=1) if launcher == "m3dist" else None
    if "MLX_RANK" not in environ:
        raise LaunchError(f"{named[0]} is set but MLX_RANK is not; if a former run exported {named[0]}, unset it")
    if told == 1 and not named:
        return 1, None
    if not named:
        raise LaunchError(
            f"MLX_RANK is set but none of {', '.join(MLX_BACKENDS)} is, so the other ranks cannot be found; "
            "start the program with mlx.launch, or unset MLX_RANK"
        )
    if len(named) > 1:
        raise LaunchError(
            f"{' and '.join(named)} are both set, for the backends {' and '.join(MLX_BACKENDS[n] for n in named)}; "
            "unset the one that is not meant"
        )
    world = {"MLX_HOSTFILE": _ring_world, "MLX_IBV_DEVICES": _jaccl_world, "MLX_WORLD_SIZE": _nccl_world}[named[0]](
        environ
    )
    if told not in (None, world):
        raise LaunchError(f"M3DIST_WORLD says {told} ranks, but {named[0]} lists {world}")
    return world, MLX_BACKENDS[named[0]]


def _ring_world(environ: Mapping[str, str]) -> int:
    if not _text(environ, "MLX_HOSTFILE").strip():
        return 1  # `mlx.launch -n 1` writes an empty file, on which MLX itself would fail
    hosts = _list_file(environ, "MLX_HOSTFILE")
    for rank, addresses in enumerate(hosts):
        listed = [addresses] if isinstance(addresses, str) else addresses
        if not isinstance(listed, list) or not listed or not all(map(_is_address, listed)):
            hint = (
                "; this looks like the file for mlx.launch --hostfile, which makes another one for each rank"
                if isinstance(addresses, dict)
                else ""
            )
            raise LaunchError(
                f'MLX_HOSTFILE {environ["MLX_HOSTFILE"]}: rank {rank} must be a list of "ip:port", '
                f"not {json.dumps(addresses)}{hint}"
            )
    return len(hosts)


def _jaccl_world(environ: Mapping[str, str]) -> int:
    devices = _list_file(environ, "MLX_IBV_DEVICES")
    for rank, row in enumerate(devices):
        if not isinstance(row, list) or len(row) != len(devices):
            raise LaunchError(
                f"MLX_IBV_DEVICES {environ['MLX_IBV_DEVICES']}: rank {rank} must list {len(devices)} devices, one to "
                f"each rank and null to itself, not {json.dumps(row)}"
            )
    if not _is_address(environ.get("MLX_JACCL_COORDINATOR")):
        raise LaunchError(
            'MLX_JACCL_COORDINATOR must be rank 0\'s "ip:port" when MLX_IBV_DEVICES is set, '
            f"not {environ.get('MLX_JACCL_COORDINATOR')!r}"
        )
    return len(devices)


def _nccl_world(environ: Mapping[str, str]) -> int:
    if not environ.get("NCCL_HOST_IP"):
        raise LaunchError("NCCL_HOST_IP must be rank 0's address when MLX_WORLD_SIZE is set")
    _number(environ, "NCCL_PORT", low=1)
    return _number(environ, "MLX_WORLD_SIZE", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _number(environ: Mapping[str, str], name: str, low: int) -> int:
    text = environ.get(name)
    if text is None:
        raise LaunchError(f"{name} is not set; start the program with the launcher that sets it")
    # MLX reads these with atoi, to which "abc" is rank 0.
    if not text.isascii() or not text.isdecimal() or int(text) < low:
        raise LaunchError(f"{name} must be a whole number, {low} or more, not {text!r}")
    return int(text)


def _rank(environ: Mapping[str, str], name: str, world: int | None) -> int:
    rank = _number(environ, name, low=0)
    if world is not None and rank >= world:
        raise LaunchError(f"{name} is {rank}, but with {world} ranks the last is rank {world - 1}")
    return rank


def _text(environ: Mapping[str, str], name: str) -> str:
    try:
        return Path(environ[name]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{name} names {environ[name]!r}, which cannot be read: {error}") from None


def _list_file(environ: Mapping[str, str], name: str) -> list[Any]:
    """The JSON list in the file that `name` names; at least one entry."""
    try:
        content = json.loads(_text(environ, name))
    except ValueError as error:
        raise LaunchError(f"{name} {environ[name]}: not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise LaunchError(f"{name} {environ[name]}: must be a list with one entry a rank, not {str(content)[:80]}")
    return content


def _is_address(text: object) -> bool:
    """ "ip:port" or "host:port"."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return bool(host and colon) and port.isascii() and port.isdecimal() and 0 < int(port) < 65536
