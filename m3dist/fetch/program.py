"""`m3dist fetch`: every rank gets what its plan needs, and keeps it in its store."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from m3dist.cluster.environment import Launch
from m3dist.comm import Comm, all_ranks, check_same
from m3dist.errors import StoreError
from m3dist.fetch import store
from m3dist.fetch.build import Build, Kept, Source
from m3dist.fetch.display import FetchDisplay, Tally
from m3dist.fetch.manifest import MANIFEST, read_manifest
from m3dist.fetch.origin import Origin, opened, texts
from m3dist.fetch.places import Format, Placed
from m3dist.fetch.schedule import Area, Block, State, schedule
from m3dist.fetch.store import Entry
from m3dist.fetch.target import slice_of
from m3dist.fetch.work import Work, identity_of, tidy
from m3dist.options import FetchOptions
from m3dist.plan import Plan, plan_world
from m3dist.progress import Progress
from m3dist.quantization import recipe_of, requantised
from m3dist.rank import LOAD_LIMIT, STEP_LIMIT, join, run_rank
from m3dist.tensors import modules
from m3dist.watchdog import Watchdog

LISTING_LIMIT = 600.0  # seconds for the hub to list a repository and send its headers, retries included
ROOM = 64 << 20  # bytes of disk for small files, and blocks that wait to be passed on, besides an entry's own


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
            job = Job.of(options, origin, comm)
        check_same(comm, {"revision": origin.revision, "plan": job.plan.digest})
        return job.run(comm, watchdog)


@dataclass(frozen=True)
class Job:
    """What one rank is to keep: `rank` of `plan`, of what lies in `source`."""

    options: FetchOptions
    origin: Origin
    source: Source
    plan: Plan
    rank: int

    @classmethod
    def of(cls, options: FetchOptions, origin: Origin, comm: Comm) -> "Job":
        """Raises CheckpointError or PlanError where the checkpoint, the formats or the cut are not possible."""
        translation = origin.checkpoint.translate()
        target = translation.inventory
        if recipe := recipe_of(options.mode, options.bits, options.group_size, options.overrides):
            target = requantised(target, recipe)
        world, rank = (comm.world, comm.rank) if options.rank is None else (options.world, options.rank)
        plan = plan_world(target, world, options.weights, options.experts, options.attention)
        return cls(options, origin, Source(origin.files, origin.checkpoint.stored, translation), plan, rank)

    @property
    def place(self) -> Path:
        return store.place(self.origin.model, self.origin.revision, self.plan.digest, self.rank, self.plan.world)

    @property
    def form(self) -> Format:
        return Format(modules(self.plan.inventory.config), self.plan.specs)

    def run(self, comm: Comm, watchdog: Watchdog) -> Entry:
        with ExitStack() as stack:
            with all_ranks(comm):
                stack.enter_context(store.locked(self.place))
                entry, damaged = self._present(watchdog)
                missing = entry is None or bool(damaged)
            watchdog.progress("checks on the other ranks", LOAD_LIMIT)
            problems = [f"{self.place / problem.file} {problem.what}" for problem in damaged]
            everyone = comm.gather_objects([missing, problems])
            if comm.rank == 0:
                for rank, (_, problems) in enumerate(everyone):
                    for problem in problems:
                        say(f"rank {rank}: {problem}: it is fetched again")
            if not any(lacks for lacks, _ in everyone):
                if comm.rank == 0:
                    say(f"{self.origin.model} is here already, whole and intact: {self.place}")
                self.origin.forget()
                return entry
            with all_ranks(comm):
                kept = self._kept(entry, damaged, watchdog)
                for one in kept:
                    stack.callback(one.placed.close)
                work = self._work(entry, damaged, missing)
                stack.callback(work.close)
            watchdog.progress("checks on the other ranks", LOAD_LIMIT)
            blocks = self._schedule(comm, work, kept)
            check_room(comm, work)
            beside = texts(self.origin, comm)
            self._build(comm, watchdog, blocks, work, kept)
            with all_ranks(comm):
                if missing:
                    entry = self._seal(work, beside, watchdog)
                else:
                    work.remove()
                watchdog.progress("check sums on the other ranks", LOAD_LIMIT)
            if comm.rank == 0:
                self.origin.forget()
                say(f"{self.origin.model} is here, {decimal(self.plan.bytes_held(self.rank))} of it: {self.place}")
        return entry

    # -----------------------------------------------------------------------------------------------------------------
    # What is there

    def _present(self, watchdog: Watchdog) -> tuple[Entry | None, list[store.Problem]]:
        """This rank's entry and what is wrong with it. One that was sealed, but not yet in its place, is put there."""
        work = store.work_directory(self.place)
        if not self.place.exists() and (work / MANIFEST).exists():
            try:
                tidy(work)
                store.publish(work, self.place)
            except StoreError:
                shutil.rmtree(work, ignore_errors=True)  # a manifest that cannot be read
        if not self.place.exists():
            return None, []
        try:
            entry = Entry(self.place, read_manifest(self.place))
        except StoreError:
            return None, []  # a new one takes its place
        return entry, store.verify(entry, reporting(watchdog, "check of what is kept"))

    def _kept(self, entry: Entry | None, damaged: list[store.Problem], watchdog: Watchdog) -> list[Kept]:
        """What this rank keeps of the same commit in the same formats, whatever its cut was, and is intact."""
        found = []
        for other in store.entries(self.origin.model):
            if not isinstance(other, Entry) or other.manifest.revision != self.origin.revision:
                continue
            if other.manifest.dtype != self.plan.inventory.dtype:
                continue
            same = entry and other.directory == entry.directory
            problems = damaged if same else store.verify(other, reporting(watchdog, "check of what is kept"))
            bad = {problem.file for problem in problems}
            plan = other.manifest.make_plan()
            form = Format(modules(plan.inventory.config), plan.specs)
            files = [file for file in slice_of(plan, other.manifest.rank) if file.name not in bad]
            formats = plan.inventory.quantization, self.plan.inventory.quantization
            areas = {
                module: areas
                for module, areas in form.areas(files).items()
                if formats[0].get(module) == formats[1].get(module)
            }
            found.append(Kept(Placed(other.directory, files, form), areas))
        return found

    def _work(self, entry: Entry | None, damaged: list[store.Problem], missing: bool) -> Work:
        """The work directory; files of a damaged entry that are intact are in it already. Where nothing is missing, a
        place for what this rank passes on."""
        bad = {problem.file for problem in damaged}
        files = slice_of(self.plan, self.rank) if missing else ()
        intact = {file.name: entry.directory / file.name for file in files if entry and file.name not in bad}
        directory = store.work_directory(self.place)
        identity = identity_of(model=self.origin.model, plan=self.plan.digest, rank=self.rank, intact=sorted(intact))
        if Work.identity(directory) not in (None, identity):
            shutil.rmtree(directory)
        return Work(directory, files, self.form, identity, intact)

    # -----------------------------------------------------------------------------------------------------------------
    # Together

    def _schedule(self, comm: Comm, work: Work, kept: list[Kept]) -> list[Block]:
        form = self.form
        areas = merged([one.areas for one in kept] + [work.spooled()])
        state = State(form.areas(work.open_files), work.done, areas, self.origin.local())
        said = comm.gather_objects(as_json(state))
        extents = {module: self.source.extent(module, form.columns(module)) for module in form.leaves}
        return schedule(extents, [from_json(one) for one in said], self.options.range_size)

    def _build(self, comm: Comm, watchdog: Watchdog, blocks: list[Block], work: Work, kept: list[Kept]) -> None:
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

    def _seal(self, work: Work, beside: Mapping[str, bytes], watchdog: Watchdog) -> Entry:
        """Make an entry of the finished work."""
        watchdog.progress("check sums", LOAD_LIMIT)
        for name, data in beside.items():
            (work.directory / name).write_bytes(data)
        store.seal(
            work.directory,
            model=self.origin.model,
            revision=self.origin.revision,
            config=self.origin.checkpoint.raw_config,
            plan=self.plan,
            rank=self.rank,
            progress=reporting(watchdog, "check sums"),
        )
        work.close()
        tidy(work.directory)
        store.publish(work.directory, self.place)
        return Entry(self.place, read_manifest(self.place))


def check_room(comm: Comm, work: Work) -> None:
    """Raises StoreError where the disk of a host is too small, before anything is fetched."""
    free = shutil.disk_usage(work.directory).free
    own = [socket.gethostname(), os.stat(work.directory).st_dev, work.missing_bytes() + ROOM, free]
    totals: dict[tuple[str, int], list[int]] = {}
    for host, device, need, free in comm.gather_objects(own):
        total = totals.setdefault((host, device), [0, free])
        total[0] += need
    for (host, _), (need, free) in totals.items():
        if need > free:
            raise StoreError(
                f"{host}: {decimal(need)} are to be kept at {work.directory} and {decimal(free)} are free; make room"
                " (m3dist store ls, m3dist store rm), or set M3DIST_STORE to a larger disk there"
            )


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


def reporting(watchdog: Watchdog, phase: str) -> Callable[[Progress], None]:
    """For store's functions, which read much."""
    return lambda progress: watchdog.progress(f"{phase}, at {progress}", STEP_LIMIT)


def say(line: str) -> None:
    print(f"m3dist: {line}", file=sys.stderr, flush=True)
