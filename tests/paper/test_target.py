"""Files laid out before their bytes are there: what comes to lie in them is what the loader would hold."""

import json
import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import safetensors

from m3dist.checkpoint import Checkpoint, Folder, open_checkpoint, read_header
from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError
from m3dist.fetch import places
from m3dist.fetch.places import Format, Placed, Rows
from m3dist.fetch.schedule import Area
from m3dist.fetch.target import OutputFile, OutputTensor, Part, lay_out, numbered, slice_of
from m3dist.layout import Span
from m3dist.numbers import HOLDERS, fill
from m3dist.plan import Plan, make_plan
from m3dist.quantization import Recipe, requantised
from m3dist.reads import plan_reads
from m3dist.tensors import BYTES, Inventory, Quantization, TensorSpec, split_name
from m3dist.translation import Translation

WIDE = dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 256)
CONFIG = checkpoints.tiny_config(num_hidden_layers=2, num_local_experts=8, **WIDE)
TENSORS = checkpoints.random_tensors(CONFIG, seed=4)
ALL_SMALL = 30_000  # bytes of a file, so that there are several


def affine4(path: Path) -> Path:
    """Our own tensors, of any bytes: making real ones takes MLX."""
    inventory = requantised(Inventory(ModelConfig.from_dict(CONFIG), "BF16"), Recipe(Quantization("affine", 4, 32)))
    rng = np.random.default_rng(8)
    stored = {
        name: (spec.dtype, rng.integers(0, 256, spec.nbytes, np.uint8).view(HOLDERS[spec.dtype]).reshape(spec.shape))
        for name, spec in inventory.specs().items()
    }
    return checkpoints.write(path, CONFIG, stored, shards=2)


WRITERS = {
    "BF16": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=3),
    "MXFP8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2),
    "FP8 blocks": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, shards=2),
    "affine 4": affine4,
}
CUTS = [
    *((world, "columns", "heads") for world in (1, 2, 3, 4, 8)),
    ((3, 1, 2), "columns", "heads"),
    ((1, 7), "whole", "heads"),
    (3, "whole", "heads"),
    (8, "whole", "replicated"),
    ((2, 1), "columns", "replicated"),
]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr("m3dist.fetch.target.LARGEST_FILE", ALL_SMALL)
    monkeypatch.setattr(places, "OPENED", 2)


@pytest.fixture(scope="module", params=WRITERS)
def opened(request, tmp_path_factory) -> tuple[Checkpoint, Translation]:
    checkpoint = open_checkpoint(WRITERS[request.param](tmp_path_factory.mktemp("checkpoint")))
    return checkpoint, checkpoint.translate()


def held(checkpoint: Checkpoint, translation: Translation, plan: Plan, rank: int) -> dict[str, np.ndarray]:
    """Tensor -> [rows, columns], by the loader's reads."""
    found = {}
    for name, spec in plan.held_specs(rank).items():
        found[name] = np.empty((math.prod(spec.shape[:-1]), spec.shape[-1]), HOLDERS[spec.dtype])
    with Folder(checkpoint.directory) as files:
        for read in plan_reads(checkpoint.stored, translation, plan, rank):
            fill(read, found[read.tensor][read.at : read.at + read.rows], plan.specs[read.tensor].dtype, files)
    return found


@pytest.fixture(scope="module")
def whole(opened) -> dict[str, np.ndarray]:
    """Every tensor, as bytes [rows, bytes of a row]."""
    checkpoint, translation = opened
    return {n: x.view(np.uint8) for n, x in held(*opened, make_plan(translation.inventory, 1), 0).items()}


def form_of(plan: Plan) -> Format:
    return Format(plan.inventory.config, plan.specs)


def prepared(directory: Path, files: tuple[OutputFile, ...], plan: Plan) -> Placed:
    directory.mkdir(exist_ok=True)
    for file in files:
        (directory / file.name).write_bytes(file.header)
        os.truncate(directory / file.name, file.nbytes)
    return Placed(directory, files, form_of(plan), os.O_RDWR)


def blocks(rows: int, seed: int) -> Iterator[Span]:
    """All rows, in spans of odd sizes, in any order."""
    rng = np.random.default_rng(seed)
    ends = sorted({0, rows, *rng.integers(0, rows + 1, 5).tolist()})
    spans = list(pairwise(ends))
    rng.shuffle(spans)
    return ((int(a), int(b)) for a, b in spans)


def leaves_of(form: Format, whole: dict[str, np.ndarray], module: str, rows: Span, columns: Span) -> Rows:
    return {t: whole[t][rows[0] : rows[1], slice(*form.bytes_of(t, columns))] for t in form.leaves[module]}


def read_back(directory: Path, files: tuple[OutputFile, ...]) -> dict[str, tuple[TensorSpec, bytes]]:
    """Every tensor, by the safetensors package, which checks header, sizes and that there are no holes."""
    found = {}
    for file in files:
        data = (directory / file.name).read_bytes()
        assert len(data) == file.nbytes
        for name, tensor in safetensors.deserialize(data):
            assert name not in found
            found[name] = (TensorSpec(tuple(tensor["shape"]), tensor["dtype"]), bytes(tensor["data"]))
    return found


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_rank_s_files_hold_what_the_loader_does(opened, whole, cut, tmp_path):
    """From whole rows in blocks, which are given to every rank."""
    checkpoint, translation = opened
    plan = make_plan(translation.inventory, *cut)
    form = form_of(plan)
    for rank in range(plan.world):
        files = slice_of(plan, rank)
        placed = prepared(tmp_path / str(rank), files, plan)
        for module in form.leaves:
            columns = (0, form.columns(module))
            for rows in blocks(len(whole[form.leaves[module][0]]), seed=rank):
                placed.write(leaves_of(form, whole, module, rows, columns), rows, columns)
        placed.close()
        wanted = held(checkpoint, translation, plan, rank)
        found = read_back(tmp_path / str(rank), files)
        headers = [read_header(tmp_path / str(rank) / file.name).values() for file in files]
        stored = [t.name for header in headers for t in sorted(header, key=lambda t: t.offset)]
        assert stored == list(plan.specs) and len(files) > 1  # in the order of the forward
        assert {name: spec for name, (spec, _) in found.items()} == plan.held_specs(rank)
        assert all(data == wanted[name].tobytes() for name, (_, data) in found.items())


def test_columns_of_several_givers(opened, whole, tmp_path):
    """After a change of plan rows come in pieces, each of some columns; what is not wanted is left out."""
    _, translation = opened
    before, after = make_plan(translation.inventory, 3), make_plan(translation.inventory, (1, 2))
    form = form_of(after)
    for rank in range(2):
        placed = prepared(tmp_path / str(rank), slice_of(after, rank), after)
        for giver in range(3):
            for module, areas in form.areas(slice_of(before, giver)).items():
                for area in areas:
                    placed.write(leaves_of(form, whole, module, area.rows, area.columns), area.rows, area.columns)
        placed.close()
        wanted = held(*opened, after, rank)
        found = read_back(tmp_path / str(rank), slice_of(after, rank))
        assert all(data == wanted[name].tobytes() for name, (_, data) in found.items())


def test_reading_what_is_kept(opened, whole, tmp_path):
    """Any rows of what a rank holds, all of its columns or some."""
    _, translation = opened
    plan = make_plan(translation.inventory, 2)
    form, files = form_of(plan), slice_of(plan, 1)
    placed = prepared(tmp_path / "1", files, plan)
    areas = form.areas(files)
    for module, some in areas.items():
        for area in some:
            placed.write(leaves_of(form, whole, module, area.rows, area.columns), area.rows, area.columns)
    group = 32  # columns that stay together in every format here
    for module, some in areas.items():
        for area in some:
            middle = sum(area.rows) // 2, area.rows[1]
            last = max(area.columns[0], area.columns[1] - group), area.columns[1]
            for rows, columns in ((area.rows, area.columns), (middle, area.columns), (middle, last)):
                found = placed.read(module, rows, columns)
                wanted = leaves_of(form, whole, module, rows, columns)
                assert found.keys() == wanted.keys()
                assert all((found[tensor] == wanted[tensor]).all() for tensor in wanted)


def test_areas_cover_the_model(opened):
    """Each value is some rank's, and just one's but for what is replicated, and keys and values of shared heads."""
    _, translation = opened
    for cut in CUTS[2::2]:
        plan = make_plan(translation.inventory, *cut)
        form = form_of(plan)
        counts = {name: np.zeros((math.prod(m.shape[:-1]), m.shape[-1]), int) for name, m in form.modules.items()}
        for rank in range(plan.world):
            for module, areas in form.areas(slice_of(plan, rank)).items():
                for area in areas:
                    counts[module][slice(*area.rows), slice(*area.columns)] += 1
        for module, count in counts.items():
            cuts = [plan.slices(rank)[form.leaves[module][0]] for rank in range(plan.world)]
            if cuts[0].axis is None:
                assert (count == plan.world).all()
            else:
                assert (count >= 1).all() and ((count == 1).all() or "k_proj" in module or "v_proj" in module
                                               or "index_q_proj" in module)  # fmt: skip


def test_bytes_of_an_area(opened, whole):
    """`nbytes` is what `join` gives, and `split` undoes it."""
    _, translation = opened
    form = form_of(make_plan(translation.inventory, 1))
    for module in form.leaves:
        rows, columns = (0, 1 + len(whole[form.leaves[module][0]]) // 2), (0, form.columns(module))
        for span in (columns, (columns[1] - min(32, columns[1]), columns[1])):
            leaves = leaves_of(form, whole, module, rows, span)
            data = form.join(module, leaves)
            assert len(data) == form.nbytes(module, rows, span)
            again = form.split(module, rows, span, data)
            assert list(again) == form.leaves[module]
            assert all((again[tensor] == leaves[tensor]).all() for tensor in leaves)


def test_few_files_are_open_at_a_time(opened, whole, tmp_path):
    """macOS allows a process 256, and a change of plan reads several entries of hundreds each."""
    plan = make_plan(opened[1].inventory, 1)
    files = slice_of(plan, 0)
    assert len(files) > places.OPENED
    placed = prepared(tmp_path / "0", files, plan)
    before = len(os.listdir("/dev/fd"))
    for module, areas in placed.form.areas(files).items():
        for area in areas:
            placed.read(module, area.rows, area.columns)
            assert len(os.listdir("/dev/fd")) - before <= places.OPENED
    placed.close()
    assert len(os.listdir("/dev/fd")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def tensor(name: str, rows: int, dtype: str = "U8") -> OutputTensor:
    """One whose rows have 10 elements."""
    return OutputTensor(name, TensorSpec((rows, 10), dtype), (Part(name, (0, rows)),))


def test_files_are_filled_in_order():
    """A module's leaves are never apart, and one that is larger than a file has its own."""
    tensors = [tensor(name, rows) for name, rows in (("a.weight", 4), ("a.scales", 1), ("b.weight", 5), ("c.weight", 1),
                                                     ("d.weight", 12), ("d.biases", 1), ("e.weight", 1))]  # fmt: skip
    files = lay_out(tensors, 100, numbered)
    named = [[t.name for t in file.tensors] for file in files]
    assert named == [["a.weight", "a.scales", "b.weight"], ["c.weight"], ["d.weight", "d.biases"], ["e.weight"]]
    assert [file.name for file in files] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert lay_out([], 100, numbered) == ()


def test_header():
    """As the format says: N, N bytes of JSON, padded so that tensors begin at a multiple of 8; none twice."""
    (file,) = lay_out([tensor("a.weight", 3), tensor("b", 2, "F32")], 1000, numbered)
    length = int.from_bytes(file.header[:8], "little")
    said = json.loads(file.header[8:])
    assert len(file.header) == 8 + length and len(file.header) % 8 == 0 and file.nbytes == len(file.header) + 30 + 80
    assert said == {
        "__metadata__": {"format": "mlx"},
        "a.weight": {"dtype": "U8", "shape": [3, 10], "data_offsets": [0, 30]},
        "b": {"dtype": "F32", "shape": [2, 10], "data_offsets": [30, 110]},
    }
    found = [(place.offset - len(file.header), place.row_bytes) for place in file.places()]
    assert found == [(0, 10), (30, 40)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_published_model(published, world, monkeypatch):
    """427 billion parameters: every rank's files are at most a GiB, or one module, and hold its bytes and headers."""
    monkeypatch.undo()
    plan = make_plan(requantised(Inventory(published, "BF16"), Recipe(Quantization("affine", 4, 64))), world)
    for rank in {0, world - 1}:
        files = slice_of(plan, rank)
        assert sum(f.nbytes - len(f.header) for f in files) == plan.bytes_held(rank)
        assert sum(len(f.header) for f in files) < 1e-4 * plan.bytes_held(rank)
        for file in files:
            one = len({split_name(t.name)[0] for t in file.tensors}) == 1
            assert one or file.nbytes <= (1 << 30) + len(file.header)
            assert len(file.tensors) < 2000 and file.nbytes == len(file.header) + sum(
                math.prod(t.spec.shape) * BYTES[t.spec.dtype] for t in file.tensors
            )


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.fixture
def small(tmp_path) -> tuple[Plan, tuple[OutputFile, ...], Placed]:
    plan = make_plan(Inventory(ModelConfig.from_dict(CONFIG), "BF16"), 2)
    files = slice_of(plan, 0)
    return plan, files, prepared(tmp_path / "0", files, plan)


HEAD = "language_model.lm_head"


def test_a_file_that_ends_early(small):
    _, files, placed = small
    path = placed.directory / files[-1].name
    os.truncate(path, files[-1].nbytes - 1)
    with pytest.raises(CheckpointError, match=rf"^{path}: {HEAD}.weight: ends at byte {files[-1].nbytes - 1}$"):
        placed.read(HEAD, (0, 80), (0, 64))


def test_a_file_that_is_gone(small):
    _, files, placed = small
    (placed.directory / files[-1].name).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[-1].name}: {HEAD}.weight: No such file"):
        placed.read(HEAD, (0, 80), (0, 64))


def test_a_full_disk(small):
    _, files, placed = small
    path = placed.directory / files[-1].name
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=rf"^{path}: {HEAD}.weight: No space left on device$"):
        placed.write({f"{HEAD}.weight": np.zeros((80, 128), np.uint8)}, (0, 80), (0, 64))


def test_rows_of_others_are_not_written(small):
    """Rank 1's rows, and a tensor that has no place here."""
    plan, files, placed = small
    before = [(placed.directory / file.name).read_bytes() for file in files]
    placed.write({f"{HEAD}.weight": np.ones((80, 128), np.uint8)}, (80, 160), (0, 64))
    assert [(placed.directory / file.name).read_bytes() for file in files] == before
    assert Area((0, 80), (0, 64)) in form_of(plan).areas(files)[HEAD]
