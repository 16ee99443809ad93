"""The stored answers of transformers (golden/*.npz): which cases there are, and how to read one. Needs no torch.

Weights are not stored: `random_tensors(config, seed)` makes the same bits anywhere, and a checksum says so.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import all_sparse_config, random_tensors, tiny_config

DIRECTORY = Path(__file__).parent / "golden"
TOKENS = 128  # of the one-shot prefill: more than 4 times the block budget of every case
PREFILL = 100  # tokens before the token-by-token decode
ROWS = (37, 24, 113, 1)  # prompt lengths of the rows of unequal length, none a multiple of another
ROW_STEPS = 6  # tokens each of those rows then decodes
VOCABULARY = slice(None, None, 5)  # the logits stored: every fifth, which any error in a hidden state also reaches

CASES = {
    # 8 query heads on 4 KV heads, layer 0 dense and full: the published model, small.
    "published": (tiny_config(), 1),
    # The M3.1 variation: every layer MoE and sparse, top-4.
    "all_sparse": (all_sparse_config(num_local_experts=12), 2),
    # The whole head rotates, index heads are wider than heads and rotate only their front; 6 query heads a group.
    "wide_index": (
        tiny_config(
            num_attention_heads=12,
            num_key_value_heads=2,
            rotary_dim=32,
            sparse_index_dim=64,
            sparse_local_block=2,
            num_hidden_layers=3,
        ),
        3,
    ),
    # Index heads half as wide as heads, as wide as the rotation; one query head a group; another block size.
    "narrow_index": (
        tiny_config(
            num_attention_heads=4, sparse_index_dim=16, sparse_block_size=5, sparse_topk_blocks=4, num_hidden_layers=3
        ),
        4,
    ),
    # Sparse attention and MoE on different layers, one KV head, unlike expert widths, other numbers for the rest.
    "mixed_layers": (
        tiny_config(
            hidden_size=96,
            num_attention_heads=16,
            num_key_value_heads=1,
            head_dim=16,
            rotary_dim=8,
            sparse_index_dim=16,
            sparse_block_size=4,
            sparse_topk_blocks=5,
            moe_layer_freq=[1, 0, 1],
            sparse_attention_freq=[1, 1, 0],
            sparse_disable_index_value=[1, 1, 0],
            num_hidden_layers=3,
            shared_intermediate_size=64,
            num_experts_per_tok=3,
            routed_scaling_factor=1.5,
            rope_theta=10000,
            rms_norm_eps=1e-5,
            swiglu_alpha=1.5,
            swiglu_limit=2.0,
        ),
        5,
    ),
}


@dataclass
class Golden:
    """config: published spelling. tokens: int [128]. logits: float32 [128, vocabulary subset], one-shot prefill.
    decode: float32 [28, subset], token by token after a prefill of 100. rows: int [4, 119], right-padded with 0;
    row_logits: float32 [4, 7, subset], at the last prompt token of each row and after each of its 6 decoded tokens."""

    config: dict
    tensors: dict[str, np.ndarray]
    tokens: np.ndarray
    logits: np.ndarray
    decode: np.ndarray
    rows: np.ndarray
    row_logits: np.ndarray


def read(name: str) -> Golden:
    with np.load(DIRECTORY / f"{name}.npz") as stored:
        arrays = dict(stored)
    config, tensors = json.loads(str(arrays["config"])), random_tensors(CASES[name][0], CASES[name][1])
    assert config == CASES[name][0], "the case's configuration has changed: run make_golden.py"
    assert checksum(tensors) == arrays["checksum"], "random_tensors makes other values: run make_golden.py"
    keys = ("tokens", "logits", "decode", "rows", "row_logits")
    return Golden(config, tensors, *(arrays[key] for key in keys))


def checksum(tensors: dict[str, np.ndarray]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].tobytes(), total)
    return total


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in units of the largest wanted value."""
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
