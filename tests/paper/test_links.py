"""`m3dist bench links` on paper: its flags, what is made of the runs, and how it is shown."""

import sys

import pytest

from m3dist import cli
from m3dist.bench import links_report
from m3dist.bench.links_report import binary, duration, figures, rate
from m3dist.cluster import environment
from m3dist.cluster.environment import Launch
from m3dist.options import DECODE_SUM, MAX_RANKS, LinksOptions

# ---------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Stands for the program of a rank and for what starts ranks; holds what they were called with."""
    calls = []

    class Program:
        @staticmethod
        def main(*args):
            calls.append(args)
            return 0

    monkeypatch.setitem(sys.modules, "m3dist.bench.links", Program)
    monkeypatch.setattr(cli, "start_ranks", Program.main)
    for name in (*environment.MPI_RANKS, *environment.MLX_BACKENDS, "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


def run(*argv: str) -> int:
    try:
        return cli.main(("bench", *argv))
    except SystemExit as exit:
        return exit.code


def test_local_ranks(called):
    assert run("links", "-n", "2", "--json") == 0
    [arguments] = called
    assert ["bench", "links", "-n", "2", "--json"] in arguments


@pytest.mark.parametrize("world", [2, None])
def test_a_rank_of_a_launcher(called, monkeypatch, world):
    """None: a launcher that does not say how many it started."""
    launch = Launch("mpirun", "mpi", 1, world)
    monkeypatch.setattr(environment, "detect", lambda environ: launch)
    assert run("links", "--sizes", "4,4B,12KiB,1MiB", "--repeats", "7", "--json") == 0
    assert called == [(LinksOptions((4, 4, 12288, 2**20), 7, True), launch)]


def test_defaults(called, monkeypatch):
    launch = Launch("mpirun", "mpi", 1, 2)
    monkeypatch.setattr(environment, "detect", lambda environ: launch)
    assert run("links") == 0
    assert called == [(LinksOptions(), launch)]


def test_default_sizes(published):
    """From one value to what a prompt's chunk sums; with them what a token's sum is in bfloat16."""
    sizes = LinksOptions().sizes
    assert (sizes[0], sizes[-1]) == (4, 16 * 2**20)
    assert list(sizes) == sorted(sizes)
    assert DECODE_SUM == 2 * published.hidden_size
    assert DECODE_SUM in sizes


@pytest.mark.parametrize(
    "flags, message",
    [
        ("links", "m3dist bench links: error: argument -n/--ranks: needs 2 or more, or a launcher that starts them"),
        ("links -n 1", "argument -n/--ranks: needs 2 or more"),
        ("links -n 17", "argument -n/--ranks: must be from 1 to 16, not 17"),
        ("links -n 2 --repeats 0", "argument --repeats: must be 1 or more, not 0"),
        ("links -n 2 --sizes 6", "argument --sizes: must be a multiple of 4 up to 256MiB, such as 12KiB, not '6'"),
        ("links -n 2 --sizes 0", "argument --sizes: must be a multiple of 4 up to 256MiB, such as 12KiB, not '0'"),
        ("links -n 2 --sizes 257MiB", "argument --sizes: must be a multiple of 4 up to 256MiB"),
        ("links -n 2 --sizes 1MB", "argument --sizes: must be a multiple of 4 up to 256MiB, such as 12KiB, not '1MB'"),
        ("links -n 2 --sizes 4,", "argument --sizes: must be a multiple of 4 up to 256MiB, such as 12KiB, not ''"),
        ("links -n 2 --decode 512", "unrecognized arguments: --decode 512"),
        ("--decode 512 links -n 2", "argument --decode: not allowed before links, whose flags come after it"),
        ("-n 2 links", "argument -n: not allowed before links, whose flags come after it"),
        ("latency -n 2", "m3dist bench: error: argument WHAT: invalid choice: 'latency' (choose from"),
    ],
)
def test_what_is_refused(called, capsys, flags, message):
    assert run(*flags.split()) == 2
    assert message in capsys.readouterr().err
    assert not called


def test_a_launcher_of_one_rank_is_refused(called, capsys, monkeypatch):
    monkeypatch.setattr(environment, "detect", lambda environ: Launch("mpirun"))
    assert run("links") == 2
    assert "argument -n/--ranks: needs 2 or more" in capsys.readouterr().err
    assert not called


def test_help_shows_both(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--decode N,N,..." in shown and "time and check sums and gathers between ranks" in shown
    assert run("links", "--help") == 0
    shown = capsys.readouterr().out
    assert "--sizes SIZE,SIZE,..." in shown and "--decode" not in shown


# ---------------------------------------------------------------------------------------------------------------------
# What is made of the runs


def test_bandwidths_by_hand():
    """nccl-tests: of n ranks a sum sends 2 (n - 1) / n of its result, a gather (n - 1) / n, from each rank."""
    seconds = [0.003, 0.002, 0.001]
    summed = figures("all_sum", 8000, 4, seconds)
    assert (summed["bytes"], summed["result_bytes"]) == (8000, 8000)
    assert summed["algorithmic_bandwidth"] == pytest.approx(8000 / 0.002)
    assert summed["bus_bandwidth"] == pytest.approx(1.5 * 8000 / 0.002)
    gathered = figures("all_gather", 8000, 4, seconds)
    assert (gathered["bytes"], gathered["result_bytes"]) == (8000, 32000)
    assert gathered["algorithmic_bandwidth"] == pytest.approx(32000 / 0.002)
    assert gathered["bus_bandwidth"] == pytest.approx(3 * 8000 / 0.002)


@pytest.mark.parametrize("world", [2, 3, MAX_RANKS])
def test_bus_bandwidth_of_a_perfect_ring(world):
    """Ranks that send all the time at 1e9 bytes/s: each collective's bus bandwidth is that, in every world."""
    size = 10**6
    gathering = (world - 1) * size / 1e9  # all others' arrays pass every rank
    summing = 2 * (world - 1) * (size / world) / 1e9  # one part a step, to reduce and to gather
    assert figures("all_gather", size, world, [gathering])["bus_bandwidth"] == pytest.approx(1e9)
    assert figures("all_sum", size, world, [summing])["bus_bandwidth"] == pytest.approx(1e9)


def test_quantiles_of_the_runs():
    found = figures("all_sum", 4, 2, [5.0, 1.0, 4.0, 2.0, 3.0])
    assert found["runs"] == 5
    assert found["seconds"] == {"minimum": 1.0, "lower_quartile": 2.0, "median": 3.0, "upper_quartile": 4.0}


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown


@pytest.mark.parametrize(
    "count, text",
    [(4, "4 B"), (1000, "1000 B"), (1024, "1 KiB"), (12288, "12 KiB"), (1536 * 1024, "1.5 MiB"), (2**28, "256 MiB")],
)
def test_binary(count, text):
    assert binary(count) == text


@pytest.mark.parametrize("seconds, text", [(2.04e-5, "20.4 us"), (0.0123, "12.30 ms"), (2.5, "2.50 s")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_rate():
    assert rate(1.25e9) == "1.2 GB/s"
    assert rate(200e3) == "200.0 kB/s"


def result(**more) -> dict:
    """A result's shape, with round numbers that can be found again."""
    links = [
        figures("all_sum", 4, 2, [2e-5]),
        figures("all_sum", 10**6, 2, [0.0025, 0.002, 0.0015]),
        figures("all_gather", 4, 2, [1e-5]),
    ]
    chain = {"op": "all_sum", "bytes": 12288, "sums": 100, "seconds": 2.4e-5}
    return {
        "backend": "ring", "world": 2, "hosts": ["mac1", "mac2"], "dtype": "bfloat16", "complete": True,
        "links": links, "chain": chain,
    } | more  # fmt: skip


def test_tables():
    head, sums, gathers, chain = links_report.as_text(result()).split("\n\n")
    assert head == "2 ranks over ring on mac1, mac2, bfloat16, every result checked"
    assert [line.split() for line in sums.splitlines()] == [
        "all_sum median lower quartile upper quartile minimum runs algorithmic bus".split(),
        "4 B 20.0 us 20.0 us 20.0 us 20.0 us 1 200.0 kB/s 200.0 kB/s".split(),
        "976.6 KiB 2.00 ms 1.75 ms 2.25 ms 1.50 ms 3 500.0 MB/s 500.0 MB/s".split(),
    ]
    assert gathers.splitlines()[1].split() == "4 B 10.0 us 10.0 us 10.0 us 10.0 us 1 800.0 kB/s 400.0 kB/s".split()
    assert chain == "100 sums of 12 KiB in one graph, each of the one before: 24.0 us a sum"


def test_hosts_with_several_ranks_are_named_once():
    assert "on mac1, mac2," in links_report.as_text(result(world=4, hosts=["mac1", "mac1", "mac2", "mac2"]))


def test_tables_of_a_measurement_that_was_cut_off():
    """Before anything was measured, and after sums of one size."""
    early = result(complete=False, links=[], chain=None)
    assert links_report.as_text(early).splitlines() == [
        "Cut off: what had been measured until then.",
        "2 ranks over ring on mac1, mac2, bfloat16, every result checked",
    ]
    later = result(complete=False, links=result()["links"][:1], chain=None)
    assert links_report.as_text(later).split("\n\n")[1].splitlines()[1].split()[:2] == ["4", "B"]
