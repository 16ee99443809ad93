"""The ranks of `m3dist serve`, without a gateway: real processes that compute many requests at a time.

What a request gets must not depend on what is computed beside it, so everything is compared with the engine that
computes one prompt alone.
"""

import functools
import json
import signal
import time
from collections.abc import Iterator

import mlx.core as mx
import psutil
import pytest
from gateway_end import Server

from m3dist.comm import Comm
from m3dist.engine import alone
from m3dist.loader import load
from m3dist.model import Model
from m3dist.sampling import Sampling
from m3dist.text import Text
from m3dist.tiny import PATH
from m3dist.tiny.dialogues import held_out

SERVERS = [(1, "ring"), (2, "ring"), pytest.param((4, "mpi"), marks=pytest.mark.mpi)]
# Around a page (16 tokens), the block budget (128) and far beyond it.
LENGTHS = (1, 2, 15, 16, 17, 33, 64, 100, 127, 128, 129, 150, 200, 400)
BOUND = 10.0  # seconds in which a job must end where a part of it is gone


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def server(request) -> Iterator[Server]:
    yield from serving(*request.param)


@pytest.fixture(scope="module")
def single() -> Iterator[Server]:
    """For what only rank 0 has to do with."""
    yield from serving(1, "ring")


def serving(world: int, backend: str) -> Iterator[Server]:
    with Server(world, backend, prefill_chunk=128) as server:
        yield server.wait_until_ready()
        assert set(server.stop()) == {0}, server.said()


@functools.cache
def model() -> Model:
    return load(PATH, Comm(), dtype="float32")


@functools.cache
def text() -> Text:
    return Text.load(PATH)


@functools.cache
def words() -> list[int]:
    return text().encode("\n".join(str(question) for question in held_out(60)))


def prompt(length: int, number: int = 0) -> list[int]:
    """Different ones have no common beginning."""
    return words()[37 * number : 37 * number + length]


@functools.cache
def _greedy(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    request = alone.Request(list(prompt), max_tokens, 0, 128, [], Sampling(temperature=0))
    return list(alone.generate_tokens(model(), request))


def greedy(prompt: list[int], max_tokens: int) -> list[int]:
    """The answer given alone."""
    return _greedy(tuple(prompt), max_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Many at a time


def test_every_answer_is_the_one_given_alone(server):
    """Requests come while others run, some go before their end, and none is disturbed."""
    asked, leaving = {}, []
    for number, length in enumerate(LENGTHS):
        wanted = 8 + 3 * number % 20
        asked[server.submit(prompt(length, number), wanted, client="abc"[number % 3])] = (length, number, wanted)
        if number % 4 == 3:
            leaving.append(server.submit(prompt(40, 20 + number), 400, client="d"))
            server.wait_for(lambda: server.answers[leaving[-1]].tokens)
        if number % 8 == 7:
            server.cancel(leaving[-2])
    for number in leaving:
        server.cancel(number)
    for (length, number, wanted), answer in zip(asked.values(), server.ends(*asked), strict=True):
        assert answer.tokens == greedy(prompt(length, number), wanted), f"{length} tokens"
        assert answer.reason == "length"
    for number, place in zip(leaving, range(3, len(LENGTHS), 4), strict=True):
        answer = server.answers[number]
        assert answer.reason is None and 0 < len(answer.tokens) < 400
        assert answer.tokens == greedy(prompt(40, 20 + place), len(answer.tokens))
    server.wait_for(lambda: server.stats[-1]["running"] == 0)
    assert server.stats[-1]["pages"]["used"] == 0


def test_a_second_turn_computes_only_what_is_new(server):
    first = prompt(210, 40)
    answer = server.answer(first, 30)
    assert answer.cached == 0
    second = [*first, *answer.tokens, *prompt(20, 60)]
    again = server.answer(second, 12)
    assert again.cached == (210 + 30 - 1) // 16 * 16  # the last token was sampled, but never taken in
    assert again.tokens == greedy(second, 12)
    repeated = server.answer(first[:208], 12)  # whole pages, of which the last token must be computed
    assert repeated.cached == 192 and repeated.tokens == greedy(first[:208], 12)


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(single):
    tokens = greedy(prompt(50, 3), 30)
    stop = tokens[12]
    answer = single.answer(prompt(50, 3), 30, stop_ids=[stop])
    assert (answer.tokens, answer.reason) == (tokens[: tokens.index(stop)], "stop")


def test_nobody_is_disturbed_by_requests_that_cannot_be_computed(single):
    running = single.submit(prompt(30, 5), 60)
    single.wait_for(lambda: single.answers[running].tokens)
    context = single.ready["context"]
    for odd, why in (
        ({"prompt": [1024]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [5] * context}, "prompt"),
        ({"prompt": [5], "sampling": {"temperature": -1}}, "temperature"),
        ({"prompt": [5], "sampling": {"logit_bias": {"1024": 1}}}, "logit_bias"),
        ({"prompt": [5], "nonsense": 1}, "nonsense"),
        ({"prompt": [5], "grammar": "start: ("}, ""),
    ):
        odd = dict(odd)
        answer = single.answer(odd.pop("prompt"), 5, **odd)
        assert answer.reason == "error" and why in answer.message and not answer.tokens
    assert single.ends(running)[0].tokens == greedy(prompt(30, 5), 60)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

KINDS = [
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "top_k": 0, "top_p": 0.9, "seed": 12},
    {"temperature": 1.3, "top_k": 5, "min_p": 0.05, "seed": 13, "logprobs": 20},
    {"temperature": 0, "frequency_penalty": 0.7, "presence_penalty": 0.2},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "seed": 14, "repetition_penalty": 1.2, "logit_bias": {"17": -100, "300": 3}},
    {"temperature": 0, "logprobs": 0},
]


def test_the_same_seed_gives_the_same_text_whatever_is_beside_it(server):
    apart = [server.answer(prompt(20 + n, n), 16, sampling=kind) for n, kind in enumerate(KINDS)]
    others = [server.submit(prompt(90, 30 + n), 24) for n in range(3)]
    together = server.ends(*(server.submit(prompt(20 + n, n), 16, sampling=kind) for n, kind in enumerate(KINDS)))
    for n, (one, other) in enumerate(zip(apart, together, strict=True)):
        assert one.tokens == other.tokens, KINDS[n]
        assert len(one.logprobs) == len(other.logprobs) == (16 if "logprobs" in KINDS[n] else 0)
    for n, answer in enumerate(server.ends(*others)):
        assert answer.tokens == greedy(prompt(90, 30 + n), 24)
    assert apart[0].tokens != greedy(prompt(20, 0), 16)
    assert server.answer(prompt(20, 0), 16, sampling=KINDS[0] | {"seed": 99}).tokens != apart[0].tokens
    assert 17 not in apart[5].tokens


def test_penalties_count_every_token_so_far(single):
    """A token that would come again and again comes once where it loses more than any logit has."""
    answer = single.answer(prompt(30, 8), 20, sampling={"temperature": 0, "presence_penalty": 2.0})
    tokens, found = prompt(30, 8), []
    for _ in range(20):
        logits = logits_after(tokens + found)
        for token in set(found):
            logits[token] -= 2.0
        found.append(max(range(len(logits)), key=logits.__getitem__))
    assert answer.tokens == found != greedy(tokens, 20)


def test_log_probabilities_are_the_models(single):
    answer = single.answer(prompt(25, 2), 6, sampling={"temperature": 0, "logprobs": 4})
    for place, (logprob, top) in enumerate(answer.logprobs):
        logits = mx.array(logits_after(prompt(25, 2) + answer.tokens[:place]))
        expected = logits - mx.logsumexp(logits)
        assert logprob == pytest.approx(expected[answer.tokens[place]].item(), abs=1e-3)
        assert [token for token, _ in top] == mx.argsort(-logits)[:4].tolist()
        assert [value for _, value in top] == pytest.approx(mx.sort(expected)[::-1][:4].tolist(), abs=1e-3)


def logits_after(tokens: list[int]) -> list[float]:
    return model()(mx.array([tokens]))[0, -1].tolist()


def test_an_answer_that_follows_a_grammar_beside_others(server):
    others = [server.submit(prompt(70, 50 + n), 24) for n in range(2)]
    grammar = 'start: "[" NUMBER ("," NUMBER)~3 "]"\nNUMBER: /[1-9][0-9]{0,2}/'
    more = {"grammar": grammar, "stop_ids": sorted(text().stop_ids)}
    follow = [server.submit(prompt(30, n), 60, sampling=KINDS[n], **more) for n in range(3)]
    for answer in server.ends(*follow):
        numbers = json.loads(text().decode(answer.tokens))
        assert len(numbers) == 4 and all(type(number) is int for number in numbers) and answer.reason == "stop"
    for n, answer in enumerate(server.ends(*others)):
        assert answer.tokens == greedy(prompt(70, 50 + n), 24)
    logprobs = server.answers[follow[2]].logprobs
    assert [[token for token, _ in top] for _, top in logprobs][0] == text().encode("[")  # nothing else may come
    assert logprobs[0][0] == pytest.approx(0, abs=1e-5)
    whole, emitted = server.answers[follow[0]].tokens, server.answers[follow[0]].tokens[:3]
    replayed = server.answer(prompt(30, 0), 60, sampling=KINDS[0], emitted=emitted, **more)
    assert emitted + replayed.tokens == whole


def test_answers_that_cannot_go_on_or_are_not_wanted_while_steps_are_under_way(server):
    """A grammar that breaks llguidance's limits in the middle of an answer, and masked rows that go at any time."""
    beside = server.submit(prompt(60, 44), 40)
    ways = " | ".join(f'"a" "{number}"' for number in range(2500))  # more than the parser follows at a time
    lost = server.submit(prompt(20, 1), 60, grammar=f"start: DIGITS ({ways})\nDIGITS: /[0-9]{{6}}/")
    leaving = [server.submit(prompt(25 + n, n), 300, grammar="start: /[a-z ]{500}/", client="b") for n in range(3)]
    for count, number in enumerate(leaving, 1):
        server.wait_for(lambda: len(server.answers[number].tokens) > count)  # noqa: B023
        server.cancel(number)
    [answer] = server.ends(lost)
    assert answer.reason == "error" and "does not follow the grammar" in answer.message
    assert len(text().decode(answer.tokens)) == 6 and text().decode(answer.tokens).isdigit()
    assert server.ends(beside)[0].tokens == greedy(prompt(60, 44), 40)
    again = server.submit(prompt(25, 0), 12, grammar="start: /[a-z ]{500}/")
    assert server.ends(again)[0].tokens[:2] == server.answers[leaving[0]].tokens[:2]
    server.wait_for(lambda: server.stats[-1]["running"] == 0)
    assert server.stats[-1]["pages"]["used"] == 0
    assert all(server.answers[number].reason is None for number in leaving)


def test_a_replay_goes_on_where_the_answer_was(server):
    """As after a fall of the ranks: with the tokens so far, among them those that penalties count."""
    kinds = [{"temperature": 0}, *KINDS[:6]]
    whole = server.ends(*(server.submit(prompt(45, n), 24, sampling=kind) for n, kind in enumerate(kinds)))
    begun = [answer.tokens[:9] for answer in whole]
    rest = server.ends(
        *(server.submit(prompt(45, n), 24, sampling=kind, emitted=begun[n]) for n, kind in enumerate(kinds))
    )
    assert [first + more.tokens for first, more in zip(begun, rest)] == [answer.tokens for answer in whole]


# ---------------------------------------------------------------------------------------------------------------------
# Too little memory


def test_rows_that_give_their_pages_away_lose_nothing():
    with Server(2, cache_tokens=320, rows=6) as server:
        server.wait_until_ready()
        assert (server.ready["pages"], server.ready["context"]) == (21, 320)
        numbers = [server.submit(prompt(30, n), 80, client=str(n)) for n in range(4)]
        for n, answer in enumerate(server.ends(*numbers)):
            assert answer.tokens == greedy(prompt(30, n), 80)
        assert max(server.answers[number].started for number in numbers) > 1, "nobody was preempted"
        assert server.answer(prompt(320, 1), 5).reason == "error"


# ---------------------------------------------------------------------------------------------------------------------
# The ends of a job


def running(server: Server) -> int:
    """A request that goes on for long."""
    number = server.wait_until_ready().submit(prompt(20), 5000)
    server.wait_for(lambda: len(server.answers[number].tokens) > 5)
    return number


@pytest.mark.parametrize(("rank", "busy"), [(0, True), (1, True), (1, False)])
def test_the_others_end_where_a_rank_is_killed(rank, busy):
    with Server(2) as server:
        running(server) if busy else server.wait_until_ready()
        server.processes[rank].kill()
        statuses = server.statuses(BOUND)
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] not in (0, None)
        assert f"rank {1 - rank}" in server.said()


@pytest.mark.mpi
def test_an_mpi_job_ends_where_a_rank_is_killed():
    with Server(4, "mpi") as server:
        server.wait_until_ready()
        children = psutil.Process(server.processes[0].pid).children(recursive=True)
        [*_, victim] = [child for child in children if "gateway_end.py" in " ".join(child.cmdline())]
        victim.kill()
        assert server.statuses(BOUND) != [0]


def test_the_ranks_end_with_the_gateway():
    with Server(2) as server:
        running(server)
        server.hang_up()
        assert all(status not in (0, None) for status in server.statuses(BOUND))
        assert "the gateway is gone" in server.said()


def test_a_busy_server_ends_in_good_order_when_told():
    """Also while a grammar is compiled, which takes a second."""
    with Server(2) as server:
        running(server)
        slow = "start: r0\n" + "".join(f'r{n}: "a" r{n + 1}\n' for n in range(24_000)) + 'r24000: "a"\n'
        server.submit(prompt(5), 5, client="b", grammar=slow)
        server.submit(prompt(9, 3), 5000, sampling={"temperature": 1.0, "top_k": 0}, client="c")
        server.wait_for(lambda: server.answers[3].tokens)
        assert server.stop() == [0, 0]


def test_waiting_for_requests_costs_nothing():
    with Server(2) as server:
        number = running(server)
        server.cancel(number)
        server.wait_for(lambda: server.stats and server.stats[-1]["running"] == 0)
        ranks = [psutil.Process(process.pid) for process in server.processes]
        time.sleep(0.2)
        before = [sum(rank.cpu_times()[:2]) for rank in ranks]
        time.sleep(1.0)
        assert [sum(rank.cpu_times()[:2]) - b for rank, b in zip(ranks, before)] == pytest.approx([0, 0], abs=0.03)
        assert server.answer(prompt(20), 10).tokens == greedy(prompt(20), 10)
