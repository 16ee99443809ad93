"""Sparse attention of a prefill chunk at growing depth: every method's time and memory, beside mlx-lm's masked way.

    python tests/bench_sparse.py                                      # on a GPU, in bfloat16
    python tests/bench_sparse.py --queries 64 --slots 4096,32768      # on the CPU, in float32

What is timed is one layer's attention core on one of two ranks: index scores, choice of blocks, attention of
`--queries` queries at the end of `--slots` keys, all random; no projections. "selection" is scores and choice alone,
what has a number of slices is attention alone. Milliseconds are the median of `--repeat` runs, on a GPU of several
layers queued one after another; memory is the peak of one layer above its inputs. Last, the largest difference from the
first method, relative to its largest value.
"""

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
from mlx_lm.models.minimax_m3_vl import Attention

from m3dist.model import sparse
from m3dist.model.tuning import backend

KV_HEADS, GROUP, DIM, INDEX_DIM = 2, 16, 128, 128
CONFIG = SimpleNamespace(sparse_block_size=128, sparse_topk_blocks=16, sparse_local_block=1, sparse_init_block=0)
SCALE = DIM**-0.5
LAYERS = 4  # queued one after another in a run


class Chunk:
    """Random inputs of a chunk, and what the methods share."""

    def __init__(self, queries: int, slots: int, dtype: mx.Dtype):
        mx.random.seed(0)
        self.queries, self.slots = queries, slots
        self.q = mx.random.normal((1, KV_HEADS, GROUP, queries, DIM)).astype(dtype)
        self.keys, self.values = (mx.random.normal((1, KV_HEADS, slots, DIM)).astype(dtype) for _ in range(2))
        self.index_q = mx.random.normal((1, KV_HEADS, queries, INDEX_DIM)).astype(dtype)
        self.index_k = mx.random.normal((1, 1, slots, INDEX_DIM)).astype(dtype)
        self.positions = mx.arange(slots - queries, slots)[None]
        self.wide_index_k = self.index_k.astype(mx.float32)
        self.blocks = sparse.select_blocks(self.index_q, self.wide_index_k, self.positions, CONFIG)
        mx.eval(vars(self))

    def mlx_lm(self) -> mx.array:
        """mlx-lm's own code for the mask, fed with these heads in place of its projections, then its attention."""

        def as_is(x: mx.array, offset: int = 0) -> mx.array:
            return x

        attention = SimpleNamespace(
            index_n_heads=KV_HEADS,
            index_head_dim=INDEX_DIM,
            index_block_size=CONFIG.sparse_block_size,
            index_topk_blocks=CONFIG.sparse_topk_blocks,
            index_local_blocks=CONFIG.sparse_local_block,
            num_attention_heads=KV_HEADS * GROUP,
            index_k_proj=lambda x: self.index_k[:, 0, -self.queries :],
            index_q_proj=lambda x: self.index_q.transpose(0, 2, 1, 3),
            index_k_norm=as_is,
            index_q_norm=as_is,
            index_rope=as_is,
        )
        cache = SimpleNamespace(update_and_fetch=lambda k, v: (self.index_k, v))
        x = mx.zeros((1, self.queries, 1))
        mask = Attention._block_mask(attention, x, "causal", self.slots - self.queries, cache)
        q = self.q.reshape(1, KV_HEADS * GROUP, self.queries, DIM)
        out = mx.fast.scaled_dot_product_attention(q, self.keys, self.values, scale=SCALE, mask=mask)
        return out.reshape(self.q.shape)

    def select(self) -> mx.array:
        return sparse.select_blocks(self.index_q, self.wide_index_k, self.positions, CONFIG)

    def attend(self, method: Callable[..., mx.array], slices: int) -> mx.array:
        """Attention alone, over blocks chosen before, in so many slices of queries."""
        out: list[mx.array] = []
        step = -(-self.queries // slices)
        for first in range(0, self.queries, step):
            part = slice(first, first + step)
            blocks = mx.depends(self.blocks[:, :, part], out[-1]) if out else self.blocks[:, :, part]
            out.append(
                method(self.q[:, :, :, part], self.keys, self.values, blocks, self.positions[:, part], 128, SCALE)
            )
        return mx.concatenate(out, axis=3)

    def ours(self) -> mx.array:
        return sparse.attend_sparse(
            self.q, self.keys, self.values, self.index_q, self.wide_index_k, self.positions, CONFIG, SCALE
        )


# -- candidates: to be dropped or adopted when measured ------------------------------------------------------------


def gathered_8_bytes(q, keys, values, blocks, positions, block_size, scale):
    """attend_gathered, with K and V copied in pieces of 8 bytes, rows of a block as one."""
    rows, heads, group, queries, dim = q.shape
    base = (mx.arange(rows * heads, dtype=mx.uint32) * (keys.shape[2] // block_size)).reshape(rows, heads, 1, 1)
    index = (blocks.astype(mx.uint32) + base).reshape(-1)

    def gather(buffer: mx.array) -> mx.array:
        wide = buffer.view(mx.uint64)
        out = wide.reshape(-1, block_size * wide.shape[-1])[index]
        return out.view(buffer.dtype).reshape(rows * heads * queries, 1, -1, dim)

    slots = blocks[..., None].astype(mx.int32) * block_size + mx.arange(block_size)
    seen = (slots <= positions[:, None, :, None, None]).reshape(rows * heads * queries, 1, 1, -1)
    grouped = q.transpose(0, 1, 3, 2, 4).reshape(-1, 1, group, dim)
    out = mx.fast.scaled_dot_product_attention(grouped, gather(keys), gather(values), scale=scale, mask=seen)
    return out.reshape(rows, heads, queries, group, dim).transpose(0, 1, 3, 2, 4)


def masked_bool(q, keys, values, blocks, positions, block_size, scale):
    """attend_masked with a mask of booleans."""
    rows, heads, group, queries, dim = q.shape
    slots = keys.shape[2]
    selected = mx.zeros((rows, heads, queries, slots // block_size), dtype=mx.bool_)
    selected = mx.put_along_axis(selected, blocks, mx.array(True), axis=-1)
    seen = mx.repeat(selected, block_size, axis=-1) & (mx.arange(slots) <= positions[:, None, :, None])
    out = mx.fast.scaled_dot_product_attention(
        q.reshape(rows * heads, group, queries, dim),
        keys.reshape(rows * heads, 1, slots, dim),
        values.reshape(rows * heads, 1, slots, dim),
        scale=scale,
        mask=seen.reshape(rows * heads, 1, queries, slots),
    )
    return out.reshape(q.shape)


def pairs(q, keys, values, blocks, positions, block_size, scale):
    """gather_mm over (query, block) pairs: K and V are never copied, scores are."""
    rows, heads, group, queries, dim = q.shape
    base = (mx.arange(rows * heads, dtype=mx.uint32) * (keys.shape[2] // block_size)).reshape(rows, heads, 1, 1)
    right = (blocks.astype(mx.uint32) + base).reshape(rows * heads * queries, -1)
    left = mx.broadcast_to(mx.arange(right.shape[0], dtype=mx.uint32)[:, None], right.shape)
    slots = blocks[..., None].astype(mx.int32) * block_size + mx.arange(block_size)
    seen = (slots <= positions[:, None, :, None, None]).reshape(*right.shape, 1, block_size)
    grouped = (q * scale).transpose(0, 1, 3, 2, 4).reshape(-1, group, dim)
    scores = mx.gather_mm(grouped, keys.reshape(-1, block_size, dim).swapaxes(-1, -2), left, right)
    scores = mx.where(seen, scores, -mx.inf).astype(mx.float32)
    weights = mx.exp(scores - scores.max(axis=(1, 3), keepdims=True))
    total = weights.sum(axis=(1, 3))[..., None]
    weights = weights.astype(q.dtype).reshape(-1, group, block_size)
    every = mx.arange(weights.shape[0], dtype=mx.uint32)
    out = mx.gather_mm(weights, values.reshape(-1, block_size, dim), every, right.reshape(-1))
    out = out.reshape(*right.shape, group, dim).astype(mx.float32).sum(axis=1) / total
    return out.astype(q.dtype).reshape(rows, heads, queries, group, dim).transpose(0, 1, 3, 2, 4)


def sorted_pairs(q, keys, values, blocks, positions, block_size, scale):
    """The same, sorted by block: one row of `gather_mm` for each query head, so that blocks are read once."""
    if keys.size // (block_size * keys.shape[-1]) > 1024:
        raise ValueError("CUDA's sorted gather_mm holds at most 1,024 matrices")
    rows, heads, group, queries, dim = q.shape
    base = (mx.arange(rows * heads, dtype=mx.uint32) * (keys.shape[2] // block_size)).reshape(rows, heads, 1, 1)
    right = (blocks.astype(mx.uint32) + base).reshape(rows * heads * queries, -1)
    order = mx.argsort(right.reshape(-1))
    back = mx.argsort(order)
    block = mx.repeat(right.reshape(-1)[order], group)
    slots = blocks[..., None].astype(mx.int32) * block_size + mx.arange(block_size)
    seen = (slots <= positions[:, None, :, None, None]).reshape(*right.shape, 1, block_size)
    grouped = (q * scale).transpose(0, 1, 3, 2, 4).reshape(-1, group * dim)[order // right.shape[1]]
    scores = mx.gather_mm(
        grouped.reshape(-1, 1, dim),
        keys.reshape(-1, block_size, dim).swapaxes(-1, -2),
        rhs_indices=block,
        sorted_indices=True,
    )
    scores = scores.reshape(-1, group * block_size)[back].reshape(*right.shape, group, block_size)
    scores = mx.where(seen, scores, -mx.inf).astype(mx.float32)
    weights = mx.exp(scores - scores.max(axis=(1, 3), keepdims=True))
    total = weights.sum(axis=(1, 3))[..., None]
    weights = weights.astype(q.dtype).reshape(-1, group * block_size)[order].reshape(-1, 1, block_size)
    out = mx.gather_mm(weights, values.reshape(-1, block_size, dim), rhs_indices=block, sorted_indices=True)
    out = out.reshape(-1, group * dim)[back].reshape(*right.shape, group, dim).astype(mx.float32).sum(axis=1) / total
    return out.astype(q.dtype).reshape(rows, heads, queries, group, dim).transpose(0, 1, 3, 2, 4)


# -------------------------------------------------------------------------------------------------------------------


def methods(chunk: Chunk) -> dict[str, Callable[[], mx.array]]:
    def attend(method: Callable[..., mx.array], slices: int) -> Callable[[], mx.array]:
        return lambda: chunk.attend(method, slices)

    found: dict[str, Callable[[], mx.array]] = {
        "mlx-lm": chunk.mlx_lm,
        "m3dist": chunk.ours,
        "selection": chunk.select,
    }
    for slices in (2, 4, 16) if mx.default_device().type == mx.DeviceType.gpu else (128,):
        for method in (sparse.attend_gathered, gathered_8_bytes, pairs, sorted_pairs):
            found[f"{method.__name__} / {slices}"] = attend(method, slices)
    for slices in (1, 4):
        for method in (sparse.attend_masked, masked_bool):
            found[f"{method.__name__} / {slices}"] = attend(method, slices)
    return found


def measure(run: Callable[[], mx.array], repeat: int, layers: int) -> tuple[float, float]:
    """Median seconds of one call, and its peak memory in bytes above what is held."""
    mx.eval(run())
    mx.synchronize()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    mx.synchronize()
    peak = mx.get_peak_memory() - held
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        for _ in range(layers):
            out = run()
            mx.async_eval(out)
        mx.eval(out)
        mx.synchronize()
        seconds.append((time.perf_counter() - began) / layers)
    return sorted(seconds)[len(seconds) // 2], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--slots", default="4096,8192,16384,32768,65536,131072", help="multiples of 128")
    parser.add_argument("--methods", default="", help="only those whose name contains one of these words")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype, layers = (mx.bfloat16, LAYERS) if gpu else (mx.float32, 1)
    wanted = arguments.methods.split(",")
    print(f"{backend()}, {dtype}, {arguments.queries} queries, MLX {mx.__version__}")
    for slots in map(int, arguments.slots.split(",")):
        chunk = Chunk(arguments.queries, slots, dtype)
        first = None
        for name, run in methods(chunk).items():
            if not any(word in name for word in wanted):
                continue
            try:
                seconds, peak = measure(run, arguments.repeat, layers)
                out = run().astype(mx.float32)
            except (RuntimeError, ValueError) as error:
                print(f"{slots:7d}  {name:24s} {str(error).splitlines()[0][:90]}", flush=True)
                continue
            first = out if first is None else first
            difference = ""
            if out.shape == first.shape:
                difference = f"{(mx.abs(out - first).max() / mx.abs(first).max()).item():.1e}"
            print(f"{slots:7d}  {name:24s} {seconds * 1e3:10.2f} ms {peak / 2**20:9.1f} MiB  {difference}", flush=True)
            del out
        del chunk, first
        mx.clear_cache()


if __name__ == "__main__":
    main()
