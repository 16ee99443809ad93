"""The store: what is kept of checkpoints, one directory for each rank of a plan. No MLX.

    ROOT/MODEL/KEY/rank-0-of-2/            an entry: a rank's slices as safetensors, config, tokenizer, manifest.json
    ROOT/MODEL/KEY/rank-0-of-2.partial/    one that is being fetched
    ROOT/MODEL/KEY/rank-0-of-2.lock        held by the process that fetches or removes it
    ROOT/MODEL/KEY/rank-0-of-2.old/        what is being replaced: the entry, as long as there is no other
    ROOT/MODEL/KEY/rank-0-of-2.removed/    what is being deleted

KEY is of model, revision and plan. An entry comes into being, is replaced and goes by a rename, so that a process
killed at any moment leaves the old state or the new one.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from m3dist.checkpoint import read_header
from m3dist.errors import CheckpointError, PlanError, StoreError
from m3dist.fetch.manifest import MANIFEST, Kept, Manifest, is_plain, read_manifest
from m3dist.plan import Plan, plan_world
from m3dist.progress import Progress, Report
from m3dist.tensors import Quantization, TensorSpec

PARTIAL, LOCK, OLD, REMOVED = ".partial", ".lock", ".old", ".removed"
HASHED = 8 << 20  # bytes that are read and hashed at a time
THREADS = 4  # that hash
LOCK_TRIES, LOCK_PAUSE = 5, 0.05  # for a lock that somebody only looks at; seconds


@dataclass(frozen=True)
class Entry:
    """A whole entry."""

    directory: Path
    manifest: Manifest

    @property
    def nbytes(self) -> int:
        return self.manifest.nbytes


@dataclass(frozen=True)
class Broken:
    """An entry whose manifest cannot be used; `why` names the file and the field."""

    directory: Path
    why: str

    @property
    def nbytes(self) -> int:
        return disk_bytes(self.directory)


@dataclass(frozen=True)
class Unfinished:
    """What an interrupted fetch, replacement or removal left, or one that is under way."""

    directory: Path

    @property
    def nbytes(self) -> int:
        return disk_bytes(self.directory)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of an entry."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


# ---------------------------------------------------------------------------------------------------------------------
# Places


def root() -> Path:
    """The store's directory, which need not be there: M3DIST_STORE, or m3dist/store in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = os.environ.get("M3DIST_STORE") or os.path.join(cache, "m3dist", "store")
    return Path(os.path.abspath(os.path.expanduser(named)))


def place(model: str, revision: str, plan_digest: str, rank: int, world: int) -> Path:
    """Where the entry of a rank is, or is to be."""
    key = hashlib.sha256(json.dumps([model, revision, plan_digest]).encode()).hexdigest()[:16]
    return root() / slug(model) / key / f"rank-{rank}-of-{world}"


def slug(model: str) -> str:
    """A directory's name for a model: owner--name for one of the hub, +path--of--it for a directory, whose last part
    it is where that is long. Different directories may have the same."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "--", model)[-80:].strip("-.") or "model"
    return f"+{name}" if os.path.isabs(model) else name


def work_directory(place: Path) -> Path:
    """Where what becomes the entry at `place` is made."""
    return _beside(place, PARTIAL)


def _beside(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def place_of(directory: Path) -> Path:
    """The place to which one of the directories of an entry belongs."""
    return directory.with_name(directory.name.partition(".")[0])


def _found(suffixes: Iterable[str], model: str | None) -> Iterator[Path]:
    """The directories of entries' names and a suffix, in order. A link is none."""
    ends = "|".join(re.escape(suffix) for suffix in suffixes)
    for owner in [root() / slug(model)] if model else _directories(root()):
        for key in _directories(owner):
            for directory in _directories(key):
                if re.fullmatch(rf"rank-\d+-of-\d+({ends})", directory.name):
                    yield directory


def _directories(parent: Path) -> list[Path]:
    """The directories in `parent`, which may be gone."""
    try:
        with os.scandir(parent) as found:
            return sorted(Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoreError(f"{parent}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def entries(model: str | None = None) -> Iterator[Entry | Broken]:
    """Every entry, or those of a model, which is named as Manifest.model is."""
    for directory in _found(("", OLD), model):
        if directory.name.endswith(OLD) and place_of(directory).exists():
            continue
        try:
            manifest = read_manifest(directory)
        except StoreError as error:
            if directory.exists():  # or it was removed meanwhile
                yield Broken(directory, str(error))
        else:
            if model in (None, manifest.model):
                yield Entry(directory, manifest)


def unfinished(model: str | None = None) -> Iterator[Unfinished]:
    """Everything that takes room and is no entry. Models with the same slug are not told apart."""
    for directory in _found((PARTIAL, OLD, REMOVED), model):
        if not directory.name.endswith(OLD) or place_of(directory).exists():
            yield Unfinished(directory)


def candidates(
    model: str,
    *,
    world: int,
    weights: Sequence[float] | None,
    experts: str,
    attention: str,
    rank: int,
    revision: str | None = None,
    quantization: Quantization | None = None,
) -> list[Entry]:
    """Entries with what `rank` holds of this cut of a model, the newest first.

    `weights`: None for equal ranks. `revision`, `quantization` (of the experts): None for any.
    """

    def fits(m: Manifest) -> bool:
        if (m.rank, m.world, m.experts, m.attention) != (rank, world, experts, attention):
            return False
        if revision not in (None, m.revision) or quantization not in (None, m.expert_format):
            return False
        try:  # the cut counts, not the numbers it was asked for with: 2,2 is 1,1
            return plan_world(m.inventory(), world, weights, experts, attention).digest == m.plan
        except PlanError:
            return False

    found = [entry for entry in entries(model) if isinstance(entry, Entry) and fits(entry.manifest)]
    return sorted(found, key=lambda entry: entry.manifest.created, reverse=True)


def disk_bytes(directory: Path) -> int:
    """Bytes of disk that everything in a directory takes: a file that is being fetched has its full length at once."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Is it intact?


def check(entry: Entry) -> list[Problem]:
    """What a look at sizes and headers shows: files that are missing, truncated or foreign, tensors that are not what
    the plan says."""
    problems = {kept.name: _size_problem(entry.directory / kept.name, kept) for kept in entry.manifest.files}
    found = [Problem(name, what) for name, what in problems.items() if what]
    try:
        present = sorted(name for name in os.listdir(entry.directory) if not name.startswith("."))  # .DS_Store
    except OSError as error:
        raise StoreError(f"{entry.directory}: {error.strerror}") from None
    foreign = [name for name in present if name not in problems and name != MANIFEST]
    return found + [Problem(name, "is none of the entry's files") for name in foreign] + _tensor_problems(entry, found)


def _size_problem(path: Path, kept: Kept) -> str | None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size != kept.nbytes:
        return f"has {found.st_size} bytes, not {kept.nbytes}"
    return None


def _tensor_problems(entry: Entry, known: Sequence[Problem]) -> list[Problem]:
    """Whether the headers of the files that have no problem yet list what the rank holds."""
    try:
        held = entry.manifest.make_plan().held_specs(entry.manifest.rank)
    except StoreError as error:
        return [Problem(MANIFEST, str(error).removeprefix(f"{entry.manifest.file}: "))]
    bad = {problem.file for problem in known}
    problems = []
    for kept in entry.manifest.files:
        path = entry.directory / kept.name
        if kept.name in bad or path.suffix != ".safetensors":
            continue
        try:
            header = read_header(path)
        except CheckpointError as error:
            problems.append(Problem(kept.name, str(error).removeprefix(f"{path}: ")))
            continue
        for name, tensor in header.items():
            if held.pop(name, None) != TensorSpec(tensor.shape, tensor.dtype):
                what = f"{name} {list(tensor.shape)} {tensor.dtype} is not what this rank holds of it, or is twice here"
                problems.append(Problem(kept.name, what))
    if held and not bad and not problems:
        first = next(iter(held))
        problems.append(Problem(MANIFEST, f"{len(held)} tensors of this rank are in none of the files, {first} first"))
    return problems


def verify(entry: Entry, progress: Report | None = None, threads: int = THREADS) -> list[Problem]:
    """`check`, then the checksum of every file, all bytes read. `progress`: the file being read, bytes done and in
    all; it is called by several threads, one at a time."""
    problems = check(entry)
    bad = {problem.file for problem in problems}
    left = {kept.name: kept for kept in entry.manifest.files if kept.name not in bad}
    total = sum(kept.nbytes for kept in left.values())
    digests = _hash(entry.directory, list(left), total, progress, threads)
    for name, digest in digests.items():
        if isinstance(digest, OSError):
            problems.append(Problem(name, f"cannot be read: {digest.strerror}"))
        elif digest != left[name].sha256:
            problems.append(Problem(name, f"has other contents: their sha256 is {digest}, not {left[name].sha256}"))
    return problems


def _hash(
    directory: Path,
    names: Sequence[str],
    total: int,
    progress: Report | None,
    threads: int = THREADS,
    then: Callable[[int], None] = lambda descriptor: None,
) -> Mapping[str, str | OSError]:
    """File name -> sha256 in hexadecimal, or why it cannot be read. `then` gets each file's descriptor at its end."""
    done, lock = 0, Lock()

    def advance(name: str, count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress:
                progress(Progress(name, done, total))

    def one(name: str) -> str | OSError:
        digest = hashlib.sha256()
        try:
            descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                buffer = memoryview(bytearray(min(HASHED, os.fstat(descriptor).st_size + 1)))
                while count := os.readv(descriptor, [buffer]):
                    digest.update(buffer[:count])
                    advance(name, count)
                then(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            return error
        return digest.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        try:
            return dict(zip(names, pool.map(one, names)))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C the rest is not worth reading


# ---------------------------------------------------------------------------------------------------------------------
# Coming into being, and going. Whoever does it holds the place's lock.


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keep other processes from making, replacing or removing the entry at `place`, as long as this one lives.

    Makes the directories above `place`, and takes those away that are empty at the end. What a killed process left
    half replaced or half removed is put in order first. Raises StoreError, naming the process that has the lock.
    """
    descriptor = _lock(place)
    try:
        _settle(place)
        yield
    finally:
        with suppress(OSError):
            os.unlink(_beside(place, LOCK))  # while it is held: the next one makes a new file
        os.close(descriptor)
        with suppress(OSError):  # others' entries are there
            for parent in (place.parent, place.parent.parent):
                parent.rmdir()


def holder(place: Path) -> int | None:
    """The process that has the lock of `place`; 0 for one that has not said which; None where it is free."""
    try:
        descriptor = os.open(_beside(place, LOCK), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        said = os.pread(descriptor, 20, 0).strip()
        return int(said) if said.isdigit() else 0
    finally:
        os.close(descriptor)


def in_use(place: Path, process: int) -> StoreError:
    """The error for a lock that `process`, as `holder` gives it, has."""
    return StoreError(f"{place} is being fetched or removed by process {process or '?'}; wait until it has ended")


def _lock(place: Path) -> int:
    """The descriptor that holds the lock; closing it, as the end of the process does, gives it up."""
    path, tries = _beside(place, LOCK), 0
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # the rank beside this one took away the empty directory meanwhile
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}; M3DIST_STORE names another directory for the store") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                return descriptor
        except FileNotFoundError:
            pass  # who held it has ended, and taken the file away
        except BlockingIOError:
            tries += 1
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
        os.close(descriptor)
        if tries == LOCK_TRIES:
            raise in_use(place, holder(place) or 0)
        if tries:
            time.sleep(LOCK_PAUSE)


def _settle(place: Path) -> None:
    """Put in order what a killed process left."""
    old = _beside(place, OLD)
    try:
        if old.exists() and not place.exists():
            os.rename(old, place)
    except OSError as error:
        raise StoreError(f"{old}: {error.strerror}") from None
    _discard(old)
    _discard(_beside(place, REMOVED))


def seal(
    work: Path,
    *,
    model: str,
    revision: str,
    config: Mapping[str, Any],
    plan: Plan,
    rank: int,
    progress: Report | None = None,
) -> Manifest:
    """Write the manifest of a finished work directory, after reading all its files and bringing them to the disk.

    Hidden files are left out. Raises StoreError for anything but plain files, and for a manifest that could not be
    read again.
    """
    try:
        names = sorted(name for name in os.listdir(work) if not name.startswith(".") and name != MANIFEST)
        for name in names:
            if not is_plain(name) or not stat.S_ISREG(os.lstat(work / name).st_mode):
                raise StoreError(f"{work / name}: an entry holds plain files only")
        sizes = {name: os.lstat(work / name).st_size for name in names}
    except OSError as error:
        raise StoreError(f"{work}: {error.strerror}") from None
    kept = []
    for name, digest in _hash(work, names, sum(sizes.values()), progress, then=sync).items():
        if isinstance(digest, OSError):
            raise StoreError(f"{work / name}: {digest.strerror}")
        kept.append(Kept(name, sizes[name], digest))
    made = Manifest.of(plan, rank, kept, model=model, revision=revision, config=config)
    manifest = replace(made, file=work / MANIFEST)
    Manifest.from_json(json.loads(json.dumps(manifest.to_json())), manifest.file).make_plan()
    _write(manifest)
    return manifest


def _write(manifest: Manifest) -> None:
    """Write a manifest's file: the old one or the new one, never half."""
    made = manifest.file.with_name(f".{MANIFEST}")
    try:
        with open(made, "w", encoding="utf-8") as file:
            json.dump(manifest.to_json(), file, indent=1)
            file.flush()
            sync(file.fileno())
        os.rename(made, manifest.file)
        _sync_directory(manifest.file.parent)
    except OSError as error:
        raise StoreError(f"{manifest.file}: {error.strerror}") from None


def publish(work: Path, entry: Path) -> None:
    """Make a sealed work directory the entry at `entry`, in the place of what is there. Raises StoreError.

    Killed at any moment: `entries` gives what was there before, or the new entry, whole.
    """
    read_manifest(work)
    old = _beside(entry, OLD)
    try:
        sync_all(work)
        if entry.exists():
            _discard(old)
            os.rename(entry, old)
        os.rename(work, entry)
        _sync_directory(entry.parent)
    except OSError as error:
        raise StoreError(f"{entry}: {error.strerror}") from None
    _discard(old)


def remove(found: Entry | Broken | Unfinished) -> None:
    """Delete an entry, or what is unfinished. Raises StoreError where a process fetches it."""
    where = place_of(found.directory)
    with locked(where):  # which puts away what an interrupted replacement or removal left
        _discard(where if not isinstance(found, Unfinished) else found.directory)


def _discard(directory: Path) -> None:
    """Delete a directory, if it is there: it goes by a rename, its contents afterwards."""
    aside = _beside(place_of(directory), REMOVED)
    try:
        if directory != aside:
            if not directory.exists():
                return
            _discard(aside)
            os.rename(directory, aside)
            _sync_directory(aside.parent)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        raise StoreError(f"{directory}: {error.strerror}") from None


def sync_all(directory: Path) -> None:
    """Bring the files of a directory to the disk."""
    for name in (entry.name for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False)):
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
    _sync_directory(directory)


def sync(descriptor: int) -> None:
    """Bring an open file, or a directory's list of files, to the disk: on macOS fsync leaves it in the disk's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
