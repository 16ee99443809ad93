"""Products with a model's matrices, quantised or not, by the fastest way there is for so many rows."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from m3dist.model import cpu, matvec
from m3dist.tensors import LEAVES

Matrix = Mapping[str, mx.array]  # by leaf: weight, and where it is quantised scales and biases
PIECE = 1 << 20  # bytes of a matrix that are dequantised at a time: they stay in a core's cache


def multiply(module: nn.Module, x: mx.array, matrix: Matrix | None = None) -> mx.array:
    """x [..., columns] times the matrix [rows, columns] of a linear module without bias -> [..., rows].

    `matrix`: another than the module's own, in its format."""
    matrix = module if matrix is None else matrix
    if x.size == x.shape[-1] and matvec.usable(module, x, 1):
        return multiply_vector(module, matrix, x)
    if cpu.usable(x) and pays(module, x.size // x.shape[-1]):
        rows = x.reshape(-1, x.shape[-1])
        out = cpu.empty(rows.shape[0], matrix["weight"].shape[0])
        _multiply_into(cpu.view(out), cpu.view(rows), module, matrix)
        return out.reshape(*x.shape[:-1], -1)
    if "scales" not in matrix:
        return x @ matrix["weight"].T
    leaves = (matrix.get(leaf) for leaf in LEAVES)
    return mx.quantized_matmul(x, *leaves, True, module.group_size, module.bits, module.mode)


def multiply_vector(module: nn.Module, matrix: Matrix, x: mx.array) -> mx.array:
    """One vector x [..., columns] times a matrix of `module`'s format -> [..., rows]; matvec must be usable."""
    weight, scales, biases = matrix["weight"], matrix["scales"], matrix["biases"]
    out = matvec.matvec(x.reshape(1, -1), weight, scales, biases, module.bits, module.group_size)
    return out.reshape(*x.shape[:-1], -1)


def multiply_blocks(module: nn.Module, x: mx.array, owners: mx.array) -> mx.array:
    """x float32 [blocks, size, columns], each block times one of `module`'s matrices [matrices, rows, columns], that of
    owners [blocks], which ascend -> [blocks, size, rows]. On the CPU."""
    out = cpu.empty(*x.shape[:2], module.weight.shape[1])
    source, target, last = cpu.view(x), cpu.view(out), 0
    for owner, count in enumerate(np.bincount(cpu.view(owners))):
        first, last = last, last + count
        if count:
            # A slice is a view; what an integer selects would be a copy.
            matrix = {leaf: module[leaf][owner : owner + 1].squeeze(0) for leaf in LEAVES if leaf in module}
            _multiply_into(target[first:last], source[first:last], module, matrix)
    return out


def pays(module: nn.Module, rows: float) -> bool:
    """Whether dequantising a matrix for a product with so many rows pays on the CPU.

    It takes as long as MLX's own product with 13 to 23 rows in formats whose numbers MLX unpacks slowly, and with 1 to
    7 in the others.
    """
    slow = getattr(module, "bits", 8) in (3, 5, 6) or getattr(module, "mode", "") in ("mxfp4", "nvfp4")
    return rows >= (24 if slow else 8)


def _multiply_into(out: np.ndarray, x: np.ndarray, module: nn.Module, matrix: Matrix) -> None:
    """x [..., columns] times a matrix [rows, columns] -> out [..., rows]."""
    step = max(1, PIECE // (4 * x.shape[-1]))
    for first in range(0, out.shape[-1], step):
        piece = {leaf: matrix[leaf][first : first + step] for leaf in LEAVES if leaf in matrix}
        np.matmul(x, cpu.view(_dense(module, piece)).T, out=out[..., first : first + step])


def _dense(module: nn.Module, matrix: Matrix) -> mx.array:
    """float32 [rows, columns]; with scales in float32, as MLX's products with float32 have them."""
    if "scales" not in matrix:
        return matrix["weight"].astype(mx.float32)
    weight, *rest = (matrix[leaf] for leaf in LEAVES if leaf in matrix)
    rest = [x if x.dtype == mx.uint8 else x.astype(mx.float32) for x in rest]
    form = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return mx.dequantize(weight, *rest, **form, dtype=mx.float32)
