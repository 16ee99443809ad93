"""The command line on paper: values are checked, and verbs are imported only when called."""

import subprocess
import sys
from pathlib import Path

import pytest

from m3dist import __version__, cli
from m3dist.cluster import environment, supervise
from m3dist.cluster.environment import Launch
from m3dist.cluster.judge import Verdict
from m3dist.cluster.ssh import python_module
from m3dist.errors import CommunicationError, PlanError
from m3dist.options import CONNECTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Stands for both verbs' modules and the launcher; holds what they were called with."""
    calls = []

    class Verb:
        @staticmethod
        def main(*args):
            calls.append(args)
            return 0

    for verb in ("m3dist.generate", "m3dist.fetch.program", "m3dist.fetch.convert"):
        monkeypatch.setitem(sys.modules, verb, Verb)
    monkeypatch.setitem(sys.modules, "m3dist.plan_report", Verb)
    monkeypatch.setattr(supervise, "judged", lambda job, output=None: Verdict(Verb.main(job)))
    for name in (*environment.MPI_RANKS, *environment.MLX_BACKENDS, "MLX_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


def run(*argv: str) -> int:
    try:
        return cli.main(argv)
    except SystemExit as exit:
        return exit.code


def launched(monkeypatch, launch: Launch) -> None:
    monkeypatch.setattr(environment, "detect", lambda environ: launch)


# ---------------------------------------------------------------------------------------------------------------------
# What is called


def test_one_process(called):
    assert run("generate", "--prompt", "hi", "--system", "be") == 0
    [(options, launch)] = called
    assert options.system == "be"
    assert launch == Launch("single")
    assert (options.model, options.prompt, options.max_tokens, options.thinking) == ("tiny", "hi", 512, "adaptive")
    assert (options.temperature, options.top_p, options.top_k, options.min_p) == (1.0, 0.95, 40, 0.0)
    assert (options.seed, options.stop, options.dtype, options.weights) == (None, (), None, None)


def test_every_flag_arrives(called):
    flags = (
        "--model dir --prompt hi --thinking enabled --raw --json --max-tokens 1 --temperature 0 --top-p 1 "
        "--top-k 0 --min-p 0.5 --seed 7 --stop a --stop b --dtype float32 --experts whole --prefill-chunk 8 "
        "--weights 2 --attention replicated --bits 4 --group-size 32 --mode affine --fetch"
    )
    assert run("generate", *flags.split()) == 0
    options = called[0][0]
    assert vars(options) == {
        "model": "dir", "prompt": "hi", "system": None, "thinking": "enabled", "raw": True, "json": True,
        "max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.5, "seed": 7, "stop": ("a", "b"),
        "dtype": "float32", "experts": "whole", "attention": "replicated", "prefill_chunk": 8, "weights": (2.0,),
        "bits": 4, "group_size": 32, "mode": "affine", "fetch": True,
    }  # fmt: skip


def test_every_flag_of_a_fetch_arrives(called):
    flags = (
        "owner/name@main --bits 6 --group-size 32 --mode affine --connections 3 --range-size 512KiB --experts whole "
        "--attention replicated --weights 2,1 --world 2 --rank 1"
    )
    assert run("fetch", *flags.split()) == 0
    options, launch = called[0]
    assert launch == Launch("single") and vars(options) == {
        "model": "owner/name@main", "mode": "affine", "bits": 6, "group_size": 32, "overrides": None,
        "connections": 3, "range_size": 2**19, "experts": "whole", "attention": "replicated", "weights": (2.0, 1.0),
        "world": 2, "rank": 1,
    }  # fmt: skip


def test_every_flag_of_a_conversion_arrives(called, tmp_path):
    (tmp_path / "formats.yaml").write_text('"*lm_head": false\n')
    overrides = str(tmp_path / "formats.yaml")
    assert run("convert", "dir", "out", "--mode", "mxfp4", "--overrides", overrides, "--range-size", "8") == 0
    assert vars(called[0][0]) == {
        "model": "dir", "out": "out", "mode": "mxfp4", "bits": None, "group_size": None, "overrides": overrides,
        "connections": CONNECTIONS, "range_size": 8,
    }  # fmt: skip


def test_a_fetch_starts_ranks_as_a_generation_does(called):
    assert run("fetch", "owner/name", "-n", "2") == 0
    [(job,)] = called
    assert (job.command, job.hostfile.world) == ((None, *python_module("m3dist"), "fetch", "owner/name", "-n", "2"), 2)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("fetch owner/name --rank 0", "--rank: needs --world"),
        ("fetch owner/name --world 2", "--rank: needs --world"),
        ("fetch owner/name --world 2 --rank 2", "--rank: must be from 0 to 1"),
        ("fetch owner/name --world 2 --rank 1 -n 2", "--world: not allowed with -n"),
        ("fetch owner/name --world 2 --rank 1 --weights 1,2,3", "--weights: needs one number for each of the 2 ranks"),
        ("fetch owner/name --bits 7", "--bits 2, 3, 4, 5, 6 or 8"),
        ("fetch owner/name --overrides nowhere.yaml", "nowhere.yaml"),
        ("convert a b --mode mxfp4 --bits 8", "mxfp4 has 4 bits"),
        ("convert a b --connections 0", "--connections: must be from 1 to 64"),
        ("generate --model tiny --prompt x --bits 4", "--bits: is for hub ids"),
        ("generate --model tiny --prompt x --fetch", "--fetch: is for hub ids"),
        ("generate --model owner/name --prompt x --mode mxfp8 --bits 4", "mxfp8 has 8 bits"),
    ],
)
def test_flags_of_fetching_that_make_no_sense(called, capsys, flags, said):
    assert run(*flags.split()) == 2
    assert said in capsys.readouterr().err and not called


def test_several_ranks_are_started_with_the_same_flags(called):
    argv = ["generate", "--prompt", "hi", "-n", "3"]
    assert run(*argv) == 0
    [(job,)] = called
    assert (job.command, job.hostfile.world, job.backend) == ((None, *python_module("m3dist"), *argv), 3, "ring")
    assert (job.marked, job.reports) == (False, True)


def test_weights_say_how_many_ranks(called):
    assert run("generate", "--prompt", "hi", "--weights", "2,1,1.5") == 0
    assert called[0][0].hostfile.world == 3


def test_a_hostfile_says_how_many_ranks(called):
    hostfile = str(ROOT / "hostfiles" / "one-machine.json")
    assert run("generate", "--prompt", "hi", "--hostfile", hostfile, "--backend", "mpi") == 0
    [(job,)] = called
    assert (job.hostfile.world, job.backend) == (2, "mpi")


def test_a_hostfile_of_one_rank_is_started_too(called, tmp_path):
    """It may be another machine's."""
    (tmp_path / "hosts.json").write_text('{"backend": "ring", "hosts": [{"ssh": "mac1", "ips": ["10.0.0.1"]}]}')
    assert run("generate", "--prompt", "hi", "--hostfile", str(tmp_path / "hosts.json")) == 0
    assert called[0][0].hostfile.hosts[0].ssh == "mac1"


def test_launch_runs_any_command(called, monkeypatch):
    monkeypatch.setenv("HERE", "a b")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    flags = ("--start-limit", "5", "--silence-limit", "7", "--end-limit", "9", "--env", "HERE", "--env", "X=1=2")
    assert run("launch", "-n", "2", *flags, "--", "sh", "-c", "exit 0") == 0
    [(job,)] = called
    assert (job.command, job.marked, job.reports) == (("sh", "-c", "exit 0"), True, False)
    assert (job.start_limit, job.silence_limit, job.end_limit) == (5, 7, 9)
    assert dict(job.env) == {"HERE": "a b", "X": "1=2", "HF_TOKEN": "hf_secret"}
    assert job.secret == {"HF_TOKEN"}
    assert run("launch", "--env", "HF_TOKEN", "--", "true") == 0
    assert called[1][0].secret == set()  # asked for by name


def test_launch_starts_again(called, monkeypatch, capsys):
    monkeypatch.setattr(supervise, "judged", lambda job: called.append(job) or Verdict(5))
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds: called.append(seconds))
    assert run("launch", "--restart", "3", "--", "true") == 5
    assert called[1::2] == [1, 2, 4] and len(called) == 7
    assert "m3dist: starting again in 4 s (3 of 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "times"),
    [
        (Verdict(0), 1),
        (Verdict(2), 1),
        (Verdict(130, ordered=True), 1),
        (Verdict(143, ordered=True), 1),
        (Verdict(143, rank=1), 4),  # by somebody else
    ],
)
def test_launch_does_not_start_again_what_would_fail_again_or_was_ended(called, monkeypatch, verdict, times):
    monkeypatch.setattr(supervise, "judged", lambda job: called.append(job) or verdict)
    monkeypatch.setattr(supervise.time, "sleep", lambda seconds: None)
    assert run("launch", "--restart", "3", "--", "true") == verdict.status
    assert len(called) == times


@pytest.mark.parametrize(
    "argv, message",
    [
        ("launch -n 2", "argument COMMAND: what to run, after --"),
        ("launch -n 2 --", "argument COMMAND: what to run, after --"),
        ("launch -n 2 --hostfile h -- true", "argument -n/--ranks: not allowed with argument --hostfile"),
        ("launch --hostfile no-such-file -- true", "no-such-file: cannot be read"),
        ("launch --env 1A=2 -- true", "argument --env: must be NAME=VALUE or NAME, not '1A=2'"),
        ("launch --env M3DIST_NOT_SET -- true", "argument --env: M3DIST_NOT_SET is not set here"),
        ("launch --start-limit 0 -- true", "argument --start-limit: must be"),
        ("launch -n 2 --backend tcp -- true", "argument --backend: invalid choice: 'tcp'"),
        ("generate --prompt hi -n 2 --backend jaccl", "-n 2"),
    ],
)
def test_what_cannot_be_launched(called, capsys, argv, message):
    assert run(*argv.split()) == 2
    assert message in capsys.readouterr().err
    assert called == []


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_a_user_of_this_machine_is_refused_as_in_a_hostfile(capsys, name):
    assert run("hostfile", "--hosts", f"mac1,me@{name}") == 2
    said = f"argument --hosts: 'me@{name}' names a user for ssh, and {name} means this machine, without ssh; leave"
    assert said in capsys.readouterr().err


def test_the_python_of_the_hosts(called, monkeypatch):
    """Of the others: this machine's is the one that runs."""
    monkeypatch.setitem(sys.modules, "m3dist.doctor.hostfile_writer", sys.modules["m3dist.generate"])
    assert run("hostfile", "--hosts", "127.0.0.1,mac2", "--python", "~/venv/bin/python") == 0
    assert [(host.ssh, host.python) for host in called[0][0].hosts] == [
        ("127.0.0.1", None),
        ("mac2", "~/venv/bin/python"),
    ]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--hosts mac1 --python venv/bin/python", "argument --python: must be an absolute path, a path that begins"),
        ("--check hosts.json --python python3", "argument --check: not allowed with -o, --backend or --python"),
    ],
)
def test_no_python_of_the_hosts(capsys, argv, message):
    assert run("hostfile", *argv.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("n", [[], ["-n", "2"]])
def test_a_rank_is_a_rank(called, monkeypatch, n):
    launch = Launch("mpirun", "mpi", 1, 2)
    launched(monkeypatch, launch)
    assert run("generate", "--prompt", "hi", *n) == 0
    assert called[0][1] == launch


def test_a_launcher_that_does_not_say_how_many(called, monkeypatch):
    launched(monkeypatch, Launch("mpirun", "mpi", 1, None))
    assert run("generate", "--prompt", "hi", "--weights", "1,1") == 0


def test_plan(called):
    assert run("plan", "--machines", "512,512,192", "--mode", "mxfp8", "--context", "1000", "--json") == 0
    args = called[0][0]
    assert (args.model, args.mode) == ("MiniMaxAI/MiniMax-M3", "mxfp8")
    assert (args.machines, args.world) == ((512, 512, 192), None)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

GENERATE = ["generate", "--prompt", "hi"]
REFUSED = [
    ([], "m3dist: error: the following arguments are required: VERB"),
    (["server"], "argument VERB: invalid choice: 'server' (choose from"),
    (["generate"], "m3dist generate: error: the following arguments are required: --prompt"),
    (["generate", "--prompt", ""], "argument --prompt: must not be empty"),
    (["generate", "--prompt", "\udcff"], "argument --prompt: must be text, in UTF-8"),
    ([*GENERATE, "--system", "\udcff"], "argument --system: must be text, in UTF-8"),
    ([*GENERATE, "--raw", "--system", "be"], "argument --system: not allowed with argument --raw"),
    ([*GENERATE, "--temp", "1"], "unrecognized arguments: --temp 1"),
    ([*GENERATE, "--model", ""], "argument --model: must not be empty"),
    ([*GENERATE, "--temperature", "-0.1"], "argument --temperature: must be 0 or more, not -0.1"),
    ([*GENERATE, "--temperature", "nan"], "argument --temperature: must be 0 or more, not nan"),
    ([*GENERATE, "--temperature", "inf"], "argument --temperature: must be 0 or more, not inf"),
    ([*GENERATE, "--temperature", "hot"], "argument --temperature: must be a number, not 'hot'"),
    ([*GENERATE, "--top-p", "0"], "argument --top-p: must be more than 0 and at most 1, not 0"),
    ([*GENERATE, "--top-p", "1.1"], "argument --top-p: must be more than 0 and at most 1, not 1.1"),
    ([*GENERATE, "--top-k", "-1"], "argument --top-k: must be 0 or more, not -1"),
    ([*GENERATE, "--top-k", "1.5"], "argument --top-k: must be a whole number, not '1.5'"),
    ([*GENERATE, "--min-p", "2"], "argument --min-p: must be from 0 to 1, not 2"),
    ([*GENERATE, "--max-tokens", "0"], "argument --max-tokens: must be 1 or more, not 0"),
    ([*GENERATE, "--seed", "-1"], "argument --seed: must be from 0 to"),
    ([*GENERATE, "--stop", ""], "argument --stop: must not be empty"),
    ([*GENERATE, "--thinking", "maybe"], "argument --thinking: invalid choice: 'maybe'"),
    ([*GENERATE, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ([*GENERATE, "--experts", "rows"], "argument --experts: invalid choice: 'rows'"),
    ([*GENERATE, "--prefill-chunk", "0"], "argument --prefill-chunk: must be 1 or more, not 0"),
    ([*GENERATE, "-n", "0"], "argument -n/--ranks: must be from 1 to 16, not 0"),
    ([*GENERATE, "-n", "17"], "argument -n/--ranks: must be from 1 to 16, not 17"),
    ([*GENERATE, "--weights", "1,0"], "argument --weights: must be from 1e-6 to 1e6, not 0"),
    ([*GENERATE, "--weights", "1e308,1e308"], "argument --weights: must be from 1e-6 to 1e6, not 1e308"),
    ([*GENERATE, "--weights", "1,,2"], "argument --weights: must be a number, not ''"),
    ([*GENERATE, "--weights", "1,2", "-n", "3"], "argument --weights: needs one number for each of the 3 ranks, not 2"),
    ([*GENERATE, "--weights", ",".join("1" * 17)], "17 ranks; at most 16"),
    (["plan", "--world", "2", "--machines", "1,2"], "argument --machines: not allowed with argument --world"),
    (["plan", "--machines", "1,2", "--memory", "3"], "argument --memory: not allowed with argument --machines"),
    (["plan", "--machines", "512,-1"], "argument --machines: must be from 1e-6 to 1e6, not -1"),
    (["plan", "--machines", ",".join("9" * 17)], "argument --machines: must be at most 16 machines, not 17"),
    (["plan", "--world", "0"], "argument --world: must be from 1 to 16, not 0"),
    (["plan", "--memory", "0"], "argument --memory: must be from 1e-6 to 1e6, not 0"),
    (["plan", "--context", "0"], "argument --context: must be 1 or more, not 0"),
    (["plan", "--mode", "int4"], "argument --mode: invalid choice: 'int4'"),
    (["plan", "--bits", "9"], "argument --bits: must be from 2 to 8, not 9"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_a_bad_flag_is_named_before_anything_starts(called, capsys, argv, message):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err
    assert called == []


LAUNCHED_REFUSED = [
    (Launch("mlx.launch", "ring", 0, 2), ["-n", "3"], "argument -n/--ranks: mlx.launch started 2 ranks, not 3"),
    (Launch("mpirun", "mpi", 0, 4), ["-n", "1"], "argument -n/--ranks: mpirun started 4 ranks, not 1"),
    (Launch("mpirun", "mpi", 0, 2), ["--weights", "1,1,1"], "argument --weights: needs one number for each of the 2"),
    (Launch("mpirun", "mpi", 0, 17), [], "mpirun started 17 ranks; at most 16"),
    (Launch("mlx.launch", "ring", 0, 2), ["--prompt", "-"], "argument --prompt: - does not work under mlx.launch"),
]


@pytest.mark.parametrize(("launch", "flags", "message"), LAUNCHED_REFUSED)
def test_flags_that_contradict_the_launcher(called, capsys, monkeypatch, launch, flags, message):
    launched(monkeypatch, launch)
    assert run(*GENERATE, *flags) == 2
    assert message in capsys.readouterr().err
    assert called == []


def test_launcher_variables_that_are_wrong(called, capsys, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "abc")
    assert run(*GENERATE) == 2
    assert "m3dist generate: error: MLX_RANK is set but none of" in capsys.readouterr().err
    assert called == []


@pytest.mark.parametrize(
    ("error", "status"), [(PlanError("too few"), 2), (CommunicationError("gone"), 75), (OSError("no room"), 2)]
)
def test_our_own_errors_have_no_traceback(monkeypatch, capsys, error, status):
    monkeypatch.setattr(cli, "drop_output", lambda: None)  # pytest's own output

    def fail(*args):
        raise error

    monkeypatch.setattr(sys.modules["m3dist.generate"], "main", staticmethod(fail))
    assert run(*GENERATE) == status
    assert capsys.readouterr().err == f"m3dist generate: error: {error}\n"


def test_mlx_without_a_backend(monkeypatch, capsys):
    """On Linux `pip install m3dist` alone brings none."""

    def fail(*args):
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(sys.modules["m3dist.generate"], "main", staticmethod(fail))
    assert run(*GENERATE) == 2
    assert "MLX has no backend here" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own

HEAVY = "set(sys.modules) & {'mlx', 'm3dist.generate', 'm3dist.plan_report', 'm3dist.text', 'jinja2', 'tokenizers'}"


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["generate", "--help"], ["plan", "--help"], ["nonsense"]])
def test_no_verb_is_imported_before_it_is_called(argv):
    program = f"import sys\nfrom m3dist.cli import main\ntry: main({argv})\nfinally: print({HEAVY}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("set()\n")
    assert done.returncode == (2 if argv == ["nonsense"] else 0)


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">/dev/full", 2, "m3dist plan: error: [Errno 28] No space left on device\n"),
        ("| true", 2, "m3dist plan: error: [Errno 32] Broken pipe\n"),
        (">&-", 0, ""),
        ("<&-", 0, ""),
    ],
)
def test_standard_streams_that_cannot_be_used(redirection, status, said):
    """Each is said in one line, or is what the caller asked for."""
    if redirection.endswith("full") and not Path("/dev/full").exists():
        pytest.skip("machine: no /dev/full")
    program = f"exec 3>&1; {{ sleep 0.3; {sys.executable} -m m3dist plan; echo $? >&3; }} {redirection}"
    done = subprocess.run(["sh", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines()[-1], done.stderr) == (str(status), said)


def test_python_m_m3dist():
    done = subprocess.run([sys.executable, "-m", "m3dist", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"m3dist {__version__}\n"
