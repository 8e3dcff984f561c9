# Clients that send slowly or only hold connections: real sockets.
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


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "HEAD_SECONDS", 0.6)
        patch.setattr(http, "BODY_SECONDS", 0.6)
        patch.setattr(protocol, "MOST_CONNECTIONS", 4)
        with serving(tiny_lm()) as running:
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
    step = server.worker._rows.step

    def slowly() -> Any:
        time.sleep(0.1)
        return step()

    monkeypatch.setattr(server.worker._rows, "step", slowly)
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
