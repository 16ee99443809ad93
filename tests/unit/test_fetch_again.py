"""`m3dist fetch` where the store holds what an older m3dist, or somebody's editor, left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m3dist.fetch import store


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """m3dist fetch of the embedded checkpoint with some flags, into an own store -> what it says."""
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path))

    def run(*flags: str) -> str:
        command = [sys.executable, "-m", "m3dist", "fetch", "tiny", *flags]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run


def manifest() -> Path:
    [entry] = store.entries()
    return entry.directory / "manifest.json"


def test_an_entry_of_another_plan_is_no_obstacle(fetch):
    """An m3dist that cut otherwise made it: its files are not what their names say here."""
    fetch()
    content = json.loads(manifest().read_text())
    manifest().write_text(json.dumps(content | {"plan": "0" * 64}))
    fetch("--world", "2", "--rank", "0")
    assert "manifest.json" in fetch()
    assert [store.verify(entry) for entry in store.entries()] == [[], []]


def test_a_manifest_that_cannot_be_read_is_named(fetch):
    fetch()
    manifest().write_text("{")
    assert "manifest.json" in fetch()
    assert [store.verify(entry) for entry in store.entries()] == [[]]
