"""Carrying out a schedule, in one process."""

import os
from pathlib import Path

import checkpoints
import numpy as np

from m3dist.checkpoint import Folder, open_files
from m3dist.comm import Comm
from m3dist.fetch.build import Build, Source
from m3dist.fetch.places import Format
from m3dist.fetch.schedule import State, schedule
from m3dist.fetch.target import slice_of
from m3dist.fetch.work import SPOOL, Work
from m3dist.plan import make_plan

CONFIG = checkpoints.tiny_config(num_hidden_layers=2)
MODULE, ROWS = "language_model.lm_head", (16, 48)


def built(directory: Path, spooled: bool) -> tuple[Build, dict[str, bytes]]:
    """All of a checkpoint, `directory`/source, and what it took; with some rows spooled before."""
    with Folder(directory / "source") as files:
        checkpoint = open_files(files)
        translation = checkpoint.translate()
        plan = make_plan(translation.inventory, 1)
        form, target = Format(translation.inventory.config, plan.specs), slice_of(plan, 0)
        source = Source(files, checkpoint.stored, translation)
        folder = directory / f"spooled {spooled}"
        work = Work(folder, target, form, "it")
        if spooled:
            work.spool(MODULE, ROWS, {f"{MODULE}.weight": source.fetch(MODULE, ROWS)["weight"].view(np.uint8)})
        state = State(form.areas(target), work.done, work.spooled())
        extents = {module: source.extent(module, form.columns(module)) for module in form.leaves}
        build = Build(Comm(), schedule(extents, [state], 1 << 12), source, translation.inventory, work, (), 2)
        build.run(lambda tallies: None)
        work.close()
    assert not os.listdir(folder / SPOOL)
    return build, {file.name: (folder / file.name).read_bytes() for file in target}


def test_what_a_rank_had_for_others_and_needs_itself(tmp_path):
    """It was killed when they had taken it and it had not: it is copied, not got again."""
    checkpoints.published(tmp_path / "source", CONFIG, checkpoints.random_tensors(CONFIG))
    (plain, expected), (build, found) = (built(tmp_path, spooled) for spooled in (False, True))
    assert found == expected
    assert plain.total - build.total == (ROWS[1] - ROWS[0]) * build.form.columns(MODULE) * 2
