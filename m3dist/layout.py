"""How MiniMax-M3 is cut over ranks: the table RULES is the whole truth. The only file that divides by the world size.

A *unit* is what may not be split: a query head, a KV head, a quantisation group of an MLP's columns, a vocabulary row,
an expert. A *cut* is the rule for a tensor: which axis is shared out, in which unit. A *slice* is what a rank holds.
A rank's units are one consecutive range, so a share is a handful of numbers; ranges need not be equal, any world works.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.tensors import Inventory, TensorSpec, modules, split_name

ROWS, COLUMNS, EXPERTS = -2, -1, -3  # axes, counted from the last: [experts, rows (out), columns (in)]
LARGEST_WORLD = 16


@dataclass(frozen=True)
class Cut:
    """Share out `axis` in whole `unit`s. `parts` tensors are packed along the axis (gate, then up), each cut alike."""

    axis: int | None = None
    unit: str = ""
    parts: int = 1


WHOLE = Cut()  # every rank holds all of it

# Every rank attends with a range of the query heads; o_proj's products are summed.
_HEADS = (
    ("*.self_attn.q_proj", Cut(ROWS, "head")),
    ("*.self_attn.k_proj", Cut(ROWS, "kv_head")),
    ("*.self_attn.v_proj", Cut(ROWS, "kv_head")),
    ("*.self_attn.index_q_proj", Cut(ROWS, "kv_head")),  # index head h selects for KV head h
    ("*.self_attn.index_k_proj", WHOLE),  # one index key for all heads
    ("*.self_attn.o_proj", Cut(COLUMNS, "head")),
)
# Every rank attends with all heads: one sum a layer less, for more bytes read and more cache. The residual stream is
# then the same bits on every rank only where all of them compute alike: for machines of one kind.
_REPLICATED = (("*.self_attn.*_proj", WHOLE),)
_COMMON = (
    ("*.embed_tokens", Cut(ROWS, "vocabulary")),
    ("*.lm_head", Cut(ROWS, "vocabulary")),
    ("*norm", WHOLE),
    ("*.mlp.gate_up_proj", Cut(ROWS, "dense", parts=2)),
    ("*.mlp.down_proj", Cut(COLUMNS, "dense")),
    ("*.block_sparse_moe.gate", WHOLE),  # every rank routes every token
    ("*.block_sparse_moe.e_score_correction_bias", WHOLE),
    ("*.shared_experts.gate_up_proj", Cut(ROWS, "shared", parts=2)),
    ("*.shared_experts.down_proj", Cut(COLUMNS, "shared")),
)
# Every rank holds a range of columns of every expert: each token's work is shared evenly, whatever the router chose.
_EXPERT_COLUMNS = (
    ("*.switch_mlp.gate_up_proj", Cut(ROWS, "expert", parts=2)),
    ("*.switch_mlp.down_proj", Cut(COLUMNS, "expert")),
)
# Expert parallelism: every rank holds whole experts. Larger matmuls, but the router decides who works.
_WHOLE_EXPERTS = (("*.switch_mlp.*", Cut(EXPERTS, "whole_expert")),)

# By how the routed experts and how the attention are cut.
RULES: Mapping[tuple[str, str], tuple[tuple[str, Cut], ...]] = {
    ("columns", "heads"): _COMMON + _HEADS + _EXPERT_COLUMNS,
    ("whole", "heads"): _COMMON + _HEADS + _WHOLE_EXPERTS,
    ("columns", "replicated"): _COMMON + _REPLICATED + _EXPERT_COLUMNS,
    ("whole", "replicated"): _COMMON + _REPLICATED + _WHOLE_EXPERTS,
}

Span = tuple[int, int]  # [start, stop)


@cache  # asked for every tensor, again and again, while planning
def rule_for(module: str, experts: str, attention: str) -> Cut:
    """The one rule of RULES[experts, attention] that matches a module's name. Raises PlanError for none or several."""
    found = [(pattern, cut) for pattern, cut in RULES[experts, attention] if fnmatchcase(module, pattern)]
    if len(found) != 1:
        patterns = ", ".join(pattern for pattern, _ in found) or "none"
        raise PlanError(f"{module}: exactly one layout rule must match, found {patterns}")
    return found[0][1]


@dataclass(frozen=True)
class Slice:
    """The part of a tensor a rank holds: `spans` of stored elements along `axis`, or all of it where axis is None."""

    axis: int | None
    spans: tuple[Span, ...] = ()

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this slice of a tensor of shape `whole`."""
        shape = list(whole)
        if self.axis is not None:
            shape[self.axis] = sum(stop - start for start, stop in self.spans)
        return tuple(shape)


@dataclass(frozen=True)
class Share:
    """One rank's part of every unit: `spans[unit]` of `counts[unit]` units."""

    rank: int
    world: int
    counts: Mapping[str, int]
    spans: Mapping[str, Span]

    def slice(self, name: str, spec: TensorSpec, cut: Cut) -> Slice:
        """What this rank holds of a tensor. Raises PlanError, naming it, where units are not whole elements."""
        if cut.axis is None:
            return Slice(None)
        extent, pieces = spec.shape[cut.axis], cut.parts * self.counts[cut.unit]
        if extent % pieces:
            raise PlanError(f"{name} {list(spec.shape)}: {extent} does not divide into {pieces} parts ({cut.unit})")
        size, (start, stop) = extent // pieces, self.spans[cut.unit]
        part = extent // cut.parts
        return Slice(cut.axis, tuple((p * part + start * size, p * part + stop * size) for p in range(cut.parts)))


def count_units(inventory: Inventory, experts: str, attention: str) -> dict[str, int]:
    """How many units there are of each kind. Column cuts keep whole quantisation groups, also of heads in o_proj."""
    c = inventory.config
    groups = {unit: 1 for unit in ("head", "dense", "expert", "shared")}
    for module in modules(c).values():
        cut, quantization = rule_for(module.name, experts, attention), inventory.quantization.get(module.name)
        if cut.axis == COLUMNS and quantization:
            groups[cut.unit] = math.lcm(groups[cut.unit], quantization.group_size)

    def columns(unit: str, width: int) -> int:
        # Without quantisation nothing forbids single columns; 32 keeps matmuls aligned and allows quantising later.
        return width // (groups[unit] if groups[unit] > 1 else math.gcd(width, 32))

    heads_a_unit = math.lcm(c.head_dim, groups["head"]) // c.head_dim
    counts = {
        "head": c.num_attention_heads // heads_a_unit,
        "kv_head": c.num_key_value_heads,
        "dense": columns("dense", c.dense_intermediate_size),
        "expert": columns("expert", c.intermediate_size),
        "shared": columns("shared", c.shared_intermediate_size),
        "vocabulary": c.vocab_size,
        "whole_expert": c.num_local_experts,
    }
    used = {rule_for(module, experts, attention).unit for module in modules(c)}
    return {unit: counts[unit] for unit in counts if unit in used}


def allot(units: int, weights: Sequence[float], load: Sequence[float] | None = None) -> list[int]:
    """Share `units` out by `weights`, evening out what each rank already bears (`load`, in the same units).

    Fills the ranks like water: (load + units) / weight as level as possible; then whole units by largest remainder.
    Every rank gets at least one. Same inputs, same answer on every machine.
    """
    world = len(weights)
    load = load or [0.0] * world
    active = set(range(world))
    while True:
        # fsum: Python's sum rounds otherwise from 3.12 on than before, and ranks must plan alike.
        level = math.fsum([units, *(load[r] for r in active)]) / math.fsum(weights[r] for r in active)
        dry = {r for r in active if load[r] > level * weights[r]}
        if not dry:
            break
        active -= dry
    ideal = [max(0.0, level * weights[r] - load[r]) if r in active else 0.0 for r in range(world)]
    given = [max(1, math.floor(x + 1e-9)) for x in ideal]
    while sum(given) != units:
        step = 1 if sum(given) < units else -1
        candidates = [r for r in range(world) if step > 0 or given[r] > 1]
        neediest = max(candidates, key=lambda r: (step * (ideal[r] - given[r]), -r))
        given[neediest] += step
    return given


def divide(
    inventory: Inventory, weights: Sequence[float], experts: str = "columns", attention: str = "heads"
) -> tuple[Share, ...]:
    """Every rank's share. `weights`: how much each rank should take, any positive scale, one a rank.

    What one cut leaves uneven the next evens out: MLP columns first (the coarsest unit), then heads, then vocabulary
    rows (the finest), by bytes read per decoded token, those that every rank reads included. KV and index heads follow
    the query heads that need them, so a KV head is held by more than one rank where its query heads are. Raises
    PlanError where a rank would get nothing.
    """
    world = len(weights)
    if not 1 <= world <= LARGEST_WORLD:
        raise PlanError(f"a world of {world} ranks: 1 to {LARGEST_WORLD} are possible")
    if any(not (w > 0 and math.isfinite(w)) for w in weights):
        raise PlanError(f"weights must be positive numbers, not {list(weights)}")
    if (experts, attention) not in RULES:
        known = " or ".join(f"{e!r}, {a!r}" for e, a in RULES)
        raise PlanError(f"experts and attention must be {known}, not {experts!r}, {attention!r}")
    counts = count_units(inventory, experts, attention)
    cost, whole = _read_bytes(inventory, counts, experts, attention)
    load = [whole] * world
    spans: dict[str, list[Span]] = {}
    for unit in (u for u in ("whole_expert", "expert", "shared", "dense", "head", "vocabulary") if u in counts):
        if counts[unit] < world:
            raise PlanError(_too_few(unit, counts[unit], world, inventory.config))
        evened = [x / cost[unit] for x in load] if unit in ("head", "vocabulary") and cost[unit] else None
        given = allot(counts[unit], weights, evened)
        load = [x + n * cost[unit] for x, n in zip(load, given)]
        ends = [sum(given[: r + 1]) for r in range(world)]
        spans[unit] = [(end - n, end) for end, n in zip(ends, given)]
        if unit == "head":
            heads, kv_heads = counts["head"], counts["kv_head"]
            spans["kv_head"] = [(a * kv_heads // heads, -(-b * kv_heads // heads)) for a, b in spans["head"]]
            load = [x + (b - a) * cost["kv_head"] for x, (a, b) in zip(load, spans["kv_head"])]
    return tuple(Share(r, world, counts, {unit: s[r] for unit, s in spans.items()}) for r in range(world))


def query_heads(share: Share, config: ModelConfig) -> Span:
    """The query heads [start, stop) of a rank: all of them where attention is replicated."""
    if "head" not in share.spans:
        return 0, config.num_attention_heads
    size = config.num_attention_heads // share.counts["head"]
    start, stop = share.spans["head"]
    return start * size, stop * size


def kv_heads(share: Share, config: ModelConfig) -> Span:
    """The KV heads [start, stop) of a rank, whose index heads it has too."""
    return share.spans.get("kv_head", (0, config.num_key_value_heads))


def head_groups(share: Share, config: ModelConfig) -> tuple[int, ...]:
    """How many of a rank's query heads read each of its KV heads, in order: (16, 6) for heads 0..21 in groups of 16."""
    (start, stop), group = query_heads(share, config), config.query_heads_per_kv_head
    first, last = kv_heads(share, config)
    return tuple(min(stop, (kv + 1) * group) - max(start, kv * group) for kv in range(first, last))


def decode_fraction(module: str, config: ModelConfig) -> float:
    """The part of a module's bytes that one decoded token reads: chosen experts only, one row of the embedding."""
    if ".switch_mlp." in module:
        return config.num_experts_per_tok / config.num_local_experts
    if module.endswith(".embed_tokens") and not config.tie_word_embeddings:
        return 1 / config.vocab_size
    return 1.0


def _read_bytes(
    inventory: Inventory, counts: Mapping[str, int], experts: str, attention: str
) -> tuple[dict[str, float], float]:
    """Bytes one decoded token reads for one unit of each kind; and those that every rank reads."""
    cost, whole = dict.fromkeys(counts, 0.0), 0.0
    for name, spec in inventory.specs().items():
        module, _ = split_name(name)
        unit, read = rule_for(module, experts, attention).unit, spec.nbytes * decode_fraction(module, inventory.config)
        if unit:
            cost[unit] += read / counts[unit]
        else:
            whole += read
    return cost, whole


def _too_few(unit: str, count: int, world: int, config: ModelConfig) -> str:
    what = {
        "head": f"{config.num_attention_heads} query heads in whole quantisation groups make {count} parts",
        "vocabulary": f"{count} vocabulary rows",
        "whole_expert": f"{count} experts",
    }.get(unit, f"the {unit} columns make {count} whole quantisation groups")
    advice = ", or --attention replicated" if unit == "head" else ""
    return f"{what}: not enough for {world} ranks. Use at most {count} ranks, or a smaller quantisation group{advice}."
