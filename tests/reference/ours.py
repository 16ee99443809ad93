"""Our model as the tests here feed it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from m3dist import loader
from m3dist.comm import Comm
from m3dist.model import Model, ModelArgs


def build(config: dict, tensors: dict[str, np.ndarray]) -> Model:
    """Our model with these weights (float32, published names)."""
    model = Model(ModelArgs.from_dict(config))
    weights = model.sanitize({name: mx.array(value) for name, value in tensors.items()})
    model.load_weights(list(weights.items()))
    return model


def load(path: Path, dtype: str | None = None) -> Model:
    """Our model of a checkpoint directory, whole."""
    return loader.load(path, Comm(), dtype=dtype)


def load_through_sanitize(path: Path) -> Model:
    """The same, as mlx-lm loads a model class: every tensor read by MLX, then `sanitize` and `load_weights`."""
    weights: dict[str, mx.array] = {}
    for file in path.glob("*.safetensors"):
        weights |= mx.load(str(file))
    model = Model(ModelArgs.from_dict(json.loads((path / "config.json").read_text())))
    model.load_weights(list(model.sanitize(weights).items()))
    return model


def feed(model, tokens: mx.array, sizes) -> mx.array:
    """Logits [1, L, vocabulary] of tokens [1, L], fed in pieces of these sizes through a cache."""
    cache, pieces, start = model.make_cache(), [], 0
    for size in sizes:
        pieces.append(model(tokens[:, start : start + size], cache=cache))
        mx.eval(pieces[-1])
        start += size
    assert start == tokens.shape[1]
    return mx.concatenate(pieces, axis=1)
