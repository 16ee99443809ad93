"""Our model as the tests here feed it."""

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


def load(path: Path) -> Model:
    """Our model of a checkpoint directory, whole."""
    return loader.load(path, Comm())


def feed(model, tokens: mx.array, sizes) -> mx.array:
    """Logits [1, L, vocabulary] of tokens [1, L], fed in pieces of these sizes through a cache."""
    cache, pieces, start = model.make_cache(), [], 0
    for size in sizes:
        pieces.append(model(tokens[:, start : start + size], cache=cache))
        mx.eval(pieces[-1])
        start += size
    assert start == tokens.shape[1]
    return mx.concatenate(pieces, axis=1)
