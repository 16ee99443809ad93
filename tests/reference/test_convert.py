"""`m3dist convert` against mlx-lm's converter, and its results in mlx-lm and in m3dist.

The models have experts, which MLX's CPU backend multiplies in float32 only: logits are compared on float32 or quantised
weights, bits on bfloat16 ones.
"""

import json
import shutil
from pathlib import Path

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import dequantised, random_tensors, resaved, tiny_config
from reference.golden import relative_error
from reference.ours import build, load

from m3dist import cli, tiny

pytestmark = pytest.mark.mlx_lm

TOLERANCE = 1e-4
WIDE = {"hidden_size": 128, "intermediate_size": 128, "shared_intermediate_size": 128}
CONFIG = tiny_config(num_hidden_layers=3, **WIDE)
TENSORS = random_tensors(CONFIG, seed=21, vision=True)
TOKENS = np.random.default_rng(22).integers(0, CONFIG["image_token_index"], (1, 100))


def convert(source: Path, out: Path, *flags: str) -> Path:
    """`m3dist convert`, in this process."""
    assert cli.main(["convert", str(source), str(out), *flags]) == 0
    return out


def stored(path: Path) -> dict[str, tuple]:
    """Name -> dtype, shape and bytes of every tensor."""
    arrays: dict[str, mx.array] = {}
    for file in path.glob("model*.safetensors"):
        arrays |= mx.load(str(file))
    return {name: (x.dtype, x.shape, np.array(x.view(mx.uint8)).tobytes()) for name, x in arrays.items()}


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def logits(model) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))


def their_logits(path: Path) -> np.ndarray:
    from mlx_lm.utils import load_model

    return logits(load_model(path)[0])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """BF16 as published, vision and all, with what a tokenizer needs: mlx-lm's converter loads one."""
    path = checkpoints.published(tmp_path_factory.mktemp("source"), CONFIG, TENSORS, shards=3)
    for file in tiny.PATH.iterdir():
        if file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copy(file, path)
    return path


# our flags, and mlx-lm's
CONVERSIONS = {
    "copy": ([], {}),
    "4 bits": (["--bits", "4"], {"quantize": True, "q_bits": 4}),
    "3 bits, group 32": (["--bits", "3", "--group-size", "32"], {"quantize": True, "q_bits": 3, "q_group_size": 32}),
    "6 bits, group 128": (["--bits", "6", "--group-size", "128"], {"quantize": True, "q_bits": 6, "q_group_size": 128}),
    **{mode: (["--mode", mode], {"quantize": True, "q_mode": mode}) for mode in ("mxfp4", "mxfp8", "nvfp4")},
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_as_mlx_lm_converts(tmp_path, published, name):
    """Every tensor bit for bit, but the router's gate: we quantise the float32 that is published, mlx-lm that rounded
    to bfloat16. And the same config."""
    from mlx_lm.convert import convert as mlx_lm_convert

    flags, arguments = CONVERSIONS[name]
    ours = convert(published, tmp_path / "ours", *flags)
    mlx_lm_convert(str(published), str(tmp_path / "theirs"), **arguments)
    got, wanted = stored(ours), stored(tmp_path / "theirs")
    assert got.keys() == wanted.keys()
    gates = {tensor for tensor in got if ".block_sparse_moe.gate." in tensor}
    assert {tensor for tensor in got if got[tensor] != wanted[tensor]} == gates
    for layer in (1, 2):
        gate = f"language_model.model.layers.{layer}.block_sparse_moe.gate"
        exact = mx.array(TENSORS[f"{gate}.weight"])
        leaves = mx.quantize(exact, group_size=64, bits=8) if arguments else [exact]
        for leaf, array in zip(("weight", "scales", "biases"), leaves):
            assert got[f"{gate}.{leaf}"] == (array.dtype, array.shape, np.array(array.view(mx.uint8)).tobytes())
    differing = {key for key in config_of(ours).keys() | config_of(tmp_path / "theirs").keys()
                 if config_of(ours).get(key) != config_of(tmp_path / "theirs").get(key)}  # fmt: skip
    assert differing <= {"eos_token_id"}  # mlx-lm adds generation_config.json's


MIXED = """
'*.self_attn.*': {bits: 6}
'*.self_attn.o_proj': {bits: 5, group_size: 128}
'*.switch_mlp.down_proj': {mode: mxfp8}
'*lm_head': false
"""
# mlx-lm's quantised embedding gives bfloat16 in these modes; left in float32, the whole forward is float32.
PLAIN_EMBEDDING = "'*.embed_tokens': false"
FORMATS = {
    "as it is": ([], None),
    "4 bits": (["--bits", "4"], None),
    "mixed": (["--bits", "3", "--group-size", "32"], MIXED),
    "mxfp4": (["--mode", "mxfp4"], PLAIN_EMBEDDING),
    "mxfp8": (["--mode", "mxfp8"], PLAIN_EMBEDDING),
    "nvfp4": (["--mode", "nvfp4"], PLAIN_EMBEDDING),
}
SOURCES = {
    "float32": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=2, dtype="F32"),
    "mxfp8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2, dtype="F32"),
    "fp8_block": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, dtype="F32"),
    "resaved": lambda path: checkpoints.published(path, resaved(CONFIG), TENSORS, dtype="F32"),
    "text only": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, layout="d", mode=None, dtype="F32"),
    "8 bits, packed": lambda path: checkpoints.mlx_layout(path, CONFIG, TENSORS, layout="b", bits=8, dtype="F32"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_same_logits(tmp_path, source, form):
    """mlx-lm and m3dist read the result alike, and where nothing was quantised anew as m3dist reads the source."""
    flags, overrides = FORMATS[form]
    if overrides:
        (tmp_path / "overrides.yaml").write_text(overrides)
        flags = [*flags, "--overrides", str(tmp_path / "overrides.yaml")]
    path = convert(SOURCES[source](tmp_path / "source"), tmp_path / "out", *flags)
    got = logits(load(path))
    assert relative_error(got, their_logits(path)) < TOLERANCE
    if form == "as it is":
        assert (got == logits(load(tmp_path / "source"))).all()
    else:
        assert "quantization" in config_of(path)


def test_from_bfloat16(published, tmp_path):
    """mlx-lm computes in bfloat16 here, in which no two implementations round alike: so against the float32 weights
    that the files stand for."""
    path = convert(published, tmp_path / "out", "--bits", "4")
    assert relative_error(logits(load(path, "float32")), logits(build(CONFIG, dequantised(path)))) < TOLERANCE
    assert np.isfinite(their_logits(path)).all()


@pytest.mark.parametrize("flags", [[], ["--bits", "4"], ["--mode", "mxfp4"]], ids=str)
def test_again_the_same_bytes(tmp_path, published, flags):
    first = convert(published, tmp_path / "first", *flags)
    again = convert(first, tmp_path / "again", *flags)
    assert stored(again) == stored(first) and config_of(again) == config_of(first)
    assert stored(convert(first, tmp_path / "plain")) == stored(first)


def test_published_mxfp8_keeps_its_bytes(tmp_path):
    """The published bytes are MLX's format under other names; embedding, head and router are quantised anew."""
    source = checkpoints.mxfp8(tmp_path / "source", CONFIG, TENSORS)
    plain, quantised = convert(source, tmp_path / "plain"), convert(source, tmp_path / "mxfp8", "--mode", "mxfp8")
    new = {"embed_tokens", "lm_head", "gate"}
    for name, tensor in stored(plain).items():
        if name.split(".")[-2] not in new:
            assert stored(quantised)[name] == tensor
    assert config_of(plain)["quantization"]["mode"] == "mxfp8"
    assert config_of(plain)["quantization"]["language_model.lm_head"] is False
    assert "language_model.lm_head" not in config_of(quantised)["quantization"]
