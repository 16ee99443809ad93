"""What clients may send, how much and how slowly; keys. Over sockets, as hostile clients do it."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from gateways import DEADLINE, RunningGateway

from m3dist.gateway.limits import BODY, HEADERS, Keys

KEYS = ("first-key", "second-key")
HEAD = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[RunningGateway]:
    with RunningGateway() as running:
        yield running


def connect(gateway: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), DEADLINE)


def exchange(gateway: RunningGateway, *pieces: bytes, pause: float = 0.0) -> bytes:
    """All that comes back until the gateway closes the connection, or has told all that it will."""
    with connect(gateway) as connection:
        with suppress(OSError):  # it may have hung up already
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
            connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(65536):
                received += data
    return received


def status_and_error(response: bytes) -> tuple[int, str]:
    """The status, and the message of the JSON error."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys():
    with RunningGateway(keys=KEYS) as gateway:
        paths = ("/metrics", "/openapi.json", "/v1/nothing")
        for path in paths:
            response = httpx.get(gateway.url + path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{gateway.url}/v1/messages").json()["type"] == "error"
        good = [
            {"authorization": "Bearer first-key"},
            {"authorization": "bearer second-key"},
            {"x-api-key": "second-key"},
        ]
        for headers in good:
            assert [httpx.get(gateway.url + path, headers=headers).status_code for path in paths] == [200, 200, 404]
        bad = [
            {"authorization": "Bearer third"},
            {"authorization": "Basic first-key"},
            {"authorization": "first-key"},
            {"x-api-key": ""},
            {"x-api-key": "first-key "[:-2]},
        ]
        assert {httpx.get(f"{gateway.url}/metrics", headers=headers).status_code for headers in bad} == {401}
        assert httpx.get(f"{gateway.url}/health").status_code == 503  # starting; without a key


def test_names_of_keys():
    """The log and the scheduler know clients by these, never by a key."""
    keys = Keys(KEYS)
    assert keys.name_of([(b"x-api-key", b"second-key")]) == "key-2"
    assert keys.name_of([(b"authorization", b"Bearer first-key")]) == "key-1"
    assert keys.name_of([(b"authorization", b"Bearer \xff\x00")]) is None
    assert Keys().name_of([]) == ""


def test_a_body_is_not_read_without_a_key():
    with RunningGateway(keys=KEYS) as gateway:
        assert status_and_error(exchange(gateway, HEAD + b"Content-Length: 9999\r\n\r\n"))[0] == 401


def test_no_other_origin_may_read_an_answer(gateway: RunningGateway):
    asked = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    for response in (httpx.options(f"{gateway.url}/health", headers=asked), httpx.get(f"{gateway.url}/health")):
        assert not [name for name in response.headers if name.startswith("access-control")]


HOSTS = {
    "localhost:1": 404,
    "LOCALHOST": 404,
    "127.0.0.1": 404,
    "[::1]:80": 404,
    "192.168.1.5:80": 404,
    "page.example": 403,
    "localhost.page.example": 403,
    "127.0.0.1.page.example": 403,
    "": 403,
    "[": 403,
    "a b": 403,
    "\xff": 403,
}


@pytest.mark.parametrize("host", HOSTS)
def test_names_of_this_machine(gateway: RunningGateway, host: str):
    """Without keys a name that a page can have resolved to us is refused; whatever the header says, it is no 5xx."""
    response = httpx.get(f"{gateway.url}/v1/nothing", headers={"host": host.encode("latin-1")})
    assert response.status_code == HOSTS[host]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.2", 403), ("127.0.0.1", 403), ("0.0.0.0", 404)])
def test_names_of_this_machine_at_all_of_its_own_addresses(host: str, status: int):
    """At all for which m3dist serve asks for no key."""
    with RunningGateway(host=host) as gateway:
        response = httpx.get(f"{gateway.url}/v1/nothing", headers={"host": "page.example"})
        assert response.status_code == status


def test_other_names_with_a_key():
    with RunningGateway(keys=KEYS) as gateway:
        for host in ("mac1.example", "[", "a b", "\xff"):
            headers = {"host": host.encode("latin-1"), "x-api-key": KEYS[0].encode()}
            assert httpx.get(f"{gateway.url}/v1/nothing", headers=headers).status_code == 404


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_a_body_that_says_it_is_too_large(gateway: RunningGateway):
    """It is refused before it is sent."""
    response = exchange(gateway, HEAD + b"Content-Length: %d\r\n\r\n" % (BODY + 1))
    assert status_and_error(response) == (413, f"the request's body is larger than {BODY} bytes")


def test_a_body_that_becomes_too_large(gateway: RunningGateway):
    """Chunks, whose sum nobody announced. The client that sends it all reads why, and its connection goes on."""

    def chunks() -> Iterator[bytes]:
        for _ in range(BODY // 2**20 + 4):
            yield bytes(2**20)

    with httpx.Client(base_url=gateway.url, timeout=DEADLINE) as client:
        response = client.post("/v1/nothing", content=chunks())
        assert (response.status_code, response.json()["error"]["type"]) == (413, "invalid_request_error")
        assert client.get("/v1/nothing").status_code == 404
    gateway.wait_for(lambda: gateway.access._bodies.held == 0)


def test_the_memory_of_all_bodies_is_bounded(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m3dist.gateway.limits.BODIES", 300_000)
    connections = [connect(gateway) for _ in range(2)]
    for connection in connections:
        connection.sendall(HEAD + b"Content-Length: 150001\r\n\r\n" + bytes(140_000))
    gateway.wait_for(lambda: gateway.access._bodies.held == 280_000)
    response = httpx.post(f"{gateway.url}/v1/nothing", content=bytes(100_000))
    assert (response.status_code, response.headers["retry-after"]) == (503, "10")
    for connection in connections:
        connection.close()
    gateway.wait_for(lambda: gateway.access._bodies.held == 0)


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "in pieces"])
def test_headers_that_are_too_long(gateway: RunningGateway, cut: bool):
    head = HEAD + b"X: " + b"x" * HEADERS + b"\r\n\r\n"
    pieces = [head[i : i + 9000] for i in range(0, len(head), 9000)] if cut else [head]
    assert status_and_error(exchange(gateway, *pieces, pause=0.01 * cut))[0] == 431


def test_connections_are_bounded(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m3dist.gateway.limits.CONNECTIONS", 3)
    held = [connect(gateway) for _ in range(3)]
    time.sleep(0.1)
    assert status_and_error(exchange(gateway))[0] == 503
    for connection in held:
        connection.close()


NO_HTTP = {
    "noise": b"\x00\x01\x02\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "a length below 0": HEAD + b"Content-Length: -5\r\n\r\n",
    "an endless length": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
}


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP)
def test_what_is_no_http(gateway: RunningGateway, data: bytes):
    """It is refused in JSON, and the gateway goes on."""
    status, message = status_and_error(exchange(gateway, data))
    assert (status // 100, bool(message)) == (4, True)
    assert httpx.get(f"{gateway.url}/v1/nothing").status_code == 404


# ---------------------------------------------------------------------------------------------------------------------
# Slowness


def test_headers_that_come_too_slowly(monkeypatch: pytest.MonkeyPatch):
    """Byte by byte, each sooner than the limit; and not at all."""
    monkeypatch.setattr("m3dist.gateway.limits.HEADERS_SECONDS", 0.3)
    with RunningGateway() as gateway, connect(gateway) as silent:
        began = time.monotonic()
        response = exchange(gateway, *(HEAD[i : i + 1] for i in range(12)), pause=0.05)
        assert status_and_error(response)[0] == 408
        assert silent.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - began < 2.0


def test_a_body_that_comes_too_slowly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("m3dist.gateway.limits.BODY_SECONDS", 0.3)
    with RunningGateway() as gateway:
        response = exchange(gateway, HEAD + b"Content-Length: 12\r\n\r\n", *[b" "] * 10, pause=0.05)
        assert status_and_error(response)[0] == 408
        assert gateway.call(lambda: gateway.access._bodies.held) == 0


def test_a_refused_body_that_never_ends(monkeypatch: pytest.MonkeyPatch):
    """It is let by for a while only."""
    monkeypatch.setattr("m3dist.gateway.limits.HEADERS_SECONDS", 0.3)
    with RunningGateway(keys=KEYS) as gateway, connect(gateway) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        with pytest.raises(OSError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.02)
