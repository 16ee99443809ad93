"""Entries of the store, made from a checkpoint on this disk by the loader: what a fetch has to give, bit for bit."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from m3dist.checkpoint import open_checkpoint
from m3dist.fetch.store import Entry, place, publish, seal, work_directory
from m3dist.fetch.target import slice_of
from m3dist.loader import load_weights
from m3dist.plan import make_plan

MODEL, REVISION = "owner/name", "0123456789abcdef0123456789abcdef01234567"


def keep(
    directory: Path,
    rank: int = 0,
    weights: int | Sequence[float] = 1,
    experts: str = "columns",
    attention: str = "heads",
    revision: str = REVISION,
) -> Entry:
    """Put `rank`'s part of a checkpoint into the store that M3DIST_STORE names, as of the hub's MODEL."""
    checkpoint = open_checkpoint(directory)
    translation = checkpoint.translate()
    plan = make_plan(translation.inventory, weights, experts, attention)
    arrays = load_weights(checkpoint, translation, plan, rank)
    entry = place(MODEL, revision, plan.digest, rank, plan.world)
    work = work_directory(entry)
    work.mkdir(parents=True)
    for path in directory.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, work)
    for file in slice_of(plan, rank):
        with open(work / file.name, "wb") as out:
            out.write(file.header)
            for tensor in file.tensors:
                out.write(memoryview(arrays.pop(tensor.name)).cast("B"))
    config = checkpoint.raw_config
    manifest = seal(work, model=MODEL, revision=revision, config=config, plan=plan, rank=rank)
    publish(work, entry)
    return Entry(entry, manifest)
