# Many clients at once, some of whom leave midway.
from __future__ import annotations

import collections
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

CLIENTS, SECONDS = 200, 20.0


def talk(port: int, seed: int, end: float, counts: collections.Counter[str]) -> None:
    """Ask for texts of mixed lengths until the time is over; leave one answer in ten midway."""
    draw = random.Random(seed)
    while time.monotonic() < end:
        stream, leaves = draw.random() < 0.5, draw.random() < 0.1
        body = {"prompt": "The city of " * draw.randint(1, 60), "max_tokens": draw.randint(1, 150), "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body))
            if leaves and not stream:
                time.sleep(draw.random() / 2)
                counts["left"] += 1
                continue
            response = connection.getresponse()
            counts[str(response.status)] += 1
            if response.status == 429:
                time.sleep(0.5 + draw.random())
            elif leaves and stream:
                response.readline()
                counts["left"] += 1
            elif stream:
                counts["broken"] += not response.read().endswith(b"data: [DONE]\n\n")
            else:
                counts["tokens"] += json.loads(response.read())["usage"]["completion_tokens"]
        except (OSError, http.client.HTTPException) as error:
            counts[f"error {error!r}"] += 1
        finally:
            connection.close()


@pytest.mark.slow
def test_two_hundred_clients_get_answers_or_429_and_memory_stays_flat() -> None:
    command = [sys.executable, "-m", "gptlab", "serve", "--port", "0", "--queue", "100"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = re.search(r":(\d+)/v1", process.stderr.readline())
        assert found
        port, counts = int(found[1]), collections.Counter[str]()
        end = time.monotonic() + SECONDS
        clients = [threading.Thread(target=talk, args=(port, i, end, counts)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        memory = []
        while time.monotonic() < end:
            time.sleep(1)
            memory.append(psutil.Process(process.pid).memory_info().rss)
        for client in clients:
            client.join()
        assert counts["200"] > CLIENTS / 2
        assert counts["429"] > 0
        assert counts["left"] > 0
        assert counts["tokens"] > 0
        assert set(counts) <= {"200", "429", "left", "tokens", "broken"}
        assert counts["broken"] == 0
        assert max(memory[10:]) < 1.1 * max(memory[:10])
        time.sleep(1)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read()) == {"status": "ok", "running": 0, "waiting": 0}
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
