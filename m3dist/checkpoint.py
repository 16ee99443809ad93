"""A checkpoint's files: safetensors headers and their index, read and distrusted. Tensor data is the loader's.

Files come from anywhere, so nothing in them is believed; every error names the file and, if there is one, the tensor.
What the tensors mean is m3dist.translation's.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from m3dist.config import CONFIG, ModelConfig, parse_config
from m3dist.errors import CheckpointError, ConfigError
from m3dist.tensors import BYTES
from m3dist.translation import TensorError, Translation, translate

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library, and ours for an index and a config too
LARGEST_READ = 1 << 30  # bytes; macOS refuses reads of 2 GiB
HEADERS_AT_ONCE = 8  # a hub answers in tens of milliseconds, however little is asked of it


# ---------------------------------------------------------------------------------------------------------------------
# Where files are


class Files(Protocol):
    """Where a checkpoint's files are: a directory, or a hub's repository at one commit. Any thread may read."""

    @property
    def root(self) -> Path:
        """What errors name, and a StoredTensor's `file` lies in: `root` / name."""

    def sizes(self) -> Mapping[str, int]:
        """Every file's plain name -> its bytes. Raises CheckpointError."""

    def read(self, name: str, offset: int, into: memoryview) -> None:
        """Fill all of `into`, contiguous, from byte `offset` of a file, or raise CheckpointError naming the file."""


class Folder:
    """The files of a directory, each opened when it is first read from, and closed by `with`.

    `ahead`: whether the system may read ahead of what is asked for, which is no use where only pieces are.
    """

    def __init__(self, root: Path, ahead: bool = False) -> None:
        self.root, self.ahead = root, ahead
        self._opened: dict[str, int] = {}
        self._lock = Lock()

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in self._opened.values():
            os.close(descriptor)

    def sizes(self) -> dict[str, int]:
        """File name -> bytes; nothing for a directory that is not there.

        Hidden files are left out: macOS leaves ._model.safetensors beside files on foreign disks.
        """
        try:
            found = [path for path in self.root.iterdir() if not path.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise CheckpointError(f"{self.root}: {error}") from None
        return {path.name: path.stat().st_size for path in found if path.is_file()}

    def read(self, name: str, offset: int, into: memoryview) -> None:
        left = memoryview(into).cast("B")
        try:
            descriptor = self._descriptor(name)
            while left:
                count = os.preadv(descriptor, [left[:LARGEST_READ]], offset)
                if not count:
                    raise CheckpointError(
                        f"{self.root / name}: the file now ends at byte {offset}, where it was longer when it was"
                        " opened; is something still writing it?"
                    )
                left, offset = left[count:], offset + count
        except OSError as error:
            raise CheckpointError(f"{self.root / name}: {error}") from None

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = os.open(self.root / name, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):
                    advice = os.POSIX_FADV_SEQUENTIAL if self.ahead else os.POSIX_FADV_RANDOM
                    os.posix_fadvise(self._opened[name], 0, 0, advice)
            return self._opened[name]


def read_small(files: Files, name: str, size: int) -> bytes:
    """A whole file of `size` bytes, one of JSON or text. Raises CheckpointError, also where it is too large for one."""
    if size > LARGEST_HEADER:
        raise CheckpointError(f"{files.root / name}: {size} bytes are too many; at most {LARGEST_HEADER} are read")
    data = bytearray(size)
    files.read(name, 0, memoryview(data))
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file: its bytes are `offset` .. `offset + nbytes`, counted from the file's first byte."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A config.json and safetensors files, opened: every tensor located, none read. `directory` is the files' root."""

    directory: Path
    config: ModelConfig
    raw_config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, those m3dist leaves out included."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def translate(self, dtype: str | None = None) -> Translation:
        """`translation.translate` of these tensors; an error also names the file."""
        try:
            return translate(self.config, {name: (t.shape, t.dtype) for name, t in self.stored.items()}, dtype)
        except TensorError as error:
            raise CheckpointError(f"{self.stored[error.tensor].file}: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory}: {error}") from None

    def to_json(self) -> str:
        """For another process, so that one alone reads the headers: `from_json` makes an equal Checkpoint of it."""
        files: dict[str, list[list[Any]]] = {}
        for t in self.stored.values():
            files.setdefault(t.file.name, []).append([t.name, t.shape, t.dtype, t.offset, t.nbytes])
        whole = {"directory": str(self.directory), "config": self.raw_config, "files": files}
        return json.dumps(whole, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Checkpoint":
        """What `to_json` wrote, by another process of this job: it is believed."""
        whole = json.loads(text)
        directory, config = Path(whole["directory"]), whole["config"]
        stored = {
            name: StoredTensor(directory / file, name, tuple(shape), dtype, offset, nbytes)
            for file, tensors in whole["files"].items()
            for name, shape, dtype, offset, nbytes in tensors
        }
        return cls(directory, ModelConfig.from_dict(config), config, stored)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json and every safetensors header. Raises ConfigError or CheckpointError naming the file."""
    with Folder(directory) as files:
        return open_files(files)


def open_files(files: Files) -> Checkpoint:
    """`open_checkpoint` of files that may lie elsewhere. Of a hub's no byte is read but these files' and headers'."""
    sizes = files.sizes()
    if CONFIG not in sizes:
        raise ConfigError(f"{files.root / CONFIG} does not exist: is {files.root} a checkpoint directory?")
    raw_config = parse_config(files.root / CONFIG, read_small(files, CONFIG, sizes[CONFIG]))
    config = ModelConfig.from_dict(raw_config)
    index = _read_index(files, sizes)
    names = sorted(set(index.values()) or {name for name in sizes if name.endswith(".safetensors")})
    if not names:
        raise CheckpointError(f"{files.root} holds no *.safetensors: the weights are not there")
    stored: dict[str, StoredTensor] = {}
    for header in _read_headers(files, {name: sizes[name] for name in names}):
        for name, tensor in header.items():
            if name in stored:
                raise CheckpointError(f"{name} is in two files, {stored[name].file} and {tensor.file}; one must go")
            stored[name] = tensor
    for name, file in index.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(f"{files.root / INDEX}: {name} should be in {file}, which does not hold it")
    return Checkpoint(files.root, config, raw_config, stored)


def _read_index(files: Files, sizes: Mapping[str, int]) -> dict[str, str]:
    """Tensor name -> file name, one of `sizes`; empty where there is no index."""
    if INDEX not in sizes:
        return {}
    path = files.root / INDEX
    weight_map = _parse_object(path, read_small(files, INDEX, sizes[INDEX])).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that gives each tensor's file")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.+-]+\.safetensors", file) and not file.startswith(".")
        if not plain:
            raise CheckpointError(
                f"{path}: {reprlib.repr(name)} is in {reprlib.repr(file)}, which is no plain *.safetensors file name"
            )
    missing = sorted(set(weight_map.values()) - sizes.keys())
    if missing:
        total = len(set(weight_map.values()))
        raise CheckpointError(
            f"{path}: {len(missing)} of its {total} files are missing, {missing[0]} first; is the download complete?"
        )
    return weight_map


def _read_headers(files: Files, sizes: Mapping[str, int]) -> list[dict[str, StoredTensor]]:
    """The headers of safetensors files, in order. Raises CheckpointError of the first that breaks the format."""
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        try:
            return list(pool.map(lambda name: _read_header(files, name, sizes[name]), sizes))
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure the rest is not worth reading


# ---------------------------------------------------------------------------------------------------------------------
# The safetensors format: 8 bytes little-endian N, N bytes of JSON, then the tensors without holes


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name. Raises CheckpointError for a file that breaks the format."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with Folder(path.parent) as files:
        return _read_header(files, path.name, size)


def _read_header(files: Files, name: str, size: int) -> dict[str, StoredTensor]:
    """`read_header` of one of `files`, of `size` bytes. A length that cannot be is refused before it is asked for."""
    path = files.root / name
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
    first = bytearray(8)
    files.read(name, 0, memoryview(first))
    length = int.from_bytes(first, "little")
    if length > min(size - 8, LARGEST_HEADER):
        hint = "; this is a git-lfs pointer, run `git lfs pull`" if first == b"version " else ""
        raise CheckpointError(f"{path}: says its header has {length} bytes; the file has {size}{hint}")
    data = bytearray(length)
    files.read(name, 8, memoryview(data))
    header = _parse_object(path, data)
    if not isinstance(header.pop("__metadata__", None), dict | None):  # mx.save_safetensors writes null
        raise CheckpointError(f"{path}: __metadata__ must be an object")
    start = 8 + length
    tensors = {name: _parse_entry(path, name, entry, start) for name, entry in header.items()}
    _check_tiling(path, list(tensors.values()), start, size)
    return tensors


def _parse_object(path: Path, data: bytes | bytearray) -> dict[str, Any]:
    """A JSON object without a key given twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in items:
            if name in found:
                raise ValueError(f"{reprlib.repr(name)} is given twice")
            found[name] = value
        return found

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(parsed).__name__}")
    return parsed


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One tensor's header entry, its offsets made absolute by `start`. An unknown dtype is left to who needs it."""
    if not name.isprintable():
        raise CheckpointError(f"{path}: a tensor is called {reprlib.repr(name)}; names must be printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name}: must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{path}: {name}: dtype must be a string, not {reprlib.repr(dtype)}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{path}: {name}: shape must be a list of sizes, not {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name}: data_offsets must be a begin and an end, not {reprlib.repr(offsets)}")
    nbytes = offsets[1] - offsets[0]
    if dtype in BYTES and nbytes != BYTES[dtype] * math.prod(shape):
        expected = BYTES[dtype] * math.prod(shape)
        raise CheckpointError(f"{path}: {name}: {dtype} {shape} takes {expected} bytes, data_offsets give {nbytes}")
    return StoredTensor(path, name, tuple(shape), dtype, start + offsets[0], nbytes)


def _are_sizes(values: Any) -> bool:
    """A short list of plain integers of 63 bits, which cannot make a product too long to compute."""
    return isinstance(values, list) and len(values) <= 16 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_tiling(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    """The tensors' bytes must follow each other from `start` to the end of the file."""
    end = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: {tensor.name}: begins at {tensor.offset} and {what}, which ends at {end}")
        end += tensor.nbytes
    if end > size:
        cut = min((t for t in tensors if t.offset + t.nbytes > size), key=lambda t: t.offset)
        raise CheckpointError(
            f"{path}: {end - size} bytes are missing at the end, from {cut.name} on; fetch the file again"
        )
    if end < size:
        raise CheckpointError(f"{path}: {size - end} bytes after the last tensor belong to none; fetch the file again")


# ---------------------------------------------------------------------------------------------------------------------
# Finding one


def local(model: str) -> Path | None:
    """The directory that `model` names; None where only the hub may know it.

    "tiny" is the one in the package also where a directory has that name; that one is ./tiny.
    """
    if model == "tiny":
        from m3dist import tiny

        return tiny.PATH
    # os.path says no where pathlib raises: a name too long, a user or a directory that is not known here
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def hub_id(model: str) -> tuple[str, str | None]:
    """ "owner/name" or "owner/name@revision" of a Hugging Face id -> its repository and revision.

    Raises CheckpointError for anything else; it is no directory either, as `local` has found.
    """
    if os.path.exists(os.path.expanduser(model)):
        raise CheckpointError(f"{model} is a file; name the directory with config.json and the safetensors files")
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", model)
    if not match:
        raise CheckpointError(
            f"{model}: no such directory, and no Hugging Face id (owner/name or owner/name@revision) either"
        )
    return match[1], match[2]


def hub_error(model: str, error: Exception) -> CheckpointError:
    """What went wrong at the hub with `model`, in the user's words; `error` is what its library raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        reason = "is gated: accept its terms on huggingface.co, then `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "is no directory here and not on Hugging Face; if it is private, `hf auth login` first"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "is on Hugging Face, but not that revision of it; name a branch, a tag or a whole commit id"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        reason = (
            "is no directory here and not in the local cache, and Hugging Face cannot be reached"
            " (or HF_HUB_OFFLINE is set)"
        )
    else:
        reason = f"could not be fetched from Hugging Face: {error}"
    return CheckpointError(f"{model} {reason}")
