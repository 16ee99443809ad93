"""`m3dist fetch`: every rank gets what its plan needs, and keeps it in its store."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.errors import StoreError
from m3dist.fetch import store
from m3dist.fetch.build import SPOOLED, Build, Holding, Source
from m3dist.fetch.display import FetchDisplay, Tally
from m3dist.fetch.manifest import MANIFEST, Kept, Manifest, read_manifest
from m3dist.fetch.origin import Origin, opened, texts
from m3dist.fetch.places import Format
from m3dist.fetch.schedule import Area, Block, State, schedule
from m3dist.fetch.store import Entry
from m3dist.fetch.target import slice_of
from m3dist.fetch.together import side_by_side
from m3dist.fetch.work import ADVICE, PLAN, Work, identity_of, tidy
from m3dist.options import ConvertOptions, FetchOptions
from m3dist.plan import Plan, plan_world
from m3dist.progress import Report
from m3dist.quantization import recipe_of, requantised
from m3dist.rank import STEP_LIMIT, join, run_rank
from m3dist.tensors import Inventory, modules
from m3dist.watchdog import Watchdog

LISTING_LIMIT = 600.0  # seconds for the hub to list a repository and send its headers, retries included
UNKNOWN = "0" * 64  # a checksum
ROOM = 64 << 20  # bytes of disk for small files, besides an entry's own


def main(options: FetchOptions, launch: Launch) -> int:
    """Be one rank of the job, or all of it. An error ends this process at once: else it would hold up the others."""
    return run_rank(partial(_run, options, launch), launch, None)


def _run(options: FetchOptions, launch: Launch, watchdog: Watchdog) -> int:
    comm = join(launch, options.model, watchdog)
    fetch(options, comm, watchdog)
    watchdog.stop()
    return 0


def fetch(options: FetchOptions, comm: Comm, watchdog: Watchdog) -> Entry:
    """This rank's entry, whole and intact, made of what is kept and of what has to be fetched. Every rank calls it,
    with the same options; if one fails, all raise.

    Raises CheckpointError, PlanError or StoreError for this rank's own failure, CommunicationError for another's.
    """
    watchdog.progress("the listing and the headers of the checkpoint", LISTING_LIMIT)
    with opened(options.model, comm) as origin:
        with all_ranks(comm):
            job = Fetch.of(options, origin, comm)
        check_same(comm, {"revision": origin.revision, "plan": job.plan.digest})
        return job.run(comm, watchdog)


@dataclass(frozen=True)
class Fetch:
    """What one rank is to keep: `rank` of `plan`, of what lies in `source`."""

    options: FetchOptions
    origin: Origin
    source: Source
    plan: Plan
    rank: int

    @classmethod
    def of(cls, options: FetchOptions, origin: Origin, comm: Comm) -> "Fetch":
        """Raises CheckpointError or PlanError where the checkpoint, the formats or the cut are not possible."""
        translation = origin.checkpoint.translate()
        target = target_of(options, translation.inventory)
        world, rank = (comm.world, comm.rank) if options.rank is None else (options.world, options.rank)
        plan = plan_world(target, world, options.weights, options.experts, options.attention)
        return cls(options, origin, Source(origin.files, origin.checkpoint.stored, translation), plan, rank)

    @property
    def place(self) -> Path:
        return store.place(self.origin.model, self.origin.revision, self.plan.digest, self.rank, self.plan.world)

    @property
    def form(self) -> Format:
        return Format(self.plan.inventory.config, self.plan.specs)

    @property
    def manifest(self) -> Manifest:
        """Of the entry to be: its files have no checksums yet."""
        files = [Kept(file.name, file.nbytes, UNKNOWN) for file in slice_of(self.plan, self.rank)]
        return Manifest.of(self.plan, self.rank, files, **self._origin)

    @property
    def _origin(self) -> dict[str, Any]:
        """What an entry is of, for its manifest."""
        origin = self.origin
        return {"model": origin.model, "revision": origin.revision, "config": origin.checkpoint.raw_config}

    def run(self, comm: Comm, watchdog: Watchdog) -> Entry:
        with ExitStack() as stack:
            with all_ranks(comm):
                stack.enter_context(store.locked(self.place))
            have = side_by_side(comm, watchdog, "check of what is kept", self._have)
            everyone = comm.gather_objects([have.whole, [f"rank {self.rank}: {p}" for p in have.problems]])
            if comm.rank == 0:
                for problem in (problem for _, problems in everyone for problem in problems):
                    say(f"{problem}: it is fetched again")
            if all(whole for whole, _ in everyone):
                if comm.rank == 0:
                    say(f"{self.origin.model} is here already, whole and intact: {self.place}")
                shutil.rmtree(store.work_directory(self.place), ignore_errors=True)  # to pass on what all have now
                self.origin.forget()
                return Entry(self.place, read_manifest(self.place))
            kept = side_by_side(comm, watchdog, "check of what is kept", partial(self._kept, have))
            stack.callback(lambda: [one.placed.close() for one in kept])
            with all_ranks(comm):
                work = self._work(have)
                stack.callback(work.close)
            blocks = self._schedule(comm, work, kept)
            check_room(comm, work, SPOOLED * self.options.range_size if comm.world > 1 else 0)
            beside = texts(self.origin, comm)
            self._build(comm, watchdog, blocks, work, kept)
            side_by_side(comm, watchdog, "check sums", partial(self._finish, have, work, beside))
            if comm.rank == 0:
                self.origin.forget()
                say(f"{self.origin.model} is here, {decimal(self.plan.bytes_held(self.rank))} of it: {self.place}")
        return Entry(self.place, read_manifest(self.place))

    # -----------------------------------------------------------------------------------------------------------------
    # What is there

    def _have(self, report: Report) -> "Have":
        """This rank's entry, file by file. One that was sealed, but is not in its place yet, is put there."""
        work = store.work_directory(self.place)
        if (work / MANIFEST).exists():
            with suppress(StoreError):  # then it is no manifest, and what it is about is made anew
                read_manifest(work)
                tidy(work)
                store.publish(work, self.place)
        if not self.place.exists():
            return Have(frozenset(), ())
        try:
            entry = Entry(self.place, read_manifest(self.place))
        except StoreError as error:
            return Have(frozenset(), (str(error),))
        problems = store.verify(entry, report)
        said = tuple(f"{self.place / problem.file} {problem.what}" for problem in problems)
        return Have(intact(entry, problems), said)

    def _kept(self, have: "Have", report: Report) -> list[Holding]:
        """What this rank keeps of the same commit in the same formats, whatever its cut was, and is intact: of whole
        entries, and of what interrupted fetches of other plans had put in place."""
        found = []
        for entry in store.entries(self.origin.model):
            if not isinstance(entry, Entry) or not (same := self._same(entry.manifest)):
                continue
            files = have.intact if entry.directory == self.place else intact(entry, store.verify(entry, report))
            if files:
                found.append(Holding.of(entry.directory, entry.manifest.make_plan(), entry.manifest.rank, same, files))
        for begun in store.unfinished(self.origin.model):
            manifest = planned(begun.directory)
            if begun.directory != store.work_directory(self.place) and manifest and (same := self._same(manifest)):
                done = Work.noted(begun.directory)
                found.append(Holding.of(begun.directory, manifest.make_plan(), manifest.rank, same, done=done))
        return found

    def _same(self, manifest: Manifest) -> set[str]:
        """The modules that an entry holds in the formats of ours; nothing where no matrix is among them."""
        ours, theirs = self.plan.inventory, manifest.inventory()
        if manifest.revision != self.origin.revision or (ours.dtype, ours.config) != (theirs.dtype, theirs.config):
            return set()
        known = modules(ours.config)
        same = {name for name in known if ours.quantization.get(name) == theirs.quantization.get(name)}
        return same if any(known[name].is_matrix and not known[name].exact for name in same) else set()

    def _work(self, have: "Have") -> Work:
        """The work directory; files of a damaged entry that are intact are in it already. Where nothing is missing, a
        place for what this rank passes on."""
        files = () if have.whole else slice_of(self.plan, self.rank)
        whole = {file.name: self.place / file.name for file in files if file.name in have.intact}
        directory = store.work_directory(self.place)
        missing = [file.name for file in files if file.name not in whole]
        identity = identity_of(model=self.origin.model, plan=self.plan.digest, rank=self.rank, files=missing)
        if Work.identity(directory) not in (None, identity):
            shutil.rmtree(directory)
        return Work(directory, files, self.form, identity, whole, json.dumps(self.manifest.to_json()))

    # -----------------------------------------------------------------------------------------------------------------
    # Together

    def _schedule(self, comm: Comm, work: Work, kept: list[Holding]) -> list[Block]:
        form = self.form
        areas = merged([one.areas for one in kept] + [work.spooled()])
        state = State(form.areas(work.open_files), work.done, areas, self.origin.local())
        said = comm.gather_objects(as_json(state))
        extents = {module: self.source.extent(module, form.columns(module)) for module in form.leaves}
        return schedule(extents, [from_json(one) for one in said], self.options.range_size)

    def _build(self, comm: Comm, watchdog: Watchdog, blocks: list[Block], work: Work, kept: list[Holding]) -> None:
        build = Build(comm, blocks, self.source, self.plan.inventory, work, kept, self.options.connections)
        if self.options.rank is not None and comm.rank == 0:
            self._say_cost(blocks)
        title = f"fetching {self.origin.model}"
        with FetchDisplay(title, comm.world) if comm.rank == 0 else nullcontext() as display:

            def report(tallies: list[Tally]) -> None:
                own = tallies[comm.rank]
                watchdog.progress(f"fetch, at {own.done} of {own.total} bytes", STEP_LIMIT)
                if display:
                    display(tallies)

            build.run(report)

    def _say_cost(self, blocks: list[Block]) -> None:
        """Alone, whole rows are fetched for a few columns of each."""
        fetched, held = sum(block.source_bytes for block in blocks), self.plan.bytes_held(self.rank)
        say(
            f"rank {self.rank} of {self.plan.world} alone fetches {decimal(fetched)} to keep {decimal(held)}; where all"
            " ranks fetch together, each byte crosses the internet once"
        )

    def _finish(self, have: "Have", work: Work, beside: Mapping[str, bytes], report: Report) -> None:
        """Make an entry of the finished work."""
        if have.whole:
            work.remove()
            return
        work.put(beside)
        store.seal(work.directory, plan=self.plan, rank=self.rank, progress=report, **self._origin)
        work.close()
        tidy(work.directory)
        store.publish(work.directory, self.place)


@dataclass(frozen=True)
class Have:
    """What there is of a rank's entry: names of files that are intact, and what is wrong with the others."""

    intact: frozenset[str]
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return bool(self.intact) and not self.problems


def intact(entry: Entry, problems: Sequence[store.Problem]) -> frozenset[str]:
    """The files of an entry that may be relied on; none where its manifest may not."""
    bad = {problem.file for problem in problems}
    return frozenset() if MANIFEST in bad else frozenset(kept.name for kept in entry.manifest.files) - bad


def target_of(options: FetchOptions | ConvertOptions, inventory: Inventory) -> Inventory:
    """The model in the formats asked for. Raises PlanError where they are not possible."""
    recipe = recipe_of(options.mode, options.bits, options.group_size, options.overrides)
    return requantised(inventory, recipe) if recipe else inventory


def planned(directory: Path) -> Manifest | None:
    """What is being made in a work directory; None where nobody knows."""
    path = directory / PLAN
    try:
        manifest = Manifest.from_json(json.loads(path.read_text()), path)
        manifest.make_plan()
    except (OSError, ValueError, StoreError):
        return None
    return manifest


def check_room(comm: Comm, work: Work, waiting: int = 0) -> None:
    """Raises StoreError where the disk of a host is too small, before anything is fetched. `waiting`: bytes of blocks
    that a rank may have to keep until the others take them."""
    free = shutil.disk_usage(work.directory).free
    own = [socket.gethostname(), os.stat(work.directory).st_dev, work.missing_bytes() + waiting + ROOM, free]
    totals: dict[tuple[str, int], list[int]] = {}
    for host, device, need, free in comm.gather_objects(own):
        total = totals.setdefault((host, device), [0, free])
        total[0] += need
    for (host, _), (need, free) in totals.items():
        if need > free:
            raise StoreError(f"{host}: {decimal(need)} are to be kept and {decimal(free)} are free; {ADVICE}")


def merged(several: list[Mapping[str, Any]]) -> dict[str, list[Area]]:
    """Areas of one module from everywhere."""
    found: dict[str, list[Area]] = {}
    for areas in several:
        for module, some in areas.items():
            found.setdefault(module, []).extend(some)
    return found


def as_json(state: State) -> list[Any]:
    """For the other ranks."""

    def areas(by_module: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
        return {module: [(*area.rows, *area.columns) for area in some] for module, some in by_module.items()}

    return [areas(state.wanted), state.done, areas(state.kept), sorted(state.local)]


def from_json(said: list[Any]) -> State:
    """Another rank's `as_json`."""
    wanted, done, kept, local = said

    def areas(by_module: Mapping[str, Any]) -> dict[str, list[Area]]:
        return {module: [Area((a, b), (c, d)) for a, b, c, d in some] for module, some in by_module.items()}

    spans = {module: [(first, last) for first, last in some] for module, some in done.items()}
    return State(areas(wanted), spans, areas(kept), frozenset(local))


def say(line: str) -> None:
    print(f"m3dist: {line}", file=sys.stderr, flush=True)
