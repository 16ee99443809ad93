"""The parts of a layer: norm, router in float32 whatever is around it, and whole experts that add up over ranks."""

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from m3dist.model import Model, ModelArgs, cpu
from m3dist.model.layers import GemmaRMSNorm
from m3dist.model.moe import SORT_FROM, SparseMoeBlock, expert_weights

CONFIG = ModelArgs.from_dict(checkpoints.tiny_config())


def random(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


def test_a_norm_follows_its_weight():
    norm, x = GemmaRMSNorm(4, 1e-6), mx.ones((1, 4))
    assert mx.allclose(norm(x), x)
    norm.weight = mx.ones(4)
    assert mx.allclose(norm(x), 2 * x)


@pytest.mark.parametrize("quantised", [False, True])
def test_bfloat16_tokens_are_routed_in_float32(quantised):
    block = SparseMoeBlock(CONFIG)
    block.gate.weight = random(CONFIG.num_local_experts, CONFIG.hidden_size, seed=1) / 8
    block.e_score_correction_bias = random(CONFIG.num_local_experts, seed=2) / 10
    weight = block.gate.weight
    if quantised:
        block.gate.weight = weight.astype(mx.bfloat16)
        block.gate = nn.QuantizedLinear.from_linear(block.gate, 64, 8)
        scales, biases = (part.astype(mx.float32) for part in (block.gate.scales, block.gate.biases))
        weight = mx.dequantize(block.gate.weight, scales, biases, 64, 8)
    x = random(200, CONFIG.hidden_size, seed=3).astype(mx.bfloat16)
    experts, found = block.route(x)
    weights = mx.concatenate(expert_weights(found, block.scale), axis=-1)
    scores = 1 / (1 + np.exp(-np.array(x.astype(mx.float32), np.float64) @ np.array(weight).T))
    best = np.argsort(-(scores + np.array(block.e_score_correction_bias)))[:, : CONFIG.num_experts_per_tok]
    assert (np.sort(best) == np.sort(np.array(experts))).all()
    chosen = np.take_along_axis(scores, np.array(experts), -1)
    wanted = CONFIG.routed_scaling_factor * chosen / chosen.sum(-1, keepdims=True)
    assert weights.dtype == mx.float32 and np.abs(np.array(weights) - wanted).max() < 1e-5


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [3, SORT_FROM])
def test_whole_experts_add_up(tokens):
    """Also where a rank holds none of the chosen experts."""
    whole = SparseMoeBlock(CONFIG).switch_mlp
    for i, linear in enumerate((whole.gate_up_proj, whole.down_proj)):
        linear.weight = random(*linear.weight.shape, seed=i) / 8
    x = random(tokens, CONFIG.hidden_size, seed=5)
    experts = mx.array(np.random.default_rng(6).integers(0, 5, (tokens, 2)), dtype=mx.uint32)  # never 5, 6 or 7
    parts = []
    for first, stop in ((0, 2), (2, 5), (5, 8)):
        part = SparseMoeBlock(CONFIG).switch_mlp
        part.gate_up_proj.weight = whole.gate_up_proj.weight[first:stop]
        part.down_proj.weight = whole.down_proj.weight[first:stop]
        parts.append(part.held(x, experts, first, decoding=False))
    assert not parts[2].any().item()
    assert mx.allclose(sum(parts), whole(x, experts), atol=1e-5)


@pytest.mark.parametrize("rows", [SORT_FROM // CONFIG.num_experts_per_tok, SORT_FROM])
def test_decode_steps_with_whole_experts_wait_for_nothing(monkeypatch, rows):
    """One token of each of many rows, as the engine compiles them on a GPU; the numbers are those of a prompt's."""
    monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
    block = SparseMoeBlock(CONFIG)
    block.gate.weight = random(CONFIG.num_local_experts, CONFIG.hidden_size, seed=1) / 8
    for i, linear in enumerate((block.switch_mlp.gate_up_proj, block.switch_mlp.down_proj)):
        linear.weight = random(*linear.weight.shape, seed=i)[2:5] / 8
    block.first_expert = 2
    x = random(rows, 1, CONFIG.hidden_size, seed=5)
    mx.compile(block)(x)  # traced, where a wait is an error; evaluating it would take a C++ compiler
    assert mx.allclose(block(x), block(x.swapaxes(0, 1)).swapaxes(0, 1), atol=1e-5)


def test_quantising_keeps_the_router_at_8_bits():
    model = Model(CONFIG)
    nn.quantize(model, 32, 4, class_predicate=model.quant_predicate)
    found = model.inventory().quantization
    routers = {name for name in found if name.endswith(".block_sparse_moe.gate")}
    assert routers and all(str(found[name]) == "affine 8-bit, group 64" for name in routers)
    assert {str(found[name]) for name in found.keys() - routers} == {"affine 4-bit, group 32"}
    assert any(".switch_mlp." in name for name in found) and "language_model.model.embed_tokens" in found
