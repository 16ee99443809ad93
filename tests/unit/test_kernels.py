"""Our kernels' own source, run on the CPU thread by thread, against MLX's operations; and that nothing wrong is
trusted. A GPU's compiler is not tested here: `check` does that where there is one."""

import shutil

import checkpoints
import emulate
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from reference.ours import build

from m3dist.comm import agreement
from m3dist.model import gpu, heads, kernels, layers, matvec, moe, token_kernels
from m3dist.sample import Sampling

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="machine: no g++ to run kernels' source with")

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])


def clear():
    """Let the next call make each kernel anew."""
    for module in (kernels, token_kernels, matvec):
        for made in vars(module).values():
            if hasattr(made, "cache_clear"):
                made.cache_clear()


@pytest.fixture(params=["cuda", "metal"])
def dialect(request, monkeypatch):
    """Kernels are emulated, in one of the two languages."""
    clear()
    request.addfinalizer(clear)
    monkeypatch.setattr(mx.metal, "is_available", lambda: request.param == "metal")
    monkeypatch.setattr(mx.fast, f"{request.param}_kernel", emulate.compiler(request.param))
    monkeypatch.setattr(kernels, "THREADS", 64)  # threads of the CPU are dear
    monkeypatch.setattr(token_kernels, "THREADS", 64)
    return request.param


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape), dtype=mx.float32)


def assert_same(ours, theirs):
    limit = 2.0**-7 if any(mine.dtype == mx.bfloat16 for mine in ours) else 3e-5
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
        assert gpu._difference(mine, wanted) <= limit


@DTYPES
@pytest.mark.parametrize("hidden", [192, 200])
def test_add_and_norm(dialect, dtype, hidden):
    x, more = random(2, 3, hidden, seed=1).astype(dtype), random(2, 3, hidden, seed=2).astype(dtype)
    arguments = x, more, random(hidden, seed=3), 1e-6
    assert_same(kernels.add_and_norm(*arguments), layers._add_and_norm(*arguments))


@DTYPES
@pytest.mark.parametrize("offset", [mx.array(700), mx.array([3, 900])])
def test_turn_heads(dialect, dtype, offset):
    parts = tuple(
        kernels.Part(name, n, normed=name != "v", wide=name.startswith("index"))
        for name, n in (("q", 4), ("index_q", 2), ("k", 2), ("index_k", 1), ("v", 2))
    )
    x, gain = random(2, 3, 11, 128, seed=1).astype(dtype), random(9, 128, seed=2)
    x[0, 1, :, 30:33] = mx.array([mx.nan, mx.inf, -mx.inf])
    arguments = x, gain, offset.astype(mx.int32), parts, 64, 5e6, 1e-6
    assert all(mx.isfinite(part).all() for part in kernels.turn_heads(*arguments))
    assert_same(kernels.turn_heads(*arguments), heads._turn_heads(*arguments))


@pytest.mark.parametrize("experts, k", [(128, 4), (40, 2), (32, 8)])
def test_choose_experts(dialect, experts, k):
    logits, bias = 3 * random(7, experts, seed=1), random(experts, seed=2)
    mine, wanted = (
        [mx.take_along_axis(part, mx.argsort(found[0], axis=-1), axis=-1) for part in found]
        for found in (kernels.choose_experts(logits, bias, k), moe.choose_experts(logits, bias, k))
    )
    assert_same(mine, wanted)


def test_experts_that_tie_are_all_different(dialect):
    chosen, _ = kernels.choose_experts(mx.zeros((1, 64)), mx.zeros(64), 4)
    assert chosen.tolist() == [[0, 1, 2, 3]]


def test_logits_that_are_no_numbers_choose_experts_that_exist(dialect):
    chosen, _ = kernels.choose_experts(mx.full((1, 64), mx.nan), mx.zeros(64), 4)
    assert (np.array(chosen) < 64).all() or (np.array(chosen) == 0xAAAAAAAA).any()


@DTYPES
def test_swiglu(dialect, dtype):
    gate_up = (6 * random(2, 3, 100, seed=1)).astype(dtype)
    wanted = layers._swiglu_oai(gate_up.astype(mx.float32), 1.702, 7.0).astype(dtype)
    assert_same([kernels.swiglu_oai(gate_up, 1.702, 7.0)], [wanted])


@DTYPES
def test_combine(dialect, dtype):
    routed, shared = random(3, 4, 96, seed=1).astype(dtype), random(3, 96, seed=2).astype(dtype)
    arguments = routed, mx.sigmoid(random(3, 4, seed=3)), shared, 2.0
    assert_same([kernels.combine(*arguments)], [moe.combine(*arguments)])


@DTYPES
@pytest.mark.parametrize("bits", [4, 8])
def test_embed(dialect, dtype, bits):
    module = nn.QuantizedEmbedding(6, 128, 64, bits)
    rows = mx.dequantize(module.weight, module.scales, module.biases, 64, bits)
    found = token_kernels.embed(mx.array([[2, 8], [3, 9]], dtype=mx.uint32), module, 3, dtype)
    nothing = mx.zeros(128)
    assert_same([found], [mx.stack([nothing, rows[5], rows[0], nothing]).reshape(2, 2, 128).astype(dtype)])


@DTYPES
def test_the_likeliest_token(dialect, dtype):
    """Of two ranks, by way of what they send; ties go to the lowest id, and unequal hidden states are seen."""
    logits, hidden = random(300, seed=1).astype(dtype), random(200, seed=2).astype(dtype)
    notes = [mx.array([n], dtype=mx.uint32) for n in (7, 9)]
    packets = [
        token_kernels.best(logits[:170], 40, hidden, notes[0]),
        token_kernels.best(logits[170:], 210, hidden, notes[1]),
    ]
    assert packets[0][2:3].view(mx.uint32).item() == agreement(hidden).item()
    logit, token, agree, note = token_kernels.pick(mx.stack(packets))
    assert token.item() == mx.argmax(logits).item() + 40 and logit.item() == logits.max().item()
    assert agree.item() == 1 and note.item() == 7
    packets[1] = token_kernels.best(mx.ones(100, dtype=dtype) * 50, 210, hidden[::-1], notes[1])
    _, token, agree, note = token_kernels.pick(mx.stack(packets))
    assert token.item() == 210 and agree.item() == 0 and note.item() == 7


@pytest.mark.parametrize(
    "bits, group_size, rows, columns", [(4, 64, 37, 1280), (4, 32, 16, 384), (8, 64, 16, 384), (4, 128, 37, 1280)]
)
def test_matvec(monkeypatch, bits, group_size, rows, columns):
    monkeypatch.setattr(mx.fast, "cuda_kernel", emulate.compiler("cuda"))
    monkeypatch.setattr(matvec, "THREADS", 64)
    clear()
    weights = random(3, rows, columns, seed=1).astype(mx.bfloat16)
    quantised = mx.quantize(weights, group_size, bits)
    x, experts = random(4, columns, seed=2).astype(mx.bfloat16), mx.array([2, 0, 1, 1], dtype=mx.uint32)
    matrices = mx.dequantize(quantised[0], *(part.astype(mx.float32) for part in quantised[1:]), group_size, bits)
    wide = x.astype(mx.float32)
    for vectors in (1, 2, 4):
        wanted = [matrices[e] @ wide[i * vectors // 4] for i, e in enumerate(experts.tolist())]
        found = matvec.matvec(x[:vectors], *quantised, bits, group_size, experts)
        assert_same([found], [mx.stack(wanted).astype(mx.bfloat16)])
    alone = matvec.matvec(x[:1], *(part[1] for part in quantised), bits, group_size)
    assert_same([alone], [(matrices[1] @ wide[0])[None].astype(mx.bfloat16)])
    clear()


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "_trusted", {})


@pytest.mark.parametrize("found", [lambda: [mx.array([1.0, 2.1])], lambda: [mx.array([1.0, mx.nan])]])
def test_a_kernel_that_is_wrong_is_not_trusted(on_gpu, capsys, found):
    gpu.check(("some kernel",), found, lambda: [mx.array([1.0, 2.0])])
    assert not gpu.trusted(("some kernel",)) and "some kernel is not used here" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_is_not_trusted(on_gpu, capsys):
    def fails():
        raise RuntimeError("no such register\nand more")

    gpu.check(("some kernel",), fails, lambda: [mx.ones(1)])
    assert not gpu.trusted(("some kernel",)) and "no such register" in capsys.readouterr().err


def test_a_kernel_that_is_right_is_trusted_and_asked_once(on_gpu, capsys):
    asked = []
    for _ in range(2):
        gpu.check(("some kernel",), lambda: [asked.append(1) or mx.ones(2)], lambda: [mx.ones(2)])
    assert gpu.trusted(("some kernel",)) and len(asked) == 1 and not capsys.readouterr().err


def test_matvec_is_for_formats_it_knows():
    linear = nn.Linear(128, 64, bias=False)
    assert matvec._key(linear) is None
    assert matvec._key(nn.QuantizedLinear.from_linear(linear, 64, 4)) == ("matvec", 4, 64)
    assert matvec._key(nn.QuantizedLinear.from_linear(linear, 64, 6)) is None
    assert matvec._key(nn.QuantizedLinear.from_linear(linear, 32, 4, mode="mxfp4")) is None


def test_decode_with_all_of_them(monkeypatch, capsys):
    """A quantised model in bfloat16, steps below and beyond the block budget: every kernel is trusted, and the hidden
    states and likeliest tokens are those of MLX's own operations."""
    config = checkpoints.tiny_config(
        num_hidden_layers=2, hidden_size=128, head_dim=64, rotary_dim=64, sparse_index_dim=64, intermediate_size=128,
        shared_intermediate_size=128, dense_intermediate_size=128, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = build(config, checkpoints.random_tensors(config, seed=4))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, 64, 4)
    prompt, steps = mx.arange(1, 31)[None], [5, 6, 7]

    def run() -> list[mx.array]:
        model._prepare()
        cache, found = model.make_cache(), []
        model.prefill(prompt, cache)
        for step in steps:
            hidden = model.hidden(mx.array([[step]], dtype=mx.uint32), cache=cache)[0, -1]
            candidates = model.candidates(hidden, Sampling(temperature=0), note=step)
            assert candidates.note.item() == step and candidates.agree.item()
            found.append((hidden.astype(mx.float32), model.local_logits(hidden[None])[0], candidates.ids.item()))
        return found

    wanted = run()
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    monkeypatch.setattr(gpu, "_trusted", {})
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.fast, "cuda_kernel", emulate.compiler("cuda"))
    monkeypatch.setattr(kernels, "THREADS", 64)
    monkeypatch.setattr(token_kernels, "THREADS", 64)
    monkeypatch.setattr(matvec, "THREADS", 64)
    clear()
    found = run()
    clear()
    assert not capsys.readouterr().err and all(gpu._trusted.values())
    names = {key[0] for key in gpu._trusted}
    assert names == {"add_and_norm", "turn_heads", "choose_experts", "swiglu_oai", "combine", "matvec", "embed",
                     "best and pick"}  # fmt: skip
    for (hidden, _, token), (hidden_wanted, logits, _) in zip(found, wanted, strict=True):
        assert gpu._difference(hidden, hidden_wanted) < 0.05  # bfloat16, rounded in other places
        assert logits[token] >= logits.max() - 0.1 * mx.abs(logits).max()
