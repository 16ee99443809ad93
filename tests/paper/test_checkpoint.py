"""Checkpoints on paper: hostile files, and every layout translated to the same tensors. Needs no MLX."""

import json
import os
import re
import threading
import time
from collections import Counter
from unittest.mock import Mock

import checkpoints
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist import tiny
from m3dist.checkpoint import (
    INDEX,
    Checkpoint,
    Folder,
    hub_error,
    hub_id,
    local,
    open_checkpoint,
    open_files,
    read_header,
)
from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError, ConfigError
from m3dist.tensors import BYTES
from m3dist.translation import TensorError, translate

CONFIG = checkpoints.tiny_config(num_hidden_layers=2)
TENSORS = checkpoints.random_tensors(CONFIG, vision=True, mtp=True)
TEXT = {name: value for name, value in TENSORS.items() if name in checkpoints.text_shapes(CONFIG)}
MODEL = ModelConfig.from_dict(CONFIG)
LAYER = "language_model.model.layers.1."
MOE = LAYER + "block_sparse_moe."

# ---------------------------------------------------------------------------------------------------------------------
# Headers


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object, shape: object, *offsets: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.isprintable)
headers = st.dictionaries(
    names.filter(lambda name: name != "__metadata__"), st.tuples(st.sampled_from(list(BYTES)), shapes)
)


@settings(deadline=None)
@given(headers)
def test_what_is_written_is_located(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    data = {
        name: np.random.default_rng(i).bytes(BYTES[d] * int(np.prod(s)))
        for i, (name, (d, s)) in enumerate(tensors.items())
    }
    checkpoints.write_safetensors(path, tensors, data.values())
    found, whole = read_header(path), path.read_bytes()
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == tensors
    assert all(whole[t.offset : t.offset + t.nbytes] == data[name] for name, t in found.items())


def test_the_format_library_writes_what_is_read(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 3), np.uint8),
        "b": np.ones(1, np.uint32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "mlx"})
    found, whole = read_header(tmp_path / "a.safetensors"), (tmp_path / "a.safetensors").read_bytes()
    assert all(whole[t.offset : t.offset + t.nbytes] == arrays[name].tobytes() for name, t in found.items())
    assert {name: t.shape for name, t in found.items()} == {name: x.shape for name, x in arrays.items()}


PAIR = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}
HOSTILE = {
    "empty": (b"", "0 bytes are too few"),
    "7 bytes": (bytes(7), "7 bytes are too few"),
    "header longer than the file": (file_of({})[:-1], "says its header has 2 bytes"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "says its header has 18446744073709551615 bytes"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "not JSON": (file_of(b"{'a': 1}"), "no valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "no valid JSON"),
    "nested too deep": (file_of(b"[" * 200_000), "no valid JSON"),
    "a number of 10,000 digits": (file_of(b'{"a": ' + b"9" * 10_000 + b"}"), "no valid JSON"),
    "a name twice": (file_of(b'{"a": 1, "a": 2}'), "'a' is given twice"),
    "a field twice": (file_of(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "'dtype' is given twice"),
    "a list": (file_of([]), "must hold a JSON object, not list"),
    "metadata": (file_of({"__metadata__": 3}), "__metadata__ must be an object"),
    "terminal codes": (file_of({"\x1b[2J": entry("U8", [0], 0, 0)}), "names must be printable"),
    "no entry": (file_of({"a": 5}), "a: must have a dtype, a shape and data_offsets"),
    "a field missing": (file_of({"a": {"dtype": "U8", "shape": [0]}}), "a: must have a dtype"),
    "a field too many": (file_of({"a": {**entry("U8", [0], 0, 0), "x": 1}}), "a: must have a dtype"),
    "dtype": (file_of({"a": entry(8, [0], 0, 0)}), "a: dtype must be a string, not 8"),
    "shape": (file_of({"a": entry("U8", 4, 0, 4)}, bytes(4)), "a: shape must be a list of sizes, not 4"),
    "negative size": (file_of({"a": entry("U8", [-1, -4], 0, 4)}, bytes(4)), "a: shape must be a list of sizes"),
    "float size": (file_of({"a": entry("U8", [4.0], 0, 4)}, bytes(4)), "a: shape must be a list of sizes"),
    "true": (file_of({"a": entry("U8", [True], 0, 1)}, bytes(1)), "a: shape must be a list of sizes"),
    "huge product": (file_of({"a": entry("U8", [2**62] * 16, 0, 4)}, bytes(4)), "a: U8 .* takes .* bytes"),
    "too many axes": (file_of({"a": entry("U8", [1] * 99, 0, 1)}, bytes(1)), "a: shape must be a list of sizes"),
    "one offset": (file_of({"a": entry("U8", [4], 0)}, bytes(4)), "a: data_offsets must be a begin and an end"),
    "negative offset": (file_of({"a": entry("U8", [4], -4, 0)}, bytes(4)), "a: data_offsets must be"),
    "backwards": (file_of({"a": entry("U8", [0], 4, 0)}, bytes(4)), "a: data_offsets must be"),
    "text offset": (file_of({"a": entry("U8", [4], "0", "4")}, bytes(4)), "a: data_offsets must be"),
    "size against shape": (
        file_of({"a": entry("F32", [4], 0, 15)}, bytes(15)),
        r"a: F32 \[4\] takes 16 bytes, .* give 15",
    ),
    "overlap": (file_of({**PAIR, "c": entry("U8", [4], 6, 10)}, bytes(10)), "c: begins .* and overlaps"),
    "same bytes": (file_of({**PAIR, "c": entry("U8", [4], 0, 4)}, bytes(8)), "overlaps"),
    "hole": (file_of({**PAIR, "c": entry("U8", [4], 9, 13)}, bytes(13)), "c: begins .* leaves a hole"),
    "hole at the start": (file_of({"b": entry("U8", [4], 4, 8)}, bytes(8)), "b: begins .* leaves a hole"),
    "truncated": (file_of(PAIR, bytes(6)), "2 bytes are missing at the end, from b on"),
    "truncated early": (file_of(PAIR), "8 bytes are missing at the end, from a on"),
    "trailing bytes": (file_of(PAIR, bytes(9)), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_header_above_100_mb(tmp_path):
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(CheckpointError, match="says its header has 100000001 bytes"):
        read_header(path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors.*No such file"):
        read_header(tmp_path / "none.safetensors")


def test_an_unknown_dtype_is_no_error_yet(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": entry("F4_E2M1X", [3], 0, 2), "b": entry("U8", [1], 2, 3)}, bytes(3)))
    assert read_header(path)["a"].dtype == "F4_E2M1X"


mutations = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=60).map(file_of), st.binary(max_size=60), mutations))
def test_damaged_bytes_are_refused_or_read(tmp_path_factory, damage):
    """Whatever the bytes, the answer is a dictionary whose tensors lie inside the file, or a CheckpointError."""
    content = damage
    if isinstance(damage, list):
        content = file_of({"__metadata__": {}, **PAIR}, bytes(8))
        for place, inserted, removed in damage:
            at = int(place * len(content))
            content = content[:at] + inserted + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert all(0 <= t.offset and t.offset + t.nbytes <= len(content) for t in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Directories


@pytest.fixture
def sharded(tmp_path):
    return checkpoints.published(tmp_path / "sharded", CONFIG, TEXT, shards=3)


def edit_index(directory, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_with_an_index_without_one_and_in_one_file(tmp_path, sharded):
    one = checkpoints.published(tmp_path / "one", CONFIG, TEXT)
    (one / "._model.safetensors").write_bytes(b"what macOS leaves on foreign disks")
    indexed = open_checkpoint(sharded)
    (sharded / INDEX).unlink()
    assert open_checkpoint(sharded).stored == indexed.stored
    assert open_checkpoint(one).stored.keys() == indexed.stored.keys()
    assert indexed.nbytes == checkpoints.size_of(CONFIG)


def test_a_file_the_index_does_not_name_is_left_alone(sharded):
    (sharded / "consolidated.safetensors").write_bytes(b"something else")
    assert open_checkpoint(sharded).stored.keys() == TEXT.keys()


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\b.safetensors", "", ".safetensors", 5],
)
def test_index_that_points_elsewhere(sharded, file):
    edit_index(sharded, lambda weight_map: weight_map.update({"lm": file}))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: 'lm' is in .* no plain"):
        open_checkpoint(sharded)


def test_index_of_a_missing_file(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of its 3 files are missing, model-00002-of-00003.safetensors first"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 1, "weight_map": 2}']
)
def test_index_that_is_none(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(sharded)


def test_tensor_not_in_the_file_the_index_gives(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({"extra": "model-00001-of-00003.safetensors"}))
    with pytest.raises(
        CheckpointError, match="extra should be in model-00001-of-00003.safetensors, which does not hold it"
    ):
        open_checkpoint(sharded)


def test_tensor_in_two_files(sharded):
    (sharded / INDEX).unlink()
    (sharded / "copy.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is in two files, .*copy.* and .*model-00001"):
        open_checkpoint(sharded)


def test_what_opening_reads(sharded):
    """The config, the index and the headers, each byte once: on a hub every one costs."""

    class Counted(Folder):
        read_bytes = Counter()

        def read(self, name, offset, into):
            self.read_bytes[name] += len(into)
            super().read(name, offset, into)

    with Counted(sharded) as files:
        checkpoint = open_files(files)
        sizes = files.sizes()
    headers = {name: sizes[name] for name in ("config.json", INDEX)}
    for tensor in checkpoint.stored.values():
        headers[tensor.file.name] = min(tensor.offset, headers.get(tensor.file.name, tensor.offset))
    assert files.read_bytes == headers


def test_one_process_opens_for_another(sharded):
    checkpoint = open_checkpoint(sharded)
    again = Checkpoint.from_json(checkpoint.to_json())
    assert again == checkpoint and list(again.stored) == list(checkpoint.stored)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_small_file_that_is_large(sharded, name):
    os.truncate(sharded / name, 10**12)
    with pytest.raises(CheckpointError, match=f"{name}: 1000000000000 bytes are too many"):
        open_checkpoint(sharded)


def test_no_directory(sharded):
    for directory in (sharded / "none", sharded / "config.json"):
        with pytest.raises(ConfigError, match="config.json does not exist: is .* a checkpoint directory"):
            open_checkpoint(directory)


def test_a_folder_is_read_by_several_threads_and_closed(tmp_path):
    content = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / ".hidden").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("a")
    parts = [bytearray(1 << 17) for _ in range(8)]
    opened = len(os.listdir("/dev/fd"))
    with Folder(tmp_path) as files:
        assert files.sizes() == {"a": 1 << 20, "link": 1 << 20}
        threads = [
            threading.Thread(target=files.read, args=("a", i << 17, memoryview(part))) for i, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(CheckpointError, match="a: the file now ends at byte 1048576, where it was longer"):
            files.read("a", (1 << 20) - 3, memoryview(bytearray(4)))
        with pytest.raises(CheckpointError, match="gone: .*No such file"):
            files.read("gone", 0, memoryview(bytearray(1)))
    assert b"".join(parts) == content
    assert len(os.listdir("/dev/fd")) == opened


def test_no_weights(sharded):
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no \\*.safetensors"):
        open_checkpoint(sharded)


def test_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    assert local("here").samefile(tmp_path / "here")
    assert local("tiny") == tiny.PATH
    assert local("owner/name") is local("file") is local("~no-such-user/there") is local("a" * 5000) is None


def test_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert hub_id("owner/na.me") == ("owner/na.me", None)
    assert hub_id("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    with pytest.raises(CheckpointError, match="file is a file; name the directory"):
        hub_id("file")
    for model in ("nowhere", "/no/where", "a/b/c", "../there", "~nobody/there", "a/b@", "a/b@../c", "a" * 5000):
        with pytest.raises(CheckpointError, match="no such directory, and no Hugging Face id"):
            hub_id(model)


def hub_errors():
    from huggingface_hub import errors

    response = Mock(headers={})  # of whichever HTTP client huggingface_hub uses
    return [
        (errors.GatedRepoError("gated", response=response), "is gated: accept its terms"),
        (errors.RepositoryNotFoundError("none", response=response), "not on Hugging Face; if it is private"),
        (errors.LocalEntryNotFoundError("offline"), "not in the local cache, and Hugging Face cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "not in the local cache, and Hugging Face cannot be reached"),
        (errors.HfHubHTTPError("server error", response=response), "could not be fetched .*server error"),
        (OSError("disk full"), "could not be fetched .*disk full"),
    ]


@pytest.mark.parametrize("number", range(6))
def test_hub_errors(number):
    error, message = hub_errors()[number]
    assert re.search(f"^owner/name .*{message}", str(hub_error("owner/name", error)))


# ---------------------------------------------------------------------------------------------------------------------
# Translation


def packed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under the published names -> under ours, written out plainly. Float32."""
    ours, groups = {}, {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(.+\.block_sparse_moe\.)experts\.(\d+)\.(w[123])\.weight", name):
            groups.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value
        elif match := re.fullmatch(r"(.+\.)gate_proj\.weight", name):
            ours[match[1] + "gate_up_proj.weight"] = np.concatenate([value, tensors[match[1] + "up_proj.weight"]])
        elif not name.endswith("up_proj.weight"):
            ours[name] = value
    for moe, experts in groups.items():
        each = [experts[e] for e in range(len(experts))]
        ours[moe + "switch_mlp.gate_up_proj.weight"] = np.stack([np.concatenate([x["w1"], x["w3"]]) for x in each])
        ours[moe + "switch_mlp.down_proj.weight"] = np.stack([x["w2"] for x in each])
    return ours


def put_together(assembly, arrays: dict[str, np.ndarray], scale=lambda name: 1) -> np.ndarray:
    """What an assembly says of stored float32 arrays, row by row."""
    whole = np.full((int(np.prod(assembly.spec.shape[:-1])), assembly.spec.shape[-1]), np.nan, np.float32)
    for piece in assembly.pieces:
        source = arrays[piece.tensor] * scale(piece.scale)
        source = source.reshape(-1, source.shape[-1])
        assert np.isnan(whole[piece.at : piece.at + piece.rows]).all()
        whole[piece.at : piece.at + piece.rows] = source[piece.row : piece.row + piece.rows]
    return whole.reshape(assembly.spec.shape)


def described(arrays: dict[str, np.ndarray], dtype: str = "BF16") -> dict:
    """What translate is given for float arrays stored as the published checkpoint stores them."""
    return {name: (x.shape, "F32" if checkpoints.is_float32(name) else dtype) for name, x in arrays.items()}


def transformers_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How transformers holds them in memory."""
    named = {}
    for name, value in packed(tensors).items():
        name = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        name = name.replace("block_sparse_moe.", "mlp.").replace("mlp.e_score", "mlp.gate.e_score")
        name = re.sub(r"switch_mlp\.(\w+)\.weight", r"experts.\1", name).replace(
            "self_attn.index_", "self_attn.indexer."
        )
        named[name] = value
    return named


LAYOUTS = {
    "published": TENSORS,
    "ours": packed(TEXT),
    "transformers": transformers_names(TEXT),
    **{layout: checkpoints.arranged(CONFIG, TENSORS, layout) for layout in "abcde"},
    "split experts named gate, up, down": {
        re.sub(r"\.w([123])\.", lambda m: {"1": ".gate_proj.", "2": ".down_proj.", "3": ".up_proj."}[m[1]], name): x
        for name, x in TEXT.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_layout_is_the_same_tensors(layout, dtype):
    arrays = LAYOUTS[layout]
    translation = translate(MODEL, described(arrays, dtype))
    wanted = packed(TEXT)
    assert translation.assemblies.keys() == wanted.keys() == translation.inventory.specs().keys()
    for name, assembly in translation.assemblies.items():
        assert np.array_equal(put_together(assembly, arrays), wanted[name]), name
        assert assembly.spec == translation.inventory.specs()[name]
        assert assembly.spec.dtype == ("F32" if checkpoints.is_float32(name) else dtype)
    assert all(
        re.match("vision_tower|multi_modal|patch_merge|language_model.model.mtp", name) for name in translation.ignored
    )
    pieces = {piece.tensor for assembly in translation.assemblies.values() for piece in assembly.pieces}
    assert pieces | set(translation.ignored) == arrays.keys()


def test_computing_in_another_dtype():
    translation = translate(MODEL, described(TEXT), "F16")
    assert translation.inventory.dtype == "F16"
    assert {a.spec.dtype for a in translation.assemblies.values()} == {"F16", "F32"}
    with pytest.raises(CheckpointError, match="dtype must be one of BF16, F16, F32, not 'F8'"):
        translate(MODEL, described(TEXT), "F8")


@pytest.mark.parametrize("as_loaded", [False, True])
def test_mxfp8(tmp_path, as_loaded):
    """F8_E4M3 bytes become MLX's 32-bit words, also as mx.load gives them (uint8); the config need not say so."""
    stored = {
        name: (t.shape, t.dtype)
        for name, t in open_checkpoint(checkpoints.mxfp8(tmp_path, CONFIG, TENSORS)).stored.items()
    }
    if as_loaded:
        stored = {name: (shape, dtype.replace("F8_E4M3", "U8")) for name, (shape, dtype) in stored.items()}
    translation = translate(MODEL, stored)
    formats = translation.inventory.quantization
    assert {str(q) for q in formats.values()} == {"None", "mxfp8 8-bit, group 32"}
    assert formats["language_model.model.embed_tokens"] is None and formats[MOE + "gate"] is None
    down = translation.assemblies[MOE + "switch_mlp.down_proj.weight"]
    assert (down.spec.shape, down.spec.dtype) == ((8, 64, 24), "U32")
    assert translation.assemblies[MOE + "switch_mlp.down_proj.scales"].spec.shape == (8, 64, 3)


@pytest.mark.parametrize("multipliers", ["F32", "BF16"])
def test_fp8_in_blocks(tmp_path, multipliers):
    checkpoint = open_checkpoint(checkpoints.fp8_block(tmp_path, CONFIG, TENSORS))
    stored = {n: (t.shape, multipliers if "scale_inv" in n else t.dtype) for n, t in checkpoint.stored.items()}
    translation = translate(MODEL, stored)
    assert set(translation.inventory.quantization.values()) == {None}
    bits = checkpoints.read_safetensors(tmp_path / "model.safetensors")
    arrays = {name: checkpoints.decode(*stored) for name, stored in bits.items()}
    wanted = packed({name: x for name, x in checkpoints.dequantised(tmp_path).items() if name in TEXT})
    # The tiny matrices are at most one block wide: a row's multiplier is one number.
    for name, assembly in translation.assemblies.items():
        if "mlp" in name and "switch" in name:
            got = put_together(assembly, arrays, lambda scale: arrays[scale])
            assert np.array_equal(got, wanted[name])


def test_quantised_and_packed():
    """Packed columns and scales follow the rows of their weights; formats are found module by module."""
    quantised = {}
    for name, (shape, dtype) in described(checkpoints.arranged(CONFIG, TENSORS, "b")).items():
        base, (*lead, columns) = name.removesuffix(".weight"), shape
        if len(shape) < 2 or not name.startswith("language"):
            quantised[name] = (shape, dtype)
            continue
        bits, group = (8, 64) if name.endswith("moe.gate.weight") else (4, 32)
        quantised[name] = ((*lead, columns * bits // 32), "U32")
        quantised |= {f"{base}.{leaf}": ((*lead, columns // group), "BF16") for leaf in ("scales", "biases")}
    translation = translate(MODEL, quantised)
    assert str(translation.inventory.quantization[MOE + "gate"]) == "affine 8-bit, group 64"
    assert str(translation.inventory.quantization[MOE + "switch_mlp.down_proj"]) == "affine 4-bit, group 32"
    assert translation.assemblies[MOE + "gate.biases"].spec.dtype == "F32"
    scales = translation.assemblies[MOE + "shared_experts.gate_up_proj.scales"]
    (piece,) = scales.pieces
    assert (piece.tensor, piece.row, piece.rows, piece.at) == (MOE + "switch_mlp.gate_up_proj.scales", 8 * 192, 192, 0)


def test_tied_embeddings_leave_the_head_out():
    config = ModelConfig.from_dict(checkpoints.tiny_config(num_hidden_layers=2, tie_word_embeddings=True))
    assert translate(config, described(TEXT)).ignored == ("language_model.lm_head.weight",)


def test_the_size_of_the_real_model(published):
    """45,315 tensors of MXFP8 text: a second, and no more pieces than stored tensors."""
    text = {**checkpoints.tiny_config()["text_config"], **vars(published)}
    sparse = {name: value for name, value in vars(published).items() if name.startswith("sparse_")}
    whole = {"text_config": {**text, "sparse_attention_config": sparse}}
    stored = {}
    for name, shape in checkpoints.text_shapes(whole).items():
        plain = checkpoints.unquantised(name, shape)
        stored[name] = (shape, "F8_E4M3" if not plain else "F32" if checkpoints.is_float32(name) else "BF16")
        if not plain:
            stored[name + "_scale_inv"] = ((shape[0], shape[1] // 32), "U8")
    began = time.perf_counter()
    translation = translate(published, stored)
    assert time.perf_counter() - began < 20  # about 0.7 on an idle core
    assert sum(len(assembly.pieces) for assembly in translation.assemblies.values()) == len(stored) == 45_315
    assert sum(assembly.spec.nbytes for assembly in translation.assemblies.values()) == 442_007_940_096


def changed(**changes) -> dict:
    """The published text tensors with some given (shape, dtype), or left out for None; names below the MoE layer."""
    stored = described(TEXT) | {MOE + name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in stored.items() if value is not None}


FP8 = ((96, 64), "F8_E4M3")
ODD = {
    "unknown tensor": (
        changed(experts__0__w1__weight_scale_2=((1,), "F32")),
        "experts.0.w1.weight_scale_2",
        "not a tensor of",
    ),
    "a bias": (
        changed(shared_experts__down_proj__bias=((64,), "BF16")),
        "shared_experts.down_proj.bias",
        "not a tensor of",
    ),
    "expert missing": (changed(experts__5__w3__weight=None), "", "experts.5.w3.weight is missing"),
    "shared expert missing": (
        changed(shared_experts__up_proj__weight=None),
        "",
        "shared_experts.up_proj.weight is missing",
    ),
    "router bias missing": (changed(e_score_correction_bias=None), "", "e_score_correction_bias is missing"),
    "an expert too many": (changed(experts__8__w1__weight=((96, 64), "BF16")), "experts.8.w1.weight", "has 8 experts"),
    "wrong rows": (
        changed(experts__5__w3__weight=((95, 64), "BF16")),
        "experts.5.w3.weight",
        r"\[95, 64\], expected \[96, 64\]",
    ),
    "wrong columns": (changed(gate__weight=((8, 63), "F32")), "gate.weight", r"\[8, 63\], expected \[8, 64\]"),
    "other columns": (
        changed(experts__5__w3__weight=((96, 32), "BF16")),
        "experts.5.w3.weight",
        "32 BF16, but .*w1.weight of 64",
    ),
    "transposed": (changed(experts__5__w2__weight=((96, 64), "BF16")), "experts.5.w2.weight", r"expected \[64, 64\]"),
    "scalar": (changed(e_score_correction_bias=((), "F32")), "e_score_correction_bias", r"\[\], expected \[8\]"),
    "three axes": (changed(gate__weight=((8, 64, 1), "F32")), "gate.weight", "expected"),
    "unknown dtype": (changed(gate__weight=((8, 64), "F4")), "gate.weight", "has dtype F4 but no"),
    "integer dtype": (changed(e_score_correction_bias=((8,), "I64")), "e_score_correction_bias", "dtype I64"),
    "FP8 without scales": (
        changed(experts__5__w3__weight=FP8),
        "experts.5.w3.weight",
        "no .*w3.weight_scale_inv beside it",
    ),
    "words without scales": (
        changed(experts__5__w3__weight=((96, 8), "U32")),
        "experts.5.w3.weight",
        "no .*w3.scales beside it",
    ),
    "one expert quantised": (
        changed(experts__5__w3__weight=FP8, experts__5__w3__weight_scale_inv=((96, 2), "U8")),
        "experts.5.w3.weight",
        "must be quantised in one format",
    ),
    "scales of the wrong width": (
        changed(
            shared_experts__down_proj__weight=((64, 96), "F8_E4M3"),
            shared_experts__down_proj__weight_scale_inv=((64, 4), "U8"),
        ),
        "shared_experts.down_proj.weight",
        "8 bits with U8 scales of groups of 24",
    ),
    "scales of the wrong height": (
        changed(experts__5__w3__weight=FP8, experts__5__w3__weight_scale_inv=((95, 2), "U8")),
        "experts.5.w3.weight_scale_inv",
        r"expected \[96, 2\]",
    ),
    "one multiplier a row": (
        changed(experts__5__w3__weight=FP8, experts__5__w3__weight_scale_inv=((96, 1), "F32")),
        "experts.5.w3.weight_scale_inv",
        r"\[96, 1\], expected \[1, 1\] one multiplier for each 128 x 128 block",
    ),
    "integer multipliers": (
        changed(experts__5__w3__weight=FP8, experts__5__w3__weight_scale_inv=((1, 1), "I32")),
        "experts.5.w3.weight_scale_inv",
        "has dtype I32",
    ),
    "multipliers of floats": (
        changed(experts__5__w3__weight_scale_inv=((1, 1), "F32")),
        "experts.5.w3.weight_scale_inv",
        "is no FP8 matrix",
    ),
    "exponents of floats": (
        changed(shared_experts__down_proj__weight_scale_inv=((64, 3), "U8")),
        "shared_experts.down_proj.weight",
        "has scales beside it but dtype BF16",
    ),
    "scales alone": (
        changed(shared_experts__down_proj__weight=None, shared_experts__down_proj__scales=((64, 3), "U8")),
        "shared_experts.down_proj.scales",
        "there is no .*down_proj.weight beside it",
    ),
    "biases without scales": (changed(gate__biases=((8, 1), "F32")), "gate.biases", "it has no biases"),
    "a quantised vector": (
        changed(e_score_correction_bias__scales=((8,), "F32")),
        "e_score_correction_bias.scales",
        "there is no",
    ),
    "affine without biases": (
        changed(
            shared_experts__down_proj__weight=((64, 12), "U32"), shared_experts__down_proj__scales=((64, 3), "BF16")
        ),
        "shared_experts.down_proj.scales",
        "BF16 but no .*down_proj.biases beside it",
    ),
    "no width MLX has": (
        changed(shared_experts__down_proj__weight=((64, 12), "U32"), shared_experts__down_proj__scales=((64, 2), "U8")),
        "shared_experts.down_proj.weight",
        "4 bits with U8 scales of groups of 48",
    ),
    "twice, in two spellings": (
        changed() | {"model." + MOE + "gate.weight": ((8, 64), "F32")},
        "model." + MOE + "gate.weight",
        "holds the same as .*gate.weight; one of the two must go",
    ),
    "shared expert twice": (
        {n: v for n, v in changed(switch_mlp__down_proj__weight=((9, 64, 96), "BF16")).items() if ".w2." not in n},
        "switch_mlp.down_proj.weight",
        "holds the same as .*shared_experts.down_proj.weight; one of the two must go",
    ),
    "two experts too many": (
        {n: v for n, v in changed(switch_mlp__down_proj__weight=((10, 64, 96), "BF16")).items() if ".w2." not in n},
        "switch_mlp.down_proj.weight",
        r"\[10, 64, 96\], expected \[8, 64, 96\]",
    ),
    "a layer too many": (
        changed() | {"language_model.model.layers.2.input_layernorm.weight": ((64,), "BF16")},
        "language_model.model.layers.2.input_layernorm.weight",
        "not a tensor of",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tensors(case):
    stored, tensor, message = ODD[case]
    with pytest.raises(CheckpointError, match=message) as error:
        translate(MODEL, stored)
    if tensor:
        assert isinstance(error.value, TensorError)
        assert error.value.tensor in (tensor, MOE + tensor)


def test_gate_and_up_in_two_formats():
    """They become one matrix: two bit widths, or two kinds of scales, have no common form."""
    shared = {
        **{f"shared_experts__{h}_proj__weight": ((96, 8), "U32") for h in ("gate", "up")},
        **{
            f"shared_experts__{h}_proj__{leaf}": ((96, 2), "BF16")
            for h in ("gate", "up")
            for leaf in ("scales", "biases")
        },
    }
    assert str(
        translate(MODEL, changed(**shared)).inventory.quantization[MOE + "shared_experts.gate_up_proj"]
    ).startswith("affine")
    for other in (
        {"shared_experts__up_proj__weight": ((96, 16), "U32")},
        {"shared_experts__up_proj__scales": ((96, 1), "BF16"), "shared_experts__up_proj__biases": ((96, 1), "BF16")},
        {"shared_experts__up_proj__scales": ((96, 2), "U8")},
    ):
        with pytest.raises(TensorError, match="must be quantised in one format") as error:
            translate(MODEL, changed(**shared | other))
        assert "up_proj" in error.value.tensor
    with pytest.raises(CheckpointError, match="up_proj.biases is missing"):
        translate(MODEL, changed(**shared | {"shared_experts__up_proj__biases": None}))


def test_an_error_names_the_file(sharded):
    config = json.loads((sharded / "config.json").read_text())
    config["text_config"]["head_dim"] = 16
    config["text_config"]["rotary_dim"] = 8
    (sharded / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00003.safetensors: .*q_proj.weight: .*expected \[128, 64\]"
    ):
        open_checkpoint(sharded).translate()


names_of_layouts = st.sampled_from(sorted({name for arrays in LAYOUTS.values() for name in arrays}))


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        names_of_layouts,
        st.tuples(st.lists(st.integers(0, 200), max_size=3).map(tuple), st.sampled_from([*BYTES, "I8", "F64"])),
        max_size=3,
    ),
    st.lists(names_of_layouts, max_size=2),
)
def test_any_change_is_translated_whole_or_refused(changes, removed):
    """Whatever is stored: a CheckpointError, or assemblies that fill every tensor from rows that exist."""
    stored = {name: value for name, value in (described(TEXT) | changes).items() if name not in removed}
    try:
        translation = translate(MODEL, stored)
    except CheckpointError:
        return
    for assembly in translation.assemblies.values():
        assert sum(piece.rows for piece in assembly.pieces) == np.prod(assembly.spec.shape[:-1], dtype=int)
        for piece in assembly.pieces:
            assert piece.row + piece.rows <= np.prod(stored[piece.tensor][0][:-1], dtype=int)
