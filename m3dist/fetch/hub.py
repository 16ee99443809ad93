"""A hub's repository at one commit: what it holds, and any bytes of it, each over the network once if it can be helped.

Everything goes through huggingface_hub, whose token, endpoint (HF_ENDPOINT), offline switch (HF_HUB_OFFLINE), HTTP
client and cache are used: a file that lies in the cache at that commit is read there. Large files are ranges of what
the hub redirects to, an address that is signed, belongs to somebody else, and never sees the token. Nothing the hub
says is believed; names, sizes and the bytes' places are compared with what it listed at first.
"""

import json
import os
import posixpath
import random
import re
import reprlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urljoin, urlsplit

from m3dist.checkpoint import CONFIG, Folder, hub_error, read_small
from m3dist.errors import CheckpointError

LIBRARY = "m3dist"  # in the user agent
REDIRECTS = 10
LOCATION_SECONDS = 600.0  # after which a redirect is asked for again; the hub signs for an hour
LONGEST_WAIT = 30.0  # seconds between two tries, unless the server asks for more
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP's ways to say: again later
EXPIRED = (401, 403, 404, 410)  # what a signed address answers when its time is over


@dataclass(frozen=True)
class RemoteFile:
    """`size` in bytes; `etag` is the sha256 of a large file, git's id of a small one, empty where it is not known."""

    size: int
    etag: str


@dataclass(frozen=True)
class Repository:
    """What a repository holds at one commit: its top files, by plain name."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]

    def to_json(self) -> str:
        """For another process, so that one alone asks the hub: `from_json` makes an equal Repository of it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Repository":
        """What `to_json` wrote, by another process of this job: it is believed."""
        whole = json.loads(text)
        return cls(whole["repo"], whole["commit"], {name: RemoteFile(**file) for name, file in whole["files"].items()})


@dataclass(frozen=True)
class Limits:
    """How much of a failing server is borne."""

    attempts: int = 8  # tries in a row that bring no byte
    patience: float = 300.0  # seconds without a byte, waits included
    timeout: float = 30.0  # seconds to connect, and of silence
    first_wait: float = 1.0  # seconds, doubled after every try


# ---------------------------------------------------------------------------------------------------------------------
# What a repository holds


def describe(repo: str, revision: str | None = None, limits: Limits = Limits(attempts=4)) -> Repository:
    """The commit that `revision` (a branch, a tag or a commit; by default the main branch) is now, and its files.

    Where the hub is down or cannot be reached, or HF_HUB_OFFLINE is set, what the hub's cache holds of it. Raises
    CheckpointError where there is no such repository, it is private or gated, or its listing is not to be trusted.
    """
    from huggingface_hub import HfApi, errors

    model = f"{repo}@{revision}" if revision else repo
    tries = _Tries(limits, Event())
    at_the_hub: tuple[type[Exception], ...] = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, *_network_errors())
    while True:
        try:
            info = HfApi(library_name=LIBRARY).model_info(
                repo, revision=revision, files_metadata=True, timeout=limits.timeout
            )
            break
        except at_the_hub as error:
            if tries.again(error):
                continue
            answered = isinstance(error, errors.HfHubHTTPError)
            if (not answered or _may_pass(error)) and (cached := _cached_repository(repo, revision)):
                return cached
            if answered:
                raise hub_error(model, error) from None
            silence = hub_error(model, errors.LocalEntryNotFoundError(model))
            raise CheckpointError(f"{silence}: {_text(error)}") from None
        except (ValueError, TypeError, KeyError) as error:  # a repository's name, or a listing, that is none
            raise CheckpointError(f"{model}: no listing: {_text(error)}") from None
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise CheckpointError(f"{model}: the hub says its commit is {reprlib.repr(info.sha)}, which is none")
    return Repository(repo, str(info.sha), _listed(model, info.siblings or ()))


def _listed(model: str, siblings: Any) -> dict[str, RemoteFile]:
    """The top files of a hub's listing; those in directories and hidden ones are left out. Raises CheckpointError."""
    files: dict[str, RemoteFile] = {}
    for sibling in siblings:
        name, size = sibling.rfilename, sibling.size
        if not _is_path(name):
            raise CheckpointError(
                f"{model} lists a file {reprlib.repr(name)}, which could lead elsewhere; it is refused"
            )
        if "/" in name or name.startswith("."):
            continue
        if name in files:
            raise CheckpointError(f"{model} lists {name} twice; it is refused")
        if type(size) is not int or not 0 <= size < 2**63:
            raise CheckpointError(f"{model}: {name}: the hub says its size is {reprlib.repr(size)}; it is refused")
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files[name] = RemoteFile(size, str(etag or ""))
    return files


def _is_path(name: Any) -> bool:
    """Whether it is a printable relative path, down and in its shortest form."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    return name == posixpath.normpath(name) and name[:1] != "/" and name.split("/")[0] not in (".", "..")


def _cached_repository(repo: str, revision: str | None) -> Repository | None:
    """What the hub's cache holds at a revision: all of it, or as much as was ever downloaded."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    files = {}
    for name, size in Folder(snapshot).sizes().items():
        path = snapshot / name  # a link to the file that is called by its etag
        files[name] = RemoteFile(size, os.path.basename(os.readlink(path)) if path.is_symlink() else "")
    return Repository(repo, snapshot.name, files)


# ---------------------------------------------------------------------------------------------------------------------
# Its bytes


@dataclass
class _Location:
    """Where a file's bytes are, for a time."""

    url: str
    headers: Mapping[str, str]  # with the token only if it is the endpoint's
    of_endpoint: bool
    until: float = field(default_factory=lambda: time.monotonic() + LOCATION_SECONDS)
    answered: bool = False


class Hub:
    """The files of a repository, as checkpoint.Files. Any thread may read; `stop` ends all reads, `with` closes."""

    def __init__(self, repository: Repository, limits: Limits = Limits()) -> None:
        self.repository = repository
        self.root = Path(f"{repository.repo}@{repository.commit[:12]}")
        self.received = 0  # bytes of bodies that came over the network
        self._limits = limits
        self._stopped = Event()
        self._lock = Lock()  # of `received` and `_etags`
        self._resolving = {name: Lock() for name in repository.files}
        self._locations: dict[str, _Location] = {}
        self._etags: dict[tuple[str, str], str] = {}  # file, address without its signature -> its first etag
        self._snapshot: Folder | None = None  # the cache's files, of which it has `_cached`
        self._cached: dict[str, bool] = {}

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stop(self) -> None:
        """End every read, now and later, with a CheckpointError: at its next byte, or after Limits.timeout of none."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and close the cache's files. The HTTP client is the hub library's, which keeps it."""
        self.stop()
        if self._snapshot:
            self._snapshot.__exit__()

    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self.repository.files.items()}

    def cached(self, name: str) -> Path | None:
        """Where the hub's cache holds the whole file at this commit."""
        from huggingface_hub import try_to_load_from_cache

        size = self._file(name).size
        found = try_to_load_from_cache(self.repository.repo, name, revision=self.repository.commit)
        return Path(found) if isinstance(found, str) and os.path.getsize(found) == size else None

    def download(self, name: str) -> bytes:
        """A whole file, one of JSON or text. Raises CheckpointError, as `read` does."""
        return read_small(self, name, self._file(name).size)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill all of `into`, contiguous, from byte `offset` of a file: from the cache, or over the network.

        What breaks goes on from the byte that came, after waits that grow. Raises CheckpointError, naming file, bytes
        and reason, where a server fails for longer than the limits say, what it sends is not what was listed, or the
        hub was stopped.
        """
        left = memoryview(into).cast("B")
        stop, size = offset + len(left), self._file(name).size
        if not 0 <= offset <= stop <= size:
            raise CheckpointError(f"{self._range(name, offset, stop)}: it has {size} bytes")
        if folder := self._cache(name):
            folder.read(name, offset, left)
            return
        tries = _Tries(self._limits, self._stopped)
        while left:
            try:
                for chunk in self._body(name, stop - len(left), stop):
                    left[: len(chunk)] = chunk
                    left = left[len(chunk) :]
                    tries.progress()
            except CheckpointError:
                raise
            except Exception as error:  # the hub library's or its HTTP client's
                if not tries.again(error):
                    raise self._failure(self._range(name, stop - len(left), stop), error, tries.told) from None

    def _file(self, name: str) -> RemoteFile:
        if name not in self.repository.files:
            raise CheckpointError(f"{self.root / name}: the repository lists no such file")
        return self.repository.files[name]

    def _range(self, name: str, start: int, stop: int) -> str:
        return f"{self.root / name}: bytes {start}-{stop - 1}"

    def _failure(self, what: str, error: Exception, told: str) -> CheckpointError:
        from huggingface_hub import errors

        if isinstance(error, errors.HfHubHTTPError) and not told:  # gated, private, gone
            return hub_error(self.repository.repo, error)
        return CheckpointError(f"{what}: {_text(error)}{told}")

    def _cache(self, name: str) -> Folder | None:
        """The cache's files at this commit, if it has this one."""
        if name not in self._cached:
            path = self.cached(name)
            with self._lock:
                self._cached[name] = path is not None
                if path and self._snapshot is None:
                    self._snapshot = Folder(path.parent)
        return self._snapshot if self._cached[name] else None

    def _body(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` .. `stop` of a file as they come over the network, once the server has said that it is they."""
        from huggingface_hub import get_session

        location = self._locate(name)
        headers = dict(location.headers)
        if stop - start < self._file(name).size:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        with get_session().stream(
            "GET",
            location.url,
            headers=headers,
            timeout=self._limits.timeout,
            follow_redirects=not location.of_endpoint,  # never with the token
        ) as response:
            self._check(name, location, response, start, stop)
            for chunk in response.iter_raw():
                if self._stopped.is_set():
                    raise CheckpointError(f"{self.root / name}: reading was stopped")
                if len(chunk) > stop - start:
                    raise CheckpointError(f"{self._range(name, start, stop)}: more than these bytes were sent")
                start += len(chunk)
                with self._lock:
                    self.received += len(chunk)
                yield chunk
        if start < stop:
            raise _Broken(f"the body ended {stop - start} bytes early")

    def _locate(self, name: str) -> _Location:
        """Where a file's bytes are; one thread asks, the others wait for its answer."""
        with self._resolving[name]:
            location = self._locations.get(name)
            if location is None or time.monotonic() > location.until:
                location = self._locations[name] = self._resolve(name)
            return location

    def _resolve(self, name: str) -> _Location:
        """Ask the endpoint for a file. Raises CheckpointError where it is not the one that was listed."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repository.repo, name, revision=self.repository.commit)
        headers = build_hf_headers(library_name=LIBRARY) | {"Accept-Encoding": "identity"}
        for _ in range(REDIRECTS):
            answer = get_session().request(
                "HEAD", url, headers=headers, timeout=self._limits.timeout, follow_redirects=False
            )
            if answer.status_code >= 400:
                hf_raise_for_status(answer)
            direct = "location" not in answer.headers
            url = urljoin(url, answer.headers.get("location", ""))
            origin, endpoint = _origin(url), _origin(constants.ENDPOINT)
            if direct or origin != endpoint:
                break
        else:
            raise CheckpointError(f"{self.root / name}: the hub redirects {REDIRECTS} times and more")
        self._check_listed(name, answer.headers, direct)
        if origin[0] not in ("https", endpoint[0]):
            raise CheckpointError(f"{self.root / name}: the hub redirects to {reprlib.repr(url)}, which is not https")
        if origin != endpoint:
            headers.pop("authorization", None)
        return _Location(url, headers, origin == endpoint)

    def _check_listed(self, name: str, headers: Mapping[str, str], direct: bool) -> None:
        """Whether the endpoint's answer is of the file that it listed. A redirect has no size and etag of its own."""
        file, path = self._file(name), self.root / name
        commit = headers.get("x-repo-commit", self.repository.commit)
        size = headers.get("x-linked-size") or (headers.get("content-length") if direct else None)
        etag = headers.get("x-linked-etag") or (headers.get("etag", "") if direct else "")
        etag = etag.removeprefix("W/").strip('"')
        if commit != self.repository.commit:
            raise CheckpointError(f"{path}: the hub answers with another commit, {reprlib.repr(commit)}")
        if size not in (None, str(file.size)):
            raise CheckpointError(f"{path} has changed: {reprlib.repr(size)} bytes, where {file.size} were listed")
        if etag and file.etag and etag != file.etag:
            raise CheckpointError(f"{path} has changed: etag {reprlib.repr(etag)}, where {file.etag} was listed")

    def _check(self, name: str, location: _Location, response: Any, start: int, stop: int) -> None:
        """An answer's status and headers. Raises _Broken where another try may bring more, else CheckpointError."""
        status, headers, size = response.status_code, response.headers, self._file(name).size
        what = self._range(name, start, stop)
        if status in EXPIRED and not location.of_endpoint or 300 <= status < 400:
            self._forget(name, location)
            raise _Broken(f"HTTP {status}", wait=0.0 if location.answered else None)
        if status in BUSY:
            raise _Broken(f"HTTP {status}", _wait_asked(headers))
        wanted = {"status": "200"}
        if stop - start < size:
            wanted = {"status": "206", "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        said = {"status": str(status), "Content-Range": headers.get("content-range", "")}
        for key, value in (("Content-Length", str(stop - start)), ("Content-Encoding", "identity")):
            wanted[key], said[key] = value, headers.get(key, value)  # an answer may leave these out
        for key, value in wanted.items():
            if said[key] != value:
                answer = f"the answer's {key} is {reprlib.repr(said[key])}, not {reprlib.repr(value)}"
                raise CheckpointError(f"{what}: {answer}; has the file changed?")
        self._check_etag(name, location, headers.get("etag", ""))
        location.answered = True

    def _check_etag(self, name: str, location: _Location, etag: str) -> None:
        """The etag is the same as at the first answer from there. (Two addresses may have one each.)"""
        place = (name, location.url.partition("?")[0])
        with self._lock:
            first = self._etags.setdefault(place, etag)
        if etag != first:
            was = f"etag {reprlib.repr(etag)}, at first {reprlib.repr(first)}"
            raise CheckpointError(f"{self.root / name} has changed while it was read: {was}")

    def _forget(self, name: str, location: _Location) -> None:
        with self._resolving[name]:
            if self._locations.get(name) is location:
                del self._locations[name]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


# ---------------------------------------------------------------------------------------------------------------------
# Trying again


class _Broken(Exception):
    """An answer that another try may better; `wait` is how many seconds from now, if that was said."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Tries:
    """Counts one thing's failures since it last made progress, and waits between them."""

    def __init__(self, limits: Limits, stopped: Event) -> None:
        self.limits, self.stopped = limits, stopped
        self.told = ""  # why there is no other try, once `again` has said so
        self.progress()

    def progress(self) -> None:
        self.failures, self.since = 0, time.monotonic()

    def again(self, error: Exception) -> bool:
        """Wait until the next try is due and say yes; no, at once, where another would not help or is one too many."""
        if not _may_pass(error):
            return False
        self.failures += 1
        usual = min(LONGEST_WAIT, self.limits.first_wait * 2 ** (self.failures - 1)) * random.uniform(0.5, 1)
        asked = _asked(error)
        wait = usual if asked is None else asked + (usual if asked else 0)
        if self.failures >= self.limits.attempts:
            self.told = f"; gave up after {self.failures} tries, try again later"
            return False
        if time.monotonic() + wait - self.since > self.limits.patience:
            self.told = f"; the next try is due in {wait:.0f} s, which is too long: try again later"
            return False
        if self.stopped.wait(wait):
            self.told = "; reading was stopped"
            return False
        return True


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed: the server is busy, or the connection failed."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in BUSY
    return isinstance(error, (_Broken, *_network_errors())) and not isinstance(error, errors.OfflineModeIsEnabled)


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub library's HTTP client raises where a connection fails: httpx's, or of a package that follows it."""
    from huggingface_hub import get_session

    packages = {cls.__module__.partition(".")[0] for cls in type(get_session()).__mro__}
    return tuple(
        sys.modules[package].TransportError for package in packages if hasattr(sys.modules[package], "TransportError")
    )


def _asked(error: Exception) -> float | None:
    """Seconds that the server asks to wait before the next try."""
    if isinstance(error, _Broken):
        return error.wait
    response = getattr(error, "response", None)
    return None if response is None else _wait_asked(response.headers)


def _wait_asked(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer's headers ask to wait: Retry-After (RFC 9110), else the hub's rate limit, if used up."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except ValueError:
            return None
    limit = re.search(r";\s*r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))  # "resolvers";r=0;t=55
    return float(limit[1]) if limit else None


def _text(error: Exception) -> str:
    """The first line of an error, with its kind: an HTTP client's own words are few."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, _Broken) else f"{type(error).__name__}: {text}"
