"""Finds what a job's ranks load: a directory, each rank's entry of its store, or a snapshot in the hub's cache.

Nothing is downloaded here: `m3dist fetch` gets what is missing, by itself or called from here.
"""

import math
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from m3dist.checkpoint import hub_id, local, open_checkpoint
from m3dist.comm import Comm, all_ranks
from m3dist.config import CONFIG
from m3dist.errors import CheckpointError, M3Error
from m3dist.fetch.command import converted_to, fetch_command
from m3dist.fetch.hub import describe
from m3dist.fetch.program import fetch
from m3dist.fetch.store import Entry, candidates, check
from m3dist.options import BenchOptions, FetchOptions, GenerateOptions, ServeOptions
from m3dist.plan import plan_world
from m3dist.plan_report import inventory_of
from m3dist.quantization import quantization_of
from m3dist.rank import STEP_LIMIT
from m3dist.tensors import Quantization
from m3dist.watchdog import Watchdog

HUB_LIMIT = 300.0  # seconds in which the hub must have said which commit a branch is
Found = Path | Entry  # a checkpoint's directory, or what this rank's store keeps of one


@dataclass(frozen=True)
class Wanted:
    """What a job asks for: a hub's repository, in this cut and format. `revision` is a commit, or None for any that is
    kept; `weights` None for equal ranks; `quantization` what to convert to, None where the format does not matter."""

    repo: str
    revision: str | None
    weights: Sequence[float] | None
    experts: str
    attention: str
    quantization: Quantization | None

    @property
    def cut(self) -> dict[str, Any]:
        return {"weights": self.weights, "experts": self.experts, "attention": self.attention}

    @property
    def model(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Missing:
    """What is to be fetched, why, and how many bytes the ranks then hold more, if that is known."""

    wanted: Wanted
    why: str
    nbytes: int | None

    def __str__(self) -> str:
        return self.why


def find(
    model: str,
    comm: Comm,
    watchdog: Watchdog,
    *,
    weights: Sequence[float] | None = None,
    experts: str = "columns",
    attention: str = "heads",
    quantization: Quantization | None = None,
    get: Callable[[Wanted], None] | None = None,
    ask: bool = True,
) -> Found:
    """What this rank loads of `model`: a directory, "tiny", or a hub id, "owner/name[@revision]".

    Of a hub id it is the newest entry that any rank's store keeps of this cut, if every rank has its own whole; else
    the snapshot in the hub's cache, if every rank has it whole. `get` gets what is missing, called by every rank:
    without `ask` at once, else if somebody at rank 0's terminal says yes. Otherwise every rank raises CheckpointError,
    which names the hosts that lack it, how much that is, and the command that fetches it.
    """
    watchdog.progress("the search for the model", STEP_LIMIT)
    if directory := _directory(model, comm):
        return directory
    wanted = Wanted(*_commit(model, comm, watchdog), weights, experts, attention, quantization)
    found = _kept(wanted, comm)
    if isinstance(found, Missing) and quantization is None:
        found = _snapshot(wanted, comm) or found
    if isinstance(found, Missing) and get and (not ask or _agreed(found, comm, watchdog)):
        get(found.wanted)
        watchdog.progress("the search for what was fetched", STEP_LIMIT)
        found = _kept(found.wanted, comm)
    if isinstance(found, Missing):
        raise CheckpointError(f"{found} first{', or give --fetch' if get else ''}")
    return found


def directory_of(found: Found) -> Path:
    """Where config.json, tokenizer and chat template are."""
    return found.directory if isinstance(found, Entry) else found


def _directory(model: str, comm: Comm) -> Path | None:
    """The directory that `model` names on every rank; None where it is a hub id on every rank."""
    with all_ranks(comm):
        directory = local(model)
        if directory is None:
            hub_id(model)
    having = comm.gather_objects(directory is not None)
    with all_ranks(comm):
        if directory is None and any(having):
            other = having.index(True)
            raise CheckpointError(f"{model}: no such directory on {socket.gethostname()}, but where rank {other} is")
    return directory


def _commit(model: str, comm: Comm, watchdog: Watchdog) -> tuple[str, str | None]:
    """The repository and the commit that a hub id names: a branch is the same commit for all ranks."""
    repo, revision = hub_id(model)
    if revision is None or re.fullmatch("[0-9a-f]{40}", revision):
        return repo, revision
    watchdog.progress(f"the hub's answer about {model}", HUB_LIMIT)
    with all_ranks(comm):
        commit = describe(repo, revision).commit if comm.rank == 0 else None
    watchdog.progress("the search for the model", STEP_LIMIT)
    return repo, comm.object_from_rank_0(commit)


def find_or_fetch(
    model: str, options: GenerateOptions | BenchOptions | ServeOptions, comm: Comm, watchdog: Watchdog
) -> Found:
    """`find`, as the flags of a program ask for; with --fetch, or a yes at the terminal, what is missing is got."""

    def get(wanted: Wanted) -> None:
        q = wanted.quantization
        formats = {"mode": q.mode, "bits": q.bits, "group_size": q.group_size} if q else {}
        fetch(FetchOptions(wanted.model, **formats, **wanted.cut), comm, watchdog)

    return find(
        model,
        comm,
        watchdog,
        weights=options.weights,
        experts=options.experts,
        attention=options.attention,
        quantization=quantization_of(options.mode, options.bits, options.group_size),
        get=get,
        ask=not options.fetch,
    )


# ---------------------------------------------------------------------------------------------------------------------
# In the store


def _kept(wanted: Wanted, comm: Comm) -> Entry | Missing:
    """This rank's entry, where every rank has its own of one revision and plan, whole; on all ranks or on none."""
    with all_ranks(comm):
        asked = {"revision": wanted.revision, "quantization": wanted.quantization}
        kept = candidates(wanted.repo, world=comm.world, rank=comm.rank, **wanted.cut, **asked)
    offers = comm.gather_objects([(e.manifest.created, e.manifest.revision, e.manifest.plan) for e in kept])
    _, *newest = max((offer for rank in offers for offer in rank), default=[None])
    entry = next((e for e in kept if [e.manifest.revision, e.manifest.plan] == newest), None)
    with all_ranks(comm):
        state = _state(entry)
    ranks = comm.gather_objects(state)
    if entry and all(rank["kept"] and not rank["problem"] for rank in ranks):
        return entry
    return _missing(wanted, ranks)


def _state(entry: Entry | None) -> dict[str, Any]:
    """What a rank says about the entry that all look for: whether it has it, whole; and what the others need of it."""
    host = socket.gethostname()
    if entry is None:
        return {"host": host, "kept": False, "problem": None}
    problem = next((f"{entry.directory / p.file} {p.what}" for p in check(entry)), None)
    plan, format = entry.manifest.make_plan(), converted_to(entry.manifest)
    return {
        "host": host,
        "kept": True,
        "problem": problem,
        "revision": entry.manifest.revision,
        "quantization": format and asdict(format),
        "held": [plan.bytes_held(rank) for rank in range(plan.world)],
    }


def _missing(wanted: Wanted, ranks: Sequence[Mapping[str, Any]]) -> Missing:
    """What ranks with these states have to fetch: of the revision and in the format that one of them has, if any."""
    world, lacking = len(ranks), [number for number, rank in enumerate(ranks) if not rank["kept"]]
    if one := next((rank for rank in ranks if rank["kept"]), None):
        format = one["quantization"] and Quantization(**one["quantization"])
        wanted = replace(wanted, revision=one["revision"], quantization=format)
    held = one["held"] if one else _published_bytes(wanted, world)
    nbytes = sum(held[number] for number in lacking) if held and lacking else None
    hosts = {rank["host"] for rank in ranks}
    where = f"-n {world}" if len(hosts) == 1 else "--hostfile HOSTFILE"
    command = fetch_command(wanted.model, where if world > 1 else "", quantization=wanted.quantization, **wanted.cut)
    troubles = [_lacks(host, [n for n in lacking if ranks[n]["host"] == host]) for host in sorted(hosts)]
    troubles += [f"rank {n} on {rank['host']}: {rank['problem']}" for n, rank in enumerate(ranks) if rank["problem"]]
    amount = f"; {decimal(nbytes)} to fetch" if nbytes else ""
    why = f"{wanted.model}: {'; '.join(filter(None, troubles))}{amount}. Run `{command}`"
    return Missing(wanted, why, nbytes)


def _lacks(host: str, ranks: Sequence[int]) -> str:
    """In words; nothing of no ranks."""
    several = "s" * (len(ranks) > 1)
    return f"{host} lacks the slice{several} of rank{several} {', '.join(map(str, ranks))}" if ranks else ""


def _published_bytes(wanted: Wanted, world: int) -> list[int] | None:
    """What each rank would hold, where the repository is one whose shapes m3dist knows."""
    q = wanted.quantization
    try:
        inventory, _ = inventory_of(wanted.repo, *((q.mode, q.bits, q.group_size) if q else (None, None, None)))
        plan = plan_world(inventory, world, **wanted.cut)
    except M3Error:
        return None
    return [plan.bytes_held(rank) for rank in range(world)]


def _agreed(missing: Missing, comm: Comm, watchdog: Watchdog) -> bool:
    """Whether somebody at rank 0's terminal wants it fetched now; nobody is waited for where there is no terminal."""
    if not comm.object_from_rank_0(sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    watchdog.progress("an answer at the terminal", math.inf)
    answer = ""
    if comm.rank == 0:
        amount = decimal(missing.nbytes) if missing.nbytes else "it"
        print(f"{missing}, or now.\nFetch {amount} now? [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline().strip().lower()
    return comm.object_from_rank_0(answer) in ("y", "yes")


# ---------------------------------------------------------------------------------------------------------------------
# In the hub's cache


def _snapshot(wanted: Wanted, comm: Comm) -> Path | None:
    """The snapshot of one commit in the hub's cache, where every rank has it whole; on all ranks or on none."""
    own = whole_snapshot(wanted.repo, wanted.revision) if comm.rank == 0 else None
    commit = comm.object_from_rank_0(own and own.name)
    if commit and comm.rank:
        own = whole_snapshot(wanted.repo, commit)
    return own if all(comm.gather_objects(own is not None)) else None


def whole_snapshot(repo: str, revision: str | None) -> Path | None:
    """The directory of a snapshot in the hub's cache that holds all tensors; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(repo, CONFIG, revision=revision)
        if not isinstance(config, str):
            return None
        open_checkpoint(Path(config).parent).translate()
    except (M3Error, ValueError):  # a name that the hub's library does not take
        return None
    return Path(config).parent
