"""What the bench measures of the machine: that it computes what it counts, and counts it right."""

import mlx.core as mx
import pytest
from small_random import SMALL, plan_of

from m3dist.bench import machine
from m3dist.comm import Comm

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


def test_flop_by_hand(a_second):
    plan = plan_of()
    assert machine.matmul_flops(plan, 5, Comm()) == 2 * 5 * MATRIX
    heads, dim = SMALL["num_attention_heads"], SMALL["head_dim"]
    seen = 2 + 3 + 4 + 5 + 6 + 7  # by each of the last 6 of 7 tokens
    assert machine.attention_flops(plan, 6, 7, Comm()) == 2 * heads * seen * 2 * dim  # scores, and what they weigh


def test_weights_read_by_hand(a_second):
    """Matrices up to the size asked for, less a launch each; but never faster than memory."""
    plan = plan_of()
    one = machine.expert_product(plan, 0)[1]
    figures = {"launch_seconds": 0.125, "memory_bandwidth": 1e12}
    assert machine.matvec_bandwidth(plan, 3 * one, figures, Comm()) == 3 * one / (1 - 3 * 0.125)
    assert machine.matvec_bandwidth(plan, 2**40, figures | {"launch_seconds": 0.0}, Comm()) == machine.MATRICES * one
    assert machine.matvec_bandwidth(plan, 8 * one, figures, Comm()) == 1e12


def test_this_machine():
    """One rank has no links; everything else is measured."""
    found = machine.measure_machine(plan_of(), Comm(), lambda phase: None)
    assert found.pop("sum_latency") is None and found.pop("sum_bandwidth") is None
    assert len(found) == 5 and min(found.values()) > 0
    assert found["matvec_bandwidth"] <= found["memory_bandwidth"]
