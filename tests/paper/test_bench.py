"""The bench on paper: what is measured, what is made of the runs, and how it is shown."""

import json
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3dist.bench import report, subject
from m3dist.bench.statistics import Ratio, quantile, ratio
from m3dist.bench.subject import (
    FORMATS,
    cache_read_bytes,
    check,
    check_peer,
    lengths,
    longest,
    random_inventory,
)
from m3dist.config import ModelConfig
from m3dist.errors import ConfigError, PlanError
from m3dist.options import RANDOM, BenchOptions
from m3dist.plan import make_plan
from m3dist.tensors import Inventory

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


seconds = st.floats(1e-6, 1e3)


@given(st.lists(seconds, min_size=2, max_size=9))
def test_quantile_is_pythons(values):
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    assert (quantile(values, 0.25), quantile(values, 0.75)) == pytest.approx((lower, upper))


def test_quantile_of_one_value():
    assert quantile([3.0], 0.25) == quantile([3.0], 0.75) == 3.0


def test_ratio_is_of_medians_and_its_spread_of_neighbours():
    """A machine that slows down in the middle slows both runs of a pair."""
    found = ratio([1.0, 10.0, 2.0], [3.0, 20.0, 4.0])
    assert found == Ratio(median=4.0 / 2.0, low=2.0, high=2.5)
    assert str(found) == "2.00x (2.00 to 2.50)"


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def test_every_format_has_a_meaning():
    assert set(FORMATS) == set(RANDOM)


@pytest.mark.parametrize("name", RANDOM)
def test_random_inventory(name):
    """Formats as mlx-lm's converter would give them; the router at 8 bits; floats in the dtype of the activations."""
    inventory, source = random_inventory(BenchOptions(random=name, layers=6), "float32")
    q = inventory.quantization.get("language_model.model.layers.5.block_sparse_moe.switch_mlp.down_proj")
    router = inventory.quantization.get("language_model.model.layers.5.block_sparse_moe.gate")
    assert inventory.config.num_hidden_layers == 6
    assert source.startswith("MiniMaxAI/MiniMax-M3, 6 layers, random ")
    if name == "bf16":
        assert (q, router, inventory.dtype) == (None, None, "BF16")
    elif name == "f32":
        assert (q, router, inventory.dtype) == (None, None, "F32")
    else:
        assert (q, str(router), inventory.dtype) == (FORMATS[name], "affine 8-bit, group 64", "F32")


def test_layers_are_the_models_first(published):
    config = random_inventory(BenchOptions(random="4bit", layers=5), "bfloat16")[0].config
    assert config.moe_layer_freq == published.moe_layer_freq[:5] == (False, False, False, True, True)
    assert config.sparse_attention_freq == published.sparse_attention_freq[:5]


def test_settings():
    settings = (("hidden_size", "1024"), ("moe_layer_freq", "01"), ("rope_theta", "1e4"))
    inventory, source = random_inventory(BenchOptions(random="4bit", layers=2, set=settings), "bfloat16")
    config = inventory.config
    assert (config.hidden_size, config.moe_layer_freq, config.rope_theta) == (1024, (False, True), 1e4)
    assert "hidden_size 1024" in source


@pytest.mark.parametrize(
    "settings, message",
    [
        ((("hidden", "1"),), "--set hidden: the config has no such number"),
        ((("model_type", "x"),), "--set model_type: the config has no such number"),
        ((("hidden_size", "1.5"),), "--set hidden_size: must be a number, not '1.5'"),
        ((("moe_layer_freq", "012"),), "--set moe_layer_freq: must be a 0 or 1 for each layer, as in 0111, not '012'"),
        ((("num_hidden_layers", "61"),), "--layers 61: moe_layer_freq says what 60 layers are"),
        ((("num_attention_heads", "63"),), "num_attention_heads is not a multiple of num_key_value_heads"),
        ((("hidden_size", "0"),), "hidden_size must be an integer of at least 1"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        random_inventory(BenchOptions(random="4bit", set=settings), "bfloat16")


@pytest.mark.parametrize("layers", [1, 4, 60])
def test_published_spelling_round_trips(layers):
    config = random_inventory(BenchOptions(random="4bit", layers=layers), "bfloat16")[0].config
    assert ModelConfig.from_dict(json.loads(json.dumps(subject.published(config)))) == config


def test_default_lengths_go_as_far_as_the_model(published):
    options = BenchOptions(tokens=64)
    assert lengths(options, published).decode == (512, 16384, 32768)
    small = lengths(options, replace(published, max_position_embeddings=8192))
    assert (small.decode, small.prefill) == ((512,), (2048,))


@pytest.mark.parametrize(
    "options, flag",
    [
        (BenchOptions(decode=(1048576,)), "--decode"),
        (BenchOptions(decode=(1048576 - 64,), tokens=64), "--decode"),
        (BenchOptions(prefill=(1048575,)), "--prefill"),
        (BenchOptions(chunk_at=(1048000,), chunk=1024), "--chunk-at"),
    ],
)
def test_lengths_beyond_the_model(options, flag, published):
    with pytest.raises(PlanError, match=f"{flag}: .* 1048576"):
        lengths(options, published)


def test_longest(published):
    options = lengths(BenchOptions(decode=(100,), prefill=(300, 200), chunk_at=(1000,), chunk=50, tokens=10), published)
    assert longest(options) == 1050
    assert longest(replace(options, chunk_at=(), prefill=())) == 118


def test_worlds_that_mlx_lm_has_not(published):
    for world in (1, 2, 4):
        check_peer(published, world)
    for world in (3, 8):
        with pytest.raises(PlanError, match=f"mlx-lm cannot run {world} ranks: {world} does not divide num_"):
            check_peer(published, world)


def test_check_needs_no_download():
    check(BenchOptions(model="some/hub-id", decode=(10**9,)), 3)
    with pytest.raises(PlanError, match="--decode"):
        check(BenchOptions(model="tiny", decode=(8192,)), 1)
    with pytest.raises(PlanError, match="cannot run 3 ranks"):
        check(BenchOptions(random="4bit", vs="mlx-lm"), 3)


def test_cache_reads_by_hand(published):
    """Two ranks hold 2 of 4 KV heads each; a token's K and V are then 2 * 2 * 128 values, its index K 128."""
    plan = make_plan(Inventory(replace_layers(published, 6), "BF16"), 2)
    kept = 2 * 2 * 128 * 2
    assert cache_read_bytes(plan, 0, 1000) == 6 * 1000 * kept  # all blocks fit the budget: nothing reads the index
    assert cache_read_bytes(plan, 0, 32768) == 3 * 32768 * kept + 3 * (2048 * kept + 32768 * 128 * 4)


def replace_layers(config: ModelConfig, layers: int) -> ModelConfig:
    return replace(
        config,
        num_hidden_layers=layers,
        moe_layer_freq=config.moe_layer_freq[:layers],
        sparse_attention_freq=config.sparse_attention_freq[:layers],
    )


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown


def run_of(seconds: float, tokens: int, **more) -> dict:
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "runs": [seconds], **more}


def result(vs: bool) -> dict:
    """A result's shape, with round numbers that can be found again."""
    decode = {
        "context": 512,
        "ours": run_of(0.002, 1),
        "split": {
            "step_seconds": 0.002, "compute_seconds": 0.001, "communication_seconds": 0.0006, "host_seconds": 0.0004,
            "operations": 300, "sums": 13, "gathers": 1, "collectives": 14, "sum_latency": 4e-5,
            "bare_seconds": 0.00056, "communication_to_bare": 1.07,
        },
        "floor": {"bytes_read": 10**9, "read_seconds": 0.0005, "seconds": 0.00106},
    }  # fmt: skip
    prefill = {"prompt": 2048, "depth": 0, "ours": run_of(0.5, 2048, peak_above_bytes=2**28, peak_bytes=2**30)}
    if vs:
        theirs = {"ratio": {"median": 2.5, "low": 2.25, "high": 2.75}}
        decode |= theirs | {"mlx_lm": run_of(0.005, 1), "relative_error": 1e-6}
        prefill |= theirs | {"mlx_lm": run_of(1.25, 2048, peak_above_bytes=2**29, peak_bytes=2**31)}
    return {
        "model": "M", "world": 2, "backend": "ring", "device": "D", "dtype": "F32", "random": "4bit",
        "complete": True, "build_seconds": 1.5, "mlx_lm": "0.32.2" if vs else None, "tokens": 64, "repeats": 5,
        "prefill_chunk": 512,
        "caches": "filled with random keys and values", "weights_bytes": [2**30, 2**30],
        "machine": {"memory_bandwidth": 2e12, "sum_latency": 4e-5, "sum_bandwidth": 1e10, "launch_seconds": 2e-6,
                    "matmul_flops": 5e14, "matvec_bandwidth": 1.5e12, "attention_flops": 2e14},
        "agreement": {"tokens": 16, "relative_error": 3e-7, "dtype": "F32"} if vs else None,
        "decode": [decode], "prefill": [prefill],
    }  # fmt: skip


def rows(text: str, first: str) -> list[list[str]]:
    """The cells below the table head that begins with `first`, of two or more spaces between them."""
    block = next(part for part in text.split("\n\n") if part.lstrip().startswith(first))
    return [[cell for cell in line.split("  ") if cell.strip()] for line in block.splitlines()[1:]]


def test_tables():
    text = report.as_text(result(vs=True))
    decode, split, prefill = (
        [cell.strip() for cell in rows(text, head)[0]]
        for head in ("decode at    m3dist", "decode at      step", "prefill")
    )
    assert decode == ["512", "2.000 ms", "500.0", "5.000 ms", "200.0", "2.50x (2.25 to 2.75)", "1.060 ms", "0.500 ms",
                      "1.0e-06"]  # fmt: skip
    assert split == ["512", "2.000 ms", "1.000 ms", "0.600 ms", "0.400 ms", "300", "13", "1", "0.560 ms", "1.07"]
    assert prefill == ["2048", "0", "500.000 ms", "4096.0", "1250.000 ms", "1638.4", "2.50x (2.25 to 2.75)",
                       "256.0 MiB", "512.0 MiB", "1,024.0 MiB", "2,048.0 MiB"]  # fmt: skip
    assert "M: 2 ranks over ring on D, F32, built in 1.5 s" in text
    assert (
        "caches filled with random keys and values; medians of 5 runs, 64 tokens each; prompts 512 tokens at a time"
        in text
    )
    assert "memory 2000.0 GB/s, a sum 40.0 us, sums of 8 MiB 10.00 GB/s, a launch 2.0 us, products 500.000" in text
    assert "TFLOP/s, of one token 1500.0 GB/s, attention 200.000 TFLOP/s" in text
    assert "logits of 16 tokens differ from mlx-lm 0.32.2's by 3.0e-07 of the largest" in text


def test_tables_without_a_peer():
    text = report.as_text(result(vs=False))
    assert "differ from mlx-lm" not in text
    assert "2.50x" not in text


def test_tables_of_one_rank():
    one = result(vs=False) | {"world": 1, "backend": None, "weights_bytes": [2**31]}
    one["machine"] |= {"sum_latency": None, "sum_bandwidth": None}
    one["decode"][0]["split"] |= {"communication_to_bare": None}
    text = report.as_text(one)
    assert "M: 1 rank on D" in text
    assert "a sum" not in text


def test_tables_of_a_bench_that_was_cut_off():
    """First before anything was measured; then after one context."""
    early = result(vs=True) | {"complete": False, "machine": None, "agreement": None, "decode": [], "prefill": []}
    assert report.as_text(early).startswith("Cut off: what had been measured until then.\nM: 2 ranks over ring on D")
    later = result(vs=True) | {"complete": False, "prefill": []}
    assert rows(report.as_text(later), "decode at    m3dist")


def test_tables_of_a_context_without_a_split():
    """The first context and the longest have one; the others are in the first table alone."""
    found = result(vs=True)
    whole = found["decode"][0]
    found["decode"].append({name: whole[name] for name in whole if name not in ("split", "relative_error")})
    text = report.as_text(found)
    assert [row[-1].strip() for row in rows(text, "decode at    m3dist")] == ["1.0e-06", "-"]
    assert len(rows(text, "decode at      step")) == 1


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("vs", [True, False])
def test_plot(tmp_path, suffix, magic, vs):
    from m3dist.bench.plot import plot

    plot(result(vs), tmp_path / f"out.{suffix}")
    content = (tmp_path / f"out.{suffix}").read_bytes()
    assert content.startswith(magic)
