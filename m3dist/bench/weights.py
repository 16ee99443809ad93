"""Weights without a checkpoint: random ones, each rank's slices alone, of a size that keeps activations finite."""

import hashlib
import math
from collections.abc import Callable

import mlx.core as mx

from m3dist.layout import Slice
from m3dist.model.text import DTYPES, take
from m3dist.plan import Plan
from m3dist.tensors import Quantization, TensorSpec, modules, split_name

# Tensors smaller than this are made whole and then cut, so that ranks that hold the same rows hold the same values: the
# projections of K and V, whose heads several ranks may hold. Larger ones are not shared: a rank makes only its slice.
WHOLE_BELOW = 2**25  # bytes


def random_weights(plan: Plan, rank: int, progress: Callable[[str], None]) -> dict[str, mx.array]:
    """Tensor name -> this rank's slice, evaluated. Every product of a unit-variance input has about unit variance."""
    known, slices, held = modules(plan.inventory.config), plan.slices(rank), {}
    for name, spec in plan.specs.items():
        progress(f"build of {name}")
        module, leaf = split_name(name)
        quantization = plan.inventory.quantization.get(module)
        held[name] = random_tensor(name, leaf, spec, slices[name], known[module].shape, quantization, rank)
        mx.eval(held[name])
    return held


def random_tensor(
    name: str,
    leaf: str,
    spec: TensorSpec,
    part: Slice,
    shape: tuple[int, ...],
    quantization: Quantization | None,
    rank: int,
) -> mx.array:
    """One rank's slice of tensor `name`. `shape`: its module's, in values. Vectors (norms, the router's bias) are 0."""
    dtype, deviation = DTYPES[spec.dtype], 1 / math.sqrt(shape[-1])
    if len(shape) == 1:
        return mx.zeros(part.shape(spec.shape), dtype=dtype)
    if leaf in ("scales", "biases"):
        assert quantization is not None
        scale, bias = constants(quantization, deviation)
        return mx.full(part.shape(spec.shape), scale if leaf == "scales" else bias, dtype=dtype)
    whole = spec.nbytes < WHOLE_BELOW
    seed = name if whole or part.axis is None else f"{name} of rank {rank}"
    wanted = spec.shape if whole or part.axis is None else part.shape(spec.shape)
    key = key_of(seed)
    if quantization is None:
        made = (mx.random.normal(wanted, key=key) * deviation).astype(dtype)
    else:
        made = random_words(wanted, quantization, key)
    return take(made, part) if whole else made


def key_of(name: str) -> mx.array:
    """A key for mx.random, the same in every process."""
    return mx.random.key(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def random_words(shape: tuple[int, ...], quantization: Quantization, key: mx.array) -> mx.array:
    """Packed codes, uint32: every code alike likely, but for mxfp8's, where half the exponents hold NaN and giants."""
    # Halves, because mx.random.randint scales a float: of 32 bits the lowest 8 would always be 0.
    high, low = (mx.random.randint(0, 2**16, shape, dtype=mx.uint32, key=half) for half in mx.random.split(key))
    words = (high << 16) | low
    return words & 0xBFBFBFBF if quantization.mode == "mxfp8" else words


def constants(q: Quantization, deviation: float) -> tuple[float, float]:
    """(scale, bias) of every group, as stored, that give random codes a mean of 0 and about this standard deviation.

    Affine: codes 0 to n = 2**bits - 1, evenly spread, have a deviation of n / sqrt(12) about n / 2; to 7 bits, so that
    bfloat16 holds the scale exactly. The others: the deviation of random codes under a scale of 1 is measured.
    """
    if q.mode == "affine":
        codes = 2**q.bits - 1
        scale = 2 * math.sqrt(3) * deviation / codes
        unit = 2.0 ** (math.floor(math.log2(scale)) - 6)
        scale = round(scale / unit) * unit
        return scale, -scale * codes / 2
    one = 0x38 if q.mode == "nvfp4" else 127  # 1.0 as an FP8 value (e4m3), or as an exponent (e8m0)
    words = random_words((64, 96), q, mx.random.key(0))
    scales = mx.full((64, 96 * 32 // q.bits // q.group_size), one, dtype=mx.uint8)
    values = mx.dequantize(words, scales, None, group_size=q.group_size, bits=q.bits, mode=q.mode)
    scale = deviation / mx.sqrt(mx.mean(mx.square(values.astype(mx.float32)))).item()
    return (mx.to_fp8(mx.array(scale)).item() if q.mode == "nvfp4" else 127 + round(math.log2(scale))), 0.0
