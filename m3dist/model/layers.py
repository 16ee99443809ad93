"""The small parts: GemmaRMSNorm, SwigluOAI, and the gated MLP that dense layers and the shared expert are."""

import math

import mlx.core as mx
import mlx.nn as nn

from m3dist.comm import Comm
from m3dist.model import kernels
from m3dist.model.fusion import fused
from m3dist.model.gpu import check, trusted
from m3dist.model.products import multiply

FEW_ROWS = 64  # of a decode step; a kernel is compiled for each number of them


class GemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32, cast back to x's dtype at the very end (document, section 3)."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps
        self._gain: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        return _norm(x, self.float32_gain(), self.eps)

    def add(self, x: mx.array, more: mx.array) -> tuple[mx.array, mx.array]:
        """The sum x + more, and its norm."""
        run = kernels.add_and_norm if trusted(self._kernel(x.dtype)) else _add_and_norm
        return run(x, more, self.float32_gain(), self.eps)

    def prepare(self, dtype: mx.Dtype) -> None:
        """Compute what depends on the weight alone, and see whether our kernel can be trusted with `dtype`."""
        mx.eval(self.float32_gain())
        x, more, (gain, *_) = mx.random.normal((3, 3, self.weight.size), key=mx.random.key(1))
        arguments = x.astype(dtype), more.astype(dtype), gain, self.eps
        check(self._kernel(dtype), lambda: kernels.add_and_norm(*arguments), lambda: _add_and_norm(*arguments))

    def _kernel(self, dtype: mx.Dtype) -> tuple[object, ...]:
        return ("add_and_norm", self.weight.size, self.eps, dtype)

    def float32_gain(self) -> mx.array:
        """1 + weight, computed once for the weight it was made from; in bfloat16 it would lose up to 0.4%."""
        if self._gain is None or self._gain[0] is not self.weight:
            self._gain = (self.weight, 1.0 + self.weight.astype(mx.float32))
        return self._gain[1]


@fused
def _norm(x: mx.array, gain: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x.astype(mx.float32), gain, eps).astype(x.dtype)


@fused
def _add_and_norm(x: mx.array, more: mx.array, gain: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    total = x + more
    return total, mx.fast.rms_norm(total.astype(mx.float32), gain, eps).astype(x.dtype)


def swiglu_oai(gate_up: mx.array, alpha: float, limit: float) -> mx.array:
    """[..., 2n] of gate then up -> [..., n]: (up + 1) * gate * sigmoid(alpha * gate), both clamped to `limit`.

    The gate has an upper clamp only. Source: transformers, MiniMaxM3VLDenseMLP.
    """
    few = math.prod(gate_up.shape[:-1]) <= FEW_ROWS
    run = kernels.swiglu_oai if few and trusted(_swiglu_kernel(alpha, limit, gate_up.dtype)) else _swiglu_oai
    return run(gate_up, alpha, limit)


@fused
def _swiglu_oai(gate_up: mx.array, alpha: float, limit: float) -> mx.array:
    gate, up = mx.split(gate_up, 2, axis=-1)
    gate = mx.minimum(gate, limit)
    up = mx.clip(up, -limit, limit)
    return (up + 1) * gate * mx.sigmoid(alpha * gate)


def prepare_swiglu(alpha: float, limit: float, dtype: mx.Dtype) -> None:
    """See whether our kernel can be trusted with `dtype`."""
    arguments = (4 * mx.random.normal((3, 192), key=mx.random.key(1))).astype(dtype), alpha, limit
    check(
        _swiglu_kernel(alpha, limit, dtype),
        lambda: [kernels.swiglu_oai(*arguments)],
        lambda: [_swiglu_oai(arguments[0].astype(mx.float32), alpha, limit)],
    )


def _swiglu_kernel(alpha: float, limit: float, dtype: mx.Dtype) -> tuple[object, ...]:
    return ("swiglu_oai", alpha, limit, dtype)


class GatedMLP(nn.Module):
    """down(swiglu_oai(gate_up(x))): a partial sum where the columns are cut; whoever calls it sums over the ranks."""

    def __init__(self, hidden: int, width: int, alpha: float, limit: float):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.alpha, self.limit = alpha, limit

    def __call__(self, x: mx.array) -> mx.array:
        return multiply(self.down_proj, swiglu_oai(multiply(self.gate_up_proj, x), self.alpha, self.limit))


class DenseMLP(GatedMLP):
    """The MLP of a layer without experts, summed over the ranks."""

    def __init__(self, hidden: int, width: int, alpha: float, limit: float):
        super().__init__(hidden, width, alpha, limit)
        self.comm = Comm()

    def __call__(self, x: mx.array) -> mx.array:
        return self.comm.all_sum(super().__call__(x))
