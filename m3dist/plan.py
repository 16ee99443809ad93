"""Who holds what: a checkpoint's tensors and the ranks' weights -> every rank's slices and what they cost. No MLX."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from m3dist import layout
from m3dist.errors import PlanError
from m3dist.tensors import BYTES, Inventory, TensorSpec, split_name

INDEX_BYTES = 4  # a value of index K: cache.py keeps it in float32


@dataclass(frozen=True)
class Plan:
    """The cut of one checkpoint over one world. Build it with `make_plan`, which checks it."""

    inventory: Inventory
    weights: tuple[float, ...]
    experts: str
    attention: str
    shares: tuple[layout.Share, ...]

    @property
    def world(self) -> int:
        return len(self.shares)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, whole."""
        return self.inventory.specs()

    def slices(self, rank: int) -> dict[str, layout.Slice]:
        """Tensor name -> the slice `rank` holds."""
        share = self.shares[rank]
        return {
            name: share.slice(name, spec, layout.rule_for(split_name(name)[0], self.experts, self.attention))
            for name, spec in self.specs.items()
        }

    def held_specs(self, rank: int) -> dict[str, TensorSpec]:
        """Tensor name -> shape and dtype of what `rank` holds."""
        slices = self.slices(rank)
        return {name: TensorSpec(slices[name].shape(spec.shape), spec.dtype) for name, spec in self.specs.items()}

    def bytes_held(self, rank: int) -> int:
        """Bytes of weights in `rank`'s memory."""
        return sum(spec.nbytes for spec in self.held_specs(rank).values())

    def bytes_read(self, rank: int) -> int:
        """Bytes of weights `rank` reads for one decoded token, batch 1; whole experts: the mean over even routing."""
        config = self.inventory.config
        return round(
            sum(
                spec.nbytes * layout.decode_fraction(split_name(name)[0], config)
                for name, spec in self.held_specs(rank).items()
            )
        )

    def cache_bytes_per_token(self, rank: int) -> int:
        """Bytes of K, V and index K that `rank` keeps for one token of context. Index K is kept by every rank."""
        c = self.inventory.config
        first, last = layout.kv_heads(self.shares[rank], c)
        main = 2 * (last - first) * c.head_dim * c.num_hidden_layers
        index = c.sparse_index_dim * sum(c.sparse_attention_freq)
        return main * BYTES[self.inventory.dtype] + index * INDEX_BYTES

    @cached_property
    def digest(self) -> str:
        """sha256 over config, formats and cut: ranks that differ in it must not compute together."""
        content = {
            "config": asdict(self.inventory.config),
            "dtype": self.inventory.dtype,
            "quantization": {name: str(q) for name, q in self.inventory.quantization.items() if q},
            "experts": self.experts,
            "attention": self.attention,
            "spans": [dict(share.spans) for share in self.shares],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def make_plan(
    inventory: Inventory, weights: int | Sequence[float], experts: str = "columns", attention: str = "heads"
) -> Plan:
    """The plan for a world of `weights` equal ranks, or of one rank a weight. `experts`, `attention`: a key of
    layout.RULES.

    Raises PlanError, naming the tensor or the unit, where the cut cannot be made.
    """
    weights = [1.0] * weights if isinstance(weights, int) else [float(w) for w in weights]
    plan = Plan(inventory, tuple(weights), experts, attention, layout.divide(inventory, weights, experts, attention))
    _check_covered(plan)
    return plan


def plan_world(
    inventory: Inventory, world: int, weights: Sequence[float] | None, experts: str, attention: str = "heads"
) -> Plan:
    """The plan for `world` ranks that are there already: equal ones, or of one weight each.

    Raises PlanError also where the weights are not as many as the ranks.
    """
    if weights is not None and len(weights) != world:
        raise PlanError(f"{len(weights)} weights for {world} ranks: give one number a rank")
    return make_plan(inventory, weights or world, experts, attention)


def _check_covered(plan: Plan) -> None:
    """Every unit of every kind is on some rank; only KV heads are on several. Bugs in a rule end here, not in a sum."""
    for unit, count in plan.shares[0].counts.items():
        spans = sorted(share.spans[unit] for share in plan.shares)
        joined = all(a[1] >= b[0] if unit == "kv_head" else a[1] == b[0] for a, b in zip(spans, spans[1:]))
        if not joined or spans[0][0] != 0 or spans[-1][1] != count:
            raise PlanError(f"the ranks' spans of {unit} do not cover {count} exactly: {spans}")
    for rank in range(plan.world):
        plan.slices(rank)
