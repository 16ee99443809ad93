"""Pages against LayerCache: the same numbers, whatever pages the rows have and wherever they stand."""

import mlx.core as mx
import numpy as np
import pytest
from memory import peak
from small_random import SMALL, build, plan_of

from m3dist.bench.subject import random_inventory
from m3dist.comm import Comm
from m3dist.model import Model, cpu, decode, positions
from m3dist.options import BenchOptions
from m3dist.paged import PagePool
from m3dist.plan import make_plan

PAGE, BUDGET = SMALL["sparse_block_size"], SMALL["sparse_block_size"] * SMALL["sparse_topk_blocks"]
TINY = dict(
    hidden_size=64, head_dim=32, rotary_dim=16, sparse_index_dim=32, intermediate_size=96, dense_intermediate_size=96,
    shared_intermediate_size=96, num_local_experts=8, moe_layer_freq="001", sparse_attention_freq="011",
)  # fmt: skip


def model_of(rank: int = 0, world: int = 1, **changes) -> Model:
    """A dense and two sparse layers, the last with experts; a rank of several computes its part, and sums nothing."""
    plan = plan_of("f32", world=world, layers=3, **TINY | changes)
    model, comm = Model(plan.inventory.config), Comm()
    comm.rank = rank
    model.hold(plan, comm, build(plan, rank))
    return model


MODEL = model_of()


class Rows:
    """Random rows in pages in random order, and in a LayerCache."""

    def __init__(self, model: Model, lengths: list[int], room: int = 40, shared: int = 0, seed: int = 1):
        """lengths: each row's first tokens; `shared` pages of the first row begin all rows."""
        self.model, self.random = model, np.random.default_rng(seed)
        self.lengths, self.cache = [0] * len(lengths), model.make_cache()
        pages = -(-(max(lengths) + room) // PAGE)
        self.pool = PagePool(model, PAGE, 2 + len(lengths) * pages)
        free = 1 + self.random.permutation(len(lengths) * pages)
        self.tables = [free[row * pages : (row + 1) * pages].tolist() for row in range(len(lengths))]
        for table in self.tables:
            table[:shared] = self.tables[0][:shared]
        text = model.language_model.model  # a rank embeds the tokens of its own rows
        self.tokens = text.first_row + self.random.integers(
            0, len(text.embed_tokens.weight), (len(lengths), pages * PAGE)
        )
        self.tokens[:, : shared * PAGE] = self.tokens[0, : shared * PAGE]

    def both(self, counts: list[int], beyond: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Each row's next counts[r] tokens, the input `beyond` longer than the longest, through both caches."""
        longest = max(counts) + beyond
        taken = [row[n : n + count].tolist() for row, n, count in zip(self.tokens, self.lengths, counts, strict=True)]
        tokens = mx.array([[*row, *[0] * (longest - len(row))] for row in taken])
        wanted = self.model.hidden(tokens, self.cache, counts)
        found = self.model.hidden(tokens, self.pool.view(self.tables, self.lengths, longest, counts))
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return tuple(
            np.concatenate([np.array(row[:n].astype(mx.float32)) for row, n in zip(x, counts, strict=True)])
            for x in (found, wanted)
        )

    def step(self, counts: list[int] | None = None, beyond: int = 0, limit: float = 1e-5) -> None:
        found, wanted = self.both(counts or [1] * len(self.lengths), beyond)
        assert np.abs(found - wanted).max() < limit * np.abs(wanted).max()


LENGTHS = [
    [5],
    [BUDGET - 2],
    [3 * BUDGET - 2],
    [7, PAGE * 2 - 2, 1],
    [BUDGET - 3, BUDGET - 2],
    [2 * BUDGET, 3, BUDGET - 1, BUDGET - PAGE, 5 * BUDGET + 7],
    [2 * BUDGET + 3] * 3,
    [2 * BUDGET + 3, BUDGET + 3],
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_same_numbers_as_in_a_cache_of_its_own(lengths):
    """A prompt, then single tokens across the ends of pages, and for some rows across the budget."""
    rows = Rows(MODEL, lengths)
    rows.step(lengths)
    for _ in range(4):
        rows.step()


def test_as_on_a_gpu(monkeypatch):
    """Masks to be added, and scores of more pages than there are: shapes stay as they are for many steps."""
    monkeypatch.setattr(positions, "on_gpu", lambda: True)
    monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
    rows = Rows(MODEL, lengths := [2 * BUDGET + 5, 3, BUDGET - 1])
    rows.step(lengths)
    rows.step()


def test_shapes_on_a_gpu_are_few(monkeypatch):
    """What is traced for every set of shapes sees few, however long rows get and whatever the size of the pool."""
    traced, choose = set(), decode._choose_blocks

    def noting(*arguments: mx.array) -> mx.array:
        traced.add(tuple(x.shape for x in arguments))
        return choose(*arguments)

    monkeypatch.setattr(decode, "_choose_blocks", noting)
    monkeypatch.setattr(positions, "on_gpu", lambda: True)
    monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
    pool, sizes = PagePool(MODEL, PAGE, 1101), set()
    for end in range(40, 1100, 40):
        MODEL.hidden(mx.ones((2, 1), mx.int32), pool.view([range(2, end + 2), [1]], [end * PAGE - 1, 9], 1))
        sizes.add(pool.pages)
    assert len(sizes) > 5 and len(traced) <= 1100 * PAGE // positions.READ_AHEAD + 1
    blocks = [positions._blocks_read(n, 128) for n in range(1, 8193)]  # M3's, of a million tokens
    assert len(set(blocks)) <= 60
    assert all(n <= read < n + max(16, n / 8) for n, read in enumerate(blocks, start=1))


CHANGES = {
    "no sparse layers": dict(sparse_attention_freq="000"),
    "no local block": dict(sparse_local_block=0),
    "first block always": dict(sparse_init_block=1),
    "more blocks always": dict(sparse_init_block=1, sparse_local_block=2),
    "narrower index": dict(sparse_index_dim=16),
    "one KV head": dict(num_key_value_heads=1, sparse_num_index_heads=1),
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", CHANGES)
def test_other_models(name):
    rows = Rows(model_of(**CHANGES[name]), lengths := [2 * BUDGET, 3, BUDGET - 1])
    rows.step(lengths)
    for _ in range(3):
        rows.step()


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_with_uneven_groups(rank):
    """Eight query heads on four KV heads over three ranks: cuts fall inside groups."""
    rows = Rows(model_of(rank, world=3), lengths := [2 * BUDGET, 3, BUDGET - 1])
    rows.step(lengths)
    rows.step()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("changes", [{}, dict(sparse_local_block=0)], ids=str)
def test_rows_of_very_unequal_length_are_read_apart(changes, monkeypatch):
    """By prompts and by single tokens; among them parts below and beyond the budget."""
    monkeypatch.setattr(positions, "WASTED", 40)
    rows = Rows(model_of(**changes), [9, 5 * BUDGET, 1, 3 * BUDGET, BUDGET - 1, 12])
    rows.step([8, 5 * BUDGET - 20, 1, 3 * BUDGET, 20, 12])
    table = rows.pool.view(rows.tables, rows.lengths, 1)[0].table
    assert len(positions.Positions(tuple(rows.lengths), 1).parts(table, slot=1)) > 2
    rows.step([1, 20, 0, 5, BUDGET - 21, 0])
    for _ in range(3):
        rows.step()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [1, 8])
def test_memory_for_rows_that_read_much(tokens, monkeypatch):
    """16 rows after one prompt of 4,000 tokens, 4 MiB of K and V, shared: at no moment is there a copy for each row."""
    pool, shared = PagePool(MODEL, PAGE, 300), 250
    rows = [[*range(1, shared + 1), shared + 1 + row] for row in range(16)]

    def run() -> mx.array:
        return MODEL.hidden(mx.full((16, tokens), 1), pool.view(rows, [shared * PAGE] * 16, tokens))

    wanted = run()  # with room for all at once
    monkeypatch.setattr(positions, "GATHERED", 4 << 20)
    assert mx.allclose(run(), wanted, atol=1e-5)
    assert peak(run) < 32 << 20


def test_shared_pages():
    """Three rows with a common beginning in common pages: the first computes it, the others go on from there."""
    rows = Rows(MODEL, [6 * PAGE] * 3, shared=5)
    start = 5 * PAGE
    rows.both([start] * 3)
    rows.pool = PagePool(MODEL, PAGE, rows.pool.most)  # forget what all three have written
    MODEL.prefill(mx.array(rows.tokens[:1, :start]), rows.pool.view(rows.tables[:1], [0], start))
    rows.step([30, 3, 17])
    for _ in range(3):
        rows.step()


@pytest.mark.parametrize("beyond", [0, 50])
def test_padding_is_written_to_the_scratch_page(beyond):
    rows = Rows(MODEL, [BUDGET, BUDGET, BUDGET])
    rows.step([3, 40, 21], beyond)
    before = [np.array(x).reshape(rows.pool.pages, -1) for x in rows.pool.state]
    rows.step([1, 30, 0], beyond)
    written = {rows.tables[0][0], *rows.tables[1][40 // PAGE : 70 // PAGE + 1], 0}
    for old, new in zip(before, rows.pool.state, strict=True):
        changed = (old != np.array(new).reshape(rows.pool.pages, -1)).any(axis=1)
        assert set(np.flatnonzero(changed).tolist()) == written


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("gpu", [False, True])
def test_a_row_without_finite_numbers_is_alone_with_them(gpu, monkeypatch):
    """Neither the rows beside it see them, though it writes what pads it to the scratch page, nor one that comes after
    it, in its pages."""
    if gpu:  # its masks
        monkeypatch.setattr(positions, "on_gpu", lambda: True)
        monkeypatch.setattr(cpu, "usable", lambda *arrays: False)
    model = model_of()
    embedding = model.language_model.model.embed_tokens
    embedding.weight[0] = mx.inf  # padding is of this token, too
    rows = Rows(model, lengths := [2 * BUDGET + 5, BUDGET + 3, 9])
    rows.tokens[rows.tokens == 0] = 1
    rows.tokens[1, : BUDGET + 4 : 2] = 0
    own = slice(lengths[0], lengths[0] + lengths[1])
    found, wanted = rows.both(lengths)
    assert np.isnan(found[own]).any()
    for _ in range(3):
        found, wanted = (np.delete(x, np.arange(len(x))[own], axis=0) for x in (found, wanted))
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
        own = slice(1, 2)
        found, wanted = rows.both([1, 1, 1])
    after = Rows(model, [BUDGET + 3], seed=2)
    after.tokens[after.tokens == 0] = 1
    after.pool, after.tables = rows.pool, [rows.tables[1]]
    for count in (7, 1, BUDGET - 5, 1):
        after.step([count])


def test_prefill_in_chunks():
    rows = Rows(MODEL, lengths := [3 * BUDGET] * 2)
    tokens = mx.array(rows.tokens[:, : 3 * BUDGET])
    MODEL.prefill(tokens, rows.cache, 50)
    MODEL.prefill(tokens, rows.pool.view(rows.tables, [0, 0], 3 * BUDGET), 50)
    rows.lengths = lengths
    rows.step()


def test_one_step_ahead():
    """The tokens of a step are not computed yet when it is built: as if they had been."""
    rows = Rows(MODEL, lengths := [BUDGET - 2, 2 * BUDGET, 5])
    rows.step(lengths)

    def following(hidden: mx.array) -> mx.array:
        return mx.argmax(MODEL.local_logits(hidden)[:, -1:], axis=-1)

    first = mx.array(rows.tokens[:, :1])
    token, found = first, []
    for number in range(6):
        starts = [n + number for n in lengths]
        token = following(MODEL.hidden(token, rows.pool.view(rows.tables, starts, 1)))
        mx.async_eval(token)
        found.append(token)
    token = first
    for mine in found:
        token = following(MODEL.hidden(token, rows.cache))
        assert mx.array_equal(token, mine)


def test_bfloat16():
    """Pages in bfloat16, index keys in float32."""
    settings = tuple((name, str(value)) for name, value in (SMALL | TINY | dict(moe_layer_freq="000")).items())
    inventory, _ = random_inventory(BenchOptions(random="bf16", layers=3, set=settings), "bfloat16")
    plan = make_plan(inventory, 1)
    model = Model(inventory.config)
    model.hold(plan, Comm(), build(plan))
    rows = Rows(model, lengths := [2 * BUDGET, 3, BUDGET - 1])
    rows.step(lengths, limit=0.02)
    assert {x.dtype for x in rows.pool.state} == {mx.bfloat16, mx.float32}
    for _ in range(3):
        rows.step(limit=0.02)


def test_writes_are_in_place():
    """100 steps, one ahead, in pages of 200 MiB: at no moment is a layer's part of them, 68 MiB, there twice."""
    pool, pages = PagePool(MODEL, PAGE, 4001), list(range(1, 4001))

    def decode(start: int, count: int) -> None:
        token = mx.array([[1]])
        for number in range(start, start + count):
            hidden = MODEL.hidden(token, pool.view([pages], [number], 1))
            token = mx.argmax(MODEL.local_logits(hidden)[:, -1:], axis=-1)
            mx.async_eval(token)
        mx.eval(token)

    decode(4000 * PAGE - 1, 1)
    held = pool.nbytes
    assert held > 200 << 20
    assert peak(lambda: decode(0, 100)) < held // 10
    assert pool.nbytes == held


def test_pool_grows():
    """From few pages to many, with what the rows hold; beyond `most`, an error says so."""
    rows = Rows(MODEL, lengths := [5, 2 * BUDGET])
    rows.tables = [[1, 2, 16], [*range(3, 16), *range(17, 40)]]
    rows.pool = PagePool(MODEL, PAGE, 40)
    rows.step(lengths)
    first = rows.pool.pages
    for count in [PAGE] * 8 + [1] * PAGE:
        rows.step([0, count])
    assert first < rows.pool.pages <= 40
    rows.step()
    with pytest.raises(ValueError, match="page 40 in a pool of 40 pages"):
        rows.pool.view([[40]], [0], 1)


def test_a_table_must_suffice():
    pool = PagePool(MODEL, PAGE, 40)
    with pytest.raises(ValueError, match=r"row 1 has 2 pages, its 30 \+ 3 tokens need 3"):
        pool.view([[1, 2, 3], [4, 5]], [0, 30], 3)


def test_pages_are_blocks():
    with pytest.raises(ValueError, match="pages of 32 tokens; sparse attention needs its blocks' 16"):
        PagePool(MODEL, 32, 40)
