"""The shape of the program, read from its sources: who may import whom, and which half knows no MLX."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]

# Imports go up this list, never down or sideways; a package's own modules may import each other.
ORDER = [
    {"m3dist", "m3dist.errors", "m3dist.libmpi", "m3dist.options", "m3dist.progress", "m3dist.status", "m3dist.tiny"},
    {"m3dist.sampling"},
    {"m3dist.config", "m3dist.machines", "m3dist.metal", "m3dist.watchdog"},
    {"m3dist.tensors"},
    {"m3dist.layout", "m3dist.quantization", "m3dist.translation"},
    {"m3dist.checkpoint", "m3dist.plan"},
    {"m3dist.reads", "m3dist.comm", "m3dist.predict", "m3dist.plan_report"},
    {"m3dist.cache", "m3dist.fetch.manifest", "m3dist.numbers", "m3dist.sample", "m3dist.adjust"},
    {"m3dist.fetch.command", "m3dist.fetch.store"},
    {"m3dist.paged"},
    {"m3dist.model"},
    {"m3dist.loader", "m3dist.text", "m3dist.cluster"},
    {"m3dist.rank", "m3dist.doctor"},
    {"m3dist.fetch"},
    {"m3dist.find"},
    {"m3dist.engine"},
    {"m3dist.gateway"},
    {"m3dist.serve"},
    {"m3dist.chat"},
    {"m3dist.generate"},
    {"m3dist.bench"},
    {"m3dist.measured"},
    {"m3dist.predict_report"},
    {"m3dist.cli"},
    {"m3dist.__main__"},
]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted((ROOT / "m3dist").rglob("*.py"))}


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Modules named by the import statements among `nodes`; `from package import module` names the module."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {member if member in SOURCES else str(node.module) for member in members}
    return names


def anywhere(module: str) -> set[str]:
    return imported(ast.walk(ast.parse(SOURCES[module].read_text())))


def at_import(module: str) -> set[str]:
    """What importing `module` imports, and the packages it lies in; imports inside functions come later."""
    packages = {module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)}
    return packages | imported(ast.parse(SOURCES[module].read_text()).body)


def part_of(module: str) -> str:
    """The entry of ORDER that `module` is or belongs to."""
    entries = set().union(*ORDER)
    while module not in entries:
        module, dot, _ = module.rpartition(".")
        assert dot, "every module has its place in ORDER: add this one"
    return module


def level(part: str) -> int:
    return next(number for number, parts in enumerate(ORDER) if part in parts)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module):
    if module.count(".") == 1:
        assert module in set().union(*ORDER), "a new module needs its place in ORDER"
    part = part_of(module)
    for other in anywhere(module) & SOURCES.keys():
        assert part_of(other) == part or level(part_of(other)) < level(part), f"{module} imports {other}"


def loads_mlx(module: str, seen: set[str]) -> bool:
    """Whether importing `module` imports MLX, itself or through another of ours."""
    seen.add(module)
    names = at_import(module)
    if any(name.partition(".")[0] in ("mlx", "mlx_lm") for name in names):
        return True
    return any(loads_mlx(other, seen) for other in (names & SOURCES.keys()) - seen)


def listed() -> set[str]:
    """The MLX-free half, as pyproject.toml lists it for mypy."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    paths = [path for entry in files for path in (ROOT.glob(entry), (ROOT / entry).rglob("*.py"))]
    return {name_of(path) for found in paths for path in found if path.is_file()}


def test_the_list_of_the_mlx_free_half_is_true():
    """Every module without MLX is in mypy's `files`, and no other. (tiny's are for training it.)"""
    free = {module for module in SOURCES if part_of(module) != "m3dist.tiny" and not loads_mlx(module, set())}
    assert free == listed()


def test_the_mlx_free_half_leaves_mlx_unloaded():
    """Nor does it load anything else that takes its time."""
    modules = sorted(listed() - {"m3dist.__main__"})  # importing that one runs the program
    heavy = ("mlx", "mlx_lm", "torch", "transformers", "huggingface_hub")
    program = f"import sys, {', '.join(modules)}; print(sorted(set(sys.modules) & set({heavy})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_only_comm_has_collectives():
    """Model.shard, which MLX users expect, may call init(); it makes a Comm of what it gets."""
    collective = re.compile(r"mx\.distributed\.(?!init\b)\w+\(")
    callers = {name for name, path in SOURCES.items() if collective.search(path.read_text())}
    assert callers == {"m3dist.comm"}
