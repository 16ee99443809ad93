"""A checkpoint on disk: safetensors headers and their index, read and distrusted. Tensor data is the loader's.

Files come from anywhere, so nothing in them is believed; every error names the file and, if there is one, the tensor.
What the tensors mean is m3dist.translation's.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3dist.config import ModelConfig, read_config
from m3dist.errors import CheckpointError
from m3dist.tensors import BYTES
from m3dist.translation import TensorError, Translation, translate

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.txt")


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
    """A directory with a config.json and safetensors files, opened: every tensor located, none read."""

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


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read config.json and every safetensors header. Raises ConfigError or CheckpointError naming the file."""
    raw_config = read_config(directory)
    config = ModelConfig.from_dict(raw_config)
    index = _read_index(directory)
    # [!.]: macOS leaves ._model.safetensors beside files on foreign disks
    files = sorted(set(index.values()) or {path.name for path in directory.glob("[!.]*.safetensors")})
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors: the weights are not there")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(directory / file).items():
            if name in stored:
                raise CheckpointError(f"{name} is in two files, {stored[name].file} and {tensor.file}; one must go")
            stored[name] = tensor
    for name, file in index.items():
        if name not in stored or stored[name].file.name != file:
            raise CheckpointError(f"{directory / INDEX}: {name} should be in {file}, which does not hold it")
    return Checkpoint(directory, config, raw_config, stored)


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name in `directory`; empty where there is no index."""
    path = directory / INDEX
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None
    weight_map = _parse_object(path, data).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that gives each tensor's file")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.+-]+\.safetensors", file) and not file.startswith(".")
        if not plain:
            raise CheckpointError(
                f"{path}: {reprlib.repr(name)} is in {reprlib.repr(file)}, which is no plain *.safetensors file name"
            )
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        total = len(set(weight_map.values()))
        raise CheckpointError(
            f"{path}: {len(missing)} of its {total} files are missing, {missing[0]} first; is the download complete?"
        )
    return weight_map


# ---------------------------------------------------------------------------------------------------------------------
# The safetensors format: 8 bytes little-endian N, N bytes of JSON, then the tensors without holes


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name. Raises CheckpointError for a file that breaks the format."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
            if length > min(size - 8, LARGEST_HEADER):
                hint = "; this is a git-lfs pointer, run `git lfs pull`" if first == b"version " else ""
                raise CheckpointError(f"{path}: says its header has {length} bytes; the file has {size}{hint}")
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from None
    header = _parse_object(path, data)
    if not isinstance(header.pop("__metadata__", None), dict | None):  # mx.save_safetensors writes null
        raise CheckpointError(f"{path}: __metadata__ must be an object")
    start = 8 + length
    tensors = {name: _parse_entry(path, name, entry, start) for name, entry in header.items()}
    _check_tiling(path, list(tensors.values()), start, size)
    return tensors


def _parse_object(path: Path, data: bytes) -> dict[str, Any]:
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


def resolve(model: str) -> Path:
    """The directory of a checkpoint: for "tiny" the one in the package, else `model` itself, for a hub id its download.

    "tiny" is the embedded one also where a directory has that name; that one is ./tiny. Raises CheckpointError where it
    is none of these, or the hub does not give it.
    """
    if directory := local(model):
        return directory
    if os.path.exists(os.path.expanduser(model)):
        raise CheckpointError(f"{model} is a file; name the directory with config.json and the safetensors files")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        raise CheckpointError(f"{model}: no such directory, and no Hugging Face id (owner/name) either")
    return _download(model)


def local(model: str) -> Path | None:
    """The directory, where `model` names one, or the one in the package; None where only the hub may know it."""
    if model == "tiny":
        from m3dist import tiny

        return tiny.PATH
    # os.path says no where pathlib raises: a name too long, a user or a directory that is not known here
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def _download(model: str) -> Path:
    """The hub's snapshot of `model`, whole, from the local cache where it is complete."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES)))
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on huggingface.co, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is no directory here and not on Hugging Face; if it is private, `hf auth login` first"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "is no directory here and not in the local cache, and Hugging Face cannot be reached"
            " (or HF_HUB_OFFLINE is set)"
        )
    except Exception as error:  # the hub library's own, its HTTP client's, the disk's
        reason = f"could not be fetched from Hugging Face: {error}"
    raise CheckpointError(f"{model} {reason}")
