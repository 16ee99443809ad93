"""Tiny random MiniMax-M3 checkpoints, in every layout that m3dist reads.

Everything starts from `tiny_config` and `random_tensors`: float32 numpy arrays under the published names. A writer
stores them in one layout; `dequantised` reads a written directory back into float32 arrays under the published names,
so that "what does this checkpoint stand for" has one answer that owes nothing to m3dist's own loader.

    config = tiny_config()
    tensors = random_tensors(config, seed=0)
    published(path, config, tensors, shards=3)
    mlx_layout(path, config, tensors, layout="b", mode="affine", bits=4, group_size=32)

Only the converted layouts need MLX; it is imported where it is used.
"""

import copy
import json
import re
import zlib
from pathlib import Path

import numpy as np

# What numpy holds a stored tensor's bits in, by safetensors dtype.
HOLDERS = {"BF16": "u2", "F16": "f2", "F32": "f4", "F8_E4M3": "u1", "U8": "u1", "U32": "u4"}
PARTS = ("weight", "scales", "biases")
DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}

# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def tiny_config(**overrides) -> dict:
    """A config.json in the published (nested) spelling; keywords override text_config or sparse_attention_config.

    Layer 0 is a dense MLP with full attention, the others are MoE with sparse attention, as in the real model. The
    per-layer lists follow `num_hidden_layers` unless they are given. The block budget is 3 blocks of 8 = 24 tokens.
    """
    layers = overrides.get("num_hidden_layers", 4)
    freq = [0] + [1] * (layers - 1)
    sparse = {
        "use_sparse_attention": True,
        "sparse_attention_freq": freq,
        "sparse_num_index_heads": overrides.get("num_key_value_heads", 4),
        "sparse_index_dim": 32,
        "sparse_block_size": 8,
        "sparse_topk_blocks": 3,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_score_type": "max",
        "sparse_disable_index_value": freq,
    }
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 96,
        "vocab_size": 160,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "rope_theta": 5000000,
        "rotary_dim": 16,
        "partial_rotary_factor": 0.5,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": freq,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "sparse_attention_config": sparse,
    }
    for key, value in overrides.items():
        target = sparse if key in sparse else text
        assert key in target, f"no such configuration field: {key}"
        target[key] = value
    if "partial_rotary_factor" not in overrides:  # the two spellings must agree, as they do in the published file
        text["partial_rotary_factor"] = text["rotary_dim"] / text["head_dim"]
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4",
        # The ids must exist in the tiny vocabulary: transformers looks them up in the embedding.
        "image_token_index": text["vocab_size"] - 2,
        "video_token_index": text["vocab_size"] - 1,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "projector_hidden_size": text["hidden_size"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "patch_size": 2,
            "image_size": 16,
            "num_channels": 3,
            "projection_dim": text["hidden_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "position_embedding_type": "rope",
            "rope_mode": "3d",
            "rope_theta": 10000.0,
            "img_token_compression_config": {
                "image_token_compression_method": "patch_merge",
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
    }


def all_sparse_config(**overrides) -> dict:
    """The variation M3.1 uses under the same model_type: every layer MoE and sparse, more experts per token."""
    layers = overrides.get("num_hidden_layers", 4)
    return tiny_config(
        **{
            "num_experts_per_tok": 4,
            "moe_layer_freq": [1] * layers,
            "sparse_attention_freq": [1] * layers,
            "sparse_disable_index_value": [1] * layers,
            **overrides,
        }
    )


FLAT_NAMES = {
    "sparse_num_index_heads": "index_n_heads",
    "sparse_index_dim": "index_head_dim",
    "sparse_block_size": "index_block_size",
    "sparse_topk_blocks": "index_topk_blocks",
    "sparse_local_block": "index_local_blocks",
}


def resaved(config: dict) -> dict:
    """The same configuration as transformers 5's `save_pretrained` spells it."""
    config = copy.deepcopy(config)
    text = config["text_config"]
    sparse = text.pop("sparse_attention_config")
    text.update({flat: sparse[name] for name, flat in FLAT_NAMES.items()})
    text["layer_types"] = ["minimax_m3_sparse" if f else "full_attention" for f in sparse["sparse_attention_freq"]]
    text["mlp_layer_types"] = ["sparse" if f else "dense" for f in text.pop("moe_layer_freq")]
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "partial_rotary_factor": text.pop("partial_rotary_factor"),
    }
    text.update(model_type="minimax_m3_vl_text", hidden_act="silu", bos_token_id=200034, eos_token_id=200020)
    config["vision_config"]["model_type"] = "minimax_m3_vl_vision"
    config["dtype"] = config.pop("torch_dtype")
    config["transformers_version"] = "5.23.0"
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def text_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor of the text model."""
    text = config["text_config"]
    sparse = text["sparse_attention_config"]
    hidden, head = text["hidden_size"], text["head_dim"]
    shapes = {"language_model.model.embed_tokens.weight": (text["vocab_size"], hidden)}
    for layer in range(text["num_hidden_layers"]):
        prefix = f"language_model.model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= attention_shapes(prefix + "self_attn.", text, sparse, sparse["sparse_attention_freq"][layer])
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if text["moe_layer_freq"][layer]:
            shapes |= moe_shapes(prefix + "block_sparse_moe.", text)
        else:
            shapes |= mlp_shapes(prefix + "mlp.", hidden, text["dense_intermediate_size"])
    shapes["language_model.model.norm.weight"] = (hidden,)
    assert head % 2 == 0
    if not text["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], hidden)
    return shapes


def attention_shapes(prefix: str, text: dict, sparse: dict, indexed: bool) -> dict[str, tuple[int, ...]]:
    hidden, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes = {
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "q_norm.weight": (head,),
        "k_norm.weight": (head,),
    }
    if indexed:
        dim = sparse["sparse_index_dim"]
        shapes["index_q_proj.weight"] = (sparse["sparse_num_index_heads"] * dim, hidden)
        shapes["index_k_proj.weight"] = (dim, hidden)
        shapes["index_q_norm.weight"] = (dim,)
        shapes["index_k_norm.weight"] = (dim,)
    return {prefix + name: shape for name, shape in shapes.items()}


def mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def moe_shapes(prefix: str, text: dict) -> dict[str, tuple[int, ...]]:
    hidden, width, experts = text["hidden_size"], text["intermediate_size"], text["num_local_experts"]
    shapes = {prefix + "gate.weight": (experts, hidden), prefix + "e_score_correction_bias": (experts,)}
    for expert in range(experts):
        shapes[f"{prefix}experts.{expert}.w1.weight"] = (width, hidden)
        shapes[f"{prefix}experts.{expert}.w2.weight"] = (hidden, width)
        shapes[f"{prefix}experts.{expert}.w3.weight"] = (width, hidden)
    return shapes | mlp_shapes(prefix + "shared_experts.", hidden, text["shared_intermediate_size"])


def vision_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of the vision tower and its projectors."""
    vision, hidden = config["vision_config"], config["text_config"]["hidden_size"]
    compression = vision["img_token_compression_config"]
    width, patch, inner = vision["hidden_size"], vision["patch_size"], config["projector_hidden_size"]
    tower = "vision_tower.vision_model."
    merged = hidden * compression["spatial_merge_size"] ** 2
    frames = compression["temporal_patch_size"]
    shapes = {tower + "embeddings.patch_embedding.weight": (width, vision["num_channels"], frames, patch, patch)}
    biased = {tower + "pre_layrnorm": (width,)}
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"{tower}encoder.layers.{layer}."
        biased |= {prefix + "layer_norm1": (width,), prefix + "layer_norm2": (width,)}
        biased |= {f"{prefix}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        biased[prefix + "mlp.fc1"] = (vision["intermediate_size"], width)
        biased[prefix + "mlp.fc2"] = (width, vision["intermediate_size"])
    biased["multi_modal_projector.linear_1"] = (inner, width)
    biased["multi_modal_projector.linear_2"] = (hidden, inner)
    biased["patch_merge_mlp.linear_1"] = (inner, merged)
    biased["patch_merge_mlp.linear_2"] = (hidden, inner)
    for name, shape in biased.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return shapes


def mtp_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """One next-token-prediction layer, as vLLM names it. No published checkpoint has it; a loader must ignore it."""
    text, hidden = config["text_config"], config["text_config"]["hidden_size"]
    prefix = "language_model.model.mtp.layers.0."
    block = prefix + "transformer_layer."
    shapes = {prefix + name + ".weight": (hidden,) for name in ("enorm", "hnorm", "final_layernorm")}
    shapes[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
    shapes |= {block + name + ".weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= attention_shapes(block + "self_attn.", text, text["sparse_attention_config"], True)
    return shapes | moe_shapes(block + "block_sparse_moe.", text)


def is_float32(name: str) -> bool:
    """The published tensors that are F32; all others are BF16."""
    return name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias", "patch_embedding.weight"))


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """A text matrix that a quantised checkpoint may store quantised: neither a norm nor a vision tensor."""
    return name.startswith("language_model.") and name.endswith(".weight") and len(shape) > 1


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values of unit variance that depend on the seed and the name only, scaled so that activations stay near
    1 and the clamps of SwigluOAI (at 7), the router and the block selection all take part.

    Uniform, not normal: the same bits on every platform, which a normal distribution (it needs a libm) is not.
    """
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = (generator.random(shape, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)
    if len(shape) == 1:
        values *= 0.2 if name.endswith("e_score_correction_bias") else 0.1
    elif re.search(r"(gate_proj|up_proj|w1|w3)\.weight$", name):
        values *= 2.5 / np.sqrt(shape[-1])
    elif not name.endswith("embed_tokens.weight"):
        values *= 1 / np.sqrt(np.prod(shape[1:]))
    return values if is_float32(name) else from_bf16(to_bf16(values))


def random_tensors(config: dict, seed: int = 0, vision: bool = False, mtp: bool = False) -> dict[str, np.ndarray]:
    """Published name -> float32 array; what the checkpoint stores as BF16 is exactly representable in it."""
    shapes = text_shapes(config)
    if vision:
        shapes |= vision_shapes(config)
    if mtp:
        shapes |= mtp_shapes(config)
    return {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Number formats (numpy has neither bf16 nor fp8)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bits as uint16, to the nearest, ties to even. No NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_values() -> np.ndarray:
    """The 256 values of F8_E4M3, by code: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = e4m3_values()
E4M3_MIDDLES = (E4M3[:126] + E4M3[1:127]) / 2


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """float32 -> codes as uint8, to the nearest, saturating at 448."""
    codes = np.searchsorted(E4M3_MIDDLES, np.abs(values)).astype(np.uint8)
    return codes | (values < 0).astype(np.uint8) << 7


def to_mxfp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] -> codes uint8 [out, in] and exponents uint8 [out, in / 32]; value = code * 2**(exponent - 127)."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    largest = np.maximum(np.abs(groups).max(-1), 1e-30)
    exponent = np.floor(np.log2(largest)) - 8  # the largest value lands in [256, 512)
    codes = to_e4m3(groups / np.exp2(exponent)[..., None])
    return codes.reshape(values.shape), (exponent + 127).astype(np.uint8)


def from_mxfp8(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    return E4M3[codes] * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, axis=-1)


def to_fp8_block(values: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] -> codes uint8 [out, in] and multipliers float32 [ceil(out / block), ceil(in / block)]."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, -rows % block), (0, -columns % block)))
    tiles = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scale = (np.maximum(np.abs(tiles).max((1, 3)), 1e-12) / 448).astype(np.float32)
    return to_e4m3(values / spread(scale, values.shape, block)), scale


def from_fp8_block(codes: np.ndarray, scale: np.ndarray, block: int = 128) -> np.ndarray:
    return E4M3[codes] * spread(scale, codes.shape, block)


def spread(scale: np.ndarray, shape: tuple[int, ...], block: int) -> np.ndarray:
    return np.repeat(np.repeat(scale, block, 0), block, 1)[: shape[0], : shape[1]]


# ---------------------------------------------------------------------------------------------------------------------
# Files. A stored tensor is (safetensors dtype, array of its bits).


def encode(values: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    return dtype, to_bf16(values) if dtype == "BF16" else np.ascontiguousarray(values, HOLDERS[dtype])


def decode(dtype: str, bits: np.ndarray) -> np.ndarray:
    """A stored tensor as float32 (F8 codes become their value, integers stay what they are)."""
    if dtype == "BF16":
        return from_bf16(bits)
    if dtype == "F8_E4M3":
        return E4M3[bits]
    return bits.astype(np.float32) if dtype in ("F16", "F32") else bits


def encode_plain(name: str, value: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """`dtype`, except for the tensors that are always F32."""
    return encode(value, "F32" if is_float32(name) else dtype)


def write_safetensors(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], data) -> None:
    """`entries`: name -> (dtype, shape). `data`: the tensors' bytes, in the same order; it may be a generator."""
    header, offset = {"__metadata__": {"format": "mlx"}}, 0
    for name, (dtype, shape) in entries.items():
        size = int(np.prod(shape)) * np.dtype(HOLDERS[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data)
        assert file.tell() == 8 + len(text) + offset


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        bits = np.frombuffer(data[start:end], HOLDERS[entry["dtype"]])
        stored[name] = (entry["dtype"], bits.reshape(entry["shape"]))
    return stored


def write(path, config: dict, stored: dict[str, tuple[str, np.ndarray]], shards: int = 1) -> Path:
    """Write config.json and the tensors, in `shards` files with an index when there is more than one."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    names = list(stored)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[shard * size : (shard + 1) * size]}
        entries = {name: (dtype, bits.shape) for name, (dtype, bits) in part.items()}
        write_safetensors(path / file, entries, (bits.tobytes() for _, bits in part.values()))
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        write_index(path, weight_map, sum(bits.nbytes for _, bits in stored.values()))
    return path


def write_index(path: Path, weight_map: dict[str, str], total_size: int) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def published(path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1, dtype: str = "BF16") -> Path:
    """The published layout: BF16 with F32 gate and bias (or F16 in its place, or everything F32)."""
    stored = {name: encode_plain(name, value, dtype) for name, value in tensors.items()}
    return write(path, config, stored, shards)


def unquantised(name: str, shape: tuple[int, ...]) -> bool:
    """What the published MXFP8 checkpoint leaves alone: embedding, head, router gate, norms, vision."""
    return not is_linear(name, shape) or name.endswith(
        ("embed_tokens.weight", "lm_head.weight", "block_sparse_moe.gate.weight")
    )


def mxfp8(path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1, dtype: str = "BF16") -> Path:
    """The published MXFP8 layout: F8_E4M3 weights, U8 exponents [out, in / 32] named weight_scale_inv. `dtype` is that
    of the tensors that stay floating point (F32 lets MLX's CPU backend run the model in float32)."""
    stored = {}
    for name, value in tensors.items():
        if unquantised(name, value.shape):
            stored[name] = encode_plain(name, value, dtype)
        else:
            codes, exponents = to_mxfp8(value)
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("U8", exponents)
    quantization = {
        "quant_method": "mxfp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [1, 32],
        "ignored_layers": ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"]
        + [name.removesuffix(".weight") for name in tensors if name.endswith("block_sparse_moe.gate.weight")],
    }
    return write(path, {**config, "dtype": "bfloat16", "quantization_config": quantization}, stored, shards)


def fp8_block(path, config: dict, tensors: dict[str, np.ndarray], shards: int = 1, dtype: str = "BF16") -> Path:
    """DeepSeek-style FP8: F8_E4M3 weights, F32 multipliers of 128 x 128 blocks named weight_scale_inv."""
    stored = {}
    for name, value in tensors.items():
        if unquantised(name, value.shape):
            stored[name] = encode_plain(name, value, dtype)
        else:
            codes, scale = to_fp8_block(value)
            stored[name] = ("F8_E4M3", codes)
            stored[name + "_scale_inv"] = ("F32", scale)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return write(path, {**config, "quantization_config": quantization}, stored, shards)


def mlx_layout(
    path,
    config: dict,
    tensors: dict[str, np.ndarray],
    layout: str = "a",
    mode: str | None = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    router_gate_bits8: bool = True,
    overrides: dict[str, dict | bool] | None = None,
    shards: int = 1,
    dtype: str = "BF16",
) -> Path:
    """A checkpoint as a converter for MLX writes it.

    layout: a  mlx-lm: experts stacked in switch_mlp, gate and up apart, shared expert apart, no vision
            b  mlx-vlm: gate and up packed, the shared expert as the last row of both, vision kept
            c  mlx-community: as a, vision kept
            d  text only: config flat with model_type minimax_m3, dense MLPs under block_sparse_moe, an extra `model.`
            e  text only: as d, but named as a plain mlx-lm text model (model.layers..., lm_head)
    mode: None, affine, mxfp4, nvfp4, mxfp8; bits and group_size default as in MLX. The router gate is 8-bit affine of
    group 64 where its width allows. As in MLX, a matrix whose width is no multiple of the group stays as it is.
    overrides: module path -> False (leave it) or {"bits", "group_size", "mode"}.
    dtype: of everything that is not quantised, and of affine scales and biases.
    """
    arrays = arranged(config, tensors, layout)
    config = arranged_config(config, layout)
    if mode is None:
        stored = {name: encode_plain(name, value, dtype) for name, value in arrays.items()}
        return write(path, config, stored, shards)
    default = {"group_size": group_size or DEFAULTS[mode][0], "bits": bits or DEFAULTS[mode][1], "mode": mode}
    # MLX writes no mode for the gate, although the default may be another one.
    gate = {"group_size": 64, "bits": 8} if router_gate_bits8 else False
    special = {name.removesuffix(".weight"): gate for name in arrays if name.endswith("block_sparse_moe.gate.weight")}
    special |= overrides or {}
    special = {name: choice for name, choice in special.items() if fits(arrays[name + ".weight"], choice, default)}
    stored = {}
    for name, value in arrays.items():
        module = name.removesuffix(".weight")
        choice = special.get(module, default)
        if is_linear(text_name(name), value.shape) and choice and fits(value, choice, default):
            stored |= quantised(module, value, {"mode": "affine", **choice}, dtype)
        else:
            stored[name] = encode_plain(name, value, dtype)
    quantization = {**default, **special}
    return write(path, {**config, "quantization": quantization, "quantization_config": quantization}, stored, shards)


def fits(value: np.ndarray, choice: dict | bool, default: dict) -> bool:
    """MLX's converters check the default group size; the special one must divide too, or quantising fails."""
    return not choice or all(value.shape[-1] % each["group_size"] == 0 for each in (default, choice))


def quantised(module: str, value: np.ndarray, choice: dict, dtype: str) -> dict[str, tuple[str, np.ndarray]]:
    """One matrix (or stack of them) -> its .weight U32, .scales and, for affine, .biases."""
    import mlx.core as mx

    kind = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}[dtype]
    stored = {}
    for part, array in zip(PARTS, mx.quantize(mx.array(value).astype(kind), **choice), strict=False):
        if array.dtype in (mx.uint32, mx.uint8):
            stored[f"{module}.{part}"] = ("U32" if array.dtype == mx.uint32 else "U8", np.array(array))
        else:
            stored[f"{module}.{part}"] = encode(np.array(array.astype(mx.float32)), dtype)
    return stored


def arranged(config: dict, tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The tensors under the names, and stacked as, a converted layout has them (float32)."""
    text = config["text_config"]
    arrays = {name: value for name, value in tensors.items() if ".experts." not in name and ".mtp." not in name}
    if layout in "ade":
        arrays = {name: value for name, value in arrays.items() if name.startswith("language_model.")}
    for layer, is_moe in enumerate(text["moe_layer_freq"]):
        prefix = f"language_model.model.layers.{layer}."
        moe = prefix + "block_sparse_moe."
        if not is_moe:
            if layout in "de":
                for name in ("gate_proj", "up_proj", "down_proj"):
                    arrays[f"{moe}{name}.weight"] = arrays.pop(f"{prefix}mlp.{name}.weight")
            continue
        gate, down, up = (
            np.stack([tensors[f"{moe}experts.{e}.{w}.weight"] for e in range(text["num_local_experts"])])
            for w in ("w1", "w2", "w3")
        )
        if layout == "b":
            shared = [arrays.pop(f"{moe}shared_experts.{w}_proj.weight")[None] for w in ("gate", "up", "down")]
            gate, up, down = (np.concatenate(pair) for pair in zip((gate, up, down), shared, strict=True))
            arrays[moe + "switch_mlp.gate_up_proj.weight"] = np.concatenate([gate, up], axis=1)
        else:
            arrays[moe + "switch_mlp.gate_proj.weight"] = gate
            arrays[moe + "switch_mlp.up_proj.weight"] = up
        arrays[moe + "switch_mlp.down_proj.weight"] = down
    if layout == "d":
        return {"model." + name: value for name, value in arrays.items()}
    if layout == "e":
        return {name.removeprefix("language_model."): value for name, value in arrays.items()}
    return arrays


def arranged_config(config: dict, layout: str) -> dict:
    """mlx-lm drops vision_config when it saves; the text-only builds have no text_config either."""
    if layout in "de":
        return {**config["text_config"], "architectures": ["MiniMaxM3ForCausalLM"], "model_type": "minimax_m3"}
    return {key: value for key, value in config.items() if key != "vision_config" or layout in "bc"}


def text_name(name: str) -> str:
    """A tensor's name in a converted layout -> the same with the published `language_model.` in front."""
    if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
        return "language_model." + name
    return name.removeprefix("model.")


# ---------------------------------------------------------------------------------------------------------------------
# Reading back


def dequantised(path) -> dict[str, np.ndarray]:
    """The float32 weights, under the published names, that a written checkpoint stands for (whatever its layout)."""
    path = Path(path)
    config = json.loads((path / "config.json").read_text())
    stored = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= read_safetensors(file)
    values = {}
    for name, (dtype, bits) in stored.items():
        if name.endswith((".scales", ".biases", "_scale_inv")):
            continue
        module, scale = name.removesuffix(".weight"), stored.get(name + "_scale_inv")
        if scale is not None:
            values[name] = (from_mxfp8 if scale[0] == "U8" else from_fp8_block)(bits, scale[1])
        elif module + ".scales" in stored:
            values[text_name(name)] = unpacked(module, stored, config["quantization"])
        else:
            values[text_name(name)] = decode(dtype, bits)
    return separated(values)


def unpacked(module: str, stored: dict[str, tuple[str, np.ndarray]], quantization: dict) -> np.ndarray:
    """One MLX-quantised matrix (or stack of them) as float32."""
    import mlx.core as mx

    default = {key: quantization[key] for key in ("group_size", "bits", "mode")}
    choice = {"mode": "affine", **quantization.get(module, default)}
    # Scales widen to float32 first: the products then are what a float32 forward pass computes with.
    parts = [mx.array(decode(*stored[f"{module}.{part}"])) for part in PARTS if f"{module}.{part}" in stored]
    return np.array(mx.dequantize(*parts, **choice, dtype=mx.float32))


def separated(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo a converter's stacking and packing: per-expert w1, w2, w3 and a shared expert, dense MLPs under mlp."""
    found = {name: value for name, value in values.items() if ".switch_mlp." not in name}
    for name in [name for name in found if re.search(r"block_sparse_moe\.(gate|up|down)_proj", name)]:
        found[name.replace("block_sparse_moe", "mlp")] = found.pop(name)
    for gate_name in [name for name in values if name.endswith("block_sparse_moe.gate.weight")]:
        moe, experts = gate_name.removesuffix("gate.weight"), len(values[gate_name])
        stacks = {w: values.get(f"{moe}switch_mlp.{w}_proj.weight") for w in ("gate_up", "gate", "up", "down")}
        if stacks["gate_up"] is not None:
            stacks["gate"], stacks["up"] = np.split(stacks["gate_up"], 2, axis=1)
        for part, published_name in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            stack = stacks[part]
            if stack is None:  # the experts have their published names already
                continue
            found |= {f"{moe}experts.{e}.{published_name}.weight": stack[e] for e in range(experts)}
            if len(stack) == experts + 1:
                found[f"{moe}shared_experts.{part}_proj.weight"] = stack[experts]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Something big


def synthetic_config(gigabytes: float, **overrides) -> dict:
    """Real proportions at a sixth of the width; as many layers as fit in about `gigabytes` of BF16."""
    fields = {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "head_dim": 128,
        "rotary_dim": 64,
        "intermediate_size": 1024,
        "dense_intermediate_size": 4096,
        "shared_intermediate_size": 1024,
        "vocab_size": 20480,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "sparse_index_dim": 128,
        "sparse_block_size": 128,
        "sparse_topk_blocks": 16,
    }
    fields |= overrides
    if "num_hidden_layers" not in fields:
        small, large = (size_of(tiny_config(**fields, num_hidden_layers=n)) for n in (1, 2))
        fields["num_hidden_layers"] = 1 + max(0, round((gigabytes * 1e9 - small) / (large - small)))
    return tiny_config(**fields)


def size_of(config: dict) -> int:
    """Bytes of the published BF16 text tensors."""
    return sum(int(np.prod(shape)) * (4 if is_float32(name) else 2) for name, shape in text_shapes(config).items())


def synthetic(path, gigabytes: float = 2.0, shards: int = 6, seed: int = 0, **overrides) -> Path:
    """A big checkpoint in the published BF16 layout, written tensor by tensor, for timing loaders.

    The values are pieces of one pool of random bf16 numbers of plausible size: enough to tell any two tensors apart,
    and about as quick as the disk.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = synthetic_config(gigabytes, **overrides)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shapes = text_shapes(config)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(2**20, dtype=np.float32) / np.float32(config["text_config"]["hidden_size"] ** 0.5)
    pool = np.concatenate([pool, pool])  # a piece may start anywhere in the first half
    pools = {"F32": pool, "BF16": to_bf16(pool)}
    entries = {name: ("F32" if is_float32(name) else "BF16", shape) for name, shape in shapes.items()}

    def piece(name: str) -> memoryview:
        dtype, shape = entries[name]
        start = zlib.crc32(name.encode()) % 2**20
        return np.resize(pools[dtype][start : start + 2**20], shape).data

    names, weight_map = list(entries), {}
    size = -(-len(names) // shards)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * size : (shard + 1) * size]
        write_safetensors(path / file, {name: entries[name] for name in part}, map(piece, part))
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map, size_of(config))
    return path
