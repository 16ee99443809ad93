"""No request is lost: ranks that die or stop under running streams, clients that leave, a cluster that stays down.

M3DIST_KILLS=10 lets ten ranks fall under the sixteen streams, instead of two, and four ranks over MPI be tried too.
"""

import os
import random
import signal
import time

import httpx
import pytest
from served import TIMEOUT, Client, Serving, answers, serving

KILLS = int(os.environ.get("M3DIST_KILLS", "2"))
TOKENS = 60 + 40 * KILLS  # so many that none has ended before the last fall
SUBJECTS = "cats dogs trees rivers clouds stones fish birds maps clocks boats lamps roads songs doors seeds".split()
PROMPTS = [f"Tell me about {subject}, at length." for subject in SUBJECTS]
STEP_LIMIT = "4"  # seconds in which a stopped rank must be noticed
WORLDS = [2] if KILLS <= 2 else [2, pytest.param(4, marks=pytest.mark.mpi)]


def ask(server: Serving, tokens: int, count: int = len(PROMPTS), **options: int) -> list[Client]:
    """Greedy, greedy without saying the same again and again, and by chance with a seed, in turn."""
    ways = [{"temperature": 0}, {"temperature": 0, "frequency_penalty": 0.7}, {"temperature": 1, "seed": 6}]
    url = server.url
    return [Client(url, prompt, tokens, **options, **ways[n % 3]) for n, prompt in enumerate(PROMPTS[:count])]


def progress(clients: list[Client]) -> int:
    return sum(client.events for client in clients)


@pytest.fixture(scope="module", params=WORLDS)
def server(request, tmp_path_factory):
    folder, backend = tmp_path_factory.mktemp("server"), "ring" if request.param == 2 else "mpi"
    with serving(folder, world=request.param, backend=backend, M3DIST_STEP_LIMIT=STEP_LIMIT) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(server):
    """The answers when nothing happens."""
    return answers(ask(server, TOKENS))


def test_clients_that_leave_disturb_nobody(server, undisturbed):
    """Before the first token and in mid-stream; the others' texts stay, and nothing goes on being computed."""
    leavers = [*ask(server, 2000, 4, leave_after=0), *ask(server, 2000, 4, leave_after=5)]
    assert answers(ask(server, TOKENS)) == undisturbed
    for client in leavers:
        client.join(TIMEOUT.read)
    server.wait_for(lambda: (health := server.health())["running"] == health["waiting"] == 0)
    assert server.health()["restarts"] == 0


def test_streams_outlive_the_ranks(server, undisturbed):
    """By SIGKILL and SIGSTOP in turn, a rank at random, each time after all streams have moved on."""
    clients, chance = ask(server, TOKENS), random.Random(6)
    for kill in range(KILLS):
        reached = progress(clients) + len(clients) * chance.randrange(5, 15)
        server.wait_for(lambda reached=reached: progress(clients) >= reached)
        rank, fault = chance.choice(server.ranks()), (signal.SIGKILL, signal.SIGSTOP)[kill % 2]
        server.send(fault, rank)
        server.wait_for(lambda: server.health()["phase"] != "ready")
    assert all(client.is_alive() for client in clients)  # none had ended before the last fall
    assert answers(clients) == undisturbed
    health = server.health()
    assert (health["phase"], health["restarts"]) == ("ready", KILLS)


def test_a_cluster_that_stays_down_says_why(tmp_path):
    """Every rank 1 dies as soon as it is there; after so many restarts in a row the clients get the reason."""
    with serving(tmp_path, "--restarts", "1") as server:
        [client] = ask(server, 4000, 1)
        server.wait_for(lambda: client.events)
        url, killed = server.url, set()
        while client.is_alive():
            for rank in server.ranks()[1:]:
                if rank.pid not in killed:
                    killed.add(rank.pid)
                    server.send(signal.SIGKILL, rank)
            time.sleep(0.05)
        assert "rank 1 was killed by SIGKILL" in client.error
        health = httpx.get(f"{url}/health", timeout=TIMEOUT)
        assert (health.status_code, health.json()["phase"]) == (503, "failed")
        assert "rank 1 was killed by SIGKILL" in health.json()["reason"]
        late = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Hello"}, timeout=TIMEOUT)
        assert late.status_code == 503 and "SIGKILL" in late.json()["error"]["message"]
        assert server.process.wait(30) == 128 + signal.SIGKILL
        assert len(killed) == 2 and not server.processes()
