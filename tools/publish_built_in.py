"""Turn a training run into a model that the package carries: bfloat16 weights, tokenizer and figures.

    python tools/publish_built_in.py runs/pocket pocket --corpus enwiki.txt

The figures are those of the weights as shipped, rounded to bfloat16, not of the run's own.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

import gptlab
from gptlab.checkpoints.files import write_files
from gptlab.text.corpora import read_corpus
from gptlab.training.data import tokenize
from gptlab.training.loop import total_loss
from gptlab.verification import bits_per_byte, known_text

ASSETS = Path(gptlab.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--corpus", required=True, help="the one that the run was trained on")
    arguments = parser.parse_args()

    metrics = json.loads((arguments.run / "result.json").read_text())["metrics"]
    recipe = json.loads((arguments.run / "recipe.json").read_text())
    corpus = read_corpus(arguments.corpus)
    if corpus.sha256 != metrics["corpus_sha256"]:
        raise SystemExit(f"{arguments.corpus} is not the corpus of {arguments.run}")
    target = ASSETS / arguments.name
    gptlab.save(gptlab.load(arguments.run), target, dtype=torch.bfloat16)
    lm = gptlab.load(target)
    _, held_out = corpus.split(recipe["train"]["held_out"])
    stream = tokenize(held_out, lm.needs_tokenizer())
    nats = total_loss(lm.model, stream, lm.config.context_length)
    card = metrics | {
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "held_out_nats_per_token": nats / (len(stream) - 1),
        "held_out_bits_per_byte": nats / math.log(2) / held_out.n_bytes,
        "known_text_bits_per_byte": bits_per_byte(lm, known_text()),
        "file_bytes": (target / "model.safetensors").stat().st_size,
        "recipe": recipe,
    }
    write_files(target, {"card.json": json.dumps(card, indent=2).encode() + b"\n"})
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
