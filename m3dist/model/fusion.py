"""Several small operations as one kernel."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import mlx.core as mx


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """mx.compile on a GPU, where every operation costs a launch; as it is on the CPU, where MLX would call a C++
    compiler at run time.

    `function` must not hold on to arrays: layers share it, so that one trace per set of shapes serves them all.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if mx.default_device().type == mx.DeviceType.gpu else function)(*arguments)

    return call
