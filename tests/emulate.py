"""Runs a GPU kernel's source on the CPU, its threads as threads: what mx.fast.cuda_kernel and mx.fast.metal_kernel do,
slowly. Lanes exchange values through memory; block after block runs, each with all its threads.

It shows that a kernel's arithmetic, indices and synchronisation are right, not that a GPU's compiler takes it.
"""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

TYPES = {
    mx.float32: "float",
    mx.uint32: "unsigned int",
    mx.int32: "int",
    mx.uint16: "unsigned short",
    mx.bfloat16: "bf16",
}

COMMON = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>
using std::max; using std::min; using std::exp; using std::exp2;
struct Shape { int v[8]; int operator[](int i) const { return v[i]; } };
struct uint4 { unsigned int x, y, z, w; };
inline float __uint_as_float(unsigned int b) { float f; std::memcpy(&f, &b, 4); return f; }
struct bf16 {
  uint16_t bits;
  bf16() {}
  explicit bf16(float f) { uint32_t b; std::memcpy(&b, &f, 4); bits = (b + 0x7FFF + ((b >> 16) & 1)) >> 16; }
  explicit operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
struct Warp { std::barrier<> barrier; float slot[32]; unsigned int word[32]; Warp() : barrier(32) {} };
struct Block { std::barrier<> barrier; std::vector<std::unique_ptr<Warp>> warps; Block(int n) : barrier(n) {} };
static thread_local unsigned int the_thread, the_group;
static thread_local Block* the_block;
template <class X> X exchange(X x, int other) {
  Warp& w = *the_block->warps[the_thread / 32];
  std::memcpy(&w.slot[the_thread % 32], &x, 4);
  w.barrier.arrive_and_wait();
  X y;
  std::memcpy(&y, &w.slot[other], 4);
  w.barrier.arrive_and_wait();
  return y;
}
template <class X, class F> X fold(X x, F f) {
  for (int i = 16; i; i /= 2) x = f(x, exchange(x, (the_thread % 32) ^ i));
  return x;
}
"""
CUDA = r"""
#define __device__
#define __shared__ static
#define __syncthreads() the_block->barrier.arrive_and_wait()
struct Index { unsigned int x; };
#define threadIdx Index{the_thread}
#define blockIdx Index{the_group}
template <class X> X __shfl_xor_sync(unsigned int, X x, int i) { return exchange(x, (the_thread % 32) ^ i); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float cos(float x) { return std::cos(x); }
inline float sin(float x) { return std::sin(x); }
inline float __int_as_float(unsigned int b) { return __uint_as_float(b); }
inline unsigned int __float_as_uint(float f) { unsigned int b; std::memcpy(&b, &f, 4); return b; }
"""
METAL = r"""
#define threadgroup static
#define threadgroup_barrier(x) the_block->barrier.arrive_and_wait()
struct Index { unsigned int x; };
#define thread_position_in_threadgroup Index{the_thread}
#define threadgroup_position_in_grid Index{the_group}
template <class Y, class X> Y as_type(X x) { Y y; std::memcpy(&y, &x, 4); return y; }
namespace metal {
enum class mem_flags { mem_threadgroup };
inline float simd_sum(float x) { return fold(x, [](float a, float b) { return a + b; }); }
inline unsigned int simd_sum(unsigned int x) { return fold(x, std::plus<unsigned int>{}); }
inline float simd_max(float x) { return fold(x, [](float a, float b) { return std::max(a, b); }); }
inline unsigned int simd_min(unsigned int x) {
  return fold(x, [](unsigned int a, unsigned int b) { return std::min(a, b); });
}
namespace precise {
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float cos(float x) { return std::cos(x); }
inline float sin(float x) { return std::sin(x); }
}
}
"""


def compiler(dialect: str) -> Callable[..., Any]:
    """What takes the place of mx.fast.`dialect`_kernel."""

    def make(name: str, input_names: list[str], output_names: list[str], source: str, header: str) -> Any:
        def run(inputs, output_shapes, output_dtypes, grid, threadgroup, template=()):
            assert grid[1:] == threadgroup[1:] == (1, 1) and grid[0] % threadgroup[0] == 0
            held = [to_numpy(x) for x in inputs]
            outputs = [np.full(shape, 0xAA, dtype=numpy_type(d)) for shape, d in zip(output_shapes, output_dtypes)]
            declared = [
                f"const {TYPES[x.dtype]}* {n} = static_cast<const {TYPES[x.dtype]}*>(held_inputs[{i}]);\n"
                f"const Shape {n}_shape{{{{{', '.join(map(str, x.shape))}}}}};"
                for i, (n, x) in enumerate(zip(input_names, inputs))
            ]
            declared += [
                f"{TYPES[d]}* {n} = static_cast<{TYPES[d]}*>(held_outputs[{i}]);"
                for i, (n, d) in enumerate(zip(output_names, output_dtypes))
            ]
            declared += [
                f"using {n} = {TYPES[v]};" if isinstance(v, mx.Dtype) else f"constexpr unsigned int {n} = {v};"
                for n, v in template
            ]
            library = build(dialect, header + PROGRAM % ("\n".join(declared), source))
            pointers = [(ctypes.c_void_p * len(xs))(*(x.ctypes.data for x in xs)) for xs in (held, outputs)]
            library.run(*pointers, grid[0] // threadgroup[0], threadgroup[0])
            return [mx.array(x).view(d) if d == mx.bfloat16 else mx.array(x) for x, d in zip(outputs, output_dtypes)]

        return run

    return make


PROGRAM = """
static void kernel(const void* const* held_inputs, void* const* held_outputs) {
%s
{
%s
}
}
extern "C" void run(const void* const* in, void* const* out, int groups, int threads) {
  Block block(threads);
  for (int i = 0; i < (threads + 31) / 32; ++i) block.warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      the_thread = i, the_block = &block;
      for (int group = 0; group < groups; ++group) {
        the_group = group;
        kernel(in, out);
        block.barrier.arrive_and_wait();
      }
    });
  }
  for (auto& t : all) t.join();
}
"""


@cache
def build(dialect: str, source: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "kernel.cpp")
        file.write_text(source)
        gcc("-shared", "-include", f"{prologue(dialect).name}/prologue.h", "-o", f"{scratch}/k.so", str(file))
        return ctypes.CDLL(f"{scratch}/k.so")


@cache
def prologue(dialect: str) -> tempfile.TemporaryDirectory:
    """A folder with the header of a dialect, compiled: the standard library's takes longer than any kernel."""
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name, "prologue.h")
    file.write_text(COMMON + {"cuda": CUDA, "metal": METAL}[dialect])
    gcc("-x", "c++-header", "-o", f"{file}.gch", str(file))
    return folder


def gcc(*arguments: str) -> None:
    command = ["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-pthread", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def numpy_type(dtype: mx.Dtype) -> Any:
    return np.uint16 if dtype == mx.bfloat16 else {mx.float32: np.float32, mx.uint32: np.uint32}[dtype]


def to_numpy(x: mx.array) -> np.ndarray:
    return np.ascontiguousarray(np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))
