"""A hub on this machine, to which the real huggingface_hub client talks: a directory served as a repository's files.

Two servers, as the real hub has: the endpoint (the listing, and /owner/name/resolve/REVISION/FILE), which sends small
files itself and answers 302 for large ones; and the storage it redirects to, at another port, with a signed address.
Files are sent with ranges and without a copy in between. It counts every body byte it sends, and does wrong where a
`Fault` says so.

In a test's process:

    with HubServer(directory, "owner/name") as hub:
        hub.join(monkeypatch, tmp_path)
        hub.faults.append(Fault("reset", "model-*", value=1000, count=1))
        ...
        assert hub.stats()["sent"] == 123

As a process of its own; prints the endpoint's URL, and ends when its standard input does:

    python tests/hub_server.py --dir DIRECTORY --repo owner/name --port 0 [--token T] [--gated]

    GET  URL/_stats      what HubServer.stats() gives, as JSON
    POST URL/_faults     a JSON list of Faults' fields, in place of those before
    POST URL/_listed     a JSON list of siblings to list besides the real ones
    POST URL/_publish    a directory's path: a new commit of main; answers with its id
    POST URL/_reset      counts from 0
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SMALL = 10_000_000  # bytes: larger files, and *.safetensors of any size, are in the storage (git-lfs)
PIECE = 1 << 20  # bytes a system call
ALWAYS = 1 << 60


@dataclass
class Fault:
    """Something that goes wrong with the requests that match: of them, `count` from the one numbered `first`.

    kind     at the "listing", at "resolve" (the endpoint's answer for a file) or in the "body" (the file's bytes):
      status          answers `value` (503), with Retry-After where `retry_after` is given
      silent          nothing at all is answered
      loop            redirects to itself
    kind     at "resolve":
      etag, size, commit    says so of another file
      location        redirects to `value`
    kind     in the "body":
      cut, reset      ends, or resets, the connection after `value` bytes; Content-Length says more
      stall           no more after `value` bytes
      slow            `value` bytes a second
      range           Content-Range is one byte further
      size            Content-Range says that the file has another size
      length          Content-Length, and the body, are `value` bytes longer
      whole           200 and the whole file, whatever the range
      etag            another ETag
      expired         403 from now on, until the address is signed anew
    """

    kind: str
    file: str = "*"  # a pattern
    at: str = "body"
    first: int = 0
    count: int = ALWAYS
    value: Any = None
    retry_after: Any = None
    seen: int = 0  # requests that matched


@dataclass
class Range:
    """A body, or a part of one: of `file` the bytes `start` .. `stop` were asked for and `sent` of them sent."""

    file: str
    start: int
    stop: int
    sent: int = 0


@dataclass
class Stored:
    """A file of a commit."""

    path: Path
    size: int
    sha256: str  # of a large one, else empty
    blob: str  # git's id, of a large one that of its git-lfs pointer

    @property
    def large(self) -> bool:
        return bool(self.sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


@dataclass
class Counts:
    ranges: list[Range] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)  # by "listing", "resolve", "body"
    listing: int = 0  # bytes of listings
    tokens_at_storage: int = 0  # requests that brought a token where none belongs


class HubServer:
    """Serves from when it is made until `close`, or the end of `with`."""

    def __init__(
        self,
        directory: str | os.PathLike,
        repo: str = "owner/name",
        *,
        token: str | None = None,
        gated: bool = False,
        port: int = 0,
    ) -> None:
        self.repo, self.token, self.gated = repo, token, gated
        self.faults: list[Fault] = []
        self.listed: list[dict] = []  # listed besides the real files, as they are
        self.commits: dict[str, dict[str, Stored]] = {}
        self.signatures: set[str] = set()
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.counts = Counts()
        self.main = self.publish(directory)
        self._endpoint, self._storage = Server(self, Endpoint, port), Server(self, Storage, 0)
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_port}" for s in (self._endpoint, self._storage))

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for server in (self._endpoint, self._storage):
            server.close()

    def publish(self, directory: str | os.PathLike) -> str:
        """Make a directory's files the newest commit of main; what was before is served on, under its own id."""
        files = {
            path.relative_to(directory).as_posix(): _stored(path)
            for path in sorted(Path(directory).rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(repr([(name, f.etag) for name, f in files.items()]).encode()).hexdigest()
        self.commits[commit] = files
        self.main = commit
        return commit

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """What makes huggingface_hub in another process talk to this hub, with its cache and tokens in `home`."""
        told = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return told | ({"HF_TOKEN": self.token} if self.token else {})

    def join(self, monkeypatch: Any, home: Path) -> None:
        """The same for this process; `monkeypatch` is pytest's. huggingface_hub has read the environment by now."""
        from huggingface_hub import close_session, constants

        close_session()  # its connections are to another hub
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def sign(self, commit: str, name: str) -> str:
        """An address of a file at the storage."""
        signature = secrets.token_hex(16)
        with self.lock:
            self.signatures.add(signature)
        return f"{self.storage_url}/{commit}/{name}?Expires=3600&Signature={signature}"

    def fault(self, at: str, file: str) -> Fault | None:
        """The first fault that is due for a request; every one that matches counts it."""
        with self.lock:
            found = [f for f in self.faults if f.at == at and fnmatchcase(file, f.file)]
            due = [f for f in found if f.first <= f.seen < f.first + f.count]
            for each in found:
                each.seen += 1
            return due[0] if due else None

    def stats(self) -> dict[str, Any]:
        """Body bytes sent: in all, of each file, of each request, and how many of them more than once."""
        with self.lock:
            ranges = [Range(**asdict(r)) for r in self.counts.ranges]
            requests, listing = dict(self.counts.requests), self.counts.listing
            tokens_at_storage = self.counts.tokens_at_storage
        files: Counter[str] = Counter()
        for each in ranges:
            files[each.file] += each.sent
        return {
            "sent": sum(files.values()),
            "twice": sum(files.values()) - sum(_covered(ranges, file) for file in files),
            "files": dict(files),
            "ranges": [asdict(r) for r in ranges],
            "requests": requests,
            "listing": listing,
            "tokens_at_storage": tokens_at_storage,
        }

    def reset(self) -> None:
        with self.lock:
            self.counts = Counts()


class Server(ThreadingHTTPServer):
    """One port, served by a thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, handler: type["Answering"], port: int) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), functools.partial(handler, hub))
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is none of ours
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Take no more connections, and end those that are open."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _covered(ranges: Iterable[Range], file: str) -> int:
    """How many different bytes of a file were sent."""
    covered = end = 0
    for start, stop in sorted((r.start, r.start + r.sent) for r in ranges if r.file == file):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _stored(path: Path) -> Stored:
    size = path.stat().st_size
    if size <= SMALL and path.suffix != ".safetensors":
        return Stored(path, size, "", _git_id(path.read_bytes()))
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            sha256.update(piece)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n"
    return Stored(path, size, sha256.hexdigest(), _git_id(pointer.encode()))


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Answering(BaseHTTPRequestHandler):
    """What both servers do: send a file or a part of it, and go wrong."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None: ...

    def count(self, what: str) -> None:
        with self.hub.lock:
            self.hub.counts.requests[what] += 1

    def answer(self, status: int, headers: dict[str, Any], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fails(self, fault: Fault | None) -> bool:
        """Do what the faults of any place do; whether that was all."""
        if fault and fault.kind == "status":
            headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self.answer(int(fault.value or 503), headers)
        elif fault and fault.kind == "silent":
            self.hub.closing.wait()
            self.close_connection = True
        elif fault and fault.kind == "loop":
            self.answer(302, {"Location": self.path})
        else:
            return False
        return True

    def send_file(self, name: str, stored: Stored, headers: dict[str, Any], fault: Fault | None) -> None:
        """Answer a GET with a file's bytes, all or those of its Range header."""
        self.count("body")
        if self.fails(fault):
            return
        kind = fault.kind if fault else ""
        status, start, stop = 200, 0, stored.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and kind != "whole":
            status, start, stop = 206, int(asked[1]), min(int(asked[2] or stored.size - 1) + 1, stored.size)
            if start >= stop:
                self.answer(416, {"Content-Range": f"bytes */{stored.size}"})
                return
            shift, total = int(kind == "range"), stored.size + int(kind == "size")
            headers |= {"Content-Range": f"bytes {start + shift}-{stop - 1 + shift}/{total}"}
        extra = fault.value if fault and kind == "length" else 0
        etag = "another" if kind == "etag" else stored.etag
        headers |= {"Accept-Ranges": "bytes", "ETag": f'"{etag}"', "Content-Length": stop - start + extra}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.send_body(name, stored, Range(name, start, stop), fault)
        if extra:
            self.wfile.write(bytes(extra))

    def send_body(self, name: str, stored: Stored, part: Range, fault: Fault | None) -> None:
        with self.hub.lock:
            self.hub.counts.ranges.append(part)
        kind = fault.kind if fault else ""
        left = part.stop - part.start
        if fault and kind in ("cut", "reset", "stall"):
            left = min(left, int(fault.value or 0))
        pace = float(fault.value) if fault and kind == "slow" else None
        piece = max(1, int(pace / 20)) if pace else PIECE
        with open(stored.path, "rb") as file:
            while left:
                sent = self.send_piece(file.fileno(), part, min(piece, left))
                if not sent:
                    break  # the file is shorter now
                left -= sent
                if pace and self.hub.closing.wait(sent / pace):
                    break
        if kind == "stall":
            self.hub.closing.wait()
        if kind == "reset":
            time.sleep(0.05)  # what was sent arrives; a reset would overtake it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        if kind in ("cut", "reset", "stall") or left:
            self.close_connection = True

    def send_piece(self, file: int, part: Range, size: int) -> int:
        """Send at most `size` bytes. Counts them before: who has got them may ask at once how many were sent."""
        at, sent = part.start + part.sent, 0
        with self.hub.lock:
            part.sent += size
        try:
            sent = os.sendfile(self.connection.fileno(), file, at, size)
        finally:
            with self.hub.lock:
                part.sent -= size - sent
        return sent


class Endpoint(Answering):
    """The hub itself: listings, redirects, small files."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/_stats":
            self.answer_json(self.hub.stats())
        elif match := re.fullmatch(rf"/api/models/{re.escape(self.hub.repo)}(?:/revision/([^/]+))?", path):
            self.listing(match[1] or "main", self.describe)
        elif match := re.fullmatch(rf"/api/models/{re.escape(self.hub.repo)}/tree/([^/]+)", path):
            self.listing(match[1], self.tree)
        elif match := re.fullmatch(rf"/{re.escape(self.hub.repo)}/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[2])
        else:  # as the real one, which does not say whether there is such a repository
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/_faults":
            self.hub.faults = [Fault(**fault) for fault in json.loads(body)]
        elif self.path == "/_listed":
            self.hub.listed = json.loads(body)
        elif self.path == "/_reset":
            self.hub.reset()
        self.answer_json(self.hub.publish(body.decode()) if self.path == "/_publish" else None)

    def answer_json(self, value: Any) -> int:
        body = json.dumps(value).encode()
        self.answer(200, {"Content-Type": "application/json"}, body)
        return len(body)

    def allowed(self) -> bool:
        if self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        return False

    def commit_of(self, revision: str) -> str | None:
        commit = self.hub.main if revision == "main" else revision
        if commit in self.hub.commits:
            return commit
        self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        return None

    def listing(self, revision: str, make: Callable[[str], Any]) -> None:
        self.count("listing")
        if self.fails(self.hub.fault("listing", "")) or not self.allowed():
            return
        if commit := self.commit_of(revision):
            sent = self.answer_json(make(commit))
            with self.hub.lock:
                self.hub.counts.listing += sent

    def describe(self, commit: str) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": f.size, "blobId": f.blob}
            | ({"lfs": {"sha256": f.sha256, "size": f.size, "pointerSize": 134}} if f.large else {})
            for name, f in self.hub.commits[commit].items()
        ]
        known = {"id": self.hub.repo, "modelId": self.hub.repo, "sha": commit, "private": self.hub.token is not None}
        return known | {
            "gated": "manual" if self.hub.gated else False,
            "tags": [],
            "siblings": siblings + self.hub.listed,
        }

    def tree(self, commit: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": f.size, "oid": f.blob}
            | ({"lfs": {"oid": f.sha256, "size": f.size, "pointerSize": 134}} if f.large else {})
            for name, f in self.hub.commits[commit].items()
        ]

    def resolve(self, revision: str, name: str) -> None:
        """Where a file is: a redirect to the storage, or the file itself."""
        self.count("resolve")
        fault = self.hub.fault("resolve", name)
        if self.fails(fault) or not self.allowed():
            return
        if self.hub.gated:
            self.answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})
            return
        commit = self.commit_of(revision)
        if commit is None:
            return
        stored = self.hub.commits[commit].get(name)
        if stored is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        kind = fault.kind if fault else ""
        etag = "another" if kind == "etag" else stored.etag
        size = stored.size + 1 if kind == "size" else stored.size
        headers = {"X-Repo-Commit": "0" * 40 if kind == "commit" else commit, "Accept-Ranges": "bytes"}
        if stored.large or kind == "location":
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": size, "ETag": f'"{stored.blob}"'}
            target = fault.value if fault and kind == "location" else self.hub.sign(commit, name)
            self.answer(302, headers | linked | {"Location": target})
        elif self.command == "HEAD":
            self.answer(200, headers | {"ETag": f'"{etag}"', "Content-Length": size})
        else:
            self.send_file(name, stored, headers, self.hub.fault("body", name))


class Storage(Answering):
    """Where large files are, for who has a signed address."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        _, commit, name = unquote(url.path).split("/", 2)
        signature = parse_qs(url.query).get("Signature", [""])[0]
        with self.hub.lock:
            self.hub.counts.tokens_at_storage += "Authorization" in self.headers
        fault = self.hub.fault("body", name)
        if fault and fault.kind == "expired":
            self.hub.signatures.discard(signature)
        if signature in self.hub.signatures:
            self.send_file(name, self.hub.commits[commit][name], {}, fault)
        else:
            self.answer(403, {})


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a directory as a hub's repository.")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--repo", default="owner/name")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", help="what a client must bring: the repository is private")
    parser.add_argument("--gated", action="store_true")
    options = parser.parse_args()
    with HubServer(options.dir, options.repo, token=options.token, gated=options.gated, port=options.port) as hub:
        print(hub.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
