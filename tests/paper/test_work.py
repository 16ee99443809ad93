"""What is being written, after every way to be interrupted: kills, power cuts, half a line."""

import os
from pathlib import Path

import numpy as np
import pytest
from checkpoints import tiny_config

from m3dist.config import ModelConfig
from m3dist.errors import StoreError
from m3dist.fetch import store, work
from m3dist.fetch.places import Format, Rows
from m3dist.fetch.schedule import Area
from m3dist.fetch.target import slice_of
from m3dist.fetch.work import JOURNAL, SPOOL, Work, identity_of, tidy
from m3dist.layout import Span
from m3dist.plan import make_plan
from m3dist.quantization import Recipe, requantised
from m3dist.tensors import Inventory, Quantization

WIDE = dict.fromkeys(("intermediate_size", "shared_intermediate_size", "dense_intermediate_size"), 128)
CONFIG = ModelConfig.from_dict(tiny_config(num_hidden_layers=2, **WIDE))
PLAN = make_plan(requantised(Inventory(CONFIG, "BF16"), Recipe(Quantization("affine", 4, 32))), 2)
FORM = Format(CONFIG, PLAN.specs)
HEAD = "language_model.lm_head"  # 160 rows of 64 columns; rank 0 has the first 80
DOWN = "language_model.model.layers.0.mlp.down_proj"  # 64 rows of 128 columns; rank 0 has the first half
IDENTITY = identity_of(model="owner/name", plan=PLAN.digest, rank=0)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr("m3dist.fetch.target.LARGEST_FILE", 20_000)
    monkeypatch.setattr(work, "boot", lambda: "first")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "rank-0-of-2.partial"


def opened(folder: Path, identity: str = IDENTITY, **intact: Path) -> Work:
    intact = {name.replace("_", "-") + ".safetensors": path for name, path in intact.items()}
    return Work(folder, slice_of(PLAN, 0), FORM, identity, intact)


def rows_of(module: str, rows: Span) -> Rows:
    """Whole rows, with other bytes everywhere."""
    rng = np.random.default_rng([*module.encode(), *rows])
    widths = {tensor: FORM.bytes_of(tensor, (0, FORM.columns(module)))[1] for tensor in FORM.leaves[module]}
    return {tensor: rng.integers(0, 256, (rows[1] - rows[0], width), np.uint8) for tensor, width in widths.items()}


def put(one: Work, module: str, *blocks: Span) -> None:
    for rows in blocks:
        one.place(rows_of(module, rows), rows, (0, FORM.columns(module)))
        one.note(module, rows)


def is_there(one: Work, module: str, rows: Span) -> bool:
    """Whether the files hold rank 0's part of these rows, as `put` put them."""
    columns = next(area.columns for area in FORM.areas(one.open_files)[module])
    found, wanted = one.placed.read(module, rows, columns), rows_of(module, rows)
    spans = {tensor: FORM.bytes_of(tensor, columns) for tensor in found}
    return all((found[t] == wanted[t][:, slice(*spans[t])]).all() for t in found)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_what_was_noted_is_done(folder):
    first = opened(folder)
    assert first.done == {} and {file.name for file in first.open_files} <= set(os.listdir(folder))
    put(first, HEAD, (0, 8), (72, 80))
    put(first, DOWN, (5, 6))
    again = opened(folder)  # `first` was never closed: it was killed
    assert again.done == {HEAD: [(0, 8), (72, 80)], DOWN: [(5, 6)]}
    assert all(is_there(again, module, rows) for module, spans in again.done.items() for rows in spans)
    put(again, HEAD, (8, 72))
    assert opened(folder).done == {HEAD: [(0, 8), (72, 80), (8, 72)], DOWN: [(5, 6)]}


def test_killed_between_writing_and_noting(folder):
    first = opened(folder)
    first.place(rows_of(HEAD, (0, 8)), (0, 8), (0, 64))
    again = opened(folder)
    assert again.done == {}
    put(again, HEAD, (0, 8))
    assert is_there(opened(folder), HEAD, (0, 8))


def test_killed_at_any_byte_of_the_journal(folder):
    """A line counts once its end is there. And what is noted after half a line is found."""
    put(opened(folder), HEAD, (0, 8), (8, 16), (16, 123))
    whole = (folder / JOURNAL).read_bytes()
    for length in range(len(whole) + 1):
        (folder / JOURNAL).write_bytes(whole[:length])
        noted = [rows for rows in ((0, 8), (8, 16), (16, 123)) if b" %d %d\n" % rows in whole[:length]]
        again = opened(folder)
        assert again.done.get(HEAD, []) == noted
        put(again, DOWN, (1, 2))
        assert opened(folder).done == ({HEAD: noted} if noted else {}) | {DOWN: [(1, 2)]}


def test_killed_while_it_was_made(folder):
    """Files, but no journal yet: nothing in them counts."""
    put(opened(folder), HEAD, (0, 80))
    (folder / JOURNAL).unlink()
    again = opened(folder)
    assert again.done == {}
    assert all((folder / file.name).stat().st_size == file.nbytes for file in again.open_files)


def test_something_else_is_not_overwritten(folder):
    put(opened(folder), HEAD, (0, 8))
    with pytest.raises(StoreError, match=f"{folder} holds something else, unfinished; remove it"):
        opened(folder, identity_of(model="owner/name", plan=PLAN.digest, rank=1))
    assert Work.identity(folder) == IDENTITY and opened(folder).done == {HEAD: [(0, 8)]}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=f"{tmp_path}/file/x.*: Not a directory"):
        opened(tmp_path / "file" / "x")


def test_the_end(folder):
    """Only the files stay; and what is only passed on leaves nothing."""
    one = opened(folder)
    put(one, HEAD, (0, 8))
    one.spool(HEAD, (80, 90), rows_of(HEAD, (80, 90)))
    one.close()
    tidy(folder)
    assert sorted(os.listdir(folder)) == [file.name for file in one.open_files]
    only_passing_on = Work(folder.with_name("other"), (), FORM, IDENTITY)
    only_passing_on.spool(HEAD, (80, 90), rows_of(HEAD, (80, 90)))
    only_passing_on.remove()
    assert os.listdir(folder.parent) == [folder.name]


# ---------------------------------------------------------------------------------------------------------------------
# A power cut


def reboot(monkeypatch) -> None:
    monkeypatch.setattr(work, "boot", lambda: "second")


def test_after_a_power_cut_only_what_was_synced(folder, monkeypatch):
    one = opened(folder)
    put(one, HEAD, (0, 8))
    one.sync()
    put(one, HEAD, (8, 16))
    reboot(monkeypatch)
    again = opened(folder)
    assert again.done == {HEAD: [(0, 8)]}
    put(again, HEAD, (16, 24))
    assert opened(folder).done == {HEAD: [(0, 8), (16, 24)]}
    again.sync()  # of the rows that were lost it says nothing
    assert opened(folder).done == {HEAD: [(0, 8), (16, 24)]}


def test_after_a_power_cut_in_half_a_line(folder, monkeypatch):
    one = opened(folder)
    put(one, HEAD, (0, 8), (8, 16))
    os.truncate(folder / JOURNAL, (folder / JOURNAL).stat().st_size - 1)
    reboot(monkeypatch)
    again = opened(folder)
    assert again.done == {}
    again.sync()
    assert opened(folder).done == {}


@pytest.mark.parametrize("left", [b"", b"\0" * 100, IDENTITY.encode()])
def test_a_journal_that_never_came_to_the_disk(folder, left):
    put(opened(folder), HEAD, (0, 8))
    (folder / JOURNAL).write_bytes(left)
    assert opened(folder).done == {}


def test_files_that_never_came_to_the_disk(folder, monkeypatch):
    """Nothing of one, the name of another, half of a third: they are made again, around what was synced."""
    one = opened(folder)
    put(one, HEAD, (0, 8))
    one.sync()
    *_, third, second, first = [file for file in one.open_files if file.name not in one.placed.descriptors]
    (folder / first.name).unlink()
    os.truncate(folder / second.name, 0)
    os.truncate(folder / third.name, third.nbytes - 1)
    reboot(monkeypatch)
    again = opened(folder)
    assert is_there(again, HEAD, (0, 8))
    for file in again.open_files:
        data = (folder / file.name).read_bytes()
        assert data.startswith(file.header) and len(data) == file.nbytes


def test_blocks_for_others_do_not_outlive_a_power_cut(folder, monkeypatch):
    """They are not brought to the disk: one may have its length and not its bytes."""
    opened(folder).spool(HEAD, (80, 90), rows_of(HEAD, (80, 90)))
    reboot(monkeypatch)
    assert opened(folder).spooled() == {} and os.listdir(folder / SPOOL) == []


def test_syncing_now_and_then(folder, monkeypatch):
    """With every file that was written to, and before it is noted."""
    synced = []
    monkeypatch.setattr(store, "sync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    now = [0.0]
    monkeypatch.setattr(work.time, "monotonic", lambda: now[0])
    one = opened(folder)
    put(one, HEAD, (0, 8), (8, 16))
    assert synced == [] and "synced" not in (folder / JOURNAL).read_text()
    now[0] = work.SYNC_INTERVAL + 1
    put(one, DOWN, (0, 8))
    holding = [place.file for module in (HEAD, DOWN) for place in one.placed.places[f"{module}.weight"]]
    assert {str(folder / name) for name in (*holding, JOURNAL)} | {str(folder)} <= set(synced)
    assert (folder / JOURNAL).read_text().endswith(f"{DOWN} 0 8\nsynced\n")
    put(one, DOWN, (8, 16))
    assert (folder / JOURNAL).read_text().count("synced\n") == 1


def test_each_start_of_the_machine_has_a_name():
    assert work.boot() == "first" and len(BOOT()) > 8 and BOOT() == BOOT()


BOOT = work.boot  # the real one


# ---------------------------------------------------------------------------------------------------------------------
# Blocks for others


def same(some: Rows, others: Rows) -> bool:
    return some.keys() == others.keys() and all((some[tensor] == others[tensor]).all() for tensor in some)


def test_blocks_for_others(folder):
    one = opened(folder)
    one.spool(HEAD, (80, 90), rows_of(HEAD, (80, 90)))
    one.spool(DOWN, (0, 4), rows_of(DOWN, (0, 4)))
    again = opened(folder)
    assert again.spooled() == {HEAD: [Area((80, 90), (0, 64))], DOWN: [Area((0, 4), (0, 128))]}
    assert same(again.unspool(HEAD, (80, 90)), rows_of(HEAD, (80, 90)))
    inner = {tensor: data[2:5] for tensor, data in rows_of(HEAD, (80, 90)).items()}
    assert same(again.unspool(HEAD, (82, 85)), inner)
    assert again.unspool(HEAD, (85, 95)) is None and again.unspool(HEAD, (0, 8)) is None
    again.drop(HEAD, (80, 90))
    assert again.unspool(HEAD, (80, 90)) is None
    assert opened(folder).spooled() == {DOWN: [Area((0, 4), (0, 128))]}


def test_a_block_half_written_is_none(folder, monkeypatch):
    """Killed before it had its name; cut short under its name; of a module that is no longer wanted."""
    one = opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.spool(HEAD, (80, 90), rows_of(HEAD, (80, 90)))
    one.spool(HEAD, (90, 99), rows_of(HEAD, (90, 99)))
    one.spool(DOWN, (0, 4), rows_of(DOWN, (0, 4)))
    file = folder / SPOOL / f"{HEAD}@90-99"
    os.truncate(file, file.stat().st_size - 1)
    (folder / SPOOL / "language_model.model.nothing@0-4").write_bytes(b"")
    assert opened(folder).spooled() == {DOWN: [Area((0, 4), (0, 128))]}


# ---------------------------------------------------------------------------------------------------------------------
# Room, and what is intact


def test_room_that_is_still_needed(folder):
    """Files have their full length at once, but take no room before they are written."""
    one = opened(folder)
    total = sum(file.nbytes for file in one.open_files)
    pages = 4096 * len(one.open_files)
    assert total - pages <= one.missing_bytes() <= total
    for module, areas in FORM.areas(one.open_files).items():
        put(one, module, *(area.rows for area in areas))
    one.sync()
    assert one.missing_bytes() <= pages


def test_intact_files_are_taken_over(folder, tmp_path):
    """Only the others are written, and the entry that has them keeps its own."""
    before = opened(tmp_path / "entry")
    for module, areas in FORM.areas(before.open_files).items():
        put(before, module, *(area.rows for area in areas))
    first, *others = before.open_files
    path = tmp_path / "entry" / first.name
    kept = path.read_bytes()
    stem = first.name.removesuffix(".safetensors").replace("-", "_")
    one = opened(folder, **{stem: path})
    assert one.open_files == others and (folder / first.name).read_bytes() == kept
    (folder / JOURNAL).unlink()  # killed while it was made; and now that file is damaged too
    again = opened(folder)
    for module, areas in FORM.areas(again.open_files).items():
        put(again, module, *(area.rows for area in areas))
    assert path.read_bytes() == kept and not path.samefile(folder / first.name)
