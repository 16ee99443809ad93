"""What `m3dist doctor` makes of each host by itself: MLX, memory, disk, settings, clock. Pure. No MLX."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from m3dist.doctor.examination import Examination, Finding, Look, gib
from m3dist.doctor.report import HostReport
from m3dist.errors import PlanError
from m3dist.fetch.command import fetch_command
from m3dist.metal import ACTIVATIONS, fast_synch_risk, wiring
from m3dist.plan_report import RESERVE_GIB, room

SKEW, LARGE_SKEW = 2.0, 60.0  # seconds
PRESENT = 0.95  # of a checkpoint's bytes: files may hold a little less or more than the tensors that m3dist counts
LESS = "use more hosts, fewer bits or a shorter context, or give it a smaller share with --weights"


def mlx_works(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """MLX can be imported, computes on the GPU of a Mac, and has the backend."""
    python, backend = report.raw["python"]["path"], seen.backend.removesuffix("-ring")  # jaccl-ring is jaccl's
    if not report.mlx:
        said = report.raw["outputs"].get("mlx", {}).get("error", "").strip().splitlines()
        package = "mlx" if report.mac else "'m3dist[cpu]', or with an NVIDIA GPU 'm3dist[cuda]'"
        what = f"MLX does not start there: {said[-1] if said else 'no answer'}"
        yield Look("error", what, f"there: {python} -m pip install --upgrade {package}")
    elif report.mac and not report.mlx["metal"]:
        advice = f"install an arm64 Python; {python} -m pip install --upgrade mlx mlx-metal"
        yield Look("error", "MLX has no Metal there: it would compute on the CPU", advice)
    elif seen.hostfile.world > 1 and backend not in report.mlx["backends"]:
        has = f"MLX has no {seen.backend} there, only {', '.join(report.mlx['backends'])}"
        yield Look("error", has, _WITHOUT.get(backend, "upgrade mlx there"))
    else:
        yield Look("ok", f"MLX {report.mlx['version']} on {report.chip}")


_WITHOUT = {
    "mpi": "install Open MPI there, and set MLX_MPI_LIBNAME to the path of its libmpi in the hostfile's env",
    "jaccl": "jaccl needs macOS 26.2 and Thunderbolt 5: use the ring",
    "nccl": "nccl needs MLX for CUDA: pip install 'm3dist[cuda]'",
}


def memory(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """What the plan needs, against what there is and what is free."""
    total, available, needed = report.memory, report.available, seen.needed(number)
    limit = seen.hosts[number].memory_gb
    if total is None or available is None:
        yield Look("note", "how much memory it has could not be read")
        return
    have = f"{gib(available)} of {gib(total)} available"
    if needed is None:
        yield Look("ok", have)
        return
    what = f"weights{', cache' if seen.context else ''}"
    wanted = needed + (ACTIVATIONS if report.mac else 0)
    need = f"{what} and activations need {gib(wanted)}"
    if limit is not None and needed > room(limit):
        allowed = f"the hostfile's memory_gb allows {limit:g} GB less {RESERVE_GIB:g} reserved"
        yield Look("error", f"{what} need {gib(needed)}, {allowed}", LESS)
    elif seen.backend == "nccl" or report.mlx.get("cuda"):
        advice = "`nvidia-smi` says there how much it has, and how much is free"
        yield Look("note", f"{what} need {gib(needed)}: the memory of its GPU is not compared", advice)
    elif wanted > total:
        yield Look("error", f"{need}, it has {gib(total)}", LESS)
    elif wanted > available:
        # Linux ends processes then; macOS first compresses and swaps what others hold.
        yield Look("warning" if report.mac else "error", f"{need}, {have}", f"end other programs there; or {LESS}")
    else:
        yield Look("ok", f"{need}, {have}")


def wired_limit(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """What macOS lets the GPU keep resident."""
    device, needed = report.mlx.get("device", {}), seen.needed(number)
    if not report.mac or "max_recommended_working_set_size" not in device:
        return
    try:
        warning = None if needed is None else wiring(device, needed, {}).warning
    except PlanError:
        return  # memory says it
    if warning:
        evidence, _, advice = warning.partition(". ")
        yield Look("warning", evidence, f"on that host: {advice}")
        return
    chosen = f"iogpu.wired_limit_mb is {report.wired_limit}" if report.wired_limit else "its own choice"
    yield Look("ok", f"macOS lets the GPU keep {gib(device['max_recommended_working_set_size'])} ({chosen})")


def disk(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """Whether the host has the checkpoint, or its ranks' slices, or room for them."""
    directory, model = report.raw["directory"], report.raw["model"]
    if directory["problem"]:
        yield Look("error", directory["problem"], "or create that directory there")
    if model is None or model["path"] is None:
        return
    if model["problem"]:
        advice = f"let {report.raw['user']} read it there, or move it to where every host's user may read"
        yield Look("error", model["problem"], advice)
        return
    path, held, ranks = model["path"], model["bytes"], seen.on_machine(number)
    whole = sum(spec.nbytes for spec in seen.plan.specs.values()) if seen.plan else max(held, 1)  # any will do
    kept = [seen.kept[rank] for rank in ranks if rank in seen.kept and not seen.kept[rank]["problem"]]
    if len(kept) == len(ranks):
        yield Look("ok", f"{gib(sum(each['bytes'] for each in kept))} of {_named(ranks)} in {report.store['root']}")
    elif held >= PRESENT * whole:
        yield Look("ok", f"{gib(held)} of weights in {path}")
    elif model["hub"]:
        yield from _to_fetch(seen, ranks, report)
    else:
        what = f"{gib(whole - held) if seen.plan else 'all'} of the weights are missing in {path}"
        yield Look("error", what, "copy the checkpoint there, or correct --model: every host must have it at that path")


def _to_fetch(seen: Examination, ranks: Sequence[int], report: HostReport) -> Iterator[Look]:
    """What the store of a host lacks for its ranks, and whether there is room for it."""
    store = report.store
    if not store:
        said = report.raw["outputs"]["store"]["error"].strip().splitlines()
        what = f"the store there could not be looked into: {said[-1] if said else 'no answer'}"
        yield Look("warning", what, "`m3dist store ls` there says more")
        return
    lacking = [rank for rank in ranks if rank not in seen.kept]
    nbytes = sum(seen.plan.bytes_held(rank) for rank in lacking) if seen.plan else 0
    troubles = [seen.kept[rank]["problem"] for rank in ranks if rank in seen.kept and seen.kept[rank]["problem"]]
    if lacking:
        amount = gib(nbytes) if nbytes else "the slices"
        troubles.append(f"{amount} of {_named(lacking)} are missing in {store['root']}")
    what = "; ".join(troubles)
    if store["free"] < nbytes:
        advice = "make room, or set M3DIST_STORE in the hostfile's env for that host to a directory on a larger disk"
        yield Look("error", f"{what}, where {gib(store['free'])} are free", advice)
        return
    path = seen.hostfile.path
    where = path if path.startswith("-n ") else f"--hostfile {shlex.quote(path)}"
    command = fetch_command(str(seen.model), where if seen.hostfile.world > 1 else "", **seen.cut)
    yield Look("warning", what, f"fetch them first: {command}")


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def mpi(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """Open MPI, where it is the backend: on PATH of every host, and one version."""
    if seen.backend != "mpi":
        return
    others = [other.open_mpi for _, other in seen.reached() if other.open_mpi]
    if report.open_mpi is None:
        said = report.out("mpirun").split("\n")[0] or report.raw["outputs"].get("mpirun", {}).get("error", "")
        advice = "install Open MPI, on the PATH that a command over ssh has: mpirun starts its helper there"
        yield Look("error", f"no Open MPI there: `mpirun --version` says {said}", advice)
    elif report.open_mpi != others[0]:
        yield Look("error", f"Open MPI {report.open_mpi}, elsewhere {others[0]}", "install the same one on all hosts")
    else:
        yield Look("ok", f"Open MPI {report.open_mpi}")


def launcher_findings(seen: Examination) -> Iterator[Finding]:
    """Over MPI: the launcher, which may be none of the hosts, has mpirun and an address that each of them can reach."""
    if seen.backend != "mpi":
        return
    if seen.ours["mpirun"] is None:
        advice = "install Open MPI here too, or start the job on one of the hosts"
        yield Finding("mpi", "launcher", "error", "no mpirun is on PATH here, which starts the ranks", advice)
    for ssh, problem in seen.ours["no way"].items():
        advice = "MPI does not read ~/.ssh/config: name an address of that host in its `ips`"
        yield Finding("mpi", "launcher", "error", f"{ssh}: {problem}", advice)


def settings(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """Variables that have locked Macs."""
    if risk := fast_synch_risk(report.raw["environ"], report.chip if report.mac else ""):
        evidence, _, advice = risk.partition("; ")
        yield Look("warning", evidence, advice)


def clock(seen: Examination, number: int, report: HostReport) -> Iterator[Look]:
    """No job depends on it; logs and certificates do."""
    if report.skew is None or seen.hosts[number].local:
        return
    if abs(report.skew) <= SKEW:
        yield Look("ok", f"within {SKEW:g} s of ours")
        return
    apart = f"{abs(report.skew):.0f} s {'ahead of' if report.skew > 0 else 'behind'} ours"
    level = "warning" if abs(report.skew) > LARGE_SKEW else "note"
    yield Look(level, apart, "let it take its time from the network; on a Mac: sudo sntp -sS time.apple.com")


HOST_CHECKS: Mapping[str, Callable[[Examination, int, HostReport], Iterator[Look]]] = {
    "mlx": mlx_works,
    "memory": memory,
    "wired limit": wired_limit,
    "disk": disk,
    "mpi": mpi,
    "settings": settings,
    "clock": clock,
}
