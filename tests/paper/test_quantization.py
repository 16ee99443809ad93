"""What --bits, --mode, --group-size and a file of overrides ask for, and the inventory that comes of it."""

import os

import checkpoints
import pytest

from m3dist.config import ModelConfig
from m3dist.errors import PlanError
from m3dist.quantization import LARGEST_OVERRIDES, ROUTER, Recipe, recipe_of, requantised
from m3dist.tensors import MXFP8, Inventory, Quantization, modules

# Layer 0 is dense, layers 1 and 2 have experts; every matrix has rows of a multiple of 128 values.
WIDE = {"hidden_size": 128, "intermediate_size": 128, "shared_intermediate_size": 256, "dense_intermediate_size": 256}
CONFIG = ModelConfig.from_dict(checkpoints.tiny_config(num_hidden_layers=3, **WIDE))
MATRICES = [module for module in modules(CONFIG).values() if module.is_matrix]
FOUR = Quantization("affine", 4, 64)
SIX = Quantization("affine", 6, 32)


def overrides(tmp_path, text: str | bytes) -> str:
    path = tmp_path / "overrides.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def formats(recipe: Recipe, own: dict[str, Quantization] | None = None) -> dict[str, Quantization | None]:
    return dict(requantised(Inventory(CONFIG, "BF16", own or {}), recipe).quantization)


def names(text: str) -> set[str]:
    return {module.name for module in MATRICES if text in module.name}


def test_nothing_asked():
    assert recipe_of(None, None, None, None) is None


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("affine", None, None), FOUR),
        ((None, 6, 32), SIX),
        ((None, None, 128), Quantization("affine", 4, 128)),
        (("mxfp4", None, None), Quantization("mxfp4", 4, 32)),
        (("mxfp8", 8, None), MXFP8),
        (("nvfp4", None, 16), Quantization("nvfp4", 4, 16)),
    ],
)
def test_flags(flags, wanted):
    """Every matrix gets the format, embedding and head too; the router's gate always its own; vectors stay floats."""
    recipe = recipe_of(*flags, None)
    assert recipe == Recipe(wanted)
    found = formats(recipe)
    assert found == {module.name: ROUTER if module.name.endswith(".gate") else wanted for module in MATRICES}
    assert ROUTER == Quantization("affine", 8, 64)
    specs = requantised(Inventory(CONFIG, "BF16"), recipe).specs()
    assert specs["language_model.model.norm.weight"].dtype == "BF16"
    assert specs["language_model.model.layers.1.block_sparse_moe.e_score_correction_bias"].dtype == "F32"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 7, None), "--bits 2, 3, 4, 5, 6 or 8"),
        ((None, None, 16), "--group-size 32, 64 or 128"),
        (("nvfp4", None, 32), "--mode nvfp4 has 4 bits and groups of 16; leave the others out"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(PlanError, match=message):
        recipe_of(*flags, None)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.self_attn.*", names(".self_attn.")),
        ("language_model.model.layers.1.self_attn.o_proj", {"language_model.model.layers.1.self_attn.o_proj"}),
        ("model.layers.1.self_attn.o_proj", {"language_model.model.layers.1.self_attn.o_proj"}),
        ("lm_head", {"language_model.lm_head"}),
        ("*lm_head", {"language_model.lm_head"}),
        ("*.switch_mlp.*", names(".switch_mlp.")),
        ("*.switch_mlp.gate_up_proj", names("switch_mlp.gate_up_proj")),
        ("*.mlp.*", names(".mlp.")),
        ("*.layers.[02].*.down_proj", names("layers.0.mlp.down") | (names("down_proj") & names("layers.2."))),
        ("model.layers.1.*", names("layers.1.") - names(".gate") | names("layers.1.block_sparse_moe.switch")
         | names("layers.1.block_sparse_moe.shared")),
        ("*", {module.name for module in MATRICES} - {m.name for m in MATRICES if m.exact}),
    ],
)  # fmt: skip
def test_what_a_pattern_matches(tmp_path, pattern, matched):
    """Names with and without `language_model.`; vectors and the router's gate are passed over."""
    found = formats(recipe_of(None, 4, None, overrides(tmp_path, f"'{pattern}': {{bits: 6, group_size: 32}}")))
    assert {name for name, wanted in found.items() if wanted == SIX} == matched
    assert set(found.values()) <= {SIX, FOUR, ROUTER}


def test_mlx_lm_names_of_gate_and_up(tmp_path):
    """Apart there, one matrix here: what matches both counts."""
    text = "'*.gate_proj': {bits: 6, group_size: 32}\n'*.up_proj': {bits: 6, group_size: 32}\n"
    found = formats(recipe_of(None, 4, None, overrides(tmp_path, text)))
    assert {name for name, wanted in found.items() if wanted == SIX} == names("gate_up_proj")
    text = "'*.switch_mlp.[gu]*_proj': false"
    found = formats(recipe_of(None, 4, None, overrides(tmp_path, text)))
    assert {name for name, wanted in found.items() if wanted is None} == names("switch_mlp.gate_up_proj")


def test_gate_and_up_in_different_formats(tmp_path):
    path = overrides(tmp_path, "'*.layers.1.*.switch_mlp.up_proj': {bits: 8}")
    with pytest.raises(PlanError) as error:
        formats(recipe_of(None, 4, None, path))
    moe = "language_model.model.layers.1.block_sparse_moe.switch_mlp"
    assert f"--overrides {path}: {moe}.gate_proj would be affine 4-bit, group 64 and {moe}.up_proj affine 8-bit" in str(
        error.value
    )


def test_the_last_pattern_wins(tmp_path):
    text = "'*': {bits: 6, group_size: 32}\n'*.self_attn.*': false\n'*.o_proj': {mode: mxfp4}\n"
    found = formats(recipe_of(None, 4, None, overrides(tmp_path, text)))
    assert found["language_model.lm_head"] == SIX
    assert found["language_model.model.layers.0.self_attn.q_proj"] is None
    assert found["language_model.model.layers.0.self_attn.o_proj"] == Quantization("mxfp4", 4, 32)
    turned = "\n".join(reversed(text.splitlines()))
    with pytest.raises(PlanError) as error:
        formats(recipe_of(None, 4, None, overrides(tmp_path, turned + "\n'*.lm_heads': false")))
    assert "'*.lm_heads': matches no matrix" in str(error.value)
    assert set(formats(recipe_of(None, 4, None, overrides(tmp_path, turned))).values()) == {SIX, ROUTER}


def test_overrides_alone_leave_the_rest_as_it_is(tmp_path):
    own = {module.name: MXFP8 for module in MATRICES if not module.exact and "lm_head" not in module.name}
    found = formats(recipe_of(None, None, None, overrides(tmp_path, "'*lm_head': {bits: 6, group_size: 32}")), own)
    gates = {module.name: None for module in MATRICES if module.exact}
    assert found == own | gates | {"language_model.lm_head": SIX}


@pytest.mark.parametrize("pattern", ["*.gate", "*.block_sparse_moe.gate", "model.layers.2.block_sparse_moe.gate"])
def test_the_router_is_never_overridden(tmp_path, pattern):
    path = overrides(tmp_path, f"'{pattern}': {{bits: 4}}")
    with pytest.raises(PlanError) as error:
        formats(recipe_of(None, 4, None, path))
    assert f"--overrides {path}: '{pattern}': the router's gate always has affine 8-bit" in str(error.value)


@pytest.mark.parametrize("pattern", ["*.norm", "*e_score_correction_bias", "layers.1", "*.experts.0.w1", "LM_HEAD", ""])
def test_a_pattern_that_matches_no_matrix(tmp_path, pattern):
    path = overrides(tmp_path, f"'{pattern}': {{bits: 4}}")
    with pytest.raises(PlanError) as error:
        formats(recipe_of(None, 4, None, path))
    assert f"--overrides {path}: '{pattern}': matches no matrix" in str(error.value)


def test_groups_must_divide_rows(tmp_path):
    """mlx-lm would leave such a matrix as it is and say nothing; and an override can."""
    narrow = ModelConfig.from_dict(checkpoints.tiny_config(num_hidden_layers=2))  # experts of 96 columns
    with pytest.raises(PlanError) as error:
        requantised(Inventory(narrow, "BF16"), Recipe(FOUR))
    assert "layers.1.block_sparse_moe.switch_mlp.down_proj: groups of 64 do not divide its rows of 96" in str(
        error.value
    )
    recipe = recipe_of(None, 4, 64, overrides(tmp_path, "'*.block_sparse_moe.*.down_proj': false"))
    assert None in requantised(Inventory(narrow, "BF16"), recipe).quantization.values()
    assert requantised(Inventory(narrow, "BF16"), Recipe(Quantization("affine", 4, 32)))


FILES = {
    "": "must give patterns and formats",
    "- '*': false": "must give patterns and formats",
    "{}": "must give patterns and formats",
    "3: false": "3 is no pattern",
    "x: true": "'x': must be false or like {bits: 6, group_size: 64}, not True",
    "x: null": "'x': must be false",
    "x: {}": "'x': must be false",
    "x: 4": "'x': must be false",
    "x: {bit: 4}": "'x': 'bit' is none of bits, group_size and mode",
    "x: {[1]: 4}": "is no YAML",
    "x: {bits: '4'}": "'x': bits must be a whole number, not '4'",
    "x: {bits: true}": "'x': bits must be a whole number, not True",
    "x: {bits: 0}": "'x': bits must be a whole number, not 0",
    "x: {bits: 4.0}": "'x': bits must be a whole number, not 4.0",
    "x: {group_size: -64}": "'x': group_size must be a whole number",
    "x: {mode: fp4}": "'x': mode must be one of affine, mxfp4, mxfp8, nvfp4, not 'fp4'",
    "x: {mode: [affine]}": "'x': mode must be one of",
    "x: {bits: 7}": "'x': affine quantisation has bits 2, 3, 4, 5, 6 or 8 and group_size 32, 64 or 128",
    "x: {mode: nvfp4, bits: 8}": "'x': mode nvfp4 has 4 bits and groups of 16",
    "x: {bits: 4, bits: 8}": "'bits' is given twice",
    "x: false\ny: false\nx: {bits: 4}": "'x' is given twice (line 3)",
    "*.o_proj: {bits: 6}": "a pattern that begins with * needs quotes",
    "*lm_head : {bits: 6}": "a pattern that begins with * needs quotes",
    "a: &a {bits: 6}\nb: *a": "aliases are not allowed",
    "a: &a [x, x]\nb: &b [*a, *a]\n<<: [*b, *b]": "aliases are not allowed",
    "x: !!python/object/apply:os.system [false]": "is no YAML",
    "x: 2001-13-45": "is no YAML",
    "x: [": "is no YAML",
    "[" * 5000: "is no YAML",
    "x: '\0'": "is no YAML",
    b"\xff\xfe\xfa": "is no YAML",
    "# " + LARGEST_OVERRIDES * "x": f"has more than {LARGEST_OVERRIDES} bytes",
}


@pytest.mark.parametrize("text", FILES, ids=lambda text: repr(text[:30]))
def test_files_that_are_no_overrides(tmp_path, text):
    path = overrides(tmp_path, text)
    with pytest.raises(PlanError) as error:
        recipe_of(None, 4, None, path)
    assert str(error.value).startswith(f"--overrides {path}: ") and FILES[text] in str(error.value)
    assert len(str(error.value)) < len(path) + 200


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="--overrides .*/none.yaml: No such file"):
        recipe_of(None, 4, None, str(tmp_path / "none.yaml"))
    with pytest.raises(PlanError, match="Is a directory"):
        recipe_of(None, 4, None, str(tmp_path))
    with pytest.raises(PlanError, match="has more than"):
        recipe_of(None, 4, None, os.devnull.replace("null", "zero"))
