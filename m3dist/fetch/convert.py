"""`m3dist convert`: a checkpoint, from a directory or the hub, as one that mlx-lm reads too; by one process."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.filesize import decimal

from m3dist.checkpoint import CONFIG, INDEX
from m3dist.cluster.environment import Launch
from m3dist.comm import Comm
from m3dist.errors import StoreError
from m3dist.fetch import mlx_layout
from m3dist.fetch.build import Build, Source
from m3dist.fetch.display import FetchDisplay, Tally
from m3dist.fetch.origin import opened, texts
from m3dist.fetch.places import Format
from m3dist.fetch.program import check_room, say, target_of
from m3dist.fetch.schedule import State, schedule
from m3dist.fetch.target import lay_out
from m3dist.fetch.work import SPOOL, Work, disk_errors, identity_of, tidy
from m3dist.options import ConvertOptions
from m3dist.rank import STEP_LIMIT, run_rank
from m3dist.watchdog import Watchdog


def _directory(out: Path) -> Path:
    """Where a conversion to `out` is written. Raises StoreError where something else is there."""
    partial = out.with_name(f"{out.name}.partial")
    with disk_errors(out):
        # Where `out` has a journal it is whole, but the process was killed before it had tidied up.
        directory = out if os.path.lexists(out) else partial
        names = os.listdir(directory) if os.path.lexists(directory) else []
        begun = directory == partial and (not names or SPOOL in names)  # the first thing that is made
        if not begun and Work.identity(directory) is None:
            raise StoreError(f"{directory} is there already; remove it, or name another directory")
    return directory


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep another conversion away from a directory, also when it is renamed. Raises StoreError where there is one."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreError(f"{directory}: another conversion writes there") from None
    except OSError:
        pass  # network volumes may have no locks for directories
    try:
        yield
    finally:
        os.close(lock)


def main(options: ConvertOptions) -> int:
    return run_rank(partial(convert, options), Launch("single"), None)


def convert(options: ConvertOptions, watchdog: Watchdog) -> int:
    """Write `options.out`, or go on with what an interrupted conversion left beside it. Returns 0.

    Raises CheckpointError for the source, PlanError for the formats, StoreError for the disk and for an `out` that is
    there already.
    """
    out = Path(os.path.abspath(os.path.expanduser(options.out)))
    directory = _directory(out)
    comm = Comm()
    with opened(options.model, comm) as origin:
        translation = origin.checkpoint.translate()
        inventory = target_of(options, translation.inventory)
        form = Format(inventory.config, inventory.specs())
        files = lay_out(mlx_layout.output_tensors(inventory), mlx_layout.LARGEST_FILE, mlx_layout.file_names)
        formats = {module: str(form) for module, form in inventory.quantization.items() if form}
        source = Source(origin.files, origin.checkpoint.stored, translation)
        with _locked(directory):
            if _directory(out) != directory:
                raise StoreError(f"{out}: another conversion has just ended")
            identity = identity_of(model=origin.model, revision=origin.revision, formats=formats)
            work = Work(directory, files, form, identity)
            check_room(comm, work)
            described = {
                CONFIG: mlx_layout.config(origin.checkpoint.raw_config, inventory),
                INDEX: mlx_layout.index(files),
            }
            beside = texts(origin, comm) | {name: json.dumps(x, indent=4).encode() for name, x in described.items()}
            state = State(form.areas(files), work.done, {}, origin.local())
            extents = {module: source.extent(module, form.columns(module)) for module in form.leaves}
            blocks = schedule(extents, [state], options.range_size)
            build = Build(comm, blocks, source, inventory, work, (), options.connections)
            with FetchDisplay(f"converting {origin.model}", 1) as display:

                def report(tallies: list[Tally]) -> None:
                    watchdog.progress(f"conversion, at {tallies[0].done} of {tallies[0].total} bytes", STEP_LIMIT)
                    display(tallies)

                build.run(report)
            work.put(beside)
            watchdog.progress("the end of the conversion", 10 * STEP_LIMIT)
            work.sync()
            work.close()
            origin.forget()
            with disk_errors(out):
                os.rename(directory, out)  # with the journal: if it is killed now, the next one knows it
                tidy(out)
    say(f"{out}: {decimal(sum(file.nbytes for file in files))}")
    return 0
