"""`m3dist generate` and `bench` of a hub id: out of the store, or the hub's cache, and nothing over the network."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stores import MODEL, REVISION, keep
from world import ring

from m3dist.fetch.store import Entry
from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT, PATH

M3DIST = [sys.executable, "-m", "m3dist"]
GENERATE = ["generate", "--json", "--temperature", "0", "--prompt", DEMO_PROMPT]
OTHER = "f" * 40  # another revision


@pytest.fixture(autouse=True)
def environ(tmp_path, monkeypatch) -> None:
    """A store and a cache of the hub's that hold nothing, and a hub that nobody answers at."""
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def m3dist(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [*M3DIST, *arguments]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=100)


def generated(model: str, *flags: str) -> list[int]:
    """The tokens of the answer."""
    done = m3dist(*GENERATE, "--model", model, *flags)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"] == DEMO_ANSWER
    return said["tokens"]


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """Those of the directory."""
    return generated(str(PATH))


def on_two_hosts(folder: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """What two ranks end with, each with a store of its own: STORE0 and STORE1 in `folder`."""
    ranks = []
    for rank in range(2):
        environ = os.environ | ring(folder, 2, rank) | {"M3DIST_STORE": str(folder / f"store{rank}")}
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen([*M3DIST, *arguments], env=environ, stdout=pipe, stderr=pipe, text=True))
    said = [rank.communicate(timeout=100) for rank in ranks]
    return [subprocess.CompletedProcess(rank.args, rank.returncode, *out) for rank, out in zip(ranks, said)]


def keep_in(store: Path, rank: int, weights=2, **others) -> Entry:
    """`keep` the tiny checkpoint in another store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3DIST_STORE", str(store))
        return keep(PATH, rank, weights, **others)


@pytest.mark.parametrize(
    ("flags", "cut"),
    [
        (["-n", "2"], {"weights": 2}),
        (["-n", "2", "--weights", "3,1", "--experts", "whole"], {"weights": [3, 1], "experts": "whole"}),
        (["--attention", "replicated"], {"weights": 1, "attention": "replicated"}),
    ],
)
def test_the_same_tokens_as_from_the_directory(flags, cut, tokens):
    for rank in range(2 if flags[0] == "-n" else 1):
        keep(PATH, rank, **cut)
    assert generated(MODEL, *flags) == tokens


def test_bench_of_an_entry():
    entry = keep(PATH)
    few = ["--decode", "16", "--prefill", "16", "--tokens", "2", "--repeats", "1"]
    done = m3dist("bench", "--model", f"{MODEL}@{REVISION}", "--json", *few)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["complete"] and said["model"] == str(entry.directory)


def test_doctor_looks_into_the_store():
    """As the ranks will: what is whole, and what is to be fetched."""
    keep(PATH, 0, 2)
    entry = keep(PATH, 1, 2)
    seen = disks("--model", MODEL)
    assert [level for level, _ in seen] == ["ok"] and "of ranks 0, 1 in" in seen[0][1]
    (entry.directory / "config.json").unlink()
    assert disks("--model", MODEL) == [("warning", f"{entry.directory}/config.json is missing")]
    [(level, what)] = disks("--model", MODEL, "--weights", "3,1")
    assert level == "warning" and "the slices of ranks 0, 1 are missing in" in what


def disks(*flags: str) -> list[tuple[str, str]]:
    """What doctor says of the disks of two local ranks: (level, what it has seen)."""
    told = json.loads(m3dist("doctor", "-n", "2", "--json", *flags).stdout)
    return [(f["level"], f["seen"]) for f in told["findings"] if f["check"] == "disk"]


def test_each_rank_s_own_store(tmp_path):
    """Of a revision that both keep, though one has a newer one of another cut."""
    for rank in range(2):
        keep_in(tmp_path / f"store{rank}", rank)
    keep_in(tmp_path / "store1", 1, [1, 3], revision=OTHER)
    first, second = on_two_hosts(tmp_path, *GENERATE, "--model", MODEL)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["text"] == DEMO_ANSWER and not second.stdout


def test_a_rank_whose_store_lacks_it(tmp_path):
    """Every rank says who lacks what, and the command is for the revision that another keeps."""
    for rank, revision in ((0, REVISION), (1, REVISION), (0, OTHER)):
        entry = keep_in(tmp_path / f"store{rank}", rank, revision=revision)
    size = f"{entry.manifest.make_plan().bytes_held(1) / 1e6:.1f} MB"
    command = f"`m3dist fetch {MODEL}@{OTHER} -n 2`"
    lacks = rf"{MODEL}@{OTHER}: \S+ lacks the slice of rank 1; {size} to fetch. Run {command} first"
    for done in on_two_hosts(tmp_path, *GENERATE, "--model", MODEL):
        assert done.returncode == 2 and re.search(lacks, done.stderr), done.stderr
    for done in on_two_hosts(tmp_path, *GENERATE, "--model", f"{MODEL}@{REVISION}"):
        assert done.returncode == 0, done.stderr


def test_nothing_is_kept_and_nothing_is_downloaded():
    done = m3dist(*GENERATE, "--model", MODEL, "-n", "2", "--weights", "2,1")
    assert done.returncode == 2
    assert f"lacks the slices of ranks 0, 1. Run `m3dist fetch {MODEL} -n 2 --weights 2,1` first" in done.stderr
    done = m3dist(*GENERATE, "--model", "MiniMaxAI/MiniMax-M3")
    assert "lacks the slice of rank 0; 852.4 GB to fetch. Run `m3dist fetch MiniMaxAI/MiniMax-M3` first" in done.stderr


def test_a_damaged_entry():
    entry, _ = (keep(PATH, rank, 2) for rank in (1, 0))
    file = entry.directory / "model-00001-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    done = m3dist(*GENERATE, "--model", MODEL, "-n", "2")
    assert done.returncode == 2
    assert re.search(rf"rank 1 on \S+: {file} has \d+ bytes, not \d+. Run `m3dist fetch {MODEL}@{REVISION} -n 2` first",
                     done.stderr), done.stderr  # fmt: skip


def snapshot(hub: Path, commit: str) -> Path:
    """The tiny checkpoint as the hub's library downloads one."""
    repository = hub / f"models--{MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(PATH, repository / "snapshots" / commit))


def test_a_whole_snapshot_in_the_hub_s_cache(tmp_path, tokens):
    """Is used where no store has anything; not half of one."""
    path = snapshot(tmp_path / "hub", REVISION)
    assert generated(MODEL, "-n", "2") == tokens
    (path / "model.safetensors").unlink()
    done = m3dist(*GENERATE, "--model", MODEL, "-n", "2")
    assert done.returncode == 2 and "lacks the slices of ranks 0, 1" in done.stderr


def test_snapshots_of_different_commits(tmp_path):
    """A rank looks for rank 0's."""
    for rank, commit in enumerate((REVISION, OTHER)):
        snapshot(tmp_path / f"hub{rank}", commit)
    said = []
    for rank in range(2):
        environ = os.environ | ring(tmp_path, 2, rank) | {"HF_HUB_CACHE": str(tmp_path / f"hub{rank}")}
        said.append(subprocess.Popen([*M3DIST, *GENERATE, "--model", MODEL], env=environ, stderr=subprocess.PIPE))
    for rank in said:
        _, err = rank.communicate(timeout=100)
        assert rank.returncode == 2 and b"lacks the slices of ranks 0, 1" in err


def test_a_directory_that_one_rank_lacks(tmp_path):
    shutil.copytree(PATH, tmp_path / "owner" / "name")
    ranks = []
    for rank, folder in enumerate((tmp_path, Path(__file__).parents[2])):
        environ = os.environ | ring(tmp_path, 2, rank)
        ranks.append(
            subprocess.Popen([*M3DIST, *GENERATE, "--model", MODEL], env=environ, cwd=folder, stderr=subprocess.PIPE)
        )
    errors = [rank.communicate(timeout=100)[1].decode() for rank in ranks]
    assert [rank.returncode != 0 for rank in ranks] == [True, True]
    assert "owner/name: no such directory on" in errors[1] and "rank 1 failed" in errors[0]
