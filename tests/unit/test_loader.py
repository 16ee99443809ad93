"""The loader: every rank's slices equal slices of the whole, bit for bit, and only their bytes are read."""

import io
import math
import os
import re
import resource
import shutil
import sys
import threading
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest

from m3dist import loader
from m3dist.checkpoint import Checkpoint, Folder, StoredTensor, open_checkpoint
from m3dist.comm import Comm
from m3dist.errors import CheckpointError, CommunicationError, PlanError
from m3dist.layout import COLUMNS
from m3dist.loader import load, load_weights
from m3dist.model import Model, ModelArgs
from m3dist.numbers import cast_floats, fill
from m3dist.plan import make_plan
from m3dist.progress import LoadingBar, Progress
from m3dist.reads import LARGEST, Read, plan_reads
from m3dist.tensors import BYTES, FLOATS

# Eight ranks get one group of 32 columns each, or one expert; three and five get unequal shares.
CONFIG = checkpoints.tiny_config(
    num_hidden_layers=3, intermediate_size=256, shared_intermediate_size=256, dense_intermediate_size=256
)
TENSORS = checkpoints.random_tensors(CONFIG, seed=1, vision=True, mtp=True)
KINDS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
WRITERS = {
    "published": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=3),
    "published f16": lambda path: checkpoints.published(path, CONFIG, TENSORS, dtype="F16"),
    "published f32": lambda path: checkpoints.published(path, CONFIG, TENSORS, dtype="F32"),
    "mxfp8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2),
    "fp8 blocks": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, shards=2),
    **{
        f"{layout} {mode}": lambda path, layout=layout, mode=mode: checkpoints.mlx_layout(
            path, CONFIG, TENSORS, layout, mode, group_size=32 if mode == "affine" else None
        )
        for layout, mode in [
            *((layout, None) for layout in "abcde"),
            *((layout, "affine") for layout in "abcde"),
            *zip("abc", ("mxfp4", "nvfp4", "mxfp8"), strict=True),
        ]
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Name of a writer -> the checkpoint it wrote, opened; each is written once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = open_checkpoint(WRITERS[name](root / name))
        return made[name]

    return get


def load_rank(checkpoint, weights=1, rank=0, experts="columns", dtype=None, progress=None):
    translation = checkpoint.translate(dtype)
    plan = make_plan(translation.inventory, weights, experts)
    return plan, load_weights(checkpoint, translation, plan, rank, progress)


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.dtype.size]))


def sliced(x: np.ndarray, part) -> np.ndarray:
    """A slice, the plainest way."""
    if part.axis is None:
        return x
    return np.concatenate([np.take(x, range(*span), axis=part.axis) for span in part.spans], axis=part.axis)


def packed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 arrays under the published names -> our modules, put together plainly."""
    ours = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if match := re.fullmatch(r"(.+)\.experts\.0\.w1", module):
            experts = range(CONFIG["text_config"]["num_local_experts"])
            w1, w2, w3 = (
                np.stack([tensors[f"{match[1]}.experts.{e}.w{n}.weight"] for e in experts]) for n in (1, 2, 3)
            )
            ours[match[1] + ".switch_mlp.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
            ours[match[1] + ".switch_mlp.down_proj"] = w2
        elif module.endswith(".gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            ours[module.replace("gate_proj", "gate_up_proj")] = np.concatenate([value, up])
        elif not re.search(r"\.up_proj$|\.experts\.", module):
            ours[module] = value
    return ours


@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_is_what_was_written(written, name):
    """One rank's arrays stand for the numbers in the files, as the writers' own reader understands them."""
    checkpoint = written(name)
    plan, arrays = load_rank(checkpoint)
    wanted = packed(checkpoints.dequantised(checkpoint.directory))
    assert arrays.keys() == plan.specs.keys()
    for module, quantization in plan.inventory.quantization.items():
        x = arrays.get(f"{module}.weight", arrays.get(module))
        if quantization:
            parts = [arrays[f"{module}.{leaf}"] for leaf in ("scales", "biases") if f"{module}.{leaf}" in arrays]
            parts = [part.astype(mx.float32) if part.dtype != mx.uint8 else part for part in parts]
            q = {"mode": quantization.mode, "bits": quantization.bits, "group_size": quantization.group_size}
            x = mx.dequantize(x, *parts, **q, dtype=mx.float32)
        expected = wanted[module]
        if name == "fp8 blocks" and x.dtype == mx.bfloat16:  # float32 products, rounded once
            expected = checkpoints.from_bf16(checkpoints.to_bf16(expected))
        assert np.array_equal(np.array(x.astype(mx.float32)), expected), module


@pytest.mark.parametrize("experts", ["columns", "whole"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_rank_of_every_world(written, name, experts, monkeypatch):
    """`load_weights` of a rank is a slice of the whole, bit for bit; small reads, so that tensors take several."""
    checkpoint = written(name)
    _, whole = load_rank(checkpoint)
    whole = {tensor: bits(x) for tensor, x in whole.items()}
    monkeypatch.setattr("m3dist.reads.LARGEST", 5000)
    for weights in (1, 2, 3, 5, 8, [3, 1], [1, 2, 1.5]):
        for rank in range(weights if isinstance(weights, int) else len(weights)):
            plan, arrays = load_rank(checkpoint, weights, rank, experts)
            specs, slices = plan.held_specs(rank), plan.slices(rank)
            for tensor, x in arrays.items():
                assert (x.shape, x.dtype) == (specs[tensor].shape, KINDS[specs[tensor].dtype])
                assert np.array_equal(bits(x), sliced(whole[tensor], slices[tensor])), (weights, rank, tensor)


def test_mxfp8_is_exact(written):
    """What MLX makes of the bytes is e4m3 * 2**(exponent - 127) to the bit, in every expert."""
    checkpoint = written("mxfp8")
    stored = {}
    for file in sorted(checkpoint.directory.glob("*.safetensors")):
        stored |= checkpoints.read_safetensors(file)
    _, arrays = load_rank(checkpoint)
    moe = "language_model.model.layers.1.block_sparse_moe."
    down = mx.dequantize(
        arrays[moe + "switch_mlp.down_proj.weight"], arrays[moe + "switch_mlp.down_proj.scales"],
        group_size=32, bits=8, mode="mxfp8", dtype=mx.float32,
    )  # fmt: skip
    for expert in range(8):
        codes, exponents = (stored[f"{moe}experts.{expert}.w2.weight{end}"][1] for end in ("", "_scale_inv"))
        wanted = checkpoints.E4M3[codes] * np.repeat(np.exp2(exponents.astype(np.float64) - 127), 32, axis=-1)
        assert np.array_equal(np.array(down[expert]), wanted)


@pytest.mark.parametrize(("source", "target"), [(s, t) for s in ("BF16", "F16", "F32") for t in ("BF16", "F16", "F32")])
def test_casts_are_mlx_casts(source, target):
    """Every 16-bit pattern, and float32 patterns of every exponent; NaN stays NaN."""
    if source == "F32":
        patterns = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
        ties = np.arange(0, 2**32, 2**15, dtype=np.uint32)  # halfway between two bf16 numbers, or on one
        holder = np.concatenate([patterns, ties, ties + 1, ties - 1]).view(np.float32)
        x = mx.array(holder)
    else:
        patterns = np.arange(2**16, dtype=np.uint16)
        x = mx.array(patterns).view(KINDS[source])
        holder = patterns if source == "BF16" else patterns.view(np.float16)
    got = cast_floats(holder, source, target)
    wanted, nan = bits(x.astype(KINDS[target])), np.isnan(np.array(x.astype(mx.float32)))
    assert np.array_equal(got.view(wanted.dtype)[~nan], wanted[~nan])
    assert np.isnan(np.array(mx.array(got).view(KINDS[target]).astype(mx.float32)))[nan].all()


@pytest.mark.parametrize("name", ["published", "published f16", "b affine", "fp8 blocks"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_computing_in_another_dtype(written, name, dtype):
    """Floats are cast on the way, as mx.astype casts them; words, exponents and the router are not touched."""
    checkpoint = written(name)
    _, wide = load_rank(checkpoint, 3, 1, dtype="F32")
    plan, arrays = load_rank(checkpoint, 3, 1, dtype=dtype)
    for tensor, x in arrays.items():
        exact = "e_score" in tensor or ".block_sparse_moe.gate." in tensor
        assert x.dtype == (wide[tensor].dtype if exact or wide[tensor].dtype != mx.float32 else KINDS[dtype]), tensor
        assert np.array_equal(bits(x), bits(wide[tensor].astype(x.dtype)))


def bytes_read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@pytest.mark.parametrize("name", ["published", "mxfp8", "b affine", "fp8 blocks"])
@pytest.mark.parametrize("experts", ["columns", "whole"])
def test_only_what_is_needed_is_read(written, name, experts):
    """Rows and experts: exactly the bytes kept. Columns: whole rows. Counted by the kernel."""
    if not Path("/proc/self/io").exists():
        pytest.skip("machine: needs Linux to count the bytes a process reads")
    checkpoint = written(name)
    translation = checkpoint.translate()
    plan = make_plan(translation.inventory, 4, experts)
    before = bytes_read()
    load_weights(checkpoint, translation, plan, 1)
    counted = bytes_read() - before
    reads = list(plan_reads(checkpoint.stored, translation, plan, 1))
    slices = plan.slices(1)
    for tensor, spec in plan.held_specs(1).items():
        of_this = [read for read in reads if read.tensor == tensor]
        stored_size = {BYTES[read.source.dtype] for read in of_this} if spec.dtype in FLOATS else {BYTES[spec.dtype]}
        if slices[tensor].axis != COLUMNS:
            (size,) = stored_size
            assert sum(read.nbytes for read in of_this) == math.prod(spec.shape) * size, tensor
    planned = sum(read.nbytes for read in reads)
    assert planned <= counted <= planned * 1.02 + 4096  # block multipliers, and this test's own /proc
    assert counted < 0.5 * sum(t.nbytes for t in checkpoint.stored.values() if t.name not in translation.ignored)


def test_memory_stays_at_the_slices(tmp_path):
    """MLX's peak is what the rank holds, and the process adds a few reads, not a few tensors."""
    checkpoint = open_checkpoint(checkpoints.synthetic(tmp_path, 0.4, num_local_experts=16))
    translation = checkpoint.translate()
    plan = make_plan(translation.inventory, 2)
    mx.clear_cache()
    assert max(read.nbytes for read in plan_reads(checkpoint.stored, translation, plan, 1)) <= LARGEST
    held, active = plan.bytes_held(1), mx.get_active_memory()
    mx.reset_peak_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arrays = load_weights(checkpoint, translation, plan, 1)
    assert mx.get_peak_memory() - active <= held * 1.01 + 2**20
    assert sum(x.nbytes for x in arrays.values()) == held
    scale = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale <= held + 4 * loader.READERS * LARGEST


def test_a_tensor_that_nobody_needs_may_be_odd(tmp_path):
    stored = {name: checkpoints.encode_plain(name, value, "BF16") for name, value in TENSORS.items()}
    stored["vision_tower.odd"] = ("U8", np.zeros(3, np.uint8))
    path = checkpoints.write(tmp_path, CONFIG, stored)
    file = path / "model.safetensors"
    file.write_bytes(
        file.read_bytes().replace(b'"vision_tower.odd": {"dtype": "U8"', b'"vision_tower.odd": {"dtype": "Q8"')
    )
    load_rank(open_checkpoint(path))


def test_short_reads_are_continued(written, monkeypatch):
    """The kernel may give less than was asked for."""
    _, wanted = load_rank(written("published"), 2, 1)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:1000]], at))
    _, arrays = load_rank(written("published"), 2, 1)
    assert all(np.array_equal(bits(x), bits(wanted[tensor])) for tensor, x in arrays.items())


def test_blocks_start_again_with_every_matrix_of_a_stack(tmp_path):
    scale = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    ones = b"\x38" * (3 * 200 * 130)  # E4M3
    (tmp_path / "file").write_bytes(scale.tobytes() + ones)
    source = StoredTensor(tmp_path / "file", "weight", (3, 200, 130), "F8_E4M3", scale.nbytes, len(ones))
    stored = StoredTensor(tmp_path / "file", "scale", scale.shape, "F32", 0, scale.nbytes)
    wanted = np.repeat(np.repeat(scale, 128, axis=1), 128, axis=2)[:, :200, :130].reshape(600, 130)
    with Folder(tmp_path) as files:
        for row, rows in ((0, 600), (150, 100), (350, 200)):
            got = np.empty((rows, 130), np.float32)
            fill(Read("weight", source, row, rows, 0, None, stored), got, "F32", files)
            assert np.array_equal(got, wanted[row : row + rows])


def test_sanitize_minds_the_dtypes_of_its_own_tensors_alone():
    model = Model(ModelArgs.from_dict(CONFIG))
    weights = {name: mx.array(value) for name, value in TENSORS.items()}
    model.sanitize(weights | {"vision_tower.position_ids": mx.arange(3, dtype=mx.int64)})
    norm = "language_model.model.norm.weight"
    with pytest.raises(CheckpointError, match=f"{norm}: has dtype .*int64"):
        model.sanitize(weights | {norm: weights[norm].astype(mx.int64)})


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.fixture
def copied(written, tmp_path):
    shutil.copytree(written("published").directory, tmp_path / "copy")
    return open_checkpoint(tmp_path / "copy")


def test_file_cut_short_after_it_was_opened(copied):
    file = copied.directory / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match=r"layers.*model-00002.*: the file now ends at byte \d+"
    ):
        load_rank(copied)


def test_file_gone_after_it_was_opened(copied):
    (copied.directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="layers.*model-00002-of-00003.safetensors: .*No such file"):
        load_rank(copied)


def test_a_file_of_the_vision_tower_alone_is_never_read(copied):
    (copied.directory / "model-00003-of-00003.safetensors").unlink()
    load_rank(copied)


def test_nothing_is_left_running_after_a_failure(copied):
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    (copied.directory / "model-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_rank(copied)
    assert threading.active_count() == threads and len(os.listdir("/dev/fd")) == files


class Peer(Comm):
    """Rank 0 of two, whose peer says `messages`, one a gathering."""

    def __init__(self, *messages):
        super().__init__()
        self.world, self.messages = 2, list(messages)

    def gather_objects(self, value):
        return [value, self.messages.pop(0)]

    def all_gather(self, x):
        return mx.stack([x, x])


def test_another_rank_fails(written):
    directory = written("published").directory
    with pytest.raises(CommunicationError, match="rank 1 failed: CheckpointError: the disk is gone"):
        load(directory, Peer("CheckpointError: the disk is gone"))
    with pytest.raises(CommunicationError, match="rank 1 failed: CheckpointError: short"):
        load(directory, Peer(None, "CheckpointError: short"))


def test_this_rank_fails(copied):
    """Its own error is raised, after the other has been told."""
    peer = Peer(None, None)
    with pytest.raises(PlanError, match="9 weights for 2 ranks"):
        load(copied.directory, peer, weights=[1.0] * 9)
    assert len(peer.messages) == 1
    os.truncate(copied.directory / "model-00001-of-00003.safetensors", 1000)
    with pytest.raises(CheckpointError, match="model-00001-of-00003.safetensors"):
        load(copied.directory, peer)
    assert not peer.messages


def test_a_model_holds_what_is_planned_and_nothing_else(written):
    plan, arrays = load_rank(written("published"), 2, 0)
    name = "language_model.model.norm.weight"
    for wrong, message in (
        ({other: x for other, x in arrays.items() if other != name}, f"{name} is missing"),
        (arrays | {"odd.weight": arrays[name]}, "odd.weight is left over"),
        (arrays | {name: arrays[name][1:]}, rf"{name} is \[63\], the plan says \[64\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Model(ModelArgs.from_dict(CONFIG)).hold(plan, Peer(), wrong)


# ---------------------------------------------------------------------------------------------------------------------
# The whole path, and its progress


@pytest.mark.parametrize("name", ["published", "mxfp8", "b affine", "d None"])
def test_load_is_the_model(written, name):
    """Loading a checkpoint and sanitising its arrays give the same model."""
    directory = written(name).directory
    model = load(directory, Comm(), dtype="float32")
    held = dict(model.held_arrays())
    plan, arrays = load_rank(written(name), dtype="F32")
    assert held.keys() == plan.specs.keys()
    assert all(np.array_equal(bits(held[tensor]), bits(x)) for tensor, x in arrays.items())


def test_progress(written, monkeypatch):
    monkeypatch.setattr("m3dist.reads.LARGEST", 10_000)
    said = []
    plan, arrays = load_rank(written("published"), 2, 1, progress=said.append)
    assert [p.done for p in said] == sorted(p.done for p in said)
    assert said[-1].done == said[-1].total == said[0].total and said[0].done > 0
    assert {p.tensor for p in said} == arrays.keys()
    assert str(said[0]) == said[0].tensor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_loading_bar(monkeypatch):
    """Lines where there is no terminal, at most one in ten seconds; a bar on one."""
    now = iter([0.0, 1.0, 11.0, 12.0, 20.0])
    out = io.StringIO()
    with LoadingBar("rank 0", out, lambda: next(now)) as bar:
        for done in (1, 2, 3, 4):
            bar(Progress("x", done * 10**9, 4 * 10**9))
    assert out.getvalue().splitlines() == [
        "rank 0: 2.0 GB of 4.0 GB, 181.8 MB/s, 11 s left",
        "rank 0: 4.0 GB of 4.0 GB, 200.0 MB/s, 0 s left",
    ]
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with LoadingBar("rank 0", terminal) as bar:
        bar(Progress("x", 10**9, 4 * 10**9))
    assert "rank 0" in terminal.getvalue() and "4.0 GB" in terminal.getvalue()
