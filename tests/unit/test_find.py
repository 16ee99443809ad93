"""Finding what to load, in a world of one: which entry it is, and fetching what is missing, asked at a terminal or not.
tests/ranks/test_store.py has worlds of several."""

import os
import pty
from pathlib import Path

import checkpoints
import pytest
from hub_server import HubServer
from stores import MODEL, REVISION, keep

from m3dist.comm import Comm
from m3dist.errors import CheckpointError
from m3dist.fetch.store import Entry
from m3dist.find import Wanted, directory_of, find
from m3dist.tensors import Quantization
from m3dist.tiny import PATH
from m3dist.watchdog import Watchdog

OTHER = "f" * 40
FOUR_BITS = Quantization("affine", 4, 32)
CONFIG = checkpoints.tiny_config()


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def found(model: str = MODEL, **others) -> Path | Entry:
    watchdog = Watchdog("test")
    try:
        return find(model, Comm(), watchdog, **others)
    finally:
        watchdog.stop()


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory) -> Path:
    tensors = checkpoints.random_tensors(CONFIG, seed=1)
    return checkpoints.mlx_layout(tmp_path_factory.mktemp("mlx"), CONFIG, tensors, "b", "affine", group_size=32)


def test_directories(tmp_path):
    assert found("tiny") == found(str(PATH)) == directory_of(found("tiny")) == PATH
    with pytest.raises(CheckpointError, match="nowhere: no such directory, and no Hugging Face id"):
        found("nowhere")


def test_the_newest_that_was_asked_for(four_bits):
    """Of any format, or of the one that was asked for; of any revision, or of that one."""
    first = keep(four_bits)
    second = keep(PATH)
    third = keep(PATH, revision=OTHER)
    assert [found(), found(f"{MODEL}@{REVISION}"), found(quantization=FOUR_BITS)] == [third, second, first]
    assert directory_of(third) == third.directory and (third.directory / "tokenizer.json").is_file()
    with pytest.raises(CheckpointError, match=f"`m3dist fetch {MODEL} --mode affine --bits 3 --group-size 64` first$"):
        found(quantization=Quantization("affine", 3, 64))
    with pytest.raises(CheckpointError, match=f"`m3dist fetch {MODEL} --attention replicated` first$"):
        found(attention="replicated")


def test_a_branch_is_the_commit_that_the_hub_says(tmp_path, monkeypatch):
    with HubServer(PATH, MODEL) as hub:
        hub.join(monkeypatch, tmp_path / "home")
        keep(PATH, revision=OTHER)
        entry = keep(PATH, revision=hub.main)
        keep(PATH, revision=REVISION)
        assert found(f"{MODEL}@main") == entry
        with pytest.raises(CheckpointError, match="not that revision"):
            found(f"{MODEL}@other")


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


class Fetch:
    """In the place of `m3dist fetch`: keeps the tiny checkpoint, or nothing; remembers what it was asked for."""

    def __init__(self, brings: bool = True):
        self.brings, self.asked = brings, []

    def __call__(self, wanted: Wanted) -> None:
        self.asked.append(wanted)
        if self.brings:
            keep(PATH, revision=wanted.revision or REVISION)


def test_what_is_missing_is_fetched():
    fetch = Fetch()
    entry = found(get=fetch, ask=False)
    assert entry.manifest.revision == REVISION
    assert fetch.asked == [Wanted(MODEL, None, None, "columns", "heads", None)]
    assert found(get=fetch, ask=False) == entry and len(fetch.asked) == 1


def test_what_is_damaged_is_fetched_as_it_was():
    """Not the newest revision there is."""
    entry = keep(PATH, revision=OTHER)
    (entry.directory / "tokenizer.json").unlink()
    fetch = Fetch(brings=False)
    with pytest.raises(CheckpointError, match="tokenizer.json is missing. Run `m3dist fetch .* first, or give --fetch"):
        found(get=fetch, ask=False)
    assert fetch.asked == [Wanted(MODEL, OTHER, None, "columns", "heads", None)]


@pytest.fixture
def terminal(monkeypatch):
    """Standard input and error are one, where `typed` was typed; its screen is read from the descriptor it gives."""
    opened = []

    def start(typed: str) -> int:
        ours, theirs = pty.openpty()
        opened.extend((ours, theirs))
        os.write(ours, typed.encode())
        for name, mode in (("stdin", "r"), ("stderr", "w")):
            monkeypatch.setattr(f"sys.{name}", open(theirs, mode, closefd=False))
        return ours

    yield start
    for descriptor in opened:
        os.close(descriptor)


def shown(screen: int, text: bytes) -> bool:
    """Whether it comes to be shown, before or after the echo of what was typed; else the test runs out of time."""
    seen = b""
    while text not in seen:
        seen += os.read(screen, 10000)
    return True


@pytest.mark.parametrize("typed", ["y\n", "Yes\n"])
def test_yes_at_the_terminal(typed, terminal):
    screen, fetch = terminal(typed), Fetch()
    assert isinstance(found(get=fetch), Entry)
    assert len(fetch.asked) == 1
    assert shown(screen, b"Fetch it now? [y/N] ")


@pytest.mark.parametrize("typed", ["n\n", "\n", "\x04"])
def test_anything_else_at_the_terminal(typed, terminal):
    screen, fetch = terminal(typed), Fetch()
    with pytest.raises(CheckpointError, match="lacks the slice of rank 0; 852.4 GB to fetch. .* or give --fetch"):
        found("MiniMaxAI/MiniMax-M3", get=fetch)
    assert not fetch.asked
    assert shown(screen, b"Fetch 852.4 GB now? [y/N] ")


def test_without_a_terminal_nobody_is_asked(capfd):
    fetch = Fetch()
    with pytest.raises(CheckpointError, match="or give --fetch"):
        found(get=fetch)
    assert not fetch.asked and "now?" not in capfd.readouterr().err
