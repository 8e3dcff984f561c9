"""Time generation beside transformers, llama.cpp, ONNX Runtime and CTranslate2: the same random weights of GPT-2 124M.

    python benchmarks/peers.py [--peers PYTHON] [--out docs/results/peers.json] [--only WORK ...]

Every program runs in a process of its own, with weights that `gptlab export` wrote, and as many threads as the others.
They take turns; a ratio is the median over the rounds of two programs' times in the same round, and the bandwidth of
the memory is measured in every round, since on a shared machine both drift. ``--peers`` is the interpreter of the
environment that holds the other programs; one that is not there is left out, with the reason. What ``--out`` holds of
other work than ``--only`` names is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import gptlab
from gptlab.benchmark import Probe, in_precisions, times, weight_bytes
from gptlab.exporting import export
from gptlab.model import cost
from gptlab.study.measure import machine
from gptlab.text.tokenizers import GPT2Tokenizer

HERE = Path(__file__).parent
Program = tuple[str, str]  # its name and a precision
INT8 = ("gptlab", "int8")
WORKS: dict[str, dict[str, Any]] = {
    "decode 1": {"work": "decode", "batch": 1, "prompt": 128, "new": 128},
    "decode 8": {"work": "decode", "batch": 8, "prompt": 128, "new": 64},
    "decode 32": {"work": "decode", "batch": 32, "prompt": 128, "new": 32},
    "prefill": {"work": "prefill", "batch": 1, "prompt": 1024, "new": 0},
}
"""What is timed: new tokens after a prompt, in so many sequences; or the prompt."""
PROGRAMS: list[Program] = [
    *(("gptlab", dtype) for dtype in ("float32", "bfloat16", "int8", "int4")),
    *(("llama.cpp", kind) for kind in ("float32", "bfloat16", "8-bit", "4-bit")),
    *(("ONNX Runtime", kind) for kind in ("float32", "8-bit", "4-bit")),
    *(("transformers", dtype) for dtype in ("float32", "bfloat16")),
    *(("CTranslate2", kind) for kind in ("float32", "bfloat16", "8-bit")),
]
TARGETS: list[tuple[str, str, list[Program], float | None]] = [
    ("decode 1", "float32", [("llama.cpp", "float32"), ("ONNX Runtime", "float32")], 1.1),
    ("decode 1", "float32", [("transformers", "float32")], 2.5),
    ("decode 1", "bfloat16", [("llama.cpp", "bfloat16")], 1.0),
    ("decode 1", "bfloat16", [("transformers", "bfloat16")], 3.5),
    ("decode 1", "int8", [("llama.cpp", "8-bit")], 1.2),
    ("decode 1", "int8", [("ONNX Runtime", "8-bit")], 1.1),
    ("decode 1", "int8", [("transformers", "bfloat16")], 5.0),
    ("decode 1", "int4", [("llama.cpp", "4-bit")], None),
    ("decode 8", "int8", [("ONNX Runtime", "8-bit")], 1.2),
    ("decode 32", "int8", [("ONNX Runtime", "8-bit")], 1.5),
    ("prefill", "float32", [("ONNX Runtime", "float32")], 1.0),
    ("prefill", "bfloat16", [("transformers", "bfloat16")], 1.3),
    ("prefill", "int8", [("ONNX Runtime", "8-bit"), ("CTranslate2", "8-bit")], 1.3),
]
"""Work, precision, the programs that gptlab is to be faster than, and by how much; None: no claim is made."""
QUANTISE = """
import sys, llama_cpp as llama
settings = llama.llama_model_quantize_default_params()
settings.ftype, settings.pure = llama.LLAMA_FTYPE_MOSTLY_Q4_0, True
llama.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), settings)
"""
CONVERT = """
import pathlib, sys
from ctranslate2.converters import TransformersConverter
config = pathlib.Path(TransformersConverter(sys.argv[1]).convert(sys.argv[2])) / "config.json"
config.write_text(config.read_text().replace('"unk_token": null', '"unk_token": "<|endoftext|>"'))  # it must be a text
"""


def write_models(folder: Path, peers: str) -> tuple[dict[str, str], dict[str, str]]:
    """Write the model for every program; return the files by kind, and why others are not there."""
    own, hf = folder / "gptlab", folder / "hf"
    gptlab.save(gptlab.LanguageModel(gptlab.GPT(gptlab.ModelConfig.preset("gpt2")), GPT2Tokenizer()), own)
    export(own, hf, verify=False)
    files, missing = {"hf": str(hf)}, {}
    for kind in ("f32", "bf16", "q8_0"):
        export(own, folder / f"{kind}.gguf", format="gguf", verify=False, planning={"type": kind})
        files[kind] = str(folder / f"{kind}.gguf")
    for kinds, arguments in {
        ("q4_0",): ["-c", QUANTISE, files["f32"], folder / "q4_0.gguf"],
        ("onnx", "onnx8", "onnx4"): [HERE / "peers_onnx.py", hf, folder],
        ("ct2",): ["-c", CONVERT, hf, folder / "ct2"],
    }.items():
        command = [peers, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
        places = {
            "q4_0": "q4_0.gguf",
            "onnx": "model.onnx",
            "onnx8": "model8.onnx",
            "onnx4": "model4.onnx",
            "ct2": "ct2",
        }
        for kind in kinds:
            if done.returncode or not (folder / places[kind]).exists():
                missing[kind] = (done.stderr.strip().splitlines() or ["nothing was written"])[-1]
            else:
                files[kind] = str(folder / places[kind])
    return files, missing


def environment() -> dict[str, str]:
    """Of a worker: this gptlab, and nothing from the network."""
    source = str(Path(gptlab.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """A program that waits for its turn."""

    def __init__(self, python: str, asked: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, str(HERE / "peers_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment(), "OMP_NUM_THREADS": str(asked["threads"])},
        )
        self.ready = self.ask(json.dumps(asked)) or {"error": "it ended without a word"}

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(line, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return None

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, programs: list[Program], files: dict[str, str], peers: str, rounds: int) -> dict[str, Any]:
    """Time one work; return what was measured, with every program's seconds in the order of the rounds."""
    work, threads = WORKS[name], torch.get_num_threads()
    workers: dict[Program, Worker] = {}
    skipped: dict[str, str] = {}
    cautious: list[str] = []  # those that do not run with llama.cpp's kernels for AMX
    for program in programs:  # one after the other: starting is work, too
        asked = {**work, "program": program[0], "precision": program[1], "threads": threads, "files": files}
        python = sys.executable if program[0] in ("gptlab", "transformers") else peers
        worker = Worker(python, asked | {"cautious": False})
        if program[0] == "llama.cpp" and "error" in worker.ready:
            worker.end()
            worker = Worker(python, asked | {"cautious": True})
            cautious.append(" ".join(program))
        if "error" in worker.ready:
            skipped[" ".join(program)] = worker.ready["error"]
            worker.end()
        else:
            workers[program] = worker
        print(f"{name}: {' '.join(program)} is ready", file=sys.stderr, flush=True)
    probe, n = Probe(), work["new"] or work["prompt"]
    seconds: dict[Program, list[float]] = {program: [] for program in workers}
    for round_ in range(rounds):
        probe()
        for program, worker in workers.items():
            time.sleep(0.2)  # threads of the one before go to sleep
            seconds[program].append(worker.ask(f"go {n}"))
        print(f"{name}: round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = [
        {
            "program": program[0],
            "precision": program[1],
            "version": workers[program].ready["version"],
            "first_token": workers[program].ready["first"],
            "tokens_per_second": work["batch"] * n / statistics.median(taken),
            "times": times(taken).model_dump(),
        }
        for program, taken in seconds.items()
    ]
    for worker in workers.values():
        worker.end()
    return {**work, "date": datetime.now(UTC).isoformat(timespec="minutes"), "rounds": rounds, "skipped": skipped} | {
        "without_special_buffers": [name for name in cautious if name not in skipped],
        "bandwidth": probe.result().model_dump(),
        "rows": rows,
    }


def limits(work: dict[str, Any], model: gptlab.GPT) -> None:
    """Add to gptlab's rows of a decoding work the share of the bandwidth that they reach."""
    if work["work"] != "decode":
        return
    for row in (row for row in work["rows"] if row["program"] == "gptlab"):
        same = in_precisions(model, (row["precision"],))[row["precision"]]
        position = work["prompt"] + work["new"] // 2
        keys = cost.decode_bytes(model.config, position, same.cache_dtype.itemsize, batch=work["batch"])[1]
        read = weight_bytes(same, work["batch"]) + keys
        limit = work["batch"] * work["bandwidth"]["bytes_per_second"] / read
        row |= {"bytes_per_step": read, "limit_tokens_per_second": limit, "share": row["tokens_per_second"] / limit}


def ratios(works: dict[str, Any]) -> list[dict[str, Any]]:
    """gptlab's speed over the best of other programs', by `TARGETS`: medians over rounds."""
    found = []
    for name, precision, others, target in TARGETS:
        if name not in works:
            continue
        seconds = {(row["program"], row["precision"]): row["times"]["seconds"] for row in works[name]["rows"]}
        ours = seconds.get(("gptlab", precision))
        there = [other for other in others if other in seconds]
        if ours is None or not there:
            continue
        by_other = {
            other: statistics.median(b / a for a, b in zip(ours, seconds[other], strict=True)) for other in there
        }
        best = min(by_other, key=lambda other: by_other[other])
        found.append(
            {
                "work": name,
                "precision": precision,
                "beside": " ".join(best),
                "not_there": [" ".join(other) for other in others if other not in seconds],
                "ratio": by_other[best],
                "target": target,
            }
        )
    return found


def show(works: dict[str, Any]) -> None:
    for name, work in works.items():
        print(f"\n{name}: {work['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s, {work['rounds']} rounds")
        for row in work["rows"]:
            share = f"   {100 * row['share']:.0f}% of the bandwidth" if "share" in row else ""
            print(f"  {row['program']:<13} {row['precision']:<9} {row['tokens_per_second']:>8,.1f} tokens/s{share}")
        if work["without_special_buffers"]:
            print(f"  crashed, and run with use_extra_bufts off: {', '.join(work['without_special_buffers'])}")
        for program, reason in work["skipped"].items():
            print(f"  {program} is left out: {reason}")
    print()
    for row in ratios(works):
        target = "no target" if row["target"] is None else f"target {row['target']:.1f}"
        verdict = "" if row["target"] is None else "  reached" if row["ratio"] >= row["target"] else "  MISSED"
        beside = f"{row['work']}, {row['precision']} beside {row['beside']}"
        print(f"{beside:<50} {row['ratio']:5.2f}  ({target}){verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", default=sys.executable, help="interpreter of the other programs' environment")
    parser.add_argument("--out", type=Path, default=Path("docs/results/peers.json"))
    parser.add_argument("--only", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--programs", nargs="+", choices=sorted({name for name, _ in PROGRAMS}))
    parser.add_argument("--precisions", nargs="+", choices=sorted({kind for _, kind in PROGRAMS}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, help="keep the models that are written in this directory, for next time")
    arguments = parser.parse_args()
    programs = [
        (name, kind)
        for name, kind in PROGRAMS
        if name in (arguments.programs or [name]) and kind in (arguments.precisions or [kind])
    ]
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.models or Path(scratch)
        listing = folder / "files.json"
        if not listing.exists():
            files, missing = write_models(folder, arguments.peers)
            listing.write_text(json.dumps([files, missing]), encoding="utf-8")
        files, missing = json.loads(listing.read_text(encoding="utf-8"))
        for kind, reason in missing.items():
            print(f"no {kind} model: {reason}", file=sys.stderr)
        model = gptlab.GPT(gptlab.ModelConfig.preset("gpt2"))
        works: dict[str, Any] = {}
        if arguments.out and arguments.out.exists():
            works = json.loads(arguments.out.read_text(encoding="utf-8"))["works"]
        for name in arguments.only:
            works[name] = compare(name, programs, files, arguments.peers, arguments.rounds)
            limits(works[name], model)
            works = {name: works[name] for name in WORKS if name in works}
            if arguments.out:
                write(arguments.out, works)
    show(works)


def write(out: Path, works: dict[str, Any]) -> None:
    result = {
        "model": "random weights of GPT-2 124M",
        "machine": machine(torch.device("cpu")).model_dump(),
        "works": works,
        "ratios": ratios(works),
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
