"""Rows from one format to another, in blocks and cuts of any size, against MLX on the whole tensor: bit for bit."""

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import from_bf16, to_bf16
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.fetch import quantize
from m3dist.fetch.quantize import requantise
from m3dist.numbers import cast_floats
from m3dist.tensors import LEAVES, MXFP8, Quantization

AFFINE = [Quantization("affine", bits, group) for bits in (3, 4, 5, 6, 8) for group in (32, 64, 128)]
NAMED = [Quantization("mxfp4", 4, 32), MXFP8, Quantization("nvfp4", 4, 16)]
FORMATS = pytest.mark.parametrize("target", AFFINE + NAMED, ids=str)
DTYPES = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
ROWS, COLUMNS = 24, 512
MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}

Leaves = dict[str, np.ndarray]


def values(seed: int = 0, rows: int = ROWS) -> np.ndarray:
    """float32 [rows, COLUMNS] of several magnitudes, with groups of zeros and of equal numbers among them."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((rows, COLUMNS)) * 2.0 ** rng.integers(-9, 4, (rows, COLUMNS // 16)).repeat(16, axis=1)
    made[0, :128] = 0
    made[1, :128] = 0.75
    made[2, 128:256] = -np.abs(made[2, 128:256])
    return made.astype(np.float32)


def floats(dtype: str, seed: int = 0, rows: int = ROWS) -> Leaves:
    return {"weight": cast_floats(values(seed, rows), "F32", dtype)}


def in_mlx(leaf: np.ndarray) -> mx.array:
    return mx.array(leaf).view(mx.bfloat16) if leaf.dtype == np.uint16 else mx.array(leaf)


def from_mlx(arrays) -> Leaves:
    plain = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for a in arrays]
    return dict(zip(LEAVES, plain, strict=False))


def by_mlx(weight: mx.array, target: Quantization) -> Leaves:
    """What mlx-lm's converter writes for a whole tensor."""
    return from_mlx(mx.quantize(weight, group_size=target.group_size, bits=target.bits, mode=target.mode))


def columns_of(leaves: Leaves, form: Quantization | None, start: int, stop: int) -> Leaves:
    """Columns [start, stop), counted in values, of every leaf."""
    sizes = {"weight": (form.bits, 32) if form else (1, 1), "scales": (1, form and form.group_size)}
    sizes["biases"] = sizes["scales"]
    return {k: a[:, start * sizes[k][0] // sizes[k][1] : stop * sizes[k][0] // sizes[k][1]] for k, a in leaves.items()}


def rows_of(leaves: Leaves, start: int, stop: int) -> Leaves:
    return {leaf: array[start:stop] for leaf, array in leaves.items()}


def joined(pieces: list[Leaves], axis: int = 0) -> Leaves:
    return {leaf: np.concatenate([piece[leaf] for piece in pieces], axis) for leaf in pieces[0]}


def assert_same(got: Leaves, wanted: Leaves) -> None:
    assert got.keys() == wanted.keys()
    for leaf in wanted:
        assert got[leaf].dtype == wanted[leaf].dtype and np.array_equal(got[leaf], wanted[leaf]), leaf


@FORMATS
@DTYPES
def test_as_mlx_quantises_the_whole(monkeypatch, target, dtype):
    """At once, and where it works through a block in slices."""
    source = floats(dtype)
    wanted = by_mlx(in_mlx(source["weight"]), target)
    assert_same(requantise(source, None, target, dtype), wanted)
    assert_same(requantise(source, None, target), wanted)
    monkeypatch.setattr(quantize, "VALUES", 5 * COLUMNS + 1)
    assert_same(requantise(source, None, target, dtype), wanted)
    if target.mode == "affine":
        assert {wanted["scales"].dtype, wanted["biases"].dtype} == {source["weight"].dtype}
    else:
        assert wanted.keys() == {"weight", "scales"} and wanted["scales"].dtype == np.uint8


@FORMATS
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_and_any_cut(target, data):
    """Rows in blocks, and columns cut between groups before or after: the bits of the whole."""
    dtype = data.draw(st.sampled_from(["BF16", "F32"]))
    source = floats(dtype, data.draw(st.integers(0, 2**32)))
    wanted = by_mlx(in_mlx(source["weight"]), target)
    ends = sorted({0, ROWS, *data.draw(st.lists(st.integers(1, ROWS - 1)))})
    blocks = [requantise(rows_of(source, a, b), None, target, dtype) for a, b in zip(ends, ends[1:])]
    assert_same(joined(blocks), wanted)
    groups = COLUMNS // target.group_size
    cuts = sorted({0, groups, *data.draw(st.lists(st.integers(1, groups)))})
    spans = [(a * target.group_size, b * target.group_size) for a, b in zip(cuts, cuts[1:])]
    before = [requantise(columns_of(source, None, *span), None, target, dtype) for span in spans]
    assert_same(joined(before, axis=1), wanted)
    after = [columns_of(joined(blocks), target, *span) for span in spans]
    for cut, whole in zip(after, before):
        assert_same(cut, whole)


@FORMATS
@pytest.mark.parametrize("source", [MXFP8, Quantization("affine", 8, 32), Quantization("nvfp4", 4, 16)], ids=str)
def test_from_another_quantisation(source, target):
    """As mlx-lm does in two steps, dequantising and quantising; the same bits in blocks. The same format: the very same
    bytes, though quantising again would not always give them."""
    leaves = by_mlx(mx.array(values()).astype(mx.bfloat16), source)
    got = requantise(leaves, source, target, "BF16")
    if source == target:
        assert all(got[leaf] is leaves[leaf] for leaf in leaves)
        return
    parts = [in_mlx(array) for array in leaves.values()]
    whole = mx.dequantize(*parts, group_size=source.group_size, bits=source.bits, mode=source.mode)
    assert whole.dtype == mx.bfloat16
    assert_same(got, by_mlx(whole, target))
    assert_same(joined([requantise(rows_of(leaves, r, r + 1), source, target, "BF16") for r in range(ROWS)]), got)


@DTYPES
def test_published_mxfp8_to_floats(dtype):
    """Exactly the numbers that the published bytes mean: E4M3 times a power of two."""
    codes, exponents = checkpoints.to_mxfp8(values())
    leaves = {"weight": codes.view(np.uint32), "scales": exponents}
    got = requantise(leaves, MXFP8, None, dtype)
    assert got.keys() == {"weight"} and got["weight"].dtype == floats(dtype)["weight"].dtype
    meant = checkpoints.from_mxfp8(codes, exponents)
    assert np.array_equal(got["weight"], cast_floats(meant, "F32", dtype))
    assert np.array_equal(from_bf16(requantise(leaves, MXFP8, None)["weight"]), meant)


@pytest.mark.parametrize("target", AFFINE, ids=str)
def test_affine_to_floats(target):
    """In the type of the scales, as mlx-lm's dequantize does."""
    leaves = by_mlx(mx.array(values()), target)
    got = requantise(leaves, target, None)["weight"]
    whole = mx.dequantize(*map(in_mlx, leaves.values()), group_size=target.group_size, bits=target.bits)
    assert got.dtype == np.float32 and np.array_equal(got, np.array(whole))
    step = np.abs(values()).reshape(-1, target.group_size).max() * 2 / (2**target.bits - 1)
    assert np.abs(got - values()).max() <= step


@DTYPES
def test_a_cast(dtype):
    source = floats("F32")
    got = requantise(source, None, None, dtype)["weight"]
    assert np.array_equal(got, floats(dtype)["weight"])
    assert (got is source["weight"]) == (dtype == "F32")


def test_a_cast_before_quantising():
    """The values are those of the wanted type, as where mlx-lm converts with --dtype."""
    target = Quantization("affine", 4, 64)
    half = {"weight": to_bf16(floats("F32")["weight"])}
    assert_same(requantise(floats("F32"), None, target, "BF16"), requantise(half, None, target, "BF16"))


@pytest.mark.parametrize("target", [Quantization("affine", 4, 64), *NAMED], ids=str)
def test_memory(target):
    """A block of 16 MiB takes no more than six times its own beside itself; mxfp4 and nvfp4 of the whole would take 20
    and 40 times."""
    rng = np.random.default_rng(0)
    source = {"weight": rng.integers(0, 2**16, (16, 1 << 19), np.uint16) & 0xBF7F}
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    requantise(source, None, target, "BF16")
    assert mx.get_peak_memory() - held < 6 * source["weight"].nbytes
    assert mx.get_active_memory() == held
