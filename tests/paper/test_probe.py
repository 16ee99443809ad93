"""What a host finds out about itself, and the two ends of a measured link, on this machine."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from m3dist.cluster.handshake import DIGEST, NONCE, is_admitted
from m3dist.doctor import link, probe
from m3dist.doctor.report import HostReport

SECRET = "a secret of the measurement"
DEADLINE = 20.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Less to send than on a real link."""
    monkeypatch.setattr(link, "STREAMING", 0.05)
    monkeypatch.setattr(link, "PINGING", 0.05)
    monkeypatch.setattr(link, "HANDSHAKE", 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# A host about itself


@pytest.fixture(scope="module")
def report() -> dict:
    return probe.describe("tiny", {}, None, {"HF_HOME": "/models"}, ["127.0.0.1", "192.0.2.1"], os.getcwd())


def test_everything_is_plain(report):
    assert json.loads(json.dumps(report)) == report


def test_this_machine(report):
    read = HostReport(report)
    assert report["platform"] == sys.platform and report["python"]["path"] == sys.executable
    assert report["packages"]["numpy"] and len(report["about"]["m3dist build"]) == 12
    assert report["environ"]["HF_HOME"] == "/models"
    assert report["directory"] == {"path": os.getcwd(), "problem": None}
    assert report["addresses"] == {"127.0.0.1": None, "192.0.2.1": "EADDRNOTAVAIL"}
    assert "ring" in read.mlx["backends"] and read.mlx["version"] == report["packages"]["mlx"]
    assert 0 < read.available <= read.memory
    assert read.interface_of("127.0.0.1").kind == "loopback"


def test_it_imports_no_mlx():
    program = "import sys, m3dist.doctor.probe; print('mlx' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_a_directory_that_is_missing():
    directory = probe.describe(None, {}, "/no/such", {}, [], os.getcwd())["directory"]
    assert "cwd /no/such is no directory here" in directory["problem"]


@pytest.mark.mpi
def test_mlx_is_asked_with_the_hostfile_s_variables():
    """Which may name the MPI library; else it is the one that a rank would take."""
    named = probe.describe(None, {}, None, {"MLX_MPI_LIBNAME": "/nowhere/libmpi.so"}, [], os.getcwd())
    assert HostReport(named).mlx["backends"] == ["ring"]
    found = probe.describe(None, {}, None, {}, [], os.getcwd())
    assert HostReport(found).mlx["backends"] == ["ring", "mpi"]


def test_commands_that_say_nothing(monkeypatch):
    monkeypatch.setattr(probe, "LIMIT", 0.2)
    assert probe.run(["no-such-command"]) == {"status": 127, "out": "", "error": "not found"}
    assert probe.run([sys.executable, "-c", "import time; time.sleep(60)"])["status"] == 124
    assert not probe._running


def test_a_command_s_words_are_text_whatever_they_are():
    program = r"import os, sys; os.write(1, b'\xff!'); sys.stderr.write('no'); sys.exit(3)"
    said = probe.run([sys.executable, "-c", program])
    assert said == {"status": 3, "out": "\ufffd!", "error": "no"}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_model_in_a_directory(tmp_path):
    (tmp_path / "m3").mkdir()
    for number in (1, 2):
        (tmp_path / "m3" / f"model-{number}.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "m3" / "._model-1.safetensors").write_bytes(b"x")
    found = probe.find_model("m3", str(tmp_path), {})
    assert (found["path"], found["bytes"]) == (str(tmp_path / "m3"), 2000) and found["free"] > 0
    missing = probe.find_model("other/m3/there", str(tmp_path), {})
    assert (missing["path"], missing["bytes"]) == (str(tmp_path / "other/m3/there"), 0) and missing["free"] > 0


def test_a_model_of_the_hub(tmp_path):
    cache = tmp_path / "hub" / "models--MiniMaxAI--MiniMax-M3"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "blob").write_bytes(b"x" * 500)
    os.symlink(cache / "blob", cache / "snapshots" / "abc" / "model.safetensors")
    os.symlink(cache / "nowhere", cache / "snapshots" / "abc" / "partly.safetensors")
    found = probe.find_model("MiniMaxAI/MiniMax-M3", "/", {"HF_HOME": str(tmp_path)})
    assert (found["path"], found["bytes"]) == (str(cache / "snapshots" / "abc"), 500)
    assert found["hub"]
    for revision in ("main", "f" * 40):
        at = probe.find_model(f"MiniMaxAI/MiniMax-M3@{revision}", "/", {"HF_HOME": str(tmp_path)})
        assert Path(at["path"]).name == ("abc" if revision == "main" else revision)
    other = probe.find_model("MiniMaxAI/other", "/", {"HF_HOME": str(tmp_path)})
    assert (other["path"], other["bytes"]) == (str(tmp_path / "hub" / "models--MiniMaxAI--other"), 0)


def test_what_the_store_keeps(tmp_path):
    """Asked in the environment of the host's ranks, which names the store."""
    environ = {"M3DIST_STORE": str(tmp_path / "store"), "HF_HOME": str(tmp_path)}
    report = HostReport(probe.describe("owner/name", {"world": 2}, None, environ, [], os.getcwd()))
    assert report.store["root"] == str(tmp_path / "store") and report.store["free"] > 0
    assert report.store["entries"] == [] and report.raw["model"]["hub"]
    (tmp_path / "store").write_text("no directory")
    assert "store" not in probe.describe("tiny", {"world": 2}, None, environ, [], os.getcwd())["outputs"]


def test_the_model_in_the_package_needs_nothing():
    nothing = {"path": None, "hub": False, "bytes": 0, "free": 0, "problem": None}
    assert probe.find_model("tiny", "/", {}) == nothing


def test_a_model_where_one_cannot_look(tmp_path):
    """Whoever may do everything here can still not look into a name too long."""
    long = str(tmp_path / ("x" * 300))
    found = probe.find_model(long, "/", {})
    assert (found["path"], found["bytes"], found["problem"]) == (long, 0, f"{long}: File name too long")
    assert probe.find_model(str(tmp_path), "/", {})["problem"] is None
    assert probe.find_model(str(tmp_path / "missing"), "/", {})["problem"] is None
    assert probe.find_model(__file__, "/", {})["problem"] is None


@pytest.mark.parametrize(
    "environ, cache",
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
    ],
)
def test_where_the_hub_keeps_its_files(environ, cache):
    assert probe.hub_cache(environ) == Path(cache).expanduser()


def test_interfaces_of_linux(tmp_path):
    for name, files in {"eth0": {"speed": "10000"}, "lo": {}, "wlan0": {"speed": "-1", "wireless": ""}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    assert probe.network(tmp_path) == {
        "eth0": {"speed": 10000, "wifi": False},
        "lo": {"speed": None, "wifi": False},
        "wlan0": {"speed": None, "wifi": True},
    }


# ---------------------------------------------------------------------------------------------------------------------
# A link


class Listener(threading.Thread):
    """link.listen, and what it found."""

    def __init__(self, seconds: float = 5.0):
        super().__init__(daemon=True)
        self.seconds, self.opened, self.result = seconds, threading.Event(), None
        self.start()
        assert self.opened.wait(DEADLINE)

    def run(self):
        self.result = link.listen("127.0.0.1", SECRET, self.seconds, self._listening)

    def _listening(self, port: int) -> None:
        self.port = port
        self.opened.set()

    def found(self) -> dict:
        self.join(DEADLINE)
        return self.result


def test_a_link_is_measured():
    listener = Listener()
    near = link.connect("127.0.0.1", listener.port, SECRET, 5.0)
    far = listener.found()
    assert 0 < near["fastest"] <= near["round_trip"] < 1.0
    assert far["bandwidth"] > 1e6


def test_strangers_get_nothing_and_disturb_nothing():
    """One who says nothing, one who sends garbage, one who knows another secret; then the one who was meant."""
    listener = Listener()
    silent = socket.create_connection(("127.0.0.1", listener.port), timeout=DEADLINE)
    garbage = socket.create_connection(("127.0.0.1", listener.port), timeout=DEADLINE)
    garbage.sendall(b"GET / HTTP/1.1\r\n" * 100)
    with silent, garbage:
        assert link.connect("127.0.0.1", listener.port, "another secret", 5.0) == {
            "failed": "the connection was closed"
        }
        assert "round_trip" in link.connect("127.0.0.1", listener.port, SECRET, 5.0)
        assert listener.found()["bandwidth"] > 0
        assert len(silent.recv(1000)) == NONCE  # a random number, and then the end
        assert silent.recv(1000) == b""


def test_another_program_is_recognised():
    """A listener that does not know the secret is not the one that was meant."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(bytes(NONCE + DIGEST))
                peer.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        found = link.connect("127.0.0.1", server.getsockname()[1], SECRET, 5.0)
    assert found == {"failed": "another program answers at this address"}


def test_nobody_listens():
    listener = Listener(seconds=0.1)
    assert listener.found() == {"failed": "ETIMEDOUT"}
    assert link.connect("127.0.0.1", listener.port, SECRET, 1.0) == {"failed": "ECONNREFUSED"}


def test_an_address_that_is_not_ours():
    assert link.listen("192.0.2.1", SECRET, 1.0, lambda port: None) == {"failed": "EADDRNOTAVAIL"}


def test_a_peer_that_stops_answering():
    """It is admitted, and then says no more: both ends give up in time."""
    listener = Listener(seconds=1.0)
    with socket.create_connection(("127.0.0.1", listener.port), timeout=DEADLINE) as peer:
        assert is_admitted(peer, SECRET, DEADLINE)
        began = time.monotonic()
        assert listener.found() == {"failed": "ETIMEDOUT"}
        assert time.monotonic() - began < 5.0
