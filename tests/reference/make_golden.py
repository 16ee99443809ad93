"""Writes golden/*.npz: the logits of transformers' MiniMax-M3, float32, eager attention, on seeded checkpoints.

    PYTHONPATH=tests python tests/reference/make_golden.py     (needs torch and transformers; about 10 seconds)

Each checkpoint goes through transformers' own loading of the published layout. What a run must show before it is
stored: the selection of key blocks changes the logits (dense attention gives others, but only past the block budget),
and no choice of expert or block hangs on rounding (float64 gives the same logits).

transformers 5.23 as seen from here:
- A config with `rotary_dim` but without `partial_rotary_factor` rotates whole heads, so configs always carry both.
- `hidden_act: swigluoai` becomes "silu" and is not used; `sparse_init_block` is dropped (it is 0).
- With index heads narrower than the rotation it cuts the cosines off instead of recomputing the angles, which is no
  rotation any more (mlx-lm differs there); no case has that.
- Blocks hang on cache slots, so rows of unequal length run one by one here instead of left-padded.
- `save_pretrained` writes exactly the published tensor names, per-expert w1, w2 and w3 included. That is the class with
  vision; the text-only MiniMaxM3VLForCausalLM writes its names in memory, and given a published directory it loads
  nothing, keeps random weights and only reports it.
- `mtp.*` tensors are ignored without a word.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from checkpoints import published, random_tensors
from reference import golden
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration


def load(path: Path) -> MiniMaxM3SparseForConditionalGeneration:
    """The model of a checkpoint directory; every tensor must be found and used."""
    model, info = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model, tokens: np.ndarray, cache=None) -> np.ndarray:
    """int [L] -> float32 [L, vocabulary]."""
    output = model(torch.tensor(tokens)[None], past_key_values=cache, use_cache=cache is not None)
    return output.logits[0].float().numpy()


def new_cache(model) -> transformers.DynamicCache:
    return transformers.DynamicCache(config=model.config.text_config)


def decode(model, tokens: np.ndarray, prefill: int) -> np.ndarray:
    """int [L] -> float32 [L - prefill, vocabulary]: one token at a time after a prefill."""
    cache = new_cache(model)
    logits(model, tokens[:prefill], cache)
    return np.concatenate([logits(model, tokens[i : i + 1], cache) for i in range(prefill, len(tokens))])


def make(name: str, directory: Path) -> dict[str, np.ndarray]:
    config, seed = golden.CASES[name]
    # transformers wants a vision tower, which the text logits do not depend on.
    path = published(directory / name, config, random_tensors(config, seed, vision=True), dtype="F32")
    model = load(path)
    rng = np.random.default_rng(seed)
    vocabulary = config["image_token_index"]  # the ids below it: no placeholders
    tokens = rng.integers(0, vocabulary, golden.TOKENS)
    rows = np.zeros((len(golden.ROWS), max(golden.ROWS) + golden.ROW_STEPS), np.int64)
    row_logits = []
    for row, length in zip(rows, golden.ROWS, strict=True):
        row[: length + golden.ROW_STEPS] = rng.integers(0, vocabulary, length + golden.ROW_STEPS)
        cache = new_cache(model)
        steps = [logits(model, row[:length], cache)[-1:]]
        steps += [logits(model, row[i : i + 1], cache) for i in range(length, length + golden.ROW_STEPS)]
        row_logits.append(np.concatenate(steps))
    whole = logits(model, tokens)
    check(model, config, tokens, whole)
    return {
        "config": np.array(json.dumps(config)),
        "checksum": np.array(golden.checksum(random_tensors(config, seed)), np.uint32),
        "tokens": tokens.astype(np.int16),
        "logits": whole[:, golden.VOCABULARY],
        "decode": decode(model, tokens, golden.PREFILL)[:, golden.VOCABULARY],
        "rows": rows.astype(np.int16),
        "row_logits": np.stack(row_logits)[..., golden.VOCABULARY],
    }


def check(model, config: dict, tokens: np.ndarray, wanted: np.ndarray) -> None:
    """See the head of this file."""
    sparse = config["text_config"]["sparse_attention_config"]
    budget = sparse["sparse_block_size"] * sparse["sparse_topk_blocks"]
    assert len(tokens) >= 4 * budget and max(golden.ROWS) >= 4 * budget
    dense = copy.deepcopy(model)
    for layer in dense.model.language_model.layers:
        if layer.self_attn.indexer:
            layer.self_attn.indexer.topk_blocks = len(tokens)
    without = logits(dense, tokens)
    early = golden.relative_error(without[:budget], wanted[:budget])
    late = golden.relative_error(without[budget:], wanted[budget:])
    double = golden.relative_error(logits(copy.deepcopy(model).double(), tokens), wanted)
    print(f"  dense attention: {early:.1e} up to the budget of {budget}, {late:.2f} past it; float64: {double:.1e}")
    assert early < 1e-5 < 0.1 < late and double < 1e-5


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    golden.DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for name in sys.argv[1:] or golden.CASES:
            print(name)
            np.savez_compressed(golden.DIRECTORY / f"{name}.npz", **make(name, Path(directory)))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    (golden.DIRECTORY / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
