"""A converted checkpoint as mlx-lm reads it: its tensors, their files and index, and config.json. No MLX.

Names are ours (m3dist.tensors) but for gate and up, which are two modules there. Checked against mlx-lm 0.32.2.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from m3dist.fetch.target import OutputFile, OutputTensor, Part, numbered
from m3dist.quantization import mlx_lm_modules
from m3dist.tensors import Inventory, Module, Quantization, TensorSpec, modules

LARGEST_FILE = 5 << 30  # bytes, as mlx-lm's converter has it
MODEL_TYPE = "minimax_m3_vl"  # the only one mlx-lm has, for a text model too
_REPLACED = ("quantization", "quantization_config")
_DROPPED = (*_REPLACED, "vision_config", "_name_or_path")  # as mlx-lm does; there are no vision tensors


def output_tensors(inventory: Inventory) -> list[OutputTensor]:
    """Every tensor that mlx-lm reads, module by module in the order of the forward, and the rows of ours that it is."""
    return [
        _output(name, spec, module, part, half)
        for module in modules(inventory.config).values()
        for half, part in enumerate(mlx_lm_modules(module.name))
        for name, spec in module.tensors(inventory.dtype, inventory.quantization.get(module.name)).items()
    ]


def _output(name: str, spec: TensorSpec, module: Module, part: str, half: int) -> OutputTensor:
    """Our tensor `name` of a module, or, where mlx-lm has its gate (half 0) and up (1) apart, that half of each matrix
    of a stack."""
    if part == module.name:
        return OutputTensor(name, spec, (Part(name, (0, math.prod(spec.shape[:-1]))),))
    *stack, rows, columns = spec.shape
    starts = [rows * matrix + rows // 2 * half for matrix in range(math.prod(stack))]
    return OutputTensor(
        part + name.removeprefix(module.name),
        TensorSpec((*stack, rows // 2, columns), spec.dtype),
        tuple(Part(name, (start, start + rows // 2)) for start in starts),
    )


def file_names(count: int) -> list[str]:
    """As mlx-lm's converter gives them; it reads model*.safetensors."""
    return ["model.safetensors"] if count == 1 else numbered(count)


def index(files: Iterable[OutputFile]) -> dict[str, Any]:
    """model.safetensors.index.json."""
    found = {tensor.name: (file.name, tensor.spec.nbytes) for file in files for tensor in file.tensors}
    return {
        "metadata": {"total_size": sum(nbytes for _, nbytes in found.values())},
        "weight_map": {name: found[name][0] for name in sorted(found)},
    }


def config(raw_config: Mapping[str, Any], inventory: Inventory) -> dict[str, Any]:
    """config.json of the converted checkpoint: the source's, with the formats of `inventory` in place of its own.

    A text model's flat config is put where mlx-lm looks for it, and what mlx-lm reads otherwise than ModelConfig does
    is said explicitly.
    """
    made = {name: value for name, value in raw_config.items() if name not in _DROPPED}
    text = {name: value for name, value in made.get("text_config", made).items() if name not in _REPLACED}
    text |= {
        "rotary_dim": inventory.config.rotary_dim,
        "tie_word_embeddings": inventory.config.tie_word_embeddings,
    }
    made |= {"model_type": MODEL_TYPE, "text_config": text}
    if formats := quantization(inventory):
        made |= dict.fromkeys(_REPLACED, formats)
    return dict(sorted(made.items()))


def quantization(inventory: Inventory) -> dict[str, Any] | None:
    """The formats as mlx-lm writes them: the most frequent one, and each module that differs from it under mlx-lm's
    name, with its own or false; the router's gate always has an entry. None where nothing is quantised."""
    matrices = [module for module in modules(inventory.config).values() if module.is_matrix]
    formats = {module: inventory.quantization.get(module.name) for module in matrices}
    counts = Counter(wanted for wanted in formats.values() if wanted)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    entries = {
        name: _entry(wanted) if wanted else False
        for module, wanted in formats.items()
        if wanted != most or module.exact
        for name in mlx_lm_modules(module.name)
    }
    return {**_entry(most), "mode": most.mode, **entries}


def _entry(wanted: Quantization) -> dict[str, Any]:
    """Where the mode is left out, mlx-lm takes affine."""
    mode = {} if wanted.mode == "affine" else {"mode": wanted.mode}
    return {"group_size": wanted.group_size, "bits": wanted.bits, **mode}
