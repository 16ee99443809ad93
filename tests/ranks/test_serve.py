"""`m3dist serve` and `m3dist chat` as processes: how they start, who is let in, how they end, and what is left."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from failures import M3DIST, ON_A_TERMINAL, Trial, started
from served import TIMEOUT, Client, Serving, answers, serving

from m3dist.gateway.process import API_KEY, MODULE
from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT

KEY = "sk-of-the-house"
PATIENCE = 40.0  # seconds
HEADERS = {"Authorization": f"Bearer {KEY}"}


def gateways(trial: Trial) -> list[psutil.Process]:
    return [process for process in trial.processes() if MODULE in process.cmdline()]


def check_nothing_is_left(trial: Trial, seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while (left := trial.processes()) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not left, trial.said()
    assert not list(trial.temporary.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A server that runs


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Of two ranks, with a key, which is in its environment."""
    with serving(tmp_path_factory.mktemp("server"), **{API_KEY: KEY}) as server:
        yield server


def test_who_knows_no_key_gets_nothing_but_health(server):
    body = {"model": "tiny", "messages": [{"role": "user", "content": DEMO_PROMPT}], "temperature": 0}
    url = f"{server.url}/v1/chat/completions"
    refused = httpx.post(url, json=body, timeout=TIMEOUT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    answer = httpx.post(url, json=body, headers=HEADERS, timeout=TIMEOUT).json()["choices"][0]["message"]
    assert answer["content"] == DEMO_ANSWER
    assert server.health()["phase"] == "ready"


def test_no_rank_has_the_key(server):
    """Nor has any other process that was started; the environment the server itself was started with stays as it is."""
    processes = [process for process in server.processes() if process.pid != server.process.pid]
    assert len(processes) >= 4  # gateway, agent, two ranks
    for process in processes:
        assert KEY not in str((process.cmdline(), process.environ())), process.cmdline()


def test_chat_with_a_server_by_lines(server):
    """A line is a message; the conversation is kept, and cleared."""
    lines = f"{DEMO_PROMPT}\n\n/nonsense\nWhat is my cat called?\n/clear\nWhat is 3 + 4?\n"
    command = [*M3DIST, "chat", "--url", server.url, "--temperature", "0"]
    environ = {**os.environ, API_KEY: KEY}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == DEMO_ANSWER and "Miro" in second and "7" in third
    assert done.stderr == "/help shows what can be typed\n"


@pytest.mark.parametrize("key, said", [("", "give --api-key-file or M3DIST_API_KEY"), ("wrong", "(401)")])
def test_chat_without_the_right_key(server, key, said):
    command = [*M3DIST, "chat", "--url", server.url, *(["--api-key", key] if key else [])]
    environ = {name: value for name, value in os.environ.items() if name != API_KEY}
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2 and said in done.stderr, done.stderr


class Terminal:
    """A chat on a terminal of its own: what is typed, and what is shown."""

    def __init__(self, *flags: str, **env: str):
        self.ours, theirs = pty.openpty()
        environ = {**os.environ, "TERM": "xterm", **env}
        command = [sys.executable, "-c", ON_A_TERMINAL, *M3DIST, "chat", *flags]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Until what is shown since the last time has it; returns that."""
        limit = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < limit, self.shown
            if select.select([self.ours], [], [], 0.1)[0]:
                self._read()
        shown, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return shown

    def _read(self) -> None:
        try:
            self.shown += os.read(self.ours, 4096).decode(errors="replace")
        except OSError:  # nobody holds its other end
            raise AssertionError(f"the chat ended: {self.shown}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_chat_in_a_terminal(server):
    """Thinking is dim, Ctrl-C stops an answer and not the program, three quotes and backslashes go over lines."""
    terminal = Terminal("--url", server.url, "--temperature", "0", **{API_KEY: KEY})
    try:
        terminal.wait_for("tiny at .*> ")
        terminal.type(DEMO_PROMPT.replace(" What", "\\\nWhat") + "\n")
        shown = terminal.wait_for("tokens/s.*\n.*> ")
        assert re.search(r"\x1b\[2m7", shown) and DEMO_ANSWER in shown  # it thinks: 7 + 5 = 12
        assert "prompt 3" in shown and "answer 25" in shown
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type('"""What is\n3 + 4?\n"""\n')
        assert "7" in terminal.wait_for("tokens/s.*\n.*> ")
        terminal.type("/exit\n")
        terminal.process.wait(20)
        assert terminal.process.returncode == 0
    finally:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_chat(server):
    """While the ranks stand still, which is when nothing comes."""
    terminal = Terminal("--url", server.url, "--temperature", "0", **{API_KEY: KEY})
    rank = server.ranks()[0]
    try:
        terminal.wait_for("> ")
        rank.suspend()
        terminal.type(f"{DEMO_PROMPT}\n")
        terminal.wait_for("called\\?\r\n")
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.wait_for("stopped")
        rank.resume()
        terminal.type(f"{DEMO_PROMPT}\n")
        assert DEMO_ANSWER in terminal.wait_for("tokens/s.*\n.*> ")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        rank.resume()
        terminal.close()


# ---------------------------------------------------------------------------------------------------------------------
# The end


def test_a_signal_lets_running_answers_finish(tmp_path):
    with serving(tmp_path) as server:
        clients = [Client(server.url, f"Count to {n}.", 150, temperature=0) for n in range(4)]
        server.wait_for(lambda: all(client.events for client in clients))
        server.process.send_signal(signal.SIGTERM)
        server.wait_until("draining")
        late = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "Hello"}, timeout=TIMEOUT)
        assert late.status_code == 503 and "retry-after" in late.headers
        assert all(answers(clients))
        assert server.process.wait(20) == 0, server.said()
        check_nothing_is_left(server)


def test_a_gateway_that_is_killed_and_a_second_signal(tmp_path):
    """Another gateway takes its place, at the same address; two signals end all at once."""
    with serving(tmp_path) as server:
        [gateway], url = gateways(server), server.url
        gateway.kill()
        server.wait_for(lambda: gateways(server) and gateways(server)[0].pid != gateway.pid)
        server.wait_for(lambda: "ready again" in server.said())
        assert server.health()["phase"] == "ready" and server.said().count("gateway was killed by SIGKILL") >= 1
        client = Client(url, "Count.", 4000, temperature=0)
        server.wait_for(lambda: client.events)
        server.process.send_signal(signal.SIGINT)
        server.wait_until("draining")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
        client.join(10)
        assert client.error and client.reason is None
        check_nothing_is_left(server)


def test_a_killed_server_leaves_nothing(tmp_path):
    with started(Serving(tmp_path)) as server:
        server.wait_for(lambda: len(server.ranks()) == 2 and gateways(server))
        server.process.kill()
        server.process.wait()
        check_nothing_is_left(server)


def test_what_cannot_work_is_not_tried_again(tmp_path):
    """A model that is not there; a port that somebody has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        trials = [Serving(tmp_path / "model", "--model", str(tmp_path)), Serving(tmp_path / "port", "--port", port)]
        with started(trials[0]) as model, started(trials[1]) as address:
            assert (model.process.wait(60), address.process.wait(60)) == (2, 2)
            assert str(tmp_path) in model.said() and "starting the ranks again" not in model.said()
            assert f"127.0.0.1:{port}" in address.said() and "--port" in address.said()
            for trial in (model, address):
                check_nothing_is_left(trial)


def test_a_chat_with_a_server_of_its_own(tmp_path):
    """It answers; and a chat that is killed leaves nothing behind."""
    command = [*M3DIST, "chat", "-n", "2", "--temperature", "0"]
    with started(Trial(tmp_path, command), stdin=subprocess.PIPE) as chat:
        chat.process.stdin.write(f"{DEMO_PROMPT}\n".encode())
        chat.process.stdin.flush()
        chat.wait_for(lambda: DEMO_ANSWER in chat.out.read_text())
        assert len(chat.ranks()) == 2
        chat.process.kill()
        chat.process.wait()
        check_nothing_is_left(chat)


# ---------------------------------------------------------------------------------------------------------------------
# Other launchers


@pytest.mark.mpi
def test_mpirun_starts_a_server_too(tmp_path):
    """Rank 0 has the gateway as its child then."""
    command = "mpirun --allow-run-as-root --oversubscribe --bind-to none --mca mpi_yield_when_idle 1 -n 2".split()
    server = Serving(tmp_path)
    server.command = [*command, *M3DIST, "serve", "--port", "0"]
    with started(server):
        server.wait_until("ready")
        assert answers([Client(server.url, "Count.", 8, temperature=0)])
        server.process.terminate()
        assert server.process.wait(20) != 0
        check_nothing_is_left(server)
