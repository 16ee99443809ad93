"""Weights without a checkpoint: the plan's shapes, equal where ranks share them, and fit to compute with."""

import mlx.core as mx
import pytest
from small_random import build, plan_of

from m3dist.bench.subject import FORMATS
from m3dist.bench.weights import constants, key_of, random_words
from m3dist.comm import Comm
from m3dist.model import Model
from m3dist.model.text import DTYPES
from m3dist.options import RANDOM


@pytest.mark.parametrize("name", RANDOM)
def test_shapes_and_dtypes_are_the_plans(name):
    plan = plan_of(name, world=3)
    for rank in range(3):
        held = build(plan, rank)
        specs = plan.held_specs(rank)
        assert {n: (x.shape, x.dtype) for n, x in held.items()} == {
            n: (spec.shape, DTYPES[spec.dtype]) for n, spec in specs.items()
        }


@pytest.mark.parametrize("name", ["4bit", "nvfp4", "f32"])
def test_what_ranks_share_is_equal(name):
    """Three ranks over two KV heads: one is on two of them."""
    plan = plan_of(name, world=3, num_key_value_heads=2, sparse_num_index_heads=2)
    held = [build(plan, rank) for rank in range(3)]
    slices = [plan.slices(rank) for rank in range(3)]
    shared = 0
    for tensor, spec in plan.specs.items():
        rows = {}
        for rank in range(3):
            part = slices[rank][tensor]
            if part.axis is None:
                assert mx.array_equal(held[rank][tensor], held[0][tensor]), tensor
                continue
            indices = [i for start, stop in part.spans for i in range(start, stop)]
            moved = held[rank][tensor].swapaxes(part.axis, 0)
            for place, index in enumerate(indices):
                if index in rows:
                    shared += 1
                    assert mx.array_equal(moved[place], rows[index]), f"{tensor}, row {index}"
                rows[index] = moved[place]
        assert not rows or len(rows) == spec.shape[slices[0][tensor].axis]
    assert shared


def test_weights_differ():
    """From tensor to tensor, and for large ones, of which each makes only its own, from rank to rank."""
    plan = plan_of(world=2, vocab_size=120000)
    a, b = build(plan, 0), build(plan, 1)
    layer = "language_model.model.layers.{}.self_attn.o_proj.weight"
    assert not mx.array_equal(a[layer.format(0)], a[layer.format(1)])
    rows = min(x["language_model.lm_head.weight"].shape[0] for x in (a, b))
    head_a, head_b = (x["language_model.lm_head.weight"][:rows] for x in (a, b))
    assert (head_a == head_b).mean().item() < 0.01


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_every_code_is_alike_likely(bits):
    """Also those in the lowest bits of a word."""
    words = random_words((128, bits * 32), FORMATS[f"{bits}bit"], key_of("codes"))
    ones, zeros = mx.ones((128, 16)), mx.zeros((128, 16))
    codes = mx.dequantize(words, ones, zeros, group_size=64, bits=bits).astype(mx.uint32).reshape(-1)
    counts = [(codes == code).sum().item() for code in range(2**bits)]
    expected = codes.size / 2**bits
    assert sum((count - expected) ** 2 / expected for count in counts) < 2**bits + 6 * (2 * 2**bits) ** 0.5  # chi2


@pytest.mark.parametrize("name", [name for name in RANDOM if name not in ("bf16", "f32")])
def test_spread(name):
    """A mean of 0 and about the deviation asked for; powers of two are the only scales mxfp has."""
    q = FORMATS[name]
    words = random_words((512, q.packed(1024)), q, key_of("spread"))
    scale, bias = constants(q, 1 / 32)
    dtype = mx.float32 if q.mode == "affine" else mx.uint8
    scales, biases = (mx.full((512, 1024 // q.group_size), x, dtype=dtype) for x in (scale, bias))
    format = {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}
    values = mx.dequantize(words, scales, biases if q.mode == "affine" else None, **format).astype(mx.float32) * 32
    assert abs(values.mean().item()) < 0.01
    assert 0.7 < values.std().item() < 1.42
    if q.mode == "affine":
        assert mx.array(scale, dtype=mx.bfloat16).astype(mx.float32).item() == scale


@pytest.mark.parametrize("name", ["4bit", "8bit", "mxfp4", "mxfp8", "nvfp4", "f32"])
def test_the_model_computes(name):
    """Activations stay finite and near unit size, and the router spreads tokens over the experts."""
    plan = plan_of(name, world=1)
    model = Model(plan.inventory.config)
    model.hold(plan, Comm(), build(plan))
    tokens = mx.arange(200, dtype=mx.uint32)[None]
    logits = model(tokens)
    assert mx.isfinite(logits).all().item()
    assert 0.1 < logits.std().item() < 10
    chosen = set()
    for layer in model.layers[1:]:
        experts, _ = layer.block_sparse_moe.route(mx.random.normal((200, 256), key=mx.random.key(1)))
        counts = [(experts == expert).sum().item() for expert in range(16)]
        assert max(counts) < 4 * 200 / 4, counts  # of 800 choices 50 are an even share
        chosen |= {expert for expert, count in enumerate(counts) if count}
    assert len(chosen) == 16
