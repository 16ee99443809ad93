"""`m3dist serve` on paper: its flags, who gets in, and where a key goes and where not."""

import os
import sys

import pytest

from m3dist import cli, serve
from m3dist.cluster import environment
from m3dist.cluster.environment import Launch
from m3dist.cluster.hostfile import Host
from m3dist.cluster.ssh import python_module
from m3dist.engine.link import GATEWAY
from m3dist.options import ServeOptions


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Stands for the supervisor and the ranks' program; holds what they were called with."""
    calls = []

    class Program:
        @staticmethod
        def main(*args):
            calls.append(args)
            return 0

    monkeypatch.setattr(serve, "main", Program.main)
    monkeypatch.setitem(sys.modules, "m3dist.engine.program", Program)
    for name in (*environment.MPI_RANKS, *environment.MLX_BACKENDS, "MLX_RANK", GATEWAY, cli.API_KEY):
        monkeypatch.delenv(name, raising=False)
    return calls


def run(*argv: str) -> int:
    try:
        return cli.main(["serve", *argv])
    except SystemExit as exit:
        return exit.code


def test_nothing_said(called):
    assert run() == 0
    [(options, job, keys)] = called
    assert options == ServeOptions() and keys == ()
    assert (job.hostfile.world, job.command) == (1, (None, *python_module("m3dist"), "serve"))


def test_every_flag_arrives(called):
    flags = (
        "--model owner/name --name m3 --name minimax --thinking disabled --host ::1 --port 0 --insecure --rows 4 "
        "--queue 0 --context 4096 --cache-tokens 65536 --request-limit 60 --restarts 0 --drain 0 --dtype float32 "
        "--experts whole --attention replicated --weights 2,1 --prefill-chunk 8 --bits 4 --group-size 32 "
        "--mode affine --fetch"
    )
    assert run(*flags.split()) == 0
    options, job, _ = called[0]
    assert vars(options) == {
        "model": "owner/name", "names": ("m3", "minimax"), "host": "::1", "port": 0, "insecure": True, "rows": 4,
        "queue": 0, "context": 4096, "cache_tokens": 65536, "prefill_chunk": 8, "thinking": "disabled", "restarts": 0,
        "drain": 0.0, "request_limit": 60.0, "dtype": "float32", "experts": "whole", "attention": "replicated",
        "weights": (2.0, 1.0), "mode": "affine", "bits": 4, "group_size": 32, "fetch": True,
    }  # fmt: skip
    assert job.hostfile.world == 2 and job.command[-1] == "--fetch"


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--port 65536", "--port: must be from 0 to 65535"),
        ("--rows 0", "--rows: must be from 1"),
        ("--queue -1", "--queue: must be 0 or more"),
        ("--drain nan", "--drain: must be from 0"),
        ("--request-limit 0", "--request-limit"),
        ("--name=", "--name: must not be empty"),
        ("--bits 4", "--bits: is for hub ids"),
        ("-n 2 --weights 1,2,3", "--weights: needs one number for each of the 2 ranks"),
        ("--host 0.0.0.0", "--host: 0.0.0.0 can be reached from other machines: give --api-key-file"),
        ("--host mac1.local", "--host: mac1.local can be reached from other machines"),
        ("--api-key-file nowhere", "--api-key-file: nowhere cannot be read"),
    ],
)
def test_flags_that_make_no_sense(called, capsys, flags, said):
    assert run(*flags.split()) == 2
    assert said in capsys.readouterr().err and not called


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(called, host):
    assert run("--host", host) == 0 and called


@pytest.mark.parametrize("flags", ["--insecure", "--api-key abc"])
def test_who_may_listen_to_others(called, flags):
    assert run("--host", "0.0.0.0", *flags.split()) == 0 and called


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys_come_from_three_places_and_reach_no_rank(called, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cli.API_KEY, "sk-3")
    (tmp_path / "keys").write_text("# of the house\n sk-1 \n\nsk-2\n")
    flags = ["--api-key", "sk-0", "--port", "0", "--api-key=sk-4", "--api-key-file", str(tmp_path / "keys")]
    assert run(*flags) == 0
    [(options, job, keys)] = called
    assert sorted(keys) == ["sk-0", "sk-1", "sk-2", "sk-3", "sk-4"]
    assert cli.API_KEY not in os.environ  # which a rank on this machine would have too
    words = [*job.command, *job.env, *job.env.values(), *map(str, vars(options).values())]
    assert not any(key in word for key in keys for word in map(str, words))
    assert job.command[-4:] == ("--port", "0", "--api-key-file", str(tmp_path / "keys"))
    assert "--api-key is seen by all" in capsys.readouterr().err


@pytest.mark.parametrize("text, said", [("# none\n", "no key in"), ("two words\n", "without blanks")])
def test_a_file_of_keys_that_has_none(called, tmp_path, capsys, text, said):
    (tmp_path / "keys").write_text(text)
    assert run("--api-key-file", str(tmp_path / "keys")) == 2
    assert "argument --api-key-file: " in (err := capsys.readouterr().err) and said in err and not called


@pytest.mark.parametrize("key", ["", "a b", "ä"])
def test_a_key_that_no_header_can_carry(called, monkeypatch, capsys, key):
    monkeypatch.setenv(cli.API_KEY, key)
    assert run() == 2
    assert f"argument {cli.API_KEY}: a key is" in capsys.readouterr().err and not called


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def test_a_rank_of_ours_asks_for_no_key(called, monkeypatch):
    """Its launcher has seen to that; the file with the keys need not be on its host."""
    monkeypatch.setattr(environment, "detect", lambda environ: Launch("m3dist", "ring", 1, 2))
    monkeypatch.setenv(GATEWAY, "192.168.0.1:1234")
    assert run("--host", "0.0.0.0", "--api-key-file", "nowhere", "-n", "2") == 0
    [(options, launch)] = called
    assert (options.host, launch.rank) == ("0.0.0.0", 1)


def test_a_rank_of_another_launcher_is_no_supervisor(called, monkeypatch):
    monkeypatch.setattr(environment, "detect", lambda environ: Launch("mpirun", "mpi", 1, 2))
    assert run() == 0
    assert called == [(ServeOptions(), Launch("mpirun", "mpi", 1, 2))]


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor


def test_pauses_grow():
    assert [serve.pause_before(failures) for failures in range(1, 9)] == [0, 1, 2, 4, 8, 16, 32, 60]


def test_rank_0_finds_the_gateway_where_it_is():
    assert serve.address_for(Host("127.0.0.1", ips=("192.168.0.1",))) == "127.0.0.1"
    assert serve.address_for(Host("somewhere.invalid", ips=("127.0.0.9",))) == "127.0.0.1"
