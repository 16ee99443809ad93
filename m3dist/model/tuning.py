"""What is fastest on which backend: the measured numbers attention of many queries is governed by."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Tuning:
    """By `python tests/bench_sparse.py`."""

    scratch: int  # bytes of scores, masks or gathered keys and values at a time; MLX runs some slices ahead
    masked_slots: int  # up to here attention over everything, masked, beats gathering what was selected


# cpu, float32, 2 KV heads of 16 query heads: gathering 1 to 16 MiB at a time takes 1.0 to 1.2 ms a query at any depth,
# 64 MiB 4.1; MLX's masked attention takes 7.8 ms at 2,560 slots.
# cuda, metal: not measured yet, so masked attention is not used there either.
TUNING = {
    "cpu": Tuning(scratch=4 << 20, masked_slots=0),
    "cuda": Tuning(scratch=256 << 20, masked_slots=0),
    "metal": Tuning(scratch=128 << 20, masked_slots=0),
}


def backend() -> str:
    """A key of TUNING: where MLX computes."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def writes_scores_out(dtype: mx.Dtype, kind: str) -> bool:
    """Whether MLX's attention of many queries has no kernel of its own there: all scores then lie in memory at once."""
    return kind == "cpu" or (kind == "cuda" and dtype.size > 2)
