"""`m3dist fetch` by real ranks, from a hub in another process, which counts what it sends.

What every rank keeps is compared with what the loader slices out of the whole checkpoint, file by file.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import checkpoints
import hub_server
import pytest
from hub_server import Fault
from stores import keep
from world import ring, run_world

from m3dist import cli
from m3dist.checkpoint import CONFIG, open_checkpoint
from m3dist.fetch import store, target
from m3dist.layout import COLUMNS
from m3dist.plan import Plan, make_plan
from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT, PATH

MODEL = "owner/name"
M3DIST = [sys.executable, "-m", "m3dist"]
LARGEST = 3_000_000  # bytes of a file of the stores of run_world's ranks, so that there are several
RANGES = {"range_size": 128 << 10, "connections": 4}  # hundreds of ranges
FLAGS = ["--range-size", "128KiB", "--connections", "4"]
Files = dict[str, tuple[int, str]]  # name -> bytes and sha256

# 34 MB. Eight ranks get a head and a group of 64 columns each, and pairs of them the same keys and values.
WIDE = dict.fromkeys(("hidden_size", "intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 512)
MADE = checkpoints.tiny_config(num_hidden_layers=3, head_dim=64, num_local_experts=8, vocab_size=1000, **WIDE)


class Hub:
    """tests/hub_server.py as a process of its own."""

    def __init__(self, directory: Path, *flags: str):
        command = [sys.executable, hub_server.__file__, "--dir", str(directory), "--repo", MODEL, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.commits: dict[Path, str] = {}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)

    def ask(self, path: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(self.url + path, data, timeout=30) as answer:
            return json.load(answer)

    def publish(self, directory: Path) -> str:
        """Make it main's newest commit. Returns how to name just this one."""
        return f"{MODEL}@{self.ask('/_publish', str(directory).encode())}"

    def fail(self, *faults: Fault) -> None:
        """In place of those before."""
        self.ask("/_faults", json.dumps([asdict(fault) for fault in faults]).encode())

    def sent(self) -> int:
        """Body bytes since it was last asked."""
        sent = self.ask("/_stats")["sent"]
        self.ask("/_reset", b"")
        return sent


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The published layouts, with vision tensors, which nobody is to fetch; a conversion; and a model that answers."""
    folder = tmp_path_factory.mktemp("sources")
    tensors = checkpoints.random_tensors(MADE, seed=9, vision=True)
    found = {
        "BF16": checkpoints.published(folder / "bf16", MADE, tensors, shards=3),
        "MXFP8": checkpoints.mxfp8(folder / "mxfp8", MADE, tensors, shards=2),
        "tiny": Path(shutil.copytree(PATH, folder / "tiny")),
    }
    for name in ("BF16", "MXFP8"):
        found[f"{name} in 4 bits"] = folder / f"{name}-4"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("M3DIST_STORE", str(folder / "none"))
            assert cli.main(["convert", str(found[name]), str(folder / f"{name}-4"), "--bits", "4"]) == 0
    return found


@pytest.fixture(scope="module")
def running(sources) -> Iterator[Hub]:
    started = Hub(sources["tiny"])
    yield started
    started.close()


@pytest.fixture(scope="module")
def models(running, sources) -> dict[str, str]:
    """How each of `sources` is named."""
    return {name: running.publish(directory) for name, directory in sources.items()}


@pytest.fixture
def hub(running, models, tmp_path, monkeypatch) -> Hub:
    """The one that this test's processes ask, with a cache and a store of their own."""
    running.fail()
    running.sent()
    visit(running, tmp_path, monkeypatch)
    return running


def visit(hub: Hub, folder: Path, monkeypatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    monkeypatch.setenv("M3DIST_STORE", str(folder / "store"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# ---------------------------------------------------------------------------------------------------------------------
# What it should come to


def slices(directory: Path, folder: Path, rank: int, *cut: Any, largest: int = LARGEST) -> Files:
    """The files of a rank's entry: what the loader slices out of the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3DIST_STORE", str(folder / "expected"))
        patch.setattr(target, "LARGEST_FILE", largest)
        entry = keep(directory, rank, *cut)
        shutil.rmtree(folder / "expected")
    return {kept.name: (kept.nbytes, kept.sha256) for kept in entry.manifest.files}


def weights(files: Files) -> Files:
    return {name: file for name, file in files.items() if name.endswith(".safetensors")}


def copy_bytes(directory: Path) -> int:
    """One copy of what is kept of a checkpoint: all but the vision tensors."""
    return sum(spec.nbytes for spec in open_checkpoint(directory).translate().inventory.specs().values())


def headers(directory: Path) -> int:
    """Bytes of a hub's small files, config.json twice, and of its safetensors' headers."""
    first: dict[Path, int] = {}
    for tensor in open_checkpoint(directory).stored.values():
        first[tensor.file] = min(tensor.offset, first.get(tensor.file, tensor.offset))
    others = [path.stat().st_size for path in directory.iterdir() if path.suffix != ".safetensors"]
    return sum(others) + sum(first.values()) + (directory / CONFIG).stat().st_size


def plan_of(directory: Path, *cut: Any) -> Plan:
    return make_plan(open_checkpoint(directory).translate().inventory, *cut)


def missing_bytes(plan: Plan, rank: int, tensors: Sequence[str]) -> int:
    """What a hub has to send of some tensors that one rank has lost: its rows; of a column cut, whole rows; nothing of
    what others have too."""
    lost = 0
    for tensor in tensors:
        part, held = plan.slices(rank)[tensor], plan.held_specs(rank)[tensor]
        lost += plan.specs[tensor].nbytes if part.axis == COLUMNS else held.nbytes if part.axis is not None else 0
    return lost


# ---------------------------------------------------------------------------------------------------------------------
# Each byte once

WORLDS = [1, 2, 3, *(pytest.param(world, marks=pytest.mark.mpi) for world in (4, 8))]


@pytest.mark.parametrize("world", WORLDS)
def test_each_byte_crosses_the_network_once(world, hub, sources, models, tmp_path):
    """The sum over the ranks is at most 1.02 copies of what is kept, and each has the slices of the whole, bit for bit;
    those of the converted checkpoint, where it converts."""
    jobs = {"BF16": {}, "MXFP8": {}, "BF16 to 4 bits": {"model": models["BF16"], "bits": 4}}
    if world == 2:
        jobs |= {"BF16 in 4 bits": {}, "MXFP8 to 4 bits": {"model": models["MXFP8"], "bits": 4}}
    ranks = fetched_by(world, tmp_path, *({"model": models.get(name), **job} for name, job in jobs.items()))
    for number, name in enumerate(jobs):
        source, wanted = sources[name.replace(" to 4 bits", "")], sources[name.replace("to", "in")]
        sent, ranges = (ranks[0][number]["stats"][key] for key in ("sent", "ranges"))
        assert copy_bytes(source) < sent <= 1.02 * copy_bytes(source) and len(ranges) > 100
        for rank in range(world):
            files, expected = ranks[rank][number]["files"], slices(wanted, tmp_path, rank, world)
            assert weights(files) == weights(expected)
            assert files == expected or wanted != source  # config.json stays the source's


def fetched_by(world: int, folder: Path, *jobs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What programs.fetched gives for each job, for each rank."""
    jobs, backend = tuple(RANGES | job for job in jobs), "ring" if world < 4 else "mpi"
    return run_world("fetched", world, backend, folder=str(folder), largest=LARGEST, jobs=jobs)


def test_other_cuts_and_directories(hub, sources, models, tmp_path):
    """Made of what the ranks keep of the first cut: over the network come headers only. A second time, nothing else."""
    cuts = [
        (3, "columns", "heads"),
        (3, "columns", "heads"),
        ([1, 3, 2], "columns", "heads"),
        (3, "whole", "heads"),
        (3, "whole", "replicated"),
    ]
    names = ("weights", "experts", "attention")
    jobs = [{"model": models["MXFP8"], **dict(zip(names, cut)), "weights": None} for cut in cuts]
    jobs[2]["weights"] = cuts[2][0]
    four = {"model": models["MXFP8"], "bits": 4}
    jobs += [four, four | {"weights": [2, 1, 1]}, {"model": str(sources["BF16"])}]
    ranks = fetched_by(3, tmp_path, *jobs)
    sent = [found["stats"]["sent"] for found in ranks[0]]
    assert [number for number, count in enumerate(sent) if count > headers(sources["MXFP8"])] == [0, 5] and sent[
        -1
    ] == 0
    assert f"{MODEL} is here already, whole and intact: {ranks[0][1]['directory']}" in ranks[0][1]["said"]
    for rank in range(3):
        for found, cut in zip(ranks[rank], cuts):
            assert found["files"] == slices(sources["MXFP8"], tmp_path, rank, *cut)
        wanted = slices(sources["MXFP8 in 4 bits"], tmp_path, rank, [2, 1, 1])
        assert weights(ranks[rank][-2]["files"]) == weights(wanted)
        assert ranks[rank][-1]["files"] == slices(sources["BF16"], tmp_path, rank, 3)
        assert re.fullmatch("files-[0-9a-f]{64}", ranks[rank][-1]["revision"])


# ---------------------------------------------------------------------------------------------------------------------
# What is there already


@pytest.fixture(scope="module")
def fetched(running, models, tmp_path_factory) -> Path:
    """A folder with the stores of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        visit(running, folder, patch)
        again(folder, models)
    return folder


def again(folder: Path, models: dict[str, str], world: int = 2) -> list[dict[str, Any]]:
    """Fetch the MXFP8 checkpoint into the stores of ranks in `folder`."""
    return [found for (found,) in fetched_by(world, folder, {"model": models["MXFP8"]})]


@pytest.fixture
def stores(fetched, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(fetched, tmp_path / "stores"))


def entry_of(folder: Path, rank: int) -> Path:
    (found,) = folder.glob(f"store{rank}/{MODEL.replace('/', '--')}/*/rank-{rank}-of-*")
    return found


def assert_whole(ranks: list[dict[str, Any]], sources: dict[str, Path], folder: Path) -> None:
    for rank, found in enumerate(ranks):
        assert found["files"] == slices(sources["MXFP8"], folder, rank, len(ranks))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("M3DIST_STORE", str(Path(found["directory"]).parents[2]))
            (entry,) = [entry for entry in store.entries() if str(entry.directory) == found["directory"]]
            assert store.verify(entry) == [] and list(store.unfinished()) == []


def test_one_more_rank(hub, sources, models, stores, tmp_path):
    """Which gets its slices from the two that were there."""
    ranks = again(stores, models, world=3)
    assert ranks[0]["stats"]["sent"] <= headers(sources["MXFP8"])
    assert_whole(ranks, sources, tmp_path)


def test_one_store_is_lost(hub, sources, models, stores, tmp_path):
    """What only that rank had is fetched, and whole rows of column cuts."""
    shutil.rmtree(stores / "store1")
    ranks = again(stores, models)
    plan = plan_of(sources["MXFP8"], 2)
    lost = missing_bytes(plan, 1, list(plan.specs))
    assert (
        0.9 * lost < ranks[0]["stats"]["sent"] <= lost + headers(sources["MXFP8"]) < 0.8 * copy_bytes(sources["MXFP8"])
    )
    assert_whole(ranks, sources, tmp_path)


def test_damaged_files_are_named_and_fetched_alone(hub, sources, models, stores, tmp_path):
    """One with a wrong byte, one cut short, on different ranks; the intact ones stay where they are on the disk."""
    plan, lost = plan_of(sources["MXFP8"], 2), 0
    bad = {0: "model-00002-of-00005.safetensors", 1: "model-00004-of-00005.safetensors"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "LARGEST_FILE", LARGEST)
        for rank, name in bad.items():
            (file,) = [file for file in target.slice_of(plan, rank) if file.name == name]
            lost += missing_bytes(plan, rank, [tensor.name for tensor in file.tensors])
    with open(entry_of(stores, 0) / bad[0], "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    os.truncate(entry_of(stores, 1) / bad[1], 100_000)
    places = {path: path.stat().st_ino for rank in bad for path in entry_of(stores, rank).glob("*.safetensors")}
    ranks = again(stores, models)
    said = ranks[0]["said"]
    assert re.search(rf"rank 0: {entry_of(stores, 0) / bad[0]} has other contents: .*: it is fetched again", said)
    assert f"rank 1: {entry_of(stores, 1) / bad[1]} has 100000 bytes, not " in said
    assert said.count("it is fetched again") == 2
    assert lost / 2 < ranks[0]["stats"]["sent"] <= lost + headers(sources["MXFP8"]) < copy_bytes(sources["MXFP8"]) / 3
    moved = {path for path, inode in places.items() if path.stat().st_ino != inode}
    assert moved == {entry_of(stores, rank) / name for rank, name in bad.items()}
    assert_whole(ranks, sources, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def m3dist(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [*M3DIST, *arguments]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=100)


def fetch(model: str, *flags: str, status: int = 0, **environ: str) -> str:
    """What `m3dist fetch` says."""
    done = m3dist("fetch", model, *flags, **environ)
    assert done.returncode == status, done.stderr
    return done.stderr


def kept(folder: Path) -> dict[str, Files]:
    """What is in a store, by the rank's name; all of it whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3DIST_STORE", str(folder))
        entries = list(store.entries())
        assert all(store.verify(entry) == [] for entry in entries) and list(store.unfinished()) == []
    return {e.directory.name: {f.name: (f.nbytes, f.sha256) for f in e.manifest.files} for e in entries}


def test_from_two_ranks_to_one_and_back(hub, sources, models, tmp_path):
    """On one machine, whose store has the slices of both."""
    said = fetch(models["BF16"], "-n", "2", *FLAGS)
    amount = rf"({copy_bytes(sources['BF16']) / 1e6:.1f}) MB"
    assert re.search(rf"{MODEL}: {amount} of {amount}, [\d.]+ .?B/s, 0 s left, (\d+) of \3 blocks in place", said)
    assert copy_bytes(sources["BF16"]) < hub.sent() <= 1.02 * copy_bytes(sources["BF16"])
    fetch(models["BF16"])
    shutil.rmtree(next((tmp_path / "store").rglob("rank-0-of-2")))
    fetch(models["BF16"], "-n", "2")
    assert hub.sent() <= 2 * headers(sources["BF16"])
    found = kept(tmp_path / "store")
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        wanted = slices(sources["BF16"], tmp_path, rank, world, largest=target.LARGEST_FILE)
        assert found[f"rank-{rank}-of-{world}"] == wanted


def test_one_mac_at_a_time(hub, sources, models, tmp_path):
    """It says what that costs, and together they need nothing more."""
    plan = plan_of(sources["MXFP8"], 2)
    for rank in range(2):
        environ = {"M3DIST_STORE": str(tmp_path / f"store{rank}")}
        said = fetch(models["MXFP8"], "--world", "2", "--rank", str(rank), *FLAGS, **environ)
        sent = hub.sent()
        costs = re.search(
            rf"rank {rank} of 2 alone fetches ([\d.]+) MB to keep ([\d.]+) MB; where all ranks fetch", said
        )
        assert float(costs[1]) * 1e6 == pytest.approx(sent, rel=0.01)
        assert float(costs[2]) * 1e6 == pytest.approx(plan.bytes_held(rank), rel=0.01)
        assert float(costs[2]) < float(costs[1]) < 0.8 * copy_bytes(sources["MXFP8"]) / 1e6
        found = kept(tmp_path / f"store{rank}")
        assert found == {f"rank-{rank}-of-2": slices(sources["MXFP8"], tmp_path, rank, 2, largest=target.LARGEST_FILE)}
    jobs = [{"model": models["MXFP8"]}]
    ranks = run_world("fetched", 2, folder=str(tmp_path), largest=target.LARGEST_FILE, jobs=jobs)
    assert "is here already" in ranks[0][0]["said"] and ranks[0][0]["stats"]["sent"] <= headers(sources["MXFP8"])


def on_two_hosts(folder: Path, *arguments: str, **environ: str) -> list[subprocess.CompletedProcess[str]]:
    """What two ranks end with, each with a store and a cache of the hub's of its own in `folder`."""
    ranks = []
    for rank in range(2):
        own = {"M3DIST_STORE": str(folder / f"store{rank}"), "HF_HOME": str(folder / f"home{rank}")}
        pipe = subprocess.PIPE
        env = os.environ | ring(folder, 2, rank) | own | environ
        ranks.append(subprocess.Popen([*M3DIST, *arguments], env=env, stdout=pipe, stderr=pipe, text=True))
    said = [rank.communicate(timeout=100) for rank in ranks]
    return [subprocess.CompletedProcess(rank.args, rank.returncode, *out) for rank, out in zip(ranks, said)]


def download(home: Path, model: str, name: str | None = None) -> None:
    """Into the hub's cache, by its own library: a whole repository, or one file."""
    repo, _, revision = model.partition("@")
    call = f"hf_hub_download({repo!r}, {name!r}" if name else f"snapshot_download({repo!r}"
    code = f"import huggingface_hub; huggingface_hub.{call}, revision={revision!r})"
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_HOME": str(home)}, check=True, capture_output=True
    )


def test_a_file_that_one_rank_has_in_its_cache(hub, sources, models, tmp_path):
    """Is not sent: that rank reads it for both."""
    name = "model-00002-of-00003.safetensors"
    download(tmp_path / "home1", models["BF16"], name)
    assert hub.sent() == (sources["BF16"] / name).stat().st_size
    done = on_two_hosts(tmp_path, "fetch", models["BF16"], *FLAGS)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    used = open_checkpoint(sources["BF16"]).translate()
    there = sum(t.nbytes for t in open_checkpoint(sources["BF16"]).stored.values() if t.file.name == name)
    assert used.ignored and hub.sent() <= copy_bytes(sources["BF16"]) - 0.9 * there
    for rank in range(2):
        wanted = slices(sources["BF16"], tmp_path, rank, 2, largest=target.LARGEST_FILE)
        assert kept(tmp_path / f"store{rank}") == {f"rank-{rank}-of-2": wanted}


def test_all_files_are_in_the_cache(hub, sources, models, tmp_path):
    """Nothing is sent; and offline there is nobody who could."""
    download(tmp_path / "home", models["tiny"])
    hub.sent()
    fetch(models["tiny"])
    assert hub.sent() == 0 and len(kept(tmp_path / "store")) == 1
    shutil.rmtree(tmp_path / "store")
    fetch(models["tiny"], "-n", "2", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    for rank in range(2):
        wanted = slices(sources["tiny"], tmp_path, rank, 2, largest=target.LARGEST_FILE)
        assert kept(tmp_path / "store")[f"rank-{rank}-of-2"] == wanted
    said = fetch(MODEL, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "nothing"), status=2)
    assert f"{MODEL} is no directory here and not in the local cache, and Hugging Face cannot be reached" in said


def test_a_name_that_leads_out_of_the_store(hub, models, tmp_path):
    """Nothing is written."""
    hub.ask("/_listed", json.dumps([{"rfilename": "../evil.json", "size": 3, "blobId": "0" * 40}]).encode())
    said = fetch(MODEL, status=2)
    hub.ask("/_listed", b"[]")
    assert f"{MODEL} lists a file '../evil.json', which could lead elsewhere; it is refused" in said
    assert hub.sent() == 0 and not list(tmp_path.glob("store/**/*"))


def test_a_private_repository(sources, tmp_path, monkeypatch):
    private = Hub(sources["tiny"], "--token", "hf_secret")
    try:
        visit(private, tmp_path, monkeypatch)
        said = fetch(MODEL, status=2)
        assert f"{MODEL} is no directory here and not on Hugging Face; if it is private, `hf auth login` first" in said
        assert private.sent() == 0
        fetch(MODEL, "-n", "2", HF_TOKEN="hf_secret")
        assert private.ask("/_stats")["tokens_at_storage"] == 0
        assert len(kept(tmp_path / "store")) == 2
    finally:
        private.close()


def test_generate_gets_what_is_missing(hub, sources, models, tmp_path):
    """And answers as from the directory; the next one gets nothing."""
    for flags, least in (["--fetch"], copy_bytes(sources["tiny"])), ([], 0):
        prompt = ["--temperature", "0", "--prompt", DEMO_PROMPT, "--json"]
        done = m3dist("generate", "--model", models["tiny"], "-n", "2", *flags, *prompt)
        assert json.loads(done.stdout)["text"] == DEMO_ANSWER
        assert least <= hub.sent() <= 1.02 * least + bool(least) * headers(sources["tiny"])


FROM_PYTHON = """
import sys, time
from m3dist import cli
status = cli.main(["fetch", sys.argv[1]])
time.sleep(1)
print(status, "and goes on")
"""


def test_whoever_calls_it_goes_on(hub, models):
    """A rank that waits at its exit is ended after a while; alone it waits for nobody."""
    environ = os.environ | {"M3DIST_START_LIMIT": "0.5"}
    done = subprocess.run(
        [sys.executable, "-c", FROM_PYTHON, models["tiny"]], env=environ, capture_output=True, text=True
    )
    assert done.stdout == "0 and goes on\n", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# A hub that moves, fails and is slow


def changed(directory: Path, folder: Path) -> Path:
    """A copy with other weights."""
    copy = Path(shutil.copytree(directory, folder / "changed"))
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(bytes(range(100)))
    return copy


def revisions(folder: Path) -> list[str]:
    """Of each entry in a store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M3DIST_STORE", str(folder))
        return sorted(entry.manifest.revision for entry in store.entries())


def test_one_commit_for_the_whole_job(hub, sources, models, tmp_path):
    """Though the branch moves while it runs; the next job gets what is new, and the old commit is still there."""
    first = hub.publish(sources["tiny"]).partition("@")[2]
    hub.fail(Fault("slow", "model.safetensors", value=300_000))
    job = subprocess.Popen([*M3DIST, "fetch", MODEL, "-n", "2", *FLAGS], stderr=subprocess.PIPE, text=True)
    while len(hub.ask("/_stats")["ranges"]) < 10:
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.05)
    hub.fail()
    second = hub.publish(changed(sources["tiny"], tmp_path)).partition("@")[2]
    assert job.wait(60) == 0 and revisions(tmp_path / "store") == [first] * 2
    found = kept(tmp_path / "store")
    for rank in range(2):
        wanted = slices(sources["tiny"], tmp_path, rank, 2, largest=target.LARGEST_FILE)
        assert found[f"rank-{rank}-of-2"] == wanted
    fetch(MODEL)
    assert sorted(revisions(tmp_path / "store")) == sorted([first, first, second])
    hub.sent()
    fetch(f"{MODEL}@{first}")
    assert hub.sent() <= headers(sources["tiny"])


def test_a_rank_whose_download_fails(hub, sources, models, tmp_path):
    """For good: all end soon, and the error has file, bytes and reason. What came before need not come again."""
    hub.fail(Fault("size", "model-00002-of-00003.safetensors", first=60))
    began = time.monotonic()
    said = fetch(models["BF16"], "-n", "2", *FLAGS, status=2)
    assert time.monotonic() - began < 30
    reason = "the answer's Content-Range is 'bytes .*', not 'bytes .*'; has the file changed?"
    file = rf"{MODEL}@\w+/model-00002-of-00003.safetensors: bytes \d+-\d+"
    assert re.search(rf"rank \d: language_model\.\S+: {file}: {reason}", said), said
    assert "Traceback" not in said
    assert not revisions(tmp_path / "store")
    before = hub.sent()
    hub.fail()
    fetch(models["BF16"], "-n", "2", *FLAGS)
    again = before + hub.sent() - copy_bytes(sources["BF16"])
    assert before > 1e6 and again <= 2 * headers(sources["BF16"]) + 2 * 4 * (128 << 10)
    assert len(kept(tmp_path / "store")) == 2


def test_what_another_plan_had_begun(hub, sources, models, tmp_path):
    """Is used too."""
    hub.fail(Fault("size", "model-00002-of-00002.safetensors", first=20))
    fetch(models["MXFP8"], *FLAGS, status=2)
    before = hub.sent()
    hub.fail()
    fetch(models["MXFP8"], "--experts", "whole", *FLAGS)
    again = before + hub.sent() - copy_bytes(sources["MXFP8"])
    assert before > 5e6 and again <= 2 * headers(sources["MXFP8"]) + 4 * (128 << 10)
    assert len(revisions(tmp_path / "store")) == 1


def test_a_slow_hub_is_waited_for(hub, models, tmp_path):
    """Every range takes longer than a step may."""
    hub.fail(Fault("slow", "model.safetensors", value=150_000))
    began = time.monotonic()
    fetch(models["tiny"], "-n", "2", "--range-size", "512KiB", M3DIST_STEP_LIMIT="1.5")
    assert time.monotonic() - began > 3 and len(kept(tmp_path / "store")) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """One of 40 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"machine: a disk of 40 MB cannot be mounted here: {done.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(hub, sources, models, small_disk, tmp_path):
    """One rank's: all are refused before the first byte of a tensor, and the host is named."""
    (tmp_path / "store1").symlink_to(small_disk)
    for rank, done in enumerate(on_two_hosts(tmp_path, "fetch", models["BF16"], *FLAGS)):
        assert done.returncode == 2 and not list((tmp_path / f"store{rank}").rglob("rank-*-of-2"))
        said = re.search(r"(\S+): ([\d.]+) MB are to be kept.* and ([\d.]+) MB are free; make room", done.stderr)
        assert said and said[1] == os.uname().nodename and float(said[2]) > float(said[3]) > 30, done.stderr
    assert hub.sent() <= headers(sources["BF16"])
    (tmp_path / "store1").unlink()
    assert [done.returncode for done in on_two_hosts(tmp_path, "fetch", models["BF16"], *FLAGS)] == [0, 0]
