"""Rank 0's end of the link to the gateway: a real socket, and what must not end it without a word."""

import os
import socket

import pytest

from m3dist.cluster.channel import Channel
from m3dist.engine import link
from m3dist.engine.link import Gateway
from m3dist.errors import CommunicationError, M3Error


@pytest.fixture
def ends():
    """Rank 0's, and the gateway's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Gateway(Channel(ours.fileno(), ours.fileno())), Channel(theirs.fileno(), theirs.fileno())


def test_a_file_too_long_for_a_message_is_named(ends, monkeypatch):
    """It would end every life of the ranks, and the gateway could not say why."""
    monkeypatch.setattr(link, "LONGEST", 1000)
    gateway, other = ends
    gateway.tell({"hello": {"files": {"config.json": "{}"}}})
    assert other.receive() == {"hello": {"files": {"config.json": "{}"}}}
    with pytest.raises(M3Error, match="hello, the most of it tokenizer.json, has 10.. bytes"):
        gateway.tell({"hello": {"files": {"config.json": "{}", "tokenizer.json": "a" * 1000}}})


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


@pytest.mark.parametrize("error", [Panic("a library's mistake"), KeyError("a library's mistake")])
def test_whatever_befalls_the_thread_that_listens_the_loop_hears_of_it(ends, error):
    gateway, other = ends

    def take(message):
        if "bad" in message:
            raise error
        gateway.hand_on(message)

    gateway.listen(take)
    other.send({"good": 1})
    other.send({"bad": 1})
    assert gateway.hear(wait=True) == {"good": 1}
    with pytest.raises(RuntimeError, match="a library's mistake") as caught:
        gateway.hear(wait=True)
    assert caught.value.__cause__ is error


def test_the_loop_hears_of_the_gateway_s_end(ends):
    gateway, other = ends
    gateway.listen(gateway.hand_on)
    assert gateway.hear(wait=False) is None
    with socket.socket(fileno=os.dup(other.writing)) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(CommunicationError, match="the gateway is gone"):
        gateway.hear(wait=True)
