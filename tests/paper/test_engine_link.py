"""Rank 0's end of the link to the gateway: a real socket, and what must not end it without a word."""

import socket

import pytest

from m3dist.cluster.channel import Channel
from m3dist.engine import link
from m3dist.engine.link import Gateway
from m3dist.errors import CommunicationError


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
    with pytest.raises(CommunicationError, match="hello, the most of it tokenizer.json, has 10.. bytes"):
        gateway.tell({"hello": {"files": {"config.json": "{}", "tokenizer.json": "a" * 1000}}})
