"""Our model against mlx-lm's, in one process, and our model under mlx-lm's own generators and evaluators.

MLX's CPU backend multiplies gathered expert matrices in float32 only, so models with experts run in float32 here, on
float32 or quantised weights. bfloat16 is compared on a model without experts.
"""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import all_sparse_config, dequantised, random_tensors, tiny_config
from reference.golden import relative_error
from reference.ours import build, feed, load, load_through_sanitize

pytestmark = pytest.mark.mlx_lm

TOLERANCE = 1e-4
CONFIG = tiny_config(num_hidden_layers=3)
TENSORS = random_tensors(CONFIG, seed=11)
# Group 64 divides the expert width only here; CONFIG's 96 leaves the down projections unquantised, which MLX does too.
WIDE = all_sparse_config(num_hidden_layers=2, intermediate_size=128, shared_intermediate_size=128)
WIDE_TENSORS = random_tensors(WIDE, seed=12)
TOKENS = np.random.default_rng(13).integers(0, CONFIG["image_token_index"], (1, 100))
# mlx-lm's quantised embedding gives bfloat16 in these modes; left in float32, the whole forward is float32.
PLAIN_EMBEDDING = {"language_model.model.embed_tokens": False}


def theirs(path):
    """mlx-lm's model of a checkpoint directory."""
    from mlx_lm.utils import load_model

    return load_model(path)[0]


def their_model(config: dict, tensors: dict[str, np.ndarray]):
    """mlx-lm's model with these float32 weights (published names)."""
    from mlx_lm.models.minimax_m3_vl import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config))
    weights = model.sanitize({name: mx.array(value) for name, value in tensors.items()})
    model.load_weights(list(weights.items()))
    return model


def logits(model, tokens=TOKENS) -> np.ndarray:
    return np.array(model(mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("config", [CONFIG, all_sparse_config(num_hidden_layers=3)], ids=["published", "all_sparse"])
def test_float32(config):
    tensors = random_tensors(config, seed=14)
    wanted = logits(their_model(config, tensors))
    model = build(config, tensors)
    assert relative_error(logits(model), wanted) < TOLERANCE
    assert relative_error(feed(model, mx.array(TOKENS), [33, 1, 1, 65]), wanted) < TOLERANCE


FORMATS = {
    "affine4g32": {"mode": "affine", "bits": 4, "group_size": 32},
    "affine4g64": {"mode": "affine", "bits": 4, "group_size": 64},
    "affine8g64": {"mode": "affine", "bits": 8, "group_size": 64},
    "affine3g64": {"mode": "affine", "bits": 3, "group_size": 64},
    "affine6g32": {"mode": "affine", "bits": 6, "group_size": 32},
    "mxfp4": {"mode": "mxfp4", "overrides": PLAIN_EMBEDDING},
    "mxfp8": {"mode": "mxfp8", "overrides": PLAIN_EMBEDDING},
    "nvfp4": {"mode": "nvfp4", "overrides": PLAIN_EMBEDDING},
    "none": {"mode": None},
}


@pytest.mark.parametrize("layout", "abc")
@pytest.mark.parametrize("name", FORMATS)
def test_converted(tmp_path, layout, name):
    """The same files, read by mlx-lm and by us; and the float32 weights that `dequantised` says they stand for."""
    path = checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, layout=layout, dtype="F32", shards=2, **FORMATS[name])
    wanted = logits(theirs(path))
    assert relative_error(logits(their_model(CONFIG, dequantised(path))), wanted) < TOLERANCE
    got = logits(load(path))
    assert relative_error(got, wanted) < TOLERANCE
    assert (logits(load_through_sanitize(path)) == got).all()


@pytest.mark.parametrize("name", ["affine4g64", "affine8g64", "mxfp8"])
def test_converted_wide(tmp_path, name):
    path = checkpoints.mlx_layout(tmp_path, WIDE, WIDE_TENSORS, layout="b", dtype="F32", **FORMATS[name])
    assert relative_error(logits(load(path)), logits(theirs(path))) < TOLERANCE


@pytest.mark.parametrize("name", ["affine4g32", "none"])
@pytest.mark.parametrize("layout", "de")
def test_text_only_layouts(tmp_path, layout, name):
    """mlx-lm cannot read these; it can run the weights they stand for."""
    path = checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, layout=layout, dtype="F32", **FORMATS[name])
    assert relative_error(logits(load(path)), logits(their_model(CONFIG, dequantised(path)))) < TOLERANCE


def test_mixed_precision(tmp_path):
    """A format for each module, as mixed-bit conversions have; and a module left alone."""
    layer = "language_model.model.layers.1."
    overrides = {
        layer + "self_attn.o_proj": {"group_size": 64, "bits": 6, "mode": "affine"},
        layer + "block_sparse_moe.switch_mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        layer + "self_attn.index_q_proj": False,
        "language_model.lm_head": {"group_size": 32, "bits": 8},
    }
    quantisation = {"mode": "affine", "bits": 4, "group_size": 32, "overrides": overrides}
    path = checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, dtype="F32", **quantisation)
    assert relative_error(logits(load(path)), logits(theirs(path))) < TOLERANCE


def test_published_mxfp8(tmp_path):
    path = checkpoints.mxfp8(tmp_path, CONFIG, TENSORS, shards=3, dtype="F32")
    wanted = logits(theirs(path))
    assert relative_error(logits(their_model(CONFIG, dequantised(path))), wanted) < TOLERANCE
    assert relative_error(logits(load(path)), wanted) < TOLERANCE


WRITERS = {
    "bf16": lambda path: checkpoints.published(path, CONFIG, TENSORS, shards=2),
    "f16": lambda path: checkpoints.published(path, CONFIG, TENSORS, dtype="F16"),
    "fp8_block": lambda path: checkpoints.fp8_block(path, CONFIG, TENSORS, shards=2),
    "mxfp8": lambda path: checkpoints.mxfp8(path, CONFIG, TENSORS, shards=2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_published_in_float32(tmp_path, name):
    """The published formats, half-precision tensors widened while loading."""
    path = WRITERS[name](tmp_path)
    assert relative_error(logits(load(path, "float32")), logits(their_model(CONFIG, dequantised(path)))) < TOLERANCE


def test_quantised_decode(tmp_path):
    path = checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, dtype="F32", **FORMATS["affine4g32"])
    assert relative_error(feed(load(path), mx.array(TOKENS), [40] + [1] * 60), logits(theirs(path))) < TOLERANCE


@pytest.mark.parametrize("sparse", [0, 1], ids=["full", "sparse"])
def test_bfloat16(tmp_path, sparse):
    """No experts, in bfloat16, where no two implementations round alike: the measure is the float32 answer.

    A rounding to bfloat16 is wrong by up to 2**-9; some 8 of them a layer, 3 layers, added in quadrature, make 1%. And
    ours may not be farther from the float32 answer than mlx-lm's, which rounds the norms' 1 + weight to bfloat16 too.
    The median token counts: where rounding makes a query choose another block, that token is off by far more.
    """
    config = tiny_config(
        moe_layer_freq=[0] * 3,
        sparse_attention_freq=[sparse] * 3,
        sparse_disable_index_value=[sparse] * 3,
        num_hidden_layers=3,
    )
    tensors = random_tensors(config, seed=15)
    path = checkpoints.published(tmp_path, config, tensors)
    exact = logits(their_model(config, tensors))
    ours, other = load(path)(mx.array(TOKENS)), theirs(path)(mx.array(TOKENS))
    assert ours.dtype == other.dtype == mx.bfloat16
    error, their_error = error_of_median_token(ours, exact), error_of_median_token(other, exact)
    assert error < their_error and error < 0.02


@pytest.mark.parametrize("name", ["affine4g32", "mxfp8", "published"])
def test_bfloat16_quantised(tmp_path, name):
    """Experts too, as converted models run in practice. MLX's CPU kernels round more here (they sum in bfloat16), for
    both alike: so ours may be 1.2 times as far from the float32 answer as mlx-lm's, and no farther than 6%."""
    if name == "published":
        path = checkpoints.mxfp8(tmp_path, CONFIG, TENSORS)
    else:
        quantisation = {**FORMATS[name], "overrides": {}}
        path = checkpoints.mlx_layout(tmp_path, CONFIG, TENSORS, layout="b", **quantisation)
    tokens = TOKENS[:, :60]
    exact = logits(their_model(CONFIG, dequantised(path)), tokens)
    ours, other = load(path)(mx.array(tokens)), theirs(path)(mx.array(tokens))
    assert ours.dtype == other.dtype == mx.bfloat16
    error, their_error = error_of_median_token(ours, exact), error_of_median_token(other, exact)
    assert error < 1.2 * their_error and error < 0.06


def error_of_median_token(got: mx.array, exact: np.ndarray) -> float:
    """The root mean square error of a token's logits, in units of the logits' standard deviation."""
    errors = np.sqrt(np.mean((np.array(got.astype(mx.float32)) - exact) ** 2, axis=-1))
    return float(np.median(errors) / exact.std())


# ---------------------------------------------------------------------------------------------------------------------
# mlx-lm's programs, driving our model


@pytest.fixture(scope="module")
def pair():
    """(our model, mlx-lm's) with the same float32 weights."""
    return build(CONFIG, TENSORS), their_model(CONFIG, TENSORS)


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token, "w0" to "w159"; the last one ends a text."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = CONFIG["text_config"]["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{size - 1}"))


def greedy(model, prompt: list[int], steps: int) -> list[int]:
    """The most likely tokens, without a cache."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(mx.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


PROMPTS = [TOKENS[0, :n].tolist() for n in (70, 3, 41, 25)]


def test_stream_generate(pair, tokenizer):
    from mlx_lm import stream_generate

    for prompt in PROMPTS:
        ours, other = (
            [r.token for r in stream_generate(m, tokenizer, prompt, max_tokens=12, prefill_step_size=16)] for m in pair
        )
        assert ours == other == greedy(pair[0], prompt, 12)[: len(ours)]


def test_stream_generate_on_a_kept_cache(pair, tokenizer):
    """A conversation: the second turn goes on from the first one's cache, after part of it is trimmed."""
    from mlx_lm import stream_generate
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

    model, prompt = pair[0], PROMPTS[0]
    cache = make_prompt_cache(model)
    list(stream_generate(model, tokenizer, prompt, max_tokens=5, prompt_cache=cache))
    surplus = cache[0].offset - 50
    assert can_trim_prompt_cache(cache) and trim_prompt_cache(cache, surplus) == surplus
    turn = stream_generate(model, tokenizer, prompt[50:], max_tokens=8, prompt_cache=cache)
    tokens = [r.token for r in turn]
    assert tokens == greedy(model, prompt, 8)[: len(tokens)]


def test_speculative_generate(pair, tokenizer):
    """A draft that agrees only sometimes: rejected tokens are trimmed from K, V and index K."""
    from mlx_lm import stream_generate

    model, prompt = pair[0], PROMPTS[2]
    noisy = {name: value * 1.01 if "o_proj" in name else value for name, value in TENSORS.items()}
    draft = build(CONFIG, noisy)
    generated = stream_generate(model, tokenizer, prompt, max_tokens=20, draft_model=draft, num_draft_tokens=3)
    tokens = [r.token for r in generated]
    assert tokens == greedy(model, prompt, 20)[: len(tokens)]


def test_batch_generate(pair, tokenizer):
    """Rows of unequal length that enter and leave a running batch."""
    from mlx_lm.generate import batch_generate

    steps = [9, 14, 4, 11]
    made = batch_generate(
        pair[0],
        tokenizer,
        PROMPTS,
        max_tokens=steps,
        return_token_ids=True,
        prefill_batch_size=2,
        completion_batch_size=3,
        prefill_step_size=16,
    )
    for prompt, count, tokens in zip(PROMPTS, steps, made.token_ids, strict=True):
        assert tokens == greedy(pair[0], prompt, count)[: len(tokens)]


def test_perplexity(pair):
    from mlx_lm.perplexity import eval_ppl

    data = mx.array(np.random.default_rng(16).integers(0, 158, (5, 60)))
    ours, other = (eval_ppl(model, data, batch_size=2) for model in pair)
    assert ours == pytest.approx(other, rel=1e-4)


@pytest.fixture
def mlxlm(monkeypatch):
    """mlx_lm.evaluate.MLXLM, which subclasses lm-eval's LM; a stand-in does where lm-eval is not installed, since the
    scoring itself uses nothing of it."""
    if importlib.util.find_spec("lm_eval") is None:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = object
        sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    from mlx_lm.evaluate import MLXLM

    yield MLXLM
    sys.modules.pop("mlx_lm.evaluate", None)


def evaluator(mlxlm, model, tokenizer):
    """An MLXLM around a model in memory: its constructor only loads from disk."""
    self = mlxlm.__new__(mlxlm)
    self._model, self.tokenizer, self._batch_size, self._max_tokens = model, tokenizer, 3, None
    self.use_chat_template, self._sampler = False, None
    return self


def words(tokens) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_evaluate_loglikelihood(mlxlm, pair, tokenizer):
    """Two answers to each of two questions, scored from a copy of the question's cache."""
    ids = TOKENS[0].tolist()
    requests = [
        SimpleNamespace(args=(words(ids[:length]), " " + words(answer)))
        for length in (60, 7)
        for answer in (ids[60:69], ids[80:81])
    ]
    ours, other = (evaluator(mlxlm, model, tokenizer).loglikelihood(requests) for model in pair)
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in other], rel=1e-4)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in other]


def test_evaluate_rolling(mlxlm, pair, tokenizer):
    """Texts of unequal length in one batch."""
    requests = [SimpleNamespace(args=(words(prompt),)) for prompt in PROMPTS]
    ours, other = (evaluator(mlxlm, model, tokenizer).loglikelihood_rolling(requests) for model in pair)
    assert ours == pytest.approx(other, rel=1e-4)


def test_evaluate_generate_until(mlxlm, pair, tokenizer):
    requests = [SimpleNamespace(args=(words(prompt), {"until": ["w9999"], "max_gen_toks": 6})) for prompt in PROMPTS]
    made = evaluator(mlxlm, pair[0], tokenizer).generate_until(requests)
    assert [text.split() for text in made] == [words(greedy(pair[0], prompt, 6)).split() for prompt in PROMPTS]
