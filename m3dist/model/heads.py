"""Queries, keys, values and index heads of one input: one product, one norm and one RoPE for all their heads."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.config import ModelConfig
from m3dist.model import kernels
from m3dist.model.fusion import fused
from m3dist.model.gpu import LANES, check, trusted
from m3dist.model.products import multiply
from m3dist.tensors import LEAVES


class HeadProjections:
    """The projections `<name>_proj` of an attention module into heads of `dim`; those with a `<name>_norm` come first.

    `join` lays their weights out one after another, as one matrix; the modules then hold its slices, under the
    published names. While they still do, one product serves all; otherwise (a module was replaced since, or their
    formats differ) each has its own, and only norm and RoPE are shared.
    """

    def __init__(self, attention: nn.Module, names: Sequence[str], dim: int, c: ModelConfig):
        self.attention, self.names, self.dim, self.config = attention, tuple(names), dim, c
        self.normed = tuple(name for name in names if f"{name}_norm" in attention)
        self._joined: dict[str, mx.array] | None = None
        self._slices: list[tuple[str, str, mx.array]] = []  # module, leaf and the array it had after join
        self._gain: tuple[list[mx.array], list[int], mx.array] | None = None

    def join(self) -> None:
        """One matrix for all the projections, where they have one format. Takes their memory once more, briefly."""
        modules = [self.attention[f"{name}_proj"] for name in self.names]
        self._joined, self._slices = None, []
        if len({_format(module) for module in modules}) > 1:
            return
        leaves = [leaf for leaf in LEAVES if leaf in modules[0]]
        joined = {leaf: mx.concatenate([module[leaf] for module in modules]) for leaf in leaves}
        mx.eval(joined)
        first = 0
        for name, module in zip(self.names, modules):
            stop = first + module.weight.shape[0]
            for leaf in leaves:
                module[leaf] = joined[leaf][first:stop]
                self._slices.append((f"{name}_proj", leaf, module[leaf]))
            first = stop
        self._joined = joined
        # The slices are views of the joined matrix: they take no memory of their own.
        mx.eval([x for _, _, x in self._slices])

    def __call__(self, x: mx.array, offset: mx.array) -> dict[str, mx.array]:
        """x [rows, tokens, hidden] -> by name [rows, heads, tokens, dim], normalised and rotated but for the values.

        `offset` int32: the position of the first token, of all rows or of each."""
        heads = self._product(x).reshape(*x.shape[:2], -1, self.dim)
        run = kernels.turn_heads if trusted(self._kernel(x.dtype)) else _turn_heads
        return dict(zip(self.names, run(heads, self._gains(), offset, *self._shape())))

    def prepare(self, dtype: mx.Dtype) -> None:
        """Compute what depends on the norms' weights alone, and see whether our kernel can be trusted with `dtype`."""
        gain, shape = self._gains(), self._shape()
        mx.eval(gain)
        if self.dim % LANES or self.config.rotary_dim // 2 % LANES:
            return
        heads = mx.random.normal((2, 3, sum(self._counts()), self.dim), key=mx.random.key(1)).astype(dtype)
        heads[0, 0, :, :3] = mx.array([math.nan, math.inf, -math.inf])
        arguments = heads, gain, mx.array([5, 70000], dtype=mx.int32), *shape
        check(self._kernel(dtype), lambda: kernels.turn_heads(*arguments), lambda: _turn_heads(*arguments))

    def _shape(self) -> tuple[tuple[kernels.Part, ...], int, float, float]:
        """The parts in their order, rotated dimensions, RoPE's base and the norms' epsilon."""
        c = self.config
        parts = tuple(
            kernels.Part(name, heads, normed=name in self.normed, wide=name.startswith("index"))  # scores are float32
            for name, heads in zip(self.names, self._counts())
        )
        return parts, c.rotary_dim, c.rope_theta, c.rms_norm_eps

    def _kernel(self, dtype: mx.Dtype) -> tuple[object, ...]:
        return ("turn_heads", *self._shape(), self.dim, dtype)

    def _counts(self) -> list[int]:
        """Heads of each projection: how many, the arrays say."""
        return [self.attention[f"{name}_proj"]["weight"].shape[0] // self.dim for name in self.names]

    def _product(self, x: mx.array) -> mx.array:
        """[rows, tokens, hidden] -> [rows, tokens, all heads * dim]."""
        owner = self.attention
        if self._joined is None or any(owner[module][leaf] is not kept for module, leaf, kept in self._slices):
            return mx.concatenate([multiply(owner[f"{name}_proj"], x) for name in self.names], axis=-1)
        return multiply(owner[f"{self.names[0]}_proj"], x, self._joined)

    def _gains(self) -> mx.array:
        """Every normalised head's gain, float32 [heads, dim], computed once for the norms and heads it was made for:
        a cut (Model.shard) leaves the norms as they were and takes heads away."""
        gains, counts = [self.attention[f"{name}_norm"].float32_gain() for name in self.normed], self._counts()
        if self._gain is None or self._gain[1] != counts or any(a is not b for a, b in zip(self._gain[0], gains)):
            spread = [mx.broadcast_to(gain, (count, self.dim)) for gain, count in zip(gains, counts)]
            self._gain = (gains, counts, mx.concatenate(spread))
        return self._gain[2]


def _turn_heads(
    x: mx.array,
    gain: mx.array,
    offset: mx.array,
    parts: tuple[kernels.Part, ...],
    rotated: int,
    base: float,
    eps: float,
) -> list[mx.array]:
    """kernels.turn_heads in MLX's own operations."""
    x, normed = _finite(x), sum(part.heads for part in parts if part.normed)
    turned = _heads_first(_normalise(x[:, :, :normed], gain, eps))
    turned = mx.fast.rope(turned, rotated, traditional=False, base=base, scale=1.0, offset=offset)
    found, first = [], 0
    for part in parts:
        last = first + part.heads
        heads = turned[:, first:last] if part.normed else _heads_first(x[:, :, first:last])
        found.append(heads.astype(mx.float32) if part.wide else heads)
        first = last
    return found


@fused
def _finite(x: mx.array) -> mx.array:
    """x with 0 for what is not finite."""
    return mx.where(mx.abs(x) < math.inf, x, 0)


@fused
def _normalise(heads: mx.array, gain: mx.array, eps: float) -> mx.array:
    """GemmaRMSNorm of each head [rows, tokens, heads, dim] with its own gain [heads, dim]."""
    unit = mx.fast.rms_norm(heads.astype(mx.float32), None, eps)
    return (unit * gain).astype(heads.dtype)


def _heads_first(heads: mx.array) -> mx.array:
    """[rows, tokens, heads, dim] -> [rows, heads, tokens, dim]; a single token needs no transposition."""
    rows, tokens, _, dim = heads.shape
    return heads.reshape(rows, -1, 1, dim) if tokens == 1 else heads.transpose(0, 2, 1, 3)


def _format(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for two modules' weights to be one matrix."""
    quantised = [getattr(module, word, None) for word in ("group_size", "bits", "mode")]
    return (type(module), *quantised, *((leaf, module[leaf].dtype) for leaf in LEAVES if leaf in module))
