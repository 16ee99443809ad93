"""Prefill with sums that travel apart from compute, as on Macs, between real processes: the same caches, bit by bit."""

import checkpoints
import numpy as np
import pytest
from world import run_world

LAYERS = 4
TOKENS = np.random.default_rng(6).integers(0, 160, 132).tolist()  # 5 times the block budget of 24
# Two of 37, two of 37 that begin inside a block, ...; two of which the second is shorter; one alone; single tokens
CHUNKS = [37, 70, 131, 1]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    """Heads and columns in every chunk; one chunk with whole experts, with replicated attention, and in 4 bits."""
    root = tmp_path_factory.mktemp("checkpoints")
    wide = dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 128)
    config = checkpoints.tiny_config(num_hidden_layers=LAYERS, **wide)
    tensors = checkpoints.random_tensors(config, seed=4)
    float32 = checkpoints.published(root / "float32", config, tensors, dtype="F32")
    affine4 = checkpoints.mlx_layout(root / "affine4", config, tensors, "a", bits=4, group_size=32)
    plain = [{"directory": str(float32), "tokens": TOKENS, "chunk": chunk} for chunk in CHUNKS]
    whole, replicated = (plain[0] | {"options": o} for o in ({"experts": "whole"}, {"attention": "replicated"}))
    return [*plain, whole, replicated, plain[0] | {"directory": str(affine4)}]


@pytest.fixture(scope="module")
def alone(cases):
    return run_world("prefills", 1, cases=cases)[0]


def check(ranks, alone, cases):
    for rank, results in enumerate(ranks):
        for case, ours, first, one in zip(cases, results, ranks[0], alone, strict=True):
            apart, together = ours[True], ours[False]
            for a, b in zip(apart["caches"], together["caches"], strict=True):
                assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), f"{case} on rank {rank}"
            # The residual stream has the same bits on every rank, and after either prefill.
            for hidden in (together["hidden"], first[True]["hidden"]):
                assert np.array_equal(apart["hidden"].view(np.uint32), hidden.view(np.uint32))
            error = np.abs(apart["logits"] - one[False]["logits"]).max() / np.abs(one[False]["logits"]).max()
            assert error < 1e-5, f"{case} on rank {rank}: relative error {error}"
            check_submissions(case, apart["submitted"], together["submitted"])


def check_submissions(case, apart, together):
    """Of each chunk: the embedding's sum, those of all layers but the last, and the last layer's cache."""
    chunks = -(-(len(TOKENS) - 1) // case["chunk"])
    a_layer = 1 if case.get("options", {}).get("attention") == "replicated" else 2
    sums = 1 + a_layer * (LAYERS - 1)
    assert sorted(apart) == [(0, 0)] * chunks + [(1, 0)] * sums * chunks
    assert sum(waited for _, waited in together) > 0, "or this would show nothing"


def test_ring(cases, alone):
    check(run_world("prefills", 2, cases=cases), alone, cases)


def test_unequal_ranks(cases, alone):
    unequal = [case | {"options": case.get("options", {}) | {"weights": [2, 1, 1]}} for case in (cases[0], cases[5])]
    check(run_world("prefills", 3, cases=unequal), [alone[0], alone[5]], unequal)


@pytest.mark.mpi
@pytest.mark.parametrize("world", [2, 4])
def test_mpi(world, cases, alone):
    check(run_world("prefills", world, backend="mpi", cases=cases), alone, cases)
