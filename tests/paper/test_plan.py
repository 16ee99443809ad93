"""Byte counts of the published checkpoints, against the model document's arithmetic (sections 2.2, 2.6 and 9.1)."""

import json
from dataclasses import replace

import pytest

from m3dist import cli
from m3dist.config import ModelConfig
from m3dist.plan import make_plan
from m3dist.plan_report import inventory_of


def total(inventory) -> int:
    return sum(spec.nbytes for spec in inventory.specs().values())


def test_bytes_of_the_published_checkpoints():
    bf16, _ = inventory_of("MiniMaxAI/MiniMax-M3", None, None, None)
    vision = 2 * (631_185_920 + 234_381_312) + 2 * 1280 * 1176  # BF16, with an F32 patch embedding
    assert total(bf16) == 854_172_958_720 - vision
    mxfp8, _ = inventory_of("MiniMaxAI/MiniMax-M3-MXFP8", None, None, None)
    assert total(mxfp8) == 442_007_940_096


@pytest.mark.parametrize(
    ("bits", "group", "gigabytes"),
    [(8, 64, 452.8), (6, 64, 346.3), (5, 64, 293.0), (4, 64, 239.7), (4, 32, 266.4), (3, 64, 186.5)],
)
def test_bytes_of_mlx_conversions(bits, group, gigabytes):
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3", "affine", bits, group)
    assert round(total(inventory) / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    ("world", "held", "read"), [(1, 411.7, 26.83), (2, 205.9, 13.53), (4, 103.1, 6.88), (8, 51.7, 3.62)]
)
def test_bytes_of_a_rank(world, held, read):
    """As in the document, but that at 8 it does not count KV projections twice where two ranks hold them."""
    plan = make_plan(inventory_of("MiniMaxAI/MiniMax-M3-MXFP8", None, None, None)[0], world)
    for rank in range(world):
        assert round(plan.bytes_held(rank) / 2**30, 1) == held
        assert round(plan.bytes_read(rank) / 1e9, 2) == read


def test_cache_bytes_a_token(published):
    """K and V of 128 values a KV head on all 60 layers in bfloat16; index K of 128 on 57, in float32 whatever the rest
    is."""
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3", None, None, None)
    assert make_plan(inventory, 1).cache_bytes_per_token(0) == 60 * 2 * 4 * 128 * 2 + 57 * 128 * 4 == 152_064
    assert make_plan(inventory, 4).cache_bytes_per_token(3) == 60 * 2 * 1 * 128 * 2 + 57 * 128 * 4 == 59_904
    in_float32 = make_plan(replace(inventory, dtype="F32"), 4)
    assert in_float32.cache_bytes_per_token(3) == 60 * 2 * 1 * 128 * 4 + 57 * 128 * 4 == 90_624


def run(capsys, *flags) -> tuple[int, str]:
    code = cli.main(["plan", *flags])
    return code, capsys.readouterr().out


def test_unequal_machines_share_by_memory(capsys):
    code, out = run(capsys, "--model", "MiniMaxAI/MiniMax-M3-MXFP8", "--machines", "512,512,192", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["fits"] and plan["world"] == 3
    first, second, third = plan["ranks"]
    assert third["bytes_held"] < 0.45 * first["bytes_held"] and third["longest_context"] > 0
    assert sum(r["query_heads"] for r in plan["ranks"]) == 64
    assert sum(r["expert_columns"] for r in plan["ranks"]) == 3072
    assert sum(r["vocabulary_rows"] for r in plan["ranks"]) == 200064
    assert plan["longest_context"] == min(r["longest_context"] for r in plan["ranks"])


def test_what_does_not_fit_is_said(capsys):
    code, out = run(capsys, "--model", "MiniMaxAI/MiniMax-M3", "--machines", "512,256")
    assert code == 1
    assert "Does not fit: rank 1: its weights are" in out and "more than 256 GB less 10 reserved" in out
    code, out = run(
        capsys, "--model", "MiniMaxAI/MiniMax-M3-4bit", "--world", "3", "--memory", "96", "--context", "400000"
    )
    assert code == 1 and "400000 tokens need" in out


def test_longest_context_fits_and_one_more_does_not(capsys):
    flags = ["--model", "MiniMaxAI/MiniMax-M3-4bit", "--world", "3", "--memory", "96", "--json"]
    longest = json.loads(run(capsys, *flags)[1])["longest_context"]
    assert run(capsys, *flags, "--context", str(longest))[0] == 0
    assert run(capsys, *flags, "--context", str(longest + 1))[0] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "somebody/else"], "neither a directory, nor tiny, nor a published checkpoint"),
        (["--model", "a" * 5000], "neither a directory, nor tiny"),
        (["--mode", "mxfp4", "--bits", "8"], "--mode mxfp4 has 4 bits"),
        (["--bits", "7"], "--bits 2, 3, 4, 5, 6 or 8"),
        (["--machines", "512,8"], "--machines: rank 1 has 8 GB"),
        (["--world", "2", "--memory", "8"], "--memory: rank 0 has 8 GB"),
        (["--memory", "512", "--context", "1048577"], "--context: the model takes at most 1048576 tokens"),
    ],
)
def test_bad_requests_are_named(capsys, flags, message):
    assert cli.main(["plan", *flags]) == 2
    assert message in capsys.readouterr().err


def test_context_without_a_memory(capsys):
    assert (
        "\nA context of 1000 tokens needs 397.2 GiB on the fullest rank."
        in run(capsys, "--world", "2", "--context", "1000")[1]
    )


def test_the_tiny_checkpoint(capsys):
    code, out = run(capsys, "--model", "tiny", "--world", "8", "--json")
    assert code == 0 and [r["query_heads"] for r in json.loads(out)["ranks"]] == [1] * 8


def test_the_digest_tells_plans_apart(published):
    inventory, _ = inventory_of("MiniMaxAI/MiniMax-M3", None, None, None)
    digests = {make_plan(inventory, w, e).digest for w in (2, 4, [2, 1]) for e in ("columns", "whole")}
    assert len(digests) == 6
    assert make_plan(inventory, 2).digest == make_plan(inventory, [3, 3]).digest
    assert isinstance(published, ModelConfig)
