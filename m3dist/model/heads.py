"""Queries, keys, values and index heads of one input: one product, one norm and one RoPE for all their heads."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.config import ModelConfig
from m3dist.model.fusion import fused
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
        self._gain: tuple[list[mx.array], mx.array] | None = None

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
        mx.eval([x for _, _, x in self._slices], self._gains(self._counts()))

    def __call__(self, x: mx.array, offset: mx.array) -> dict[str, mx.array]:
        """x [rows, tokens, hidden] -> by name [rows, heads, tokens, dim], normalised and rotated but for the values.

        `offset` int32: the position of the first token, of all rows or of each."""
        rows, tokens = x.shape[:2]
        c, heads = self.config, self._product(x).reshape(rows, tokens, -1, self.dim)
        counts = self._counts()
        normed = sum(counts[name] for name in self.normed)
        turned = _normalise(heads[:, :, :normed], self._gains(counts), c.rms_norm_eps)
        turned = mx.fast.rope(
            _heads_first(turned),
            c.rotary_dim,
            traditional=False,
            base=c.rope_theta,
            scale=1.0,
            offset=offset,
        )
        found, first = {}, 0
        for name in self.normed:
            found[name] = turned[:, first : first + counts[name]]
            first += counts[name]
        for name in self.names[len(self.normed) :]:
            found[name] = _heads_first(heads[:, :, first : first + counts[name]])
            first += counts[name]
        return found

    def _counts(self) -> dict[str, int]:
        """Heads of each projection: how many, the arrays say."""
        return {name: self.attention[f"{name}_proj"]["weight"].shape[0] // self.dim for name in self.names}

    def _product(self, x: mx.array) -> mx.array:
        """[rows, tokens, hidden] -> [rows, tokens, all heads * dim]."""
        owner = self.attention
        if self._joined is None or any(owner[module][leaf] is not kept for module, leaf, kept in self._slices):
            return mx.concatenate([owner[f"{name}_proj"](x) for name in self.names], axis=-1)
        if "scales" not in self._joined:
            return x @ self._joined["weight"].T
        module = owner[f"{self.names[0]}_proj"]
        return mx.quantized_matmul(
            x,
            self._joined["weight"],
            self._joined["scales"],
            self._joined.get("biases"),
            transpose=True,
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )

    def _gains(self, counts: dict[str, int]) -> mx.array:
        """Every normalised head's gain, float32 [heads, dim], computed once for the norms it was made from."""
        gains = [self.attention[f"{name}_norm"].float32_gain() for name in self.normed]
        if self._gain is None or any(a is not b for a, b in zip(self._gain[0], gains)):
            spread = [mx.broadcast_to(gain, (counts[name], self.dim)) for name, gain in zip(self.normed, gains)]
            self._gain = (gains, mx.concatenate(spread))
        return self._gain[1]


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
