# `gptlab serve` as a user starts and stops it.
from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from gptlab import GptlabError
from gptlab.serving.listening import check_access, listen

COMMAND = [sys.executable, "-m", "gptlab", "serve", "--port", "0", "--model", "pocket-rope"]


def test_ctrl_c_finishes_what_has_begun_and_ends_cleanly() -> None:
    process = subprocess.Popen(COMMAND, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = re.match(r"pocket-rope answers at (http://127\.0\.0\.1:\d+)/v1, \d+ texts", process.stderr.readline())
        assert found
        body = json.dumps({"prompt": "The", "max_tokens": 200, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{found[1]}/v1/completions", body), timeout=20) as stream:
            first = stream.readline()
            process.send_signal(signal.SIGINT)
            rest = stream.read()
        assert first.startswith(b"data: {")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0
        assert process.stderr.read() == "stopped\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_other_machines_need_a_key() -> None:
    with pytest.raises(GptlabError, match=r"0\.0\.0\.0 can be reached from other machines, which needs a key"):
        check_access("0.0.0.0", None)
    with pytest.raises(GptlabError, match="the API key is empty"):
        check_access("127.0.0.1", " ")
    for host in ("127.0.0.1", "::1", "localhost"):
        check_access(host, None)
    check_access("0.0.0.0", "secret")


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(GptlabError, match=r"port \d+ cannot be listened on"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(GptlabError, match="a port is 0 to 65535, got 70000"):
        listen("127.0.0.1", 70000)
