"""`m3dist generate` as people start it: on its own, under mlx.launch, under mpirun; and when something goes wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from world import MPIRUN, free_port

from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT, PATH
from m3dist.watchdog import EXIT_PEER_LOST, EXIT_STALLED

M3DIST = [sys.executable, "-m", "m3dist"]
GREEDY = ["--temperature", "0", "--prompt", DEMO_PROMPT]


def run(command: list[str], deadline: float = 100, **environ: str) -> subprocess.CompletedProcess[str]:
    """The finished process; whatever it started is gone before this returns."""
    process = start(command, **environ)
    try:
        out, err = process.communicate(timeout=deadline)
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def by_mlx_launch(port: int, *command: str) -> list[str]:
    """Under plain mlx.launch: two ranks of a ring, with addresses from `port` on."""
    launcher = str(Path(sys.executable).with_name("mlx.launch"))
    return [launcher, "--backend", "ring", "-n", "2", "--starting-port", str(port), "--", *command]


def ring_of_two(folder: Path) -> str:
    """A file with the addresses of a ring on free ports, as MLX_HOSTFILE."""
    port, hosts = free_port(2), folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    return str(hosts)


def start(command: list[str], **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    for child in family(process):
        child.kill()
    process.wait()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ranks_of(process: subprocess.Popen[str], world: int) -> list[psutil.Process]:
    """The rank processes of a local launch, in rank order, once all are computing."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        found = [p for p in family(process)[1:] if "MLX_RANK" in environ_of(p)]
        if len(found) == world:
            return sorted(found, key=lambda p: int(environ_of(p)["MLX_RANK"]))
        time.sleep(0.05)
    raise AssertionError(f"{world} ranks did not start")


def environ_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.parametrize(
    ("backend", "world"),
    [("ring", 1), ("ring", 2), ("ring", 3), *(pytest.param("mpi", n, marks=pytest.mark.mpi) for n in (4, 5, 8))],
)
def test_the_same_text_in_every_world(backend, world):
    done = run([*M3DIST, "generate", "--model", "tiny", "-n", str(world), "--backend", backend, *GREEDY])
    assert done.stdout.rstrip("\n").endswith(DEMO_ANSWER), done.stderr
    check_words(done, world)


def test_the_same_beginning_in_wide_rings():
    """A ring's sockets spin, so with more ranks than cores each token takes up to a second: few tokens."""
    done = {}
    for world in (1, 4, 8):
        done[world] = run([*M3DIST, "generate", "--model", "tiny", "-n", str(world), "--max-tokens", "4", *GREEDY])
        check_words(done[world], world)
    assert len(done[1].stdout) > 4 and done[4].stdout == done[8].stdout == done[1].stdout


def check_words(done: subprocess.CompletedProcess[str], world: int) -> None:
    """What every rank and the whole job say of themselves."""
    assert done.returncode == 0, done.stderr
    for rank in range(world):
        assert re.search(rf"rank {rank}: weights [\d.]+ MiB, .* loaded in [\d.]+ s", done.stderr)
    assert re.search(r"answer \d+ tokens, the first after [\d.]+ s, then [\d.]+ tokens/s", done.stderr)


def test_under_mlx_launch_without_a_flag_to_change():
    done = run(by_mlx_launch(free_port(2), *M3DIST, "generate", *GREEDY))
    assert DEMO_ANSWER in done.stdout and done.stdout.count(DEMO_ANSWER) == 1  # rank 0 alone prints


@pytest.mark.mpi
@pytest.mark.parametrize("world", [2, 4])
def test_under_mpirun_without_a_flag_to_change(world):
    done = run([*MPIRUN.split(), "-n", str(world), *M3DIST, "generate", *GREEDY])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(DEMO_ANSWER) == 1


def test_json_says_everything():
    done = run([*M3DIST, "generate", "-n", "2", "--json", *GREEDY])
    said = json.loads(done.stdout)
    assert said["text"] == DEMO_ANSWER and said["finish_reason"] == "stop" and said["world"] == 2
    assert [r["rank"] for r in said["ranks"]] == [0, 1]
    assert all(r["weights_bytes"] > 1e6 and r["load_seconds"] > 0 for r in said["ranks"])


def test_one_seed_one_text():
    texts = set()
    for world, seed in ((1, 5), (2, 5), (2, 5), (1, 6), (1, 7), (1, 8)):
        flags = ["--seed", str(seed), "--temperature", "4", "--top-k", "0", "--top-p", "1", "--max-tokens", "20"]
        done = run([*M3DIST, "generate", "-n", str(world), "--json", "--prompt", "Hello!", *flags])
        texts.add((seed, json.loads(done.stdout)["text"]))
    assert len(texts) == 4  # one for each seed, whatever the world


def test_a_stop_string_is_not_shown():
    word = DEMO_ANSWER.split()[2]
    done = run([*M3DIST, "generate", "-n", "2", "--json", "--stop", word[1:], *GREEDY])
    said = json.loads(done.stdout)
    assert said["text"] == DEMO_ANSWER[: DEMO_ANSWER.index(word[1:])] and said["finish_reason"] == "stop"


def test_max_tokens_is_the_reason_to_end():
    said = json.loads(run([*M3DIST, "generate", "-n", "2", "--json", "--max-tokens", "2", *GREEDY]).stdout)
    assert said["completion_tokens"] == 2 and said["finish_reason"] == "length"


def test_the_answer_ends_where_the_context_does(endless):
    """Its length is limited by the model's, and a prompt that leaves no room is refused before anything is loaded."""
    config = json.loads((endless / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 20
    (endless / "config.json").write_text(json.dumps(config))
    done = run([*M3DIST, "generate", "--model", str(endless), "--json", *GREEDY[:2], "--prompt", "Hello!"])
    said = json.loads(done.stdout)
    assert said["prompt_tokens"] + said["completion_tokens"] == 20 and said["finish_reason"] == "length"
    done = run([*M3DIST, "generate", "--model", str(endless), "-n", "2", *GREEDY])
    assert done.returncode == 2 and "loading" not in done.stderr
    assert "the prompt has 32 tokens; with the answer this model takes at most 20" in done.stderr


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--prompt - </dev/null", "--prompt -: standard input is empty"),
        ("--prompt - <&-", "--prompt -: standard input is empty"),
        ("--prompt - </bin/sh", "--prompt -: standard input must be text, in UTF-8"),
        ("--prompt Hello! | true", "standard output: Broken pipe"),
        ("--prompt Hello! --model nowhere", "nowhere: no such directory"),
    ],
)
def test_a_user_error_is_one_line(arguments, said, world):
    flags, _, pipe = arguments.partition("|")
    done = run(["sh", "-c", f"{{ {' '.join(M3DIST)} generate -n {world} {flags}; echo $? >&2; }} {pipe and '| true'}"])
    assert done.stderr.splitlines()[-1] == "2" and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_nothing_special(closed):
    done = run(["sh", "-c", f"{' '.join(M3DIST)} generate -n 2 --temperature 0 --prompt Hello! {closed}"])
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# When something goes wrong


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A copy of the tiny checkpoint with its last tensors cut off."""
    copy = Path(shutil.copytree(PATH, tmp_path / "damaged"))
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return copy


@pytest.mark.parametrize("launcher", ["m3dist", "mlx.launch", pytest.param("mpirun", marks=pytest.mark.mpi)])
def test_a_damaged_checkpoint_ends_every_rank(damaged, launcher):
    generate = [*M3DIST, "generate", "--model", str(damaged), "--prompt", "Hello!"]
    command = {
        "m3dist": [*generate, "-n", "2"],
        "mlx.launch": by_mlx_launch(free_port(2), *generate),
        "mpirun": [*MPIRUN.split(), "-n", "2", *generate],
    }[launcher]
    done = run(command, deadline=60)
    assert "model.safetensors: 1000 bytes are missing at the end" in done.stdout + done.stderr
    if launcher != "mlx.launch":  # which says 0 whatever happened
        assert done.returncode != 0


def test_a_rank_that_finds_another_checkpoint(tmp_path, damaged):
    """One rank's disk holds other weights: all ranks end, and the one at fault is named."""
    hosts, here = ring_of_two(tmp_path), tmp_path / "here"
    ranks = []
    for rank, source in enumerate((PATH, damaged)):
        home = tmp_path / f"home{rank}"
        shutil.copytree(source, home / "model")
        command = [*M3DIST, "generate", "--model", "model", "--prompt", "Hello!"]
        environ = os.environ | {"MLX_HOSTFILE": hosts, "MLX_RANK": str(rank)}
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environ, cwd=home, stdout=pipe, stderr=pipe, text=True))
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert not here.exists() and all(rank.returncode not in (0, None) for rank in ranks)
    assert "rank 1 failed: CheckpointError" in said[0] and "1000 bytes are missing" in said[1]


@pytest.fixture
def endless(tmp_path) -> Path:
    """A copy of the tiny checkpoint whose stop token is one that it never gives: its answers go on for ever."""
    copy = Path(shutil.copytree(PATH, tmp_path / "endless"))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = (copy / name).read_text()
        content = re.sub(r'"eos_token_id": \d+', '"eos_token_id": 0', content)
        (copy / name).write_text(content.replace('"eos_token": "[e~["', '"eos_token": "]!p~["'))
    return copy


def endless_answer(model: Path, world: int, **environ: str) -> subprocess.Popen[str]:
    flags = ["--raw", "--temperature", "0", "--max-tokens", "1000000", "--prompt", "Hello"]
    return start([*M3DIST, "generate", "--model", str(model), "-n", str(world), *flags], **environ)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job(victim, endless):
    process = endless_answer(endless, 3)
    try:
        ranks = ranks_of(process, 3)
        time.sleep(4)
        ranks[victim].kill()
        began = time.monotonic()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert process.returncode == 128 + signal.SIGKILL and f"rank {victim} was killed by SIGKILL" in err
        assert not any(rank.is_running() for rank in ranks)
    finally:
        end(process)


def test_a_stalled_rank_ends_the_job(endless):
    process = endless_answer(endless, 2, M3DIST_STEP_LIMIT="5")
    try:
        ranks = ranks_of(process, 2)
        time.sleep(4)
        ranks[1].suspend()
        began = time.monotonic()
        _, err = process.communicate(timeout=40)
        assert time.monotonic() - began < 20
        assert process.returncode == EXIT_STALLED and re.search(
            r"rank 0 of 2: nothing finished for 5 s in decode step", err
        )
        assert not any(rank.is_running() for rank in ranks)
    finally:
        end(process)


def test_a_rank_that_never_comes_is_not_waited_for(tmp_path):
    environ = {"MLX_HOSTFILE": ring_of_two(tmp_path), "MLX_RANK": "0", "M3DIST_START_LIMIT": "3"}
    done = run([*M3DIST, "generate", "--prompt", "Hello!"], deadline=30, **environ)
    assert done.returncode == 1 and "wait_for_every_rank_to_join" in done.stderr


def test_two_jobs_on_the_same_ports_never_mix():
    """Both launchers begin at the same port: a job answers its own prompt, or ends without an answer and says why.

    Where each job has claimed one address first, neither can go on; otherwise one of them runs.
    """
    answers = {"What is 2 + 3?": "The answer is 5.", "What is 9 + 4?": "The answer is 13."}
    for _ in range(2):
        port = free_port(2)
        jobs = {
            prompt: start(
                by_mlx_launch(port, *M3DIST, "generate", "--temperature", "0", "--prompt", prompt),
                M3DIST_START_LIMIT="20",
            )
            for prompt in answers
        }
        said = {}
        for prompt, job in jobs.items():
            try:
                said[prompt] = job.communicate(timeout=90)
            finally:
                end(job)
        refused = "another job on this machine uses the ring address 127.0.0.1:"
        for prompt, (out, err) in said.items():
            given = [answer for answer in answers.values() if answer in out]
            assert given == [answers[prompt]] or (not given and "m3dist" in out + err), out + err
        ended_well = [answers[prompt] in out for prompt, (out, _) in said.items()]
        assert all(ended_well) or any(refused in out + err for out, err in said.values())


def test_ranks_of_two_jobs_know_each_other_as_strangers(tmp_path):
    """Cross-connected on purpose: rank 0 of one job and rank 1 of another."""
    hosts = ring_of_two(tmp_path)
    ranks = [
        start([*M3DIST, "generate", "--prompt", "Hello!"], MLX_HOSTFILE=hosts, MLX_RANK=str(rank), M3DIST_JOB=job)
        for rank, job in enumerate(("one", "other"))
    ]
    for rank in ranks:
        try:
            _, err = rank.communicate(timeout=60)
        finally:
            end(rank)
        assert rank.returncode == EXIT_PEER_LOST and "the ranks differ in job (rank 0: one, rank 1: other)" in err
