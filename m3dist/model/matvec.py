"""A quantised matrix times a vector, on CUDA.

MLX's own kernel (0.32.4) reads an H200's memory at 0.65 of 3.4 TB/s and adds up in bfloat16; at decode these products
are nearly all a GPU does. This one adds up in float32. Metal's and the CPU's own are as fast as memory is.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.model.gpu import LANES, check, make_kernel, trusted

THREADS = 256
ROWS = 2  # of the matrix that a group of lanes takes together, so that they unpack the vector once
CHUNK = 32  # weights a lane takes at a time; a quantisation group is one or more of these
MOST_VECTORS = 32  # (token, expert) pairs; from there on blocks of rows are better (grouping.py)


@lru_cache
def _matvec(rows: int, columns: int, bits: int, group_size: int, gathered: bool) -> Any:
    words = CHUNK * bits // 32  # uint32 a chunk
    # 128 + q as a float without converting: q goes to the bits of the mantissa that weigh 1 to 8. The 128 is taken off
    # the sum, with the bias. Eight bits are converted.
    moved = "(n < 4 ? word << (16 - 4 * n) : word >> (4 * n - 16))"
    values = {
        4: (128, f"__uint_as_float(({moved} & 0xF0000u) | 0x43000000u)"),
        8: (0, "static_cast<float>((word >> (8 * n)) & 255u)"),
    }
    offset, value = values[bits]
    blocks = -(-rows // (THREADS // LANES * ROWS))
    return make_kernel(
        f"matvec_{rows}_{columns}_{bits}_{group_size}_{int(gathered)}",
        ("x", "weight", "scales", "biases", *(["experts"] if gathered else [])),
        ("out",),
        f"""
    const unsigned int pair = group / {blocks};
    const unsigned int first = (group % {blocks} * {THREADS // LANES} + thread / {LANES}) * {ROWS};
    const unsigned int matrix = {"experts[pair]" if gathered else "0"};
    const uint4* vectors = reinterpret_cast<const uint4*>(x + pair / PAIRS_A_VECTOR * {columns});
    float total[{ROWS}] = {{}};
#pragma unroll
    for (unsigned int chunk = lane; chunk < {columns // CHUNK}; chunk += {LANES}) {{
      float v[{CHUNK}], sum = 0;
#pragma unroll
      for (int i = 0; i < {CHUNK // 8}; ++i) {{
        const uint4 packed = vectors[chunk * {CHUNK // 8} + i];
        const unsigned int halves[4] = {{packed.x, packed.y, packed.z, packed.w}};
#pragma unroll
        for (int j = 0; j < 4; ++j) {{
          v[8 * i + 2 * j] = __uint_as_float(halves[j] << 16);
          v[8 * i + 2 * j + 1] = __uint_as_float(halves[j] & 0xFFFF0000u);
          sum += v[8 * i + 2 * j] + v[8 * i + 2 * j + 1];
        }}
      }}
#pragma unroll
      for (int r = 0; r < {ROWS}; ++r) {{
        if (first + r < {rows}) {{
          const size_t row = static_cast<size_t>(matrix) * {rows} + first + r;
          const uint4* packed =
              reinterpret_cast<const uint4*>(weight) + (row * {columns // CHUNK} + chunk) * {words // 4};
          float dot = 0;
#pragma unroll
          for (int i = 0; i < {words // 4}; ++i) {{
            const uint4 quad = packed[i];
            const unsigned int four[4] = {{quad.x, quad.y, quad.z, quad.w}};
#pragma unroll
            for (int j = 0; j < 4; ++j) {{
              const unsigned int word = four[j];
#pragma unroll
              for (int n = 0; n < {32 // bits}; ++n) dot += v[(4 * i + j) * {32 // bits} + n] * {value};
            }}
          }}
          const size_t at = row * {columns // group_size} + chunk / {group_size // CHUNK};
          const float scale = static_cast<float>(scales[at]), bias = static_cast<float>(biases[at]);
          total[r] += scale * dot + (bias - {offset}.0f * scale) * sum;
        }}
      }}
    }}
#pragma unroll
    for (int r = 0; r < {ROWS}; ++r) {{
      const float all = lanes_sum(total[r]);
      if (lane == 0 && first + r < {rows}) out[pair * {rows} + first + r] = static_cast<T>(all);
    }}
""",
    )


def matvec(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    experts: mx.array | None = None,
) -> mx.array:
    """bfloat16 x [vectors, columns] times affine-quantised matrices -> [pairs, rows].

    Without `experts` weight is [rows, columns * bits / 32] and there is one vector; with them, uint32 [pairs], it is
    [experts, rows, ...] and x holds one vector a pair, or one for several neighbouring pairs.
    """
    rows, pairs = weight.shape[-2], 1 if experts is None else experts.size
    blocks = -(-rows // (THREADS // LANES * ROWS))
    return _matvec(rows, x.shape[-1], bits, group_size, experts is not None)(
        inputs=[x, weight, scales, biases, *([] if experts is None else [experts])],
        template=[("T", x.dtype), ("PAIRS_A_VECTOR", pairs // x.shape[0])],
        grid=(pairs * blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(pairs, rows)],
        output_dtypes=[x.dtype],
    )[0]


def usable(module: nn.Module, x: mx.array, vectors: int) -> bool:
    """Whether `matvec` computes this module's product with so many vectors, and can be trusted."""
    return vectors <= MOST_VECTORS and x.dtype == mx.bfloat16 and trusted(_key(module))


def prepare(module: nn.Module, dtype: mx.Dtype) -> None:
    """See whether our kernel can be trusted with a quantised module of this format (rows and columns do not matter)."""
    key = _key(module)
    if key is None or dtype != mx.bfloat16 or not mx.cuda.is_available():
        return
    _, bits, group_size = key
    weights, x = (mx.random.normal(shape, key=mx.random.key(1)).astype(dtype) for shape in ((3, 70, 1280), (2, 1280)))
    quantised, experts = mx.quantize(weights, group_size, bits), mx.array([2, 0, 1, 1], dtype=mx.uint32)

    def theirs() -> list[mx.array]:
        weight, *scales_and_biases = quantised
        wide = [part.astype(mx.float32) for part in scales_and_biases]
        matrices, vectors = mx.dequantize(weight, *wide, group_size, bits), x.astype(mx.float32)
        pairs = [matrices[expert] @ vectors[i // 2] for i, expert in enumerate(experts.tolist())]
        return [(matrices[1] @ vectors[0])[None], mx.stack(pairs)]

    check(
        key,
        lambda: [
            matvec(x[:1], *(part[1] for part in quantised), bits, group_size),
            matvec(x, *quantised, bits, group_size, experts),
        ],
        theirs,
    )


def _key(module: nn.Module) -> tuple[str, int, int] | None:
    """For affine modules of 4 or 8 bits whose groups are whole chunks; None for others."""
    fits = getattr(module, "mode", None) == "affine" and module.bits in (4, 8) and module.group_size % CHUNK == 0
    return ("matvec", module.bits, module.group_size) if fits else None
