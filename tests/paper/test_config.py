"""Both published spellings mean one configuration, and what is not computed is refused by name."""

import copy

import checkpoints
import pytest

from m3dist.config import ModelConfig, read_config
from m3dist.errors import ConfigError


def text(config: dict) -> dict:
    return config["text_config"]


@pytest.mark.parametrize("make", [checkpoints.tiny_config, checkpoints.all_sparse_config])
def test_both_spellings_are_one_configuration(make):
    published = make()
    resaved = checkpoints.resaved(published)
    assert "sparse_attention_config" not in text(resaved) and "index_n_heads" in text(resaved)
    assert ModelConfig.from_dict(resaved) == ModelConfig.from_dict(published)


def test_a_text_config_alone_is_enough():
    config = checkpoints.tiny_config()
    alone = ModelConfig.from_dict(text(config) | {"model_type": "minimax_m3_vl_text"})
    assert alone.hidden_size == 64 and alone.sparse_attention_freq == (False, True, True, True)


def test_the_published_numbers(published):
    assert (published.num_hidden_layers, published.hidden_size, published.vocab_size) == (60, 6144, 200064)
    assert published.query_heads_per_kv_head == 16 and published.rotary_dim == 64
    assert sum(published.sparse_attention_freq) == sum(published.moe_layer_freq) == 57
    assert not any(published.sparse_attention_freq[:3])


def test_nested_numbers_win_over_flat_ones():
    config = checkpoints.tiny_config()
    text(config)["index_topk_blocks"] = 99
    assert ModelConfig.from_dict(config).sparse_topk_blocks == 3


def test_only_rotary_dim_means_rotary_dim():
    """A config with rotary_dim and no factor rotates every dimension in transformers: the trap of minimax-m3.md 1.1."""
    config = checkpoints.tiny_config()
    del text(config)["partial_rotary_factor"]
    text(config)["rotary_dim"] = 8
    assert ModelConfig.from_dict(config).rotary_dim == 8


def test_m3_1_counts_come_from_the_config():
    read = ModelConfig.from_dict(checkpoints.all_sparse_config(num_experts_per_tok=5))
    assert read.num_experts_per_tok == 5 and all(read.moe_layer_freq) and all(read.sparse_attention_freq)


@pytest.mark.parametrize(
    ("where", "field", "value", "message"),
    [
        ((), "model_type", "llama", "model_type 'llama' is not MiniMax-M3"),
        (("text_config",), "hidden_size", None, "no hidden_size"),
        (("text_config",), "hidden_size", "64", "hidden_size must be an integer of at least 1, not '64'"),
        (("text_config",), "num_hidden_layers", True, "num_hidden_layers must be an integer"),
        (("text_config",), "num_hidden_layers", 10**9, "1000000000 layers are too many; at most 1000 are read"),
        (("text_config",), "rms_norm_eps", -1, "rms_norm_eps must be a positive number"),
        (("text_config",), "moe_layer_freq", [1, 1], "moe_layer_freq (or mlp_layer_types) must list 4 entries"),
        (("text_config",), "num_key_value_heads", 3, "num_attention_heads is not a multiple of num_key_value_heads"),
        (("text_config",), "num_experts_per_tok", 99, "num_experts_per_tok is above num_local_experts"),
        (("text_config",), "attention_output_gate", True, "attention_output_gate is True"),
        (("text_config",), "scoring_func", "softmax", "scoring_func is 'softmax'"),
        (("text_config",), "qk_norm_type", "per_layer", "qk_norm_type is 'per_layer'"),
        (("text_config",), "n_shared_experts", 2, "n_shared_experts is 2"),
        (("text_config",), "rope_scaling", {"type": "yarn"}, "rope_scaling is"),
        (("text_config",), "sparse_attention_config", 5, "sparse_attention_config must be an object"),
        (("text_config", "sparse_attention_config"), "sparse_num_index_heads", 2, "must equal num_key_value_heads 4"),
        (("text_config", "sparse_attention_config"), "sparse_score_type", "mean", "sparse_score_type is 'mean'"),
        (("text_config", "sparse_attention_config"), "sparse_index_dim", 8, "rotary_dim 16 is above sparse_index_dim"),
        (
            ("text_config", "sparse_attention_config"),
            "sparse_disable_index_value",
            [0, 0, 1, 1],
            "sparse_disable_index_value is 0 on layer 1",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(where, field, value, message):
    config = copy.deepcopy(checkpoints.tiny_config())
    inner = config
    for name in where:
        inner = inner[name]
    inner[field] = value
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(config)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff"])
def test_a_config_file_that_is_none(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)
