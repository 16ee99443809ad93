"""What the bench times, and that it leaves everything as it was: caches, async_eval, the model's communication."""

from dataclasses import replace

import mlx.core as mx
import pytest
from small_random import build, plan_of

from m3dist.bench.runners import (
    Ours,
    count_operations,
    decode,
    difference,
    muted,
    prefill,
    random_cache,
    timed_steps,
)
from m3dist.comm import Comm
from m3dist.model import Model
from m3dist.plan import make_plan

CONTEXT = 100  # beyond the block budget of 4 * 16 tokens
NO_PROGRESS = lambda phase: None  # noqa: E731


def ours_of(random: str = "4bit"):
    plan = plan_of(random, world=1)
    model = Model(plan.inventory.config)
    model.hold(plan, Comm(), build(plan))
    return plan, Ours(model, plan, 32, NO_PROGRESS)


@pytest.fixture(scope="module")
def ours():
    return ours_of()


def filled(plan, runner):
    cache = runner.make_cache()
    runner.fill(cache, random_cache(plan, runner.kv_heads, CONTEXT))
    return cache


def test_caches_are_filled_as_said(ours):
    plan, runner = ours
    cache = filled(plan, runner)
    assert [layer.offset for layer in cache] == [CONTEXT] * 4
    for number, (layer, arrays) in enumerate(zip(cache, random_cache(plan, runner.kv_heads, CONTEXT))):
        assert len(arrays) == (3 if number else 2)  # the first layer is dense: no index K
        for held, given in zip((layer.keys, layer.values, layer.index_keys), arrays):
            assert mx.array_equal(held[:, :, :CONTEXT], given)
            assert abs(given.mean().item()) < 0.1 and abs(given.std().item() - 1) < 0.1


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_caches_take_what_the_plan_says(dtype):
    """256 tokens: the buffers have no room to spare."""
    plan = make_plan(replace(plan_of().inventory, dtype=dtype), 1)
    runner = Ours(Model(plan.inventory.config), plan, 32, NO_PROGRESS)
    cache = runner.make_cache()
    runner.fill(cache, random_cache(plan, runner.kv_heads, 256))
    assert sum(layer.nbytes for layer in cache) == 256 * plan.cache_bytes_per_token(0)


def test_a_shared_head_has_the_same_keys_on_both_ranks():
    plan = plan_of(world=3)
    heads = {}
    for rank in range(3):
        first, last = plan.shares[rank].spans["kv_head"]
        keys, values, index_keys = list(random_cache(plan, (first, last), 20))[1]
        assert keys.shape == values.shape == (1, last - first, 20, 64) and index_keys.shape == (1, 1, 20, 64)
        for head in range(first, last):
            mine = keys[:, head - first]
            assert mx.array_equal(heads.setdefault(head, mine), mine)
    assert len(heads) == 4 and not mx.array_equal(heads[0], heads[1])


def test_runs_leave_the_cache_as_it_was(ours):
    plan, runner = ours
    cache = filled(plan, runner)
    before = runner.logits(mx.array([[5]], dtype=mx.uint32), cache)
    runner.trim(cache, 1)
    assert decode(runner, cache, 6) > 0
    assert prefill(runner, cache, list(range(70))).seconds > 0
    submit = mx.async_eval
    step, host = timed_steps(runner, cache, 6)
    assert 0 < host and 0 < step
    assert mx.async_eval is submit
    counts = count_operations(runner, cache)
    assert counts["operations"] > 100 and counts["sums"] == counts["gathers"] == 0  # nobody to talk to
    assert runner.length(cache) == CONTEXT
    after = runner.logits(mx.array([[5]], dtype=mx.uint32), cache)
    assert mx.array_equal(before, after)


def test_muting_ends(ours):
    _, runner = ours
    with muted(runner.model):
        assert runner.model.comm.muted
    assert not runner.model.comm.muted


def test_prefill_tells_its_memory(ours):
    """K and V of a prompt of 600 tokens alone take more than that."""
    plan, runner = ours
    found = prefill(runner, runner.make_cache(), [n % 400 for n in range(600)])
    assert found.peak_above_bytes > 600 * plan.cache_bytes_per_token(0)


# ---------------------------------------------------------------------------------------------------------------------
# mlx-lm


@pytest.mark.mlx_lm
@pytest.mark.parametrize("random", ["4bit", "6bit", "8bit", "f32"])
def test_peer_is_the_same_model(random):
    """The same logits, from an empty cache and from one filled beyond the block budget."""
    from m3dist.bench.peer import build_peer

    plan, runner = ours_of(random)
    peer = build_peer(runner.model, plan, Comm(), NO_PROGRESS)
    runners = [runner, peer]
    assert difference(runners, [r.make_cache() for r in runners], list(range(30))) < 1e-4
    caches = [filled(plan, r) for r in runners]
    assert difference(runners, caches, list(range(30))) < 1e-4
    assert [r.length(cache) for r, cache in zip(runners, caches)] == [CONTEXT, CONTEXT]
    ours, theirs = (list(r.tokens([7, 8, 9], 12, cache)) for r, cache in zip(runners, caches))
    assert ours == theirs and len(ours) == 12


@pytest.mark.mlx_lm
def test_peer_leaves_its_cache_as_it_was(ours):
    from m3dist.bench.peer import build_peer

    plan, runner = ours
    peer = build_peer(runner.model, plan, Comm(), NO_PROGRESS)
    cache = filled(plan, peer)
    assert decode(peer, cache, 6) > 0
    assert prefill(peer, cache, list(range(70))).seconds > 0
    assert peer.length(cache) == CONTEXT
    assert difference([runner, peer], [filled(plan, runner), cache], [5]) < 1e-4
    assert peer.weights_bytes == runner.weights_bytes
