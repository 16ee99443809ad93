"""Products with quantised matrices, by the fastest kernel there is for so many vectors."""

import mlx.core as mx
import mlx.nn as nn

from m3dist.model import matvec


def multiply(module: nn.Module, x: mx.array) -> mx.array:
    """module(x), for a linear module without bias."""
    if x.size == x.shape[-1] and matvec.usable(module, x, 1):
        return multiply_vector(module, {leaf: module[leaf] for leaf in ("weight", "scales", "biases")}, x)
    return module(x)


def multiply_vector(module: nn.Module, arrays: dict[str, mx.array], x: mx.array) -> mx.array:
    """One vector x [..., columns] times a matrix of `module`'s format -> [..., rows]; matvec must be usable."""
    weight, scales, biases = arrays["weight"], arrays["scales"], arrays["biases"]
    out = matvec.matvec(x.reshape(1, -1), weight, scales, biases, module.bits, module.group_size)
    return out.reshape(*x.shape[:-1], -1)
