"""One program of benchmarks/peers.py, in a process of its own.

The first line of standard input says in JSON what to do. Then every line ``go N`` is answered by the seconds that N new
tokens took (of each sequence, after the first), or the reading of N tokens where a prompt is read. Before that it says
which token it would choose after the prompt of the first sequence, so that they can be seen to compute the same.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Go = Callable[[int], float]
VOCABULARY = 50257
first: list[int] = []
"""The token after each prompt that was read in full."""


def prompts(batch: int, length: int) -> list[list[int]]:
    """Rows of ids that differ, so that no program can read one for all."""
    return [[(7919 * (row + 1) * (i + 1)) % 50000 for i in range(length)] for row in range(batch)]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def gptlab(asked: dict[str, Any]) -> Go:
    import torch

    torch.set_num_threads(asked["threads"])
    from gptlab import load
    from gptlab.benchmark import in_precisions
    from gptlab.generation.compiled.decoder import Compiled, serves
    from gptlab.generation.engine import decode
    from gptlab.generation.sampling import Sampling

    model = in_precisions(load(asked["files"]["hf"], tokenizer="gpt2").model, (asked["precision"],))[asked["precision"]]
    if not serves(model, 4096):
        raise RuntimeError("there is no compiled step")
    rows = prompts(asked["batch"], asked["prompt"])

    class Grows:  # a text that nobody decodes; the others' are not decoded either
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.finish = None

        def add(self, token: int) -> str:
            self.tokens.append(token)
            return ""

        def close(self, reason: str) -> str:
            return ""

    def new_tokens(n: int) -> float:
        texts: list[Any] = [Grows() for _ in rows]
        pieces = decode(model, rows, texts, sampling=Sampling(0.0), max_new_tokens=n + 1, vocab_size=VOCABULARY)
        for _ in rows:
            next(pieces)
        first.append(texts[0].tokens[0])
        return seconds(lambda: list(pieces))

    @torch.inference_mode()
    def read(n: int) -> float:
        started = time.perf_counter()
        logits = Compiled(model, [rows[0][:n]], n).read()
        taken = time.perf_counter() - started
        first.append(int(logits[0].argmax()))
        return taken

    return read if asked["work"] == "prefill" else new_tokens


def transformers(asked: dict[str, Any]) -> Go:
    import torch

    torch.set_num_threads(asked["threads"])
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(asked["files"]["hf"]).to(getattr(torch, asked["precision"])).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    ids = torch.tensor(prompts(asked["batch"], asked["prompt"]))
    mask = torch.ones_like(ids)

    def generate(n: int) -> None:
        text = model.generate(ids, attention_mask=mask, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        first.append(int(text[0, ids.shape[1]]))

    def new_tokens(n: int) -> float:
        return seconds(lambda: generate(n + 1)) - seconds(lambda: generate(1))

    @torch.inference_mode()
    def read(n: int) -> float:
        started = time.perf_counter()
        logits = model(ids[:, :n], logits_to_keep=1, use_cache=True).logits
        taken = time.perf_counter() - started
        first.append(int(logits[0, -1].argmax()))
        return taken

    return read if asked["work"] == "prefill" else new_tokens


def llama_cpp(asked: dict[str, Any]) -> Go:
    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p())
    path = asked["files"][{"float32": "f32", "bfloat16": "bf16", "8-bit": "q8_0", "4-bit": "q4_0"}[asked["precision"]]]
    loading = llama.llama_model_default_params()
    loading.use_extra_bufts = not asked["cautious"]
    model = llama.llama_model_load_from_file(str(path).encode(), loading)
    rows = prompts(asked["batch"], asked["prompt"])
    settings = llama.llama_context_default_params()
    settings.n_ctx = len(rows) * (asked["prompt"] + asked["new"] + 8)
    settings.n_seq_max, settings.n_batch = len(rows), max(2048, len(rows) * asked["prompt"])
    settings.n_threads = settings.n_threads_batch = asked["threads"]
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)

    def feed(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
            batch.logits[i] = wanted
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        wanted_at = [i for i, token in enumerate(tokens) if token[3]]
        return [
            int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), shape=(VOCABULARY,)).argmax())
            for i in wanted_at
        ]

    def read_all(n: int) -> list[int]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        tokens = [(t, i, b, i == n - 1) for b, row in enumerate(rows) for i, t in enumerate(row[:n])]
        if asked["work"] == "decode" and len(rows) == 1:
            for token in tokens[:-1]:  # its AMX kernels, for several tokens at once, do not run everywhere
                feed([token])
            tokens = tokens[-1:]
        chosen = feed(tokens)
        first.append(chosen[0])
        return chosen

    def new_tokens(n: int) -> float:
        chosen = read_all(asked["prompt"])

        def steps() -> None:
            nonlocal chosen
            for i in range(n):
                chosen = feed([(token, asked["prompt"] + i, row, True) for row, token in enumerate(chosen)])

        return seconds(steps)

    return (lambda n: seconds(lambda: read_all(n))) if asked["work"] == "prefill" else new_tokens


def onnxruntime(asked: dict[str, Any]) -> Go:
    import numpy as np
    import onnxruntime as ort
    from peers_onnx import HEAD_DIM, HEADS, LAYERS

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = asked["threads"], 3
    path = asked["files"][{"float32": "onnx", "8-bit": "onnx8", "4-bit": "onnx4"}[asked["precision"]]]
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rows = np.array(prompts(asked["batch"], asked["prompt"]), dtype=np.int64)
    length, n_rows = asked["prompt"] + asked["new"] + 1, len(rows)
    caches = {
        f"{kind}_{i}": ort.OrtValue.ortvalue_from_numpy(np.zeros((n_rows, HEADS, length, HEAD_DIM), np.float32))
        for i in range(LAYERS)
        for kind in ("key", "value")
    }

    def feed(ids: Any, past: int) -> Any:
        total = past + ids.shape[1]
        binding = session.io_binding()
        inputs = {
            "ids": ids,
            "positions": np.broadcast_to(np.arange(past, total), ids.shape).copy(),
            "lengths": np.full(n_rows, total - 1, np.int32),
            "total": np.array([total], np.int32),
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, cache in caches.items():  # the new keys and values are written where the old ones are
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        chosen = binding.get_outputs()[-1].numpy().argmax(-1)[:, None].astype(np.int64)
        if not past:
            first.append(int(chosen[0, 0]))
        return chosen

    def new_tokens(n: int) -> float:
        chosen = feed(rows, 0)

        def steps() -> None:
            nonlocal chosen
            for i in range(n):
                chosen = feed(chosen, asked["prompt"] + i)

        return seconds(steps)

    return (lambda n: seconds(lambda: feed(rows[:, :n], 0))) if asked["work"] == "prefill" else new_tokens


def ctranslate2(asked: dict[str, Any]) -> Go:
    import ctranslate2 as ct

    kind = {"float32": "float32", "bfloat16": "bfloat16", "8-bit": "int8"}[asked["precision"]]
    generator = ct.Generator(asked["files"]["ct2"], compute_type=kind, intra_threads=asked["threads"], inter_threads=1)
    words = json.loads((Path(asked["files"]["ct2"]) / "vocabulary.json").read_text(encoding="utf-8"))
    rows = [[words[token] for token in row] for row in prompts(asked["batch"], asked["prompt"])]

    def generate(texts: list[list[str]], n: int) -> None:
        made = generator.generate_batch(
            texts, max_length=n, min_length=n, beam_size=1, sampling_topk=1, include_prompt_in_result=False
        )
        if len(texts[0]) == asked["prompt"]:
            first.append(made[0].sequences_ids[0][0])

    def new_tokens(n: int) -> float:
        return seconds(lambda: generate(rows, n + 1)) - seconds(lambda: generate(rows, 1))

    def read(n: int) -> float:  # the last token of the context is the one that is generated
        return seconds(lambda: generate([rows[0][: n - 1]], 1))

    return read if asked["work"] == "prefill" else new_tokens


PROGRAMS: dict[str, tuple[str, Callable[[dict[str, Any]], Go]]] = {
    "gptlab": ("torch", gptlab),
    "transformers": ("transformers", transformers),
    "llama.cpp": ("llama-cpp-python", llama_cpp),
    "ONNX Runtime": ("onnxruntime", onnxruntime),
    "CTranslate2": ("ctranslate2", ctranslate2),
}
"""Each with the package whose version counts."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    asked = json.loads(sys.stdin.readline())
    package, prepare = PROGRAMS[asked["program"]]
    try:
        go = prepare(asked)
        go(asked["prompt"] if asked["work"] == "prefill" else 8)
        version = f"{package} {importlib.metadata.version(package)}"
        answer({"version": version, "first": first[0] if first else None})
        for line in sys.stdin:
            answer(go(int(line.split()[1])))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})


if __name__ == "__main__":
    main()
