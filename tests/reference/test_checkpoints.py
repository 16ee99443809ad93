"""The checkpoints that all other tests read: their formats against MLX and safetensors, their sizes and their names."""

import json

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import dequantised, random_tensors, synthetic, tiny_config
from safetensors import safe_open

CONFIG = tiny_config(num_hidden_layers=2)
TENSORS = random_tensors(CONFIG, vision=True, mtp=True)


@pytest.mark.parametrize(("dtype", "loss"), [("BF16", 0), ("F32", 0), ("F16", 2**-11)])
def test_published(tmp_path, dtype, loss):
    """What is written is what is read back; only F16 loses bits (of numbers too small for it)."""
    path = checkpoints.published(tmp_path, CONFIG, TENSORS, shards=3, dtype=dtype)
    read = dequantised(path)
    assert read.keys() == TENSORS.keys()
    assert all(np.abs(read[name] - TENSORS[name]).max() <= loss for name in TENSORS)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(path / file, "numpy") as opened:  # the format's own library accepts the file
            assert set(opened.keys()) == {name for name, place in index["weight_map"].items() if place == file}


def test_e4m3():
    codes = np.arange(256, dtype=np.uint8)
    wanted = np.array(mx.from_fp8(mx.array(codes), dtype=mx.float32))
    assert np.array_equal(checkpoints.E4M3, wanted, equal_nan=True)
    number = ~np.isnan(wanted) & (wanted != 0)
    assert (checkpoints.to_e4m3(wanted[number]) == codes[number]).all()


def test_mxfp8_is_what_mlx_unpacks():
    values = TENSORS["language_model.model.layers.1.self_attn.o_proj.weight"]
    codes, exponents = checkpoints.to_mxfp8(values)
    packed = mx.array(codes.view(np.uint32))
    unpacked = mx.dequantize(packed, mx.array(exponents), mode="mxfp8", group_size=32, bits=8, dtype=mx.float32)
    assert (checkpoints.from_mxfp8(codes, exponents) == np.array(unpacked)).all()
    # 3 mantissa bits: half a step is 1/16 of a value; values above 448 of a group's 512 saturate, which costs 1/8.
    assert np.abs(np.array(unpacked) - values).max() <= np.abs(values).max() / 8


@pytest.mark.parametrize("write", [checkpoints.mxfp8, checkpoints.fp8_block])
def test_fp8_layouts(tmp_path, write):
    read = dequantised(write(tmp_path, CONFIG, TENSORS, shards=2))
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        kept = checkpoints.unquantised(name, value.shape)
        assert np.abs(read[name] - value).max() <= (0 if kept else np.abs(value).max() / 8)


def test_fp8_block_is_one_multiplier_a_block():
    """Edges that no block fits: [200, 300] has 2 x 3 multipliers, and each block reaches the full range."""
    values = np.random.default_rng(0).standard_normal((200, 300), dtype=np.float32)
    codes, scale = checkpoints.to_fp8_block(values)
    assert codes.shape == values.shape and scale.shape == (2, 3)
    assert scale[1, 2] == pytest.approx(np.abs(values[128:, 256:]).max() / 448)
    assert np.abs(checkpoints.from_fp8_block(codes, scale) - values).max() <= np.abs(values).max() / 16


@pytest.mark.parametrize("layout", "abcde")
def test_converted_layouts_keep_every_tensor(tmp_path, layout):
    read = dequantised(checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, layout=layout, mode=None))
    kept = {name for name in TENSORS if ".mtp." not in name and (layout in "bc" or name.startswith("language_model."))}
    assert read.keys() == kept
    assert all((read[name] == TENSORS[name]).all() for name in kept)


def test_synthetic(tmp_path):
    path = synthetic(tmp_path, gigabytes=0.02, shards=2, hidden_size=128, vocab_size=512, num_hidden_layers=2)
    config = json.loads((path / "config.json").read_text())
    read = dequantised(path)
    assert {name: value.shape for name, value in read.items()} == checkpoints.text_shapes(config)
    assert all(0 < np.abs(value).max() < 1 for value in read.values())
    assert len({value.tobytes() for value in read.values()}) == len(read)
