"""What is fetched from: a hub's repository at one commit, or a directory; opened by rank 0 for all ranks."""

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from m3dist.checkpoint import INDEX, Checkpoint, Files, Folder, hub_id, local, open_files, read_small
from m3dist.comm import Comm, all_ranks
from m3dist.errors import CheckpointError
from m3dist.fetch.hub import Hub, Repository, describe
from m3dist.fetch.manifest import MANIFEST, is_plain
from m3dist.fetch.store import root, slug

TEXT_FILES = ("*.json", "*.jinja", "tokenizer*", "*.txt", "LICENSE*")  # beside the weights
SAMPLE = 1 << 16  # bytes
LARGEST_TEXT = 64 << 20  # bytes of one of them


@dataclass(frozen=True)
class Origin:
    """A checkpoint, where its bytes come from, and what identifies both.

    `model`: owner/name or a directory's absolute path; `revision`: a commit, or for a directory "files-" and a sha256.
    """

    model: str
    revision: str
    files: Files
    checkpoint: Checkpoint

    def local(self) -> frozenset[str]:
        """Files that this rank reads from its own disk."""
        if isinstance(self.files, Hub):
            return frozenset(name for name in self.files.sizes() if self.files.cached(name))
        return frozenset(self.files.sizes())

    def forget(self) -> None:
        """The headers are not needed again, nor what a killed process had written of them."""
        path = _headers(self.model, self.revision)
        with suppress(OSError):
            for file in (path, *path.parent.glob(f".{path.name}.*")):
                file.unlink(missing_ok=True)
            path.parent.rmdir()  # a conversion keeps nothing in the store


@contextmanager
def opened(model: str, comm: Comm) -> Iterator[Origin]:
    """What `model` names: a directory on every rank, or a hub id, which rank 0 alone asks for its commit and headers.
    Raises CheckpointError on every rank."""
    with all_ranks(comm):
        directory = local(model)
        repo, revision = (None, None) if directory else hub_id(model)
    if len(set(comm.gather_objects(repo))) > 1:
        raise CheckpointError(f"{model} is a directory on some ranks' machines only; it must be on all, or on none")
    if directory:
        with Folder(directory) as folder:
            yield _of_directory(directory, folder, comm)
        return
    with all_ranks(comm):
        said = describe(repo, revision).to_json() if comm.rank == 0 else None
    with Hub(Repository.from_json(comm.object_from_rank_0(said))) as hub:
        commit = hub.repository.commit
        with all_ranks(comm):
            text = _opened_before(repo, commit, hub) if comm.rank == 0 else None
        try:
            yield Origin(repo, commit, hub, Checkpoint.from_json(comm.object_from_rank_0(text)))
        finally:
            hub.stop()  # after a failure, threads may still be waiting for an answer


def _of_directory(directory: Path, folder: Folder, comm: Comm) -> Origin:
    with all_ranks(comm):
        checkpoint = open_files(folder)
        known = {name: _sample(folder, name, size) for name, size in sorted(folder.sizes().items())}
        changed = [(directory / name).stat().st_mtime_ns for name in known]
    own = [known, hashlib.sha256(json.dumps([known, changed]).encode()).hexdigest()]
    theirs, digest = comm.object_from_rank_0(own)
    with all_ranks(comm):
        if differing := [name for name in known.keys() | theirs.keys() if known.get(name) != theirs.get(name)]:
            raise CheckpointError(f"{directory}: {min(differing)} is not the same file here as on rank 0")
    return Origin(os.path.abspath(directory), f"files-{digest}", folder, checkpoint)


def _sample(folder: Folder, name: str, size: int) -> str:
    """sha256 of a file's size, of its first bytes and of its last: two conversions of one model differ in these."""
    digest = hashlib.sha256(str(size).encode())
    for offset in (0, max(0, size - SAMPLE)):
        piece = bytearray(min(SAMPLE, size))
        folder.read(name, offset, memoryview(piece))
        digest.update(piece)
    return digest.hexdigest()


def _opened_before(repo: str, commit: str, hub: Hub) -> str:
    """Every header, from an interrupted fetch where there was one: they too cross the network once."""
    path = _headers(repo, commit)
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = path.read_text()
        Checkpoint.from_json(text)
        return text
    text = open_files(hub).to_json()
    with suppress(OSError):  # then they are fetched again
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name(f".{path.name}.{os.getpid()}")
        made.write_text(text)
        os.rename(made, path)
    return text


def _headers(model: str, revision: str) -> Path:
    return root() / slug(model) / f"headers-{revision}.json"


def texts(origin: Origin, comm: Comm) -> dict[str, bytes]:
    """Config, tokenizer and templates, by name: rank 0 reads them, all get them."""
    found = None
    with all_ranks(comm):
        if comm.rank == 0:
            sizes = origin.files.sizes()
            wanted = [name for name, size in sorted(sizes.items()) if _is_text(name) and size <= LARGEST_TEXT]
            found = {n: base64.b64encode(read_small(origin.files, n, sizes[n])).decode() for n in wanted}
    return {name: base64.b64decode(data) for name, data in comm.object_from_rank_0(found).items()}


def _is_text(name: str) -> bool:
    if not is_plain(name) or name.lower() in (INDEX, MANIFEST) or name.endswith(".safetensors"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in TEXT_FILES)
