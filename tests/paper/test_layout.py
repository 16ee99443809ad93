"""The cut on paper: for random models and random machines, every element is held once, or by declared repetition."""

import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from m3dist import layout
from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.options import ATTENTION, EXPERTS
from m3dist.plan import make_plan
from m3dist.tensors import Inventory, Quantization, modules, split_name

FORMATS = [
    None,
    Quantization("affine", 4, 64),
    Quantization("affine", 3, 32),
    Quantization("affine", 8, 128),
    Quantization("mxfp8", 8, 32),
    Quantization("mxfp4", 4, 32),
    Quantization("nvfp4", 4, 16),
]


@st.composite
def inventories(draw) -> Inventory:
    """Small models of every proportion the layout must stand, in one format each."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    head_dim = draw(st.sampled_from([16, 32, 64, 128]))
    layers = draw(st.integers(1, 3))
    flags = st.lists(st.booleans(), min_size=layers, max_size=layers).map(tuple)
    sparse = draw(flags)
    config = ModelConfig(
        model_type="minimax_m3_vl",
        vocab_size=draw(st.integers(16, 300)),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 16)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim // 2,
        rope_theta=5e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=draw(st.booleans()),
        moe_layer_freq=draw(flags),
        dense_intermediate_size=128 * draw(st.integers(1, 20)),
        intermediate_size=128 * draw(st.integers(1, 20)),
        shared_intermediate_size=128 * draw(st.integers(1, 20)),
        num_local_experts=draw(st.integers(2, 40)),
        num_experts_per_tok=2,
        routed_scaling_factor=2.0,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        sparse_attention_freq=sparse,
        sparse_num_index_heads=kv_heads,
        sparse_index_dim=head_dim,
        sparse_block_size=16,
        sparse_topk_blocks=4,
        sparse_local_block=1,
        sparse_init_block=0,
    )
    quantization = draw(st.sampled_from(FORMATS))
    # A matrix whose rows are no whole groups stays as it is, as in MLX's converters.
    fits = [
        m
        for m in modules(config).values()
        if m.is_matrix and quantization and m.shape[-1] % quantization.group_size == 0
    ]
    return Inventory(config, "BF16", {m.name: quantization for m in fits})


weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=16)
cuts = st.sampled_from(list(layout.RULES))


@settings(max_examples=150, deadline=None)
@given(inventories(), weights, cuts)
def test_every_element_is_held_once_or_by_declared_repetition(inventory, weights, cut_by):
    try:
        plan = make_plan(inventory, weights, *cut_by)
    except PlanError as error:
        assert "not enough for" in str(error)
        counts = layout.count_units(inventory, *cut_by)
        assert any(count < len(weights) for unit, count in counts.items() if unit != "kv_head")
        return
    slices = [plan.slices(rank) for rank in range(plan.world)]
    for name, spec in plan.specs.items():
        cut = layout.rule_for(split_name(name)[0], *cut_by)
        for part in slices:
            assert part[name].axis == cut.axis
        if cut.axis is None:
            continue
        extent = spec.shape[cut.axis]
        held = [0] * extent
        for part in slices:
            for start, stop in part[name].spans:
                for i in range(start, stop):
                    held[i] += 1
        if cut.unit == "kv_head":  # repeated exactly where a group's query heads are on several ranks
            assert min(held) >= 1
        else:
            assert held == [1] * extent, name


@settings(max_examples=150, deadline=None)
@given(inventories(), weights, cuts)
def test_a_share_never_breaks_a_quantisation_group(inventory, weights, cut_by):
    try:
        plan = make_plan(inventory, weights, *cut_by)
    except PlanError:
        assume(False)
    for rank in range(plan.world):
        parts = plan.slices(rank)
        for name, quantization in inventory.quantization.items():
            weight, scales = parts[f"{name}.weight"], parts[f"{name}.scales"]
            if weight.axis == layout.COLUMNS:
                words = quantization.group_size * quantization.bits // 32
                for (a, b), (c, d) in zip(weight.spans, scales.spans, strict=True):
                    assert (a, b) == (c * words, d * words)
            else:
                assert weight == scales


@settings(max_examples=150, deadline=None)
@given(inventories(), weights)
def test_query_heads_find_their_kv_head_on_their_rank(inventory, weights):
    try:
        plan = make_plan(inventory, weights)
    except PlanError:
        assume(False)
    config = inventory.config
    for share in plan.shares:
        groups, (start, stop) = layout.head_groups(share, config), layout.query_heads(share, config)
        first, last = share.spans["kv_head"]
        assert len(groups) == last - first and all(groups) and sum(groups) == stop - start
        owners = [first + kv for kv, n in enumerate(groups) for _ in range(n)]
        assert owners == [head // config.query_heads_per_kv_head for head in range(start, stop)]


@settings(max_examples=150, deadline=None)
@given(inventories(), weights, st.sampled_from(["columns", "whole"]))
def test_replicated_attention_is_whole_everywhere(inventory, weights, experts):
    """Also in worlds of more ranks than heads; everything else is cut as ever."""
    try:
        plan = make_plan(inventory, weights, experts, "replicated")
    except PlanError as error:
        assert "heads" not in str(error)
        return
    config = inventory.config
    for rank, share in enumerate(plan.shares):
        held = plan.held_specs(rank)
        for name, spec in plan.specs.items():
            if ".self_attn." in name:
                assert held[name] == spec
        assert layout.query_heads(share, config) == (0, config.num_attention_heads)
        group = config.query_heads_per_kv_head
        assert layout.head_groups(share, config) == (group,) * config.num_key_value_heads
        assert plan.cache_bytes_per_token(rank) == make_plan(inventory, 1).cache_bytes_per_token(0)


@given(st.integers(1, 500), weights)
def test_allot_gives_all_units_and_nobody_none(units, weights):
    assume(units >= len(weights))
    given_units = layout.allot(units, weights)
    assert sum(given_units) == units and min(given_units) >= 1
    fair = [units * w / sum(weights) for w in weights]
    if min(fair) >= 1:
        assert all(abs(n - f) < 1 + 1e-6 for n, f in zip(given_units, fair, strict=True))


@given(st.lists(st.floats(0, 30), min_size=2, max_size=8), st.integers(8, 400))
def test_allot_evens_out_a_load(load, units):
    """Who bears more gets less: totals differ by at most a unit, unless somebody was above the level from the start."""
    given_units = layout.allot(units, [1.0] * len(load), load)
    assert sum(given_units) == units
    totals = [n + x for n, x in zip(given_units, load, strict=True)]
    level = (units + sum(load)) / len(load)
    if max(load) + 1 <= level:
        assert max(totals) - min(totals) < 2


def test_exactly_one_rule_matches_every_tensor(published):
    for cut_by in layout.RULES:
        for module in modules(published):
            layout.rule_for(module, *cut_by)


def test_no_rule_and_two_rules_are_errors(monkeypatch):
    with pytest.raises(PlanError, match=r"self_attn\.gate: exactly one layout rule must match, found none"):
        layout.rule_for("language_model.model.layers.0.self_attn.gate", "columns", "heads")
    doubled = layout.RULES["columns", "heads"] + (("*.q_proj", layout.WHOLE),)
    monkeypatch.setattr(layout, "RULES", {("columns", "heads"): doubled})
    layout.rule_for.cache_clear()
    with pytest.raises(PlanError, match=r"found \*\.self_attn\.q_proj, \*\.q_proj"):
        layout.rule_for("language_model.model.layers.0.self_attn.q_proj", "columns", "heads")


def test_the_flags_offer_every_rule():
    assert set(layout.RULES) == {(experts, attention) for experts in EXPERTS for attention in ATTENTION}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("weights", [[1, 1, 2], [3, 1, 2, 2]])
def test_unequal_ranks_read_by_their_weights(published, weights, attention):
    """Heads and vocabulary make good what every rank reads alike; replicated attention is too much for the head."""
    plan = make_plan(Inventory(published, "BF16"), weights, attention=attention)
    times = [plan.bytes_read(rank) / weight for rank, weight in enumerate(weights)]
    assert max(times) / min(times) < (1.01 if attention == "heads" else 2.2)


def test_every_world_up_to_16_cuts_the_published_model(published):
    for world in range(1, 17):
        plan = make_plan(Inventory(published, "BF16"), world)
        read = [plan.bytes_read(rank) for rank in range(world)]
        # 1.057 at 14 ranks: one group of expert columns more is more than heads and vocabulary can even out
        assert max(read) / min(read) < 1.06, world
        kv_heads = sum(share.spans["kv_head"][1] - share.spans["kv_head"][0] for share in plan.shares)
        assert kv_heads >= max(4, world)
        if 4 % world == 0:
            assert kv_heads == 4


def test_replicated_attention_in_every_world_up_to_16(published):
    """No heads to even out a group of expert columns, but attention outweighs it."""
    alone = make_plan(Inventory(published, "BF16"), 1)
    for world in range(1, 17):
        plan = make_plan(Inventory(published, "BF16"), world, attention="replicated")
        read = [plan.bytes_read(rank) for rank in range(world)]
        assert max(read) / min(read) < 1.06, world
        attention = 2 * 60 * (2 * 64 + 2 * 4) * 128 * 6144  # q and o of 64 heads, k and v of 4, in 2 bytes
        assert min(read) > attention + (alone.bytes_read(0) - attention) / world * 0.9


def test_ranges_that_leave_a_gap_are_refused(published, monkeypatch):
    shares = layout.divide(Inventory(published, "BF16"), [1.0] * 4)
    monkeypatch.setattr(layout, "divide", lambda *_: shares[:2] + shares[3:])
    with pytest.raises(PlanError, match="spans of head do not cover 64 exactly"):
        make_plan(Inventory(published, "BF16"), 3)


def test_the_digest_knows_config_formats_and_dtype(published):
    bits = {"language_model.lm_head": Quantization("affine", 4, 64)}
    other = dataclasses.replace(published, rope_theta=1e4)
    inventories = [Inventory(published, "BF16"), Inventory(published, "F32"), Inventory(other, "BF16")]
    inventories.append(Inventory(published, "BF16", bits))
    assert len({make_plan(inventory, 2).digest for inventory in inventories}) == 4
    whole = make_plan(Inventory(published, "BF16"), 1, "whole")
    assert whole.digest != make_plan(Inventory(published, "BF16"), 1).digest
    replicated = make_plan(Inventory(published, "BF16"), 1, attention="replicated")
    assert replicated.digest != make_plan(Inventory(published, "BF16"), 1).digest


@pytest.mark.parametrize("wrong", [0, 17, [1, 0], [1, -2], [1, math.nan], [1, math.inf]])
def test_worlds_that_cannot_be(published, wrong):
    with pytest.raises(PlanError):
        make_plan(Inventory(published, "BF16"), wrong)


@pytest.mark.parametrize("wrong", [("rows", "heads"), ("columns", "whole")])
def test_cuts_that_cannot_be(published, wrong):
    with pytest.raises(PlanError, match="experts and attention must be 'columns', 'heads' or 'whole', 'heads' or"):
        make_plan(Inventory(published, "BF16"), 2, *wrong)


def test_more_ranks_than_heads(published):
    few = dataclasses.replace(published, num_attention_heads=8)
    with pytest.raises(PlanError, match="8 parts: not enough for 9 ranks.* or --attention replicated"):
        make_plan(Inventory(few, "BF16"), 9)
    assert make_plan(Inventory(few, "BF16"), 9, attention="replicated").world == 9
