"""Blocks out of a checkpoint, and out of what is kept for others: the rows of the whole, bit for bit."""

from itertools import pairwise

import checkpoints
import mlx.core as mx
import numpy as np
import pytest

from m3dist.checkpoint import Folder, open_checkpoint
from m3dist.comm import Comm
from m3dist.fetch.build import Build, Source
from m3dist.fetch.places import Format, Rows
from m3dist.fetch.schedule import Block
from m3dist.fetch.target import slice_of
from m3dist.fetch.work import Work
from m3dist.layout import Span
from m3dist.loader import load_weights
from m3dist.plan import make_plan
from m3dist.tensors import split_name

WIDE = {"intermediate_size": 160, "shared_intermediate_size": 160}
CONFIG = checkpoints.tiny_config(num_hidden_layers=2, num_local_experts=4, **WIDE)
TENSORS = checkpoints.random_tensors(CONFIG, seed=6)
WRITERS = {
    "BF16": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=3),
    "F16": lambda path: checkpoints.published(path, CONFIG, TENSORS, dtype="F16"),
    "MXFP8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2),
    "FP8 blocks": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, shards=2),
    "stacked": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, "a", bits=4, group_size=32, shards=2),
    "packed": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, "b", mode=None),
    "text only": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, "d", mode="mxfp4", shards=2),
}


def bits(array: mx.array) -> np.ndarray:
    """Of MLX's array: bytes [rows, bytes of a row]."""
    data = np.array(array.view(mx.uint8))
    return data.reshape(-1, data.shape[-1])


@pytest.mark.parametrize("name", WRITERS)
def test_blocks_of_a_source(tmp_path, name):
    """Of any size, within the pieces that a module comes in; together they are all of its rows."""
    checkpoint = open_checkpoint(WRITERS[name](tmp_path))
    translation = checkpoint.translate()
    plan = make_plan(translation.inventory, 1)
    whole = {tensor: bits(array) for tensor, array in load_weights(checkpoint, translation, plan, 0).items()}
    form, files = Format(plan.inventory.config, plan.specs), set()
    with Folder(tmp_path) as folder:
        source = Source(folder, checkpoint.stored, translation)
        for module, leaves in form.leaves.items():
            extent = source.extent(module, form.columns(module))
            ends = [end for piece in extent.pieces for end in piece.rows]
            assert ends[0] == 0 and ends[1:-1:2] == ends[2::2] and ends[-1] == len(whole[leaves[0]])
            for piece in extent.pieces:
                files |= piece.files
                first, last = piece.rows
                for rows in pairwise(sorted({first, min(first + 5, last), (first + last) // 2, last})):
                    found = source.fetch(module, rows)
                    assert list(found) == [split_name(leaf)[1] for leaf in leaves]
                    for leaf, array in zip(leaves, found.values()):
                        assert (array.view(np.uint8) == whole[leaf][rows[0] : rows[1]]).all()
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept for others

DOWN = "language_model.model.layers.1.block_sparse_moe.switch_mlp.down_proj"


def test_some_columns_of_a_block_kept_for_others(tmp_path):
    """The others have theirs already: they were killed later."""
    checkpoint = open_checkpoint(WRITERS["stacked"](tmp_path / "source"))
    translation = checkpoint.translate()
    plan = make_plan(translation.inventory, 2)
    form = Format(plan.inventory.config, plan.specs)
    files = [file for file in slice_of(plan, 1) if any(DOWN in tensor.name for tensor in file.tensors)]
    work = Work(tmp_path / "work", files, form, "this")
    (area,) = form.areas(files)[DOWN]
    rows, columns = (10, 30), area.columns
    kept = whole_rows(form, DOWN, rows)
    work.spool(DOWN, rows, kept)
    block = Block(DOWN, rows, ((0, columns),), ((0, columns),), False)
    with Folder(tmp_path / "source") as folder:
        source, tallies = Source(folder, checkpoint.stored, translation), []
        Build(Comm(), [block], source, plan.inventory, work, (), 2).run(tallies.append)
    assert tallies[-1][0].placed == tallies[-1][0].wanted == 1 and work.done == {}
    for leaf, data in work.placed.read(DOWN, rows, columns).items():
        assert (data == kept[leaf][:, slice(*form.bytes_of(leaf, columns))]).all()
    assert Work(tmp_path / "work", files, form, "this").done == {DOWN: [rows]}
    assert 0 < columns[0] < columns[1] == form.columns(DOWN)


def whole_rows(form: Format, module: str, rows: Span) -> Rows:
    """Of any bytes."""
    rng = np.random.default_rng(1)
    widths = {leaf: form.bytes_of(leaf, (0, form.columns(module)))[1] for leaf in form.leaves[module]}
    return {leaf: rng.integers(0, 256, (rows[1] - rows[0], width), np.uint8) for leaf, width in widths.items()}
