"""Who proves what to whom, and what strangers get. Real sockets."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from m3dist.cluster.handshake import CONNECTS, DIGEST, LISTENS, NONCE, admits, is_admitted, proof, receive

SECRET, OTHER = "a" * 64, "b" * 64
DEADLINE = 5.0  # seconds


def admitted(stranger: Callable[[socket.socket], object], seconds: float = DEADLINE) -> bool:
    """Whether the listener admits one who does this at the other end, and closes it at last."""
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as pool, ours:
        found = pool.submit(admits, ours, SECRET, seconds)
        with theirs:
            theirs.settimeout(DEADLINE)
            stranger(theirs)
        return found.result(DEADLINE)


def test_both_know_the_secret():
    """Not a byte of what follows is taken."""

    def peer(theirs: socket.socket) -> None:
        assert is_admitted(theirs, SECRET, DEADLINE)
        theirs.sendall(b"and then")

    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        run = pool.submit(peer, theirs)
        assert admits(ours, SECRET, DEADLINE)
        run.result()
        assert receive(ours, 8) == b"and then"


def test_another_secret():
    """It is refused, and gets no proof to work on."""

    def stranger(theirs: socket.socket) -> None:
        challenge = receive(theirs, NONCE)
        theirs.sendall(proof(OTHER, CONNECTS, challenge) + bytes(NONCE))

    assert not admitted(stranger)


def test_the_secret_is_never_sent_and_the_challenges_differ():
    seen = []

    def stranger(theirs: socket.socket) -> None:
        seen.append(receive(theirs, NONCE))
        theirs.sendall(bytes(DIGEST + NONCE))

    assert not any(admitted(stranger) for _ in range(3))
    assert len(set(seen)) == 3 and not any(SECRET.encode() in challenge for challenge in seen)


def test_an_old_answer_is_worth_nothing():
    old = proof(SECRET, CONNECTS, b"an old challenge".ljust(NONCE))
    assert not admitted(lambda theirs: theirs.sendall(old + bytes(NONCE)))


def test_neither_side_can_be_made_to_answer_for_the_other():
    """A stranger may have the challenge answered by a listener; and may send back what he was sent."""

    def reflected(theirs: socket.socket) -> None:
        challenge = receive(theirs, NONCE)
        theirs.sendall(proof(SECRET, LISTENS, challenge) + challenge)

    def mirror(theirs: socket.socket) -> None:
        challenge = receive(theirs, NONCE)
        theirs.sendall(challenge + challenge)

    assert not admitted(reflected) and not admitted(mirror)


@pytest.mark.parametrize("garbage", [b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200_000])
def test_garbage(garbage):
    def stranger(theirs: socket.socket) -> None:
        try:
            theirs.sendall(garbage)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass

    assert not admitted(stranger, 1.0)


def test_silence():
    """One who says nothing, or a byte now and then, is heard no longer than the time in all."""

    def slow(theirs: socket.socket) -> None:
        for _ in range(20):
            theirs.send(b" ")
            time.sleep(0.05)

    for stranger in (lambda theirs: time.sleep(1.0), slow):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            threading.Thread(target=stranger, args=(theirs,)).start()
            began = time.monotonic()
            assert not admits(ours, SECRET, 0.3)
            assert time.monotonic() - began < 0.8
            time.sleep(1.2)  # the stranger is done


@pytest.mark.parametrize("says", [bytes(NONCE + DIGEST), b"SSH-2.0-OpenSSH_9.9\r\n".ljust(NONCE + DIGEST)])
def test_another_program_listens(says):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(says)
        assert not is_admitted(theirs, SECRET, DEADLINE)


@pytest.mark.parametrize(("says", "error"), [(b"", TimeoutError), (b"220 smtp\r\n", TimeoutError), (None, EOFError)])
def test_a_listener_that_never_answers_or_leaves(says, error):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(says or b"")
        if says is None:
            ours.close()
        with pytest.raises(error):
            is_admitted(theirs, SECRET, 0.3)
