"""Stored bytes -> rows of numbers: one `Read` from anywhere into a rank's memory, cast on the way. numpy only, no MLX.

Any thread may call it. Everything goes through arrays of `HOLDERS`' types: numpy has neither bfloat16 nor FP8.
"""

import math
from typing import Any

import numpy as np

from m3dist.checkpoint import Files, StoredTensor
from m3dist.errors import CheckpointError
from m3dist.reads import Read
from m3dist.tensors import FLOATS
from m3dist.translation import FP8_BLOCK

# What holds a tensor's bits, by safetensors dtype.
HOLDERS: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
    "U32": np.dtype(np.uint32),
    "F8_E4M3": np.dtype(np.uint8),
}


def fill(read: Read, target: np.ndarray, dtype: str, files: Files) -> None:
    """Carry out one read into `target` [rows, columns kept], contiguous: rows of a tensor of safetensors type `dtype`.

    `target` is of HOLDERS[dtype]'s type; floats of another type are cast, FP8 in blocks is multiplied out. Raises
    CheckpointError, naming the stored tensor and its file, where its bytes cannot be had.
    """
    source = read.source
    cast = dtype in FLOATS and source.dtype != dtype
    if read.columns is None and not cast:
        _read(files, source, read.offset, target)
        return
    raw = np.empty((read.rows, read.row_bytes), np.uint8)
    _read(files, source, read.offset, raw)
    values = raw.view(HOLDERS[source.dtype if cast else dtype])
    if read.scale:
        values = _E4M3[values] * _multipliers(read, read.scale, files)
    first = 0
    for start, stop in read.columns or ((0, values.shape[1]),):
        kept = values[:, start:stop]
        if cast:
            kept = cast_floats(kept, "F32" if read.scale else source.dtype, dtype)
        target[:, first : first + stop - start] = kept
        first += stop - start


def _multipliers(read: Read, scale: StoredTensor, files: Files) -> np.ndarray:
    """float32 [rows, columns]: what each FP8 value of a read is multiplied by."""
    source = read.source
    rows = np.arange(read.row, read.row + read.rows)
    height = source.shape[-2]  # blocks start again with every matrix of a stack
    block = rows // height * scale.shape[-2] + rows % height // FP8_BLOCK
    first, count = block[0], block[-1] + 1 - block[0]
    width = scale.nbytes // math.prod(scale.shape[:-1])
    raw = np.empty((count, width), np.uint8)
    _read(files, scale, scale.offset + int(first) * width, raw)
    multipliers = cast_floats(raw.view(HOLDERS[scale.dtype]), scale.dtype, "F32")
    return np.repeat(multipliers, FP8_BLOCK, axis=1)[block - first, : source.shape[-1]]


def _read(files: Files, tensor: StoredTensor, offset: int, into: np.ndarray) -> None:
    """Fill a contiguous array from byte `offset` of a tensor's file."""
    try:
        files.read(tensor.file.name, offset, into.data.cast("B"))
    except CheckpointError as error:
        raise CheckpointError(f"{tensor.name}: {error}") from None


def cast_floats(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Floats of one safetensors type to another, to the nearest, ties to even: the numbers that mx.astype gives.

    BF16 is held in uint16 on either side.
    """
    if source == target:
        return values
    wide = (values.astype(np.uint32) << 16).view(np.float32) if source == "BF16" else values.astype(np.float32)
    if target == "BF16":
        bits = wide.view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)
    with np.errstate(over="ignore"):  # beyond float16 is infinity, there as here
        return wide.astype(HOLDERS[target])


def _e4m3_values() -> np.ndarray:
    """The number each F8_E4M3 byte means, as float32: 4 exponent bits (bias 7), 3 of mantissa, no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3_values()
