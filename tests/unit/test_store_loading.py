"""Loading a store's entry: the slices of the whole bit for bit, read from the files' start to their end."""

import os
import shutil
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from stores import MODEL, REVISION, keep

from m3dist.checkpoint import open_checkpoint
from m3dist.comm import Comm
from m3dist.errors import CheckpointError, CommunicationError, StoreError
from m3dist.loader import load, load_entry, load_entry_weights, load_weights, open_entry, plan_of
from m3dist.model.text import DTYPES
from m3dist.plan import make_plan
from m3dist.reads import sequential_reads

CONFIG = checkpoints.tiny_config(
    num_hidden_layers=3, intermediate_size=256, shared_intermediate_size=256, dense_intermediate_size=256
)
TENSORS = checkpoints.random_tensors(CONFIG, seed=1, vision=True, mtp=True)
WRITERS = {
    "published": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=3),
    "mxfp8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2),
    "affine": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, "b", "affine", group_size=32),
    "fp8 blocks": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, shards=2),
}
CUTS = [(1, "columns", "heads"), (3, "columns", "heads"), ([3, 1], "whole", "heads"), (2, "columns", "replicated")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Name of a writer -> the directory of the checkpoint it wrote; each is written once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name](root / name)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.dtype.size]))


def same(arrays: dict[str, mx.array], others: dict[str, mx.array]) -> bool:
    return arrays.keys() == others.keys() and all(
        x.dtype == others[name].dtype and np.array_equal(bits(x), bits(others[name])) for name, x in arrays.items()
    )


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("name", WRITERS)
def test_an_entry_is_a_slice_of_the_whole(written, name, dtype):
    """Every rank's, of every cut; floats are those of the checkpoint's own dtype, cast as mx.astype casts them."""
    checkpoint = open_checkpoint(written(name))
    for weights, experts, attention in CUTS:
        for rank in range(weights if isinstance(weights, int) else len(weights)):
            entry = keep(written(name), rank, weights, experts, attention)
            own, plan = entry.manifest.make_plan(), plan_of(entry, dtype)
            kinds = {tensor: DTYPES[spec.dtype] for tensor, spec in plan.specs.items()}
            wanted = load_weights(checkpoint, checkpoint.translate(), own, rank)
            wanted = {
                tensor: x if x.dtype == kinds[tensor] else x.astype(kinds[tensor]) for tensor, x in wanted.items()
            }
            assert same(load_entry_weights(entry, plan), wanted)


def test_the_cut_is_the_entry_s(written):
    """With another dtype to compute in, the ranks' shares could be others: bytes are what they are evened out by."""
    entry = keep(written("mxfp8"), 1, 3)
    own, computed = entry.manifest.make_plan(), plan_of(entry, "float32")
    assert plan_of(entry).digest == own.digest == entry.manifest.plan != computed.digest
    assert computed.shares == own.shares != make_plan(computed.inventory, 3).shares


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_read_from_their_start_to_their_end(written, name, monkeypatch):
    """Each byte of each tensor once, in order."""
    monkeypatch.setattr("m3dist.fetch.target.LARGEST_FILE", 50_000)
    monkeypatch.setattr("m3dist.reads.LARGEST", 1000)
    entry = keep(written(name), 1, 2)
    stored = open_entry(entry)
    reads = list(sequential_reads(stored))
    files = {kept.name: kept.nbytes for kept in entry.manifest.files if kept.name.endswith(".safetensors")}
    assert len(files) > 3 and len(reads) > 2 * len(stored)
    assert list(dict.fromkeys(read.source.file.name for read in reads)) == sorted(files)
    for file, size in files.items():
        of_this = [read for read in reads if read.source.file.name == file]
        ends = [read.offset + read.nbytes for read in of_this]
        assert [read.offset for read in of_this[1:]] == ends[:-1] and ends[-1] == size
    assert sum(read.nbytes for read in reads) == entry.manifest.make_plan().bytes_held(1)
    assert [tensor.name for tensor in stored] == list(entry.manifest.make_plan().specs)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_load_entry_is_load(written, dtype):
    """The same model as from the directory."""
    directory = written("mxfp8")
    model = load_entry(keep(directory), Comm(), dtype=dtype)
    assert same(dict(model.held_arrays()), dict(load(directory, Comm(), dtype=dtype).held_arrays()))


def test_progress(written):
    said = []
    entry = keep(written("published"), 1, 2)
    load_entry_weights(entry, plan_of(entry), said.append)
    assert said[-1].done == said[-1].total == entry.manifest.make_plan().bytes_held(1)


# ---------------------------------------------------------------------------------------------------------------------
# Failures

FILE = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("how", ["truncated", "missing", "of another rank", "foreign"])
def test_a_damaged_entry(written, how):
    """The error names the file and the command that fetches it again."""
    entry, other = (keep(written("published"), rank, [3, 1], "whole") for rank in (1, 0))
    file = entry.directory / FILE
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "missing":
        file.unlink()
    elif how == "of another rank":
        shutil.copy(other.directory / FILE, file)
    else:
        file = entry.directory / "model-00002-of-00002.safetensors"
        file.write_bytes(b"")
    command = f"m3dist fetch {MODEL}@{REVISION} --world 2 --rank 1 --weights 3,1 --experts whole"
    with pytest.raises(StoreError, match=f"^{file}: .*`{command}`"):
        load_entry_weights(entry, plan_of(entry))


def test_a_file_cut_short_while_it_is_read(written, monkeypatch):
    """After its header was read."""
    entry = keep(written("published"))
    stored = open_entry(entry)
    os.truncate(entry.directory / FILE, 100_000)
    monkeypatch.setattr("m3dist.loader.open_entry", lambda entry: stored)
    with pytest.raises(CheckpointError, match=rf"language_model\..*: .*/{FILE}: the file now ends at byte 100000"):
        load_entry_weights(entry, plan_of(entry))


class Peer(Comm):
    """Rank 0 of two, whose peer has planned with these facts."""

    def __init__(self, facts: dict[str, str]):
        super().__init__()
        self.world, self.facts = 2, facts

    def gather_objects(self, value):
        return [value, self.facts if isinstance(value, dict) else None]

    def all_gather(self, x):
        return mx.stack([x, x + 1])


def test_ranks_with_entries_of_different_revisions_or_plans(written):
    entry = keep(written("published"), 0, 2)
    plan = plan_of(entry, "float32").digest
    with pytest.raises(CommunicationError, match=f"differ in revision .*{REVISION}, rank 1: none"):
        load_entry(entry, Peer({"plan": plan, "revision": "none"}), dtype="float32")
    with pytest.raises(CommunicationError, match=f"differ in plan .*{plan}, rank 1: {entry.manifest.plan}"):
        load_entry(entry, Peer({"plan": entry.manifest.plan, "revision": REVISION}), dtype="float32")


def test_an_entry_of_another_rank(written):
    entry = keep(written("published"), 1, 2)
    with pytest.raises(StoreError, match="rank-1-of-2 is for rank 1 of 2, not 0 of 1"):
        load_entry(entry, Comm())
