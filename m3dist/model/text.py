"""MiniMax-M3's text model: embedding, layers, head. Built whole; `shard` or the loader make it one rank's part.

The module tree spells the published tensor names. The forward never asks for the world size: it computes with the
arrays it holds and shows its sums: two a layer, one where attention is replicated, and one for the embedding.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from m3dist import layout
from m3dist.cache import LayerCache
from m3dist.comm import Comm, whole_world
from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError
from m3dist.model import matvec, token_kernels
from m3dist.model.attention import Attention
from m3dist.model.fusion import Compiled
from m3dist.model.gpu import trusted
from m3dist.model.layers import DenseMLP, GemmaRMSNorm, prepare_swiglu
from m3dist.model.moe import SparseMoeBlock
from m3dist.model.positions import Positions
from m3dist.model.prefill import run_in_turns, sums_travel_apart
from m3dist.model.products import multiply
from m3dist.model.tuning import backend
from m3dist.plan import Plan, plan_world
from m3dist.sample import Candidates, Sampling, gather_candidates
from m3dist.tensors import LEAVES, Inventory, Quantization, infer_quantization, modules
from m3dist.translation import FP8_BLOCK, Assembly, translate

# safetensors' names of dtypes, and back
DTYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "U8": mx.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DecoderLayer(nn.Module):
    def __init__(self, c: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, index)
        self.post_attention_layernorm = GemmaRMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.moe_layer_freq[index]:
            self.block_sparse_moe = SparseMoeBlock(c)
        else:
            self.mlp = DenseMLP(c.hidden_size, c.dense_intermediate_size, c.swiglu_alpha, c.swiglu_limit)

    @property
    def feed_forward(self) -> SparseMoeBlock | DenseMLP:
        return self.block_sparse_moe if "block_sparse_moe" in self else self.mlp

    def begin(self, h: mx.array, x: mx.array, offset: mx.array) -> dict[str, mx.array]:
        """The residual stream h and its norm x, both [rows, tokens, hidden] -> h and the attention's heads."""
        return {"h": h} | self.self_attn.heads(x, offset)

    def end(self, h: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        """h before attention and what it found -> h, and what is still to be added to it: the next norm does."""
        h, x = self.post_attention_layernorm.add(h, self.self_attn.merge(attended))
        return h, self.feed_forward(x)


class TextModel(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(c, i) for i in range(c.num_hidden_layers)]
        self.norm = GemmaRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.vocab_size, self.first_row = c.vocab_size, 0
        self.comm = Comm()
        self.apart = False  # whether a prefill's sums travel apart from its compute
        self.compiled = Compiled()

    def __call__(self, tokens: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        """tokens [rows, n] -> the normalised last hidden state [rows, n, hidden], the same bits on every rank.

        Only attention depends on how much the cache holds. What lies between two attentions does not, so for single
        tokens it is compiled.
        """
        positions = Positions(tuple(cache[0].starts(tokens.shape[0])), tokens.shape[1])
        found = self._run("start", self._start, tokens, positions)
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache)):
            h = found.pop("h")
            attended = layer.self_attn.attend(found, positions, layer_cache)
            found = self._run(number, partial(self._between, number), h, attended, positions)
        return found["h"]

    def prefill(self, tokens: mx.array, cache: Sequence[LayerCache], chunk: int) -> None:
        """Take tokens [rows, n] into the cache, `chunk` at a time; nothing else of them is wanted.

        Chunks given together are computed side by side, which pays where sums travel apart. Memory holds the
        intermediate results of two layers, or of one layer a chunk; no submission grows with the model.
        """
        starts, parts = cache[0].starts(tokens.shape[0]), []
        for first in range(0, tokens.shape[1], chunk):
            part = tokens[:, first : first + chunk]
            positions = Positions(tuple(start + first for start in starts), part.shape[1])
            parts.append(self._stages(part, positions, cache))
        run_in_turns(parts, ahead=len(parts) if self.apart else 2)

    def _stages(
        self, tokens: mx.array, positions: Positions, cache: Sequence[LayerCache]
    ) -> Iterator[mx.array | list[mx.array]]:
        """Take tokens into the cache, layer by layer. Yields the end of each stage, to be submitted by itself: every
        sum where sums travel apart, else every layer's; and the last layer's cache, beyond which nothing is wanted."""
        h = self.embed(tokens)
        if self.apart:
            yield h
        x = self.layers[0].input_layernorm(h)
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache), start=1):
            attention = layer.self_attn
            heads = attention.heads(x, positions.offset)
            if number == len(self.layers):
                attention.remember(heads, layer_cache)
                yield layer_cache.state
                return
            attended = attention.attend(heads, positions, layer_cache)
            more = attention.merge(attended)
            if self.apart and attention.comm.world > 1:  # replicated attention has no sum
                yield more
            h, x = layer.post_attention_layernorm.add(h, more)
            more = layer.feed_forward(x)
            yield more
            h, x = self.layers[number].input_layernorm.add(h, more)

    def _run(self, name: Hashable, function: Callable[..., Any], *arguments: Any) -> dict[str, mx.array]:
        *arrays, positions = arguments
        if positions.tokens > 1:
            return function(*arrays, positions.offset)
        return self.compiled.call((name, self.comm.muted), function, *arrays, positions.offset)

    def _start(self, tokens: mx.array, offset: mx.array) -> dict[str, mx.array]:
        h, first = self.embed(tokens), self.layers[0]
        return first.begin(h, first.input_layernorm(h), offset)

    def _between(self, number: int, h: mx.array, attended: mx.array, offset: mx.array) -> dict[str, mx.array]:
        """From what layer `number` attended to, to the heads of the next layer or the last norm."""
        h, more = self.layers[number].end(h, attended)
        if number + 1 == len(self.layers):
            return {"h": self.norm.add(h, more)[1]}
        following = self.layers[number + 1]
        return following.begin(*following.input_layernorm.add(h, more), offset)

    def embed(self, tokens: mx.array) -> mx.array:
        """A token's row, from the rank that holds it: all others add zeros.

        The residual stream starts here, in the dtype of the norms; some quantised formats give bfloat16 in any case.
        """
        dtype, rows = self.norm.weight.dtype, self.embed_tokens.weight.shape[0]
        if token_kernels.embed_usable(self.embed_tokens):
            found = token_kernels.embed(tokens, self.embed_tokens, self.first_row, dtype)
            return found if rows == self.vocab_size else self.comm.all_sum(found)
        if rows == self.vocab_size:
            return self.embed_tokens(tokens).astype(dtype)
        local = tokens.astype(mx.int32) - self.first_row
        mine = (local >= 0) & (local < rows)
        found = mx.where(mine[..., None], self.embed_tokens(mx.where(mine, local, 0)), 0)
        return self.comm.all_sum(found.astype(dtype))


class LanguageModel(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.model = TextModel(c)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., hidden] -> logits of the vocabulary rows this rank holds."""
        return multiply(self.lm_head, hidden) if "lm_head" in self else self.model.embed_tokens.as_linear(hidden)


class Model(nn.Module):
    """MiniMax-M3. `args`: what ModelArgs.from_dict gives. Weights: `sanitize` and `load_weights`, or m3dist.loader."""

    def __init__(self, args: ModelConfig):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.language_model = LanguageModel(args)
        self.comm = Comm()
        self.vocabulary = (args.vocab_size,)  # rows of the head that each rank holds

    # -- forward --------------------------------------------------------------------------------------------------

    def __call__(
        self, tokens: mx.array, cache: Sequence[LayerCache] | None = None, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """Logits of the whole vocabulary, on every rank: tokens [rows, n] -> [rows, n, vocab_size].

        `cache` (from `make_cache`) holds what came before and takes these tokens in. Rows of unequal length are padded
        on the right, with `lengths` real tokens each; logits at padded places mean nothing.
        """
        return self.whole_vocabulary(self.local_logits(self.hidden(tokens, cache, lengths)))

    def hidden(
        self, tokens: mx.array, cache: Sequence[LayerCache] | None = None, lengths: Sequence[int] | None = None
    ) -> mx.array:
        """The normalised last hidden state [rows, n, hidden_size], the same bits on every rank."""
        cache = self.make_cache() if cache is None else cache
        if lengths is None:
            return self.language_model.model(tokens, cache)
        for layer_cache in cache:
            layer_cache.prepare(lengths)
        hidden = self.language_model.model(tokens, cache)
        for layer_cache in cache:
            layer_cache.finalize()
        return hidden

    def prefill(self, tokens: mx.array, cache: Sequence[LayerCache], chunk: int | None = None) -> None:
        """Take tokens [rows, n] into the cache, evaluated when this returns. They are computed `chunk` at a time (None:
        all at once); best `chunks_at_once` of them in a call."""
        self.language_model.model.prefill(tokens, cache, chunk or tokens.shape[1])

    @property
    def chunks_at_once(self) -> int:
        """Chunks of a prompt that `prefill` computes side by side to advantage."""
        return 2 if self.language_model.model.apart else 1

    def local_logits(self, hidden: mx.array) -> mx.array:
        """[..., hidden_size] -> logits of the vocabulary rows this rank holds."""
        return self.language_model.logits(hidden)

    def candidates(self, hidden: mx.array, sampling: Sampling, note: int = 0) -> Candidates:
        """The likeliest next tokens over all ranks, after the hidden state [hidden_size] of one position; and rank 0's
        note to all."""
        text, count = self.language_model.model, sampling.candidates(self.args.vocab_size)
        arguments = (hidden, mx.array([note], dtype=mx.uint32))
        return Candidates(
            *text.compiled.call(("candidates", count, self.comm.muted), partial(self._gather, count), *arguments)
        )

    def _gather(self, count: int, hidden: mx.array, note: mx.array) -> tuple[mx.array, ...]:
        # As a matrix of one row: MLX's quantised product on CUDA (0.32.4) fails on a vector.
        local, first = self.local_logits(hidden[None])[0], self.language_model.model.first_row
        if count == 1 and trusted(token_kernels.BEST):
            packets = self.comm.all_gather(token_kernels.best(local, first, hidden, note))
            return tuple(token_kernels.pick(packets))
        return gather_candidates(local, first, max(self.vocabulary), hidden, count, self.comm, note)

    def whole_vocabulary(self, local: mx.array) -> mx.array:
        """Every rank's local logits [..., rows held], joined: [..., vocab_size]."""
        if len(self.vocabulary) == 1:
            return local
        widest = max(self.vocabulary)
        padded = mx.pad(local, [(0, 0)] * (local.ndim - 1) + [(0, widest - local.shape[-1])])
        everyone = self.comm.all_gather(padded)
        return mx.concatenate([everyone[rank][..., :rows] for rank, rows in enumerate(self.vocabulary)], axis=-1)

    def make_cache(self) -> list[LayerCache]:
        """An empty cache, one entry a layer."""
        return [LayerCache(max(1, self.args.sparse_block_size)) for _ in self.layers]

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.language_model.model.layers

    # -- weights --------------------------------------------------------------------------------------------------

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Whole tensors of any layout m3dist reads -> this model's names and packing. Raises CheckpointError."""
        stored = {name: (x.shape, NAMES.get(x.dtype, str(x.dtype))) for name, x in weights.items()}
        translation = translate(self.args, stored)
        return {name: assemble(assembly, weights) for name, assembly in translation.assemblies.items()}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
        """What nn.quantize asks for each module: the router stays at 8 bits, group 64."""

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if path.endswith("block_sparse_moe.gate"):
                return {"group_size": 64, "bits": 8, "mode": "affine"}
            return hasattr(module, "to_quantized")

        return predicate

    def quantize_as(self, quantization: Mapping[str, Quantization | None]) -> None:
        """Turn modules into quantised ones, ready for weights already in that format."""
        wanted = {name: q for name, q in quantization.items() if q is not None}

        def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
            if path not in wanted or not hasattr(module, "to_quantized"):  # a module quantised before has none
                return False
            q = wanted[path]
            return {"group_size": q.group_size, "bits": q.bits, "mode": q.mode}

        if wanted:
            nn.quantize(self, class_predicate=predicate)

    def load_weights(self, file_or_weights: Any, strict: bool = True) -> nn.Module:
        """nn.Module's, but modules whose weights come with scales are quantised to match first."""
        if not isinstance(file_or_weights, str):
            file_or_weights = list(file_or_weights)
            self.quantize_as(self._inventory(dict(file_or_weights)).quantization)
        super().load_weights(file_or_weights, strict)
        self._prepare()
        return self

    def update(self, *arguments: Any, **options: Any) -> nn.Module:
        """nn.Module's. Weights replaced in another way must be followed by `forget`."""
        self.forget()
        return super().update(*arguments, **options)

    def update_modules(self, *arguments: Any, **options: Any) -> nn.Module:
        """nn.Module's, as nn.quantize calls it."""
        self.forget()
        return super().update_modules(*arguments, **options)

    def forget(self) -> None:
        """Let nothing compiled refer to weights that are no longer there."""
        self.language_model.model.compiled.forget()

    def _prepare(self) -> None:
        """Lay weights out as the forward wants them, and compute what depends on them alone."""
        text = self.language_model.model
        dtype = text.norm.weight.dtype
        for layer in self.layers:
            layer.self_attn.join()
            layer.self_attn.prepare(dtype)
            layer.input_layernorm.prepare(dtype)
            layer.post_attention_layernorm.prepare(dtype)
            if isinstance(layer.feed_forward, SparseMoeBlock):
                layer.feed_forward.prepare(dtype)
        for module in self.modules():
            matvec.prepare(module, dtype)
        text.norm.prepare(dtype)
        token_kernels.prepare(text.embed_tokens, dtype)
        prepare_swiglu(self.args.swiglu_alpha, self.args.swiglu_limit, dtype)
        self.forget()

    def held_arrays(self) -> list[tuple[str, mx.array]]:
        """Name and array of everything this rank holds."""
        return tree_flatten(self.parameters())

    def inventory(self) -> Inventory:
        """The formats of the weights this (whole) model holds."""
        return self._inventory(dict(self.held_arrays()))

    def _inventory(self, weights: Mapping[str, mx.array]) -> Inventory:
        found = {}
        for name, module in modules(self.args).items():
            leaves = {leaf: weights[f"{name}.{leaf}"] for leaf in LEAVES if f"{name}.{leaf}" in weights}
            stored = {leaf: (x.shape, NAMES[x.dtype]) for leaf, x in leaves.items()}
            found[name] = infer_quantization(module, stored)
        norm = weights.get("language_model.model.norm.weight")
        dtype = "F32" if norm is None else NAMES[norm.dtype]
        return Inventory(self.args, dtype, {name: q for name, q in found.items() if q})

    # -- the cut --------------------------------------------------------------------------------------------------

    def shard(
        self,
        group: mx.distributed.Group | Comm | None = None,
        weights: Sequence[float] | None = None,
        experts: str = "columns",
        attention: str = "heads",
    ) -> Plan:
        """Keep this rank's part of the whole model, by the same plan the loader follows; returns the plan.

        `group` None is mx.distributed's own world; `weights` one number a rank for unequal ranks.
        """
        comm = whole_world() if group is None else group if isinstance(group, Comm) else Comm(group)
        plan = plan_world(self.inventory(), comm.world, weights, experts, attention)
        slices = plan.slices(comm.rank)
        held = {name: take(x, slices[name]) for name, x in self.held_arrays()}
        self.hold(plan, comm, held)
        return plan

    def hold(self, plan: Plan, comm: Comm, arrays: dict[str, mx.array]) -> None:
        """Become rank `comm.rank` of `plan` with these arrays, by tensor name: takes them over, leaving `arrays` empty.
        Raises CheckpointError where one is missing, left over or of another shape than planned."""
        share, specs = plan.shares[comm.rank], plan.held_specs(comm.rank)
        if odd := sorted(specs.keys() ^ arrays.keys()):
            raise CheckpointError(f"{odd[0]} is {'missing' if odd[0] in specs else 'left over'} (of {len(odd)} such)")
        for name, spec in specs.items():
            if arrays[name].shape != spec.shape:
                raise CheckpointError(f"{name} is {list(arrays[name].shape)}, the plan says {list(spec.shape)}")
        self.quantize_as(plan.inventory.quantization)
        self.update(tree_unflatten(list(arrays.items())))
        arrays.clear()  # else joining would keep what it replaces
        self.vocabulary = tuple(b - a for a, b in (s.spans["vocabulary"] for s in plan.shares))
        text = self.language_model.model
        text.first_row = share.spans["vocabulary"][0]
        for layer in self.layers:
            layer.self_attn.set_groups(layout.head_groups(share, self.args))
            if plan.experts == "whole" and isinstance(layer.feed_forward, SparseMoeBlock):
                layer.feed_forward.first_expert = share.spans["whole_expert"][0]
            layer.self_attn.comm = Comm() if plan.attention == "replicated" else comm  # all heads: nothing to sum
            layer.feed_forward.comm = comm
        self.comm = text.comm = comm
        text.apart = sums_travel_apart(comm.world, backend())
        self._prepare()


def take(x: mx.array, part: layout.Slice) -> mx.array:
    """The slice of a whole array, contiguous: a packed product refuses strided weights."""
    if part.axis is None:
        return x
    moved = x.swapaxes(part.axis, 0)
    pieces = [moved[start:stop] for start, stop in part.spans]
    return mx.contiguous(mx.concatenate(pieces).swapaxes(part.axis, 0))


def assemble(assembly: Assembly, weights: Mapping[str, mx.array]) -> mx.array:
    """One whole tensor of ours from stored ones in memory; the loader does the same from files, a slice at a time."""
    spec, rows, sources = assembly.spec, [], {}
    for piece in assembly.pieces:
        if piece.tensor not in sources:  # a stack gives many pieces: dequantised once, not once a piece
            x = weights[piece.tensor]
            if piece.scale:
                x = _dequantize_blocks(x, weights[piece.scale])
            elif spec.dtype == "U32" and x.dtype == mx.uint8:
                x = x.view(mx.uint32)  # four FP8 values a word, as MLX's mxfp8 has them
            sources[piece.tensor] = x.reshape(-1, x.shape[-1])
        rows.append(sources[piece.tensor][piece.row : piece.row + piece.rows])
    whole = rows[0] if len(rows) == 1 else mx.concatenate(rows)
    return whole.reshape(spec.shape).astype(DTYPES[spec.dtype])


def _dequantize_blocks(x: mx.array, scale: mx.array) -> mx.array:
    """FP8 bytes [..., rows, columns] times one float a 128 x 128 block -> float32."""
    spread = mx.repeat(mx.repeat(scale.astype(mx.float32), FP8_BLOCK, axis=-1), FP8_BLOCK, axis=-2)
    return mx.from_fp8(x, mx.float32) * spread[..., : x.shape[-2], : x.shape[-1]]
