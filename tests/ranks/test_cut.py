"""The cut, between real processes: every world computes what one rank computes, in every layout and format."""

import checkpoints
import numpy as np
import pytest
from world import CROWDED, run_world

# 4 times the block budget (24 tokens) and more; odd pieces, then single tokens
SIZES = [37, 50, 23, 1, 1, 1]
TOKENS = sum(SIZES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[dict]:
    """One checkpoint a layout and format, cut in columns; some also with whole experts, and replicated attention.

    256 columns and 8 heads of 32: eight ranks get one quantisation group of 32 each.
    """
    root = tmp_path_factory.mktemp("checkpoints")
    config = checkpoints.tiny_config(
        intermediate_size=256, shared_intermediate_size=256, dense_intermediate_size=256, num_local_experts=8
    )
    tensors = checkpoints.random_tensors(config, seed=3)
    written = [
        checkpoints.published(root / "float32", config, tensors, dtype="F32", shards=2),
        checkpoints.published(root / "bf16", config, tensors),
        checkpoints.mxfp8(root / "mxfp8", config, tensors),
        checkpoints.mlx_layout(root / "affine4", config, tensors, "a", bits=4, group_size=32),
        checkpoints.mlx_layout(root / "affine8-packed", config, tensors, "b", bits=8, group_size=32),
        checkpoints.mlx_layout(root / "mxfp4", config, tensors, "c", mode="mxfp4"),
        checkpoints.mlx_layout(root / "nvfp4", config, tensors, "d", mode="nvfp4"),
    ]
    tokens = np.random.default_rng(5).integers(0, config["text_config"]["vocab_size"], TOKENS).tolist()
    plain = [{"directory": str(path), "tokens": tokens, "sizes": SIZES} for path in written]
    whole = [case | {"options": {"experts": "whole"}} for case in (plain[0], plain[3])]
    replicated = [case | {"options": {"attention": "replicated"}} for case in (plain[2], plain[3])]
    both = [plain[0] | {"options": {"experts": "whole", "attention": "replicated"}}]
    return plain + replicated + both + whole


@pytest.fixture(scope="module")
def alone(cases):
    return run_world("logits", 1, cases=cases)[0]


def assert_equal_to_one_rank(results, alone, cases):
    for number, (case, one) in enumerate(zip(cases, alone, strict=True)):
        for rank, result in enumerate(results):
            error = np.abs(result[number]["logits"] - one["logits"]).max() / np.abs(one["logits"]).max()
            assert error < 1e-4, f"{case['directory']} on rank {rank}: relative error {error}"
            # Every rank routes and stops by its own copy of the residual stream: the copies must be the same bits.
            assert np.array_equal(
                result[number]["hidden"].view(np.uint32), results[0][number]["hidden"].view(np.uint32)
            )


def test_ring(cases, alone):
    assert_equal_to_one_rank(run_world("logits", 2, cases=cases), alone, cases)


@pytest.mark.parametrize("world", [3, 4, 5, 8])
def test_wide_ring(world, cases, alone):
    """Every case is cut over these worlds by MPI. A ring's sums take tens of milliseconds there (world.py): two cases,
    the one with the most sums and the one with the fewest, which has whole experts too."""
    few = [case | {"sizes": [TOKENS - 1, 1]} for case in (cases[0], cases[9])]
    assert_equal_to_one_rank(run_world("logits", world, cases=few), [alone[0], alone[9]], few)


@pytest.mark.mpi
@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 7, 8])
def test_mpi(world, cases, alone):
    assert_equal_to_one_rank(run_world("logits", world, backend="mpi", cases=cases), alone, cases)


def test_unequal_ranks(cases, alone):
    unequal = [case | {"options": case.get("options", {}) | {"weights": [3, 1, 2]}} for case in cases]
    assert_equal_to_one_rank(run_world("logits", 3, backend=CROWDED, cases=unequal), alone, unequal)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_loading_a_plan_is_sharding_the_whole(world, cases):
    for rank, result in enumerate(run_world("differences_from_shard", world, cases=cases)):
        assert result == [[] for _ in cases], f"rank {rank}"


@pytest.mark.mpi
@pytest.mark.parametrize("world", [5, 8])
def test_loading_a_plan_is_sharding_the_whole_in_wide_worlds(world, cases):
    for rank, result in enumerate(run_world("differences_from_shard", world, backend="mpi", cases=cases)):
        assert result == [[] for _ in cases], f"rank {rank}"


@pytest.mark.mpi
def test_more_ranks_than_query_heads_is_refused(cases):
    """More ranks than query heads cannot be: said when planning, by every rank, with an exit status."""
    with pytest.raises(AssertionError, match="not enough for 9 ranks"):
        run_world("logits", 9, backend="mpi", cases=cases[:1])


def test_more_ranks_than_query_heads_with_replicated_attention(tmp_path):
    """Two heads on three ranks: every rank attends with both."""
    wide = dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 128)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = checkpoints.tiny_config(num_hidden_layers=2, **heads, **wide)
    path = checkpoints.published(tmp_path, config, checkpoints.random_tensors(config, seed=8), dtype="F32")
    case = {"directory": str(path), "tokens": list(range(TOKENS)), "sizes": SIZES}
    cases = [case | {"options": {"attention": "replicated"}}]
    alone = run_world("logits", 1, cases=cases)[0]
    assert_equal_to_one_rank(run_world("logits", 3, cases=cases), alone, cases)


def test_replicated_attention_saves_a_sum_a_layer(cases):
    """One for the embedding; then one a layer instead of two. The sums are counted as they are made."""
    directory = cases[0]["directory"]
    for attention, sums in (("heads", 2), ("replicated", 1)):
        ranks = run_world("sums_of_a_step", 2, directory=directory, options={"attention": attention})
        assert ranks == [[4, 1 + 4 * sums]] * 2  # of four layers


SAMPLINGS = [
    {"temperature": 0},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 0, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_ranks_see_the_same_tokens_and_worlds_too(cases, sampling):
    """Also sampled: one seed, float32 logits equal to 1e-4, so the same choice in every world here."""
    wanted = {"directory": cases[0]["directory"], "prompt": cases[0]["tokens"][:90], "max_tokens": 12}
    alone = run_world("tokens", 1, sampling=sampling, options={}, **wanted)[0]
    assert len(alone) == 12
    for world, backend in ((2, "ring"), (3, CROWDED)):
        assert run_world("tokens", world, backend=backend, sampling=sampling, options={}, **wanted) == [alone] * world


def test_bfloat16_ranks_agree(cases):
    """Sums of bfloat16 over the ring are the same bits on every rank, or the agreement check would end this."""
    wanted = {"directory": cases[3]["directory"], "prompt": cases[3]["tokens"][:60], "max_tokens": 6}
    ranks = run_world("tokens", 3, sampling={"temperature": 1}, options={"dtype": "bfloat16"}, **wanted)
    assert len(ranks[0]) == 6 and ranks == [ranks[0]] * 3


def test_rank_0_stops_all(cases):
    """The others see one token more, which was on its way; nobody is left waiting."""
    (first, heard), other = run_world("stopped", 2, directory=cases[0]["directory"], prompt=[5, 6, 7], after=4)
    assert len(first) == 4 and heard == 2
    assert other[0][:4] == first and len(other[0]) == 5 and other[1] == 2


def test_ranks_that_differ_say_so(cases):
    for plans, weights, states in run_world("disagreements", 2, directory=cases[0]["directory"]):
        assert plans.startswith("CommunicationError: the ranks differ in plan (rank 0: ")
        assert weights == "PlanError: 3 weights for 2 ranks: give one number a rank"
        assert states.startswith("CommunicationError: the ranks' hidden states differ at step 0")


@pytest.mark.mpi
def test_sixteen_ranks(tmp_path):
    """The most ranks there can be: one query head each, four to a KV head; with a tied embedding."""
    wide = dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 512)
    config = checkpoints.tiny_config(num_hidden_layers=2, num_attention_heads=16, tie_word_embeddings=True, **wide)
    tensors = checkpoints.random_tensors(config, seed=6)
    path = checkpoints.mlx_layout(tmp_path, config, tensors, "a", bits=4, group_size=32)
    cases = [{"directory": str(path), "tokens": list(range(TOKENS)), "sizes": [TOKENS - 1, 1]}]
    alone = run_world("logits", 1, cases=cases)[0]
    assert_equal_to_one_rank(run_world("logits", 16, backend="mpi", cases=cases), alone, cases)


def test_small_exchanges():
    everyone = [{"rank": rank, "text": "é" * rank} for rank in range(3)]
    assert run_world("objects", 3) == [[everyone, everyone[0]]] * 3
