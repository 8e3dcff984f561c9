"""What a window does to a model that was trained without one, and what its first tokens have to do with it: seconds.

SmolLM2 reads a text about lighthouses with full attention, with a window, and with a window beside which the first four
tokens stay visible. Each time the loss of what lies beyond the window is printed, and how the model goes on.
"""

from __future__ import annotations

import importlib.resources
import textwrap

import torch

import gptlab
from gptlab.conversion.windows import narrow
from gptlab.evaluation.scoring import token_logprobs
from gptlab.language_model import LanguageModel
from gptlab.model import cost

WINDOW, SINKS = 128, 4
CONTEXT = 8192


def main() -> None:
    lm = gptlab.load("smollm2", dtype="float32")
    tokenizer = lm.needs_tokenizer()
    text = (importlib.resources.files("gptlab") / "assets" / "known_text.txt").read_text(encoding="utf-8").strip()
    ids = tokenizer.encode(text)
    marked = ids if tokenizer.start_of_text is None else [tokenizer.start_of_text, *ids]
    print(f"SmolLM2 reads {len(ids)} tokens about lighthouses. Nothing is trained; only what a query sees changes.")
    for label, window, sinks in (
        ("full attention", None, 0),
        (f"window of {WINDOW}", WINDOW, 0),
        (f"window of {WINDOW}, first {SINKS} tokens always visible", WINDOW, SINKS),
    ):
        model = lm.model if window is None else narrow(lm.model, window, sinks)
        with torch.inference_mode():
            loss = -token_logprobs(model, [marked])[0][WINDOW:].mean().item()
        size = cost.cache_bytes(model.config, CONTEXT, 2) / 2**20
        [more] = LanguageModel(model.eval(), tokenizer).generate(text, max_new_tokens=40, temperature=0)
        print(f"\n{label}: {loss:.2f} nats per token beyond {WINDOW} tokens, cache {size:.1f} MiB at {CONTEXT:,}")
        print(textwrap.fill("... " + " ".join(more.split()), 110, initial_indent="  ", subsequent_indent="  "))


if __name__ == "__main__":
    main()
