"""llama.cpp as a judge, through llama-cpp-python."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LLAMA = """
import json, sys
import llama_cpp, numpy
path, n_context, n_new, ids, texts, out = json.loads(sys.stdin.read())
options = dict(n_ctx=n_context, logits_all=True, verbose=False, n_threads=1)
llama = llama_cpp.Llama(path, type_k=0, type_v=0, **options)  # a cache in float32
words = [llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
llama.eval(ids)
found = []
for _ in range(n_new):
    found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
    llama.eval(found[-1:])
numpy.save(out, llama.scores[: llama.n_tokens])
print(json.dumps([words, found]))
"""


def in_llama_cpp(path: Path, n_context: int, n_new: int, ids: list[int], texts: list[str]) -> tuple[Any, Any, Any]:
    """What llama.cpp makes of a file, in a process of its own: the tokens of texts, its greedy text, all logits."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed; it has no wheel and takes ten minutes to build")
    out = path.with_suffix(".npy")
    asked = json.dumps([str(path), n_context, n_new, ids, texts, str(out)])
    done = subprocess.run(
        [sys.executable, "-c", LLAMA], input=asked, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == -signal.SIGILL:
        pytest.skip("llama-cpp-python was built for another processor; build it with GGML_NATIVE=OFF")
    assert done.returncode == 0, done.stderr
    words, continuation = json.loads(done.stdout)
    return words, continuation, np.load(out)
