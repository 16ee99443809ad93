"""A rank's steps, run one after the other in this process: what the scheduler may ask for, against the model alone."""

import mlx.core as mx
import pytest

from m3dist.comm import Comm
from m3dist.engine import alone
from m3dist.engine.budget import Budget
from m3dist.engine.program import warm_up_steps
from m3dist.engine.runner import NEVER, Runner
from m3dist.engine.scheduler import Opening, Piece, Step
from m3dist.loader import load
from m3dist.model import Model
from m3dist.paged import PagePool
from m3dist.sampling import Sampling
from m3dist.tiny import PATH

PAGE = 16
GREEDY = Sampling(temperature=0)
PROMPTS = {7: [3, 40, 5, 600, 71] * 30, 8: [9], 9: [300, 12, 900] * 16}  # beyond the block budget; a token; whole pages


@pytest.fixture(scope="module")
def model() -> Model:
    return load(PATH, Comm(), dtype="float32")


@pytest.fixture
def runner(model) -> Runner:
    return Runner(model, PagePool(model, PAGE, 65), 4, 32)


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    return list(alone.generate_tokens(model, alone.Request(prompt, count, 0, 512, [], GREEDY)))


def opening(rows, sampling: Sampling = GREEDY, masked: bool = False) -> dict:
    """Rows with 16 pages each."""
    tables = {row: tuple(range(1 + 16 * place, 17 + 16 * place)) for place, row in enumerate(rows)}
    return {"open": tuple(Opening(row, sampling, masked=masked) for row in rows), "pages": tables}


def step(close=(), open=(), pages=None, prefill=(), decode=(), count=0) -> Step:
    planned = Step(tuple(close), tuple(open), pages or {}, tuple(prefill), tuple(decode), {})
    return Step(**vars(planned) | {"counts": dict.fromkeys(planned.sampled, count)})


def prompts_of(rows) -> tuple[Piece, ...]:
    return tuple(Piece(row, 0, tuple(PROMPTS[row]), True) for row in rows)


def ids(found) -> dict[int, int]:
    return {row: token.id for row, token in found.items()}


@pytest.mark.parametrize("apart", [False, True], ids=["one queue", "sums apart"])
def test_rows_of_any_length_get_what_they_get_alone(model, runner, monkeypatch, apart):
    """Prompts that come together, a step ahead of their tokens; on Macs their chunks are computed in turns."""
    monkeypatch.setattr(model.language_model.model, "apart", apart)
    rows, found = list(PROMPTS), {row: [] for row in PROMPTS}
    under_way = [runner.run(step(**opening(rows), prefill=prompts_of(rows)))]
    for count in range(1, 8):
        under_way.append(runner.run(step(decode=rows, count=count)))
        for row, token in ids(under_way.pop(0).read()).items():
            found[row].append(token)
    for row, prompt in PROMPTS.items():
        assert found[row] == greedy(model, prompt, 7)


def test_a_prompt_in_pieces_beside_a_row_that_decodes(model, runner):
    runner.run(step(**opening([7, 9]), prefill=prompts_of([9])))
    prompt, found = PROMPTS[7], []
    for start in range(0, 150, 40):
        piece = Piece(7, start, tuple(prompt[start : start + 40]), start + 40 >= 150)
        pending = runner.run(step(prefill=[piece], decode=[9]))
        found.append(ids(pending.read()))
    assert [list(tokens) for tokens in found] == [[9], [9], [9], [7, 9]]  # a row samples once its prompt is there
    assert [tokens[9] for tokens in found] == greedy(model, PROMPTS[9], 5)[1:]
    assert found[-1][7] == greedy(model, prompt, 1)[0]


def test_places_and_pages_are_used_again(model, runner):
    for number in range(3):
        rows = [row + 10 * number for row in PROMPTS]
        gone = [row - 10 for row in rows] if number else []
        pieces = [Piece(row, 0, tuple(PROMPTS[row % 10]), True) for row in rows]
        found = ids(runner.run(step(close=gone, **opening(rows), prefill=pieces)).read())
        assert found == {row: greedy(model, PROMPTS[row % 10], 1)[0] for row in rows}
    assert len(runner.rows) == 3


def test_a_masked_row_takes_what_its_mask_allows(model, runner):
    rows = [8, 9]
    begun = runner.forward(
        step(**opening(rows, Sampling(temperature=0, logprobs=20), masked=True), prefill=prompts_of(rows))
    )
    assert runner.waits_for_masks(begun.step)
    mask = bytearray(1024 // 8)
    mask[77 // 8] |= 1 << 77 % 8
    found = runner.sample(begun, {8: bytes(mask)}).read()
    assert found[8].id == 77 and found[9].id == greedy(model, PROMPTS[9], 1)[0]
    assert found[8].logprob == pytest.approx(0, abs=1e-6) and [id for id, _ in found[8].top] == [77]
    assert len(found[9].top) == 20 and all(value > NEVER for _, value in found[9].top)


def test_the_warm_up_leaves_nothing_behind(model):
    for pages, rows, steps in ((65, 32, 4), (3, 32, 4), (2, 32, 4), (65, 1, 4), (1, 32, 0)):
        runner = Runner(model, PagePool(model, PAGE, pages), rows, 32)
        planned = warm_up_steps(Budget(PAGE, pages, 64), rows)
        assert len(planned) == steps
        for warming in planned:
            runner.run(warming).read()
        assert not runner.rows and len(runner._places) == rows


def test_a_long_answer_piles_up_no_work(model, runner):
    """Each step's graph holds that step alone: arrays that nothing evaluates would grow from step to step."""
    runner.run(step(**opening([8], Sampling(temperature=0, frequency_penalty=0.5)), prefill=prompts_of([8]))).read()
    memory = []
    for count in range(1, 120):
        runner.run(step(decode=[8], count=count)).read()
        memory.append(mx.get_active_memory())
    assert max(memory[60:]) <= max(memory[20:60])
