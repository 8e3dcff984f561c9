# Clients that send slowly, do not read or only hold connections: real sockets.
from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.models import tiny_lm
from helpers.serving import Running, serving

from gptlab.serving import http, protocol

BODY = b'{"prompt": "a", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(BODY)
LONG = 4000
"""Tokens of a text that nobody here waits for."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_SECONDS", 0.6)
        patch.setattr(http, "BODY_SECONDS", 0.6)
        patch.setattr(protocol, "UNREAD_SECONDS", 0.6)
        patch.setattr(protocol, "MOST_CONNECTIONS", 4)
        with serving(tiny_lm(position="rope"), max_length=LONG, send_buffer=4096) as running:
            yield running


def drip(server: Running, content: bytes, before: bytes = b"") -> tuple[bytes, float]:
    """Send a byte every tenth of a second; return all that came back until the server closed, and when it did."""
    begun = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
        connection.sendall(before)
        for i in range(100):
            try:
                connection.sendall(content[i : i + 1])
                part = connection.recv(4096)
                if not part:
                    break
                received += part
            except TimeoutError:
                pass
            except OSError:
                break
    return received, time.monotonic() - begun


def error(received: bytes) -> tuple[int, str]:
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def slowed(server: Running, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    step = server.worker._rows.step

    def slowly() -> Any:
        time.sleep(seconds)
        return step()

    monkeypatch.setattr(server.worker._rows, "step", slowly)


@pytest.mark.parametrize(
    ("before", "dripped", "said"),
    [
        (b"", HEAD, "the request's head did not come within 1 seconds"),
        (b"", b"", "the request's head did not come within 1 seconds"),
        (HEAD, BODY + b" " * 80, "the body did not come within 1 seconds; send it at once"),
    ],
    ids=["head", "silent", "body"],
)
def test_a_slow_sender_is_told_and_its_connection_closed(
    server: Running, before: bytes, dripped: bytes, said: str
) -> None:
    if before:
        before = before.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: %d" % (len(BODY) + 80))
    received, seconds = drip(server, dripped, before)
    assert error(received) == (408, said)
    assert 0.5 < seconds < 5
    assert server.request("POST", "/v1/completions", BODY)[0] == 200


@pytest.mark.parametrize("path", [b"/health", b"/nowhere"])
def test_what_follows_an_answer_must_come_in_time_too(server: Running, path: bytes) -> None:
    before = b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 90\r\n\r\n"
    received, seconds = drip(server, b" " * 90, before)
    assert received.count(b"HTTP/1.1 ") == 1
    assert 0.5 < seconds < 5


def test_an_answer_may_take_longer_than_a_head(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for _ in range(2):  # the second over the same connection
            connection.sendall(HEAD + BODY)
            received = b""
            while b'"total_tokens"' not in received:  # head and body may come apart
                part = connection.recv(4096)
                assert part
                received += part
            assert received.startswith(b"HTTP/1.1 200")
            time.sleep(0.3)
    slowed(server, monkeypatch, 0.1)
    began = time.monotonic()
    status, answer = server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 12, "seed": 1})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 12)
    assert time.monotonic() - began > 1


def test_connections_beyond_the_limit_are_refused_and_others_live(server: Running) -> None:
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(4)]
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one_more:
            received = b""
            while part := one_more.recv(4096):
                received += part
        assert error(received) == (503, "the server has 4 connections already; close some, or wait")
        held[0].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.1)
    assert server.request("POST", "/v1/completions", BODY)[0] == 200


def ask_without_reading(server: Running, **body: Any) -> socket.socket:
    """Ask for a text with many numbers beside it, over a connection that holds few of them."""
    content = json.dumps({"prompt": "a", "temperature": 0, "logprobs": 20, **body}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(HEAD.replace(b"%d" % len(BODY), b"%d" % len(content)) + content)
    return connection


def test_a_stream_that_nobody_reads_gives_its_place_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(server, monkeypatch, 0.005)  # the whole text would take 20 seconds
    began = time.monotonic()
    with ask_without_reading(server, max_tokens=LONG, stream=True):
        while not server.worker.load[0] and time.monotonic() < began + 5:
            time.sleep(0.01)
        assert server.worker.load == (1, 0)
        assert server.idle()
        assert 0.5 < time.monotonic() - began < 10
        assert not server.connections
    assert server.request("POST", "/v1/completions", BODY)[0] == 200


def read(connection: socket.socket, pauses: int) -> tuple[int, int]:
    """Read an answer, the beginning in small parts with pauses between; return the bytes it should have, and has."""
    received, n_bytes = b"", 0
    for i in range(10**6):
        try:
            part = connection.recv(4096 if i < pauses else 65536)
        except ConnectionResetError:
            break
        received += part
        head, _, body = received.partition(b"\r\n\r\n")
        n_bytes = int(head.partition(b"content-length: ")[2].split()[0])
        if not part or len(body) == n_bytes:
            break
        if i < pauses:
            time.sleep(0.1)
    return n_bytes, len(received.partition(b"\r\n\r\n")[2])


def test_an_answer_is_cut_off_where_nothing_of_it_is_taken_and_not_where_little_is(server: Running) -> None:
    with ask_without_reading(server, max_tokens=200) as connection:
        assert connection.recv(16)  # it has begun
        end = time.monotonic() + 10
        while server.connections and time.monotonic() < end:
            time.sleep(0.01)
        assert not server.connections
    with ask_without_reading(server, max_tokens=200) as connection:
        should, has = read(connection, pauses=20)
        assert should == has > 50_000
