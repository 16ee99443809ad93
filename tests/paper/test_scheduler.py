"""The engine's plans, carried out by a device that knows no model: each request gets the answer it would get alone."""

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduled import VOCABULARY, Simulation, answer

from m3dist.engine import scheduler as scheduling
from m3dist.engine.control import LONGEST
from m3dist.engine.pages import Pages
from m3dist.engine.request import Request, RequestError
from m3dist.engine.scheduler import Ended, Opening, Piece, Scheduler, Step
from m3dist.sampling import Sampling

SIZE = 4
TOKENS = st.integers(0, VOCABULARY - 1)


def simulation(count: int = 100, rows: int = 8, chunk: int = 64, busy_chunk: int = 16, context: int = 10**6):
    return Simulation(count, SIZE, rows, chunk, busy_chunk, context)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(VOCABULARY) for _ in range(length))


def asks(id: int, length: int, client: str = "a", max_tokens: int = 8, **more) -> Request:
    """A request whose prompt is like no other's."""
    return Request(id, client, prompt(id, length), max_tokens=max_tokens, **more)


def prefilled(simulation: Simulation) -> int:
    """Tokens of prompts computed so far."""
    return sum(len(piece.tokens) for step in simulation.steps for piece in step.prefill)


class Serving(RuleBasedStateMachine):
    """Requests come, go on from others' texts, are cancelled, at any time."""

    @initialize(
        count=st.integers(3, 24),
        size=st.integers(1, 5),
        rows=st.integers(1, 6),
        chunk=st.integers(1, 40),
        busy_chunk=st.integers(1, 20),
        context=st.integers(2, 60),
    )
    def begin(self, count, size, rows, chunk, busy_chunk, context):
        self.simulation = Simulation(count, size, rows, chunk, busy_chunk, context)
        self.count = 0

    @rule(
        data=st.data(),
        fresh=st.lists(TOKENS, max_size=12),
        client=st.sampled_from("abc"),
        max_tokens=st.integers(1, 30),
        stop_ids=st.frozensets(TOKENS, max_size=1),
        replayed=st.booleans(),
        sampling=st.sampled_from([Sampling(), Sampling(repetition_penalty=1.1), Sampling(presence_penalty=1.0)]),
        grammar=st.sampled_from([None, "start: /.*/"]),
    )
    def submit(self, data, fresh, client, max_tokens, stop_ids, replayed, sampling, grammar):
        """A prompt is part of a text there is, and something new."""
        context = self.simulation.scheduler.context
        text = data.draw(st.sampled_from([[1] * 30, *self.simulation.known.values()]), "text")
        part = text[: data.draw(st.integers(0, len(text)), "part")]
        ids = tuple([*part, *fresh][: context - 1]) or (0,)
        if len(ids) >= context:
            return
        request = Request(self.count, client, ids, (), max_tokens, tuple(stop_ids), sampling, grammar)
        if replayed:
            emitted, _ = answer(request, context)
            emitted = emitted[: data.draw(st.integers(0, len(emitted)), "emitted")]
            request = Request(self.count, client, ids, tuple(emitted), max_tokens, tuple(stop_ids), sampling, grammar)
        self.simulation.submit(request)
        self.count += 1

    @rule(turns=st.integers(1, 12), ahead=st.sampled_from([1, 1, 0, 2, 3]))
    def compute(self, turns, ahead):
        for _ in range(turns):
            self.simulation.turn(ahead)

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def cancel(self, data):
        self.simulation.cancel(data.draw(st.integers(0, self.count - 1), "id"))

    @invariant()
    def what_is_cached_is_right(self):
        if hasattr(self, "simulation"):
            self.simulation.check_cache()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.finish()


Serving.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


@pytest.mark.parametrize("seed", range(40))
def test_many_requests_and_little_memory(seed):
    """As above, with more at a time than a shrinking search gets to."""
    chance = random.Random(seed)
    sim = Simulation(chance.randint(8, 40), chance.randint(1, 5), chance.randint(2, 8), 40, 20)
    context = sim.scheduler.context
    for id in range(40):
        for _ in range(chance.choice([0, 0, 1, 5])):
            sim.turn(ahead=chance.choice([1, 1, 3]))
        text = chance.choice([prompt(99, 50), *sim.known.values()])
        ids = (*text[: chance.randint(0, len(text))], *prompt(id, chance.randint(1, 4)))[-(context - 1) :]
        stop_ids = tuple(chance.sample(range(VOCABULARY), chance.randint(0, 1)))
        sim.submit(Request(id, chance.choice("abc"), ids, (), chance.randint(1, 30), stop_ids))
        if chance.random() < 0.1:
            sim.cancel(chance.randint(0, id))
    sim.finish()


# ---------------------------------------------------------------------------------------------------------------------
# How answers end


def test_an_end_by_length_is_foreseen():
    sim = simulation()
    sim.submit(asks(0, 5, max_tokens=3))
    sim.finish()
    assert [step.sampled for step in sim.steps] == [(0,)] * 3


def test_an_end_by_a_stop_id_is_known_one_step_late():
    request = asks(0, 5, max_tokens=30)
    tokens, _ = answer(request, 1000)
    stopping = asks(0, 5, max_tokens=30, stop_ids=(tokens[3],))
    expected = tokens[: tokens.index(tokens[3])]
    sim = simulation()
    sim.submit(stopping)
    sim.finish()
    assert sim.answers[0] == expected and sim.ends[0] == "stop"
    assert len(sim.steps) == len(expected) + 2  # the stop token's own, and the one under way by then


def test_an_answer_ends_where_the_context_does():
    sim = simulation(context=10)
    sim.submit(asks(0, 7, max_tokens=100))
    sim.finish()
    assert len(sim.answers[0]) == 3 and sim.ends[0] == "length"


def test_the_context_is_never_more_than_memory_holds():
    assert simulation(count=6, context=1000).scheduler.context == 5 * SIZE


def test_a_request_that_was_done_when_the_ranks_fell_ends_at_once():
    sim = simulation()
    sim.submit(asks(0, 5, max_tokens=2, emitted=(1, 2)))
    assert sim.scheduler.plan() is None
    assert sim.scheduler.drain_events() == [Ended(0, "length")]
    assert sim.scheduler.drain_events() == []


def test_what_cannot_be_computed_is_refused():
    scheduler = simulation(context=10).scheduler
    scheduler.submit(asks(0, 9))
    with pytest.raises(RequestError, match="^prompt: 10 tokens of a context of 10"):
        scheduler.submit(asks(1, 10))
    with pytest.raises(RequestError, match="^id: 0 "):
        scheduler.submit(asks(0, 3))


def test_steps_are_taken_in_their_order():
    scheduler = simulation().scheduler
    scheduler.submit(asks(0, 3))
    first, second = scheduler.plan(), scheduler.plan()
    assert first and second
    with pytest.raises(ValueError, match="in the order"):
        scheduler.took(second, {0: 1})
    scheduler.took(first, {0: 1})
    scheduler.took(second, {0: 1})
    with pytest.raises(ValueError, match="in the order"):
        scheduler.took(second, {0: 1})


def test_nobody_hears_of_a_cancelled_request():
    sim = simulation()
    sim.submit(asks(0, 3, max_tokens=30))
    sim.submit(asks(1, 3, max_tokens=30))
    for _ in range(4):
        sim.turn()
    heard = len(sim.answers[0])
    sim.cancel(0)
    step = sim.scheduler.plan()
    assert step and step.close == (0,) and step.decode == (1,)
    sim.planned(step)
    sim.finish()
    assert len(sim.answers[0]) == heard
    sim.cancel(0)  # long gone
    sim.cancel(17)


def test_what_a_cancelled_prompt_had_not_reached_is_not_in_the_cache():
    sim = simulation(chunk=16)
    sim.submit(Request(0, "a", prompt(5, 60)))
    sim.turn()
    sim.cancel(0)
    sim.submit(Request(1, "a", prompt(5, 60), max_tokens=3))
    sim.finish()
    assert sim.cached == {0: 0, 1: 16}


# ---------------------------------------------------------------------------------------------------------------------
# Shared prefixes


def test_a_second_turn_computes_only_what_is_new():
    sim = simulation()
    sim.submit(asks(0, 40, max_tokens=12))
    sim.finish()
    before = prefilled(sim)
    sim.submit(Request(1, "a", (*sim.known[0], 1, 2, 3), max_tokens=4))
    sim.finish()
    assert sim.cached[1] == 48  # of 52 tokens in the cache the last was never computed
    assert prefilled(sim) - before == 7


def test_the_stop_token_is_part_of_the_next_turn():
    """A chat's next prompt has the token that ended the answer before; it was computed by the step under way then."""
    for length in range(5, 20):
        tokens, _ = answer(asks(0, length, max_tokens=30), 1000)
        end = max(n for n, token in enumerate(tokens) if token not in tokens[:n])
        if (length + end + 1) % SIZE == 0:  # the stop token fills a page
            break
    sim = simulation()
    sim.submit(asks(0, length, max_tokens=30, stop_ids=(tokens[end],)))
    sim.finish()
    assert sim.ends[0] == "stop"
    sim.submit(Request(1, "a", (*sim.known[0], tokens[end], 1), max_tokens=1))
    sim.finish()
    assert sim.cached[1] == length + end + 1


def test_the_last_token_of_a_prompt_is_computed_in_any_case():
    sim = simulation()
    for id in range(2):
        sim.submit(Request(id, "a", prompt(5, 16), max_tokens=1))
        sim.finish()
    assert sim.cached == {0: 0, 1: 12}


def test_several_answers_to_one_prompt_compute_it_once():
    sim = simulation(chunk=16)
    for id in range(4):
        sim.submit(Request(id, "a", prompt(5, 41), max_tokens=4))
    sim.finish()
    assert prefilled(sim) == 41 + 3
    assert sim.scheduler.stats()["prefix"] == {"hits": 3 * 40, "misses": 41 + 3}


def test_who_waits_for_anothers_prefix_keeps_nobody_else_waiting():
    sim = simulation(chunk=16)
    sim.submit(Request(0, "a", prompt(5, 100), max_tokens=2))
    sim.turn()
    sim.submit(Request(1, "b", prompt(5, 100), max_tokens=2))
    sim.submit(Request(2, "c", prompt(6, 10), max_tokens=2))
    sim.finish()
    assert sim.started == [0, 2, 1] and sim.cached[1] == 96


# ---------------------------------------------------------------------------------------------------------------------
# Who is next


def test_clients_take_turns():
    sim = simulation(rows=1)
    for id in range(4):
        sim.submit(asks(id, 3, client="a", max_tokens=2))
    sim.submit(asks(10, 3, client="b", max_tokens=2))
    sim.submit(asks(11, 3, client="b", max_tokens=2))
    sim.submit(asks(20, 3, client="c", max_tokens=2))
    sim.finish()
    assert sim.started == [0, 10, 20, 1, 11, 2, 3]


def test_rows_go_to_who_has_fewer():
    """However many requests a client has, and however long their answers: the others' come to as many rows."""
    sim = simulation(rows=4)
    for id in range(8):
        sim.submit(asks(id, 3, client="a", max_tokens=10 * (id + 1)))
    sim.turn()
    for id in (10, 11, 12):
        sim.submit(asks(id, 3, client="b", max_tokens=60))
    sim.finish()
    assert sim.started[:8] == [0, 1, 2, 3, 10, 11, 4, 5]  # the third of four rows that end leaves two to each
    alone = simulation(rows=4)
    for id in range(4):
        alone.submit(asks(id, 3, client="a"))
    alone.turn()
    assert len(alone.steps[0].open) == 4  # nobody else waits


def test_the_last_free_row_is_kept_for_who_has_none():
    sim = simulation(rows=2, chunk=16)
    sim.submit(asks(0, 3, client="a", max_tokens=50))
    sim.turn()
    sim.submit(asks(1, 3, client="a"))
    sim.submit(asks(10, 20, client="b"))
    sim.finish()
    assert sim.started == [0, 10, 1]


def test_a_short_prompt_does_not_wait_for_anothers_long_one():
    sim = simulation(chunk=16)
    sim.submit(asks(0, 200, client="a"))
    sim.turn()
    sim.submit(asks(1, 5, client="b"))
    sim.turn()
    sim.turn()
    assert [[piece.row for piece in step.prefill] for step in sim.steps] == [[0], [0], [1]]
    sim.finish()


def test_a_long_prompt_does_not_hold_up_running_rows():
    sim = simulation()
    sim.submit(asks(0, 3, max_tokens=40))
    sim.turn()
    sim.submit(asks(1, 200, client="b"))
    for _ in range(10):
        sim.turn()
    assert all(step.decode == (0,) and len(step.prefill[0].tokens) == 16 for step in sim.steps[1:11])
    sim.finish()


def test_short_prompts_are_computed_together():
    sim = simulation(chunk=64)
    for id in range(8):
        sim.submit(asks(id, 8, client=str(id % 2)))
    sim.turn()
    assert sorted(piece.row for piece in sim.steps[0].prefill) == list(range(8))
    sim.finish()


def test_unequal_prompts_are_not_padded_to_the_longest():
    sim = simulation(chunk=1000)
    for id, length in enumerate([2, 2, 2, 300]):
        sim.submit(asks(id, length, client=str(id)))
    sim.turn()
    sim.turn()
    assert [[len(piece.tokens) for piece in step.prefill] for step in sim.steps] == [[2, 2, 2], [16]]
    sim.finish()


def test_small_requests_do_not_starve_a_large_one():
    sim = simulation(count=21, rows=8)
    sim.submit(asks(0, 40, max_tokens=20))
    sim.turn()
    sim.submit(asks(1, 60, client="b", max_tokens=4))
    for id in range(2, 30):
        sim.submit(asks(id, 4, client="c", max_tokens=4))
        sim.turn()
    sim.finish()
    assert sim.started[:2] == [0, 1]


def test_a_cancelled_large_request_keeps_nobody_waiting():
    sim = simulation(count=21, rows=8)
    sim.submit(asks(0, 40, max_tokens=20))
    sim.turn()
    sim.submit(asks(1, 60, client="b"))
    sim.submit(asks(2, 4, client="c"))
    sim.turn()
    assert sim.started == [0] and not sim.steps[-1].prefill
    sim.cancel(1)
    sim.turn()
    assert [piece.row for piece in sim.steps[-1].prefill] == [2]
    sim.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("client", "bc")
def test_the_row_admitted_last_gives_its_pages_away_and_is_the_first_to_come_back(client):
    sim = simulation(count=11)
    sim.submit(asks(0, 8, max_tokens=24))
    sim.submit(asks(1, 8, client="b", max_tokens=16))
    for _ in range(3):
        sim.turn()
    sim.submit(asks(2, 8, client=client, max_tokens=4))
    sim.finish()
    assert sim.started == [0, 1, 1, 2]
    assert sim.cached[1] == 0


def test_a_row_that_comes_back_finds_what_is_left_of_its_pages():
    sim = simulation(count=11)
    sim.submit(asks(0, 8, max_tokens=24))
    sim.submit(asks(1, 8, client="b", max_tokens=16))
    sim.finish()
    assert sim.started == [0, 1, 1]
    assert sim.scheduler.stats()["prefix"]["hits"] > 0


def test_a_row_that_gave_its_pages_away_comes_back_once_its_token_is_known():
    sim = simulation(count=11)
    sim.submit(asks(0, 8, max_tokens=24))
    sim.submit(asks(1, 8, client="b", max_tokens=16))
    while not any(1 in step.close for step in sim.steps):
        sim.turn(ahead=2)
    sim.cancel(0)
    assert sim.scheduler.plan() is None  # there is room, but what the row goes on from is under way
    sim.finish()
    assert sim.started == [0, 1, 1]


def test_a_request_is_admitted_only_with_a_page_to_spare_for_each_row():
    sim = simulation(count=9)
    sim.submit(asks(0, 8, max_tokens=8))
    sim.submit(asks(1, 12, max_tokens=8))  # 3 pages and one more, and one for the first row: 5 of 6
    sim.submit(asks(2, 4, max_tokens=8))
    sim.turn()
    assert sim.scheduler.stats() == {
        "running": 2,
        "waiting": 1,
        "pages": {"total": 8, "used": 5, "cached": 5},
        "prefix": {"hits": 0, "misses": 20},
        "steps": 1,
    }
    sim.finish()


def test_a_row_alone_gets_all_of_memory():
    sim = simulation(count=6)
    sim.submit(asks(0, 19, max_tokens=10))
    sim.submit(asks(1, 1, max_tokens=19))
    sim.finish()
    assert [len(sim.answers[id]) for id in (0, 1)] == [1, 19]


# ---------------------------------------------------------------------------------------------------------------------
# Steps as messages, and what planning costs


def test_a_step_as_json_is_small():
    step = Step(
        close=(4,),
        open=(Opening(5, Sampling(), (1, 2), (), True),),
        pages={5: (7, 8)},
        prefill=(Piece(5, 0, (1, 2), True),),
        decode=(1, 2),
        counts={1: 30, 2: 31, 5: 0},
    )
    assert step.sampled == (5, 1, 2)
    assert step.to_json() == [
        (4,), [(5, {}, (1, 2), (), True)], [(5, (7, 8))], [(5, 0, (1, 2), True)], (1, 2), [0, 30, 31]
    ]  # fmt: skip


@pytest.mark.parametrize(("length", "waiting"), [(100, 300), (5_000, 3)])
def test_planning_costs_little(length, waiting):
    """Well below a step of the smallest model, whatever the rows' lengths and however many wait. (20 us on an idle
    core of 2020; the limit allows for a busy one.)"""
    scheduler = Scheduler(Pages(5_000, 128), rows=32, chunk=2048, busy_chunk=512, context=100_000)
    for id in range(32 + waiting):
        scheduler.submit(Request(id, str(id), prompt(id, length), max_tokens=2_000))
    steps, costs = [], []
    while len(costs) < 100:
        start = time.perf_counter()
        steps.append(scheduler.plan())
        if len(steps[-1].decode) == 32:
            costs.append(time.perf_counter() - start)
        if len(steps) > 1:
            scheduler.took(steps[-2], dict.fromkeys(steps[-2].sampled, 0))
    assert sorted(costs)[len(costs) // 2] < 200e-6


def test_a_long_prompt_is_planned_in_the_time_of_its_pieces():
    """A million tokens, 2,048 a step: no step looks at all of them again."""
    scheduler = Scheduler(Pages(10_000, 128), rows=32, chunk=2048, busy_chunk=512, context=2_000_000)
    scheduler.submit(Request(0, "a", (1, 2, 3, 4) * 250_000, max_tokens=2))
    scheduler.plan()
    start = time.perf_counter()
    steps = 1
    while scheduler.plan():
        steps += 1
    assert steps == 489 + 1
    assert time.perf_counter() - start < 0.5


def test_a_step_that_opens_rows_is_no_longer_than_a_message_may_be(monkeypatch):
    """Answers to one prompt open together once its pages are there, each with what its penalty counts of the prompt."""
    assert 30 * scheduling.OPENED + 2**24 < LONGEST  # bytes of a value; what one row may add beyond
    monkeypatch.setattr(scheduling, "OPENED", 250)
    sim = simulation(count=300, rows=8, chunk=1200)
    for id in range(8):
        sampling = Sampling(repetition_penalty=1.1, logit_bias={token: 1.0 for token in range(93)})
        sim.submit(Request(id, "a", prompt(5, 1000), (), 4, sampling=sampling))
    sim.finish()
    openings = [step.open for step in sim.steps if step.open]
    assert [len(opened) for opened in openings] == [1, 3, 3, 1]  # of 100 values each
    assert all(opening.seen_prompt == tuple(range(VOCABULARY)) for opened in openings for opening in opened)
