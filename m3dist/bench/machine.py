"""What the machine itself can do, measured: memory and link, a kernel's launch, a product. Floors are made of these."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.bench.weights import random_tensor
from m3dist.comm import Comm
from m3dist.config import ModelConfig
from m3dist.layout import Slice
from m3dist.model.decode import attend_one
from m3dist.model.dense import attend_causal
from m3dist.model.moe import SwitchMLP
from m3dist.model.positions import Positions
from m3dist.model.products import multiply
from m3dist.model.sparse import attend_sparse, select_blocks
from m3dist.model.text import DTYPES
from m3dist.plan import Plan
from m3dist.tensors import Module, Quantization, split_name

SUMS = 100  # in a chain
LAUNCHES = 400
MATRICES, PASSES = 4, 4  # one matrix after another, all of them so many times
READINGS = 8  # of K and V, one after another
FEW_ROWS = 24  # of a product on the CPU that dequantises its matrix first, whatever the format (products.pays)
ROWS_AN_EXPERT = 64  # 2,048 tokens of MiniMax-M3, or 512 of a model with 32 experts


def measure_machine(plan: Plan, comm: Comm, progress: Callable[[str], None]) -> dict[str, Any]:
    """This rank's figures, taken on all ranks at once, as they are used:

    memory_bandwidth (bytes/s), sum_latency (s, one token's hidden state), sum_bandwidth (bytes/s), launch_seconds (one
    small dependent operation). Of products in the weights' own format: matmul_flops (FLOP/s, many tokens),
    unpack_bandwidth (bytes/s of weights dequantised before they are multiplied by many tokens), expert_flops (FLOP/s
    of tokens brought together by expert, beyond unpacking), matvec_bandwidth (bytes/s of weights that one token's
    products read). Of attention: attention_bandwidth (bytes/s of K and V that one token reads), attention_flops
    (FLOP/s, many tokens); index_flops (FLOP/s of choosing blocks for many tokens) and selected_bandwidth (bytes/s of
    the K and V that many tokens chose, each its own).

    None: what needs peers, of a rank alone; blocks, of a model without sparse layers; unpacking, on a GPU, whose
    products do it on the way.
    """
    gpu = mx.default_device().type != mx.DeviceType.cpu
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    figures: dict[str, Any] = {}
    for name, measure in {
        "memory_bandwidth": lambda: memory_bandwidth(2**30 if gpu else 2**28, comm),
        "sum_latency": lambda: sum_latency(c.hidden_size, dtype, comm),
        "sum_bandwidth": lambda: sum_bandwidth(2**23, dtype, comm),
        "launch_seconds": lambda: launch_seconds(c.hidden_size, dtype, comm),
        "matmul_flops": lambda: matmul_flops(plan, 2048 if gpu else 512, comm),
        "unpack_bandwidth": lambda: None if gpu else unpack_bandwidth(plan, figures, comm),
        "expert_flops": lambda: expert_flops(plan, 32 if gpu else 8, figures, comm),
        "matvec_bandwidth": lambda: matvec_bandwidth(plan, 2**30 if gpu else 2**24, figures, comm),
        "attention_bandwidth": lambda: attention_bandwidth(plan, 2**16 if gpu else 2**12, figures, comm),
        "attention_flops": lambda: attention_flops(plan, 2048 if gpu else 128, 16384 if gpu else 1024, comm),
        "index_flops": lambda: index_flops(plan, 2048 if gpu else 128, 32768 if gpu else 8192, comm),
        "selected_bandwidth": lambda: selected_bandwidth(plan, 512 if gpu else 32, comm),
    }.items():
        progress(f"measurement of {name}")
        figures[name] = measure()
    return figures


def timed(compute: Callable[[], mx.array], comm: Comm, repeats: int = 7) -> list[float]:
    """Seconds of each of `repeats` evaluations, after one that does not count. The ranks begin each together."""
    seconds = []
    for _ in range(repeats + 1):
        comm.barrier()
        began = time.perf_counter()
        mx.eval(compute())
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def memory_bandwidth(size: int, comm: Comm) -> float:
    """Bytes/s read by a sum, or read and written by an addition, over `size` bytes: the better one."""
    x = mx.ones((size // 4,), dtype=mx.float32)
    mx.eval(x)
    reading = size / min(timed(lambda: x.sum(), comm, repeats=4))
    copying = 2 * size / min(timed(lambda: x + 1.0, comm, repeats=4))
    return max(reading, copying)


def sum_latency(hidden: int, dtype: mx.Dtype, comm: Comm, repeats: int = 7) -> float | None:
    """Seconds of one sum of [1, 1, hidden]: a chain of dependent sums, less the same chain without them."""
    if comm.world == 1:
        return None

    def chain(sums: bool) -> mx.array:
        x = mx.ones((1, 1, hidden), dtype=dtype)
        for _ in range(SUMS):
            x = (comm.all_sum(x) if sums else x) * (1 / comm.world)
        return x

    with_sums = median(timed(lambda: chain(True), comm, repeats))
    return (with_sums - median(timed(lambda: chain(False), comm, repeats))) / SUMS


def sum_bandwidth(size: int, dtype: mx.Dtype, comm: Comm) -> float | None:
    """Bytes/s of a sum of `size` bytes."""
    if comm.world == 1:
        return None
    x = mx.ones((size // dtype.size,), dtype=dtype)
    mx.eval(x)
    return size / median(timed(lambda: comm.all_sum(x), comm))


def launch_seconds(hidden: int, dtype: mx.Dtype, comm: Comm) -> float:
    """Seconds of one small operation that waits for the one before it: a norm of [1, hidden]."""
    x, gain = mx.ones((1, hidden), dtype=dtype), mx.ones((hidden,), dtype=dtype)

    def chain() -> mx.array:
        y = x
        for _ in range(LAUNCHES):
            y = mx.fast.rms_norm(y, gain, 1e-6)
        return y

    return median(timed(chain, comm)) / LAUNCHES


def matmul_flops(plan: Plan, rows: int, comm: Comm) -> float:
    """FLOP/s of [rows, hidden] times an expert's gate and up, in their own format."""
    c = plan.inventory.config
    product, _ = expert_product(plan, 0)
    x = mx.random.normal((rows, c.hidden_size)).astype(DTYPES[plan.inventory.dtype])
    mx.eval(x)
    return 4 * rows * c.intermediate_size * c.hidden_size / median(timed(lambda: product(x), comm))


def unpack_bandwidth(plan: Plan, figures: Mapping[str, float], comm: Comm) -> float:
    """Bytes/s of weights that the CPU dequantises: a product with few rows, less its arithmetic.

    No faster than memory: weights that are not quantised need no unpacking.
    """
    c = plan.inventory.config
    product, nbytes = expert_product(plan, 0)
    x = mx.random.normal((FEW_ROWS, c.hidden_size)).astype(DTYPES[plan.inventory.dtype])
    mx.eval(x)
    computing = 4 * FEW_ROWS * c.intermediate_size * c.hidden_size / figures["matmul_flops"]
    seconds = median(timed(lambda: product(x), comm)) - computing
    return nbytes / max(seconds, nbytes / figures["memory_bandwidth"])


def expert_flops(plan: Plan, count: int, figures: Mapping[str, float | None], comm: Comm) -> float:
    """FLOP/s of `count` experts' MLPs with ROWS_AN_EXPERT tokens each, in no order, less unpacking their weights.

    No faster than a single product of many rows.
    """
    c = replace(plan.inventory.config, num_local_experts=min(count, plan.inventory.config.num_local_experts))
    experts, nbytes = random_experts(plan, c)
    pairs = ROWS_AN_EXPERT * c.num_local_experts // c.num_experts_per_tok * c.num_experts_per_tok
    chosen = (mx.arange(pairs, dtype=mx.uint32) % c.num_local_experts).reshape(-1, c.num_experts_per_tok)
    x = mx.random.normal((chosen.shape[0], c.hidden_size)).astype(DTYPES[plan.inventory.dtype])
    mx.eval(chosen, x)
    flops, unpacking = 6 * pairs * c.intermediate_size * c.hidden_size, figures["unpack_bandwidth"]
    seconds = median(timed(lambda: experts(x, chosen), comm)) - (nbytes / unpacking if unpacking else 0.0)
    return flops / max(seconds, flops / figures["matmul_flops"])


def random_experts(plan: Plan, c: ModelConfig) -> tuple[SwitchMLP, int]:
    """The routed experts of one layer of `c`, in the plan's format, and the bytes they take."""
    experts, q, count = SwitchMLP(c), expert_format(plan), c.num_local_experts
    if q:
        nn.quantize(experts, q.group_size, q.bits, mode=q.mode)
    shapes = {
        "gate_up_proj": (2 * c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }
    arrays = {name: random_matrix(plan, name, (count, *shape)) for name, shape in shapes.items()}
    experts.update(arrays)
    return experts, sum(x.nbytes for leaves in arrays.values() for x in leaves.values())


def matvec_bandwidth(plan: Plan, size: int, figures: Mapping[str, float], comm: Comm) -> float:
    """Bytes/s of weights in products of one token, one after another, less a launch each: over at least `size` bytes of
    different matrices, more than a cache holds. Several experts' rows make a matrix, so that the host keeps ahead of
    a GPU.

    No faster than memory.
    """
    x = mx.random.normal((1, plan.inventory.config.hidden_size)).astype(DTYPES[plan.inventory.dtype])
    _, one = expert_product(plan, 0)
    made = [expert_product(plan, seed, -(-size // (MATRICES * one))) for seed in range(MATRICES)]
    nbytes = PASSES * sum(held for _, held in made)

    def chain() -> mx.array:
        y = x
        for product, _ in made * PASSES:
            y = product(mx.depends(x, y))
        return y

    seconds = median(timed(chain, comm)) - PASSES * MATRICES * figures["launch_seconds"]
    return nbytes / max(seconds, nbytes / figures["memory_bandwidth"])


def expert_product(plan: Plan, seed: int, experts: int = 1) -> tuple[Callable[[mx.array], mx.array], int]:
    """x [rows, hidden] -> x times the gate and up of `experts` experts [rows, experts * 2 * intermediate_size], as the
    model multiplies; and the bytes these take."""
    c, q = plan.inventory.config, expert_format(plan)
    rows = experts * 2 * c.intermediate_size
    arrays = random_matrix(plan, f"probe{seed}", (rows, c.hidden_size))
    linear = nn.Linear(c.hidden_size, rows, bias=False)
    if q:
        linear = linear.to_quantized(q.group_size, q.bits, q.mode)
    linear.update(arrays)
    return partial(multiply, linear), sum(x.nbytes for x in arrays.values())


def expert_format(plan: Plan) -> Quantization | None:
    """That of the first gate and up there is."""
    known = [name for name in plan.inventory.quantization if name.endswith(".gate_up_proj")]
    return plan.inventory.quantization[known[0]] if known else None


def random_matrix(plan: Plan, name: str, shape: tuple[int, ...]) -> dict[str, mx.array]:
    """By leaf, a matrix of this shape in the experts' format, evaluated."""
    module, q, arrays = Module(name, shape), expert_format(plan), {}
    for tensor, spec in module.tensors(plan.inventory.dtype, q).items():
        leaf = split_name(tensor)[1]
        arrays[leaf] = random_tensor(tensor, leaf, spec, Slice(None), shape, q, 0)
    mx.eval(arrays)
    return arrays


def attention_bandwidth(plan: Plan, keys: int, figures: Mapping[str, float], comm: Comm) -> float:
    """Bytes/s of the K and V of `keys` tokens in one token's attention, all the model's heads: several such, each
    waiting for the one before it, less a launch each.

    No faster than memory.
    """
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    q = mx.random.normal((1, c.num_attention_heads, 1, c.head_dim)).astype(dtype)
    k, v = mx.random.normal((2, 1, c.num_key_value_heads, keys, c.head_dim)).astype(dtype)
    mx.eval(q, k, v)

    def chain() -> mx.array:
        y = q
        for _ in range(READINGS):
            y = attend_one(mx.depends(q, y), k, v, c.head_dim**-0.5)
        return y

    nbytes = READINGS * (k.nbytes + v.nbytes)
    seconds = median(timed(chain, comm)) - READINGS * figures["launch_seconds"]
    return nbytes / max(seconds, nbytes / figures["memory_bandwidth"])


def attention_flops(plan: Plan, queries: int, keys: int, comm: Comm) -> float:
    """FLOP/s of the last `queries` of `keys` tokens in all the model's heads: two products, 2 FLOP a value each."""
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    q = mx.random.normal((1, c.num_attention_heads, queries, c.head_dim)).astype(dtype)
    k, v = mx.random.normal((2, 1, c.num_key_value_heads, keys, c.head_dim)).astype(dtype)
    mx.eval(q, k, v)
    positions = Positions((keys - queries,), queries)
    seconds = median(timed(lambda: attend_causal(q, k, v, positions, c.head_dim**-0.5), comm))
    return 4 * c.num_attention_heads * c.head_dim * queries * (keys - (queries - 1) / 2) / seconds


def index_flops(plan: Plan, queries: int, keys: int, comm: Comm) -> float | None:
    """FLOP/s of the last `queries` of about `keys` tokens that choose their blocks, all index heads: 2 FLOP a value of
    the scores' product."""
    c = plan.inventory.config
    if not any(c.sparse_attention_freq):
        return None
    heads, dim, size = c.num_key_value_heads, c.sparse_index_dim, c.sparse_block_size
    keys = max(keys // size, 2 * c.sparse_topk_blocks) * size
    index_q, index_k = mx.random.normal((1, heads, queries, dim)), mx.random.normal((1, 1, keys, dim))
    positions = Positions((keys - queries,), queries).array
    mx.eval(index_q, index_k, positions)
    seconds = median(timed(lambda: select_blocks(index_q, index_k, positions, c), comm))
    return 2 * heads * dim * queries * keys / seconds


def selected_bandwidth(plan: Plan, queries: int, comm: Comm) -> float | None:
    """Bytes/s of the K and V that `queries` tokens choose, each its own blocks, and attend to, all the model's heads.

    Among twice as many keys as they choose, so that the choice, which counts here too, takes next to nothing.
    """
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    if not any(c.sparse_attention_freq):
        return None
    heads, budget = c.num_key_value_heads, c.sparse_topk_blocks * c.sparse_block_size
    queries = min(queries, budget)
    q = mx.random.normal((1, heads, c.query_heads_per_kv_head, queries, c.head_dim)).astype(dtype)
    k, v = mx.random.normal((2, 1, heads, 2 * budget, c.head_dim)).astype(dtype)
    index_q = mx.random.normal((1, heads, queries, c.sparse_index_dim))
    index_k = mx.random.normal((1, 1, 2 * budget, c.sparse_index_dim))
    positions = Positions((2 * budget - queries,), queries).array
    mx.eval(q, k, v, index_q, index_k, positions)
    seconds = median(timed(lambda: attend_sparse(q, k, v, index_q, index_k, positions, c, c.head_dim**-0.5), comm))
    return 2 * heads * c.head_dim * dtype.size * budget * queries / seconds
