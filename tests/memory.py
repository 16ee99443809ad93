"""Measuring MLX's memory."""

from collections.abc import Callable

import mlx.core as mx


def peak(run: Callable[[], object]) -> int:
    """Bytes that evaluating what `run` returns takes at most, above what was held before."""
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - held
