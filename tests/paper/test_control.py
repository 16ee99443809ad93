"""The connections between rank 0 and the workers: real sockets, and who does not get one."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from m3dist.cluster.channel import Channel
from m3dist.cluster.environment import Launch
from m3dist.engine import control
from m3dist.engine.control import Arrivals, Rank0, Workers, own_addresses, reach
from m3dist.engine.link import dial
from m3dist.errors import CommunicationError

HOSTS = ["a", "b", "c"]


def soon() -> float:
    return time.monotonic() + 5.0


def connected(world: int) -> tuple[Workers, list[Rank0], list[str]]:
    """Both sides of a world's connections, and what is said of lost ranks."""
    arrivals, lost = Arrivals(world), []
    addresses = arrivals.listen(["127.0.0.1"], "secret")
    others = []
    for rank in range(1, world):
        channel = reach(addresses, "secret")
        channel.send({"rank": rank})
        others.append(Rank0(channel, lost.append))
    return Workers(arrivals.wait(soon(), HOSTS), lost.append), others, lost


def until(condition) -> None:
    end = soon()
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def hang_up(channel: Channel) -> None:
    """As a process that ends does: the other thread, which reads, must not keep the connection open."""
    with socket.socket(fileno=os.dup(channel.reading)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def test_workers_hear_what_rank_0_tells_and_tell_how_they_are():
    workers, others, lost = connected(3)
    workers.tell({"step": [1, 2]})
    assert [other.hear() for other in others] == [{"step": [1, 2]}] * 2
    others[1].report({"step_seconds": 0.5})
    until(lambda: workers.reports == [{}, {}, {"step_seconds": 0.5}])
    workers.end()
    assert [other.hear() for other in others] == [{"end": True}] * 2
    for other in others:
        hang_up(other._channel)
    time.sleep(0.05)
    assert lost == []  # they were told to go


def test_a_lost_worker_is_noticed_while_nothing_is_sent():
    workers, others, lost = connected(3)
    hang_up(others[1]._channel)
    until(lambda: len(lost) == 2)  # each is gone for the other
    assert any("rank 2 is gone" in words for words in lost)


def test_workers_notice_that_rank_0_is_gone():
    workers, _, lost = connected(2)
    workers.tell({"step": []})
    hang_up(workers._channels[1])
    until(lambda: len(lost) == 2)  # each is gone for the other
    assert any("rank 0 is gone" in words for words in lost)


def test_a_worker_that_says_what_it_should_not_is_lost():
    """Rather than never heard again."""
    workers, others, lost = connected(2)
    others[0]._channel.send({"nonsense": 1})
    until(lambda: lost)
    assert "rank 1 is gone" in lost[0]


def test_strangers_are_let_in_nowhere_and_keep_nobody_out():
    arrivals = Arrivals(2)
    addresses = arrivals.listen(["127.0.0.1"], "secret")
    with pytest.raises((EOFError, OSError)):
        dial(addresses[0], "guess", 1.0)
    host, _, port = addresses[0].rpartition(":")
    with socket.create_connection((host, int(port))):  # says nothing
        reach(addresses, "secret").send({"rank": 1})
        assert list(arrivals.wait(soon(), HOSTS)) == [1]
    with pytest.raises(OSError):
        dial(addresses[0], "secret", 1.0)  # closed once all are here


def test_a_worker_that_does_not_come_is_named_in_time():
    arrivals = Arrivals(3)
    reach(arrivals.listen(["127.0.0.1"], "secret"), "secret").send({"rank": 1})
    with pytest.raises(CommunicationError, match="rank 2 on c .* firewall"):
        arrivals.wait(time.monotonic() + 0.1, HOSTS)


def test_an_address_that_is_not_ours_does_not_matter_beside_one_that_is():
    arrivals = Arrivals(2)
    assert len(arrivals.listen(["192.0.2.1", "127.0.0.1"], "secret")) == 1  # 192.0.2.0/24: nobody's
    with pytest.raises(CommunicationError, match="192.0.2.1"):
        Arrivals(2).listen(["192.0.2.1"], "secret")


def test_workers_try_all_addresses(monkeypatch):
    monkeypatch.setattr(control, "CONNECT", 2.0)
    closed = socket.create_server(("127.0.0.1", 0))
    nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    arrivals = Arrivals(2)
    reach([nobody, *arrivals.listen(["127.0.0.1"], "secret")], "secret").send({"rank": 1})
    assert list(arrivals.wait(soon(), HOSTS)) == [1]
    with pytest.raises(CommunicationError, match=f"cannot reach rank 0: {nobody}"):
        reach([nobody], "secret")


def test_a_program_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(control, "CONNECT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(CommunicationError, match="timed out"):
        reach([f"127.0.0.1:{silent.getsockname()[1]}"], "secret")


def test_rank_0_listens_where_the_backend_has_it(tmp_path: Path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.2:1", "127.0.0.3:2"], ["127.0.0.1:3"], "127.0.0.1:4"]))
    ring = Launch("mlx.launch", "ring", 0, 3)
    assert own_addresses(ring, {"MLX_HOSTFILE": str(hosts)}, HOSTS) == ["127.0.0.2", "127.0.0.3", "127.0.0.1"]
    jaccl = Launch("mlx.launch", "jaccl", 0, 3)
    assert own_addresses(jaccl, {"MLX_JACCL_COORDINATOR": "10.0.0.1:5"}, HOSTS) == ["10.0.0.1"]
    nccl = Launch("mlx.launch", "nccl", 0, 3)
    assert own_addresses(nccl, {"NCCL_HOST_IP": "10.0.0.2"}, HOSTS) == ["10.0.0.2"]


def test_over_mpi_rank_0_listens_where_the_others_are():
    mpi = Launch("mpirun", "mpi", 0, 3)
    assert own_addresses(mpi, {}, ["here", "here", "here"]) == ["127.0.0.1"]
    assert own_addresses(mpi, {}, ["here", "localhost", "no-such-host.invalid"]) == ["127.0.0.1"]
