"""Attention of one layer: this rank's heads, dense or block-sparse, summed over the ranks."""

import mlx.core as mx
import mlx.nn as nn

from m3dist.cache import LayerCache
from m3dist.comm import Comm
from m3dist.config import ModelConfig
from m3dist.model.decode import attend_one, attend_pages, attend_rows, attend_step
from m3dist.model.dense import attend_causal
from m3dist.model.heads import HeadProjections
from m3dist.model.layers import GemmaRMSNorm
from m3dist.model.positions import Part, Positions
from m3dist.model.products import multiply
from m3dist.model.sparse import attend_sparse
from m3dist.paged import PagedCache


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
        self._projections = self._make_projections()
        self.comm = Comm()
        self.set_groups((c.query_heads_per_kv_head,) * c.num_key_value_heads)

    def _make_projections(self) -> tuple[HeadProjections, ...]:
        """Heads of one width share product, norm and RoPE; index heads may be narrower."""
        c = self.config
        if not self.is_sparse:
            return (HeadProjections(self, ("q", "k", "v"), c.head_dim, c),)
        if c.sparse_index_dim == c.head_dim:
            return (HeadProjections(self, ("q", "index_q", "k", "index_k", "v"), c.head_dim, c),)
        index = HeadProjections(self, ("index_q", "index_k"), c.sparse_index_dim, c)
        return HeadProjections(self, ("q", "k", "v"), c.head_dim, c), index

    def join(self) -> None:
        """Lay the projections' weights out for one product; to be called when they are all there."""
        for projections in self._projections:
            projections.join()

    def prepare(self, dtype: mx.Dtype) -> None:
        for projections in self._projections:
            projections.prepare(dtype)

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

    def heads(self, x: mx.array, offset: mx.array) -> dict[str, mx.array]:
        """x [rows, tokens, hidden] -> q, k, v and on sparse layers index_q and index_k: [rows, heads, tokens, dim]."""
        found = {}
        for projections in self._projections:
            found |= projections(x, offset)
        return found

    def remember(self, heads: dict[str, mx.array], cache: LayerCache | PagedCache) -> None:
        """Take the tokens into the cache."""
        # Index keys are kept from the first token on, also while every block fits the budget: later tokens choose
        # among them all.
        cache.append(heads["k"], heads["v"], heads.get("index_k"))

    def attend(self, heads: dict[str, mx.array], positions: Positions, cache: LayerCache | PagedCache) -> mx.array:
        """Take the tokens into the cache and attend: [rows, heads, tokens, head_dim]."""
        self.remember(heads, cache)
        q = heads["q"] if self._fill is None else heads["q"][:, self._fill]
        out = self._attend(q, heads.get("index_q"), positions, cache)
        return out if self._keep is None else out[:, self._keep]

    def _attend(
        self, q: mx.array, index_q: mx.array | None, positions: Positions, cache: LayerCache | PagedCache
    ) -> mx.array:
        c = self.config
        sparse = self.is_sparse and positions.end > c.sparse_topk_blocks * c.sparse_block_size
        if isinstance(cache, PagedCache):
            if sparse and positions.tokens == 1 and c.sparse_local_block:
                return attend_pages(q, index_q, cache, positions, c)
            if parts := positions.parts(cache.table, cache.slot_bytes):
                return self._apart(q, index_q, parts, cache)
        return self._sparse(q, index_q, positions, cache) if sparse else self._dense(q, positions, cache)

    def _apart(self, q: mx.array, index_q: mx.array | None, parts: list[Part], cache: PagedCache) -> mx.array:
        """Rows of like lengths together, part by part: none reads as far as another's longest row, and what it reads
        lies in memory alone."""
        out: list[mx.array] = []
        for part in parts:
            if out:
                cache.wait(out[-1])
            index = None if index_q is None else index_q[part.rows]
            out.append(self._attend(q[part.rows], index, part.positions, PagedCache(cache.layer, part.table)))
        return mx.concatenate(out)[mx.argsort(mx.concatenate([part.rows for part in parts]))]

    def merge(self, out: mx.array) -> mx.array:
        """What `attend` gave -> [rows, tokens, hidden], of all ranks' heads."""
        rows, _, tokens, _ = out.shape
        if tokens > 1:
            out = out.transpose(0, 2, 1, 3)
        return self.comm.all_sum(multiply(self.o_proj, out.reshape(rows, tokens, -1)))

    def _dense(self, q: mx.array, positions: Positions, cache: LayerCache | PagedCache) -> mx.array:
        """Causal attention over everything up to each query's own position."""
        scale = self.config.head_dim**-0.5
        if positions.tokens == 1 and isinstance(cache, PagedCache):
            keys, values = cache.gather(cache.table.blocks(cache.heads))
            return attend_rows(q, keys, values, scale, positions.seen(keys.shape[2], q.dtype))
        if positions.aligned and positions.tokens == 1:
            return attend_one(q, cache.keys[:, :, : positions.end], cache.values[:, :, : positions.end], scale)
        return attend_causal(q, cache.keys, cache.values, positions, scale)

    def _sparse(self, q: mx.array, index_q: mx.array, positions: Positions, cache: LayerCache | PagedCache) -> mx.array:
        c, (rows, _, tokens, dim) = self.config, q.shape
        if tokens == 1 and positions.aligned and c.sparse_local_block:
            step = positions.step(cache.capacity, c)
            return attend_step(q, cache.keys, cache.values, index_q, cache.index_keys, step, c)
        # Whole blocks: the buffers' capacity is a multiple of the block, so these cuts are too.
        slots = -(-positions.end // c.sparse_block_size) * c.sparse_block_size
        grouped = q.reshape(rows, len(self._groups), -1, tokens, dim)
        index_k = cache.index_keys[:, :, :slots]
        out = attend_sparse(grouped, cache.keys, cache.values, index_q, index_k, positions.array, c, c.head_dim**-0.5)
        return out.reshape(rows, -1, tokens, dim)
