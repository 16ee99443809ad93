"""What the CPU computes through numpy, in float32: products of many rows, and attention of many queries.

The BLAS in MLX's wheels for Linux is the reference one, numpy's a fast one: 7 against 110 GFLOP/s on one core; and a
softmax takes 11 ns a number in MLX, 1 in numpy. numpy works in MLX's own memory, so MLX's counters see all of it. What
is computed here is computed at once, with all it depends on: it is not part of a lazy graph.
"""

import mlx.core as mx
import numpy as np

from m3dist.model.fusion import on_gpu

# Rows of a product whose results must not depend on other rows. numpy's BLAS (OpenBLAS 0.3.31) adds up in an order that
# depends on a row's place in the product; with so many rows it does not, on any of the CPUs it has kernels for.
TILE = 8


def usable(*arrays: mx.array) -> bool:
    """Whether these are computed with on the CPU, in the dtype that numpy is fast with."""
    return not on_gpu() and all(x.dtype == mx.float32 for x in arrays)


def view(x: mx.array) -> np.ndarray:
    """The memory of x, which is evaluated."""
    return np.array(x, copy=False)


def empty(*shape: int) -> mx.array:
    """Memory to be written through its `view`, before anything else uses it."""
    return mx.zeros(shape)


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """a @ b, both of three dimensions or more."""
    if not usable(a, b):
        return a @ b
    out = empty(*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    np.matmul(view(a), view(b), out=view(out))
    return out


def attend(q: mx.array, keys: mx.array, values: mx.array, scale: float, seen: mx.array) -> mx.array:
    """Softmax attention: q [rows, kv_heads, group, queries, dim]; keys, values [rows, kv_heads, slots, dim] -> as q.

    seen, bool, broadcast to [rows, kv_heads, group, queries, last]: which of the `last` slots each query sees; it sees
    all before them, or at least one of them.
    """
    rows, heads, group, queries, dim = q.shape
    merged = (rows, heads, group * queries, -1)  # one product for all heads of a group
    scores, out = empty(*q.shape[:-1], keys.shape[2]), empty(*q.shape)
    weights, total = view(scores), view(out)
    np.matmul((view(q) * np.float32(scale)).reshape(merged), view(keys).swapaxes(-1, -2), out=weights.reshape(merged))
    np.copyto(weights[..., weights.shape[-1] - seen.shape[-1] :], -np.inf, where=~view(seen))
    weights -= weights.max(axis=-1, keepdims=True)
    np.exp(weights, out=weights)
    np.matmul(weights.reshape(merged), view(values), out=total.reshape(merged))
    total /= weights.sum(axis=-1, keepdims=True)
    return out
