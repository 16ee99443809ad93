"""Which model is measured, and at which lengths. No MLX."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from m3dist.checkpoint import local
from m3dist.config import ModelConfig, read_config
from m3dist.errors import ConfigError, PlanError
from m3dist.layout import kv_heads
from m3dist.options import BenchOptions
from m3dist.plan import INDEX_BYTES, Plan
from m3dist.plan_report import inventory_of
from m3dist.quantization import converted
from m3dist.tensors import BYTES, Inventory, Quantization

# What --random takes: the format of the weights, or the dtype of weights that are not quantised.
FORMATS: Mapping[str, Quantization | str] = {
    **{f"{bits}bit": Quantization("affine", bits, 64) for bits in (3, 4, 5, 6, 8)},
    "mxfp4": Quantization("mxfp4", 4, 32),
    "mxfp8": Quantization("mxfp8", 8, 32),
    "nvfp4": Quantization("nvfp4", 4, 16),
    "bf16": "BF16",
    "f32": "F32",
}
DECODE = (512, 16384, 32768)  # where --decode is left out, as far as the model goes
PREFILL = (2048, 8192)
SLACK = 8  # tokens that a decode run is longer than --tokens, at most
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def check(options: BenchOptions, world: int) -> None:
    """Raises M3Error for what cannot be measured on `world` ranks, as far as that is known without a download."""
    model = options.model or "tiny"
    if options.random:
        config = random_inventory(options, "float32")[0].config
    elif directory := local(model):
        config = ModelConfig.from_dict(read_config(directory))
    else:
        return
    lengths(options, config)
    if options.vs:
        check_peer(config, world)


def random_inventory(options: BenchOptions, dtype: str) -> tuple[Inventory, str]:
    """The tensors that `--random` asks for, and a word on them. `dtype`: of activations, where weights are quantised.

    Raises PlanError or ConfigError for a model or a field that cannot be.
    """
    assert options.random
    inventory, source = inventory_of(options.model or "MiniMaxAI/MiniMax-M3", None, None, None)
    config = changed(inventory.config, options)
    wanted = FORMATS[options.random]
    if isinstance(wanted, str):
        made = replace(converted(config, None), dtype=wanted)
    else:
        made = replace(converted(config, wanted), dtype=SAFETENSORS[dtype])
    words = [source.partition(",")[0], *(f"{name} {value}" for name, value in options.set)]
    words += [f"{config.num_hidden_layers} layers", f"random {wanted}"]
    return made, ", ".join(words)


def changed(config: ModelConfig, options: BenchOptions) -> ModelConfig:
    """The config with `--layers` kept and `--set` applied. Raises ConfigError, naming the flag or the field."""
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    new: dict[str, Any] = {}
    for name, text in options.set:
        if name not in known or not isinstance(known[name], int | float | tuple):
            raise ConfigError(f"--set {name}: the config has no such number")
        try:
            flags = tuple({"0": False, "1": True}[digit] for digit in text) if isinstance(known[name], tuple) else ()
            new[name] = flags or type(known[name])(text)
        except (ValueError, KeyError):
            wanted = "a 0 or 1 for each layer, as in 0111" if isinstance(known[name], tuple) else "a number"
            raise ConfigError(f"--set {name}: must be {wanted}, not {text!r}") from None
    layers = options.layers or new.get("num_hidden_layers") or config.num_hidden_layers
    for name in ("moe_layer_freq", "sparse_attention_freq"):
        flags = new.get(name, known[name])
        if len(flags) < layers:
            raise ConfigError(f"--layers {layers}: {name} says what {len(flags)} layers are")
        new[name] = flags[:layers]
    made = replace(config, **new, num_hidden_layers=layers) if options.layers else replace(config, **new)
    return ModelConfig.from_dict(published(made))


def published(config: ModelConfig) -> dict[str, Any]:
    """A config.json that both ModelConfig.from_dict and mlx-lm's minimax_m3_vl read."""
    text = {f.name: getattr(config, f.name) for f in fields(config) if not f.name.startswith("sparse_")}
    del text["quantization"]
    text |= {"moe_layer_freq": [int(x) for x in config.moe_layer_freq]}
    if any(config.sparse_attention_freq):
        sparse = {f.name: getattr(config, f.name) for f in fields(config) if f.name.startswith("sparse_")}
        flags = [int(x) for x in config.sparse_attention_freq]
        text["sparse_attention_config"] = sparse | {
            "sparse_attention_freq": flags,
            "sparse_disable_index_value": flags,
        }
    return {"model_type": "minimax_m3_vl", "text_config": text}


def lengths(options: BenchOptions, config: ModelConfig) -> BenchOptions:
    """`options` with the default lengths filled in, as far as the model goes. Raises PlanError for one it cannot."""
    most = config.max_position_embeddings
    room = most - options.tokens - SLACK
    options = replace(
        options,
        decode=tuple(n for n in DECODE if n <= room) if options.decode is None else options.decode,
        prefill=tuple(n for n in PREFILL if n < most) if options.prefill is None else options.prefill,
    )
    assert options.decode is not None and options.prefill is not None
    for flag, longest, limit in (
        ("--decode", max(options.decode, default=0), room),
        ("--prefill", max(options.prefill, default=0), most - 2),
        ("--chunk-at", max((n + options.chunk for n in options.chunk_at), default=0), most - 2),
    ):
        if longest > limit:
            raise PlanError(f"{flag}: {longest} tokens and what follows are more than the model takes: {most}")
    return options


def longest(options: BenchOptions) -> int:
    """The most tokens that a cache holds in any run, of `lengths`' options."""
    decoded = max(options.decode or (), default=0) + options.tokens + SLACK
    return max([decoded, *(options.prefill or ()), *(depth + options.chunk for depth in options.chunk_at)])


def check_peer(config: ModelConfig, world: int) -> None:
    """Raises PlanError where mlx-lm's model cannot be cut over `world` ranks."""
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    for name, count in heads.items():
        if count % world:
            raise PlanError(f"--vs mlx-lm: mlx-lm cannot run {world} ranks: {world} does not divide {name}, {count}")


def cache_read_bytes(plan: Plan, rank: int, context: int) -> int:
    """Bytes of K, V and index K that a step of decode must read at a context, on one rank.

    A dense layer reads all of K and V. A sparse one reads the index K of all tokens, and K and V of
    sparse_topk_blocks blocks; below that budget it is a dense one and reads no index.
    """
    c = plan.inventory.config
    first, last = kv_heads(plan.shares[rank], c)
    kept = 2 * (last - first) * c.head_dim  # values of K and V a token
    sparse, budget = sum(c.sparse_attention_freq), c.sparse_topk_blocks * c.sparse_block_size
    values = (c.num_hidden_layers - sparse) * context * kept + sparse * min(context, budget) * kept
    index = sparse * context * c.sparse_index_dim if context > budget else 0
    return values * BYTES[plan.inventory.dtype] + index * INDEX_BYTES
