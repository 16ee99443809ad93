"""config.json -> ModelConfig. The only file that knows both published spellings.

MiniMaxAI publishes a nested spelling (`sparse_attention_config`, `moe_layer_freq`, ...); transformers 5 re-saves a flat
one (`index_n_heads`, `layer_types`, ...). Where a config carries both, the nested number wins, as in transformers.
No number of MiniMax-M3 is assumed where the config can say it: M3.1 reuses the model_type with other numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3dist.errors import ConfigError

CONFIG = "config.json"
MOST_LAYERS = 1000  # M3 has 60; planning takes time for each
MODEL_TYPES = ("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3_text", "minimax_m3")


@dataclass(frozen=True)
class ModelConfig:
    """The text model's numbers, in the published field names. Sizes count elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe_layer_freq: tuple[bool, ...]  # per layer: mixture of experts, or a dense MLP
    dense_intermediate_size: int
    intermediate_size: int  # width of one routed expert
    shared_intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    swiglu_alpha: float
    swiglu_limit: float
    sparse_attention_freq: tuple[bool, ...]  # per layer: block-sparse attention, or full
    sparse_num_index_heads: int
    sparse_index_dim: int
    sparse_block_size: int
    sparse_topk_blocks: int
    sparse_local_block: int
    sparse_init_block: int
    quantization: Mapping[str, Any] | None = None  # MLX's own dict, or the published quantization_config

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a whole config.json (or its text_config alone), in either spelling.

        Raises ConfigError, naming the field, for anything this model code does not compute.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"config.json must hold a JSON object, not {type(config).__name__}")
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise ConfigError("config.json: text_config must be an object")
        reader = _Reader(text)
        _check_supported(config, text, reader)
        layers = reader.integer("num_hidden_layers")
        if layers > MOST_LAYERS:
            raise ConfigError(f"config.json: {layers} layers are too many; at most {MOST_LAYERS} are read")
        heads, head_dim = reader.integer("num_attention_heads"), reader.integer("head_dim")
        sparse = _layer_flags(
            reader, "sparse_attention_freq", "layer_types", "minimax_m3_sparse", layers, default=False
        )
        any_sparse = any(sparse)
        built = cls(
            model_type=str(config.get("model_type") or text.get("model_type") or ""),
            vocab_size=reader.integer("vocab_size"),
            hidden_size=reader.integer("hidden_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=reader.integer("num_key_value_heads"),
            head_dim=head_dim,
            rotary_dim=_rotary_dim(reader, head_dim),
            rope_theta=reader.number("rope_theta", default=5e6),
            rms_norm_eps=reader.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=reader.integer("max_position_embeddings"),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            moe_layer_freq=_layer_flags(reader, "moe_layer_freq", "mlp_layer_types", "sparse", layers, default=True),
            dense_intermediate_size=reader.integer("dense_intermediate_size"),
            intermediate_size=reader.integer("intermediate_size"),
            shared_intermediate_size=reader.integer("shared_intermediate_size"),
            num_local_experts=reader.integer("num_local_experts"),
            num_experts_per_tok=reader.integer("num_experts_per_tok"),
            routed_scaling_factor=reader.number("routed_scaling_factor", default=2.0),
            swiglu_alpha=reader.number("swiglu_alpha", default=1.702),
            swiglu_limit=reader.number("swiglu_limit", default=7.0),
            sparse_attention_freq=sparse,
            sparse_num_index_heads=reader.integer("sparse_num_index_heads") if any_sparse else 0,
            sparse_index_dim=reader.integer("sparse_index_dim") if any_sparse else 0,
            sparse_block_size=reader.integer("sparse_block_size") if any_sparse else 0,
            sparse_topk_blocks=reader.integer("sparse_topk_blocks") if any_sparse else 0,
            sparse_local_block=reader.integer("sparse_local_block", default=1, least=0),
            sparse_init_block=reader.integer("sparse_init_block", default=0, least=0),
            quantization=config.get("quantization") or config.get("quantization_config"),
        )
        _check_consistent(built)
        return built

    @property
    def query_heads_per_kv_head(self) -> int:
        """G of grouped-query attention: query head j reads KV head j // G."""
        return self.num_attention_heads // self.num_key_value_heads


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object in `directory`/config.json. Raises ConfigError naming the file."""
    path = directory / CONFIG
    try:
        return parse_config(path, path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: is {directory} a checkpoint directory?") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a config.json, which `path` names in errors. Raises ConfigError."""
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


# nested (published) name -> (where it is nested, the flat name of a transformers-5 re-save)
_SPELLINGS = {
    "sparse_num_index_heads": ("sparse_attention_config", "index_n_heads"),
    "sparse_index_dim": ("sparse_attention_config", "index_head_dim"),
    "sparse_block_size": ("sparse_attention_config", "index_block_size"),
    "sparse_topk_blocks": ("sparse_attention_config", "index_topk_blocks"),
    "sparse_local_block": ("sparse_attention_config", "index_local_blocks"),
    "sparse_init_block": ("sparse_attention_config", "sparse_init_block"),
    "sparse_attention_freq": ("sparse_attention_config", "sparse_attention_freq"),
    "rope_theta": ("rope_parameters", "rope_theta"),
    "partial_rotary_factor": ("rope_parameters", "partial_rotary_factor"),
}


class _Reader:
    """Looks a field up under both spellings and checks its type; every error names the field."""

    def __init__(self, text: Mapping[str, Any]):
        self.text = text

    def get(self, name: str) -> Any:
        """The value, or None where neither spelling has it."""
        nested, flat = _SPELLINGS.get(name, (None, name))
        value = self.group(nested).get(name) if nested else None
        return self.text.get(flat) if value is None else value

    def group(self, name: str) -> Mapping[str, Any]:
        """A nested object of the config, empty where there is none."""
        group = self.text.get(name) or {}
        if not isinstance(group, Mapping):
            raise ConfigError(f"config.json: {name} must be an object, not {group!r}")
        return group

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"config.json: text_config has no {name}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"config.json: {name} must be an integer of at least {least}, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"config.json: {name} must be a positive number, not {value!r}")
        return float(value)


def _layer_flags(
    reader: _Reader, published: str, resaved: str, word: str, layers: int, default: bool
) -> tuple[bool, ...]:
    """One flag a layer, from layer-type words (re-saved; they win, as in transformers) or 0/1 numbers (published)."""
    words = reader.text.get(resaved)
    values = [w == word for w in words] if isinstance(words, list) else words
    if values is None:
        values = reader.get(published)
    if values is None:
        return (default,) * layers
    if not isinstance(values, list) or len(values) != layers:
        raise ConfigError(
            f"config.json: {published} (or {resaved}) must list {layers} entries, one a layer: {values!r}"
        )
    return tuple(bool(v) for v in values)


def _rotary_dim(reader: _Reader, head_dim: int) -> int:
    """Dimensions RoPE rotates. The factor wins over `rotary_dim`, which transformers never reads."""
    factor = reader.get("partial_rotary_factor")
    if factor is not None:
        return int(head_dim * reader.number("partial_rotary_factor", 1.0))
    return reader.integer("rotary_dim", default=head_dim)


def _check_supported(config: Mapping[str, Any], text: Mapping[str, Any], reader: _Reader) -> None:
    """Refuse what the published checkpoints never set and this code does not compute."""
    model_type = config.get("model_type") or text.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"config.json: model_type {model_type!r} is not MiniMax-M3 (one of {', '.join(MODEL_TYPES)})")
    sparse, rope = reader.group("sparse_attention_config"), reader.group("rope_parameters")
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("use_gemma_norm", text.get("use_gemma_norm"), (None, True)),
        ("use_qk_norm", text.get("use_qk_norm"), (None, True)),
        ("qk_norm_type", text.get("qk_norm_type"), (None, "per_head")),
        ("attention_output_gate", text.get("attention_output_gate"), (None, False)),
        ("scoring_func", text.get("scoring_func"), (None, "sigmoid")),
        ("n_shared_experts", text.get("n_shared_experts"), (None, 1)),
        ("swiglu_beta", text.get("swiglu_beta"), (None, 1, 1.0)),
        ("sparse_score_type", sparse.get("sparse_score_type"), (None, "max")),
        ("rope_parameters.rope_type", rope.get("rope_type"), (None, "default")),
        ("rope_scaling", text.get("rope_scaling"), (None,)),
    ]
    for name, value, allowed in wanted:
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed if a is not None) or "absent"
            raise ConfigError(f"config.json: {name} is {value!r}; this MiniMax-M3 code computes only {choices}")
    used = reader.get("sparse_attention_freq") or []
    index_value = sparse.get("sparse_disable_index_value", used)
    if isinstance(used, list) and isinstance(index_value, list):
        for layer, (is_sparse, disabled) in enumerate(zip(used, index_value)):
            if is_sparse and not disabled:
                raise ConfigError(
                    f"config.json: sparse_disable_index_value is 0 on layer {layer}; index values are not computed"
                )


def _check_consistent(c: ModelConfig) -> None:
    """Relations between fields that the forward relies on."""
    problems = [
        (
            c.num_attention_heads % c.num_key_value_heads != 0,
            "num_attention_heads is not a multiple of num_key_value_heads",
        ),
        (
            c.rotary_dim % 2 != 0 or c.rotary_dim > c.head_dim,
            f"rotary_dim {c.rotary_dim} must be even and at most head_dim",
        ),
        (c.num_experts_per_tok > c.num_local_experts, "num_experts_per_tok is above num_local_experts"),
    ]
    if any(c.sparse_attention_freq):
        problems += [
            (
                c.sparse_num_index_heads != c.num_key_value_heads,
                f"sparse_num_index_heads {c.sparse_num_index_heads} must equal num_key_value_heads"
                f" {c.num_key_value_heads}: index head h selects for KV head h",
            ),
            (c.rotary_dim > c.sparse_index_dim, f"rotary_dim {c.rotary_dim} is above sparse_index_dim"),
            (
                c.sparse_local_block + c.sparse_init_block > c.sparse_topk_blocks,
                "sparse_local_block + sparse_init_block is above sparse_topk_blocks",
            ),
        ]
    for wrong, message in problems:
        if wrong:
            raise ConfigError(f"config.json: {message}")
