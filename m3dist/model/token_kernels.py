"""A decode step's first and last parts as kernels of our own (gpu.py): a token's embedding, the likeliest token of this
rank, and the likeliest of all ranks."""

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from m3dist.comm import agreement
from m3dist.model.gpu import LANES, check, make_kernel, trusted

GROUP = 128  # threads
THREADS = 1024  # that look through all logits of a rank


@lru_cache
def _embed(rows: int, columns: int, bits: int, group_size: int) -> Any:
    per_word = 32 // bits
    return make_kernel(
        f"embed_{columns}_{bits}_{group_size}",
        ("tokens", "weight", "scales", "biases"),
        ("out",),
        f"""
    const unsigned int at = group * {GROUP} + thread;
    const unsigned int place = at / {columns}, d = at % {columns};
    if (place >= tokens_shape[0] * tokens_shape[1]) return;
    const unsigned int row = tokens[place] - FIRST;  // wraps for tokens below
    float value = 0;
    if (row < {rows}) {{
      const unsigned int q = (weight[row * {columns // per_word} + d / {per_word}] >> ({bits} * (d % {per_word})))
          & {2**bits - 1}u;
      const unsigned int s = row * {columns // group_size} + d / {group_size};
      value = static_cast<float>(scales[s]) * q + static_cast<float>(biases[s]);
    }}
    out[at] = static_cast<T>(value);
""",
    )


def embed(tokens: mx.array, module: nn.Module, first_row: int, dtype: mx.Dtype) -> mx.array:
    """tokens uint32 [rows, n] -> [rows, n, columns] of an affine-quantised embedding; zeros for tokens that are not
    among its rows, which are those from `first_row` on."""
    weight, (rows, groups) = module["weight"], module["scales"].shape
    columns = groups * module.group_size
    return _embed(rows, columns, module.bits, module.group_size)(
        inputs=[tokens, weight, module["scales"], module["biases"]],
        template=[("T", dtype), ("FIRST", first_row)],
        grid=(-(-tokens.size * columns // GROUP) * GROUP, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(*tokens.shape, columns)],
        output_dtypes=[dtype],
    )[0]


@lru_cache
def _best() -> Any:
    return make_kernel(
        "best",
        ("logits", "words", "note"),
        ("packet",),
        f"""
    SHARED float values[{THREADS // LANES}];
    SHARED unsigned int places[{THREADS // LANES}], hashes[{THREADS // LANES}];
    float value = LEAST;
    unsigned int place = 0xFFFFFFFFu, hash = 0;
    for (unsigned int i = thread; i < COUNT; i += {THREADS}) {{
      const float logit = static_cast<float>(logits[i]);
      if (logit > value) {{
        value = logit;
        place = i;
      }}
    }}
    for (unsigned int i = thread; i < WORDS; i += {THREADS}) hash += words[i] * (2 * i + 1);
    float most = lanes_max(value);
    place = lanes_min(value == most ? place : 0xFFFFFFFFu);
    hash = lanes_add(hash);
    if (lane == 0) {{
      values[thread / {LANES}] = most;
      places[thread / {LANES}] = place;
      hashes[thread / {LANES}] = hash;
    }}
    BARRIER;
    if (thread < {LANES}) {{
      const bool there = lane < {THREADS // LANES};
      value = there ? values[lane] : LEAST;
      most = lanes_max(value);
      place = lanes_min(there && value == most ? places[lane] : 0xFFFFFFFFu);
      hash = lanes_add(there ? hashes[lane] : 0u);
      if (lane == 0) {{
        packet[0] = most;
        packet[1] = bits_as_float(FIRST + min(place, static_cast<unsigned int>(COUNT - 1)));
        packet[2] = bits_as_float(hash);
        packet[3] = bits_as_float(note[0]);
      }}
    }}
""",
    )


def best(logits: mx.array, first_row: int, hidden: mx.array, note: mx.array) -> mx.array:
    """What a rank sends of its logits [n], where the likeliest token is all that counts: the largest, its token id,
    comm.agreement of hidden, and note (uint32 [1]). float32 [4]; the last three are the bits of uint32 numbers.

    Ties go to the lowest id. Token ids start at `first_row`."""
    words = hidden.reshape(-1).view(mx.uint16 if hidden.dtype.size == 2 else mx.uint32)
    return _best()(
        inputs=[logits, words, note],
        template=[("COUNT", logits.size), ("WORDS", words.size), ("FIRST", first_row)],
        grid=(THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(4,)],
        output_dtypes=[mx.float32],
    )[0]


@lru_cache
def _pick() -> Any:
    return make_kernel(
        "pick",
        ("packets",),
        ("logit", "token", "agree", "note"),
        """
    if (thread) return;
    unsigned int chosen = 0, same = 1;
    for (int rank = 1; rank < packets_shape[0]; ++rank) {
      if (packets[4 * rank] > packets[4 * chosen]) chosen = rank;
      if (float_as_bits(packets[4 * rank + 2]) != float_as_bits(packets[2])) same = 0;
    }
    logit[0] = packets[4 * chosen];
    token[0] = float_as_bits(packets[4 * chosen + 1]);
    agree[0] = same;
    note[0] = float_as_bits(packets[3]);
""",
    )


def pick(packets: mx.array) -> list[mx.array]:
    """Every rank's packet, float32 [world, 4] -> the likeliest token's logit float32 [1] and id uint32 [1], whether all
    ranks' hashes are equal (uint32 [1], 1 or 0), and rank 0's note."""
    return _pick()(
        inputs=[packets],
        grid=(LANES, 1, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(1,)] * 4,
        output_dtypes=[mx.float32, mx.uint32, mx.uint32, mx.uint32],
    )


def embed_usable(module: nn.Module) -> bool:
    return trusted(_embed_key(module))


def _embed_key(module: nn.Module) -> tuple[str, int, int] | None:
    affine = getattr(module, "mode", None) == "affine" and module.bits in (2, 4, 8)
    return ("embed", module.bits, module.group_size) if affine else None


BEST = ("best and pick",)


def prepare(module: nn.Module, dtype: mx.Dtype) -> None:
    """See whether our kernels can be trusted with this embedding and with logits of `dtype`."""
    tokens = mx.array([[2, 9, 4]], dtype=mx.uint32)  # of rows 3 to 8
    if _embed_key(module):
        small = nn.QuantizedEmbedding(6, 2 * module.group_size, module.group_size, module.bits)
        rows = mx.dequantize(small.weight, small.scales, small.biases, small.group_size, small.bits)
        check(
            _embed_key(module),
            lambda: [embed(tokens, small, 3, mx.float32)],
            lambda: [mx.stack([mx.zeros(rows.shape[1]), mx.zeros(rows.shape[1]), rows[1]])[None]],
        )
    logits, hidden = mx.random.normal((2, 2000), key=mx.random.key(3)).astype(dtype)
    note, other = mx.array([7], dtype=mx.uint32), mx.array([9], dtype=mx.uint32)

    def ours() -> list[mx.array]:
        packets = mx.stack([best(logits, 100, hidden, note), best(logits[:500], 5000, hidden, other)])
        return [*pick(packets), packets[0, 2:3].view(mx.uint32)]

    def theirs() -> list[mx.array]:
        place = mx.argmax(logits, keepdims=True)
        one = mx.array([1], dtype=mx.uint32)
        return [logits[place].astype(mx.float32), place + 100, one, note, agreement(hidden)]

    check(BEST, ours, theirs)
