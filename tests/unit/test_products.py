"""Products of many rows on the CPU, by numpy: the same numbers as MLX's, little memory, and rows that stay apart."""

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from memory import peak
from reference.ours import build

from m3dist.model import ModelArgs, cpu, products
from m3dist.model.grouping import in_blocks
from m3dist.model.moe import QuantizedSwitchLinear, SwitchLinear, SwitchMLP
from m3dist.model.products import multiply, multiply_blocks, pays

COLUMNS = 128
CONFIG = ModelArgs.from_dict(checkpoints.tiny_config())
AFFINE = [(bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [None, *AFFINE, (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    """These products are the CPU's alone."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def random(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


def linear(rows: int, columns: int, form: tuple[int, int, str] | None, seed: int = 1) -> nn.Module:
    module = nn.Linear(columns, rows, bias=False)
    module.weight = random(rows, columns, seed=seed)
    if form is None:
        return module
    bits, group, mode = form
    return nn.QuantizedLinear.from_linear(module, group, bits, mode=mode)


def experts(count: int, rows: int, columns: int, form: tuple[int, int, str] | None) -> nn.Module:
    module = SwitchLinear(count, columns, rows)
    module.weight = random(count, rows, columns, seed=2)
    return module if form is None else module.to_quantized(form[1], form[0], form[2])


def dense(module: nn.Module) -> np.ndarray:
    """The module's matrix or matrices in float64."""
    if not isinstance(module, nn.QuantizedLinear | QuantizedSwitchLinear):
        return np.array(module.weight, dtype=np.float64)
    parts = module.weight, module.scales, module.get("biases")
    form = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
    return np.array(mx.dequantize(*parts, **form), dtype=np.float64)


def error(found: mx.array, wanted: np.ndarray) -> float:
    """Relative to the largest number."""
    assert found.dtype == mx.float32 and found.shape == wanted.shape
    return np.abs(np.array(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("pieces_of", [1, 7, 1 << 20], ids=lambda rows: f"{rows} rows of a matrix at a time")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_product(monkeypatch, form, pieces_of):
    """Also with another matrix of the format than the module's own, which is part of a larger one."""
    monkeypatch.setattr(products, "PIECE", pieces_of * COLUMNS * 4)
    module, other = linear(30, COLUMNS, form), linear(50, COLUMNS, form, seed=2)
    part = {leaf: other[leaf][3:43] for leaf in ("weight", "scales", "biases") if leaf in other}
    for shape in ((24,), (2, 20), (3, 1, 100)):
        x = random(*shape, COLUMNS, seed=3)
        assert error(multiply(module, x), np.array(x) @ dense(module).T) < 2e-6
        assert error(multiply(module, x, part), np.array(x) @ dense(other)[3:43].T) < 2e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_narrow_scales_are_widened_before_they_are_used(dtype):
    """As MLX's product with float32 does: dequantised in 16 bits a weight would lose most of its digits."""
    module = linear(30, COLUMNS, (4, 32, "affine"))
    module.scales, module.biases = module.scales.astype(dtype), module.biases.astype(dtype)
    x = random(40, COLUMNS, seed=3)
    assert error(multiply(module, x), np.array(module(x), dtype=np.float64)) < 2e-6


def test_narrow_weights_are_widened():
    module = linear(30, COLUMNS, None)
    module.weight = module.weight.astype(mx.bfloat16)
    x = random(40, COLUMNS, seed=3)
    wanted = np.array(x) @ np.array(module.weight.astype(mx.float32), dtype=np.float64).T
    assert error(multiply(module, x), wanted) < 2e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_few_rows_and_narrow_ones_are_mlx_s(form):
    """A decode step is as it was, and so are activations in 16 bits."""
    module = linear(30, COLUMNS, form)
    for shape in ((1, 1), (7,), (1, 7)):
        x = random(*shape, COLUMNS, seed=3)
        assert mx.array_equal(multiply(module, x), module(x))
    x = random(40, COLUMNS, seed=3).astype(mx.bfloat16)
    assert mx.array_equal(multiply(module, x), module(x))


def test_what_mlx_unpacks_slowly_takes_more_rows():
    slow = [form for form in FORMATS if not pays(linear(32, COLUMNS, form), 23)]
    assert {(bits, mode) for bits, _, mode in slow} == {
        *((bits, "affine") for bits in (3, 5, 6)),
        (4, "mxfp4"),
        (4, "nvfp4"),
    }
    assert all(pays(linear(32, COLUMNS, form), 24) and not pays(linear(32, COLUMNS, form), 7) for form in FORMATS)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_blocks_of_rows_by_their_owners(monkeypatch, form):
    """Some matrices own many blocks, some one and some none."""
    monkeypatch.setattr(products, "PIECE", 7 * COLUMNS * 4)
    module, owners = experts(7, 30, COLUMNS, form), [1, 1, 1, 3, 4, 4]
    x = random(len(owners), 8, COLUMNS, seed=4)
    found = multiply_blocks(module, x, mx.array(owners, dtype=mx.int32))
    wanted = np.stack([np.array(rows) @ dense(module)[owner].T for rows, owner in zip(x, owners, strict=True)])
    assert error(found, wanted) < 2e-6


@pytest.mark.parametrize("rows, columns", [(64, 64), (33, 96), (768, 1536), (129, 32), (8, 640)])
def test_no_result_depends_on_its_place_in_a_block(rows, columns):
    """Else a token's numbers would depend on which experts its neighbours chose. Of larger blocks some do."""
    module, row = experts(1, rows, columns, None), random(columns, seed=5)
    x = mx.broadcast_to(row, (3, cpu.TILE, columns))
    found = multiply_blocks(module, x, mx.zeros(3, dtype=mx.int32))
    assert mx.array_equal(found, mx.broadcast_to(found[0, 0], found.shape))


@pytest.mark.parametrize("form", [(4, 64, "affine"), (4, 32, "mxfp4")], ids=str)
@pytest.mark.parametrize("at_once", [1, 3, 7])
def test_experts_may_be_multiplied_a_few_at_a_time(monkeypatch, form, at_once):
    """As on CUDA, where MLX's product takes 2 GiB of them at most."""
    module, x = experts(8, 96, COLUMNS, form), random(20, 1, 1, COLUMNS, seed=3)
    chosen = mx.array(np.random.default_rng(4).integers(0, 8, (20, 3)), dtype=mx.uint32)
    in_order = mx.sort(chosen.reshape(-1))
    wanted = module(x, chosen, False), module(x[mx.arange(60) // 3, 0], in_order, True)
    monkeypatch.setattr(QuantizedSwitchLinear, "_experts_at_once", lambda self: at_once)
    found = module(x, chosen, False), module(x[mx.arange(60) // 3, 0], in_order, True)
    assert all(mx.array_equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize("tokens", [32, 33, 100])
def test_tokens_do_not_touch_each_other(tokens):
    """Bit by bit: whatever the others are and whichever experts they choose."""
    mlp = SwitchMLP(CONFIG)
    for i, module in enumerate((mlp.gate_up_proj, mlp.down_proj)):
        module.weight = random(*module.weight.shape, seed=i) / 8
    numbers = np.random.default_rng(6)
    x, chosen = numbers.standard_normal((tokens, CONFIG.hidden_size)), numbers.integers(0, 8, (tokens, 2))
    wanted = mlp(mx.array(x, dtype=mx.float32), mx.array(chosen, dtype=mx.uint32))
    for kept in (slice(0, 1), slice(5, 20), slice(tokens - 1, tokens)):
        others, choices = numbers.standard_normal(x.shape), numbers.integers(0, 8, chosen.shape)
        others[kept], choices[kept] = x[kept], chosen[kept]
        found = mlp(mx.array(others, dtype=mx.float32), mx.array(choices, dtype=mx.uint32))
        assert mx.array_equal(found[kept], wanted[kept]) and not mx.array_equal(found, wanted)


@pytest.mark.parametrize("owners", [[0], [2] * 9, [0, 1, 2, 3], [3, 1, 3, 0, 0, 3, 3, 3, 3, 3, 3, 3, 1]], ids=str)
def test_blocks_of_a_given_size_are_no_more_than_needed(owners):
    blocks = in_blocks(mx.array(owners, dtype=mx.uint32), 4, size=8)
    assert blocks.owner.tolist() == sorted(owner for owner in set(owners) for _ in range(-(-owners.count(owner) // 8)))
    assert blocks.source.size == 8 * blocks.owner.size
    for pair, place in enumerate(blocks.place.tolist()):
        assert blocks.source[place] == pair and blocks.owner[place // 8] == owners[pair]


@pytest.mark.parametrize("form", [None, (4, 64, "affine"), (8, 32, "mxfp8")], ids=str)
def test_matrices_are_never_dequantised_whole(form):
    """32 MiB in float32; the result has 1."""
    module, x = linear(4096, 2048, form), random(64, 2048, seed=1)
    mx.eval(module.parameters(), x)
    assert peak(lambda: multiply(module, x)) < 5 << 20
    module, x = experts(4, 1024, 2048, form), random(32, 8, 2048, seed=1)
    mx.eval(module.parameters(), x)
    assert peak(lambda: multiply_blocks(module, x, mx.arange(32) // 8)) < 5 << 20


@pytest.mark.parametrize("lengths", [(150,), (150, 40, 1)], ids=str)
def test_a_model_computes_the_same_by_either_library(monkeypatch, lengths):
    """6 times the block budget, with rows of unequal length, in two chunks: what a GPU does is tested by this."""
    model = build(checkpoints.tiny_config(), checkpoints.random_tensors(checkpoints.tiny_config(), seed=3))
    tokens = mx.array(np.random.default_rng(7).integers(0, 160, (len(lengths), 150)))

    def logits() -> np.ndarray:
        cache, found = model.make_cache(), []
        for first, last in ((0, 90), (90, 150)):
            valid = [min(max(length - first, 0), last - first) for length in lengths]
            found.append(model(tokens[:, first:last], cache, valid))
        out = np.array(mx.concatenate(found, axis=1))
        return np.concatenate([out[row, :length] for row, length in enumerate(lengths)])

    by_numpy = logits()
    monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
    by_mlx = logits()
    assert not np.array_equal(by_numpy, by_mlx), "or this would compare one with itself"
    assert np.abs(by_numpy - by_mlx).max() < 1e-5 * np.abs(by_mlx).max()
