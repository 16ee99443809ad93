"""`m3dist bench` as people start it: real ranks, mlx-lm beside ours, and every figure in the JSON line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from world import MPIRUN, ending

from m3dist.options import CPU_PREFILL_CHUNK

FLAGS = "--decode 64,128,300 --prefill 48 --chunk-at 256 --chunk 32 --tokens 4 --repeats 2 --json".split()
TINY = ["--model", "tiny", *FLAGS]
RANDOM = ["--random", "4bit", "--layers", "2", "--set",
          "hidden_size=256,num_attention_heads=8,head_dim=64,rotary_dim=32,sparse_index_dim=64,intermediate_size=256,"
          "dense_intermediate_size=512,shared_intermediate_size=256,num_local_experts=8,vocab_size=400,"
          "moe_layer_freq=01,sparse_attention_freq=01,sparse_block_size=16,sparse_topk_blocks=4", *FLAGS]  # fmt: skip


def bench(*flags: str, launcher: str = "") -> dict:
    """The JSON line; tables come before it on the same stream."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_", "M3DIST_"))}
    command = [*launcher.split(), sys.executable, "-m", "m3dist", "bench", *flags]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=root, timeout=150)
    assert done.returncode == 0, done.stderr
    *tables, line = done.stdout.splitlines()
    assert any(row.lstrip().startswith("decode at") for row in tables)
    return json.loads(line)


def check_figures(result: dict, world: int, vs: bool) -> None:
    """Everything is there, and of a size that can be."""
    assert result["world"] == world and result["dtype"] == "F32" and result["caches"].startswith("filled with random")
    machine = result["machine"]
    between = ("sum_latency", "sum_bandwidth")
    for name, value in machine.items():
        assert value is None if name in between and world == 1 else value > 0, name
    read_by_predictions = {"matvec_bandwidth", "unpack_bandwidth", "expert_flops", "attention_bandwidth"}
    read_by_predictions |= {"attention_flops", "index_flops", "selected_bandwidth"}
    assert {*between, "memory_bandwidth", "launch_seconds", "matmul_flops"} | read_by_predictions == machine.keys()
    assert len(result["weights_bytes"]) == world and min(result["weights_bytes"]) > 0
    assert [row["context"] for row in result["decode"]] == [64, 128, 300]
    assert [(row["prompt"], row["depth"]) for row in result["prefill"]] == [(48, 0), (32, 256)]
    for row in result["decode"] + result["prefill"]:
        for runner in ("ours", "mlx_lm") if vs else ("ours",):
            assert len(row[runner]["runs"]) == 2 and min(row[runner]["runs"]) > 0
        assert ("mlx_lm" in row) == ("ratio" in row) == vs
    for row in result["decode"]:
        assert row["floor"]["seconds"] >= row["floor"]["read_seconds"] > 0
    assert ["split" in row for row in result["decode"]] == [True, False, True]
    for split in splits(result):
        parts = split["compute_seconds"] + split["communication_seconds"] + split["host_seconds"]
        assert parts == pytest.approx(split["step_seconds"])
        assert split["host_seconds"] > 0
        assert split["collectives"] == split["sums"] + split["gathers"]
        assert (split["collectives"] > 0) == (world > 1)
        assert split["operations"] > 100
    for row in result["prefill"]:
        for runner in ("ours", "mlx_lm") if vs else ("ours",):
            assert row[runner]["peak_bytes"] > row[runner]["peak_above_bytes"] > 0
    near, further, far = (row["floor"]["bytes_read"] for row in result["decode"])
    assert near < further < far
    assert result["complete"] and result["prefill_chunk"] == CPU_PREFILL_CHUNK


def splits(result: dict) -> list[dict]:
    """Of the first context and the longest."""
    return [row["split"] for row in result["decode"] if "split" in row]


def check_agreement(result: dict) -> None:
    """mlx-lm's logits, on a prompt and behind filled caches, beyond the block budget too."""
    assert result["agreement"]["relative_error"] < 1e-4
    assert result["decode"][-1]["relative_error"] < 1e-4


@pytest.mark.mlx_lm
def test_tiny_against_mlx_lm():
    result = bench(*TINY, "-n", "2", "--vs", "mlx-lm")
    check_figures(result, world=2, vs=True)
    assert result["load_seconds"] > 0
    check_agreement(result)
    assert {split["sums"] for split in splits(result)} == {7}  # two for each of 3 layers, and the embedding's


@pytest.mark.mlx_lm
def test_replicated_attention():
    """Random weights, of which each rank makes only its slices: all heads here, half of them in mlx-lm's model."""
    result = bench(*RANDOM, "-n", "2", "--vs", "mlx-lm", "--attention", "replicated")
    check_figures(result, world=2, vs=True)
    check_agreement(result)
    assert result["build_seconds"] > 0
    assert {split["sums"] for split in splits(result)} == {3}


@pytest.mark.mpi
@pytest.mark.mlx_lm
def test_mpi():
    result = bench(*RANDOM, "--vs", "mlx-lm", launcher=f"{MPIRUN} -n 2")
    check_figures(result, world=2, vs=True)
    check_agreement(result)
    assert result["backend"] == "mpi"


LONG = ["--model", "tiny", "--decode", "64,128", "--prefill", "none", "--repeats", "100000", "--json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [1, 2])
def test_cut_off(ranks, number):
    """What was measured until then is still said, the JSON line last; here that is the machine alone."""
    command = [sys.executable, "-m", "m3dist", "bench", *LONG, "-n", str(ranks)]
    root = Path(__file__).parents[2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ending(subprocess.Popen(command, **pipes, text=True, cwd=root)) as process:
        while "measured: memory" not in (line := process.stderr.readline()):
            assert line, "the bench ended by itself"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    tables, line = out.split("\n{")
    assert tables.startswith("Cut off: ")
    result = json.loads("{" + line)
    assert not result["complete"] and result["machine"]["memory_bandwidth"] > 0 and result["decode"] == []


def test_one_rank():
    check_figures(bench(*TINY), world=1, vs=False)


def test_unequal_ranks():
    check_figures(bench(*RANDOM, "--weights", "2,1"), world=2, vs=False)


@pytest.mark.mlx_lm
def test_cut_that_mlx_lm_has_not():
    command = [sys.executable, "-m", "m3dist", "bench", *RANDOM, "--weights", "2,1", "--vs", "mlx-lm"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=150)
    assert done.returncode == 2
    assert "--vs mlx-lm: " in done.stderr and "cuts evenly; leave --weights and --experts out" in done.stderr
