"""What the machine itself can do, measured: memory and link, a kernel's launch, a product. Floors are made of these."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.bench.weights import random_tensor
from m3dist.comm import Comm
from m3dist.layout import Slice
from m3dist.model.dense import attend_causal
from m3dist.model.positions import Positions
from m3dist.model.products import multiply
from m3dist.model.text import DTYPES
from m3dist.plan import Plan
from m3dist.tensors import Module, split_name

SUMS = 100  # in a chain
LAUNCHES = 400
MATRICES = 64  # at most, one after another


def measure_machine(plan: Plan, comm: Comm, progress: Callable[[str], None]) -> dict[str, Any]:
    """This rank's figures, taken on all ranks at once, as they are used:

    memory_bandwidth (bytes/s), sum_latency (s, one token's hidden state), sum_bandwidth (bytes/s), launch_seconds (one
    small dependent operation), matmul_flops (FLOP/s in the weights' own format), matvec_bandwidth (bytes/s of weights
    that one token's products read), attention_flops (FLOP/s). What needs peers is None without.
    """
    gpu = mx.default_device().type != mx.DeviceType.cpu
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    figures: dict[str, Any] = {}
    for name, measure in {
        "memory_bandwidth": lambda: memory_bandwidth(2**30 if gpu else 2**28, comm),
        "sum_latency": lambda: sum_latency(c.hidden_size, dtype, comm),
        "sum_bandwidth": lambda: sum_bandwidth(2**23, dtype, comm),
        "launch_seconds": lambda: launch_seconds(c.hidden_size, dtype, comm),
        "matmul_flops": lambda: matmul_flops(plan, 2048 if gpu else 128, comm),
        "matvec_bandwidth": lambda: matvec_bandwidth(plan, 2**29 if gpu else 2**24, figures, comm),
        "attention_flops": lambda: attention_flops(plan, 512 if gpu else 128, 4096 if gpu else 1024, comm),
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


def matvec_bandwidth(plan: Plan, size: int, figures: Mapping[str, float], comm: Comm) -> float:
    """Bytes/s of weights in products of one token, one after another, less a launch each: over `size` bytes of
    different matrices, more than a cache holds.

    No faster than memory: of small matrices on a fast GPU a launch is all there is.
    """
    x = mx.random.normal((1, plan.inventory.config.hidden_size)).astype(DTYPES[plan.inventory.dtype])
    products, nbytes = [], 0
    while nbytes < size and len(products) < MATRICES:
        product, held = expert_product(plan, len(products))
        products.append(product)
        nbytes += held

    def chain() -> mx.array:
        y = products[0](x)
        for product in products[1:]:
            y = product(mx.depends(x, y))
        return y

    seconds = median(timed(chain, comm)) - len(products) * figures["launch_seconds"]
    return nbytes / max(seconds, nbytes / figures["memory_bandwidth"])


def expert_product(plan: Plan, seed: int) -> tuple[Callable[[mx.array], mx.array], int]:
    """x [rows, hidden] -> x times an expert's gate and up [rows, 2 * intermediate_size], as the model multiplies; and
    the bytes these take."""
    c = plan.inventory.config
    known = [name for name in plan.inventory.quantization if name.endswith(".gate_up_proj")]
    q = plan.inventory.quantization[known[0]] if known else None
    module = Module(f"probe{seed}", (2 * c.intermediate_size, c.hidden_size))
    arrays = {}
    for name, spec in module.tensors(plan.inventory.dtype, q).items():
        leaf = split_name(name)[1]
        arrays[leaf] = random_tensor(name, leaf, spec, Slice(None), module.shape, q, 0)
    mx.eval(arrays)
    linear = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
    if q:
        linear = linear.to_quantized(q.group_size, q.bits, q.mode)
    linear.update(arrays)
    return partial(multiply, linear), sum(x.nbytes for x in arrays.values())


def attention_flops(plan: Plan, queries: int, keys: int, comm: Comm) -> float:
    """FLOP/s of the last `queries` of `keys` tokens in all the model's heads: two products, 2 FLOP a value each."""
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]
    q = mx.random.normal((1, c.num_attention_heads, queries, c.head_dim)).astype(dtype)
    k, v = mx.random.normal((2, 1, c.num_key_value_heads, keys, c.head_dim)).astype(dtype)
    mx.eval(q, k, v)
    positions = Positions((keys - queries,), queries)
    seconds = median(timed(lambda: attend_causal(q, k, v, positions, c.head_dim**-0.5), comm))
    return 4 * c.num_attention_heads * c.head_dim * queries * (keys - (queries - 1) / 2) / seconds
