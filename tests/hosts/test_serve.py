"""A server whose ranks, rank 0 too, run on other hosts than its gateway: over real ssh, with a link that is lost."""

import json
import signal
from subprocess import PIPE

from network import HostProcess, Network
from spec import FOUR

from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT

SPECS = FOUR
HOSTFILE = "/root/hosts.json"
ENV = {"M3DIST_STEP_LIMIT": "4", "M3DIST_SILENCE_LIMIT": "5"}


def read_until(server: HostProcess, words: str) -> str:
    """What it says on standard error, up to the line with these words."""
    said = ""
    for line in server.stderr:
        said += line.decode()
        if words in said:
            return said
    raise AssertionError(said)


def ask(net: Network) -> str:
    """The answer to a client on the gateway's host."""
    command = [net.host(0).python, "-m", "m3dist", "chat", "--url", "http://127.0.0.1:8080", "--temperature", "0"]
    done = net.run(0, command, timeout=60.0, input=f"{DEMO_PROMPT}\n")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ranks_on_other_hosts_that_are_lost_and_come_back(net):
    hosts = [net.host(i).entry() for i in (1, 2)]
    net.host(0).path(HOSTFILE).write_text(json.dumps({"backend": "ring", "hosts": hosts}))
    command = [net.host(0).python, "-m", "m3dist", "serve", "--hostfile", HOSTFILE]
    server = net.popen(0, command, env=ENV, stdout=PIPE, stderr=PIPE)
    read_until(server, "m3dist: ready: ")
    assert ask(net) == DEMO_ANSWER
    net.link_down(1)
    said = read_until(server, "m3dist: starting the ranks again in 9 s (1 of 5 in a row)")
    assert f"host {hosts[0]['ssh']} was lost" in said
    net.link_up(1)
    read_until(server, "m3dist: ready again")
    assert ask(net) == DEMO_ANSWER
    server.send_signal(signal.SIGTERM)
    _, said = server.communicate(timeout=30.0)
    assert server.returncode == 0, said.decode()
    assert net.wait_empty(5.0) == []
