"""The published and converted layouts of a MiniMax-M3 checkpoint -> the one set of tensors in m3dist.tensors.

Works on names, shapes and safetensors dtypes alone, so that files and arrays in memory are understood the same way.
Whatever the layout, a tensor of ours is rows of stored tensors put in another order, plus a cast or another view of the
same bytes: an `Assembly` of `Piece`s. Formats are told by dtype and shape, never by what a config or a name claims:

    experts      one by one (w1, w2, w3 or gate, down, up), stacked, or stacked with the shared expert as the last row
    gate and up  apart or fused, in experts, shared experts and dense layers
    dense MLP    under mlp or block_sparse_moe; experts under block_sparse_moe or mlp (transformers in memory)
    prefixes     language_model., model.language_model. or none
    numbers      floats, MLX's quantised formats, published MXFP8 (the same bytes as MLX's), FP8 in blocks of 128 x 128
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from m3dist.config import ModelConfig
from m3dist.errors import CheckpointError
from m3dist.tensors import FLOATS, PREFIX, Inventory, Module, Quantization, TensorSpec, infer_quantization, modules

FP8_BLOCK = 128
FP8_BYTES = ("F8_E4M3", "U8")  # mx.load gives E4M3 tensors as uint8

Described = tuple[tuple[int, ...], str]  # shape, safetensors dtype


@dataclass(frozen=True)
class Piece:
    """Rows `row` .. `row + rows` of the stored `tensor` are the rows from `at` of ours.

    Rows are counted with all axes but the last flattened; a vector is one row. `scale` names the tensor of block
    multipliers that goes with FP8 in blocks of FP8_BLOCK x FP8_BLOCK.
    """

    tensor: str
    row: int
    rows: int
    at: int
    scale: str | None = None


@dataclass(frozen=True)
class Assembly:
    """One tensor of ours, whole: its shape and dtype, and the pieces that make it, in order and without gaps."""

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Translation:
    """What a checkpoint holds in our terms, how to make it, and the stored tensors that are left out knowingly."""

    inventory: Inventory
    assemblies: Mapping[str, Assembly]
    ignored: tuple[str, ...]


class TensorError(CheckpointError):
    """A CheckpointError about one stored tensor, which `tensor` names so that a caller can add its file."""

    def __init__(self, tensor: str, message: str):
        super().__init__(f"{tensor}: {message}")
        self.tensor = tensor


def translate(config: ModelConfig, stored: Mapping[str, Described], dtype: str | None = None) -> Translation:
    """Map stored tensors (name -> shape, safetensors dtype) to ours.

    `dtype` is the float type to compute in (BF16, F16 or F32); by default the one the final norm is stored in.
    Raises CheckpointError, naming the tensor and what was expected, for a tensor that is missing, left over, of a wrong
    shape or dtype, quantised without its scales, or quantised differently from the tensor it is fused with.
    """
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"dtype must be one of {', '.join(FLOATS)}, not {dtype!r}")
    known = modules(config)
    parts, ignored = _sort(config, known, stored)
    norm = parts.get((f"{PREFIX}model.norm", "weight"))
    dtype = dtype or (norm[0].dtype if norm and norm[0].dtype in FLOATS else FLOATS[0])
    quantization: dict[str, Quantization | None] = {}
    assemblies: dict[str, Assembly] = {}
    for module in known.values():
        leaves = {leaf: parts[key] for leaf in _LEAF_NAMES if (key := (module.name, leaf)) in parts}
        quantization[module.name] = found = _quantization(module, leaves)
        specs = module.tensors(dtype, found)
        for (name, spec), leaf in zip(specs.items(), _LEAF_NAMES, strict=False):
            assemblies[name] = _assemble(module, leaf, spec, leaves.get(leaf, ()))
        for leaf in list(leaves)[len(specs) :]:
            raise TensorError(leaves[leaf][0].name, f"{module.name} is not quantised so, it has no {leaf}")
    return Translation(Inventory(config, dtype, quantization), assemblies, tuple(ignored))


# ---------------------------------------------------------------------------------------------------------------------
# Names

_LEAF_NAMES = ("weight", "scales", "biases")  # in the order of Module.tensors
_LEAVES = {"weight": "weight", "scales": "scales", "biases": "biases", "weight_scale_inv": "scales"}
_WRAPPERS = re.compile(r"((model|language_model)\.)*")
_LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.", "mtp.")
_RENAMES = (  # what transformers calls things in memory
    (re.compile(r"\.self_attn\.indexer\."), ".self_attn.index_"),
    (re.compile(r"\.gate\.e_score_correction_bias$"), ".e_score_correction_bias"),
    (re.compile(r"\.experts\.([a-z])"), r".switch_mlp.\1"),
)
_MLP = re.compile(r"(layers\.(\d+))\.(?:mlp|block_sparse_moe)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# the last part of a stored module's name -> ours, and which half of ours it is
_HALVES = {
    **{"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)},
    **{"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)},
}


@dataclass(frozen=True)
class _Part:
    """A stored tensor and its place: the module and leaf of ours, the expert, and the half (0 gate, 1 up) it holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    leaf: str
    expert: int | None
    half: int | None
    first: int = 0  # the first of the stored tensor's rows that belong here
    scale: str | None = None  # the tensor of its block multipliers


_Parts = dict[tuple[str, str], list[_Part]]  # by module and leaf


def _place(name: str, shape: tuple[int, ...], dtype: str, config: ModelConfig) -> _Part | None:
    """Where a stored tensor belongs, by its name alone; None where it is left out knowingly."""
    path = name[_WRAPPERS.match(name).end() :]  # type: ignore[union-attr]  # an empty match is a match
    if path.startswith(_LEFT_OUT) or (config.tie_word_embeddings and path.startswith("lm_head.")):
        return None
    for pattern, replacement in _RENAMES:
        path = pattern.sub(replacement, path)
    if match := _MLP.match(path):
        layer = int(match[2])
        sparse = layer < config.num_hidden_layers and config.moe_layer_freq[layer]
        path = f"{match[1]}.{'block_sparse_moe' if sparse else 'mlp'}.{path[match.end() :]}"
    expert = None
    if match := _EXPERT.search(path):
        expert = int(match[1])
        path = path.replace(match[0], ".switch_mlp.")
    module, _, leaf = path.rpartition(".")
    if leaf not in _LEAVES:  # e_score_correction_bias, and experts of transformers in memory
        module, leaf = path, "weight"
    parent, _, last = module.rpartition(".")
    last, half = _HALVES.get(last, (last, None))
    prefix = PREFIX if last == "lm_head" else f"{PREFIX}model."
    return _Part(name, shape, dtype, prefix + (f"{parent}.{last}" if parent else last), _LEAVES[leaf], expert, half)


def _sort(
    config: ModelConfig, known: Mapping[str, Module], stored: Mapping[str, Described]
) -> tuple[_Parts, list[str]]:
    """Stored tensors by the module and leaf they belong to, and the names left out. What has no place is an error."""
    parts: _Parts = {}
    ignored, unknown = [], []
    for name, (shape, dtype) in stored.items():
        part = _place(name, tuple(shape), dtype, config)
        if part is None:
            ignored.append(name)
        elif part.module not in known:
            unknown.append(name)
        elif not _is_block_scale(part):
            for each in _with_shared_expert(part, known):
                parts.setdefault((each.module, each.leaf), []).append(_checked(each, known[each.module], stored))
        else:
            _check_scaled(part, stored)
    if unknown:
        more = f" (and {len(unknown) - 1} more such tensors)" if len(unknown) > 1 else ""
        raise TensorError(unknown[0], f"not a tensor of this MiniMax-M3, or in a format m3dist does not read{more}")
    return parts, ignored


def _with_shared_expert(part: _Part, known: Mapping[str, Module]) -> Iterable[_Part]:
    """A stack of one expert too many holds the shared expert as its last: two parts of one stored tensor."""
    experts = known[part.module].shape[0]
    if ".switch_mlp." not in part.module or part.expert is not None or part.shape[:1] != (experts + 1,):
        return (part,)
    shape = part.shape[1:]
    shared = replace(
        part,
        module=part.module.replace(".switch_mlp.", ".shared_experts."),
        shape=shape,
        first=experts * math.prod(shape[:-1]),
    )
    return replace(part, shape=(experts, *shape)), shared


# ---------------------------------------------------------------------------------------------------------------------
# Formats and shapes


def _is_block_scale(part: _Part) -> bool:
    """Float multipliers are those of FP8 blocks; U8 exponents are MXFP8's, which MLX calls scales."""
    return part.name.endswith(".weight_scale_inv") and part.dtype != "U8"


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def _check_scaled(part: _Part, stored: Mapping[str, Described]) -> None:
    """Block multipliers need FP8 bytes to multiply, and one number for every block of them."""
    sibling = _sibling(part.name, "weight")
    weight, dtype = stored.get(sibling, ((), ""))
    if dtype not in FP8_BYTES or len(weight) < 2:
        raise TensorError(part.name, f"holds {part.dtype} multipliers, but {sibling} is no FP8 matrix")
    rows, columns = (math.ceil(n / FP8_BLOCK) for n in weight[-2:])
    _expect(part, (*weight[:-2], rows, columns), f"one multiplier for each {FP8_BLOCK} x {FP8_BLOCK} block")
    if part.dtype not in FLOATS:
        raise TensorError(part.name, f"has dtype {part.dtype}; block multipliers are floats, MXFP8 exponents are U8")


def _checked(part: _Part, module: Module, stored: Mapping[str, Described]) -> _Part:
    """The part with its rows checked against the config, and its shape and dtype as MLX sees it where it is FP8."""
    _expect(part, (*_lead(part, module), *(part.shape or module.shape)[-1:]), "by config.json")
    if part.leaf != "weight":
        if _sibling(part.name, "weight") not in stored:
            raise TensorError(part.name, f"there is no {_sibling(part.name, 'weight')} beside it")
        return part
    scales = [s for s in ("scales", "weight_scale_inv") if _sibling(part.name, s) in stored]
    if part.dtype in FP8_BYTES and "weight_scale_inv" in scales:
        scale = _sibling(part.name, "weight_scale_inv")
        if stored[scale][1] != "U8":
            return replace(part, dtype="F32", scale=scale)
        if part.shape[-1] % 4:
            raise TensorError(part.name, f"rows of {part.shape[-1]} FP8 values are no whole 32-bit words")
        return replace(part, dtype="U32", shape=(*part.shape[:-1], part.shape[-1] // 4))
    if part.dtype not in FLOATS and not scales:
        missing = "scales" if part.dtype == "U32" else "weight_scale_inv"
        raise TensorError(part.name, f"has dtype {part.dtype} but no {_sibling(part.name, missing)} beside it")
    return part


def _lead(part: _Part, module: Module) -> tuple[int, ...]:
    """The shape this part must have, without its last axis."""
    if not module.is_matrix:
        return ()
    *experts, rows = module.shape[:-1]
    if part.expert is not None and part.expert >= experts[0]:
        raise TensorError(part.name, f"expert {part.expert}, but config.json has {experts[0]} experts")
    return (*(experts if part.expert is None else ()), rows if part.half is None else rows // 2)


def _expect(part: _Part, shape: tuple[int, ...], why: str) -> None:
    if part.shape != shape:
        raise TensorError(part.name, f"has shape {list(part.shape)}, expected {list(shape)} {why}")


def _quantization(module: Module, leaves: Mapping[str, list[_Part]]) -> Quantization | None:
    """How a module is quantised; its parts must all be so in the same way, for they become one tensor."""
    for found in leaves.values():
        first = found[0]
        for part in found:
            if (part.shape[-1:], part.dtype in FLOATS) != (first.shape[-1:], first.dtype in FLOATS):
                raise TensorError(
                    part.name,
                    f"has rows of {part.shape[-1]} {part.dtype}, but {first.name} of {first.shape[-1]} {first.dtype};"
                    f" both are parts of {module.name}, which must be quantised in one format",
                )
    if "scales" not in leaves or "weight" not in leaves or not module.is_matrix:
        return None
    if leaves["scales"][0].dtype in FLOATS and "biases" not in leaves:
        name = leaves["scales"][0].name
        raise TensorError(name, f"has dtype {leaves['scales'][0].dtype} but no {_sibling(name, 'biases')} beside it")
    try:
        return infer_quantization(module, {leaf: (found[0].shape, found[0].dtype) for leaf, found in leaves.items()})
    except CheckpointError as error:
        raise TensorError(leaves["weight"][0].name, str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def _assemble(module: Module, leaf: str, spec: TensorSpec, parts: Iterable[_Part]) -> Assembly:
    """The pieces of one tensor of ours, checked to be of its dtype and to fill it exactly."""
    pieces: list[Piece] = []
    for part in parts:
        if part.dtype != spec.dtype and not (part.dtype in FLOATS and spec.dtype in FLOATS):
            raise TensorError(part.name, f"has dtype {part.dtype}, expected {spec.dtype}")
        if part.shape[-1] != spec.shape[-1]:
            expected = [*part.shape[:-1], spec.shape[-1]]
            raise TensorError(part.name, f"has shape {list(part.shape)}, expected {expected} by config.json")
        pieces += _pieces(part, module)
    pieces.sort(key=lambda piece: piece.at)
    filled, last = 0, None
    for piece in pieces:
        if piece.at < filled:
            raise TensorError(piece.tensor, f"holds the same as {last}; one of the two must go")
        if piece.at > filled:
            break
        filled, last = piece.at + piece.rows, piece.tensor
    if filled < math.prod(spec.shape[:-1]):
        name = _published_name(module, leaf, filled)
        raise CheckpointError(f"{name} is missing, under this and every other known name; is the download complete?")
    return Assembly(spec, tuple(pieces))


def _pieces(part: _Part, module: Module) -> Iterable[Piece]:
    """Where the rows of one part go."""
    if not module.is_matrix:
        return [Piece(part.name, 0, 1, 0)]
    *_, whole, _ = module.shape
    rows = whole if part.half is None else whole // 2
    at = (part.expert or 0) * whole + (part.half or 0) * rows
    stacked = math.prod(part.shape[:-2])
    if rows == whole:
        return [Piece(part.name, part.first, stacked * rows, at, part.scale)]
    return [Piece(part.name, part.first + e * rows, rows, at + e * whole, part.scale) for e in range(stacked)]


def _published_name(module: Module, leaf: str, row: int) -> str:
    """What the published checkpoints call the tensor that holds a row of ours; quantised leaves keep MLX's names."""
    if module.bare:
        return module.name
    parent, _, last = module.name.rpartition(".")
    expert = ""
    if last in ("gate_up_proj", "down_proj"):
        whole = module.shape[-2]
        if last == "gate_up_proj":
            last = "gate_proj" if row % whole < whole // 2 else "up_proj"
        if parent.endswith(".switch_mlp"):
            parent, expert = parent.removesuffix(".switch_mlp"), f"experts.{row // whole}."
            last = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[last]
    return f"{parent}.{expert}{last}.{leaf}"
