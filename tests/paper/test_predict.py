"""Predicted speeds: each term against arithmetic by hand, and that the flags and the tables say what they rest on."""

import json
import math
from dataclasses import fields, replace

import pytest

from m3dist import cli
from m3dist.machines import LINKS, MACS, PUBLISHED_SPEEDS, Link, Machine
from m3dist.measured import compare, link_of, machine_of, read_bench
from m3dist.options import RANDOM
from m3dist.plan import make_plan
from m3dist.plan_report import inventory_of
from m3dist.predict import (
    KERNELS_DENSE_LAYER,
    KERNELS_MOE_LAYER,
    KERNELS_SELECTION,
    KERNELS_TOKEN,
    Predictor,
    Product,
    Step,
    Tokens,
    is_beyond_caches,
    possible_plans,
)
from m3dist.tensors import modules, split_name

# Machines whose seconds are bytes, FLOP and kernels: what they do not show costs them nothing.
READS = ("bandwidth", "attention_bandwidth", "selected_bandwidth")
COMPUTES = ("flops", "expert_flops", "attention_flops", "index_flops")


def machine(name: str, reads: float, computes: float, launch: float = 0.0) -> Machine:
    return Machine(name, **dict.fromkeys(READS, reads), **dict.fromkeys(COMPUTES, computes), launch=launch)


READER = machine("reads", 1.0, math.inf)
COMPUTER = machine("computes", math.inf, 1.0)
LAUNCHER = machine("launches", math.inf, math.inf, launch=1.0)
FREE = Link("costs nothing", hop=0.0, bandwidth=math.inf)
# MiniMax-M3, in its published numbers.
HIDDEN, HEADS, KV, DIM, VOCABULARY = 6144, 64, 4, 128, 200064
DENSE, SPARSE, BUDGET = 3, 57, 16 * 128


@pytest.fixture(scope="module")
def m3():
    """The published model in MLX's 4 bits."""
    return inventory_of("MiniMaxAI/MiniMax-M3", None, 4, None)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The terms


@pytest.mark.parametrize("attention", ["heads", "replicated"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_step_reads_the_plans_bytes_and_the_cache(m3, world, attention):
    plan = make_plan(m3, world, attention=attention)
    for context in (1, 512, BUDGET):
        cached = [context * 2 * kv * DIM * 2 * (DENSE + SPARSE) for kv in kv_heads(plan)]
        expected = max(plan.bytes_read(rank) + keys for rank, keys in enumerate(cached))
        assert Predictor(plan, READER).decode(context, FREE).memory == pytest.approx(expected, abs=1)
    context = 100_000
    for_a_head = 2 * DIM * 2 * (DENSE * context + SPARSE * BUDGET)
    cached = [kv * for_a_head + SPARSE * 128 * 4 * context for kv in kv_heads(plan)]
    expected = max(plan.bytes_read(rank) + keys for rank, keys in enumerate(cached))
    assert Predictor(plan, READER).decode(context, FREE).memory == pytest.approx(expected, abs=1)


def kv_heads(plan) -> list[int]:
    if plan.attention == "replicated":
        return [KV] * plan.world
    return [stop - start for start, stop in (share.spans["kv_head"] for share in plan.shares)]


Q_AND_O, K_AND_V, INDEX = 2 * HIDDEN * HEADS * DIM, 2 * HIDDEN * KV * DIM, HIDDEN * (4 + 1) * 128
MOE = 128 * HIDDEN + (4 + 1) * 3 * HIDDEN * 3072  # the router, and what one token is multiplied by


def active_values(answer: bool = True) -> int:
    """Values of the matrices that one token is multiplied by, without the head; `answer`: more than its K and V is
    wanted of the last layer."""
    dense = 3 * HIDDEN * 12288
    whole = DENSE * (Q_AND_O + K_AND_V + dense) + SPARSE * (Q_AND_O + K_AND_V + INDEX + MOE)
    return whole if answer else whole - Q_AND_O // 2 - MOE  # the queries are computed with the keys


def test_a_step_computes_two_flop_a_value_and_the_attention(m3):
    predictor = Predictor(make_plan(m3, 1), COMPUTER)
    head = HIDDEN * VOCABULARY
    context = 100_000
    attention = 4 * HEADS * DIM * (DENSE * context + SPARSE * BUDGET) + SPARSE * 2 * 4 * 128 * context
    found = predictor.decode(context, FREE)
    # A row of the embedding is counted as one product with it: 2 FLOP a value.
    assert found.compute == pytest.approx(2 * (active_values() + head) + attention + 2 * HIDDEN)
    assert found.memory == 0 and found.link == 0


def test_a_prompt_computes_what_its_tokens_would_but_for_the_head(m3):
    predictor = Predictor(make_plan(m3, 1), COMPUTER)
    prompt = 3000  # in chunks of 1024, of which the first two stay within the budget; the last token by itself
    keys, selected = sum(range(1, prompt)), sum(range(1, 2048 + 1)) + (prompt - 1 - 2048) * BUDGET
    index = 2 * 4 * 128 * 2999 * (2999 - 2048)
    attention = 4 * HEADS * DIM * (DENSE * keys + (SPARSE - 1) * selected) + (SPARSE - 1) * index
    products = 2999 * 2 * (active_values(answer=False) + HIDDEN)
    last = predictor.decode(prompt, FREE).compute
    assert predictor.prefill(prompt, 1024, FREE).compute == pytest.approx(products + attention + last)


def test_experts_and_choices_have_their_own_speeds(m3):
    plan, context = make_plan(m3, 1), 100_000
    whole = Predictor(plan, COMPUTER).decode(context, FREE).compute
    for field, flops in (
        ("expert_flops", 2 * SPARSE * 4 * 3 * HIDDEN * 3072),
        ("index_flops", 2 * SPARSE * 4 * 128 * context),
    ):
        faster = Predictor(plan, replace(COMPUTER, **{field: 2.0})).decode(context, FREE).compute
        assert whole - faster == pytest.approx(flops / 2)


def test_many_tokens_selected_keys_have_their_own_speed(m3):
    plan, tokens = make_plan(m3, 1), Tokens(8192, 100, sampled=False)
    slower = replace(READER, selected_bandwidth=0.5)
    more = Predictor(plan, slower).step(tokens, FREE).memory - Predictor(plan, READER).step(tokens, FREE).memory
    assert more == pytest.approx((SPARSE - 1) * 100 * BUDGET * 2 * KV * DIM * 2)
    assert Predictor(plan, slower).decode(8192, FREE) == Predictor(plan, READER).decode(8192, FREE)


def test_weights_that_are_unpacked_first_are_unpacked_and_multiplied(m3):
    """One token's product reads them as they are; so do the rows of a few, each for itself."""
    product = Product(1000, 2000, used=0.25, unpacked_from=8, is_expert=True, is_beyond_caches=False)
    unpacking = replace(machine("unpacks", 1.0, 10.0), unpack_bandwidth=0.5)
    predictor = Predictor(make_plan(m3, 1), unpacking)
    assert predictor._product(product, 1) == Step(memory=250)
    assert predictor._product(product, 31) == Step(memory=7750)
    assert predictor._product(product, 32) == Step(memory=2000 * (1 - 0.75**32), compute=2 * 2000 * 8 / 10)
    otherwise = Predictor(make_plan(m3, 1), replace(unpacking, unpack_bandwidth=None))
    assert otherwise._product(product, 32) == Step(compute=2 * 2000 * 8 / 10)


def test_the_modules_that_only_an_answer_needs(m3):
    layer, dense = "language_model.model.layers.59", "language_model.model.layers.58"
    beyond = {name.removeprefix("language_model.") for name in modules(m3.config) if is_beyond_caches(name, m3.config)}
    assert not any(name.startswith(dense.removeprefix("language_model.")) for name in beyond)
    kept = {name.removeprefix("language_model.") for name in modules(m3.config) if name.startswith(layer)} - beyond
    assert {name.rpartition(".")[2] for name in kept} == {
        "input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm",
        "index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm",
    }  # fmt: skip
    assert {"lm_head", "model.norm"} <= beyond and "model.embed_tokens" not in beyond
    assert is_beyond_caches("language_model.model.embed_tokens", replace(m3.config, tie_word_embeddings=True))


def test_a_chunk_reads_each_expert_that_a_token_chose(m3):
    plan = make_plan(m3, 1)
    predictor = Predictor(plan, READER)
    wanted = {name: s for name, s in plan.specs.items() if not is_beyond_caches(split_name(name)[0], m3.config)}
    experts = sum(spec.nbytes for name, spec in wanted.items() if ".switch_mlp." in name)
    for tokens, chosen in ((2, 1 - (31 / 32) ** 2), (4096, 1.0)):  # a token chooses one in 32
        once = predictor.step(Tokens(0, tokens, sampled=False), FREE).memory
        others = sum(
            spec.nbytes for name, spec in wanted.items() if ".switch_mlp." not in name and "embed_tokens" not in name
        )
        embedding = plan.specs["language_model.model.embed_tokens.weight"].nbytes * 1.125  # with scales and biases
        sparse = (SPARSE - 1) * (tokens if tokens <= BUDGET else selected(tokens))
        seen = 2 * KV * DIM * 2 * (DENSE * tokens + sparse)
        index = (SPARSE - 1) * 128 * 4 * tokens if tokens > BUDGET else 0
        rows = embedding * (1 - (1 - 1 / VOCABULARY) ** tokens)
        assert once == pytest.approx(chosen * experts + others + rows + seen + index)


def selected(tokens: int) -> int:
    return sum(min(n, BUDGET) for n in range(1, tokens + 1))


def test_a_product_takes_the_longer_of_reading_and_computing(m3):
    plan = make_plan(m3, 1)
    slow, fast, between = (
        Predictor(plan, machine("between", 1.0, flops)).decode(512, FREE) for flops in (1e-3, 1e6, 10)
    )
    assert fast.compute == 0 and slow.memory < 1e-3 * fast.memory  # norms only read
    # In 4 bits a product with one vector is 3.6 FLOP a byte; attention is 16, its 16 heads sharing K and V.
    attention = 4 * HEADS * DIM * 512 * (DENSE + SPARSE)
    assert between.compute == pytest.approx(attention / 10)
    assert between.memory == pytest.approx(plan.bytes_read(0), abs=1)


@pytest.mark.parametrize("before", [0, 1, 7, 8, 9, 30])
@pytest.mark.parametrize("count", [1, 2, 8, 21])
def test_keys_are_counted_as_each_token_sees_them(before, count):
    for most in (1, 8, 10, 100):
        assert Tokens(before, count, sampled=False).keys(most) == sum(
            min(position + 1, most) for position in range(before, before + count)
        )


def test_kernels_are_counted_by_layer(m3):
    predictor = Predictor(make_plan(m3, 4), LAUNCHER)
    short = DENSE * KERNELS_DENSE_LAYER + SPARSE * KERNELS_MOE_LAYER + KERNELS_TOKEN
    assert predictor.decode(BUDGET, FREE).launch == short
    assert predictor.decode(BUDGET + 1, FREE).launch == short + SPARSE * KERNELS_SELECTION
    assert predictor.prefill(1025, 512, FREE).launch == 3 * short - 2 * KERNELS_MOE_LAYER


@pytest.mark.parametrize(("attention", "sums", "a_layer"), [("heads", 121, 2), ("replicated", 61, 1)])
def test_sums_of_a_step_and_of_a_prompt(m3, attention, sums, a_layer):
    predictor = Predictor(make_plan(m3, 4, attention=attention), READER)
    latency = Link("latency only", hop=1.0, bandwidth=math.inf)
    assert predictor.decode(512, latency).link == 6 * (sums + 1)
    assert predictor.prefill(1001, 500, latency).link == 6 * (2 * (sums - a_layer) + sums + 1)
    bandwidth = Link("bandwidth only", hop=0.0, bandwidth=1.0)
    assert predictor.prefill(501, 500, bandwidth).link == pytest.approx((sums - a_layer) * 1.5 * 499 * HIDDEN * 2)
    alone = Predictor(make_plan(m3, 1), READER)
    assert alone.decode(512, latency).link == alone.prefill(500, 500, bandwidth).link == 0


def test_python_is_waited_for_where_it_takes_longer(m3):
    plan = make_plan(m3, 1)
    without = Predictor(plan, MAC).decode(512, FREE)
    assert Predictor(plan, replace(MAC, host=without.seconds / 61)).decode(512, FREE) == without
    waiting = Predictor(plan, replace(MAC, host=without.seconds / 59)).decode(512, FREE)
    assert waiting.seconds == pytest.approx(without.seconds * 60 / 59)
    assert replace(waiting, host=0.0) == without
    choosing = replace(MAC, host=1.0, host_selection=0.5)
    assert Predictor(plan, choosing).decode(BUDGET, FREE).seconds == pytest.approx(60)
    assert Predictor(plan, choosing).decode(BUDGET + 1, FREE).seconds == pytest.approx(60 + 0.5 * SPARSE)


def test_a_sums_latency_by_topology():
    ring = Link("ring", hop=1.0, bandwidth=1.0, handover=0.25)
    assert [ring.latency(world) for world in (1, 2, 4, 8)] == [0, 2.25, 6.25, 14.25]
    mesh = replace(ring, exchange=0.5, mesh=4)
    assert [mesh.latency(world) for world in (1, 2, 4, 8)] == [0, 0.75, 0.75, 14.25]


# ---------------------------------------------------------------------------------------------------------------------
# What follows from them


@pytest.fixture(scope="module")
def plans(m3):
    return {world: possible_plans(m3, world, "columns") for world in (1, 2, 4)}


MAC = replace(machine("a Mac", 600e9, 17e12, 3e-6), selected_bandwidth=200e9)
BETTER = {
    "bandwidth": 700e9, "flops": 30e12, "attention_flops": 30e12, "attention_bandwidth": 700e9, "launch": 1e-6,
    "selected_bandwidth": 300e9, "expert_flops": 30e12, "index_flops": 30e12,
}  # fmt: skip


@pytest.mark.parametrize("better", BETTER)
def test_a_better_machine_is_nowhere_slower(plans, better):
    for world, cuts in plans.items():
        for plan in cuts:
            old, new = Predictor(plan, MAC), Predictor(plan, replace(MAC, **{better: BETTER[better]}))
            assert new.prefill(4096, 512, FREE).seconds < old.prefill(4096, 512, FREE).seconds, world
            for context in (512, 100_000):
                assert new.decode(context, FREE).seconds <= old.decode(context, FREE).seconds


@pytest.mark.parametrize("better", [{"hop": 50e-6}, {"bandwidth": 4e9}, {"handover": 0.0}])
def test_a_better_link_is_nowhere_slower(plans, better):
    old = Link("old", hop=100e-6, bandwidth=1e9, handover=100e-6)
    for plan in plans[2] + plans[4]:
        predictor = Predictor(plan, MAC)
        new = replace(old, **better)
        assert predictor.prefill(4096, 512, new).seconds < predictor.prefill(4096, 512, old).seconds
        assert predictor.decode(512, new).seconds <= predictor.decode(512, old).seconds


def test_longer_contexts_take_longer(plans):
    seconds = [Predictor(plans[2][0], MAC).decode(n, FREE).seconds for n in (1, 512, 2048, 2049, 10_000, 100_000)]
    assert seconds == sorted(set(seconds))


def run(capsys, *flags) -> dict:
    assert cli.main(["plan", "--predict", "--bits", "4", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def chosen(found: dict) -> dict:
    return {(p["world"], p["link"]): p for p in found["predictions"] if p["chosen"]}


def test_attention_is_replicated_over_slow_links_and_shared_over_fast_ones(capsys):
    found = run(capsys)
    best = chosen(found)
    assert best.keys() == {(1, None), *((world, link) for world in (2, 4, 8) for link in LINKS)}
    assert best[2, "ethernet-ring"]["attention"] == best[2, "thunderbolt-ring"]["attention"] == "replicated"
    assert best[2, "jaccl-fast-synch"]["attention"] == best[4, "jaccl-fast-synch"]["attention"] == "heads"
    for p in found["predictions"]:
        faster = best[p["world"], p["link"]]
        assert sum(s["seconds"] for s in faster["decode"]) <= sum(s["seconds"] for s in p["decode"])


def test_a_cut_that_fits_is_taken_before_a_faster_one(capsys):
    flags = ("--world", "2", "--link", "ethernet-ring")
    [p] = chosen(run(capsys, *flags, "--memory", "123")).values()
    assert (p["attention"], p["fits"]) == ("heads", True)  # 111.7 GiB and 10 reserved, against 113.4
    [p] = chosen(run(capsys, *flags, "--memory", "100")).values()
    assert (p["attention"], p["fits"]) == ("replicated", False)


def test_more_ranks_than_heads_leave_one_plan(m3):
    few = replace(m3, config=replace(m3.config, num_attention_heads=8))
    assert [plan.attention for plan in possible_plans(few, 12, "columns")] == ["replicated"]


# ---------------------------------------------------------------------------------------------------------------------
# Where the values are from


@pytest.mark.parametrize("name", MACS)
def test_every_mac_has_a_source_and_can_be_predicted(capsys, name):
    mac = MACS[name]
    assert "apple.com" in mac.source and "cores at" in mac.source
    found = run(capsys, "--mac", name, "--world", "4")
    assert found["machine"]["bandwidth"] < mac.bandwidth * 1e9 and found["machine"]["flops"] < mac.tflops * 1e12
    assert found["machine"]["sources"].keys() == {*READS, *COMPUTES, "launch"}
    rdma = {link["name"] for link in found["links"]} & {"jaccl", "jaccl-fast-synch"}
    assert bool(rdma) == bool(mac.rdma_ports)


@pytest.mark.parametrize("name", LINKS)
def test_every_value_of_a_link_has_a_source(name):
    link = LINKS[name]
    values = {f.name for f in fields(link) if isinstance(getattr(link, f.name), float) and getattr(link, f.name)}
    assert values == link.sources.keys() and all(link.sources.values())


def test_published_speeds_have_sources(capsys):
    assert all(p.source and p.speeds and set(p.speeds) <= {1, 2, 4} for p in PUBLISHED_SPEEDS)
    assert cli.main(["plan", "--predict", "--world", "2"]) == 0
    out = capsys.readouterr().out
    assert out.index("Assumed:") < out.index("Published by others")
    assert all(p.source in out for p in PUBLISHED_SPEEDS)


@pytest.mark.parametrize(
    ("flags", "holder", "field", "value"),
    [
        (["--bandwidth", "500"], "machine", "bandwidth", 500e9),
        (["--bandwidth", "600"], "machine", "selected_bandwidth", 200e9),
        (["--flops", "20"], "machine", "expert_flops", 20e12),
        (["--flops", "20"], "machine", "flops", 20e12),
        (["--launch", "4"], "machine", "launch", 4e-6),
        (["--link", "jaccl", "--latency", "30"], "link", "exchange", 30e-6),
        (["--link", "ethernet-ring", "--latency", "30"], "link", "hop", 15e-6),
        (["--link", "jaccl", "--latency", "30"], "link", "handover", 0.0),
        (["--link", "jaccl", "--link-bandwidth", "5"], "link", "bandwidth", 5e9),
    ],
)
def test_a_flag_replaces_one_value_and_says_so(capsys, flags, holder, field, value):
    found = run(capsys, *flags, "--world", "2")
    values = found["machine"] if holder == "machine" else found["links"][0]
    assert values[field] == pytest.approx(value)
    assert values["sources"][field] == flags[-2]
    assert any(flags[-2] in line for line in found["assumptions"])


def test_a_latency_given_is_that_of_two_ranks(capsys):
    for link in ("jaccl", "thunderbolt-ring"):
        [p] = chosen(run(capsys, "--link", link, "--latency", "100", "--world", "2")).values()
        sums = {"heads": 122, "replicated": 62}[p["attention"]]
        assert p["decode"][0]["link_seconds"] == pytest.approx(sums * 100e-6)


def test_contexts_and_prompts_asked_for(capsys):
    found = run(capsys, "--context", "4096", "--prompt-tokens", "1000", "--prefill-chunk", "1000", "--world", "1")
    [p] = found["predictions"]
    assert [step["context"] for step in p["decode"]] == [4096] and p["prefill"]["prompt"] == 1000
    assert p["link"] is None and p["decode"][0]["link_seconds"] == 0
    one = p["prefill"]
    parts = ("memory", "compute", "launch", "link", "host")
    assert one["seconds"] == pytest.approx(sum(one[f"{part}_seconds"] for part in parts))
    assert one["tokens_per_second"] == pytest.approx(1000 / one["seconds"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mac", "m3-ultra"], "--mac: needs --predict"),
        (["--link-bandwidth", "3"], "--link-bandwidth: needs --predict"),
        (["--predict", "--latency", "3"], "--latency: needs --link"),
        (["--predict", "--machines", "512,256"], "--machines: not allowed with --predict"),
        (["--predict", "--attention", "replicated"], "--attention: not allowed with --predict"),
        (["--predict", "--from-bench", "f", "--mac", "m3-max"], "--mac: not allowed with --from-bench"),
        (["--predict", "--link", "jaccl", "--mac", "m2-ultra"], "m2-ultra has no Thunderbolt 5"),
        (["--predict", "--context", "1048577"], "--context: the model takes at most 1048576"),
        (["--predict", "--prompt-tokens", "1048577"], "--prompt-tokens: the model takes at most 1048576"),
        (["--predict", "--from-bench", "no/such/file"], "--from-bench: [Errno 2]"),
    ],
)
def test_bad_requests_are_named(capsys, flags, message):
    try:
        assert cli.main(["plan", *flags]) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# From a bench


@pytest.fixture
def bench(m3):
    """What m3dist bench --json ends with, as far as predictions read it: shapes and names, no measurement."""
    config = json.loads((inventory_path()).read_text())
    machine = {
        "memory_bandwidth": 400e9,
        "matmul_flops": 10e12,
        "launch_seconds": 3e-6,
        "sum_latency": 60e-6,
        "sum_bandwidth": 2e9,
    }
    return {
        "device": "a device",
        "backend": "ring",
        "world": 4,
        "model": "MiniMaxAI/MiniMax-M3, random",
        "dtype": "BF16",
        "random": "4bit",
        "cut": {"experts": "columns", "attention": "heads", "weights": [1.0] * 4},
        "config": config,
        "prefill_chunk": 512,
        "machine": machine,
        "decode": [{"context": 512, "ours": {"seconds": 1.0}, "split": {"host_seconds": 60e-6}}],
        "prefill": [{"prompt": 512, "depth": 4096, "ours": {"seconds": 1.0}}],
    }


def inventory_path():
    from m3dist.plan_report import PUBLISHED

    return PUBLISHED / "MiniMax-M3.json"


def test_a_benchs_machine_and_link(bench):
    machine, link = machine_of(bench, "b.json"), link_of(bench, "b.json")
    assert (machine.bandwidth, machine.flops, machine.launch) == (400e9, 10e12, 3e-6)
    assert machine.host == pytest.approx(1e-6) and machine_of(bench | {"decode": []}, "b.json").host == 0
    assert "b.json" in machine.sources["launch"]
    assert link.latency(4) == pytest.approx(60e-6) and link.latency(2) == pytest.approx(20e-6)
    assert link.seconds(4, 2e9) == pytest.approx(60e-6 + 1.0)
    nccl = link_of(bench | {"backend": "nccl"}, "b.json")
    assert nccl.latency(4) == nccl.latency(2) == 60e-6
    assert link_of(bench | {"world": 1}, "b.json") is None


def test_what_a_bench_did_not_measure_is_taken_from_what_is_like_it(bench):
    """Benches of older versions: less and less is missing. The source says what it was taken from."""

    def check(measured: dict, **names: str) -> None:
        machine = machine_of(bench | {"machine": bench["machine"] | measured}, "b.json")
        figures = bench["machine"] | measured
        for field, name in names.items():
            assert getattr(machine, field) == figures[name]
            assert machine.sources[field] == f"{name} measured, b.json"
        assert machine.unpack_bandwidth == measured.get("unpack_bandwidth")

    check({}, **dict.fromkeys(READS, "memory_bandwidth"), **dict.fromkeys(COMPUTES, "matmul_flops"))
    first = {"matvec_bandwidth": 300e9, "attention_flops": 9e12}
    check(first, bandwidth="matvec_bandwidth", attention_bandwidth="memory_bandwidth", index_flops="attention_flops")
    rest = {"expert_flops": 8e12, "attention_bandwidth": 200e9, "index_flops": 7e12, "selected_bandwidth": 100e9}
    check(first | rest, **{field: field for field in rest})
    check(first | rest | {"index_flops": None, "selected_bandwidth": None}, selected_bandwidth="attention_bandwidth")
    check(first | rest | {"unpack_bandwidth": 50e9}, unpack_bandwidth="unpack_bandwidth")


def test_python_at_both_sides_of_the_budget(bench):
    def hosts(*rows: tuple[int, float]) -> tuple[float, float]:
        decode = [{"context": n, "split": {"host_seconds": seconds}} for n, seconds in rows]
        machine = machine_of(bench | {"decode": [*decode, {"context": 3000}]}, "b.json")
        return machine.host, machine.host_selection

    assert hosts((512, 60e-6)) == pytest.approx((1e-6, 0))
    assert hosts((BUDGET, 60e-6), (BUDGET + 1, 117e-6)) == pytest.approx((1e-6, 1e-6))
    assert hosts((512, 60e-6), (16384, 50e-6)) == pytest.approx((1e-6, 0))
    assert hosts((16384, 120e-6)) == pytest.approx((2e-6, 0))


@pytest.mark.parametrize("random", RANDOM)
def test_a_benchs_own_figures_are_predicted_and_compared(bench, random):
    bench["random"] = random
    decode, prefill = compare(bench, "b.json")
    bits = {"bf16": None, "f32": None}.get(random, random)
    if random == "4bit":
        plan = make_plan(inventory_of("MiniMaxAI/MiniMax-M3", None, 4, None)[0], 4)
        predictor = Predictor(plan, machine_of(bench, ""))
        assert decode.predicted == predictor.decode(512, link_of(bench, "")).seconds
        assert prefill.predicted == predictor.prefill(512, 512, link_of(bench, ""), before=4096).seconds
    assert bits is None or decode.predicted < compare(bench | {"random": "bf16"}, "")[0].predicted
    assert (decode.what, decode.measured, decode.ratio) == ("decode at 512", 1.0, decode.predicted)
    assert prefill.what == "prefill of 512 at 4096"


def test_predictions_from_a_benchs_file(bench, tmp_path, capsys):
    file = tmp_path / "bench.txt"
    file.write_text(f"tables for people\n\n{json.dumps(bench)}\n")
    assert read_bench(str(file)) == bench
    found = run(capsys, "--from-bench", str(file), "--flops", "5", "--world", "4")
    assert (found["machine"]["bandwidth"], found["machine"]["flops"]) == (400e9, 5e12)
    assert [link["name"] for link in found["links"]] == ["ring"]
    assert [check["what"] for check in found["bench"]] == ["decode at 512", "prefill of 512 at 4096"]
    assert cli.main(["plan", "--predict", "--from-bench", str(file), "--link", "jaccl", "--world", "2"]) == 0
    out = capsys.readouterr().out
    assert "The bench's own model" in out and "jaccl" in out and f"measured, {file}" in out


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "{}", '{"machine": null}', '{"machine": {}}'])
def test_a_file_that_is_no_bench(tmp_path, capsys, text):
    file = tmp_path / "other.txt"
    file.write_text(text)
    assert cli.main(["plan", "--predict", "--from-bench", str(file)]) == 2
    assert f"--from-bench: {file}" in capsys.readouterr().err
