"""How kernels of our own are made, from one source for CUDA and for Metal, and when they are trusted.

`check` runs a kernel against MLX's own operations before it is used, once a process: where it does not compile or gives
other numbers, MLX's operations are used and a line on stderr says so. The Metal side has not run on a Mac yet.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import mlx.core as mx

from m3dist.model.fusion import on_gpu

LANES = 32  # threads that reduce together: a warp on CUDA, a SIMD group on Metal

# What the two languages spell differently. lanes_...: over the values of a group of lanes, known to all of them.
_HEADERS = {
    "cuda": """
#define SHARED __shared__
#define BARRIER __syncthreads()
#define LEAST __int_as_float(0xff800000)
__device__ inline float lanes_sum(float x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ inline float lanes_max(float x) {
  for (int i = 16; i; i /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}
__device__ inline unsigned int lanes_add(unsigned int x) {
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ inline unsigned int lanes_min(unsigned int x) {
  for (int i = 16; i; i /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}
__device__ inline float bits_as_float(unsigned int x) { return __uint_as_float(x); }
__device__ inline unsigned int float_as_bits(float x) { return __float_as_uint(x); }
__device__ inline float reciprocal_root(float x) { return rsqrt(x); }
__device__ inline float exact_cos(float x) { return cos(x); }
__device__ inline float exact_sin(float x) { return sin(x); }
""",
    "metal": """
#define SHARED threadgroup
#define BARRIER threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define LEAST (-INFINITY)
inline float lanes_sum(float x) { return metal::simd_sum(x); }
inline float lanes_max(float x) { return metal::simd_max(x); }
inline unsigned int lanes_add(unsigned int x) { return metal::simd_sum(x); }
inline unsigned int lanes_min(unsigned int x) { return metal::simd_min(x); }
inline float bits_as_float(unsigned int x) { return as_type<float>(x); }
inline unsigned int float_as_bits(float x) { return as_type<unsigned int>(x); }
inline float reciprocal_root(float x) { return metal::precise::rsqrt(x); }
inline float exact_cos(float x) { return metal::precise::cos(x); }
inline float exact_sin(float x) { return metal::precise::sin(x); }
""",
}
_PRELUDES = {
    "cuda": "const unsigned int thread = threadIdx.x, group = blockIdx.x;",
    "metal": "const unsigned int thread = thread_position_in_threadgroup.x, group = threadgroup_position_in_grid.x;",
}


def make_kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], source: str) -> Callable[..., Any]:
    kind, make = ("metal", mx.fast.metal_kernel) if mx.metal.is_available() else ("cuda", mx.fast.cuda_kernel)
    body = f"{_PRELUDES[kind]}\nconst unsigned int lane = thread % {LANES};\n{source}"
    unique = f"m3dist_{name}_{crc32(body.encode()):08x}"  # MLX compiles once a name
    return make(name=unique, input_names=list(inputs), output_names=list(outputs), source=body, header=_HEADERS[kind])


_trusted: dict[Any, bool] = {}


def trusted(key: Any) -> bool:
    """Whether `check` has found the kernel of this key right."""
    return on_gpu() and _trusted.get(key, False)


def check(key: Any, ours: Callable[[], Sequence[mx.array]], theirs: Callable[[], Sequence[mx.array]]) -> None:
    """Run a kernel and MLX's own operations on the same numbers, unless done before; trust it where they agree."""
    if not on_gpu() or key in _trusted:
        return
    try:
        pairs = list(zip(ours(), theirs()))
        worst = max(_difference(mine, wanted) for mine, wanted in pairs)
        limit = max(2.0**-7 if mine.dtype.size == 2 else 1e-4 for mine, _ in pairs)
        problem = None if worst <= limit else f"differs by {worst:.1e} of the largest number"
    except RuntimeError as error:  # it does not compile, or cannot be launched
        problem = str(error).splitlines()[0]
    _trusted[key] = problem is None
    if problem:
        print(f"m3dist: kernel {key[0]} is not used here, MLX's operations instead: {problem}", file=sys.stderr)


def _difference(mine: mx.array, wanted: mx.array) -> float:
    if mine.dtype == mx.uint32:
        return 0.0 if mx.array_equal(mine, wanted).item() else math.inf
    wanted = wanted.astype(mx.float32)
    found = (mx.abs(mine.astype(mx.float32) - wanted).max() / mx.abs(wanted).max()).item()
    return found if math.isfinite(found) else math.inf
