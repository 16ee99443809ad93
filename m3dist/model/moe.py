"""The mixture of experts: a float32 router, experts gathered by index, one shared expert, one sum over the ranks."""

import math
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from m3dist.comm import Comm
from m3dist.config import ModelConfig
from m3dist.model import cpu, kernels, matvec
from m3dist.model.fusion import fused, on_gpu
from m3dist.model.gpu import check, trusted
from m3dist.model.grouping import Blocks, in_blocks
from m3dist.model.layers import GatedMLP, swiglu_oai
from m3dist.model.products import multiply_blocks, pays

SORT_FROM = 64  # (token, expert) pairs from which grouping them by expert pays


class SwitchLinear(nn.Module):
    """One matrix an expert: weight [experts, out, in]."""

    def __init__(self, experts: int, columns: int, rows: int):
        super().__init__()
        self.weight = mx.zeros((experts, rows, columns))

    def __call__(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        """x [..., n, in] times the matrices of experts [...] -> [..., n, out]."""
        if x.shape[-2] > 1 and cpu.usable(x):
            return multiply_blocks(self, x, experts)
        transposed = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, transposed, rhs_indices=experts, sorted_indices=is_sorted)

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_) -> "QuantizedSwitchLinear":
        """What nn.quantize calls."""
        quantized = QuantizedSwitchLinear(group_size, bits, mode)
        quantized.weight, quantized.scales, *rest = mx.quantize(self.weight, group_size, bits, mode=mode)
        quantized.biases = rest[0] if rest else None
        return quantized


class QuantizedSwitchLinear(nn.Module):
    """SwitchLinear in one of MLX's quantised formats."""

    def __init__(self, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode

    def __call__(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        if x.shape[-2] == 1 and matvec.usable(self, x, experts.size):
            vectors, flat = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
            out = matvec.matvec(vectors, self.weight, self.scales, self.biases, self.bits, self.group_size, flat)
            return out.reshape(*experts.shape, 1, -1)
        if x.shape[-2] > 1 and cpu.usable(x):
            return multiply_blocks(self, x, experts)
        count, step = self.weight.shape[0], self._experts_at_once()
        out = self._products(x, experts, slice(0, step), is_sorted)
        for first in range(step, count, step):
            own = mx.clip(experts.astype(mx.int32) - first, 0, None).astype(mx.uint32)
            part = self._products(x, own, slice(first, first + step), is_sorted)
            out = mx.where(experts[..., None, None] < first, out, part)
        return out

    def _experts_at_once(self) -> int:
        """How many experts' matrices one of MLX's products may be given.

        On CUDA (0.32.4) it counts their bytes in 32 bits: the experts beyond 2 GiB, here those from number 114 on where
        one rank has all of M3's in 4 bits, come out wrong, without an error.
        """
        count = self.weight.shape[0]
        if not mx.cuda.is_available():
            return count
        return min(count, max(1, (2**31 - 1) // (self.weight.nbytes // count)))

    def _products(self, x: mx.array, experts: mx.array, part: slice, is_sorted: bool) -> mx.array:
        """x [..., n, in] times the matrices of experts [...] in `part` of them; those beyond count as its last."""
        count = len(range(self.weight.shape[0])[part])
        whole = count == self.weight.shape[0]
        leaves = (self.weight, self.scales, self.biases)
        return mx.gather_qmm(
            x,
            *(leaf if whole or leaf is None else leaf[part] for leaf in leaves),
            lhs_indices=_in_order(x.shape[:-2]),  # else MLX computes the same numbers each time
            rhs_indices=experts if whole else mx.minimum(experts, count - 1),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=is_sorted,
        )


class SwitchMLP(nn.Module):
    """The routed experts: every (token, chosen expert) pair through its gated MLP."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_up_proj = SwitchLinear(c.num_local_experts, c.hidden_size, 2 * c.intermediate_size)
        self.down_proj = SwitchLinear(c.num_local_experts, c.intermediate_size, c.hidden_size)
        self.alpha, self.limit = c.swiglu_alpha, c.swiglu_limit

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x [tokens, hidden], experts [tokens, k] -> [tokens, k, hidden]."""
        tokens, k = experts.shape
        if tokens * k < SORT_FROM:
            return self._pairs(x.reshape(tokens, 1, 1, -1), experts, is_sorted=False).squeeze(-2)
        if self._wants_blocks(x, tokens * k):
            blocks = self._blocks(experts.reshape(-1))
            return self._pairs_in_blocks(x, blocks, blocks.source // k).reshape(tokens, k, -1)
        order = mx.argsort(experts.reshape(-1))
        out = self._pairs(_rows(x, order // k), experts.reshape(-1)[order], is_sorted=True)
        return out.squeeze(-2)[mx.argsort(order)].reshape(tokens, k, -1)

    def _wants_blocks(self, x: mx.array, pairs: int) -> bool:
        """Whether so many pairs had better come as rows of one matrix an expert.

        MLX's quantised product on CUDA (0.32.4) does not notice that neighbouring pairs have the same expert, and reads
        its weights once a pair. Metal's does. On the CPU such matrices are products.py's.
        """
        if not on_gpu():
            return cpu.usable(x) and pays(self.gate_up_proj, pairs / self.gate_up_proj.weight.shape[0])
        return isinstance(self.gate_up_proj, QuantizedSwitchLinear) and mx.cuda.is_available()

    def _blocks(self, experts: mx.array) -> Blocks:
        return in_blocks(experts, self.gate_up_proj.weight.shape[0], None if on_gpu() else cpu.TILE)

    def _pairs_in_blocks(self, x: mx.array, blocks: Blocks, tokens: mx.array) -> mx.array:
        """x [all tokens, hidden], tokens [rows of blocks] -> [pairs, hidden]."""
        rows = x[tokens].reshape(-1, blocks.size, x.shape[-1])
        out = self._pairs(rows, blocks.owner, is_sorted=False)
        return out.reshape(-1, x.shape[-1])[blocks.place]

    def _pairs(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        hidden = swiglu_oai(self.gate_up_proj(x, experts, is_sorted), self.alpha, self.limit)
        return self.down_proj(hidden, experts, is_sorted)

    def held(self, x: mx.array, experts: mx.array, first: int, decoding: bool) -> mx.array:
        """As __call__ where this rank holds only the experts from `first` on: other ranks' pairs give zero.

        A batch computes its own pairs alone, which needs their number on the host; below that a wasted product on one
        expert is cheaper than waiting for it. So it is for the tokens of a decode step, however many: the step is one
        compiled graph, in which nothing can be waited for.
        """
        tokens, k = experts.shape
        count = self.gate_up_proj.weight.shape[0]
        local = experts.astype(mx.int32) - first
        mine = (local >= 0) & (local < count)
        if decoding or tokens * k < SORT_FROM:
            return mx.where(mine[..., None], self(x, mx.where(mine, local, 0).astype(mx.uint32)), 0)
        order = mx.argsort(mx.where(mine, local, count).reshape(-1))
        order = order[: int(mine.sum().item())]
        out = mx.zeros((tokens * k, x.shape[-1]), dtype=x.dtype)
        if order.size and not on_gpu() and self._wants_blocks(x, tokens * k):
            blocks = self._blocks(local.reshape(-1)[order])
            out[order] = self._pairs_in_blocks(x, blocks, order[blocks.source] // k)
        elif order.size:
            chosen = local.reshape(-1)[order].astype(mx.uint32)
            out[order] = self._pairs(_rows(x, order // k), chosen, is_sorted=True).squeeze(-2)
        return out.reshape(tokens, k, -1)


@lru_cache(maxsize=8)
def _in_order(shape: tuple[int, ...]) -> mx.array:
    """uint32 0, 1, 2, ... of a shape."""
    numbers = mx.arange(math.prod(shape), dtype=mx.uint32).reshape(shape)
    mx.eval(numbers)
    return numbers


def _rows(x: mx.array, index: mx.array) -> mx.array:
    """Rows of x [tokens, hidden] as [len(index), 1, hidden], with the axis there before the gather.

    x[index, None] is the same numbers, but its new axis has stride 1, which MLX's grouped product on CUDA (0.32.4)
    takes for the distance between rows: wrong results, no error.
    """
    return x.reshape(-1, 1, x.shape[-1])[index]


class SparseMoeBlock(nn.Module):
    """Router, routed experts and the shared expert (document, section 3)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.hidden_size, c.num_local_experts, bias=False)
        self.e_score_correction_bias = mx.zeros((c.num_local_experts,))
        self.switch_mlp = SwitchMLP(c)
        self.shared_experts = GatedMLP(c.hidden_size, c.shared_intermediate_size, c.swiglu_alpha, c.swiglu_limit)
        self.num_experts, self.k, self.scale = c.num_local_experts, c.num_experts_per_tok, c.routed_scaling_factor
        self.first_expert = 0  # of those this rank holds, where it holds whole experts
        self.comm = Comm()

    def __call__(self, x: mx.array) -> mx.array:
        """x [rows, tokens, hidden], of a decode step with one token a row -> as x."""
        flat = x.reshape(-1, x.shape[-1])
        experts, scores = self.route(flat)
        if self.switch_mlp.gate_up_proj.weight.shape[0] == self.num_experts:
            routed = self.switch_mlp(flat, experts)
        else:
            routed = self.switch_mlp.held(flat, experts, self.first_expert, decoding=x.shape[1] == 1)
        run = kernels.combine if trusted(self._combining(x.dtype)) else combine
        y = run(routed, scores, self.shared_experts(flat), self.scale)
        return self.comm.all_sum(y.reshape(x.shape))

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [tokens, hidden] -> chosen experts uint32 [tokens, k], their scores float32 [tokens, k].

        In float32 throughout: a bfloat16 router chooses other experts for some 2% of tokens. Every rank computes this
        from the same bits, so every rank chooses alike. The bias moves the choice only, not the scores.
        """
        # By MLX in any case: numpy adds up in another order on another kind of CPU, and ranks would choose otherwise.
        run = kernels.choose_experts if trusted(self._kernel) else choose_experts
        return run(self.gate(x.astype(mx.float32)), self.e_score_correction_bias.astype(mx.float32), self.k)

    def prepare(self, dtype: mx.Dtype) -> None:
        """See whether our kernels can be trusted with `dtype`."""
        logits, bias = (mx.random.normal((5, self.num_experts), key=mx.random.key(i)) for i in range(2))
        arguments = logits, bias[0], self.k

        def in_order(found: tuple[mx.array, mx.array]) -> list[mx.array]:
            order = mx.argsort(found[0], axis=-1)
            return [mx.take_along_axis(x, order, axis=-1) for x in found]

        check(
            self._kernel,
            lambda: in_order(kernels.choose_experts(*arguments)),
            lambda: in_order(choose_experts(*arguments)),
        )

        hidden = self.shared_experts.down_proj.weight.shape[0]
        routed = mx.random.normal((3, self.k + 1, hidden), key=mx.random.key(2)).astype(dtype)
        parts = routed[:, 1:], mx.sigmoid(logits[:3, : self.k]), routed[:, 0], self.scale
        check(self._combining(dtype), lambda: [kernels.combine(*parts)], lambda: [combine(*parts)])

    @property
    def _kernel(self) -> tuple[object, ...]:
        return ("choose_experts", self.num_experts, self.k)

    def _combining(self, dtype: mx.Dtype) -> tuple[object, ...]:
        return ("combine", self.k, self.scale, dtype)


def choose_experts(logits: mx.array, bias: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """kernels.choose_experts in MLX's own operations."""
    scores, losses = _score(logits, bias)
    experts = mx.argpartition(losses, kth=k - 1, axis=-1)[..., :k]
    return experts, mx.take_along_axis(scores, experts, axis=-1)


@fused
def _score(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Each expert's score, and what is least for those to choose."""
    scores = mx.sigmoid(logits)
    return scores, -(scores + bias)


def expert_weights(scores: mx.array, scale: float) -> list[mx.array]:
    """Scores of the chosen experts, float32 [tokens, k] -> k weights [tokens, 1] that add up to `scale`."""
    columns = [scores[:, i : i + 1] for i in range(scores.shape[-1])]
    # 1e-20 as in mlx-lm: scores that all underflow must give no expert a say, not NaN.
    factor = scale / (sum(columns[1:], columns[0]) + 1e-20)
    return [column * factor for column in columns]


@fused
def combine(routed: mx.array, scores: mx.array, shared: mx.array, scale: float) -> mx.array:
    """routed [tokens, k, hidden], weighted by scores, plus shared [tokens, hidden]. In float32, rounded once.

    Column by column, not as a sum over an axis: so it is one kernel.
    """
    total = shared.astype(mx.float32)
    for i, weight in enumerate(expert_weights(scores, scale)):
        total = total + routed[:, i].astype(mx.float32) * weight
    return total.astype(shared.dtype)
