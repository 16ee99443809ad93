"""An entry's manifest.json: which checkpoint, in which format, which rank of which plan, and its files' checksums.

A manifest is data that anybody may have written: everything in it is checked, and an error names the file and the
field. No MLX.
"""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from m3dist.config import ModelConfig
from m3dist.errors import ConfigError, PlanError, StoreError
from m3dist.options import ATTENTION, EXPERTS, MAX_RANKS, MODES
from m3dist.plan import Plan, make_plan
from m3dist.quantization import quantization_of
from m3dist.tensors import FLOATS, Inventory, Quantization, modules

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest and of what lies beside it; another one is not read
LARGEST_MANIFEST = 1 << 24  # bytes; M3's, with a format for each module and a thousand files, has 0.3 MB
LARGEST_NUMBER = 2**53  # of a config: a float holds it exactly, and no product of such takes long
AGAIN = "`m3dist fetch MODEL` makes this entry anew"


@dataclass(frozen=True)
class Kept:
    """One file of an entry: a plain name, its bytes, and the sha256 of them in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an entry is: one rank's part of one checkpoint, in one format. `file` is where it lies, for errors."""

    model: str  # "owner/name", or a directory's absolute path
    revision: str  # the hub's commit, or "files-" and a sha256 over a directory's names, sizes and times
    config: Mapping[str, Any]  # the checkpoint's config.json, as it was
    dtype: str  # Inventory.dtype
    quantization: Mapping[str, Quantization | None]  # by module; without those that are not quantised
    weights: tuple[float, ...]
    experts: str
    attention: str
    rank: int
    plan: str  # Plan.digest
    files: tuple[Kept, ...]  # all of the entry's, but for the manifest
    created: str  # UTC, as now() writes it: later ones are greater
    file: Path = field(default=Path(MANIFEST), compare=False)

    @classmethod
    def of(
        cls, plan: Plan, rank: int, files: Iterable[Kept], *, model: str, revision: str, config: Mapping[str, Any]
    ) -> "Manifest":
        """Of what `rank` holds of a plan, made now."""
        inventory = plan.inventory
        return cls(
            model=model,
            revision=revision,
            config=config,
            dtype=inventory.dtype,
            quantization={name: form for name, form in inventory.quantization.items() if form},
            weights=plan.weights,
            experts=plan.experts,
            attention=plan.attention,
            rank=rank,
            plan=plan.digest,
            files=tuple(files),
            created=now(),
        )

    @property
    def world(self) -> int:
        return len(self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(kept.nbytes for kept in self.files)

    @property
    def expert_format(self) -> Quantization | None:
        """The format of the routed experts, which nearly all bytes are in; None where they are floats."""
        names = [module.name for module in modules(ModelConfig.from_dict(self.config)).values() if module.is_matrix]
        experts = [name for name in names if ".switch_mlp." in name]
        return Counter(self.quantization.get(name) for name in experts or names).most_common(1)[0][0]

    def inventory(self) -> Inventory:
        """The whole model, of which this is a part."""
        return Inventory(ModelConfig.from_dict(self.config), self.dtype, self.quantization)

    def make_plan(self) -> Plan:
        """The plan of all ranks. Raises StoreError where it is not the one that the entry was made for."""
        try:
            plan = make_plan(self.inventory(), self.weights, self.experts, self.attention)
        except PlanError as error:
            raise StoreError(f"{self.file}: plan: {error}; {AGAIN}") from None
        if plan.digest != self.plan:
            raise StoreError(
                f"{self.file}: plan: {self.plan[:12]} is not what this m3dist makes of its config, formats and weights,"
                f" which is {plan.digest[:12]}; {AGAIN}"
            )
        return plan

    def to_json(self) -> dict[str, Any]:
        """What manifest.json holds; `from_json` makes an equal Manifest of it."""
        return {
            "format": FORMAT,
            "model": self.model,
            "revision": self.revision,
            "created": self.created,
            "rank": self.rank,
            "weights": list(self.weights),
            "experts": self.experts,
            "attention": self.attention,
            "plan": self.plan,
            "dtype": self.dtype,
            "quantization": _formats_to_json(self.quantization, ModelConfig.from_dict(self.config)),
            "files": [{"name": kept.name, "bytes": kept.nbytes, "sha256": kept.sha256} for kept in self.files],
            "config": self.config,
        }

    @classmethod
    def from_json(cls, content: Any, file: Path) -> "Manifest":
        """Read `file`'s JSON. Raises StoreError naming file and field for anything that `to_json` does not write."""
        fields = _Fields(content, file)
        fields.take("format", lambda v: type(v) is int and v == FORMAT, f"{FORMAT}, which this m3dist reads")
        raw_config = fields.take("config", lambda v: isinstance(v, dict), "a JSON object")
        config = _config(fields, raw_config)
        weights = fields.take("weights", _are_weights, f"1 to {MAX_RANKS} positive numbers, one a rank")
        manifest = cls(
            model=fields.take("model", _is_line, "a line of text"),
            revision=fields.text("revision", r"[0-9a-f]{40}|files-[0-9a-f]{64}", "a commit, or files- and a sha256"),
            config=raw_config,
            dtype=fields.choice("dtype", FLOATS),
            quantization=_formats_from_json(fields, config),
            weights=tuple(float(weight) for weight in weights),
            experts=fields.choice("experts", EXPERTS),
            attention=fields.choice("attention", ATTENTION),
            rank=fields.take("rank", lambda v: type(v) is int and 0 <= v < len(weights), "one of the ranks, from 0"),
            plan=fields.text("plan", r"[0-9a-f]{64}", "a sha256"),
            files=_files(fields),
            created=fields.take("created", _is_time, "a time in UTC, such as 2026-01-31T12:00:00.000000+00:00"),
            file=file,
        )
        fields.end()
        return manifest


def now() -> str:
    """This moment, as `created` has it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of the entry in `directory`. Raises StoreError naming the file, and the field where one is wrong."""
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_MANIFEST + 1)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {AGAIN}") from None
    if len(data) > LARGEST_MANIFEST:
        raise StoreError(f"{path}: has more than {LARGEST_MANIFEST} bytes, which no manifest has; {AGAIN}")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: no valid JSON: {error}; {AGAIN}") from None
    return Manifest.from_json(content, path)


def is_plain(name: Any) -> bool:
    """Whether this is a file's name that stays in its directory, and no hidden one."""
    plain = isinstance(name, str) and name.isprintable() and "/" not in name and not name.startswith(".")
    return plain and 0 < len(name.encode(errors="replace")) <= 255


# ---------------------------------------------------------------------------------------------------------------------
# Fields


class _Fields:
    """Hands out the fields of a manifest, each checked."""

    def __init__(self, content: Any, file: Path):
        self.file, self.left = file, dict(content) if isinstance(content, dict) else {}
        if not isinstance(content, dict):
            raise StoreError(f"{file}: must hold a JSON object, not {reprlib.repr(content)}; {AGAIN}")

    def take(self, name: str, allowed: Callable[[Any], bool], described: str) -> Any:
        """A field for which `allowed` holds; `described` says in words which those are."""
        if name not in self.left:
            self.refuse(name, "is missing")
        value = self.left.pop(name)
        if not allowed(value):
            self.refuse(name, f"must be {described}, not {reprlib.repr(value)}")
        return value

    def text(self, name: str, pattern: str, described: str) -> str:
        return str(self.take(name, lambda v: isinstance(v, str) and bool(re.fullmatch(pattern, v)), described))

    def choice(self, name: str, words: tuple[str, ...]) -> str:
        return str(self.take(name, lambda v: isinstance(v, str) and v in words, f"one of {', '.join(words)}"))

    def refuse(self, name: str, what: str) -> NoReturn:
        raise StoreError(f"{self.file}: {name}: {what}; {AGAIN}")

    def end(self) -> None:
        """All fields are known."""
        for name in self.left:
            self.refuse(reprlib.repr(name), "is no field of a manifest")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a key given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{reprlib.repr(twice)} is given twice")
    return found


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and value.isprintable()


def _is_time(value: Any) -> bool:
    """A time as `now` writes it: then text sorts as time does."""
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(timezone.utc).isoformat(timespec="microseconds") == value
    except (TypeError, ValueError, OverflowError):
        return False


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 1 <= len(value) <= MAX_RANKS
        and all(type(w) in (int, float) and 0 < w <= LARGEST_NUMBER for w in value)
    )


def _config(fields: _Fields, raw: Mapping[str, Any]) -> ModelConfig:
    """The config, with numbers that cannot make planning take forever."""
    left: list[Any] = [raw]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif type(value) in (int, float) and not (math.isfinite(value) and abs(value) <= LARGEST_NUMBER):
            fields.refuse("config", f"{reprlib.repr(value)} is too large a number")
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        fields.refuse("config", str(error))


def _files(fields: _Fields) -> tuple[Kept, ...]:
    """The list of files: plain names, none twice."""
    found = []
    for entry in fields.take("files", lambda v: isinstance(v, list) and len(v) > 0, "a list of files"):
        if not isinstance(entry, dict) or set(entry) != {"name", "bytes", "sha256"}:
            fields.refuse("files", f"each has a name, bytes and a sha256, not {reprlib.repr(entry)}")
        name, nbytes, digest = entry["name"], entry["bytes"], entry["sha256"]
        if not is_plain(name) or name.casefold() == MANIFEST:  # macOS does not tell capitals apart
            fields.refuse("files", f"{reprlib.repr(name)} is no plain file name")
        if type(nbytes) is not int or not 0 <= nbytes < 2**63:
            fields.refuse("files", f"{name}: bytes must be a size, not {reprlib.repr(nbytes)}")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            fields.refuse("files", f"{name}: sha256 must be 64 hexadecimal digits, not {reprlib.repr(digest)}")
        found.append(Kept(name, nbytes, digest))
    for name, count in Counter(kept.name for kept in found).items():
        if count > 1:
            fields.refuse("files", f"{name} is given twice")
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------
# Formats, written as a config.json of MLX does: one for all matrices, and another, or false, by name where it differs


def _formats_to_json(quantization: Mapping[str, Quantization | None], config: ModelConfig) -> dict[str, Any] | None:
    matrices = {module.name: quantization.get(module.name) for module in modules(config).values() if module.is_matrix}
    if not any(matrices.values()):
        return None
    [(base, _)] = Counter(filter(None, matrices.values())).most_common(1)
    differing = {name: asdict(own) if own else False for name, own in matrices.items() if own != base}
    return asdict(base) | differing


def _formats_from_json(fields: _Fields, config: ModelConfig) -> dict[str, Quantization | None]:
    """Module -> format, of those that are quantised."""
    written = fields.take("quantization", lambda v: v is None or isinstance(v, dict), "a format or null")
    if written is None:
        return {}
    names = [f for f in Quantization.__dataclass_fields__]
    base = _format(fields, "quantization", {name: written[name] for name in names if name in written})
    matrices = {module.name: module.shape[-1] for module in modules(config).values() if module.is_matrix}
    formats: dict[str, Quantization | None] = dict.fromkeys(matrices, base)
    for name, value in written.items():
        if name in names:
            continue
        if name not in matrices:
            fields.refuse("quantization", f"{reprlib.repr(name)} is no matrix of this model")
        formats[name] = None if value is False else _format(fields, f"quantization: {name}", value)
    for name, own in formats.items():
        if own and matrices[name] % own.group_size:
            fields.refuse("quantization", f"{name}: rows of {matrices[name]} are no whole groups of {own.group_size}")
    return {name: own for name, own in formats.items() if own}


def _format(fields: _Fields, name: str, value: Any) -> Quantization:
    """A format that MLX has."""
    if not isinstance(value, dict) or set(value) != set(Quantization.__dataclass_fields__):
        fields.refuse(name, f"must have a mode, bits and a group_size, and nothing else, not {reprlib.repr(value)}")
    mode, bits, group_size = value["mode"], value["bits"], value["group_size"]
    known = isinstance(mode, str) and mode in MODES
    try:
        if known and type(bits) is int and type(group_size) is int and bits > 0 and group_size > 0:
            if wanted := quantization_of(mode, bits, group_size):
                return wanted
    except PlanError:
        pass
    fields.refuse(name, f"MLX has no {reprlib.repr(mode)} with {reprlib.repr(bits)} bits in {reprlib.repr(group_size)}")
