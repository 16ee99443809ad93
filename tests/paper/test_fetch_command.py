"""The `m3dist fetch` that is advised, read back by nobody but whoever types it: each flag is there if it is needed."""

import json

import pytest

from m3dist.config import ModelConfig
from m3dist.fetch.command import fetch_command, refetch_command
from m3dist.fetch.manifest import Manifest
from m3dist.plan_report import PUBLISHED, published_mxfp8
from m3dist.quantization import Recipe, converted, requantised
from m3dist.tensors import Inventory, Quantization

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOUR, MXFP4 = Quantization("affine", 4, 64), Quantization("mxfp4", 4, 32)
BF16, MXFP8 = (json.loads((PUBLISHED / f"{name}.json").read_text()) for name in ("MiniMax-M3", "MiniMax-M3-MXFP8"))


def manifest(config: dict, inventory: Inventory, weights=(1.0, 1.0), revision=COMMIT, **others) -> Manifest:
    given = {"experts": "columns", "attention": "heads", "rank": 1, "files": (), "created": "", "plan": ""} | others
    quantization = {name: own for name, own in inventory.quantization.items() if own}
    return Manifest("owner/name", revision, config, "BF16", quantization, weights, **given)


def test_flags():
    assert fetch_command("owner/name", "") == "m3dist fetch owner/name"
    assert (
        fetch_command("/a b", "-n 2", weights=(2.0, 2.0), experts="whole") == "m3dist fetch '/a b' -n 2 --experts whole"
    )
    assert fetch_command("a/b", "", weights=(3.0, 0.1), quantization=MXFP4).endswith(
        "a/b --weights 3,0.1 --mode mxfp4 --group-size 32"
    )


def test_one_entry():
    """On its own host, at its revision; one of a directory has none."""
    config = ModelConfig.from_dict(BF16)
    model = f"m3dist fetch owner/name@{COMMIT}"
    assert refetch_command(manifest(BF16, converted(config, None))) == f"{model} --world 2 --rank 1"
    assert refetch_command(manifest(BF16, converted(config, None), weights=(1.0,), rank=0)) == model
    of_directory = manifest(BF16, converted(config, None), weights=(1.0,), rank=0, revision="files-" + 64 * "0")
    assert refetch_command(of_directory) == "m3dist fetch owner/name"


@pytest.mark.parametrize(
    ("config", "inventory", "flags"),
    [
        (BF16, lambda c: converted(c, FOUR), " --mode affine --bits 4 --group-size 64"),
        (MXFP8, published_mxfp8, ""),
        (MXFP8, lambda c: requantised(published_mxfp8(c), Recipe(MXFP4)), " --mode mxfp4 --group-size 32"),
        (
            BF16,
            lambda c: requantised(converted(c, None), Recipe(FOUR, (("*lm_head", None),))),
            " --mode affine --bits 4 --group-size 64 --overrides FILE",
        ),
        (BF16 | {"quantization": {"bits": 4, "group_size": 64}}, lambda c: converted(c, FOUR), ""),
    ],
)
def test_a_format_is_named_if_the_checkpoint_had_another(config, inventory, flags):
    entry = manifest(config, inventory(ModelConfig.from_dict(config)))
    assert refetch_command(entry) == f"m3dist fetch owner/name@{COMMIT} --world 2 --rank 1{flags}"
