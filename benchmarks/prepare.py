"""Time `gptlab prepare` beside tiktoken alone, and measure its peak memory on a large input.

    python benchmarks/prepare.py --text articles.txt --out docs/results/prepare.json

tiktoken has the documents in memory and leaves ids in memory; `prepare` reads a file twice, hashes, encodes and writes
shards that are synced to the disk. They take turns, on all cores that the process may use; the figures are medians.
Then `prepare` runs in processes of their own on generated files of ``--megabytes``. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tiktoken

from gptlab.text.documents import open_documents
from gptlab.text.shards import NewTokenizer, prepare
from gptlab.text.tokenizers import END_OF_TEXT, GPT2Tokenizer

CORES = len(os.sched_getaffinity(0))
MEGABYTE = 10**6


def sample(source: str, megabytes: int) -> list[str]:
    """The first documents of a corpus, as many as make up so many megabytes."""
    texts: list[str] = []
    size = 0
    for text in open_documents([source]):
        texts.append(text)
        size += len(text.encode())
        if size >= megabytes * MEGABYTE:
            break
    return texts


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock time, and processor time of all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def rates(texts: list[str], rounds: int) -> list[dict[str, Any]]:
    encoding = GPT2Tokenizer()._encoding  # tiktoken's own object

    def batch() -> None:
        encoding.encode_ordinary_batch(texts, num_threads=CORES)

    def arrays() -> None:
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(lambda text: encoding.encode_to_numpy(text, disallowed_special=()), texts))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.txt"
        with file.open("w", encoding="utf-8") as output:
            for text in texts:
                output.write(text if text.endswith("\n") else text + "\n")
                output.write(f"{END_OF_TEXT}\n")
        n_bytes = file.stat().st_size
        turn = iter(range(1000))

        def ours() -> None:
            prepare(open_documents([str(file)]), GPT2Tokenizer(), Path(folder) / str(next(turn)))

        programs = {"tiktoken, lists": batch, "tiktoken, arrays": arrays, "gptlab prepare": ours}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for round_ in range(rounds + 1):  # the first warms up
            for name, work in programs.items():
                taken = seconds(work)
                if round_:
                    times[name].append(taken)
    best = {name: statistics.median(wall for wall, _ in taken) for name, taken in times.items()}
    return [
        {
            "program": name,
            "megabytes_per_second": n_bytes / MEGABYTE / best[name],
            "megabytes_per_second_and_core": n_bytes / MEGABYTE / best[name] / CORES,
            "megabytes_per_processor_second": n_bytes / MEGABYTE / statistics.median(cpu for _, cpu in taken),
            "share_of_tiktoken": statistics.median(
                theirs[0] / ours[0] for theirs, ours in zip(times["tiktoken, lists"], taken, strict=True)
            ),
        }
        for name, taken in times.items()
    ]


def inputs(texts: list[str], megabytes: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write one input after the other; each is deleted before the next one is written."""
    separators = {"many documents": f"\n{END_OF_TEXT}\n", "one document": "\n", "one line without a space": ""}
    for name, separator in separators.items():
        file = folder / "input.txt"
        # A line without a space is cut at punctuation only; a tenth of the size shows it.
        target = megabytes * MEGABYTE // (10 if separator == "" else 1)
        with file.open("w", encoding="utf-8") as output:
            output.write("begin\n")
            while output.tell() < target:
                for text in texts:
                    output.write(("".join(text.split()) if separator == "" else text) + separator)
                    if output.tell() >= target:
                        break
            output.write("\nend\n")
        yield name, file
        file.unlink()


def measure(file: Path, kind: str, out: Path, results: Any) -> None:
    """What a process of its own does."""
    wall, _ = seconds(lambda: prepare(open_documents([str(file)]), NewTokenizer(kind), out))
    # Not ru_maxrss, which a new process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().split()
    results.put((wall, int(status[status.index("VmHWM:") + 1]) * 1024))


def memory(texts: list[str], megabytes: int, kinds: list[str]) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in inputs(texts, megabytes, Path(folder)):
            for kind in kinds:
                results = context.SimpleQueue()
                out = Path(folder) / f"{name}-{kind}"
                process = context.Process(target=measure, args=(file, kind, out, results))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"prepare failed on {name} with {kind}")
                wall, peak = results.get()
                rows.append(
                    {
                        "input": name,
                        "tokenizer": kind,
                        "megabytes": file.stat().st_size / MEGABYTE,
                        "peak_memory_megabytes": peak / MEGABYTE,
                        "megabytes_per_second": file.stat().st_size / MEGABYTE / wall,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--text", default="stdlib", help="a corpus as gptlab prepare takes it")
    parser.add_argument("--sample", type=int, default=60, help="megabytes of it for the rates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the inputs for the peak memory")
    parser.add_argument("--kinds", nargs="+", default=["gpt2", "chars"], help="tokenizers for the peak memory")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = sample(arguments.text, arguments.sample)
    n_bytes = sum(len(text.encode()) for text in texts)
    result = {
        "work": f"GPT-2's tokenizer, {n_bytes / MEGABYTE:.1f} MB of {Path(arguments.text).stem} in"
        f" {len(texts):,} documents",
        "cores": CORES,
        "rounds": arguments.rounds,
        "tiktoken": tiktoken.__version__,
        "python": platform.python_version(),
        "rates": rates(texts, arguments.rounds),
        "memory": memory(texts, arguments.megabytes, arguments.kinds),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
