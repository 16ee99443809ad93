"""Operations that cost a launch each, brought together with mx.compile: on a GPU only.

On the CPU there is nothing to win, and MLX would call a C++ compiler at run time.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import mlx.core as mx


def on_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled where that pays: elementwise operations become one kernel.

    It must not hold on to arrays: layers share it, so that one trace per set of shapes serves them all.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if on_gpu() else function)(*arguments)

    return call


class Compiled:
    """Functions that hold on to weights, each compiled once: for decode steps, whose shapes do not change.

    Building a step's graph in Python takes longer than computing it on a fast GPU; replaying a compiled one does not.
    `forget` is due when weights, or what else the functions hold, are replaced.
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Callable[..., Any]] = {}

    def forget(self) -> None:
        self._functions.clear()

    def call(self, key: Hashable, function: Callable[..., Any], *arguments: mx.array) -> Any:
        """function(*arguments); `key` tells it from the others."""
        if not on_gpu():
            return function(*arguments)
        if key not in self._functions:
            self._functions[key] = mx.compile(function)
        return self._functions[key](*arguments)
