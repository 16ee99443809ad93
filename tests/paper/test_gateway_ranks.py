"""Requests over the lives of the ranks: nothing lost, repeated or changed; who is refused, failed, and told why."""

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_ranks import FILES, VOCABULARY, ScriptedRanks, answer_to

from m3dist.cluster.handshake import NONCE
from m3dist.gateway.link import Listener
from m3dist.gateway.ranks import FALLS, Busy, Ranks, RequestFailed, Stream, Unavailable, Work
from m3dist.sampling import Sampling

SECRET = "s" * 64
DEADLINE = 20.0  # seconds


class Cluster:
    """Ranks with their port, and the lives that a test starts."""

    def __init__(self, rows: int = 4, queue: int = 100, request_limit: float = 60.0):
        self.told: list[str] = []
        self.ranks = Ranks(rows, queue, request_limit, tell=self.told.append)
        self.listener = Listener("127.0.0.1", SECRET)
        self.lives: list[ScriptedRanks] = []

    async def start(self, **script: Any) -> ScriptedRanks:
        """A life that is ready; or where `ready` is False, one that has said hello."""
        word = "ready" if script.get("ready", True) else "state"
        before = self.told.count(word)
        life = await asyncio.to_thread(ScriptedRanks, self.listener.address, SECRET, **script)
        self.lives.append(life)
        await until(lambda: self.told.count(word) > before)
        return life

    async def fall(self, life: ScriptedRanks) -> None:
        await asyncio.to_thread(life.fall)
        await until(lambda: self.ranks.state.phase != "ready")

    def submit(self, prompt: list[int], max_tokens: int = 20, client: str = "a", **work: Any) -> Stream:
        return self.ranks.submit(Work(prompt, max_tokens, **work), client)


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), DEADLINE)


async def answer_of(stream: Stream) -> list[int]:
    return [token.id async for token in stream]


def run(test: Callable[[Cluster], Awaitable[None]], **limits: Any) -> None:
    """Run `test` with a cluster that is not started."""

    async def body() -> None:
        cluster = Cluster(**limits)
        serving = asyncio.create_task(cluster.listener.serve(cluster.ranks.live))
        try:
            await asyncio.wait_for(test(cluster), DEADLINE)
        finally:
            for life in cluster.lives:
                await asyncio.to_thread(life.fall)
            serving.cancel()

    asyncio.run(body())


# ---------------------------------------------------------------------------------------------------------------------
# One life


def test_an_answer():
    async def test(cluster: Cluster) -> None:
        await cluster.start()
        stream = cluster.submit([1, 2, 3, 4], max_tokens=30)
        assert await answer_of(stream) == answer_to([1, 2, 3, 4], 30)
        assert (stream.finish, stream.cached) == ("length", 2)
        assert (cluster.ranks.running, cluster.ranks.waiting) == (0, 0)
        assert cluster.told.count("answered") == 1

    run(test)


def test_the_end_by_a_stop_token():
    async def test(cluster: Cluster) -> None:
        await cluster.start()
        whole = answer_to([5], 50)
        stop = whole[20]
        stream = cluster.submit([5], max_tokens=50, stop_ids=(stop,))
        assert await answer_of(stream) == whole[: whole.index(stop)]
        assert stream.finish == "stop"

    run(test)


def test_what_is_asked_arrives():
    """All of it, and as it was; order of arrival kept."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        sampling = Sampling(temperature=0.5, top_k=3, seed=7, logit_bias={5: -1.0}, logprobs=2)
        streams = [
            cluster.submit([1], client="b", sampling=sampling, stop_ids=(1000,), grammar='start: "a"'),
            cluster.submit([2]),
        ]
        tokens = [token async for token in streams[0]]
        assert [len(token.top or ()) for token in tokens] == [2] * 20
        assert tokens[0].top == ((tokens[0].id, -0.5), (tokens[0].id + 1, -1.5))
        await answer_of(streams[1])
        assert life.submitted == [stream.request for stream in streams]
        assert [request.client for request in life.submitted] == ["b", "a"]

    run(test)


def test_cancelling():
    """The ranks are told at once, once; the iteration ends; the place in the queue is free."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.02)
        stream = cluster.submit([1], max_tokens=1000)
        await anext(stream)
        stream.cancel()
        stream.cancel()
        assert await answer_of(stream) == []
        await until(lambda: life.cancelled == [stream.request.id])
        assert cluster.ranks.running == 0
        assert await answer_of(cluster.submit([2])) == answer_to([2], 20)

    run(test, rows=1, queue=0)


def test_an_answer_that_is_complete_before_the_ranks_say_so():
    """As after a stop string: it has ended as answers do, and the ranks are told."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.02)
        stream = cluster.submit([1], max_tokens=1000)
        await anext(stream)
        stream.complete()
        stream.complete()
        assert [token async for token in stream] == []
        assert stream.finish == "stop"
        await until(lambda: life.cancelled == [stream.request.id])
        ended = cluster.ranks.metrics.requests
        assert [ended.labels(how)._value.get() for how in ("stop", "cancelled")] == [1, 0]
        await answer_of(cluster.submit([2], max_tokens=3))
        assert life.cancelled == [stream.request.id]  # what the ranks ended need not be cancelled

    run(test)


def test_a_reader_that_does_not_read(monkeypatch):
    """Its answer is dropped, and the others' go on."""
    monkeypatch.setattr("m3dist.gateway.ranks.UNREAD", 50)

    async def test(cluster: Cluster) -> None:
        await cluster.start()
        lazy = cluster.submit([1], max_tokens=5000)
        for prompt in range(2, 9):
            assert await answer_of(cluster.submit([prompt], 30)) == answer_to([prompt], 30)
        await until(lambda: cluster.ranks.running == 0)
        with pytest.raises(RequestFailed, match="does not read"):
            await answer_of(lazy)

    run(test)


# ---------------------------------------------------------------------------------------------------------------------
# Falls


def test_many_falls():
    """Eight answers over ten lives, each cut off at a random moment: every answer is the undisturbed one."""

    async def test(cluster: Cluster) -> None:
        rng = random.Random(1)
        life = await cluster.start(rows=3)
        prompts = [[prompt] * (prompt + 1) for prompt in range(8)]
        answers = [asyncio.create_task(answer_of(cluster.submit(prompt, 300))) for prompt in prompts]
        for _ in range(10):
            steps = life.steps
            await until(lambda: life.steps > steps + rng.randrange(1, 10))  # noqa: B023
            await cluster.fall(life)
            life = await cluster.start(rows=3)
            assert [request.id for request in life.submitted] == sorted(request.id for request in life.submitted)
        assert await asyncio.gather(*answers) == [answer_to(prompt, 300) for prompt in prompts]

    run(test)


def test_requests_are_taken_while_the_ranks_restart():
    async def test(cluster: Cluster) -> None:
        await cluster.fall(await cluster.start())
        stream = cluster.submit([9])
        assert (cluster.ranks.state.phase, cluster.ranks.waiting) == ("restarting", 1)
        await cluster.start()
        assert await answer_of(stream) == answer_to([9], 20)

    run(test)


def test_the_word_of_an_end_is_lost():
    """All tokens are there: the answer is over, and nothing is asked of the next life."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        life.stall()
        stream = cluster.submit([1], max_tokens=2)
        await until(lambda: life.submitted != [])
        for token in answer_to([1], 2):
            life.say({"tokens": [[stream.request.id, token]]})
        await until(lambda: len(stream.emitted) == 2)
        cluster.ranks.down("rank 1 was killed")
        assert await answer_of(stream) == answer_to([1], 2)
        assert stream.finish == "length"
        assert (await cluster.start()).submitted == []

    run(test)


def test_a_new_life_before_the_old_one_is_seen_to_end():
    """As after a host that went without a word."""

    async def test(cluster: Cluster) -> None:
        old = await cluster.start(pace=0.01)
        answer = asyncio.create_task(answer_of(cluster.submit([3], 40)))
        await until(lambda: old.steps > 3)
        old.stall()
        await cluster.start()
        old.say({"tokens": [[1, 0]]})  # too late
        assert await answer == answer_to([3], 40)

    run(test)


def test_the_request_that_kills_fails_alone():
    """It runs beside others in every fall; they are innocent, and end as if nothing had been."""

    async def test(cluster: Cluster) -> None:
        poison, lives = 999, 0
        life = await cluster.start(kills=[poison])
        answers = [asyncio.create_task(answer_of(cluster.submit([prompt], 50))) for prompt in range(3)]
        bad = asyncio.create_task(answer_of(cluster.submit([poison])))
        answers += [asyncio.create_task(answer_of(cluster.submit([prompt], 50))) for prompt in range(3, 6)]
        while not bad.done():
            await until(lambda: cluster.ranks.state.phase == "restarting" or bad.done())
            life = await cluster.start(kills=[poison])
            lives += 1
        with pytest.raises(RequestFailed, match=f"{FALLS} times in a row"):
            await bad
        assert lives <= FALLS + 1
        assert await asyncio.gather(*answers) == [answer_to([prompt], 50) for prompt in range(6)]
        assert life.submitted is not None

    run(test)


def test_the_request_that_kills_on_arrival_fails_alone():
    """Nothing is begun in these lives: those that wait are tried one by one."""

    async def test(cluster: Cluster) -> None:
        poison = 999
        await cluster.fall(await cluster.start())
        answers = [asyncio.create_task(answer_of(cluster.submit([prompt], 50))) for prompt in range(3)]
        bad = asyncio.create_task(answer_of(cluster.submit([poison])))
        answers += [asyncio.create_task(answer_of(cluster.submit([prompt], 50))) for prompt in range(3, 6)]
        for _ in range(10):
            if bad.done():
                break
            await cluster.start(kills=[poison], early=True, pace=0.01)
            await until(lambda: cluster.ranks.state.phase == "restarting" or bad.done())
        with pytest.raises(RequestFailed):
            await bad
        if cluster.ranks.state.phase != "ready":
            await cluster.start()
        assert await asyncio.gather(*answers) == [answer_to([prompt], 50) for prompt in range(6)]

    run(test)


def test_progress_clears_a_request():
    """It is part of five falls, and has a token in each life."""

    async def test(cluster: Cluster) -> None:
        answer = None
        for _ in range(5):
            life = await cluster.start(pace=0.01)
            answer = answer or asyncio.create_task(answer_of(cluster.submit([4], 60)))
            steps = life.steps
            await until(lambda: life.steps > steps)  # noqa: B023
            await cluster.fall(life)
        await cluster.start()
        assert await answer == answer_to([4], 60)

    run(test)


def test_given_up():
    """Every answer fails, with the reason; so does every new request."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.05)
        stream = cluster.submit([1], 1000)
        await anext(stream)
        await cluster.fall(life)
        cluster.ranks.failed("rank 1 on mac2 was killed 5 times")
        with pytest.raises(RequestFailed, match="mac2 was killed"):
            await answer_of(stream)
        with pytest.raises(Unavailable, match="mac2 was killed"):
            cluster.submit([1])
        assert cluster.ranks.state.phase == "failed"

    run(test)


# ---------------------------------------------------------------------------------------------------------------------
# What the ranks say that they should not


BAD = {
    "not an object": b"[1]\n",
    "not JSON": b"{tokens\n",
    "deep": b"[" * 100_000 + b"\n",
    "unknown": {"hallo": 1},
    "a token beyond the vocabulary": {"tokens": [[1, VOCABULARY]]},
    "a negative token": {"tokens": [[1, -1]]},
    "a token that is true": {"tokens": [[1, True]]},
    "tokens that are none": {"tokens": 5},
    "half an entry": {"tokens": [[1]]},
    "a log probability that is no number": {"tokens": [[1, 5, float("nan"), []]]},
    "likeliest tokens that are none": {"tokens": [[1, 5, -1.0, [[5]]]]},
    "an id that is text": {"started": "1"},
    "cached below 0": {"started": 1, "cached": -5},
    "an end without reason": {"ended": 1},
    "stats that are none": {"stats": {"ranks": [5]}},
    "pages that are text": {"stats": {"pages": {"used": "many"}}},
    "ready with nothing": {"ready": {}},
    "loading with text": {"loading": "half"},
    "another tokenizer": {"hello": {"hosts": ["mac1"], "files": {**FILES, "tokenizer.json": "{}"}}},
    "a file elsewhere": {"hello": {"hosts": ["mac1"], "files": {"../tokenizer.json": "{}"}}},
}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD)
def test_lies_end_the_life(message):
    """They are a fall, which says what came; the request goes on in the next life."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.005)
        answer = asyncio.create_task(answer_of(cluster.submit([6], 40)))
        await until(lambda: life.steps > 2)
        life.stall()
        life.say_bytes(message) if isinstance(message, bytes) else life.say(message)
        await until(lambda: cluster.ranks.state.phase == "restarting")
        assert cluster.ranks.state.reason
        await cluster.start()
        assert await answer == answer_to([6], 40)

    run(test)


def test_more_tokens_than_asked():
    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        life.stall()
        stream = cluster.submit([1], max_tokens=3)
        await until(lambda: life.submitted != [])
        life.say({"tokens": [[stream.request.id, 7]] * 4})
        await until(lambda: cluster.ranks.state.phase == "restarting")
        assert len(await answer_of(stream)) == 3

    run(test)


def test_words_about_requests_that_are_no_more():
    """Of one that was cancelled, and one that never was: they mean nothing."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        stream = cluster.submit([1], max_tokens=3)
        stream.cancel()
        for id in (stream.request.id, 12345):
            life.say({"started": id, "cached": 0})
            life.say({"tokens": [[id, 7]]})
            life.say({"ended": id, "reason": "stop"})
        assert await answer_of(cluster.submit([2])) == answer_to([2], 20)
        assert cluster.ranks.state.phase == "ready"

    run(test)


def test_a_request_of_its_own_error():
    """As a grammar that cannot be compiled: that request fails, by the client's fault."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        life.stall()
        stream = cluster.submit([1])
        await until(lambda: life.submitted != [])
        life.say({"ended": stream.request.id, "reason": "error", "message": "grammar: no rule start"})
        with pytest.raises(RequestFailed, match="no rule start") as raised:
            await answer_of(stream)
        assert raised.value.status == 400

    run(test)


def test_impossible_tokens():
    """minus infinity, as grammars give it, becomes what OpenAI's API says."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start()
        life.stall()
        stream = cluster.submit([1], max_tokens=1)
        await until(lambda: life.submitted != [])
        life.say({"tokens": [[stream.request.id, 7, -0.1, [[7, -0.1], [8, float("-inf")]]]]})
        assert (await anext(stream)).top == ((7, -0.1), (8, -9999.0))

    run(test)


# ---------------------------------------------------------------------------------------------------------------------
# Who may connect


def test_strangers_get_nothing():
    """Whoever does not know the secret is hung up on; those who say nothing do not keep the ranks out."""

    async def test(cluster: Cluster) -> None:
        host, port = cluster.listener.address.split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(40)]
        with pytest.raises(EOFError):
            await asyncio.to_thread(ScriptedRanks, cluster.listener.address, "another secret")
        liar = socket.create_connection((host, int(port)))
        liar.sendall(b'{"hello": {}}\n' + bytes(100))
        received = await asyncio.to_thread(liar.recv, 1000)
        assert len(received) <= NONCE
        await cluster.start()
        assert await answer_of(cluster.submit([1])) == answer_to([1], 20)
        for connection in [*silent, liar]:
            connection.close()

    run(test)


# ---------------------------------------------------------------------------------------------------------------------
# Phases and limits


def test_phases():
    async def test(cluster: Cluster) -> None:
        ranks = cluster.ranks
        with pytest.raises(Unavailable, match="starting"):
            cluster.submit([1])
        ranks.up()
        ranks.down("mac2 does not answer")
        assert (ranks.state.phase, ranks.state.reason) == ("starting", "mac2 does not answer")
        ranks.up()
        life = await cluster.start(ready=False)
        await until(lambda: ranks.state.fraction == 0.4)
        assert (ranks.state.phase, ranks.state.restarts) == ("loading", 1)
        with pytest.raises(Unavailable, match="40%") as raised:
            cluster.submit([1])
        assert raised.value.retry_after >= 1
        assert ranks.text is not None
        life.get_ready()
        await until(lambda: ranks.state.phase == "ready")
        assert (ranks.state.fraction, ranks.state.reason) == (None, None)

    run(test)


def test_the_queue_is_bounded():
    async def test(cluster: Cluster) -> None:
        await cluster.start(pace=0.02, rows=2)
        streams = [cluster.submit([prompt], 10) for prompt in range(5)]
        with pytest.raises(Busy) as raised:
            cluster.submit([9])
        assert raised.value.retry_after >= 1
        await until(lambda: cluster.ranks.running == 2)
        assert cluster.ranks.waiting == 3
        await answer_of(streams[0])
        assert await answer_of(cluster.submit([9])) == answer_to([9], 20)

    run(test, rows=2, queue=3)


def test_a_client_gets_no_more_than_half_of_the_queue():
    """And one request more; whatever it holds, others are served."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(rows=2)
        life.stall()
        ranks = cluster.ranks
        for prompt in range(4):
            ranks.check(1, "greedy")
            cluster.submit([prompt], client="greedy")
        with pytest.raises(Busy, match="4 requests of yours"):
            ranks.check(1, "greedy")
        ranks.check(0, "greedy")
        ranks.check(2, "other")
        with pytest.raises(Busy, match="too many"):
            ranks.check(3, "other")

    run(test, rows=2, queue=4)


def test_a_request_that_takes_too_long():
    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.02)
        stream = cluster.submit([1], 5000)
        with pytest.raises(RequestFailed, match="0.2 s") as raised:
            await answer_of(stream)
        assert raised.value.status == 504
        await until(lambda: life.cancelled == [stream.request.id])

    run(test, request_limit=0.2)


def test_draining():
    """No new request, those that run finish, then the job is told to end; sooner than the time given."""

    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.01)
        answer = asyncio.create_task(answer_of(cluster.submit([1], 20)))
        await asyncio.sleep(0)
        drained = asyncio.create_task(cluster.ranks.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="ending"):
            cluster.submit([2])
        began = time.monotonic()
        await drained
        assert time.monotonic() - began < 5
        assert await answer == answer_to([1], 20)
        await until(lambda: life.told_to_stop)
        assert cluster.ranks.state.phase == "draining"

    run(test)


def test_draining_over_a_fall():
    async def test(cluster: Cluster) -> None:
        life = await cluster.start(pace=0.01)
        answer = asyncio.create_task(answer_of(cluster.submit([1], 40)))
        await until(lambda: life.steps > 2)
        drained = asyncio.create_task(cluster.ranks.drain(10.0))
        await cluster.fall(life)
        life = await cluster.start()
        await drained
        assert await answer == answer_to([1], 40)

    run(test)


def test_draining_takes_only_so_long():
    async def test(cluster: Cluster) -> None:
        await cluster.start(pace=0.05)
        stream = cluster.submit([1], 5000)
        await cluster.ranks.drain(0.2)
        with pytest.raises(RequestFailed, match="ending") as raised:
            await answer_of(stream)
        assert raised.value.status == 503

    run(test)
