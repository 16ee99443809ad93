"""A hub's repository, through the real huggingface_hub client, from a server on this machine that also does wrong."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from email.utils import formatdate
from pathlib import Path

import checkpoints
import hub_server
import pytest
from hub_server import Fault, HubServer

from m3dist.checkpoint import CONFIG, INDEX, open_checkpoint, open_files
from m3dist.errors import CheckpointError
from m3dist.fetch import hub as hub_module
from m3dist.fetch.hub import Hub, Limits, RemoteFile, Repository, describe

MODEL = checkpoints.tiny_config(num_hidden_layers=2)
TENSORS = checkpoints.random_tensors(MODEL)
SHARD = "model-00001-of-00002.safetensors"
QUICK = Limits(attempts=3, patience=5, timeout=0.3, first_wait=0.01)
PATIENT = Limits(attempts=6, patience=10, timeout=0.5, first_wait=0.01)  # also while this machine is busy


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = checkpoints.published(tmp_path_factory.mktemp("hub") / "model", MODEL, TENSORS, shards=2)
    (path / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (path / "figures").mkdir()
    (path / "figures" / "a.png").write_bytes(b"picture")
    return path


@pytest.fixture
def serve(directory, tmp_path, monkeypatch):
    """Starts a hub, and lets this process's huggingface_hub talk to it."""
    started = []

    def start(path=directory, **options) -> HubServer:
        started.append(HubServer(path, **options))
        started[-1].join(monkeypatch, tmp_path / "home")
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def server(serve):
    return serve()


def read(hub: Hub, name: str, start: int = 0, stop: int | None = None) -> bytes:
    data = bytearray((hub.sizes()[name] if stop is None else stop) - start)
    hub.read(name, start, memoryview(data))
    return bytes(data)


def file_sizes(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}


# ---------------------------------------------------------------------------------------------------------------------
# What a repository holds


def test_description(server, directory):
    found = describe("owner/name")
    assert (found.repo, found.commit) == ("owner/name", server.main)
    assert {name: file.size for name, file in found.files.items()} == file_sizes(directory)
    assert {len(file.etag) for name, file in found.files.items() if name.endswith(".safetensors")} == {64}
    assert Repository.from_json(found.to_json()) == found
    assert describe("owner/name", "main") == describe("owner/name", found.commit) == found


def test_a_commit_stays_what_it_was(server, directory, tmp_path):
    old = describe("owner/name")
    other = checkpoints.published(tmp_path / "other", MODEL, checkpoints.random_tensors(MODEL, seed=1))
    server.publish(other)
    new = describe("owner/name")
    assert new.commit != old.commit and new.files.keys() == file_sizes(other).keys()
    assert read(Hub(old), SHARD) == (directory / SHARD).read_bytes()
    assert read(Hub(new), "model.safetensors") == (other / "model.safetensors").read_bytes()


def test_no_such_repository_and_no_such_revision(server):
    with pytest.raises(
        CheckpointError, match="^owner/other is no directory here and not on Hugging Face; if it is pri"
    ):
        describe("owner/other")
    with pytest.raises(CheckpointError, match="^owner/name@v9 is on Hugging Face, but not that revision of it"):
        describe("owner/name", "v9")
    with pytest.raises(CheckpointError, match="^owner/na--me: no listing: HFValidationError"):
        describe("owner/na--me")


HOSTILE_NAMES = ["../x", "/etc/x", "a/../../x", "..", "", "./config.json", "a//b", "..\\x", "a\nb", "\x1b[2J", "\0"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_lead_elsewhere(server, tmp_path, name):
    server.listed = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="owner/name lists a file .*, which could lead elsewhere; it is refused"):
        describe("owner/name")
    assert sorted(tmp_path.rglob("*")) == before and server.stats()["sent"] == 0


@pytest.mark.parametrize(
    "listed, message",
    [
        ({"rfilename": CONFIG, "size": 5}, "lists config.json twice"),
        ({"rfilename": "a", "size": None}, "a: the hub says its size is None"),
        ({"rfilename": "a", "size": -1}, "a: the hub says its size is -1"),
        ({"rfilename": "a", "size": "5"}, "a: the hub says its size is '5'"),
        ({"rfilename": "a", "size": 10**30}, "a: the hub says its size is 1000"),
        ({"rfilename": 5, "size": 1}, "lists a file 5"),
        ({"size": 1}, "no listing: KeyError"),
        (5, "no listing: TypeError"),
    ],
)
def test_listings_that_are_none(server, listed, message):
    server.listed = [listed]
    with pytest.raises(CheckpointError, match=f"^owner/name:? .*{message}|^owner/name: {message}"):
        describe("owner/name")


def test_a_commit_that_is_none(server):
    server.commits["../../x"] = server.commits[server.main]
    server.main = "../../x"
    with pytest.raises(CheckpointError, match="the hub says its commit is '../../x', which is none"):
        describe("owner/name")


def test_a_listing_that_is_late(server):
    server.faults = [Fault("status", at="listing", count=2)]
    assert describe("owner/name", limits=QUICK).commit == server.main
    assert server.stats()["requests"]["listing"] == 3
    server.faults = [Fault("status", at="listing")]
    with pytest.raises(CheckpointError, match="^owner/name could not be fetched from Hugging Face: .*503"):
        describe("owner/name", limits=QUICK)
    server.faults = [Fault("silent", at="listing")]
    with pytest.raises(CheckpointError, match="Hugging Face cannot be reached .*ReadTimeout"):
        describe("owner/name", limits=QUICK)


# ---------------------------------------------------------------------------------------------------------------------
# Its bytes


def test_every_byte_once(server, directory):
    """A checkpoint opened, and the rest of its bytes read in ranges by eight threads."""
    with Hub(describe("owner/name")) as hub:
        checkpoint = open_files(hub)
        local = open_checkpoint(directory)
        assert {n: (t.shape, t.dtype, t.offset, t.nbytes) for n, t in checkpoint.stored.items()} == {
            n: (t.shape, t.dtype, t.offset, t.nbytes) for n, t in local.stored.items()
        }
        assert checkpoint.directory == hub.root == Path(f"owner/name@{server.main[:12]}")
        opened = server.stats()
        files = {name: (directory / name).read_bytes() for name in {t.file.name for t in local.stored.values()}}
        starts = {name: min(t.offset for t in local.stored.values() if t.file.name == name) for name in files}
        assert opened["files"] == {n: (directory / n).stat().st_size for n in (CONFIG, INDEX)} | starts
        ranges = [
            (n, at, min(at + 50_000, len(files[n]))) for n in files for at in range(starts[n], len(files[n]), 50_000)
        ]
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda part: read(hub, *part), ranges))
        assert all(part == files[name][start:stop] for part, (name, start, stop) in zip(parts, ranges, strict=True))
    stats = server.stats()
    assert stats["sent"] == hub.received == sum(file_sizes(directory).values()) and stats["twice"] == 0
    assert stats["requests"] == {"listing": 1, "resolve": 4 + 2, "body": 2 + 4 + len(ranges)}


def test_small_files(server, directory):
    hub = Hub(describe("owner/name"))
    assert hub.download(CONFIG) == (directory / CONFIG).read_bytes()
    assert read(hub, CONFIG, 5, 9) == (directory / CONFIG).read_bytes()[5:9]
    assert hub.received == server.stats()["sent"] == (directory / CONFIG).stat().st_size + 4


def test_an_empty_file(serve, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "empty.txt").touch()
    serve(tmp_path / "files")
    assert Hub(describe("owner/name")).download("empty.txt") == b""


def test_what_is_not_there(server):
    hub = Hub(describe("owner/name"))
    size = hub.sizes()[SHARD]
    for name in ("none.json", "../x", ".gitattributes"):
        with pytest.raises(CheckpointError, match=rf"owner/name@\w+/.*{name}: the repository lists no such file"):
            hub.read(name, 0, memoryview(bytearray(1)))
    for start, stop in ((size - 1, size + 1), (-1, 1)):
        with pytest.raises(CheckpointError, match=f"{SHARD}: bytes {start}-{stop - 1}: it has {size} bytes"):
            read(hub, SHARD, start, stop)
    assert server.stats()["sent"] == 0


def test_a_private_repository(serve, directory, monkeypatch):
    server = serve(token="hf_secret")
    found = describe("owner/name")
    assert read(Hub(found), SHARD, 10, 20) == (directory / SHARD).read_bytes()[10:20]
    assert Hub(found).download(CONFIG) == (directory / CONFIG).read_bytes()
    assert server.stats()["tokens_at_storage"] == 0
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="^owner/name is no directory .* if it is private, `hf auth login` first"):
        describe("owner/name")
    with pytest.raises(CheckpointError, match="^owner/name is no directory .* if it is private, `hf auth login` first"):
        read(Hub(found), SHARD, 0, 5)


def test_a_small_file_elsewhere_is_asked_for_without_the_token(serve, directory):
    server = serve(token="hf_secret")
    server.faults = [Fault("location", CONFIG, "resolve", value=server.sign(server.main, CONFIG))]
    assert Hub(describe("owner/name")).download(CONFIG) == (directory / CONFIG).read_bytes()
    assert server.stats()["tokens_at_storage"] == 0


def test_a_gated_repository(serve):
    server = serve(gated=True)
    with pytest.raises(CheckpointError, match="^owner/name is gated: accept its terms on huggingface.co"):
        read(Hub(describe("owner/name")), SHARD)
    assert server.stats()["sent"] == 0 and server.stats()["requests"]["resolve"] == 1


def test_a_redirect_is_asked_for_once_and_again_after_a_time(server, monkeypatch):
    hub = Hub(describe("owner/name"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: read(hub, SHARD, i, i + 1), range(16)))
    assert server.stats()["requests"]["resolve"] == 1
    monkeypatch.setattr(hub_module, "LOCATION_SECONDS", -1.0)
    hub = Hub(hub.repository)
    for i in range(3):
        read(hub, SHARD, i, i + 1)
    assert server.stats()["requests"]["resolve"] == 1 + 3


# ---------------------------------------------------------------------------------------------------------------------
# The hub's cache, and no network


def test_files_in_the_cache_are_not_fetched(server, directory):
    from huggingface_hub import hf_hub_download

    cached = [Path(hf_hub_download("owner/name", name)) for name in (CONFIG, SHARD)]
    server.reset()
    with Hub(describe("owner/name")) as hub:
        assert hub.cached(SHARD) == cached[1] and hub.cached(INDEX) is None
        assert read(hub, SHARD) == (directory / SHARD).read_bytes()
        assert open_files(hub).stored.keys() == open_checkpoint(directory).stored.keys()
    assert server.stats()["files"].keys() == {INDEX, "model-00002-of-00002.safetensors"}
    assert hub.received == server.stats()["sent"]


def test_a_file_cut_short_in_the_cache_is_fetched(server, directory):
    from huggingface_hub import hf_hub_download

    os.truncate(os.path.realpath(hf_hub_download("owner/name", SHARD)), 1000)
    hub = Hub(describe("owner/name"))
    assert hub.cached(SHARD) is None and read(hub, SHARD) == (directory / SHARD).read_bytes()


@pytest.mark.parametrize("how", ["switched off", "unreachable", "down"])
def test_without_a_network(serve, directory, monkeypatch, how):
    from huggingface_hub import constants, snapshot_download

    server = serve()
    snapshot_download("owner/name")
    online = describe("owner/name")
    if how == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "unreachable":
        server.close()
    else:
        server.faults = [Fault("status", at=place) for place in ("listing", "resolve", "body")]
    server.reset()
    found = describe("owner/name", limits=QUICK)
    assert found == online == describe("owner/name", online.commit, limits=QUICK)
    with Hub(found, QUICK) as hub:
        assert open_files(hub).stored.keys() == open_checkpoint(directory).stored.keys()
        assert read(hub, SHARD) == (directory / SHARD).read_bytes()
    assert hub.received == server.stats()["sent"] == 0


@pytest.mark.parametrize("how", ["switched off", "unreachable"])
def test_without_a_network_and_a_cache(server, monkeypatch, how):
    from huggingface_hub import constants

    if how == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        server.close()
    with pytest.raises(
        CheckpointError, match="^owner/name is no directory here and not in the local cache, and Hugging Face cannot"
    ):
        describe("owner/name", limits=QUICK)


def test_offline_with_half_of_it(server, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    online = describe("owner/name")
    for name in (CONFIG, INDEX, SHARD):
        hf_hub_download("owner/name", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Hub(describe("owner/name")) as hub, pytest.raises(CheckpointError, match="1 of its 2 files are missing"):
        open_files(hub)
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: bytes 0-7: .*unset the `HF_HUB_OFFLINE`"):
        open_files(Hub(online))


# ---------------------------------------------------------------------------------------------------------------------
# Faults that pass

PASSING = {
    "500": Fault("status", value=500, count=2),
    "503": Fault("status", value=503, count=2),
    "429": Fault("status", value=429, count=2),
    "503 at the redirect": Fault("status", at="resolve", value=503, count=2),
    "silent": Fault("silent", count=1),
    "silent at the redirect": Fault("silent", at="resolve", count=1),
    "cut": Fault("cut", value=1000, count=2),
    "cut at once": Fault("cut", value=0, count=2),
    "reset": Fault("reset", value=1000, count=2),
    "stall": Fault("stall", value=1000, count=1),
    "expired": Fault("expired", count=2),
    "slow": Fault("slow", value=100_000, count=1),
}


@pytest.mark.parametrize("case", PASSING)
def test_faults_that_pass(server, directory, case):
    """The bytes are right, and none was sent twice."""
    fault = Fault(**asdict(PASSING[case]))
    server.faults = [fault]
    hub, wanted = Hub(describe("owner/name"), PATIENT), (directory / SHARD).read_bytes()[100:30_100]
    started = time.monotonic()
    assert read(hub, SHARD, 100, 30_100) == wanted
    assert time.monotonic() - started < 5
    stats = server.stats()
    assert fault.seen >= fault.count + (case != "slow")
    assert (stats["sent"], stats["twice"], hub.received) == (30_000, 0, 30_000)


def test_a_body_that_breaks_again_and_again(server, directory):
    """Attempts count only while no byte comes; each goes on where the last one ended."""
    server.faults = [Fault("cut", value=1000)]
    assert read(Hub(describe("owner/name"), PATIENT), SHARD, 0, 20_000) == (directory / SHARD).read_bytes()[:20_000]
    assert [r["start"] for r in server.stats()["ranges"]] == list(range(0, 20_000, 1000))


def test_eight_threads_in_bad_weather(server, directory):
    server.faults = [
        Fault("cut", first=3, count=4, value=777),
        Fault("status", first=10, count=5, retry_after=0),
        Fault("expired", first=20, count=3),
        Fault("reset", first=30, count=3, value=500),
        Fault("stall", first=40, count=2, value=900),
        Fault("status", at="resolve", first=1, count=2),
    ]
    hub, content = Hub(describe("owner/name"), PATIENT), {}
    ranges = [(name, at, min(at + 10_000, size)) for name, size in hub.sizes().items() for at in range(0, size, 10_000)]
    assert len(ranges) > 40
    with ThreadPoolExecutor(8) as pool:
        for (name, *_), part in zip(ranges, pool.map(lambda each: read(hub, *each), ranges), strict=True):
            content[name] = content.get(name, b"") + part
    assert content == {name: (directory / name).read_bytes() for name in content}
    stats = server.stats()
    assert (stats["sent"], stats["twice"]) == (hub.received, 0) and hub.received == sum(hub.sizes().values())
    assert all(fault.seen >= fault.first + fault.count for fault in server.faults)


def test_a_small_file_that_breaks(server, directory):
    server.faults = [Fault("cut", CONFIG, value=1000, count=1)]
    hub = Hub(describe("owner/name"), PATIENT)
    assert hub.download(CONFIG) == (directory / CONFIG).read_bytes()
    assert server.stats()["sent"] == hub.received == hub.sizes()[CONFIG]


def test_retry_after(server, directory):
    server.faults = [Fault("status", value=429, count=1, retry_after=1)]
    hub, started = Hub(describe("owner/name"), PATIENT), time.monotonic()
    assert read(hub, SHARD, 0, 10) == (directory / SHARD).read_bytes()[:10]
    assert time.monotonic() - started >= 1


def test_how_servers_ask_to_wait():
    """In seconds, until a date, or, as huggingface.co, by their rate limit."""
    assert hub_module._wait_asked({"retry-after": "120"}) == 120
    assert 98 < hub_module._wait_asked({"retry-after": formatdate(time.time() + 100, usegmt=True)}) <= 100
    assert hub_module._wait_asked({"retry-after": formatdate(0, usegmt=True)}) == 0
    assert hub_module._wait_asked({"retry-after": "soon"}) is None
    assert hub_module._wait_asked({"ratelimit": '"resolvers";r=0;t=55'}) == 55
    assert hub_module._wait_asked({"ratelimit": '"resolvers";r=12;t=55'}) is None


# ---------------------------------------------------------------------------------------------------------------------
# Faults that do not

REFUSED = {
    "another range": (
        Fault("range"),
        r"bytes 10-19: the answer's Content-Range is 'bytes 11-20/\d+', not 'bytes 10-19/",
    ),
    "another size": (Fault("size"), "bytes 10-19: the answer's Content-Range is .*has the file changed"),
    "another length": (Fault("length", value=5), "bytes 10-19: the answer's Content-Length is '15', not '10'"),
    "the whole file": (Fault("whole"), "bytes 10-19: the answer's status is '200', not '206'"),
    "a status": (Fault("status", value=418), "bytes 10-19: the answer's status is '418', not '206'"),
    "redirects without end": (Fault("loop"), "bytes 10-19: TooManyRedirects"),
    "another etag listed": (Fault("etag", at="resolve"), "has changed: etag 'another', where [0-9a-f]{64} was listed"),
    "another size listed": (Fault("size", at="resolve"), r"has changed: '\d+' bytes, where \d+ were listed"),
    "another commit": (Fault("commit", at="resolve"), "the hub answers with another commit, '0000"),
    "resolves without end": (Fault("loop", at="resolve"), "the hub redirects 10 times and more"),
    "a local file": (Fault("location", at="resolve", value="file:///etc/passwd"), "redirects to 'file:///etc/passwd'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(server, case):
    fault, message = REFUSED[case]
    server.faults = [Fault(**asdict(fault))]
    with pytest.raises(CheckpointError, match=rf"^owner/name@\w+/{SHARD}:? {message}|{message}"):
        read(Hub(describe("owner/name"), QUICK), SHARD, 10, 20)
    assert server.stats()["requests"].get("body", 0) <= 21  # of redirects without end


def test_a_redirect_to_plain_http(server, monkeypatch):
    """From an endpoint that is https."""
    from huggingface_hub import constants

    hub = Hub(describe("owner/name"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=f"{SHARD}: the hub redirects to 'http://.*, which is not https"):
        read(hub, SHARD, 0, 1)


def test_a_file_that_changes_between_requests(server):
    hub = Hub(describe("owner/name"), QUICK)
    read(hub, SHARD, 0, 10)
    server.faults = [Fault("etag")]
    with pytest.raises(
        CheckpointError, match=f"{SHARD} has changed while it was read: etag '\"another\"', at first '\""
    ):
        read(hub, SHARD, 10, 20)


def test_a_file_that_becomes_shorter(serve, tmp_path):
    path = checkpoints.published(tmp_path / "model", MODEL, TENSORS)
    server = serve(path)
    hub = Hub(describe("owner/name"), QUICK)
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="model.safetensors: bytes 1000-1499: .*gave up after 3 tries"):
        read(hub, "model.safetensors", 500, 1500)
    server.publish(path)
    with pytest.raises(CheckpointError, match="model.safetensors"):  # the commit it is of is still asked for
        read(hub, "model.safetensors", 1100, 1500)


FAILING = {
    "503": (Fault("status"), "HTTP 503; gave up after 3 tries, try again later"),
    "expired": (Fault("expired"), "HTTP 403; gave up after 3 tries"),
    "silent": (Fault("silent"), "ReadTimeout: .*; gave up after 3 tries"),
    "cut": (Fault("cut", value=0), "RemoteProtocolError: .*; gave up after 3 tries"),
    "503 at the redirect": (Fault("status", at="resolve"), "HfHubHTTPError: .*503.*; gave up after 3 tries"),
    "silent at the redirect": (Fault("silent", at="resolve"), "ReadTimeout: .*; gave up after 3 tries"),
    "busy for an hour": (
        Fault("status", retry_after=3600),
        "HTTP 503; the next try is due in 3600 s, which is too long",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_faults_that_stay(server, case):
    fault, message = FAILING[case]
    server.faults = [Fault(**asdict(fault))]
    hub, started = Hub(describe("owner/name"), QUICK), time.monotonic()
    with pytest.raises(CheckpointError, match=rf"^owner/name@\w+/{SHARD}: bytes 10-19: {message}"):
        read(hub, SHARD, 10, 20)
    assert time.monotonic() - started < 10
    assert server.faults[0].seen == (1 if case == "busy for an hour" else 3)


def test_a_hub_that_is_gone(server):
    hub = Hub(describe("owner/name"), QUICK)
    server.close()
    with pytest.raises(CheckpointError, match=f"{SHARD}: bytes 0-9: ConnectError: .*; gave up after 3 tries"):
        read(hub, SHARD, 0, 10)


def test_patience_is_with_what_brings_no_byte():
    """Tries that fail in time may go on; the sum of their waits may not."""
    tries = hub_module._Tries(Limits(attempts=100, patience=0.2, first_wait=0.05), threading.Event())
    started = time.monotonic()
    while tries.again(hub_module._Broken("again")):
        pass
    assert time.monotonic() - started < 1 and tries.failures < 10 and "too long" in tries.told


@pytest.mark.parametrize("fault", [Fault("slow", value=2000), Fault("status", retry_after=4)], ids=["slow", "busy"])
def test_stop(server, fault):
    server.faults = [fault]
    hub, failures = Hub(describe("owner/name"), QUICK), []

    def run() -> None:
        try:
            read(hub, SHARD)
        except CheckpointError as error:
            failures.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    while not fault.seen:
        time.sleep(0.01)
    time.sleep(0.2)
    stopped = time.monotonic()
    hub.stop()
    thread.join(5)
    assert time.monotonic() - stopped < 2 and SHARD in failures[0] and "reading was stopped" in failures[0]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that lie


def test_a_header_of_10_to_the_18_bytes(serve, tmp_path):
    path = checkpoints.published(tmp_path / "model", MODEL, TENSORS)
    with open(path / "model.safetensors", "r+b") as file:
        file.write((10**18).to_bytes(8, "little"))
    server = serve(path)
    with pytest.raises(CheckpointError, match="model.safetensors: says its header has 1000000000000000000 bytes"):
        open_files(Hub(describe("owner/name")))
    assert server.stats()["files"]["model.safetensors"] == 8


def test_a_listing_that_says_the_header_could_be_that_large(server):
    """A size that the listing makes up is compared with the first answer's."""
    server.listed = [{"rfilename": "config.jsonl", "size": 10**18}]
    hub = Hub(describe("owner/name"), QUICK)
    with pytest.raises(CheckpointError, match="config.jsonl: 1000000000000000000 bytes are too many"):
        hub.download("config.jsonl")
    found = describe("owner/name")
    grown = Repository(found.repo, found.commit, dict(found.files) | {SHARD: RemoteFile(10**18, "")})
    with pytest.raises(
        CheckpointError, match=rf"{SHARD} has changed: '\d+' bytes, where 1000000000000000000 were listed"
    ):
        open_files(Hub(grown, QUICK))
    assert server.stats()["files"].keys() <= {CONFIG, INDEX, "model-00002-of-00002.safetensors"}


def test_an_index_that_points_to_a_missing_file(serve, tmp_path):
    path = checkpoints.published(tmp_path / "model", MODEL, TENSORS, shards=2)
    (path / SHARD).unlink()
    server = serve(path)
    with pytest.raises(CheckpointError, match=f"{INDEX}: 1 of its 2 files are missing, {SHARD} first"):
        open_files(Hub(describe("owner/name")))
    assert server.stats()["files"].keys() == {CONFIG, INDEX}


def test_an_index_that_points_elsewhere(serve, tmp_path):
    path = checkpoints.published(tmp_path / "model", MODEL, TENSORS, shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../x.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    serve(path)
    with pytest.raises(CheckpointError, match="which is no plain .*file name"):
        open_files(Hub(describe("owner/name")))


def test_tensors_in_two_files(serve, tmp_path):
    path = checkpoints.published(tmp_path / "model", MODEL, TENSORS)
    (path / "copy.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    (path / INDEX).unlink(missing_ok=True)
    serve(path)
    with pytest.raises(CheckpointError, match=r"is in two files, owner/name@\w+/copy.safetensors and owner/name@"):
        open_files(Hub(describe("owner/name")))


# ---------------------------------------------------------------------------------------------------------------------
# Another process

READER = """
import sys
from m3dist.checkpoint import open_files
from m3dist.fetch.hub import Hub, describe
hub = Hub(describe("owner/name"))
print(len(open_files(hub).stored), hub.received)
"""


def test_by_its_environment_and_from_a_server_of_its_own(directory, tmp_path):
    """HF_ENDPOINT and HF_TOKEN as huggingface_hub reads them, and the server as a process."""
    command = [sys.executable, hub_server.__file__, "--dir", str(directory), "--token", "hf_secret"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()

        def ask(path: str, body: object = None) -> object:
            data = None if body is None else json.dumps(body).encode()
            with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=10) as answer:
                return json.load(answer)

        ask("/_faults", [asdict(Fault("cut", SHARD, value=100, count=1))])
        names = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", READER], env=os.environ | names, capture_output=True, text=True)
        stats = ask("/_stats")
        process.stdin.close()
        assert process.wait(5) == 0
    local = open_checkpoint(directory)
    headers = {t.file.name: 0 for t in local.stored.values()}
    for name in headers:
        headers[name] = min(t.offset for t in local.stored.values() if t.file.name == name)
    expected = sum(headers.values()) + sum((directory / name).stat().st_size for name in (CONFIG, INDEX))
    assert (done.stdout, done.stderr) == (f"{len(local.stored)} {expected}\n", "")
    assert (stats["sent"], stats["twice"], stats["tokens_at_storage"]) == (expected, 0, 0)
