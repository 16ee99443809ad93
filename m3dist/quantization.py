"""Which format each weight is to have: --mode, --bits, --group-size and a file of overrides -> an Inventory. No MLX.

As mlx-lm's converter does, every matrix is quantised, embedding and head too, and the router's gate with 8 bits in
groups of 64, whatever was asked for.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Any

import yaml

from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.tensors import PREFIX, Inventory, Module, Quantization, modules

# mode -> bits and group size where they are not given; but for affine no others are possible
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
ROUTER = Quantization("affine", 8, 64)
LARGEST_OVERRIDES = 1 << 18  # bytes of a file of overrides; one line for each module of M3 takes a third


@dataclass(frozen=True)
class Recipe:
    """Formats for the matrices of a model: `base` for each (None: the one it has), but for what `overrides` say.

    An override is a pattern and a format, None for floats; of those that match a module the last counts. `file` is
    where they are from, for errors.
    """

    base: Quantization | None
    overrides: tuple[tuple[str, Quantization | None], ...] = ()
    file: str = field(default="--overrides", compare=False)


def recipe_of(mode: str | None, bits: int | None, group_size: int | None, overrides: str | None) -> Recipe | None:
    """What --mode, --bits, --group-size and --overrides FILE ask for; None where none is given.

    Raises PlanError naming the flag, or the file and the pattern.
    """
    base = quantization_of(mode, bits, group_size)
    if overrides is not None:
        return Recipe(base, tuple(read_overrides(overrides)), f"--overrides {overrides}")
    return Recipe(base) if base else None


def quantization_of(mode: str | None, bits: int | None, group_size: int | None) -> Quantization | None:
    """What --mode, --bits and --group-size ask for together; None where none is given. Raises PlanError."""
    if not (mode or bits or group_size):
        return None
    return _quantization(mode or "affine", bits, group_size, "--mode", "--bits", "--group-size")


def converted(config: ModelConfig, quantization: Quantization | None) -> Inventory:
    """As mlx-lm's converter writes it: every matrix quantised, embedding and head too, the router at 8 bits.

    Raises PlanError, naming the module, where groups do not divide its rows.
    """
    return requantised(Inventory(config, "BF16"), Recipe(quantization))


def requantised(inventory: Inventory, recipe: Recipe) -> Inventory:
    """The same model in the formats that `recipe` asks for. Vectors stay floats.

    Raises PlanError for a pattern that matches no matrix or only the router's gate, for gate and up of one layer in
    different formats, and for a module whose rows are no whole groups; names file, pattern and module.
    """
    matrices = [module for module in modules(inventory.config).values() if module.is_matrix]
    patterns = [(re.compile(translate(pattern)), wanted) for pattern, wanted in recipe.overrides]
    used: set[int] = set()
    formats: dict[str, Quantization | None] = {}
    for module in matrices:
        own = inventory.quantization.get(module.name)
        if module.exact:
            formats[module.name] = wanted = ROUTER if recipe.base else own
        else:
            found = _overriding(module, [pattern for pattern, _ in patterns])
            used |= {number for numbers in found.values() for number in numbers}
            formats[module.name] = wanted = _agreed(found, recipe, recipe.base or own)
        if wanted and wanted != own and module.shape[-1] % wanted.group_size:
            raise PlanError(
                f"{module.name}: groups of {wanted.group_size} do not divide its rows of {module.shape[-1]} values;"
                " ask for another --group-size, or leave it at floats by an override (false)"
            )
    for number, (pattern, _) in enumerate(recipe.overrides):
        if number not in used:
            raise PlanError(f"{recipe.file}: {pattern!r}: {_why_unused(patterns[number][0], matrices)}")
    return replace(inventory, quantization=formats)


def mlx_lm_modules(name: str) -> tuple[str, ...]:
    """What mlx-lm calls a module of ours: the same, but that gate and up are two modules there, in this order."""
    parent, _, last = name.rpartition(".")
    return (f"{parent}.gate_proj", f"{parent}.up_proj") if last == "gate_up_proj" else (name,)


# ---------------------------------------------------------------------------------------------------------------------
# Patterns


def _overriding(module: Module, patterns: list[re.Pattern[str]]) -> dict[str, list[int]]:
    """For each of mlx-lm's modules that make up ours, the numbers of the patterns that match it, in order."""
    return {
        part: [number for number, pattern in enumerate(patterns) if _matches(pattern, module.name, part)]
        for part in mlx_lm_modules(module.name)
    }


def _matches(pattern: re.Pattern[str], *names: str) -> bool:
    """Whether a pattern matches one of the names, with `language_model.` in front or without."""
    return any(pattern.match(name) or pattern.match(name.removeprefix(PREFIX)) for name in names)


def _agreed(found: Mapping[str, list[int]], recipe: Recipe, default: Quantization | None) -> Quantization | None:
    """The one format of the parts of a module, by the last pattern that matches each."""
    wanted = {part: recipe.overrides[numbers[-1]][1] if numbers else default for part, numbers in found.items()}
    (first, one), *others = wanted.items()
    for other, another in others:
        if one != another:
            raise PlanError(
                f"{recipe.file}: {first} would be {one or 'floats'} and {other} {another or 'floats'};"
                " the two are one matrix here, so give both one format (a pattern such as *.gate_proj also for up_proj)"
            )
    return one


def _why_unused(pattern: re.Pattern[str], matrices: list[Module]) -> str:
    if any(module.exact and _matches(pattern, module.name) for module in matrices):
        return f"the router's gate always has {ROUTER}, it cannot be overridden"
    return (
        "matches no matrix of this model; they are called, for example, model.layers.3.self_attn.q_proj,"
        " model.layers.3.block_sparse_moe.switch_mlp.down_proj or lm_head (all experts of a layer are one matrix)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The file of overrides: YAML, from anywhere


def read_overrides(path: str) -> Iterator[tuple[str, Quantization | None]]:
    """Pattern and format of each override in a YAML file, in order; None for `false`. Raises PlanError.

    The file holds `pattern: {bits: 6, group_size: 64, mode: affine}` or `pattern: false`, a line each.
    """
    flag = f"--overrides {path}"
    wanted = _load_yaml(path, flag)
    if not isinstance(wanted, dict) or not wanted:
        raise PlanError(f"{flag}: must give patterns and formats, such as '*.o_proj': {{bits: 6}}")
    for pattern, setting in wanted.items():
        if not isinstance(pattern, str):
            raise PlanError(f"{flag}: {reprlib.repr(pattern)} is no pattern; patterns are text")
        yield pattern, _setting(f"{flag}: {pattern!r}", setting)


def _setting(where: str, setting: Any) -> Quantization | None:
    """One pattern's format. `where` names file and pattern."""
    if setting is False:
        return None
    if not isinstance(setting, dict) or not setting:
        raise PlanError(f"{where}: must be false or like {{bits: 6, group_size: 64}}, not {reprlib.repr(setting)}")
    for name, value in setting.items():
        if name not in ("bits", "group_size", "mode"):
            raise PlanError(f"{where}: {reprlib.repr(name)} is none of bits, group_size and mode")
        if name == "mode" and not (isinstance(value, str) and value in DEFAULTS):
            raise PlanError(f"{where}: mode must be one of {', '.join(DEFAULTS)}, not {reprlib.repr(value)}")
        if name != "mode" and (type(value) is not int or value < 1):
            raise PlanError(f"{where}: {name} must be a whole number, not {reprlib.repr(value)}")
    mode, bits, group_size = setting.get("mode", "affine"), setting.get("bits"), setting.get("group_size")
    try:
        return _quantization(mode, bits, group_size, "mode", "bits", "group_size")
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def _quantization(mode: str, bits: int | None, group_size: int | None, *names: str) -> Quantization:
    """A format that MLX has. `names`: what the error calls mode, bits and group size."""
    default_bits, default_group = DEFAULTS[mode]
    wanted = Quantization(mode, bits or default_bits, group_size or default_group)
    if mode != "affine" and (wanted.bits, wanted.group_size) != DEFAULTS[mode]:
        raise PlanError(
            f"{names[0]} {mode} has {default_bits} bits and groups of {default_group}; leave the others out"
        )
    if mode == "affine" and (wanted.bits not in (2, 3, 4, 5, 6, 8) or wanted.group_size not in (32, 64, 128)):
        raise PlanError(f"affine quantisation has {names[1]} 2, 3, 4, 5, 6 or 8 and {names[2]} 32, 64 or 128")
    return wanted


class _Loader(yaml.SafeLoader):
    """YAML in which nothing refers to another part of the file, and no key is given twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError("while reading an alias", problem="aliases are not allowed here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def _load_yaml(path: str, flag: str) -> Any:
    """What a YAML file holds. Raises PlanError, which begins with `flag`."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_OVERRIDES + 1)
        if len(data) > LARGEST_OVERRIDES:
            raise PlanError(f"{flag}: has more than {LARGEST_OVERRIDES} bytes; is it a file of overrides?")
        return yaml.load(data.decode(), _Loader)
    except OSError as error:
        raise PlanError(f"{flag}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1})" if mark else ""
        hint = "; a pattern that begins with * needs quotes" if "alias" in (error.context or "") else ""
        raise PlanError(f"{flag}: is no YAML: {error.problem or error.context}{line}{hint}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise PlanError(f"{flag}: is no YAML: {reprlib.repr(str(error))}") from None
