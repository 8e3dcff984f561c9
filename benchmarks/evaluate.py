"""Time the whole LAMBADA test with a model of GPT-2 124M's shape: gptlab beside transformers, the same random weights.

    python benchmarks/evaluate.py --data FILE [--out docs/results/evaluate.json] [--limit N] [--rounds 4] [--dtypes ...]

The work is `lambada:last-word`: the log-probability of the last word of each of 5,153 passages, and whether greedy
decoding gives it. The passages are dealt to rounds like cards; in each round every program does the same ones, one
after the other, in changing order. transformers runs twice: as evaluation programs use it, with the logits of every
position, and with those of the needed positions alone (`logits_to_keep`). Both get passages sorted by length.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import gptlab
from gptlab.evaluation.batches import DTYPES
from gptlab.evaluation.data import read
from gptlab.evaluation.pairs import encode_pair
from gptlab.evaluation.scoring import completion_logprobs
from gptlab.text.tokenizers import GPT2Tokenizer

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool]
BATCH = 16
"""Passages at once in transformers: with 50,257 logits each for some 90 positions, 290 MB of them."""


def ours(model: gptlab.GPT, pairs: list[Pair], dtype: str) -> list[Answer]:
    answers = completion_logprobs(model, pairs, dtype=dtype)
    return [(answer.logprobs.sum().item(), answer.greedy) for answer in answers]


@torch.inference_mode()
def theirs(model: torch.nn.Module, pairs: list[Pair], *, needed_only: bool) -> list[Answer]:
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        rows = [pairs[i][0] + pairs[i][1][:-1] for i in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        places = [range(len(pairs[i][0]) - 1, len(row)) for i, row in zip(batch, rows, strict=True)]
        kept = sorted({place for span in places for place in span}) if needed_only else list(range(longest))
        keep = torch.tensor(kept) if needed_only else 0
        # Padding stands on the right, where causal attention never looks.
        logits = model(ids, use_cache=False, logits_to_keep=keep).logits
        logprobs = torch.log_softmax(logits.float(), -1)
        at = {place: column for column, place in enumerate(kept)}
        for row, (i, span) in enumerate(zip(batch, places, strict=True)):
            part = logprobs[row, [at[place] for place in span]]
            answer = torch.tensor(pairs[i][1])
            greedy = torch.equal(part.argmax(-1), answer)
            answers[i] = (part[range(len(answer)), answer].sum().item(), greedy)
    return [answers[i] for i in range(len(pairs))]


def timed(work: Callable[[], list[Answer]]) -> tuple[float, list[Answer]]:
    started = time.perf_counter()
    answers = work()
    return time.perf_counter() - started, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="lambada_test.jsonl; by default from the cache or the network")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    arguments = parser.parse_args()
    tokenizer = GPT2Tokenizer()
    data = read("lambada", {"lambada": arguments.data} if arguments.data else None)
    texts = [item["text"] for item in data.items({"text": str})][: arguments.limit]
    pairs = [encode_pair(tokenizer, *split(text)) for text in texts]
    n_tokens = sum(len(before) + len(after) - 1 for before, after in pairs)
    rows = []
    for dtype in arguments.dtypes:
        model, judge = models(DTYPES[dtype])
        programs: dict[str, Callable[[list[Pair]], list[Answer]]] = {
            "gptlab": lambda part, m=model, d=dtype: ours(m, part, d),
            "transformers, all logits": lambda part, m=judge: theirs(m, part, needed_only=False),
            "transformers, needed logits": lambda part, m=judge: theirs(m, part, needed_only=True),
        }
        for work in programs.values():
            work(pairs[:BATCH])  # warms up
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        worst, unlike = 0.0, 0
        for round_ in range(arguments.rounds):
            part = pairs[round_ :: arguments.rounds]
            answers = {}
            names = list(programs)
            for name in names[round_ % 3 :] + names[: round_ % 3]:
                taken, answers[name] = timed(lambda work=programs[name], part=part: work(part))
                seconds[name].append(taken)
                print(f"{dtype} round {round_ + 1} {name:<28} {taken:7.1f} s for {len(part)} passages", flush=True)
            for other in names[1:]:
                both = list(zip(answers["gptlab"], answers[other], strict=True))
                worst = max(worst, *(abs(a[0] - b[0]) for a, b in both))
                unlike += sum(a[1] != b[1] for a, b in both)
        for name, taken in seconds.items():
            ratios = [t / o for t, o in zip(taken, seconds["gptlab"], strict=True)]
            rows.append(
                {
                    "program": name,
                    "dtype": dtype,
                    "seconds": sum(taken),
                    "passages_per_second": len(pairs) / sum(taken),
                    "tokens_per_second": n_tokens / sum(taken),
                    "gptlab_is_faster_by": statistics.median(ratios),
                    "largest_difference_in_nats": worst,
                    "greedy_answers_that_differ": unlike,
                }
            )
    result = {
        "work": f"lambada:last-word, {len(pairs):,} passages, {n_tokens:,} tokens, random weights of GPT-2 124M",
        "data": data.identity(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rows": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


def split(text: str) -> tuple[str, str]:
    """The passage without its last word, and that word with the space before it."""
    context, word = text.rsplit(" ", 1)
    return context, f" {word}"


def models(dtype: torch.dtype) -> tuple[gptlab.GPT, torch.nn.Module]:
    torch.manual_seed(0)
    judge = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    with tempfile.TemporaryDirectory() as folder:
        judge.save_pretrained(folder)
        model = gptlab.load(folder, dtype=dtype).model
    return model, judge.to(dtype)


if __name__ == "__main__":
    main()
