"""What the bench measures of the machine: that it computes what it counts, and counts it right."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from small_random import SMALL, plan_of

from m3dist.bench import machine
from m3dist.bench.subject import FORMATS
from m3dist.comm import Comm
from m3dist.model.products import pays
from m3dist.predict import unpacked_from

MATRIX = 2 * SMALL["intermediate_size"] * SMALL["hidden_size"]  # values of an expert's gate and up


@pytest.fixture
def a_second(monkeypatch):
    """Everything takes a second, once it was computed."""

    def timed(compute, comm, repeats=7):
        mx.eval(compute())
        return [1.0] * repeats

    monkeypatch.setattr(machine, "timed", timed)


@pytest.mark.parametrize("random", ["4bit", "mxfp4", "f32"])
def test_a_product_is_of_an_experts_gate_and_up(random):
    product, nbytes = machine.expert_product(plan_of(random), 0)
    bits = {"4bit": 4 + 2 * 32 / 64, "mxfp4": 4 + 8 / 32, "f32": 32}[random]  # a scale and a bias a group; float32
    assert nbytes == MATRIX * bits / 8
    x = mx.random.normal((3, SMALL["hidden_size"]))
    together = product(x)
    assert together.shape == (3, 2 * SMALL["intermediate_size"])
    assert mx.allclose(together[1:2], product(x[1:2]), atol=1e-4)
    assert not mx.allclose(together, machine.expert_product(plan_of(random), 1)[0](x), atol=1e-4)
    product, more = machine.expert_product(plan_of(random), 0, experts=3)
    assert more == 3 * nbytes and product(x).shape == (3, 3 * 2 * SMALL["intermediate_size"])


@pytest.mark.parametrize("random", ["4bit", "mxfp4", "f32"])
def test_experts_are_a_layers(random):
    """Each of them has weights of its own, in the plan's format."""
    plan = plan_of(random)
    c = replace(plan.inventory.config, num_local_experts=4)
    experts, nbytes = machine.random_experts(plan, c)
    assert nbytes == 4 * 1.5 * machine.expert_product(plan, 0)[1]  # gate and up, and down
    x = mx.random.normal((1, SMALL["hidden_size"]))
    found = experts(x, mx.arange(4, dtype=mx.uint32)[None])[0]
    assert found.shape == (4, SMALL["hidden_size"]) and mx.abs(found).min(axis=-1).max() > 0
    assert not any(mx.allclose(found[i], found[j], atol=1e-4) for i in range(4) for j in range(i))


def test_flop_by_hand(a_second):
    plan = plan_of()
    assert machine.matmul_flops(plan, 5, Comm()) == 2 * 5 * MATRIX
    heads, dim = SMALL["num_attention_heads"], SMALL["head_dim"]
    seen = 2 + 3 + 4 + 5 + 6 + 7  # by each of the last 6 of 7 tokens
    assert machine.attention_flops(plan, 6, 7, Comm()) == 2 * heads * seen * 2 * dim  # scores, and what they weigh


@pytest.mark.parametrize("random", sorted(FORMATS))
def test_predictions_know_when_the_cpu_unpacks(random):
    """What predictions say without MLX is what products do."""
    wanted = FORMATS[random]
    q = None if isinstance(wanted, str) else wanted
    linear = nn.Linear(64, 64, bias=False)
    linear = linear.to_quantized(q.group_size, q.bits, q.mode) if q else linear
    rows = unpacked_from(q)
    assert pays(linear, rows) and not pays(linear, rows - 1)


def test_choices_and_experts_by_hand(a_second):
    plan = plan_of()
    heads, dim, size, hidden = SMALL["num_attention_heads"], SMALL["head_dim"], 16, SMALL["hidden_size"]
    kv, blocks = plan.inventory.config.num_key_value_heads, SMALL["sparse_topk_blocks"]
    assert heads > kv  # what is read is K's and V's, what is computed is all heads'
    assert machine.index_flops(plan, 3, 170, Comm()) == 2 * kv * SMALL["sparse_index_dim"] * 3 * 160  # whole blocks
    assert machine.selected_bandwidth(plan, 5, Comm()) == 5 * 2 * kv * dim * 4 * blocks * size
    alone = plan_of(sparse_attention_freq="0000")
    assert machine.index_flops(alone, 3, 170, Comm()) is machine.selected_bandwidth(alone, 5, Comm()) is None
    flops = 2 * 4 * machine.ROWS_AN_EXPERT * 3 * SMALL["intermediate_size"] * hidden
    nbytes = machine.random_experts(plan, replace(plan.inventory.config, num_local_experts=4))[1]
    figures = {"unpack_bandwidth": 2 * nbytes, "matmul_flops": 1e12}
    assert machine.expert_flops(plan, 4, figures, Comm()) == flops / 0.5
    assert machine.expert_flops(plan, 4, figures | {"unpack_bandwidth": None}, Comm()) == flops
    assert machine.expert_flops(plan, 4, figures | {"unpack_bandwidth": nbytes}, Comm()) == pytest.approx(1e12)


def test_weights_read_by_hand(a_second):
    """At least the bytes asked for, less a launch a product; but never faster than memory."""
    plan = plan_of()
    one, products = machine.expert_product(plan, 0)[1], machine.MATRICES * machine.PASSES
    figures = {"launch_seconds": 1 / 64, "memory_bandwidth": 1e12}
    read = machine.PASSES * machine.MATRICES * 2 * one
    for size in (machine.MATRICES * one + 1, machine.MATRICES * 2 * one):
        assert machine.matvec_bandwidth(plan, size, figures, Comm()) == read / (1 - products / 64)
    assert machine.matvec_bandwidth(plan, 1, figures | {"launch_seconds": 1.0}, Comm()) == pytest.approx(1e12)


def test_keys_and_weights_unpacked_by_hand(a_second):
    plan = plan_of()
    keys = machine.READINGS * 2 * plan.inventory.config.num_key_value_heads * SMALL["head_dim"] * 4 * 100
    figures = {"launch_seconds": 1 / 64, "memory_bandwidth": 1e12}
    assert machine.attention_bandwidth(plan, 100, figures, Comm()) == keys / (1 - machine.READINGS / 64)
    assert machine.attention_bandwidth(plan, 100, figures | {"launch_seconds": 1.0}, Comm()) == pytest.approx(1e12)
    figures |= {"matmul_flops": 2 * machine.FEW_ROWS * MATRIX * 2}
    assert machine.unpack_bandwidth(plan, figures, Comm()) == machine.expert_product(plan, 0)[1] / 0.5


def test_this_machine():
    """One rank has no links; everything else is measured, here on the CPU."""
    found = machine.measure_machine(plan_of(), Comm(), lambda phase: None)
    assert found.pop("sum_latency") is None and found.pop("sum_bandwidth") is None
    assert len(found) == 10 and min(found.values()) > 0
    for name in ("matvec_bandwidth", "attention_bandwidth", "unpack_bandwidth"):
        assert found[name] <= found["memory_bandwidth"]
    assert found["expert_flops"] <= found["matmul_flops"]
