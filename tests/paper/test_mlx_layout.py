"""What a converted checkpoint holds, and where each row of it is from."""

import json
import math

import checkpoints
import numpy as np
import pytest
from checkpoints import all_sparse_config, random_tensors, resaved, tiny_config

from m3dist.config import ModelConfig
from m3dist.fetch import mlx_layout
from m3dist.fetch.target import lay_out
from m3dist.quantization import Recipe, requantised
from m3dist.tensors import MXFP8, Inventory, Quantization
from m3dist.translation import translate

CONFIG = tiny_config(num_hidden_layers=3)
FOUR = Quantization("affine", 4, 32)
DOWN = ("*.switch_mlp.down_proj", MXFP8)
RECIPES = {
    "floats": Recipe(None),
    "affine": Recipe(FOUR),
    "mxfp4": Recipe(Quantization("mxfp4", 4, 32)),
    "mixed": Recipe(FOUR, (("*.self_attn.*", None), DOWN, ("*.switch_mlp.gate_up_proj", Quantization("nvfp4", 4, 16)))),
}
CONFIGS = {
    "published": CONFIG,
    "all sparse": all_sparse_config(num_hidden_layers=2),
    "tied": tiny_config(num_hidden_layers=2, tie_word_embeddings=True),
}


def inventory(config: dict = CONFIG, recipe: Recipe = RECIPES["floats"], dtype: str = "BF16") -> Inventory:
    return requantised(Inventory(ModelConfig.from_dict(config), dtype), recipe)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_read_back_it_is_the_same_model(config, recipe):
    """As m3dist reads converted files: the same formats, and every row of ours from the row it was written to."""
    wanted = inventory(CONFIGS[config], RECIPES[recipe])
    outputs = {tensor.name: tensor for tensor in mlx_layout.output_tensors(wanted)}
    stored = {name: (tensor.spec.shape, tensor.spec.dtype) for name, tensor in outputs.items()}
    read = translate(wanted.config, stored)
    assert read.ignored == () and read.inventory.dtype == "BF16"
    assert {k: q for k, q in read.inventory.quantization.items() if q} == {
        k: q for k, q in wanted.quantization.items() if q
    }
    for name, assembly in read.assemblies.items():
        assert assembly.spec == wanted.specs()[name]
        for piece in assembly.pieces:
            written = [(part.tensor, row) for part in outputs[piece.tensor].parts for row in range(*part.rows)]
            got = written[piece.row : piece.row + piece.rows]
            assert got == [(name, row) for row in range(piece.at, piece.at + piece.rows)]
    for tensor in outputs.values():
        assert all(part.columns is None for part in tensor.parts)
        assert sum(b - a for part in tensor.parts for a, b in [part.rows]) == math.prod(tensor.spec.shape[:-1])


def test_the_tensors_of_an_mlx_lm_conversion():
    """Names, shapes and rows, against a conversion made without any of this."""
    arrays = checkpoints.arranged(CONFIG, random_tensors(CONFIG, seed=5), "a")
    outputs = mlx_layout.output_tensors(inventory(dtype="F32"))
    assert {tensor.name: tensor.spec.shape for tensor in outputs} == {name: a.shape for name, a in arrays.items()}
    ours = {name: array.reshape(-1, array.shape[-1]) for name, array in arrays.items()}
    for moe in ("layers.1.block_sparse_moe.switch_mlp", "layers.2.block_sparse_moe.shared_experts", "layers.0.mlp"):
        gate, up = (arrays[f"language_model.model.{moe}.{half}_proj.weight"] for half in ("gate", "up"))
        both = np.concatenate([gate, up], axis=-2)
        ours[f"language_model.model.{moe}.gate_up_proj.weight"] = both.reshape(-1, both.shape[-1])
    for tensor in outputs:
        if all(part.tensor in ours for part in tensor.parts):
            rows = np.concatenate([ours[part.tensor][slice(*part.rows)] for part in tensor.parts])
            assert np.array_equal(rows.reshape(tensor.spec.shape), arrays[tensor.name])
    assert sum("gate_up_proj" in part.tensor for tensor in outputs for part in tensor.parts[:1]) == 2 * 5


def test_files_and_index():
    files = lay_out(mlx_layout.output_tensors(inventory()), 100_000, mlx_layout.file_names)
    assert [file.name for file in files][:1] == [f"model-00001-of-{len(files):05}.safetensors"] and len(files) > 3
    found = json.loads(json.dumps(mlx_layout.index(files)))
    assert found["weight_map"] == {tensor.name: file.name for file in files for tensor in file.tensors}
    assert list(found["weight_map"]) == sorted(found["weight_map"])
    assert found["metadata"] == {"total_size": sum(spec.nbytes for spec in inventory().specs().values())}
    (single,) = lay_out(mlx_layout.output_tensors(inventory()), mlx_layout.LARGEST_FILE, mlx_layout.file_names)
    assert single.name == "model.safetensors"


GATES = [f"language_model.model.layers.{layer}.block_sparse_moe.gate" for layer in (1, 2)]


def test_formats_in_config():
    found = mlx_layout.config(CONFIG, inventory(recipe=Recipe(FOUR)))
    router = {"group_size": 64, "bits": 8}
    assert found["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} | dict.fromkeys(GATES, router)
    assert found["quantization_config"] == found["quantization"]
    same = mlx_layout.config(CONFIG, inventory(recipe=Recipe(MXFP8)))["quantization"]
    assert same == {"group_size": 32, "bits": 8, "mode": "mxfp8"} | dict.fromkeys(GATES, router)


def test_formats_of_single_modules_in_config():
    """Under mlx-lm's names; where gate and up are one module here, both."""
    found = mlx_layout.config(CONFIG, inventory(recipe=RECIPES["mixed"]))["quantization"]
    assert (found["bits"], found["group_size"], found["mode"]) == (4, 32, "affine")
    layer = "language_model.model.layers.1."
    assert found[layer + "self_attn.index_q_proj"] is False and layer + "self_attn.q_norm" not in found
    experts = layer + "block_sparse_moe.switch_mlp."
    assert found[experts + "gate_proj"] == found[experts + "up_proj"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert found[experts + "down_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert experts + "gate_up_proj" not in found and "language_model.lm_head" not in found
    assert found[GATES[0]] == {"group_size": 64, "bits": 8}


def test_the_rest_of_config():
    """As mlx-lm's converter leaves it, but that nothing is left to defaults in which mlx-lm differs."""
    source = {
        **CONFIG,
        "_name_or_path": "/somewhere",
        "quantization_config": {"quant_method": "mxfp8"},
        "text_config": {**CONFIG["text_config"], "quantization_config": {"quant_method": "mxfp8"}},
    }
    plain = mlx_layout.config(source, inventory())
    assert plain == {name: value for name, value in CONFIG.items() if name != "vision_config"}
    assert list(plain) == sorted(plain)
    assert "quantization_config" in source["text_config"]  # the source's is not changed
    quantised = mlx_layout.config(source, inventory(recipe=Recipe(FOUR)))
    assert quantised["quantization_config"]["bits"] == 4 and "quantization_config" not in quantised["text_config"]


@pytest.mark.parametrize("spelling", ["published", "resaved", "text only", "no rotary_dim"])
def test_config_means_the_same(spelling):
    source = {
        "published": CONFIG,
        "resaved": resaved(CONFIG),
        "text only": checkpoints.arranged_config(CONFIG, "e"),
        "no rotary_dim": {
            **CONFIG,
            "text_config": {k: v for k, v in CONFIG["text_config"].items() if "rotary" not in k},
        },
    }[spelling]
    before = ModelConfig.from_dict(source)
    made = mlx_layout.config(source, inventory(source))
    after = ModelConfig.from_dict(json.loads(json.dumps(made)))
    assert vars(after) | {"model_type": ""} == vars(before) | {"model_type": ""}
    assert after.model_type == "minimax_m3_vl"
    text = made["text_config"]
    assert (text["rotary_dim"], text["tie_word_embeddings"]) == (before.rotary_dim, before.tie_word_embeddings)
