"""Chunks that take turns, in one process. Sums that travel apart between ranks are tests/ranks/test_prefill.py's."""

from collections.abc import Iterator
from dataclasses import replace

import checkpoints
import mlx.core as mx
import pytest
from reference.ours import build

from m3dist.engine.alone import Request, generate_tokens
from m3dist.model.prefill import run_in_turns, sums_travel_apart
from m3dist.sample import Sampling

CONFIG = checkpoints.tiny_config()
TOKENS = mx.array([[7 * n % 160 for n in range(101)]])  # 4 times the block budget of 24


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, checkpoints.random_tensors(CONFIG, seed=8))


@pytest.fixture
def apart(model) -> Iterator[None]:
    """As on Macs, but for the sums, which a world of one does not have."""
    model.language_model.model.apart = True
    yield
    model.language_model.model.apart = False


def contents(cache) -> list[mx.array]:
    """K, V and index K of every layer."""
    return [x[:, :, : layer.offset] for layer in cache for x in layer.state]


@pytest.mark.parametrize("world", [1, 2, 16])
def test_sums_travel_apart_on_macs_alone(world):
    assert [kind for kind in ("cpu", "cuda", "metal") if sums_travel_apart(world, kind)] == ["metal"] * (world > 1)


@pytest.mark.parametrize("chunk", [1, 7, 23, 37, 50, 51, 100, 101, 102])
def test_turns_leave_the_caches_as_one_chunk_after_the_other(model, chunk, apart):
    """Bit for bit: also from the middle of a block on, and where the last chunk is shorter."""
    found, wanted = model.make_cache(), model.make_cache()
    for cache in (found, wanted):
        mx.eval(model.hidden(TOKENS[:, :5], cache))
    model.prefill(TOKENS, found, chunk)
    for first in range(0, TOKENS.shape[1], chunk):
        mx.eval(model.hidden(TOKENS[:, first : first + chunk], wanted))
    assert [layer.offset for layer in found] == [106] * 4
    for ours, other in zip(contents(found), contents(wanted), strict=True):
        assert mx.array_equal(ours, other)


@pytest.mark.parametrize("chunk", [1, 7, 25, 50])
def test_the_engine_answers_alike(model, chunk, apart):
    request = Request(TOKENS[0].tolist(), 8, 7, 512, [], Sampling(temperature=0))
    model.language_model.model.apart = False
    wanted = list(generate_tokens(model, request))
    model.language_model.model.apart = True
    assert list(generate_tokens(model, replace(request, prefill_chunk=chunk))) == wanted


@pytest.mark.parametrize("parts, ahead", [(1, 1), (2, 2), (3, 3), (1, 2), (1, 3)])
def test_turns(parts, ahead, monkeypatch):
    """Each part in turn, with its result of `ahead` / `parts` turns before, and nothing later, waited for."""
    events, evaluate = [], mx.eval

    def noting(*arrays: mx.array) -> None:
        evaluate(*arrays)
        events.extend(("there", id(x)) for x in arrays)

    def part(number: int) -> Iterator[mx.array]:
        for turn in range(4):
            made[number, turn] = mx.array([number]) + turn
            events.append((number, turn))
            yield made[number, turn]

    made: dict[tuple[int, int], mx.array] = {}
    monkeypatch.setattr(mx, "eval", noting)
    run_in_turns([part(number) for number in range(parts)], ahead)
    order = [(number, turn) for turn in range(4) for number in range(parts)]
    assert [event for event in events if event in order] == order
    for position, turn in enumerate(order):
        before = events[: events.index(turn)]
        there = [earlier for earlier in order if ("there", id(made[earlier])) in before]
        assert there == order[: max(0, position + 1 - ahead)]
