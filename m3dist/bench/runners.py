"""What is timed: our engine, one step ahead, on caches that may be filled with random keys and values."""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from m3dist import layout
from m3dist.bench.weights import key_of
from m3dist.cache import LayerCache
from m3dist.engine.alone import Request, generate_tokens
from m3dist.model import Model
from m3dist.model.text import DTYPES
from m3dist.plan import Plan
from m3dist.sample import Sampling

SKIPPED = 4  # tokens of a decode run before the clock starts: growing a full cache, filling the pipeline
# Nodes of MLX's graphs that only look at memory in another way.
VIEWS = {"AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze",
         "Transpose", "Unflatten", "View"}  # fmt: skip

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prefill:
    """One prompt: seconds to the first token, and the most bytes in use meanwhile above what was there before."""

    seconds: float
    peak_above_bytes: int


class Ours:
    """m3dist's model as `generate` runs it. mlx-lm's runner (peer.py) answers the same calls."""

    name = "m3dist"

    def __init__(self, model: Model, plan: Plan, prefill_chunk: int, progress: Progress):
        self.model, self.prefill_chunk, self.progress = model, prefill_chunk, progress
        self.kv_heads = layout.kv_heads(plan.shares[model.comm.rank], plan.inventory.config)

    @property
    def weights_bytes(self) -> int:
        return sum(x.nbytes for _, x in self.model.held_arrays())

    def make_cache(self) -> list[LayerCache]:
        return self.model.make_cache()

    def fill(self, cache: list[LayerCache], contents: Iterator[list[mx.array]]) -> None:
        """Append each layer's K, V and, on sparse layers, index K: [1, heads, context, dim]."""
        for layer, arrays in zip(cache, contents):
            layer.append(*arrays)
            mx.eval(layer.state)

    def length(self, cache: list[LayerCache]) -> int:
        return cache[0].offset

    def trim(self, cache: list[LayerCache], tokens: int) -> None:
        for layer in cache:
            layer.trim(tokens)

    def tokens(self, prompt: list[int], count: int, cache: list[LayerCache]) -> Iterator[int]:
        """`count` greedy tokens after the cache and the prompt."""
        request = Request(prompt, count, 0, self.prefill_chunk, [], Sampling(temperature=0))
        return generate_tokens(self.model, request, progress=self.progress, cache=cache)

    def logits(self, tokens: mx.array, cache: list[LayerCache]) -> mx.array:
        """tokens [1, n] -> [1, n, vocabulary]."""
        return self.model(tokens, cache)

    def finish(self) -> None:
        """Wait for what the last run left behind: nothing, each step was waited for."""


def decode(runner: Any, cache: Any, tokens: int) -> float:
    """Seconds a token, over `tokens` of them; the cache is as before afterwards."""
    context = runner.length(cache)
    times = [time.perf_counter() for _ in runner.tokens([1], tokens + SKIPPED, cache)]
    runner.finish()
    runner.trim(cache, runner.length(cache) - context)
    return (times[-1] - times[SKIPPED - 1]) / tokens


def prefill(runner: Any, cache: Any, prompt: list[int]) -> Prefill:
    """The time until a prompt's first token is on the host; the cache is as before afterwards."""
    context = runner.length(cache)
    mx.reset_peak_memory()
    before, began = mx.get_active_memory(), time.perf_counter()
    tokens = runner.tokens(prompt, 2, cache)  # the second token's step is started before the first one is awaited
    next(tokens)
    seconds = time.perf_counter() - began
    for _ in tokens:
        pass
    runner.finish()
    runner.trim(cache, runner.length(cache) - context)
    return Prefill(seconds, mx.get_peak_memory() - before)


def difference(runners: list[Any], caches: list[Any], tokens: list[int]) -> float:
    """The largest difference of two runners' logits after the same tokens, in units of the largest logit."""
    ours, theirs = (
        runner.logits(mx.array([tokens], dtype=mx.uint32), cache).astype(mx.float32)
        for runner, cache in zip(runners, caches)
    )
    found = (mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item()
    for runner, cache in zip(runners, caches):
        runner.trim(cache, len(tokens))
    return found


def random_cache(plan: Plan, heads: layout.Span, context: int) -> Iterator[list[mx.array]]:
    """Each layer's K, V and, on sparse layers, index K: [1, heads, context, dim], of unit variance.

    Of KV heads [first, last); a head's values are the same for whoever holds it.
    """
    c, dtype = plan.inventory.config, DTYPES[plan.inventory.dtype]

    def rows(layer: int, what: str, head: int, dim: int) -> mx.array:
        return mx.random.normal((1, 1, context, dim), dtype=dtype, key=key_of(f"{what} of layer {layer}, head {head}"))

    for layer, sparse in enumerate(c.sparse_attention_freq):
        arrays = [
            mx.concatenate([rows(layer, what, head, c.head_dim) for head in range(*heads)], axis=1)
            for what in ("keys", "values")
        ]
        yield arrays + ([rows(layer, "index keys", 0, c.sparse_index_dim)] if sparse else [])


@contextmanager
def muted(model: Model) -> Iterator[None]:
    """A step without its communication. The ranks then run apart, so their numbers mean nothing."""
    model.comm.muted = True
    try:
        yield
    finally:
        model.comm.muted = False


def timed_steps(runner: Ours, cache: list[LayerCache], tokens: int) -> tuple[float, float]:
    """Seconds a token, as `decode`, and seconds of it in which Python built and submitted the next step.

    The latter is this thread's own time until async_eval returns: MLX makes it wait where much is queued already.
    """
    submitted: list[float] = []
    submit = mx.async_eval

    def noting(*arrays: Any) -> None:
        submit(*arrays)
        submitted.append(time.thread_time())

    context, hosts, times = runner.length(cache), [], []
    mx.async_eval = noting
    try:
        steps = runner.tokens([1], tokens + SKIPPED + 1, cache)
        for _ in range(tokens + SKIPPED):  # the token after these starts no step
            submitted.clear()
            asked = time.thread_time()
            next(steps)
            times.append(time.perf_counter())
            hosts.append(submitted[-1] - asked)
        for _ in steps:
            pass
    finally:
        mx.async_eval = submit
    runner.trim(cache, runner.length(cache) - context)
    return (times[-1] - times[SKIPPED - 1]) / tokens, sum(hosts[SKIPPED:]) / tokens


def count_operations(runner: Ours, cache: list[LayerCache]) -> dict[str, int]:
    """What the graph of one decode step holds, as it is submitted: sums, gathers, and all operations that compute.

    A world of one has no sums and no gathers.
    """
    graph, submit = io.StringIO(), mx.async_eval

    def reading(*arrays: mx.array) -> None:
        mx.export_to_dot(graph, *arrays)
        submit(*arrays)

    context = runner.length(cache)
    mx.async_eval = reading
    try:
        list(runner.tokens([1], 1, cache))
    finally:
        mx.async_eval = submit
    runner.trim(cache, runner.length(cache) - context)
    # A node with several outputs is written several times.
    nodes = dict(re.findall(r'{ (\d+) \[label ="([^"]*)"', graph.getvalue()))
    labels = list(nodes.values())
    return {
        "sums": labels.count("Sum AllReduce"),
        "gathers": labels.count("AllGather"),
        "operations": sum(label.partition(" ")[0] not in VIEWS for label in labels),
    }
