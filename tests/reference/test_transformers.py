"""Our model against transformers itself, live, on fresh random checkpoints. `golden/` has the same without torch."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import all_sparse_config, dequantised, published, random_tensors, resaved, tiny_config
from reference.golden import relative_error
from reference.ours import build, feed, load

from m3dist.model import ModelArgs

pytestmark = pytest.mark.torch

TOKENS = 110
CONFIGS = {
    "published": lambda: tiny_config(),
    "all_sparse": lambda: all_sparse_config(num_hidden_layers=3),
    "no_local_block": lambda: tiny_config(sparse_local_block=0, num_hidden_layers=3),
    "tied": lambda: tiny_config(tie_word_embeddings=True, num_hidden_layers=2),
}


@pytest.fixture(scope="module")
def reference():
    """make_golden's functions; imported late, because they need torch."""
    import torch
    import transformers
    from reference import make_golden

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return make_golden


def steady_case(reference, config: dict, path):
    """-> (tensors, transformers' model, tokens, its logits) of a random seed whose choices of experts and blocks do not
    hang on rounding: one in a few hundred does, and then two correct programs differ."""
    import copy

    for _ in range(5):
        seed = int.from_bytes(os.urandom(4), "little")
        print(f"seed {seed}")
        tensors = random_tensors(config, seed, vision=True)
        model = reference.load(published(path, config, tensors, dtype="F32"))
        tokens = np.random.default_rng(seed).integers(0, config["image_token_index"], TOKENS)
        wanted = reference.logits(model, tokens)
        if relative_error(reference.logits(copy.deepcopy(model).double(), tokens), wanted) < 1e-5:
            return tensors, model, tokens, wanted
    raise AssertionError("float32 and float64 disagree on every seed")


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_seed(reference, tmp_path, name):
    config = CONFIGS[name]()
    tensors, _, tokens, wanted = steady_case(reference, config, tmp_path)
    model = build(config, tensors)
    assert relative_error(model(mx.array(tokens[None]))[0], wanted) < 1e-4
    assert relative_error(feed(model, mx.array(tokens[None]), [61, 1, 1, 47])[0], wanted) < 1e-4


def test_saved_by_transformers(reference, tmp_path):
    """A model that transformers writes (its own names, its flat config, several shards) and our loader reads."""
    config = tiny_config(num_hidden_layers=3)
    tensors, model, tokens, wanted = steady_case(reference, config, tmp_path / "published")
    model.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    saved = dequantised(tmp_path / "saved")
    assert saved.keys() == tensors.keys()
    assert all((saved[name] == tensors[name]).all() for name in tensors)
    ours = load(tmp_path / "saved")
    assert relative_error(ours(mx.array(tokens[None]))[0], wanted) < 1e-4


def test_text_model_saved_by_transformers(reference, tmp_path):
    """transformers' text-only class saves the names it has in memory (`mlp.experts.gate_up_proj`, `indexer.q_proj`)
    and not the published ones: its model_type has no renaming."""
    from transformers import MiniMaxM3VLForCausalLM

    config = all_sparse_config(num_hidden_layers=2)
    _, model, tokens, wanted = steady_case(reference, config, tmp_path / "published")
    text = MiniMaxM3VLForCausalLM(model.config.text_config)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(tmp_path / "saved")
    assert relative_error(load(tmp_path / "saved")(mx.array(tokens[None]))[0], wanted) < 1e-4


def test_resaved_spelling(reference, tmp_path):
    """Our own idea of transformers' flat spelling is the one it writes, and both spellings are one configuration."""
    config = all_sparse_config(sparse_local_block=2)
    model = reference.load(
        published(tmp_path / "published", config, random_tensors(config, 0, vision=True), dtype="F32")
    )
    model.save_pretrained(tmp_path / "saved")
    written, ours = json.loads((tmp_path / "saved" / "config.json").read_text()), resaved(config)
    assert {key: written["text_config"].get(key) for key in ours["text_config"]} == ours["text_config"]
    assert ModelArgs.from_dict(written) == ModelArgs.from_dict(ours) == ModelArgs.from_dict(config)
