"""`m3dist fetch` and `convert`, killed and run again until done: what they leave is what a run leaves that nobody
disturbed, bit for bit and nothing else, and hardly a byte is fetched twice.

Moments are random: a delay after the first request to the hub, which is slow on purpose, up to the length of a whole
run. M3DIST_SEED repeats the delays; what a run has come to by then is never quite the same. Or a process is killed
before each change of a directory, one after the other.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import checkpoints
import psutil
import pytest
from failures import M3DIST, Trial, started
from hub_server import Fault, HubServer

from m3dist.tiny import PATH
from m3dist.watchdog import EXIT_STALLED

MODEL, OUT = "owner/name", "out"
WORLD, CONNECTIONS, RANGE = 2, 4, 128 << 10
RATE = 3e6  # bytes a second of each connection
KILLS, IN_A_ROW = 10, 4  # of a verb in a format, at least; until it may end
SEED = int(os.environ.get("M3DIST_SEED", time.time_ns() % 2**32))
FETCH, CONVERT = ["fetch", MODEL, "-n", str(WORLD)], ["convert", MODEL, OUT]
WAITING = "blocks, some of them waiting for other ranks"

KILLED_BEFORE_CHANGE = """
import itertools, os, signal, sys
from m3dist import cli
changes = itertools.count()
def hook(event, _):
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link") and next(changes) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[HubServer]:
    """A slow one: 18 MB in the published layout, and the files beside them."""
    config = checkpoints.tiny_config(
        num_hidden_layers=3,
        hidden_size=256,
        intermediate_size=256,
        dense_intermediate_size=512,
        shared_intermediate_size=256,
        num_local_experts=16,
        vocab_size=2000,
    )
    tensors = checkpoints.random_tensors(config)
    folder = checkpoints.published(tmp_path_factory.mktemp("hub"), config, tensors, shards=4)
    for file in PATH.iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)
    with HubServer(folder, MODEL) as server:
        server.faults.append(Fault("slow", value=RATE))
        yield server


class Job:
    """Runs of one command, one after the other: what they leave is in `kept`, a store with OUT in it."""

    def __init__(self, folder: Path, hub: HubServer, words: Sequence[str], **env: str):
        self.folder, self.hub, self.env = folder, hub, env
        self.words = [*words, "--connections", str(CONNECTIONS), "--range-size", str(RANGE)]
        self.kept = folder / "kept"
        self.kept.mkdir(parents=True)
        self.done, self.sent = False, 0  # bytes by the hub, in all runs

    @contextmanager
    def run(self, program: Sequence[str] = M3DIST) -> Iterator[Trial]:
        """One that has sent its first request; afterwards it has ended, and nothing of it runs."""
        self.hub.reset()
        told = self.hub.environment(self.folder / "home") | {"M3DIST_STORE": str(self.kept)}
        with started(Trial(self.folder, [*program, *self.words], **told, **self.env), cwd=self.kept) as trial:
            trial.wait_for(lambda: self.hub.counts.requests)
            yield trial
            outcome = trial.outcome("", time.monotonic())
            assert (outcome.left, outcome.files) == (0, 0), trial.said()
        self.sent += self.hub.stats()["sent"]
        whole = self.kept / OUT  # is not written again
        self.done = outcome.status == 0 or whole.exists() and not (whole / ".journal").exists()

    def undisturbed(self) -> float:
        """A run to the end; returns the seconds it took."""
        with self.run() as trial:
            since = time.monotonic()
            assert trial.process.wait(60) == 0, trial.said()
            seconds = time.monotonic() - since
        return seconds

    def killed(self, after: float, chance: random.Random) -> None:
        """A run whose launcher, or a rank, or all ranks are killed `after` seconds."""
        with self.run() as trial:
            whole, ranks = [psutil.Process(trial.process.pid)], trial.ranks()
            victims = chance.choice([whole, ranks, [chance.choice(ranks)]]) if ranks else whole
            time.sleep(after)
            trial.send(signal.SIGKILL, *victims)

    def files(self) -> dict[str, bytes]:
        """All there are, hidden ones and directories too, by path."""
        found = {}
        for path in sorted(self.kept.rglob("*")):
            name = str(path.relative_to(self.kept))
            found[name] = b"" if path.is_dir() else path.read_bytes()
            if path.name == "manifest.json":
                found[name] = json.dumps(json.loads(found[name]) | {"created": None}).encode()
        return found

    def phase(self) -> str:
        """What the last run was doing, judged by what it left."""
        paths = [path for path in self.kept.rglob("*") if path.is_file()]
        places = {path.parent.name for path in paths if path.name == "config.json"}
        if any(not place.endswith(".partial") for place in places):
            return "publishing"
        if places:
            return "sealing"
        if ".spool" in {path.parent.name for path in paths}:
            return WAITING
        return "blocks" if ".journal" in {path.name for path in paths} else "listing and headers"


def check(job: Job, whole: Job, ranges: int) -> None:
    """`job` has made what `whole` has, and got so many ranges more for it at most."""
    assert job.files().keys() == whole.files().keys()
    assert job.files() == whole.files()
    assert 0 <= job.sent - whole.sent <= ranges * RANGE


def killed_in_a_row(job: Job, seconds: float, chance: random.Random) -> list[str]:
    """Runs that are killed within `seconds`, and one that is not; what the others were doing."""
    phases = []
    while len(phases) < IN_A_ROW and "publishing" not in phases:
        after = chance.uniform(0, seconds)
        job.killed(after, chance)
        if job.done:
            return phases
        phases.append(job.phase())
        seconds -= after
    job.undisturbed()
    return phases


@pytest.mark.parametrize("flags", [[], ["--bits", "4"]], ids=["own format", "4 bits"])
@pytest.mark.parametrize("words", [FETCH, CONVERT], ids=["fetch", "convert"])
def test_killed_at_random_moments(words, flags, hub, tmp_path):
    chance, folders = random.Random(SEED), map(str, itertools.count())
    whole = Job(tmp_path / "whole", hub, words + flags)
    seconds, phases, again = whole.undisturbed(), Counter(), 0
    while phases.total() < KILLS or (words == FETCH and not phases[WAITING]):
        job = Job(tmp_path / next(folders), hub, words + flags)
        found = killed_in_a_row(job, seconds, chance)
        check(job, whole, len(found) * WORLD * CONNECTIONS)
        phases.update(found)
        again += job.sent - whole.sent
    print(f"{' '.join(words + flags)}: {seconds:.1f} s undisturbed, {whole.sent} bytes; M3DIST_SEED={SEED}: killed in")
    print(f"{dict(phases)}, {again} bytes again")


@pytest.mark.parametrize("words", [FETCH, CONVERT], ids=["fetch", "convert"])
def test_asked_to_end(words, hub, tmp_path):
    job, whole = (Job(tmp_path / name, hub, words) for name in ("ended", "whole"))
    with job.run() as trial:
        trial.wait_for(lambda: job.phase() in (WAITING, "blocks"))
        trial.send(signal.SIGTERM, psutil.Process(trial.process.pid))
        assert trial.process.wait(10) in (-signal.SIGTERM, 128 + signal.SIGTERM), trial.said()
    job.undisturbed()
    whole.undisturbed()
    check(job, whole, WORLD * CONNECTIONS)


def test_a_rank_that_is_stopped(hub, tmp_path):
    """The others do not wait for ever, and the next run goes on."""
    job, whole = (Job(tmp_path / name, hub, FETCH, M3DIST_STEP_LIMIT="3") for name in ("stopped", "whole"))
    with job.run() as trial:
        trial.wait_for(lambda: job.phase() in (WAITING, "blocks"))
        trial.send(signal.SIGSTOP, trial.ranks()[1])
        assert trial.process.wait(30) == EXIT_STALLED
        assert "rank 1 finished nothing" in trial.said() and "its process is stopped" in trial.said()
    job.undisturbed()
    whole.undisturbed()
    check(job, whole, WORLD * CONNECTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("words", [FETCH[:2], CONVERT], ids=["fetch", "convert"])
def test_killed_before_each_change_of_a_directory(words, tmp_path):
    """What is fetched takes the place of a damaged entry."""
    with HubServer(PATH, MODEL) as hub:
        whole = Job(tmp_path / "whole", hub, words)
        whole.undisturbed()
        for number in itertools.count():
            job = Job(tmp_path / str(number), hub, words)
            if words != CONVERT:
                shutil.copytree(whole.kept, job.kept, dirs_exist_ok=True)
                os.truncate(next(job.kept.rglob("*.safetensors")), 1)
            with job.run([sys.executable, "-c", KILLED_BEFORE_CHANGE, str(number)]) as trial:
                status = trial.process.wait(60)
            if not job.done:
                assert status == -signal.SIGKILL, trial.said()
                job.undisturbed()
            check(job, whole, CONNECTIONS)
            if status == 0:
                break
        assert number > 5, "there are that many changes at least"


def test_what_a_rank_kept_for_another_that_has_all_now(hub, tmp_path):
    """It was killed before it had put that away."""
    job = Job(tmp_path, hub, FETCH)
    job.undisturbed()
    files = job.files()
    place, other = sorted(job.kept.rglob("rank-?-of-2"))
    work = place.with_name(f"{place.name}.partial")
    shutil.rmtree(other)
    with job.run() as trial:
        trial.wait_for(work.exists)
        trial.send(signal.SIGKILL, psutil.Process(trial.process.pid))
    left = shutil.copytree(work, tmp_path / "left")
    job.undisturbed()
    shutil.move(left, work)
    job.undisturbed()
    assert job.files() == files
