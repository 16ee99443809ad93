"""`m3dist bench`'s flags: what arrives, and what is refused before any process starts."""

import importlib.util
import sys

import pytest

from m3dist import cli
from m3dist.cluster import environment, supervise
from m3dist.cluster.environment import Launch
from m3dist.cluster.judge import Verdict
from m3dist.cluster.ssh import python_module
from m3dist.options import BenchOptions


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Stands for the bench's program and the launcher; holds what they were called with."""
    calls = []

    class Program:
        @staticmethod
        def main(*args):
            calls.append(args)
            return 0

    monkeypatch.setitem(sys.modules, "m3dist.bench.program", Program)
    monkeypatch.setattr(supervise, "judged", lambda job, output=None: Verdict(Program.main(job)))
    for name in (*environment.MPI_RANKS, *environment.MLX_BACKENDS, "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


def run(*argv: str) -> int:
    try:
        return cli.main(("bench", *argv))
    except SystemExit as exit:
        return exit.code


def test_defaults(called):
    assert run() == 0
    assert called == [(BenchOptions(), Launch("single"))]


def test_every_flag_arrives(called, tmp_path):
    plot = str(tmp_path / "out.png")
    flags = (
        "--model MiniMaxAI/MiniMax-M3 --random mxfp4 --layers 4 --set hidden_size=1024,moe_layer_freq=0111 "
        "--decode 512,1024 --prefill none --chunk-at 2048 --chunk 256 --tokens 8 --repeats 2 --json "
        f"--plot {plot} --experts whole --attention replicated --weights 1 --dtype float32 --prefill-chunk 128"
    )
    assert run(*flags.split()) == 0
    assert called[0][0] == BenchOptions(
        model="MiniMaxAI/MiniMax-M3", random="mxfp4", layers=4,
        set=(("hidden_size", "1024"), ("moe_layer_freq", "0111")), decode=(512, 1024), prefill=(), chunk_at=(2048,),
        chunk=256, tokens=8, repeats=2, json=True, plot=plot, experts="whole", attention="replicated", weights=(1.0,),
        dtype="float32", prefill_chunk=128,
    )  # fmt: skip


def test_local_ranks(called):
    assert run("-n", "2", "--json") == 0
    [(job,)] = called
    assert (job.command, job.hostfile.world) == ((None, *python_module("m3dist"), "bench", "-n", "2", "--json"), 2)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--decode 0", "argument --decode: must be 1 or more, not 0"),
        ("--decode 512,", "argument --decode: must be a whole number, not ''"),
        ("--tokens 0", "argument --tokens: must be 1 or more, not 0"),
        ("--random 7bit", "argument --random: invalid choice: '7bit'"),
        ("--vs vllm", "argument --vs: invalid choice: 'vllm'"),
        ("--random 4bit --set hidden_size", "argument --set: must be FIELD=VALUE, not 'hidden_size'"),
        ("--layers 4", "argument --layers: needs --random"),
        ("--set hidden_size=4", "argument --set: needs --random"),
        ("--plot no/such/place.png", "argument --plot: no/such is no directory"),
        ("--weights 1,1 -n 3", "argument --weights: needs one number for each of the 3 ranks, not 2"),
        ("--decode 8192", "error: --decode: 8192 tokens and what follows are more than the model takes: 8192"),
        ("--random 4bit --layers 61", "error: --layers 61: moe_layer_freq says what 60 layers are"),
        ("--random 4bit --model no/such", "error: no/such is neither a directory, nor tiny, nor a published"),
    ],
)
def test_what_is_refused(called, capsys, flags, message):
    assert run(*flags.split()) == 2
    assert message in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    "flags, missing, advice",
    [
        ("--plot out.png", "matplotlib", "argument --plot: needs matplotlib: pip install 'm3dist[plot]'"),
        ("--vs mlx-lm", "mlx_lm", "argument --vs: needs mlx-lm: pip install mlx-lm==0.32.2"),
    ],
)
def test_what_is_not_installed(called, capsys, monkeypatch, flags, missing, advice):
    found = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else found(name))
    assert run(*flags.split()) == 2
    assert advice in capsys.readouterr().err
    assert not called
