"""`m3dist store ls|verify|rm`: what is kept, whether it is intact, and removing it. No MLX."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from m3dist.checkpoint import local
from m3dist.errors import StoreError
from m3dist.fetch import store
from m3dist.fetch.command import refetch_command
from m3dist.fetch.manifest import Manifest
from m3dist.fetch.store import Broken, Entry, Problem, Unfinished
from m3dist.progress import LoadingBar

WIDTH = 120  # columns where there is no terminal
SHOWN = 3  # problems of an entry; verify tells all
COLOURS = {"intact": "green", "damaged": "bold red", "unfinished": "yellow"}


def main(args: argparse.Namespace) -> int:
    """Carry out one action; 1 where an entry is not intact, or nothing was removed."""
    return {"ls": ls, "verify": verify, "rm": rm}[args.action](args)


@dataclass(frozen=True)
class Line:
    """Something kept, in words."""

    found: Entry | Broken | Unfinished

    @property
    def manifest(self) -> Manifest | None:
        return self.found.manifest if isinstance(self.found, Entry) else None

    @property
    def model(self) -> str:
        """Without a manifest what the directory's name says of it."""
        if self.manifest:
            return self.manifest.model
        return self.found.directory.parent.parent.name.replace("--", "/", 1)

    @property
    def revision(self) -> str:
        """As short as it still tells one from another."""
        return self.manifest.revision.removeprefix("files-")[:8] if self.manifest else ""

    @property
    def format(self) -> str:
        """That of the experts."""
        return str(self.manifest.expert_format or self.manifest.dtype) if self.manifest else ""

    @property
    def plan(self) -> str:
        """Such as "rank 1 of 2", and whatever is not the usual way to cut."""
        if not self.manifest:
            return self.found.directory.name.partition(".")[0].replace("-", " ")
        m, words = self.manifest, [f"rank {self.manifest.rank} of {self.manifest.world}"]
        if len(set(m.weights)) > 1:
            words.append("weights " + ",".join(f"{weight:g}" for weight in m.weights))
        if m.experts != "columns":
            words.append(f"experts {m.experts}")
        if m.attention != "heads":
            words.append(f"attention {m.attention}")
        return ", ".join(words)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.plan}"

    @cached_property
    def problems(self) -> list[str]:
        """What a look at it shows."""
        if isinstance(self.found, Broken):
            return [self.found.why]
        return [str(problem) for problem in store.check(self.found)] if isinstance(self.found, Entry) else []

    @cached_property
    def state(self) -> str:
        """One of COLOURS."""
        return "unfinished" if isinstance(self.found, Unfinished) else "damaged" if self.problems else "intact"

    @cached_property
    def process(self) -> int | None:
        """What fetches or removes it now; 0 for one that has not said which."""
        return store.holder(store.place_of(self.found.directory))

    def remarks(self) -> list[str]:
        """What the table has no room for."""
        found = [*self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            found.append(f"and {len(self.problems) - SHOWN} more problems")
        if self.process is not None:
            found.append(f"process {self.process or '?'} is fetching or removing it")
        return [f"{self.name}: {remark}" for remark in found]

    def as_json(self) -> dict[str, Any]:
        """What the table says, in full."""
        facts: dict[str, Any] = {"model": self.model}
        if m := self.manifest:
            facts |= {"revision": m.revision, "format": self.format, "plan": m.plan, "rank": m.rank, "world": m.world}
            facts |= {"weights": m.weights, "experts": m.experts, "attention": m.attention, "created": m.created}
        facts |= {"bytes": self.found.nbytes, "state": self.state, "problems": self.problems}
        return facts | {"process": self.process, "directory": str(self.found.directory)}


# ---------------------------------------------------------------------------------------------------------------------
# Actions


def ls(args: argparse.Namespace) -> int:
    """Everything kept, and what a look at it shows."""
    lines = [Line(found) for found in (*store.entries(), *store.unfinished())]
    lines.sort(key=lambda line: (line.model, line.found.directory))
    if args.json:
        print(json.dumps({"root": str(store.root()), "kept": [line.as_json() for line in lines]}))
    elif not lines:
        print(f"Nothing is kept in {store.root()}.")
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        console.print(as_table(lines))
        for line in lines:
            for remark in line.remarks():
                console.print(Text(remark))
        total = decimal(sum(line.found.nbytes for line in lines))
        console.print(f"{total} in {store.root()}. Sizes and headers were looked at; m3dist store verify reads all.")
    return 1 if any(line.state == "damaged" for line in lines) else 0


def as_table(lines: Sequence[Line]) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for column in ("model", "revision", "format", "plan"):
        table.add_column(column, overflow="fold", max_width=18 if column == "plan" else None)
    for column in ("size", "state", "created"):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    for line in lines:
        told = [line.model, line.revision, line.format, line.plan, decimal(line.found.nbytes)]
        created = line.manifest.created[:10] if line.manifest else ""
        table.add_row(*map(Text, told), Text(line.state, style=COLOURS[line.state]), Text(created))
    return table


def verify(args: argparse.Namespace) -> int:
    """Read everything kept, or all of a model, and say which files are not what they were."""
    found = list(store.entries()) if args.model is None else named(args.model, list(store.entries()))
    if not found:
        print(f"Nothing is kept in {store.root()}.")
    damaged = 0
    for entry in found:
        line = Line(entry)
        if isinstance(entry, Broken):
            problems: Sequence[Problem | str] = line.problems
            remedy = f"m3dist store rm {shlex.quote(str(entry.directory))}"
        else:
            with LoadingBar(line.name, sys.stderr) as bar:
                problems = store.verify(entry, bar)
            remedy = refetch_command(entry.manifest)
        if problems:
            damaged += 1
            print(f"{line.name}: damaged, in {entry.directory}")
            for problem in problems:
                print(f"  {problem}")
            print(f"  => {remedy}")
        else:
            print(f"{line.name}: intact, {decimal(entry.nbytes)}")
    return 1 if damaged else 0


def rm(args: argparse.Namespace) -> int:
    """Remove what is kept of a model, or in a directory of the store, once that is confirmed."""
    kept: list[Entry | Broken | Unfinished] = [*(() if args.unfinished else store.entries()), *store.unfinished()]
    found = named(args.what, kept)
    for line in map(Line, found):
        if line.process is not None:
            raise store.in_use(store.place_of(line.found.directory), line.process)
        print(f"{line.name}, {line.state}, {decimal(line.found.nbytes)}, in {line.found.directory}")
    total = decimal(sum(line.nbytes for line in found))
    if not args.yes and not confirmed(f"Remove {'this' if len(found) == 1 else f'these {len(found)}'}, {total}?"):
        print("Nothing was removed.")
        return 1
    for each in found:
        store.remove(each)
    print(f"Removed {total}.")
    return 0


def confirmed(question: str) -> bool:
    """Whether who sits at the terminal says yes. Raises StoreError where nobody does."""
    if not sys.stdin.isatty():
        raise StoreError("nothing was removed: there is no terminal to ask on; --yes removes without asking")
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---------------------------------------------------------------------------------------------------------------------
# MODEL or PATH


def named(what: str, kept: Sequence[Any]) -> list[Any]:
    """Those of `kept` that `what` names: a model, owner/name@COMMIT, or a directory of the store and what is in it.

    Raises StoreError where it names none.
    """
    directory = local(what)
    models = {what} if directory is None else {what, os.path.abspath(directory), os.path.realpath(directory)}
    found = [each for each in kept if Line(each).model in models]
    model, at, revision = what.rpartition("@")
    if at and revision and not found:
        ours = [each for each in kept if Line(each).model == model and isinstance(each, Entry)]
        found = [each for each in ours if each.manifest.revision.startswith(revision)]
    if found:
        return found
    path, root = Path(os.path.realpath(os.path.expanduser(what))), Path(os.path.realpath(store.root()))
    if not os.path.lexists(os.path.expanduser(what)) and not what.startswith(("/", ".", "~")):
        raise StoreError(f"{what}: nothing of it is kept in {store.root()}; m3dist store ls shows what is")
    if root not in path.parents:
        raise StoreError(f"{what}: is not in the store, {store.root()}, and nothing of such a model is kept there")
    found = [each for each in kept if path in (real := Path(os.path.realpath(each.directory)), *real.parents)]
    if not found:
        raise StoreError(f"{what}: nothing is kept there; m3dist store ls --json gives the directories")
    return found
