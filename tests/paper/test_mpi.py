"""An agent under mpirun and the launcher's control port: who gets a channel. Real sockets."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from m3dist.cluster import mpi
from m3dist.cluster.channel import Channel, ChannelClosed
from m3dist.cluster.environment import LaunchError
from m3dist.cluster.hostfile import Host

SECRET, OTHER = "a" * 64, "b" * 64


def agent(port: int, secret: str = SECRET) -> Channel:
    return mpi.connect({"OMPI_COMM_WORLD_RANK": "3", mpi.CONTROL: f"127.0.0.1:{port}", mpi.SECRET: secret})


@pytest.fixture
def port() -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener, listener.getsockname()[1]


def test_both_know_the_secret(port):
    """The launcher learns the rank; afterwards messages pass, without a time limit of the handshake's."""
    listener, number = port
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(agent, number)
        connection, _ = listener.accept()
        rank, channel = mpi.meet(connection, SECRET)
        connection.detach()
    assert rank == 3
    channel.send({"hello": "agent"})
    assert there.result().receive(5) == {"hello": "agent"}
    for end in (channel, there.result()):
        assert os.get_blocking(end.reading)
        end.close()


def test_an_agent_of_another_launch(port):
    """It is refused, and says where it tried."""
    listener, number = port
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(agent, number, OTHER)
        connection, _ = listener.accept()
        with connection, pytest.raises(ChannelClosed, match="a stranger"):
            mpi.meet(connection, SECRET)
    with pytest.raises(LaunchError, match=rf"rank 3 on \S+ cannot reach the launcher: 127.0.0.1:{number}: it is not"):
        there.result()


def test_one_that_does_not_say_its_rank(port, monkeypatch):
    listener, number = port
    monkeypatch.setattr(mpi, "HANDSHAKE", 0.3)
    with socket.create_connection(("127.0.0.1", number)) as peer, ThreadPoolExecutor(1) as pool:
        there = pool.submit(mpi.is_admitted, peer, SECRET, 5.0)
        connection, _ = listener.accept()
        with connection, pytest.raises(ChannelClosed, match="does not say"):
            mpi.meet(connection, SECRET)
        assert there.result()


def test_nobody_at_the_port(port):
    listener, number = port
    listener.close()
    with pytest.raises(LaunchError, match=f"127.0.0.1:{number}: .*refused"):
        agent(number)


def test_only_a_daemon_of_mpirun_is_ended():
    """Not a shell, say, whose child this is."""
    program = "from m3dist.cluster import mpi; mpi.end_daemon()"
    done = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert done.returncode == 0  # and we are still here


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ((Host("mac1", user="ann"), Host("mac1", user="bob")), "host mac1: mpirun can start ranks there as one user"),
        ((Host("mac1", port=22), Host("mac1", port=2222)), "host mac1: .* on one port"),
        ((Host("a:2"),), "host a:2: a name with , or :"),
        ((Host("a,b"),), "host a,b: a name with , or :"),
    ],
)
def test_hosts_that_mpirun_cannot_tell_apart(hosts, said):
    with pytest.raises(LaunchError, match=said):
        mpi.check_names(hosts)
    mpi.check_names((Host("mac1", user="ann"), Host("mac2", user="bob"), Host("mac1", user="ann")))
