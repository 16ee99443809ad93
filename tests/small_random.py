"""A small MiniMax-M3 of random weights, as `m3dist bench --random` makes it, for the bench's tests."""

import mlx.core as mx

from m3dist.bench.subject import random_inventory
from m3dist.bench.weights import random_weights
from m3dist.options import BenchOptions
from m3dist.plan import Plan, make_plan

SMALL = dict(
    hidden_size=256, num_attention_heads=8, head_dim=64, rotary_dim=32, sparse_index_dim=64, intermediate_size=256,
    dense_intermediate_size=512, shared_intermediate_size=256, num_local_experts=16, vocab_size=400,
    moe_layer_freq="0111", sparse_attention_freq="0111", sparse_block_size=16, sparse_topk_blocks=4,
)  # fmt: skip


def plan_of(random: str = "4bit", world: int = 1, layers: int = 4, **changes) -> Plan:
    """The plan of the first layers of SMALL with `changes`, in float32."""
    settings = tuple((name, str(value)) for name, value in (SMALL | changes).items())
    inventory, _ = random_inventory(BenchOptions(random=random, layers=layers, set=settings), "float32")
    return make_plan(inventory, world)


def build(plan: Plan, rank: int = 0) -> dict[str, mx.array]:
    """One rank's weights."""
    return random_weights(plan, rank, lambda phase: None)
