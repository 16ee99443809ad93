"""How much cache there is room for."""

from dataclasses import replace

import pytest

from m3dist.engine.budget import CONTEXTS, DENSE_PAGE, Room, make_budget
from m3dist.errors import PlanError
from m3dist.plan import Plan, make_plan
from m3dist.plan_report import inventory_of

GIB = 2**30


@pytest.fixture(scope="module")
def plan() -> Plan:
    """MiniMax-M3 in 4 bits on four ranks."""
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3", "affine", 4, 64)
    return make_plan(inventory, 4)


def rooms(*gib: float) -> list[Room]:
    return [Room(f"host{number}", int(size * GIB)) for number, size in enumerate(gib)]


def test_the_rank_with_the_least_room_decides(plan):
    """55.87 GiB of weights on each, and 59,904 bytes of cache a token."""
    budget = make_budget(plan, rooms(100, 60, 100, 100), None, None)
    assert budget.page_size == 128
    assert budget.pages == (60 * GIB - plan.bytes_held(1)) // (128 * 59_904)
    assert budget.context == (budget.pages - 1) * 128 < plan.inventory.config.max_position_embeddings


def test_memory_that_would_never_be_used_is_not_taken(plan):
    budget = make_budget(plan, rooms(100, 100, 100, 100), None, 1000)
    assert (budget.context, budget.pages) == (1000, CONTEXTS * 8 + 1)  # page 0 is nobody's


def test_what_the_flags_ask_for(plan):
    budget = make_budget(plan, rooms(1, 1, 1, 1), 4000, None)
    assert (budget.pages, budget.context, budget.tokens) == (33, 4096, 33 * 128)
    assert make_budget(plan, rooms(1, 1, 1, 1), 4000, 2000).context == 2000
    assert make_budget(plan, rooms(500, 500, 500, 500), None, 10**9).context == 1_048_576


def test_no_room_for_a_cache_names_the_host(plan):
    with pytest.raises(PlanError, match="rank 2 on host2: beside 55.9 GiB of weights there is no memory"):
        make_budget(plan, rooms(100, 100, 50, 100), None, None)


def test_pages_of_a_model_without_sparse_layers(plan):
    config = plan.inventory.config
    dense = replace(config, sparse_attention_freq=(0,) * config.num_hidden_layers)
    budget = make_budget(replace(plan, inventory=replace(plan.inventory, config=dense)), rooms(1, 1, 1, 1), 500, None)
    assert (budget.page_size, budget.pages) == (DENSE_PAGE, 5)
