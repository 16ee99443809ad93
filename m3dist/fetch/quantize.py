"""Rows of a module in one format -> the same rows in another.

MLX quantises every group of a row for itself. So rows may come in blocks of any size, and columns be cut afterwards
between groups: the bits are those of the whole tensor.
"""

import mlx.core as mx
import numpy as np

from m3dist.numbers import HOLDERS
from m3dist.tensors import FLOATS, LEAVES, Quantization

VALUES = 1 << 20  # converted at a time: on the CPU, MLX takes up to 80 bytes for a value that becomes mxfp4 or nvfp4
_MLX_FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def requantise(
    leaves: dict[str, np.ndarray], source: Quantization | None, target: Quantization | None, dtype: str | None = None
) -> dict[str, np.ndarray]:
    """`leaves` (weight [rows, columns], and scales and biases where it has them) from one format to another; None:
    floats. Arrays are of numbers.HOLDERS' types. Where both are the same format, these are the same arrays.

    `dtype` (BF16, F16 or F32): what the values are in before they are quantised, and what floats, scales and biases of
    the result are; by default that of the floats among `leaves`, or BF16, what MLX gives where there are none. The
    calling thread's MLX only.
    """
    own = next((name for name in FLOATS for array in leaves.values() if array.dtype == HOLDERS[name]), None)
    dtype = dtype or own or "BF16"
    if source == target and own in (dtype, None):
        return leaves
    weight = leaves["weight"]
    columns = weight.shape[1] * 32 // source.bits if source else weight.shape[1]
    step = max(1, VALUES // columns)
    pieces = [
        _requantised({leaf: array[row : row + step] for leaf, array in leaves.items()}, source, target, dtype)
        for row in range(0, len(weight), step)
    ]
    return {leaf: np.concatenate([piece[leaf] for piece in pieces]) for leaf in pieces[0]}


def _requantised(
    leaves: dict[str, np.ndarray], source: Quantization | None, target: Quantization | None, dtype: str
) -> dict[str, np.ndarray]:
    parts = [_to_mlx(leaves[leaf]) for leaf in LEAVES if leaf in leaves]
    values = parts[0]
    if source:  # in the type of the scales, or bfloat16, which holds every product of MLX's other formats exactly
        values = mx.dequantize(*parts, group_size=source.group_size, bits=source.bits, mode=source.mode)
    values = values.astype(_MLX_FLOATS[dtype])
    made = mx.quantize(values, target.group_size, target.bits, target.mode) if target else [values]
    return {leaf: _from_mlx(array) for leaf, array in zip(LEAVES, made, strict=False)}


def _to_mlx(array: np.ndarray) -> mx.array:
    """uint16 holds bfloat16."""
    made = mx.array(array)
    return made.view(mx.bfloat16) if array.dtype == HOLDERS["BF16"] else made


def _from_mlx(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
