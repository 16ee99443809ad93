"""mlx-lm's own model class, cut by its own `shard` and driven by its own `generate_step`, on our weights and caches."""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from m3dist.bench.runners import Progress
from m3dist.bench.subject import check_peer, published
from m3dist.comm import Comm
from m3dist.errors import M3Error, PlanError
from m3dist.model import Model
from m3dist.model.text import DTYPES
from m3dist.plan import Plan
from m3dist.tensors import split_name

VERSION = "0.32.2"  # whose model has been read and compared with ours


class Peer:
    """mlx-lm's model with its generator; the calls are those of runners.Ours."""

    name = "mlx-lm"

    def __init__(self, model: nn.Module, kv_heads: tuple[int, int], progress: Progress):
        from mlx_lm.generate import generate_step, generation_stream

        self.model, self.kv_heads, self.progress = model, kv_heads, progress
        self.generate_step, self.stream = generate_step, generation_stream

    @property
    def weights_bytes(self) -> int:
        return sum(x.nbytes for _, x in tree_flatten(self.model.parameters()))

    def make_cache(self) -> list[Any]:
        return self.model.make_cache()

    def fill(self, cache: list[Any], contents: Iterator[list[mx.array]]) -> None:
        """Append each layer's K, V and, on sparse layers, index K: [1, heads, context, dim]."""
        for layer, (keys, values, *index_keys) in zip(cache, contents):
            layer[0].update_and_fetch(keys, values)
            for index in index_keys:  # beside values without columns, as mlx-lm's attention keeps them
                layer[1].update_and_fetch(index, mx.zeros((*index.shape[:3], 0), index.dtype))
            mx.eval(layer.state)

    def length(self, cache: list[Any]) -> int:
        return cache[0].size()

    def trim(self, cache: list[Any], tokens: int) -> None:
        for layer in cache:
            layer.trim(tokens)

    def tokens(self, prompt: list[int], count: int, cache: list[Any]) -> Iterator[int]:
        """`count` greedy tokens after the cache and the prompt, in chunks of mlx-lm's own size."""

        def processed(done: int, total: int) -> None:
            self.progress(f"mlx-lm's prefill of {total} tokens, at {done}")

        steps = self.generate_step(
            mx.array(prompt, dtype=mx.uint32),
            self.model,
            max_tokens=count,
            prompt_cache=cache,
            prompt_progress_callback=processed,
        )
        for token, _ in steps:
            self.progress("mlx-lm's decode")
            yield token

    def logits(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """tokens [1, n] -> [1, n, vocabulary]."""
        return self.model(tokens, cache)

    def finish(self) -> None:
        """Wait for the step that generate_step starts beyond the last token."""
        mx.synchronize(self.stream)


def build_peer(ours: Model, plan: Plan, comm: Comm, progress: Progress) -> Peer:
    """mlx-lm's model with this rank's part of our weights. Nothing whole is ever computed, embedding and head aside,
    which mlx-lm keeps whole on each rank.

    Raises PlanError where mlx-lm cannot run this world or cuts otherwise than our plan.
    """
    check_peer(ours.args, comm.world)
    try:
        from mlx_lm.models.minimax_m3_vl import Model as PeerModel
        from mlx_lm.models.minimax_m3_vl import ModelArgs as PeerArgs
    except ImportError as error:
        raise M3Error(f"--vs mlx-lm needs mlx-lm with MiniMax-M3 ({error}): pip install mlx-lm=={VERSION}") from None
    model = PeerModel(PeerArgs.from_dict(published(ours.args)))
    quantise(model, plan)
    if comm.world > 1:
        model.shard(comm.group)
    shapes = {name: x.shape for name, x in tree_flatten(model.parameters())}
    arrays = {}
    for name, x in ours.held_arrays():
        progress(f"build of mlx-lm's {name}")
        for theirs, part in peer_arrays(name, x, plan, comm).items():
            # Ours may be parts of joined arrays; a strided weight would cost mlx-lm a copy with every product.
            arrays[theirs] = mx.contiguous(even_part(theirs, part, shapes, comm))
            mx.eval(arrays[theirs])
    model.load_weights(list(arrays.items()))
    model.eval()
    if mx.metal.is_available():  # what mlx-lm's own generators do; here for both models, which are in memory together
        mx.set_wired_limit(mx.device_info()["max_recommended_working_set_size"])
    each = ours.args.num_key_value_heads // comm.world
    return Peer(model, (comm.rank * each, comm.rank * each + each), progress)


def quantise(model: nn.Module, plan: Plan) -> None:
    """Quantise each module as ours is; lazily, the weights are replaced before any is computed."""

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        name = path.replace(".gate_proj", ".gate_up_proj").replace(".up_proj", ".gate_up_proj")
        q = plan.inventory.quantization.get(name)
        if q is None or not hasattr(module, "to_quantized"):
            return False
        return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

    if plan.inventory.quantization:
        nn.quantize(model, class_predicate=predicate)


def peer_arrays(name: str, x: mx.array, plan: Plan, comm: Comm) -> dict[str, mx.array]:
    """One tensor we hold -> mlx-lm's names and arrays: gate apart from up, vocabulary rows of all ranks, and the
    router's scales in the model's dtype, as mlx-lm's converter writes them."""
    module, _ = split_name(name)
    if module.endswith(".gate_up_proj"):
        gate, up = mx.split(x, 2, axis=-2)
        return {
            name.replace(".gate_up_proj", ".gate_proj"): gate,
            name.replace(".gate_up_proj", ".up_proj"): up,
        }
    if module.endswith((".embed_tokens", ".lm_head")):
        return {name: whole_rows(x, [share.spans["vocabulary"] for share in plan.shares], comm)}
    if module.endswith(".block_sparse_moe.gate") and x.dtype == mx.float32:
        return {name: x.astype(DTYPES[plan.inventory.dtype])}
    return {name: x}


def whole_rows(x: mx.array, spans: list[tuple[int, int]], comm: Comm) -> mx.array:
    """Rows [first, last) of each rank, joined in order."""
    if comm.world == 1:
        return x
    counts = [last - first for first, last in spans]
    everyone = comm.all_gather(mx.pad(x, [(0, max(counts) - x.shape[0])] + [(0, 0)] * (x.ndim - 1)))
    return mx.concatenate([everyone[rank][:count] for rank, count in enumerate(counts)])


def even_part(name: str, x: mx.array, shapes: Mapping[str, tuple[int, ...]], comm: Comm) -> mx.array:
    """`x` where it is what mlx-lm holds, else this rank's even part of it, where we hold it whole."""
    wanted = shapes[name]
    for axis, (have, need) in enumerate(zip(x.shape, wanted)):
        if have == need * comm.world and comm.world > 1:
            x = mx.split(x, comm.world, axis=axis)[comm.rank]
    if x.shape != wanted:
        raise PlanError(
            f"--vs mlx-lm: {name} is {list(x.shape)} on rank {comm.rank} of our plan and {list(wanted)} in mlx-lm's,"
            " which cuts evenly; leave --weights and --experts out, or use another number of ranks"
        )
    return x
