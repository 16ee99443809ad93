"""The embedded checkpoint answers its held-out questions exactly, in bf16 weights and in 4 bits, in every world."""

import functools
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from world import CROWDED, run_world

import m3dist.tiny
from m3dist.comm import Comm
from m3dist.loader import load
from m3dist.text import Text
from m3dist.tiny.dialogues import held_out

MAX_TOKENS = 96  # the longest answer has 77


@functools.cache
def questions():
    return held_out(200)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory) -> Path:
    """The tiny checkpoint in MLX's affine 4 bits, group 32, the router at 8 bits: as quant_predicate says."""
    path = tmp_path_factory.mktemp("tiny-4bit")
    model = load(m3dist.tiny.PATH, Comm())

    def predicate(name: str, module: nn.Module):
        wanted = model.quant_predicate(name, module)
        return {"group_size": 32, "bits": 4} if wanted is True else wanted

    nn.quantize(model, class_predicate=predicate)
    mx.save_safetensors(str(path / "model.safetensors"), dict(model.held_arrays()))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((m3dist.tiny.PATH / name).read_bytes())
    return path


def share_right(directory: Path, world: int, backend: str) -> float:
    """The share of the questions that every rank answered exactly as it should."""
    text, asked = Text.load(m3dist.tiny.PATH), questions()[: 50 if world > 2 else None]  # wide worlds take their time
    prompts = [text.prompt_ids(q.messages, thinking=q.thinking, tools=q.tools) for q in asked]
    (stop,) = text.stop_ids
    arguments = {"directory": str(directory), "prompts": prompts, "stop": stop, "max_tokens": MAX_TOKENS}
    ranks = run_world("answers", world, backend=backend, deadline=280, **arguments)
    assert all(replies == ranks[0] for replies in ranks)
    right = [text.decode(reply) == q.answer for reply, q in zip(ranks[0], asked, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("world", [1, 2])  # how it is cut does not depend on the format
def test_bf16(world):
    assert share_right(m3dist.tiny.PATH, world, "ring") >= 0.95


WIDE = [pytest.param(world, "mpi", marks=pytest.mark.mpi) for world in (3, 4, 8)]


@pytest.mark.parametrize(("world", "backend"), [(1, "ring"), (2, CROWDED), *WIDE])
def test_4_bit(world, backend, four_bit):
    assert share_right(four_bit, world, backend) >= 0.95
