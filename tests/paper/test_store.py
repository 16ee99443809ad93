"""The store: manifests are distrusted, entries come and go whole, damage is found and named, and what the verbs say."""

import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import mxfp8, published, random_tensors, tiny_config

from m3dist import cli
from m3dist.checkpoint import open_checkpoint
from m3dist.config import ModelConfig
from m3dist.errors import StoreError
from m3dist.fetch import store
from m3dist.fetch.manifest import LARGEST_MANIFEST, MANIFEST, Kept, Manifest, now, read_manifest
from m3dist.fetch.store import Broken, Entry, Problem, Unfinished
from m3dist.fetch.target import slice_of
from m3dist.plan import Plan, make_plan
from m3dist.plan_report import PUBLISHED
from m3dist.quantization import Recipe, converted, requantised
from m3dist.tensors import Inventory, Quantization

MODEL, COMMIT = "owner/name", "0123456789abcdef0123456789abcdef01234567"
FOUR_BITS = Quantization("affine", 4, 32)
CONFIG = tiny_config(num_hidden_layers=2)
INVENTORY = Inventory(ModelConfig.from_dict(CONFIG), "BF16")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("M3DIST_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def fill(work: Path, plan: Plan, rank: int, seed: int = 0) -> None:
    """A finished work directory: what `rank` holds, with random contents, and two files of the checkpoint's."""
    work.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for file in slice_of(plan, rank):
        (work / file.name).write_bytes(file.header + generator.randbytes(file.nbytes - len(file.header)))
    (work / "config.json").write_text(json.dumps(CONFIG))
    (work / "tokenizer.json").write_text(str(seed))


def keep(plan: Plan | None = None, rank: int = 0, model: str = MODEL, revision: str = COMMIT, seed: int = 0) -> Entry:
    """Make an entry as a fetch does."""
    plan = plan or make_plan(INVENTORY, 1)
    where = store.place(model, revision, plan.digest, rank, plan.world)
    with store.locked(where):
        work = store.work_directory(where)
        fill(work, plan, rank, seed)
        store.seal(work, model=model, revision=revision, config=CONFIG, plan=plan, rank=rank)
        store.publish(work, where)
    return Entry(where, read_manifest(where))


def weights_of(entry: Entry) -> Path:
    return next(entry.directory.glob("*.safetensors"))


def damage(path: Path) -> None:
    """Another byte at the end."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------------
# Places


def test_the_root(monkeypatch, tmp_path):
    assert store.root() == tmp_path / "store"
    monkeypatch.setenv("M3DIST_STORE", "here/../store")
    assert store.root() == Path.cwd() / "store"
    monkeypatch.setenv("M3DIST_STORE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store.root() == tmp_path / "cache" / "m3dist" / "store"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.root() == tmp_path / ".cache" / "m3dist" / "store"


def test_a_place_for_each_entry(root):
    digest = "0" * 64
    place = store.place(MODEL, COMMIT, digest, 1, 2)
    assert place.parent.parent == root / "owner--name" and place.name == "rank-1-of-2"
    others = [
        store.place(*arguments, 1, 2)
        for arguments in (("owner/other", COMMIT, digest), (MODEL, "f" * 40, digest), (MODEL, COMMIT, "1" * 64))
    ]
    assert len({place, *others}) == 4


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("MiniMaxAI/MiniMax-M3", "MiniMaxAI--MiniMax-M3"),
        ("/models/M3", "+models--M3"),
        ("/", "+model"),
        ("/../..", "+model"),
        ("../../x\n\0y", "x--y"),
        ("/" + "a" * 300 + "/M3", "+" + "a" * 76 + "--M3"),
    ],
)
def test_a_model_is_one_plain_directory_name(model, slug):
    assert store.slug(model) == slug


# ---------------------------------------------------------------------------------------------------------------------
# Manifests


def manifest_of(plan: Plan, config: dict = CONFIG) -> Manifest:
    formats = {name: own for name, own in plan.inventory.quantization.items() if own}
    files = (Kept("a.safetensors", 10, "0" * 64), Kept("config.json", 5, "1" * 64))
    cut = (plan.weights, plan.experts, plan.attention, 0)
    return Manifest(MODEL, COMMIT, config, plan.inventory.dtype, formats, *cut, plan.digest, files, now())


def through_json(manifest: Manifest) -> Manifest:
    return Manifest.from_json(json.loads(json.dumps(manifest.to_json())), Path(MANIFEST))


def mixed() -> Inventory:
    """Four bits but for some: another format, none, and the router's."""
    overrides = (("*.o_proj", Quantization("affine", 6, 64)), ("*lm_head", None))
    return requantised(INVENTORY, Recipe(FOUR_BITS, overrides))


@pytest.mark.parametrize(
    "inventory",
    [
        INVENTORY,
        Inventory(INVENTORY.config, "F16"),
        converted(INVENTORY.config, FOUR_BITS),
        converted(INVENTORY.config, Quantization("mxfp4", 4, 32)),
        mixed(),
    ],
)
def test_a_manifest_says_again_what_it_was_made_of(inventory):
    for cut in ((1,), (2,), ((2, 1.5), "columns", "replicated"), (3, "whole")):
        plan = make_plan(inventory, *cut)
        manifest = manifest_of(plan)
        assert through_json(manifest) == manifest
        assert through_json(manifest).make_plan().digest == plan.digest
    assert manifest.inventory().specs() == inventory.specs()
    assert manifest.expert_format == inventory.quantization.get("language_model.model.layers.1.block_sparse_moe"
                                                                ".switch_mlp.down_proj")  # fmt: skip


def test_of_a_published_checkpoint_in_mxfp8(tmp_path):
    directory = mxfp8(tmp_path / "mxfp8", CONFIG, random_tensors(CONFIG))
    checkpoint = open_checkpoint(directory)
    plan = make_plan(checkpoint.translate().inventory, 2)
    manifest = manifest_of(plan, dict(checkpoint.raw_config))
    assert through_json(manifest).make_plan().digest == plan.digest
    assert str(manifest.expert_format) == "mxfp8 8-bit, group 32"


def test_the_real_models_manifest_is_small():
    config = json.loads((PUBLISHED / "MiniMax-M3.json").read_text())
    plan = make_plan(converted(ModelConfig.from_dict(config), Quantization("affine", 4, 64)), 4)
    manifest = manifest_of(plan, config)
    assert len(json.dumps(manifest.to_json(), indent=1)) < 16_000
    assert through_json(manifest).make_plan().digest == plan.digest


def test_a_model_without_experts_has_a_format_too():
    config = tiny_config(num_hidden_layers=1)
    plan = make_plan(converted(ModelConfig.from_dict(config), FOUR_BITS), 1)
    assert manifest_of(plan, config).expert_format == FOUR_BITS


def content(**changes) -> dict:
    """A manifest's JSON of a quantised model, with changes."""
    return manifest_of(make_plan(converted(INVENTORY.config, FOUR_BITS), 2)).to_json() | changes


def config_with(**fields) -> dict:
    return CONFIG | {"text_config": CONFIG["text_config"] | fields}


FORMAT = {"mode": "affine", "bits": 4, "group_size": 32}
HEAD = "language_model.lm_head"
FILE = {"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64}
BAD = [
    ("format", 2, "must be 1, which this m3dist reads, not 2"),
    ("format", True, "must be 1"),
    ("model", "", "must be a line of text, not ''"),
    ("model", "a\x1b[2J", "must be a line of text"),
    ("model", ["a"], "must be a line of text"),
    ("revision", "main", "must be a commit, or files- and a sha256, not 'main'"),
    ("revision", COMMIT + "\n", "must be a commit"),
    ("created", "yesterday", "must be a time in UTC"),
    ("created", "2026-01-31T12:00:00.000000+02:00", "must be a time in UTC"),
    ("created", 10**300, "must be a time in UTC"),
    ("rank", 2, "must be one of the ranks, from 0, not 2"),
    ("rank", -1, "must be one of the ranks"),
    ("rank", True, "must be one of the ranks"),
    ("rank", 0.0, "must be one of the ranks"),
    ("weights", [], "must be 1 to 16 positive numbers"),
    ("weights", [1.0] * 17, "must be 1 to 16 positive numbers"),
    ("weights", [1.0, 0], "must be 1 to 16 positive numbers"),
    ("weights", [1.0, float("nan")], "must be 1 to 16 positive numbers"),
    ("weights", [1.0, float("inf")], "must be 1 to 16 positive numbers"),
    ("weights", [1.0, 10**400], "must be 1 to 16 positive numbers"),
    ("weights", [1.0, "1"], "must be 1 to 16 positive numbers"),
    ("weights", 2, "must be 1 to 16 positive numbers"),
    ("experts", "rows", "must be one of columns, whole, not 'rows'"),
    ("attention", ["heads"], "must be one of heads, replicated"),
    ("plan", "0" * 63, "must be a sha256"),
    ("dtype", "U8", "must be one of BF16, F16, F32"),
    ("quantization", [], "must be a format or null, not []"),
    ("quantization", {}, "must have a mode, bits and a group_size, and nothing else, not {}"),
    ("quantization", FORMAT | {"mode": "int4"}, "MLX has no 'int4' with 4 bits in 32"),
    ("quantization", FORMAT | {"mode": []}, "MLX has no [] with 4 bits"),
    ("quantization", FORMAT | {"bits": 7}, "MLX has no 'affine' with 7 bits"),
    ("quantization", FORMAT | {"bits": 4.0}, "MLX has no 'affine' with 4.0 bits"),
    ("quantization", FORMAT | {"bits": 0}, "MLX has no 'affine' with 0 bits"),
    ("quantization", FORMAT | {"group_size": 10**30}, "MLX has no 'affine' with 4 bits in 1000"),
    ("quantization", FORMAT | {"mode": "mxfp4", "group_size": 64}, "MLX has no 'mxfp4' with 4 bits in 64"),
    ("quantization", FORMAT | {"../x": FORMAT}, "'../x' is no matrix of this model"),
    ("quantization", FORMAT | {"language_model.model.norm": FORMAT}, "norm' is no matrix of this model"),
    ("quantization", FORMAT | {"group_size": 128}, "model.embed_tokens: rows of 64 are no whole groups of 128"),
    (f"quantization: {HEAD}", FORMAT | {HEAD: True}, "must have a mode, bits and a group_size"),
    (f"quantization: {HEAD}", FORMAT | {HEAD: {"bits": 4}}, "must have a mode, bits and a group_size"),
    (f"quantization: {HEAD}", FORMAT | {HEAD: FORMAT | {"bits": 9}}, "MLX has no 'affine' with 9 bits"),
    ("files", [], "must be a list of files, not []"),
    ("files", {"name": 1}, "must be a list of files"),
    ("files", ["a"], "each has a name, bytes and a sha256, not 'a'"),
    ("files", [FILE | {"mode": 0o4755}], "each has a name, bytes and a sha256"),
    ("files", [FILE | {"name": "../../.ssh/config"}], "'../../.ssh/config' is no plain file name"),
    ("files", [FILE | {"name": "/etc/passwd"}], "'/etc/passwd' is no plain file name"),
    ("files", [FILE | {"name": "a/b"}], "'a/b' is no plain file name"),
    ("files", [FILE | {"name": ".."}], "'..' is no plain file name"),
    ("files", [FILE | {"name": ".zshrc"}], "'.zshrc' is no plain file name"),
    ("files", [FILE | {"name": ""}], "'' is no plain file name"),
    ("files", [FILE | {"name": "a\nb"}], "is no plain file name"),
    ("files", [FILE | {"name": "a\0b"}], "is no plain file name"),
    ("files", [FILE | {"name": "a" * 256}], "is no plain file name"),
    ("files", [FILE | {"name": "\ud800"}], "is no plain file name"),
    ("files", [FILE | {"name": 7}], "7 is no plain file name"),
    ("files", [FILE | {"name": "Manifest.json"}], "'Manifest.json' is no plain file name"),
    ("files", [FILE, FILE | {"bytes": 2}], "a.safetensors is given twice"),
    ("files", [FILE | {"bytes": -1}], "a.safetensors: bytes must be a size, not -1"),
    ("files", [FILE | {"bytes": 10**30}], "a.safetensors: bytes must be a size, not 1000"),
    ("files", [FILE | {"bytes": 1.0}], "a.safetensors: bytes must be a size, not 1.0"),
    ("files", [FILE | {"sha256": "x"}], "a.safetensors: sha256 must be 64 hexadecimal digits, not 'x'"),
    ("files", [FILE | {"sha256": None}], "a.safetensors: sha256 must be 64 hexadecimal digits, not None"),
    ("config", [], "must be a JSON object, not []"),
    ("config", {}, "config.json: model_type None is not MiniMax-M3"),
    ("config", CONFIG | {"text_config": 1}, "config.json: text_config must be an object"),
    ("config", config_with(head_dim="32"), "config.json: head_dim must be an integer"),
    ("config", config_with(vocab_size=10**30), "1000000000000000000000000000000 is too large a number"),
    ("config", config_with(rope_theta=float("inf")), "inf is too large a number"),
    ("config", config_with(num_hidden_layers=10**9), "1000000000 layers are too many; at most 1000 are read"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_what_no_manifest_says(field, value, message):
    with pytest.raises(StoreError) as raised:
        Manifest.from_json(content(**{field.partition(":")[0]: value}), Path("/s/manifest.json"))
    said = str(raised.value)
    assert said.startswith(f"/s/manifest.json: {field}: ") and message in said
    assert said.endswith("; `m3dist fetch MODEL` makes this entry anew") and len(said) < 300


@pytest.mark.parametrize("field", sorted(content()))
def test_a_field_is_missing(field):
    rest = content()
    del rest[field]
    with pytest.raises(StoreError, match=f"manifest.json: {field}: is missing; "):
        Manifest.from_json(rest, Path(MANIFEST))


def test_a_field_is_unknown():
    with pytest.raises(StoreError, match=r"manifest.json: 'run\\n': is no field of a manifest; "):
        Manifest.from_json(content(**{"run\n": "rm"}), Path(MANIFEST))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no valid JSON: Expecting value"),
        (b"\xff\xfe", "no valid JSON: 'utf-8' codec"),
        (b"[" * 100_000, "no valid JSON: "),
        (b"9" * 5000, "no valid JSON: Exceeds the limit"),
        (b'{"rank": 0, "a": 1, "rank": 1}', "no valid JSON: 'rank' is given twice"),
        (b"[1, 2]", "must hold a JSON object, not [1, 2]"),
        (b" " * (LARGEST_MANIFEST + 1), f"has more than {LARGEST_MANIFEST} bytes, which no manifest has"),
    ],
)
def test_a_file_that_is_no_manifest(tmp_path, data, message):
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(StoreError) as raised:
        read_manifest(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / MANIFEST}: {message}")
    assert str(raised.value).endswith("; `m3dist fetch MODEL` makes this entry anew")


def test_there_is_no_manifest(tmp_path):
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path / MANIFEST}: No such file or directory; `m3dist fetch")):
        read_manifest(tmp_path)


def test_a_plan_that_is_another(tmp_path):
    other = Manifest.from_json(content(plan="f" * 64), Path(MANIFEST))
    with pytest.raises(StoreError, match="^manifest.json: plan: ffffffffffff is not what this m3dist makes of its"):
        other.make_plan()
    narrow = Manifest.from_json(content(weights=[1.0] * 5), Path(MANIFEST))
    with pytest.raises(StoreError, match=r"^manifest.json: plan: the \w+ columns make \d whole quantisation groups"):
        narrow.make_plan()


# ---------------------------------------------------------------------------------------------------------------------
# Entries


def test_an_entry_is_found_again(root, tmp_path):
    source = published(tmp_path / "source", CONFIG, random_tensors(CONFIG))
    plan = make_plan(open_checkpoint(source).translate().inventory, 2)
    kept = [keep(plan, rank) for rank in (0, 1)] + [keep(model="/models/owner/name", revision="files-" + "0" * 64)]
    assert list(store.entries(MODEL)) == kept[:2]
    assert sorted(store.entries(), key=lambda entry: entry.directory) == sorted(kept, key=lambda e: e.directory)
    assert list(store.entries("owner/other")) == list(store.unfinished()) == []
    assert [store.verify(entry) for entry in kept] == [[], [], []]
    assert not [name for name in everything(root) if ".partial" in name or ".lock" in name]


def test_candidates(monkeypatch):
    cuts = [(2,), ((2, 1),), (2, "whole"), (2, "columns", "replicated")]
    plans = [make_plan(INVENTORY, *cut) for cut in cuts]
    four_bits = make_plan(converted(INVENTORY.config, FOUR_BITS), 2)
    equal, *others = [keep(plan, 1) for plan in plans]
    keep(plans[0], 0)
    newer, quantised = keep(plans[0], 1, revision="f" * 40), keep(four_bits, 1)

    def found(**asked) -> list[Path]:
        usual = {"world": 2, "weights": None, "experts": "columns", "attention": "heads", "rank": 1}
        return [entry.directory for entry in store.candidates(MODEL, **usual | asked)]

    assert found() == [quantised.directory, newer.directory, equal.directory]
    assert found(weights=(3, 3)) == found()  # the cut counts, not the numbers it was asked for with
    assert found(quantization=FOUR_BITS) == [quantised.directory]
    assert found(revision=COMMIT) == [quantised.directory, equal.directory]
    assert found(weights=(2, 1)) == found(weights=(4, 2)) == [others[0].directory]
    assert found(experts="whole") == [others[1].directory]
    assert found(attention="replicated") == [others[2].directory]
    assert found(world=3) == found(weights=(1, 2)) == found(quantization=Quantization("affine", 4, 64)) == []
    (quantised.directory / MANIFEST).write_text("{")
    assert found() == [newer.directory, equal.directory]


def test_a_manifest_that_cannot_be_used(root):
    entry = keep()
    (entry.directory / MANIFEST).write_text("{}")
    [broken] = store.entries(MODEL)
    assert broken == Broken(entry.directory, f"{entry.directory / MANIFEST}: format: is missing; "
                            "`m3dist fetch MODEL` makes this entry anew")  # fmt: skip
    assert broken.nbytes >= entry.nbytes
    assert list(store.entries("owner/other")) == []
    assert keep() == next(store.entries(MODEL))  # a fetch puts another in its place


def test_what_is_no_entry_is_not_looked_at(root, tmp_path):
    entry = keep()
    key = entry.directory.parent
    for name in ("rank-0-of-1.backup", "notes", "rank-x-of-1"):
        (key / name).mkdir()
    (root / "file").touch()
    (key / "rank-1-of-2").symlink_to(tmp_path)
    (root / "linked").symlink_to(entry.directory.parent.parent)
    assert list(store.entries()) == [entry] and list(store.unfinished()) == []


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 100), "has 100 bytes, not {size}"),
        (lambda path: path.open("ab").write(b"x"), "has {more} bytes, not {size}"),
        (lambda path: (path.rename(path.parent / ".aside"), path.symlink_to(".aside")), "is no regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no regular file"),
    ],
)
def test_what_a_look_shows(harm, what):
    entry = keep(make_plan(INVENTORY, 2), 1)
    path = weights_of(entry)
    size = path.stat().st_size
    harm(path)
    problems = [Problem(path.name, what.format(size=size, more=size + 1))]
    assert store.check(entry) == store.verify(entry) == problems
    assert str(problems[0]).startswith("model-00001-of-00001.safetensors: ")


def test_foreign_files_are_named():
    entry = keep()
    (entry.directory / "extra.safetensors").touch()
    (entry.directory / ".DS_Store").touch()
    assert store.check(entry) == [Problem("extra.safetensors", "is none of the entry's files")]


def rewrite_header(entry: Entry, change) -> Entry:
    """The entry with `change` made to its safetensors header, in the room it has, and a manifest to match."""
    path = weights_of(entry)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])
    return entry


def test_other_tensors_than_the_plans():
    norm = "language_model.model.norm.weight"
    entry = rewrite_header(keep(), lambda header: header[norm].update(dtype="F16"))
    what = f"{norm} [64] F16 is not what this rank holds of it, or is twice here"
    assert store.check(entry) == [Problem(weights_of(entry).name, what)]
    rewrite_header(entry, lambda header: header[norm].update(dtype="BF16", data_offsets=[0, 9]))
    [problem] = store.check(entry)
    assert problem.what.startswith(f"{norm}: BF16 [64] takes 128 bytes, data_offsets give")


def test_tensors_that_are_nowhere():
    entry = keep()
    weights_of(entry).unlink()
    files = tuple(kept for kept in entry.manifest.files if kept.name.endswith(".json"))
    bare = Entry(entry.directory, replace(entry.manifest, files=files))
    count = len(make_plan(INVENTORY, 1).specs)
    what = f"{count} tensors of this rank are in none of the files, language_model.model.embed_tokens.weight first"
    assert store.check(bare) == [Problem(MANIFEST, what)]


def test_an_entry_of_another_plan():
    entry = keep()
    other = Entry(entry.directory, replace(entry.manifest, plan="0" * 64))
    [problem] = store.check(other)
    assert problem.file == MANIFEST and problem.what.startswith("plan: 000000000000 is not what this m3dist makes")


def test_verify_reads_everything():
    entry = keep()
    said = []
    assert store.verify(entry, said.append) == []
    assert said[-1].done == said[-1].total == entry.nbytes == sum(k.nbytes for k in entry.manifest.files)
    assert [progress.done for progress in said] == sorted({progress.done for progress in said})
    damage(weights_of(entry))
    damage(entry.directory / "tokenizer.json")
    assert store.check(entry) == []
    problems = store.verify(entry)
    assert [problem.file for problem in problems] == [weights_of(entry).name, "tokenizer.json"]
    whole = {kept.name: kept.sha256 for kept in entry.manifest.files}
    for problem in problems:
        match = re.fullmatch("has other contents: their sha256 is ([0-9a-f]{64}), not ([0-9a-f]{64})", problem.what)
        assert match[2] == whole[problem.file] != match[1]


def test_several_pieces_in_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "HASHED", 1000)
    entry = keep(make_plan(INVENTORY, 3), 2)
    assert store.verify(entry) == [] == store.verify(entry, threads=1)


# ---------------------------------------------------------------------------------------------------------------------
# Coming into being


def test_seal_takes_plain_files_only(tmp_path):
    plan, work = make_plan(INVENTORY, 1), tmp_path / "work"
    fill(work, plan, 0)
    facts = {"model": MODEL, "revision": COMMIT, "config": CONFIG, "plan": plan, "rank": 0}
    (work / ".DS_Store").touch()
    manifest = store.seal(work, **facts)
    assert [kept.name for kept in manifest.files] == ["config.json", "model-00001-of-00001.safetensors",
                                                      "tokenizer.json"]  # fmt: skip
    assert read_manifest(work) == manifest
    (work / "link").symlink_to("config.json")
    with pytest.raises(StoreError, match=re.escape(f"{work / 'link'}: an entry holds plain files only")):
        store.seal(work, **facts)
    (work / "link").unlink()
    with pytest.raises(StoreError, match="revision: must be a commit"):
        store.seal(work, **facts | {"revision": "main"})
    with pytest.raises(StoreError, match="is not what this m3dist makes of its config"):
        store.seal(work, **facts | {"config": tiny_config(num_hidden_layers=3)})
    with pytest.raises(StoreError, match=re.escape(f"{tmp_path / 'none'}: No such file or directory")):
        store.seal(tmp_path / "none", **facts)
    assert read_manifest(work) == manifest


def test_only_what_is_sealed_is_published(root):
    plan = make_plan(INVENTORY, 1)
    where = store.place(MODEL, COMMIT, plan.digest, 0, 1)
    fill(store.work_directory(where), plan, 0)
    with pytest.raises(StoreError, match=re.escape(f"{MANIFEST}: No such file or directory")):
        store.publish(store.work_directory(where), where)
    assert list(store.entries()) == []
    assert list(store.unfinished(MODEL)) == [Unfinished(store.work_directory(where))]


def test_no_room_to_write(root):
    root.write_text("in the way")
    where = store.place(MODEL, COMMIT, "0" * 64, 0, 1)
    with pytest.raises(StoreError, match="Not a directory; M3DIST_STORE names another directory for the store"):
        with store.locked(where):
            pass


def test_a_lock_leaves_nothing_behind(root):
    where = store.place(MODEL, COMMIT, "0" * 64, 0, 1)
    with store.locked(where):
        assert everything(root)[-1].endswith("rank-0-of-1.lock")
        assert store.holder(where) == os.getpid()
        with pytest.raises(StoreError) as raised:
            with store.locked(where):
                pass
        said = f"{where} is being fetched or removed by process {os.getpid()}; wait until it has ended"
        assert str(raised.value) == said
    assert store.holder(where) is None
    assert everything(root) == []


def in_child(step) -> int:
    """Run `step` in a fork of this process; how it ended."""
    child = os.fork()
    if not child:
        try:
            step()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, step) -> bool:
    """Run `step` in a process that is killed before its `number`th file operation; False where it has fewer."""

    def counted() -> None:
        left = number

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.", "fcntl.")):
                left -= 1
                if left == -1:  # not at its own event, os.kill
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        step()

    return in_child(counted) == -signal.SIGKILL


def states() -> list[str]:
    """The tokenizer.json of every entry, each of which is intact."""
    found = list(store.entries())
    assert all(isinstance(entry, Entry) and store.verify(entry) == [] for entry in found)
    return [(entry.directory / "tokenizer.json").read_text() for entry in found]


def finish(seed: int) -> None:
    """The last steps of a fetch, whose work directory is filled."""
    plan = make_plan(INVENTORY, 1)
    where = store.place(MODEL, COMMIT, plan.digest, 0, 1)
    with store.locked(where):
        work = store.work_directory(where)
        store.seal(work, model=MODEL, revision=COMMIT, config=CONFIG, plan=plan, rank=0)
        store.publish(work, where)


@pytest.mark.parametrize("old", [[], ["1"]])
def test_killed_before_each_step_of_a_publication(root, old):
    """There is the old entry or the new one; the next fetch comes through, and leaves nothing else."""
    plan = make_plan(INVENTORY, 1)
    where = store.place(MODEL, COMMIT, plan.digest, 0, 1)
    number, seen = 0, set()
    while True:
        for seed in old:
            keep(seed=int(seed))
        fill(store.work_directory(where), plan, 0, seed=2)
        if not killed_at(number, lambda: finish(2)):
            break
        left = states()
        seen.add(tuple(left))
        with store.locked(where):
            assert where.exists() == bool(left)
        assert states() == left
        keep(seed=3)
        assert states() == ["3"]
        assert os.listdir(where.parent) == [where.name]
        store.remove(next(store.entries()))
        assert everything(root) == []
        number += 1
    assert seen == {tuple(old), ("2",)} and number > 20


def test_killed_before_each_step_of_a_removal(root):
    """The entry is there or it is not; to remove what is left leaves nothing."""
    number, seen = 0, set()
    while True:
        entry = keep(seed=1)
        if not killed_at(number, lambda entry=entry: store.remove(entry)):
            break
        seen.add(tuple(states()))
        for found in (*store.entries(), *store.unfinished()):
            store.remove(found)
        assert [name for name in everything(root) if "." in name and ".lock" not in name] == []
        number += 1
    assert seen == {("1",), ()} and number > 8


def test_killed_at_random_moments(root):
    """A process that publishes again and again; what it last said it had published, or the next, is there."""
    generator = random.Random(5)
    last = 0
    for _ in range(20):
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            try:
                for seed in range(last + 1, last + 1000):
                    keep(seed=seed)
                    os.write(theirs, b"%d " % seed)
            finally:
                os._exit(0)
        os.close(theirs)
        with open(ours) as said:
            first = said.read(1)
            time.sleep(generator.random() / 20)
            os.kill(child, signal.SIGKILL)
            last = max(map(int, (first + said.read()).split()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        [found] = map(int, states())
        assert found in (last, last + 1)
        last = found


# ---------------------------------------------------------------------------------------------------------------------
# Locks between processes


@pytest.fixture
def fetching(root):
    """A process that holds the lock of an unfinished entry: its place, and its number."""
    where = store.place(MODEL, COMMIT, "0" * 64, 0, 2)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            with store.locked(where):
                store.work_directory(where).mkdir()
                (store.work_directory(where) / "model.safetensors").write_bytes(bytes(5000))
                os.write(theirs, b".")
                time.sleep(60)
        finally:
            os._exit(0)
    os.close(theirs)
    assert os.read(ours, 1)
    os.close(ours)
    yield where, child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_fetch_is_refused(fetching):
    where, child = fetching
    assert store.holder(where) == child
    with pytest.raises(StoreError, match=f"rank-0-of-2 is being fetched or removed by process {child}; wait until"):
        with store.locked(where):
            pass
    with store.locked(where.with_name("rank-1-of-2")):  # the rank beside it
        pass
    [left] = store.unfinished()
    with pytest.raises(StoreError, match=f"process {child}"):
        store.remove(left)
    assert left.directory.exists()


def test_a_killed_process_holds_nothing(root):
    where = store.place(MODEL, COMMIT, "0" * 64, 0, 2)

    def die() -> None:
        with store.locked(where):
            store.work_directory(where).mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert store.holder(where) is None and where.with_name("rank-0-of-2.lock").exists()
    with store.locked(where):
        assert store.holder(where) == os.getpid()
    assert os.listdir(where.parent) == ["rank-0-of-2.partial"]


def test_ranks_of_one_machine_beside_each_other(root):
    """They share the directory above theirs, which each makes, and takes away when it is empty."""
    places = [store.place(MODEL, COMMIT, "0" * 64, rank, 4) for rank in range(4)]

    def again_and_again(place: Path) -> None:
        for _ in range(40):
            with store.locked(place):
                store.work_directory(place).mkdir()
                store.work_directory(place).rmdir()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(again_and_again, places))
    assert everything(root) == []


def test_one_lock_at_a_time(root, tmp_path, monkeypatch):
    """However often the lock's file is made and taken away."""
    monkeypatch.setattr(store, "LOCK_PAUSE", 0.0)  # so that the processes are always at it
    place, inside, until = store.place(MODEL, COMMIT, "0" * 64, 0, 1), tmp_path / "inside", time.monotonic() + 1

    def again_and_again() -> None:
        while time.monotonic() < until:
            try:
                with store.locked(place):
                    try:
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        os.kill(os.getpid(), signal.SIGTERM)
                    inside.unlink()
            except StoreError:
                pass

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(in_child, [again_and_again] * 4)) == [0] * 4


def test_who_only_looks_is_in_nobodys_way(root):
    where = store.place(MODEL, COMMIT, "0" * 64, 0, 1)
    lock = where.with_name("rank-0-of-1.lock")
    where.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert store.holder(where) is None  # two that look
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(lambda: store.locked(where).__enter__())
            time.sleep(0.06)
            fcntl.flock(file, fcntl.LOCK_UN)
            taken.result()  # it tried again


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of m3dist store."""
    try:
        status = cli.main(["store", *argv])
    except SystemExit as exit:
        status = exit.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_nothing_is_kept(capsys, root):
    assert run(capsys, "ls") == (0, f"Nothing is kept in {root}.\n", "")
    assert run(capsys, "verify") == (0, f"Nothing is kept in {root}.\n", "")
    assert run(capsys, "ls", "--json")[:2] == (0, json.dumps({"root": str(root), "kept": []}) + "\n")


def rows(out: str) -> list[list[str]]:
    """The cells of a table's lines."""
    return [[cell.strip() for cell in line.split("│")] for line in out.replace("┃", "│").splitlines() if "│" in line]


def test_ls(capsys, root, fetching):
    where, child = fetching
    keep(make_plan(converted(INVENTORY.config, FOUR_BITS), 2), 1)
    keep(make_plan(INVENTORY, (2, 1), "whole", "replicated"), 0, model="/m/[red]", revision="files-" + "ab" * 32)
    status, out, err = run(capsys, "ls")
    assert (status, err) == (0, "")
    today = now()[:10]
    head, files, *_ = rows(out)
    ours, four_bits = sorted(rows(out)[-2:])
    assert head == ["model", "revision", "format", "plan", "size", "state", "created"]
    assert files[:3] + files[5:] == ["/m/[red]", "abababab", "BF16", "intact", today]
    assert (
        " ".join(row[3] for row in rows(out)[1:-2]) == "rank 0 of 2, weights 2,1, experts whole, attention replicated"
    )
    assert four_bits[:4] == [MODEL, "01234567", "affine 4-bit, group 32", "rank 1 of 2"]
    assert four_bits[5:] == ["intact", today]
    assert ours[0] == MODEL and ours[3:] == ["rank 0 of 2", "8.2 kB", "unfinished", ""]
    assert f"{MODEL}, rank 0 of 2: process {child} is fetching or removing it" in out.splitlines()
    assert f"in {root}. Sizes and headers were looked at; m3dist store verify reads all." in " ".join(out.split())


def test_ls_of_what_is_damaged(capsys):
    entry, broken = keep(), keep(make_plan(INVENTORY, 2), 1)
    weights_of(entry).unlink()
    (entry.directory / "extra").touch()
    (broken.directory / MANIFEST).write_text("{}")
    status, out, _ = run(capsys, "ls")
    assert status == 1 and [row[5] for row in rows(out)[1:]] == ["damaged"] * 2
    assert f"{MODEL}, rank 0 of 1: model-00001-of-00001.safetensors: is missing" in out.splitlines()
    assert f"{MODEL}, rank 0 of 1: extra: is none of the entry's files" in out.splitlines()
    status, out, _ = run(capsys, "ls", "--json")
    assert status == 1
    one, other = sorted(json.loads(out)["kept"], key=lambda line: line["directory"] != str(entry.directory))
    name = "model-00001-of-00001.safetensors"
    assert one == {
        "model": MODEL, "revision": COMMIT, "format": "BF16", "plan": entry.manifest.plan, "rank": 0, "world": 1,
        "weights": [1.0], "experts": "columns", "attention": "heads", "created": entry.manifest.created,
        "bytes": entry.nbytes, "state": "damaged",
        "problems": [f"{name}: is missing", "extra: is none of the entry's files"],
        "process": None, "directory": str(entry.directory),
    }  # fmt: skip
    assert (other["model"], other["state"], "plan" in other) == (MODEL, "damaged", False)
    assert other["problems"][0].startswith(f"{broken.directory / MANIFEST}: format: is missing; `m3dist fetch MODEL`")


def test_verify(capsys):
    one, two = keep(), keep(make_plan(converted(INVENTORY.config, FOUR_BITS), (2, 1)), 1)
    status, out, err = run(capsys, "verify", MODEL)
    assert status == 0 and sorted(out.splitlines()) == [
        f"{MODEL}, rank 0 of 1: intact, {one.nbytes / 1000:.1f} kB",
        f"{MODEL}, rank 1 of 2, weights 2,1: intact, {two.nbytes / 1000:.1f} kB",
    ]
    assert f"{MODEL}, rank 0 of 1: " in err  # how far it is
    damage(weights_of(two))
    os.truncate(two.directory / "config.json", 3)
    status, out, _ = run(capsys, "verify")
    assert status == 1
    first, *problems, remedy = [line for line in out.splitlines() if "rank 0 of 1" not in line]
    assert first == f"{MODEL}, rank 1 of 2, weights 2,1: damaged, in {two.directory}"
    assert problems[0] == f"  config.json: has 3 bytes, not {len(json.dumps(CONFIG))}"
    assert problems[1].startswith("  model-00001-of-00001.safetensors: has other contents: their sha256 is ")
    flags = "--world 2 --rank 1 --weights 2,1 --mode affine --bits 4 --group-size 32"
    assert remedy == f"  => m3dist fetch {MODEL}@{COMMIT} {flags}"


def test_verify_of_a_broken_manifest(capsys):
    entry = keep()
    (entry.directory / MANIFEST).unlink()
    status, out, _ = run(capsys, "verify", MODEL)
    assert status == 1 and out.splitlines() == [
        f"{MODEL}, rank 0 of 1: damaged, in {entry.directory}",
        f"  {entry.directory / MANIFEST}: No such file or directory; `m3dist fetch MODEL` makes this entry anew",
        f"  => m3dist store rm {entry.directory}",
    ]


def test_a_model_and_its_commit(capsys):
    keep(), keep(revision="f" * 40)
    assert run(capsys, "verify", f"{MODEL}@fff")[1].count("intact") == 1
    assert run(capsys, "verify", MODEL)[1].count("intact") == 2
    status, _, err = run(capsys, "verify", f"{MODEL}@main")
    assert (status, "nothing of it is kept in" in err) == (2, True)


def test_a_directory_is_named_as_it_was_fetched(capsys, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    keep(model=str(tmp_path / "models"), revision="files-" + "0" * 64)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "verify", "models")[0] == run(capsys, "verify", str(tmp_path / "models"))[0] == 0


def test_rm(capsys, root):
    one, other = keep(), keep(model="owner/other")
    store.work_directory(one.directory).mkdir()
    status, out, _ = run(capsys, "rm", MODEL, "--yes")
    size = f"{one.nbytes / 1000:.1f} kB"
    assert (status, out.splitlines()) == (0, [
        f"{MODEL}, rank 0 of 1, intact, {size}, in {one.directory}",
        f"{MODEL}, rank 0 of 1, unfinished, 0 bytes, in {one.directory}.partial",
        f"Removed {size}.",
    ])  # fmt: skip
    assert list(store.entries()) == [other] and list(store.unfinished()) == []
    assert os.listdir(root) == ["owner--other"]


def test_rm_of_what_is_unfinished(capsys):
    entry = keep()
    store.work_directory(entry.directory).mkdir()
    assert run(capsys, "rm", MODEL, "--unfinished", "--yes")[0] == 0
    assert list(store.entries()) == [entry] and list(store.unfinished()) == []
    status, _, err = run(capsys, "rm", MODEL, "--unfinished", "--yes")
    assert (status, "nothing of it is kept" in err) == (2, True)


def test_rm_of_a_directory(capsys, root):
    ranks = [keep(make_plan(INVENTORY, 2), rank) for rank in (0, 1)]
    other = keep()
    assert run(capsys, "rm", str(ranks[0].directory), "--yes")[0] == 0
    assert len(list(store.entries())) == 2
    assert run(capsys, "rm", str(ranks[1].directory.parent), "--yes")[0] == 0
    assert list(store.entries()) == [other]


@pytest.mark.parametrize("action", [["rm", "--yes"], ["verify"]])
def test_what_is_not_in_the_store(capsys, root, tmp_path, action):
    keep()
    outside = tmp_path / "outside"
    outside.mkdir()
    said = f": is not in the store, {root}, and nothing of such a model is kept there\n"
    for path in (str(outside), "/", "..", str(root), f"{root}/owner--name/../../outside", str(tmp_path / "none")):
        assert run(capsys, action[0], path, *action[1:]) == (2, "", f"m3dist store: error: {path}{said}")
    (root / "link").symlink_to(outside)
    assert run(capsys, action[0], str(root / "link"), *action[1:])[0] == 2
    inside = str(root / "other")
    message = f"m3dist store: error: {inside}: nothing is kept there; m3dist store ls --json gives the directories\n"
    assert run(capsys, action[0], inside, *action[1:]) == (2, "", message)
    message = f"m3dist store: error: a/b: nothing of it is kept in {root}; m3dist store ls shows what is\n"
    assert run(capsys, action[0], "a/b", *action[1:]) == (2, "", message)
    assert outside.is_dir() and len(list(store.entries())) == 1


def test_rm_of_what_is_being_fetched(capsys, fetching):
    where, child = fetching
    said = f"m3dist store: error: {where} is being fetched or removed by process {child}; wait until it has ended\n"
    assert run(capsys, "rm", MODEL, "--yes") == (2, "", said)
    assert store.work_directory(where).is_dir()


def test_rm_does_not_ask_where_nobody_is(capsys, monkeypatch):
    entry = keep()
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        status, _, err = run(capsys, "rm", MODEL)
    message = "nothing was removed: there is no terminal to ask on; --yes removes without asking"
    assert (status, err) == (2, f"m3dist store: error: {message}\n")
    assert list(store.entries()) == [entry]


@pytest.mark.parametrize(("answer", "status", "left"), [("y", 0, 0), ("n", 1, 1), ("", 1, 1)])
def test_rm_asks(answer, status, left):
    """On a real terminal."""
    entry = keep()
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "m3dist", "store", "rm", MODEL]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b""
        while b"[y/N]" not in said and select.select([ours], [], [], 30)[0]:
            said += os.read(ours, 4096)
        os.write(ours, answer.encode() + b"\n")
        while select.select([ours], [], [], 30)[0]:
            try:
                said += os.read(ours, 4096)
            except OSError:  # its end is closed
                break
        assert process.wait() == status
    os.close(ours)
    assert f"Remove this, {entry.nbytes / 1000:.1f} kB? [y/N]".encode() in said
    assert (b"Nothing was removed." if left else b"Removed ") in said
    assert len(list(store.entries())) == left


@pytest.mark.parametrize("argv", [[], ["drop"], ["rm"], ["ls", "x"], ["rm", ""]])
def test_wrong_input(capsys, argv):
    assert run(capsys, *argv)[0] == 2
