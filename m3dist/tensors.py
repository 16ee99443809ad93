"""The tensors of a MiniMax-M3 as m3dist holds them: one name, shape and format each, whatever the file said.

Names are the published ones but for what is stored packed: the experts of a layer are one `switch_mlp` tensor with a
leading expert axis, and gate and up are one `gate_up_proj` (gate rows, then up rows): one matmul instead of two.
A *module* is a name without its last part; a quantised module holds `.weight`, `.scales` and perhaps `.biases`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError

PREFIX = "language_model."
LEAVES = ("weight", "scales", "biases")

# safetensors' dtype names -> bytes an element
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "U32": 4, "F8_E4M3": 1}
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Quantization:
    """MLX's quantisation of a matrix: `bits` a value, one scale for `group_size` consecutive values of a row."""

    mode: str  # affine, mxfp4, mxfp8 or nvfp4
    bits: int
    group_size: int

    @property
    def scales_dtype(self) -> str | None:
        """The dtype of the scales, or None where it is the model's float type (affine)."""
        return None if self.mode == "affine" else "U8"

    def packed(self, columns: int) -> int:
        """uint32 words that hold `columns` values of a row."""
        return columns * self.bits // 32

    def __str__(self) -> str:
        return f"{self.mode} {self.bits}-bit, group {self.group_size}"


MXFP8 = Quantization("mxfp8", 8, 32)
_NAMED_MODES = {("mxfp8", 8, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its shape as stored (quantised columns are packed in uint32) and safetensors dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        size = BYTES[self.dtype]
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Module:
    """One weight of the model before any quantisation.

    `shape` counts values: [out, in] for a linear, [experts, out, in] for the experts, [n] for a vector.
    """

    name: str
    shape: tuple[int, ...]
    bare: bool = False  # the name itself is the tensor (e_score_correction_bias), there is no `.weight`
    exact: bool = False  # kept in float32 whatever the model's dtype: the router

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1

    def tensors(self, dtype: str, quantization: Quantization | None = None) -> dict[str, TensorSpec]:
        """Name -> TensorSpec of everything stored for this module, with floats in `dtype`."""
        dtype = "F32" if self.exact else dtype
        if self.bare:
            return {self.name: TensorSpec(self.shape, dtype)}
        if quantization is None or not self.is_matrix:
            return {f"{self.name}.weight": TensorSpec(self.shape, dtype)}
        *lead, columns = self.shape
        groups = TensorSpec((*lead, columns // quantization.group_size), quantization.scales_dtype or dtype)
        tensors = {
            f"{self.name}.weight": TensorSpec((*lead, quantization.packed(columns)), "U32"),
            f"{self.name}.scales": groups,
        }
        if quantization.mode == "affine":
            tensors[f"{self.name}.biases"] = groups
        return tensors


def modules(config: ModelConfig) -> dict[str, Module]:
    """Every module of the text model, by name, in the order of the forward."""
    c, found = config, []
    hidden = c.hidden_size

    def add(name: str, *shape: int, bare: bool = False, exact: bool = False) -> None:
        found.append(Module(PREFIX + name, shape, bare, exact))

    add("model.embed_tokens", c.vocab_size, hidden)
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        add(f"{layer}.input_layernorm", hidden)
        add(f"{attention}.q_proj", c.num_attention_heads * c.head_dim, hidden)
        add(f"{attention}.k_proj", c.num_key_value_heads * c.head_dim, hidden)
        add(f"{attention}.v_proj", c.num_key_value_heads * c.head_dim, hidden)
        add(f"{attention}.q_norm", c.head_dim)
        add(f"{attention}.k_norm", c.head_dim)
        if c.sparse_attention_freq[i]:
            add(f"{attention}.index_q_proj", c.sparse_num_index_heads * c.sparse_index_dim, hidden)
            add(f"{attention}.index_k_proj", c.sparse_index_dim, hidden)
            add(f"{attention}.index_q_norm", c.sparse_index_dim)
            add(f"{attention}.index_k_norm", c.sparse_index_dim)
        add(f"{attention}.o_proj", hidden, c.num_attention_heads * c.head_dim)
        add(f"{layer}.post_attention_layernorm", hidden)
        if not c.moe_layer_freq[i]:
            add(f"{layer}.mlp.gate_up_proj", 2 * c.dense_intermediate_size, hidden)
            add(f"{layer}.mlp.down_proj", hidden, c.dense_intermediate_size)
            continue
        moe = f"{layer}.block_sparse_moe"
        add(f"{moe}.gate", c.num_local_experts, hidden, exact=True)
        add(f"{moe}.e_score_correction_bias", c.num_local_experts, bare=True, exact=True)
        add(f"{moe}.switch_mlp.gate_up_proj", c.num_local_experts, 2 * c.intermediate_size, hidden)
        add(f"{moe}.switch_mlp.down_proj", c.num_local_experts, hidden, c.intermediate_size)
        add(f"{moe}.shared_experts.gate_up_proj", 2 * c.shared_intermediate_size, hidden)
        add(f"{moe}.shared_experts.down_proj", hidden, c.shared_intermediate_size)
    add("model.norm", hidden)
    if not c.tie_word_embeddings:
        add("lm_head", c.vocab_size, hidden)
    return {m.name: m for m in found}


def split_name(name: str) -> tuple[str, str]:
    """A tensor's (module, leaf): ("...q_proj", "scales"); a bare tensor's leaf is ""."""
    module, _, leaf = name.rpartition(".")
    return (module, leaf) if leaf in LEAVES else (name, "")


def infer_quantization(module: Module, stored: Mapping[str, tuple[tuple[int, ...], str]]) -> Quantization | None:
    """How a module is quantised, from the (shape, dtype) of its leaves, not from what a config claims.

    Values a row are known from the config; so packed width gives bits, the scales' width the group, and the scales'
    dtype and the presence of biases the mode. Raises CheckpointError, naming the tensor, where that does not add up.
    """
    if "scales" not in stored:
        return None
    columns = module.shape[-1]
    (weight, weight_dtype), (scales, scales_dtype) = stored["weight"], stored["scales"]
    name = f"{module.name}.weight"
    if weight_dtype != "U32":
        raise CheckpointError(f"{name} has scales beside it but dtype {weight_dtype}; quantised weights are U32")
    if weight[-1] * 32 % columns or not scales[-1] or columns % scales[-1]:
        raise CheckpointError(
            f"{name} {list(weight)} with scales {list(scales)} does not hold rows of {columns} values"
        )
    bits, group = weight[-1] * 32 // columns, columns // scales[-1]
    if "biases" in stored:
        if bits not in (2, 3, 4, 5, 6, 8) or group not in (32, 64, 128):
            raise CheckpointError(f"{name}: MLX has no affine quantisation with {bits} bits and groups of {group}")
        return Quantization("affine", bits, group)
    for mode, mode_bits, mode_group in _NAMED_MODES:
        if (bits, group, scales_dtype) == (mode_bits, mode_group, "U8"):
            return Quantization(mode, bits, group)
    raise CheckpointError(f"{name}: {bits} bits with {scales_dtype} scales of groups of {group} is no format MLX has")


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds once named and packed our way: modules, their quantisation, and the float dtype."""

    config: ModelConfig
    dtype: str  # safetensors name of the float type the model computes in
    quantization: Mapping[str, Quantization | None] = field(default_factory=dict)  # by module; absent: not quantised

    def specs(self) -> dict[str, TensorSpec]:
        """Name -> TensorSpec of every tensor of the model, whole."""
        found: dict[str, TensorSpec] = {}
        for module in modules(self.config).values():
            found |= module.tensors(self.dtype, self.quantization.get(module.name))
        return found
