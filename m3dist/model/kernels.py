"""The small parts between a layer's large products as kernels of our own (gpu.py).

A decode step on a fast GPU takes as long as its operations are many; each of these stands for two to ten of MLX's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx

from m3dist.model.gpu import LANES, make_kernel

THREADS = 512  # that share a row of add_and_norm
GROUP = 128  # threads, four groups of lanes, where each head or token has its own lanes

# ---------------------------------------------------------------------------------------------------------------------
# x + more, and its GemmaRMSNorm


@lru_cache
def _add_and_norm(hidden: int, eps: float) -> Callable[..., Any]:
    return make_kernel(
        f"add_and_norm_{hidden}",
        ("x", "more", "gain"),
        ("total", "normed"),
        f"""
    SHARED float partial[{THREADS // LANES}];
    const unsigned int at = group * {hidden};
    float kept[{-(-hidden // THREADS)}];
    float squares = 0;
    for (unsigned int i = 0, d = thread; d < {hidden}; ++i, d += {THREADS}) {{
      const T sum = static_cast<T>(static_cast<float>(x[at + d]) + static_cast<float>(more[at + d]));
      total[at + d] = sum;
      kept[i] = static_cast<float>(sum);
      squares += kept[i] * kept[i];
    }}
    squares = lanes_sum(squares);
    if (lane == 0) partial[thread / {LANES}] = squares;
    BARRIER;
    squares = lanes_sum(lane < {THREADS // LANES} ? partial[lane] : 0.0f);
    const float factor = reciprocal_root(squares / {hidden} + {eps!r}f);
    for (unsigned int i = 0, d = thread; d < {hidden}; ++i, d += {THREADS}) {{
      normed[at + d] = static_cast<T>(kept[i] * factor * gain[d]);
    }}
""",
    )


def add_and_norm(x: mx.array, more: mx.array, gain: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """As layers.add_and_norm: x, more [..., hidden] of one dtype, gain float32 [hidden]."""
    rows = x.size // x.shape[-1]
    total, normed = _add_and_norm(x.shape[-1], eps)(
        inputs=[x, more, gain],
        template=[("T", x.dtype)],
        grid=(rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape, x.shape],
        output_dtypes=[x.dtype, x.dtype],
    )
    return total, normed


# ---------------------------------------------------------------------------------------------------------------------
# Heads: GemmaRMSNorm and RoPE, taken apart by name


@dataclass(frozen=True)
class Part:
    """Some heads of a product: their name, how many, whether they are normalised and rotated, and whether what comes
    out is float32."""

    name: str
    heads: int
    normed: bool
    wide: bool


@lru_cache
def _turn_heads(parts: tuple[Part, ...], dim: int, rotated: int, base: float, eps: float) -> Callable[..., Any]:
    held, half = dim // LANES, rotated // 2
    heads, normed = sum(part.heads for part in parts), sum(part.heads for part in parts if part.normed)
    store, first = [], 0
    for part in parts:
        last, dtype = first + part.heads, "float" if part.wide else "T"
        store.append(
            f"""
    if (head >= {first} && head < {last}) {{
      const unsigned int to = ((row * {part.heads} + head - {first}) * tokens + token) * {dim} + lane;
      for (int i = 0; i < {held}; ++i) {part.name}[to + {LANES} * i] = static_cast<{dtype}>(static_cast<T>(value[i]));
    }}"""
        )
        first = last
    return make_kernel(
        f"turn_heads_{'_'.join(f'{part.name}{part.heads}' for part in parts)}_{dim}_{rotated}",
        ("x", "gain", "starts"),
        [part.name for part in parts],
        f"""
    const unsigned int tokens = x_shape[1];
    const unsigned int unit = group * {GROUP // LANES} + thread / {LANES};
    const unsigned int head = unit % {heads}, place = unit / {heads};
    if (place >= x_shape[0] * tokens) return;
    const unsigned int row = place / tokens, token = place % tokens;
    float value[{held}];
    for (int i = 0; i < {held}; ++i) {{
      value[i] = static_cast<float>(x[unit * {dim} + lane + {LANES} * i]);
      if ((float_as_bits(value[i]) & 0x7f800000u) == 0x7f800000u) value[i] = 0.0f;  // infinite, or not a number
    }}
    if (head < {normed}) {{
      float squares = 0;
      for (int i = 0; i < {held}; ++i) squares += value[i] * value[i];
      const float factor = reciprocal_root(lanes_sum(squares) / {dim} + {eps!r}f);
      for (int i = 0; i < {held}; ++i) {{
        value[i] = static_cast<float>(static_cast<T>(value[i] * factor * gain[head * {dim} + lane + {LANES} * i]));
      }}
      const float position = static_cast<float>(starts[row] + static_cast<int>(token));
      for (int i = 0; i < {half // LANES}; ++i) {{
        const float part = static_cast<float>(lane + {LANES} * i) / {half};
        const float angle = position * exp2(-part * {math.log2(base)!r}f);
        const float c = exact_cos(angle), s = exact_sin(angle);
        const float a = value[i], b = value[i + {half // LANES}];
        value[i] = a * c - b * s;
        value[i + {half // LANES}] = a * s + b * c;
      }}
    }}
{"".join(store)}
""",
    )


def turn_heads(
    x: mx.array, gain: mx.array, offset: mx.array, parts: tuple[Part, ...], rotated: int, base: float, eps: float
) -> list[mx.array]:
    """x [rows, tokens, heads, dim], the normalised heads first, gain float32 [normalised heads, dim] -> each part's
    heads [rows, heads, tokens, dim], rounded to x's dtype also where they are wide. `offset` int32: the position of the
    first token, of all rows or of each. What is not finite counts as 0: paged.py says why.

    Needs dim and rotated / 2 in multiples of LANES.
    """
    rows, tokens, heads, dim = x.shape
    groups = -(-rows * tokens * heads // (GROUP // LANES))
    return _turn_heads(parts, dim, rotated, base, eps)(
        inputs=[x, gain, offset if offset.ndim else mx.broadcast_to(offset, (rows,))],
        template=[("T", x.dtype)],
        grid=(groups * GROUP, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(rows, part.heads, tokens, dim) for part in parts],
        output_dtypes=[mx.float32 if part.wide else x.dtype for part in parts],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The router's choice


@lru_cache
def _choose_experts(experts: int, k: int) -> Callable[..., Any]:
    held = -(-experts // LANES)
    return make_kernel(
        f"choose_experts_{experts}_{k}",
        ("logits", "bias"),
        ("chosen", "scores"),
        f"""
    const unsigned int token = group * {GROUP // LANES} + thread / {LANES};
    if (token >= logits_shape[0]) return;
    float score[{held}], worth[{held}];
    for (int i = 0; i < {held}; ++i) {{
      const unsigned int expert = lane + {LANES} * i;
      score[i] = expert < {experts} ? 1.0f / (1.0f + exp(-logits[token * {experts} + expert])) : 0.0f;
      worth[i] = expert < {experts} ? score[i] + bias[expert] : LEAST;
    }}
    for (int j = 0; j < {k}; ++j) {{
      float best = worth[0];
      for (int i = 1; i < {held}; ++i) best = max(best, worth[i]);
      best = lanes_max(best);
      unsigned int winner = {experts - 1};
      for (int i = {held} - 1; i >= 0; --i) {{
        if (worth[i] == best) winner = lane + {LANES} * i;
      }}
      winner = lanes_min(winner);
      for (int i = 0; i < {held}; ++i) {{
        if (winner == lane + {LANES} * i) {{
          chosen[token * {k} + j] = winner;
          scores[token * {k} + j] = score[i];
          worth[i] = LEAST;
        }}
      }}
    }}
""",
    )


def choose_experts(logits: mx.array, bias: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """float32 logits [tokens, experts] and bias [experts] -> the experts with the k largest sigmoid(logit) + bias,
    uint32 [tokens, k], and sigmoid(logit) of each, float32."""
    tokens, experts = logits.shape
    chosen, scores = _choose_experts(experts, k)(
        inputs=[logits, bias],
        grid=(-(-tokens // (GROUP // LANES)) * GROUP, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(tokens, k), (tokens, k)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return chosen, scores


# ---------------------------------------------------------------------------------------------------------------------
# SwigluOAI, and the weighted sum of a token's experts


@lru_cache
def _swiglu(alpha: float, limit: float) -> Callable[..., Any]:
    return make_kernel(
        "swiglu",
        ("gate_up",),
        ("out",),
        f"""
    const unsigned int at = group * {GROUP} + thread;
    if (at >= ROWS * WIDTH) return;
    const unsigned int from = at / WIDTH * 2 * WIDTH + at % WIDTH;
    const float gate = min(static_cast<float>(gate_up[from]), {limit!r}f);
    const float up = max(min(static_cast<float>(gate_up[from + WIDTH]), {limit!r}f), -{limit!r}f);
    out[at] = static_cast<T>((up + 1.0f) * gate / (1.0f + exp(-{alpha!r}f * gate)));
""",
    )


def swiglu_oai(gate_up: mx.array, alpha: float, limit: float) -> mx.array:
    """As layers.swiglu_oai: [..., 2n] -> [..., n]. For decode steps: the number of rows is compiled in."""
    *rows, width = gate_up.shape
    count = math.prod(rows)
    return _swiglu(alpha, limit)(
        inputs=[gate_up],
        template=[("T", gate_up.dtype), ("ROWS", count), ("WIDTH", width // 2)],
        grid=(-(-count * (width // 2) // GROUP) * GROUP, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(*rows, width // 2)],
        output_dtypes=[gate_up.dtype],
    )[0]


@lru_cache
def _combine(hidden: int, k: int, scale: float) -> Callable[..., Any]:
    return make_kernel(
        f"combine_{hidden}_{k}",
        ("routed", "scores", "shared"),
        ("out",),
        f"""
    const unsigned int at = group * {GROUP} + thread;
    const unsigned int token = at / {hidden}, d = at % {hidden};
    if (token >= routed_shape[0]) return;
    float sum = 0;
    for (int i = 0; i < {k}; ++i) sum += scores[token * {k} + i];
    const float factor = {scale!r}f / (sum + 1e-20f);
    float total = static_cast<float>(shared[at]);
    for (int i = 0; i < {k}; ++i) {{
      total += static_cast<float>(routed[(token * {k} + i) * {hidden} + d]) * (scores[token * {k} + i] * factor);
    }}
    out[at] = static_cast<T>(total);
""",
    )


def combine(routed: mx.array, scores: mx.array, shared: mx.array, scale: float) -> mx.array:
    """As moe.combine: routed [tokens, k, hidden], scores float32 [tokens, k], shared [tokens, hidden] -> as shared."""
    tokens, k, hidden = routed.shape
    return _combine(hidden, k, scale)(
        inputs=[routed, scores, shared],
        template=[("T", shared.dtype)],
        grid=(-(-tokens * hidden // GROUP) * GROUP, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[shared.shape],
        output_dtypes=[shared.dtype],
    )[0]
