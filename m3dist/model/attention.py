"""Attention of one layer: this rank's heads, dense or block-sparse, summed over the ranks."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from m3dist.cache import LayerCache
from m3dist.comm import Comm
from m3dist.config import ModelConfig
from m3dist.model.layers import GemmaRMSNorm
from m3dist.model.sparse import attend_sparse


@dataclass(frozen=True)
class Positions:
    """Where the tokens of one call stand: row r's are starts[r], starts[r] + 1, ..."""

    starts: tuple[int, ...]
    tokens: int

    @property
    def aligned(self) -> bool:
        """All rows start at the same position."""
        return len(set(self.starts)) == 1

    @property
    def end(self) -> int:
        """Slots in use after this call, of the longest row."""
        return max(self.starts) + self.tokens

    @property
    def offset(self) -> int | mx.array:
        """What mx.fast.rope takes."""
        return self.starts[0] if self.aligned else mx.array(self.starts)

    def array(self) -> mx.array:
        """int32 [rows, tokens]."""
        return mx.array(self.starts, dtype=mx.int32)[:, None] + mx.arange(self.tokens, dtype=mx.int32)


class Attention(nn.Module):
    """Per-head QK norm, partial RoPE, grouped-query attention, and on sparse layers the block indexer."""

    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        hidden, dim = c.hidden_size, c.head_dim
        self.config, self.is_sparse = c, c.sparse_attention_freq[layer]
        self.q_proj = nn.Linear(hidden, c.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, c.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, c.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * dim, hidden, bias=False)
        self.q_norm = GemmaRMSNorm(dim, c.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(dim, c.rms_norm_eps)
        if self.is_sparse:
            self.index_q_proj = nn.Linear(hidden, c.sparse_num_index_heads * c.sparse_index_dim, bias=False)
            self.index_k_proj = nn.Linear(hidden, c.sparse_index_dim, bias=False)
            self.index_q_norm = GemmaRMSNorm(c.sparse_index_dim, c.rms_norm_eps)
            self.index_k_norm = GemmaRMSNorm(c.sparse_index_dim, c.rms_norm_eps)
        self.comm = Comm()
        self.set_groups((c.query_heads_per_kv_head,) * c.num_key_value_heads)

    def set_groups(self, groups: tuple[int, ...]) -> None:
        """How many of this rank's query heads read each of its KV heads.

        MLX's attention wants groups of one size. Where a cut falls inside a group they differ: short groups are then
        filled up with copies of a head, whose results are dropped. That costs arithmetic, but no reads of K and V.
        """
        self._groups, widest = groups, max(groups)
        firsts = [sum(groups[:kv]) for kv in range(len(groups))]
        fill = [first + min(i, n - 1) for first, n in zip(firsts, groups) for i in range(widest)]
        keep = [kv * widest + i for kv, n in enumerate(groups) for i in range(n)]
        even = all(n == widest for n in groups)
        self._fill, self._keep = (None, None) if even else (mx.array(fill), mx.array(keep))

    def __call__(self, x: mx.array, positions: Positions, cache: LayerCache) -> mx.array:
        """x [rows, tokens, hidden] -> the same shape, of all ranks' heads. Takes the tokens into the cache."""
        q = self._heads(self.q_proj, self.q_norm, x, self.config.head_dim, positions)
        k = self._heads(self.k_proj, self.k_norm, x, self.config.head_dim, positions)
        v = _split_heads(self.v_proj(x), self.config.head_dim)
        index_k = None
        if self.is_sparse:
            # Kept from the first token on, also while every block fits the budget: later tokens choose among them all.
            index_dim = self.config.sparse_index_dim
            index_k = self._heads(self.index_k_proj, self.index_k_norm, x, index_dim, positions)
        cache.append(k, v, index_k)
        if self._fill is not None:
            q = q[:, self._fill]
        if self.is_sparse and positions.end > self.config.sparse_topk_blocks * self.config.sparse_block_size:
            out = self._sparse(q, x, positions, cache)
        else:
            out = self._dense(q, positions, cache)
        if self._keep is not None:
            out = out[:, self._keep]
        merged = out.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        return self.comm.all_sum(self.o_proj(merged))

    def _heads(self, proj: nn.Module, norm: nn.Module, x: mx.array, dim: int, positions: Positions) -> mx.array:
        """Project, split into heads, normalise each head, rotate: [rows, heads, tokens, dim]."""
        heads, c = norm(_split_heads(proj(x), dim)), self.config
        return mx.fast.rope(
            heads, c.rotary_dim, traditional=False, base=c.rope_theta, scale=1.0, offset=positions.offset
        )

    def _dense(self, q: mx.array, positions: Positions, cache: LayerCache) -> mx.array:
        """Causal attention over everything up to each query's own position."""
        keys, values = cache.keys[:, :, : positions.end], cache.values[:, :, : positions.end]
        if positions.aligned:
            mask = "causal" if positions.tokens > 1 else None
        else:
            mask = mx.arange(positions.end) <= positions.array()[:, None, :, None]
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=self.config.head_dim**-0.5, mask=mask)

    def _sparse(self, q: mx.array, x: mx.array, positions: Positions, cache: LayerCache) -> mx.array:
        c, (rows, _, tokens, dim) = self.config, q.shape
        index_q = self._heads(self.index_q_proj, self.index_q_norm, x, c.sparse_index_dim, positions)
        # Whole blocks: the buffers' capacity is a multiple of the block, so these cuts are too.
        slots = -(-positions.end // c.sparse_block_size) * c.sparse_block_size
        grouped = q.reshape(rows, len(self._groups), -1, tokens, dim)
        index_k = cache.index_keys[:, :, :slots]
        out = attend_sparse(grouped, cache.keys, cache.values, index_q, index_k, positions.array(), c, c.head_dim**-0.5)
        return out.reshape(rows, -1, tokens, dim)


def _split_heads(x: mx.array, dim: int) -> mx.array:
    """[rows, tokens, heads * dim] -> [rows, heads, tokens, dim]. How many heads, the array says."""
    return x.reshape(*x.shape[:2], -1, dim).transpose(0, 2, 1, 3)
