"""A long generation costs what a short one does: memory stays flat, and nothing is compiled twice."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from small_random import build, plan_of

import m3dist.model
from m3dist.comm import Comm
from m3dist.engine import alone
from m3dist.engine.alone import Request, generate_tokens
from m3dist.model import Model, fusion
from m3dist.sample import Sampling

TINY = dict(
    hidden_size=64, head_dim=32, rotary_dim=16, sparse_index_dim=32, intermediate_size=64, dense_intermediate_size=64,
    shared_intermediate_size=64, num_local_experts=8,
)  # fmt: skip
MIB = 2**20


def tiny() -> Model:
    """A dense layer, and a sparse one with experts."""
    plan = plan_of("f32", layers=2, **TINY)
    assert plan.inventory.config.sparse_attention_freq == plan.inventory.config.moe_layer_freq == (False, True)
    model = Model(plan.inventory.config)
    model.hold(plan, Comm(), build(plan))
    return model


def request(tokens: int) -> Request:
    return Request([1, 2, 3], tokens, 0, 512, [], Sampling(temperature=0))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory() -> tuple[list[int], list[int]]:
    """Bytes active in MLX, and of this process resident, from token 2,000 to 10,000, but for what the cache holds."""
    model, process = tiny(), psutil.Process()
    cache, active, resident = model.make_cache(), [], []
    for number, _ in enumerate(generate_tokens(model, request(10_000), cache=cache), start=1):
        if number >= 2000 and number % 500 == 0:
            held = sum(layer.nbytes for layer in cache)
            active.append(mx.get_active_memory() - held)
            resident.append(process.memory_info().rss - held - mx.get_cache_memory())
    return active, resident


@pytest.mark.slow
def test_memory_is_flat():
    """In a process of its own: what other tests have left comes and goes.

    A forgotten array of one hidden state a token, 256 bytes, would be 2 MiB; so would the nodes of a growing graph.
    """
    tests = Path(__file__).parents[1]
    environ = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, __file__], env=environ, stdout=subprocess.PIPE, check=True)
    active, resident = json.loads(done.stdout)
    assert len(active) == 17
    assert max(active) - active[0] < MIB // 4, active
    assert max(resident) - resident[0] < 8 * MIB, resident


# ---------------------------------------------------------------------------------------------------------------------
# Compiled functions


class Traces:
    """How often each compiled function was traced, by its name and its shapes; not as a part of another."""

    def __init__(self) -> None:
        self.seen, self._tracing, self._compile = Counter(), False, mx.compile

    def compile(self, function):
        """mx.compile, with the traces counted: Python runs a compiled function only to trace it."""
        bound = function.args if isinstance(function, partial) else ()
        name = (getattr(function, "func", function).__qualname__, *bound)

        def traced(*arguments):
            if self._tracing:
                return function(*arguments)
            shapes = tuple((x.shape, x.dtype) if isinstance(x, mx.array) else x for x in arguments)
            self.seen[name, shapes] += 1
            self._tracing = True
            try:
                return function(*arguments)
            finally:
                self._tracing = False

        return self._compile(traced)

    def of(self, name: str) -> int:
        return sum(count for ((found, *_), _), count in self.seen.items() if found == name)


def fused_functions():
    """Each `@fused` function of the model with the cell that holds its compiled form."""
    for info in pkgutil.walk_packages(m3dist.model.__path__, "m3dist.model."):
        for found in vars(importlib.import_module(info.name)).values():
            code = getattr(found, "__code__", None)
            if code and hasattr(found, "__wrapped__") and "compiled" in code.co_freevars:
                yield found.__wrapped__, found.__closure__[code.co_freevars.index("compiled")]


@pytest.fixture
def traces(monkeypatch):
    """Everything is compiled as on a GPU, and counted."""
    if not fusion.on_gpu() and not shutil.which("g++"):
        pytest.skip("machine: needs g++, which mx.compile calls on the CPU")
    counted = Traces()
    monkeypatch.setattr(fusion, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "compile", counted.compile)
    before = [(cell, cell.cell_contents) for _, cell in fused_functions()]
    for function, cell in list(fused_functions()):
        cell.cell_contents = counted.compile(function)
    yield counted
    for cell, contents in before:
        cell.cell_contents = contents


def test_nothing_is_traced_twice(traces, monkeypatch):
    """Beyond the block budget, with a cache that grows twice."""
    monkeypatch.setattr(alone, "RESERVED", 1)
    model = tiny()
    cache, compiled = model.make_cache(), model.language_model.model.compiled
    capacities = set()
    for _ in generate_tokens(model, request(600), cache=cache):
        capacities.add(cache[0].capacity)
    assert capacities == {256, 512, 768}
    assert {key for key, count in traces.seen.items() if count > 1} == set()
    # Of what is compiled, only the gathering of the selected blocks sees the cache.
    names = ("TextModel._start", "TextModel._between", "Model._gather", "_gather")
    assert [traces.of(name) for name in names] == [1, 2, 1, 3]
    assert len(compiled._functions) == 4


if __name__ == "__main__":
    print(json.dumps(memory()))
