"""Turn a trained model into one that the package carries: bfloat16 weights, tokenizer and figures.

    gptlab prepare enwiki.txt --tokenizer bpe --held-out 0.01 --out data/enwiki
    gptlab train pocket --data data/enwiki --out runs/pocket
    python tools/publish_built_in.py runs/pocket pocket --data data/enwiki

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
from gptlab.text.shards import open_dataset
from gptlab.training.data import Windows
from gptlab.training.recipe import read_recipe
from gptlab.training.step import stream_loss
from gptlab.verification import bits_per_byte, known_text

ASSETS = Path(gptlab.__file__).parent / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", help="a training run or a model directory")
    parser.add_argument("name", help="of the built-in model, and of the recipe that it was trained with")
    parser.add_argument("--data", type=Path, required=True, help="the prepared data that it was trained on")
    arguments = parser.parse_args()

    recipe, dataset = read_recipe(arguments.name), open_dataset(arguments.data)
    trained = gptlab.load(arguments.run)
    if trained.needs_tokenizer().sha256 != dataset.tokenizer.sha256:
        raise SystemExit(f"{arguments.data} has another tokenizer than {arguments.run}: not what it was trained on")
    if trained.config != recipe.model_for(dataset.tokenizer.vocab_size):
        raise SystemExit(f"{arguments.run} is not a model of the recipe {arguments.name}")
    target = ASSETS / arguments.name
    gptlab.save(trained, target, dtype=torch.bfloat16)
    lm = gptlab.load(target)
    length = lm.config.context_length
    training, rows = Windows(dataset.training, length), Windows(dataset.validation, length)
    loss = stream_loss(lm.model, rows)
    card = {
        "name": arguments.name,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "file_bytes": (target / "model.safetensors").stat().st_size,
        "corpus": dataset.name,
        "data_sha256": dataset.sha256,
        "training_documents": dataset.training.n_documents,
        "training_tokens": dataset.training.n_tokens,
        "tokens_trained": recipe.steps(length, len(training)) * recipe.batch.size * length,
        "validation_documents": dataset.validation.n_documents,
        "validation_bytes": dataset.validation.n_bytes,
        "validation_tokens": dataset.validation.n_tokens,
        "nats_per_token": loss,
        "bits_per_byte": loss * rows.n_targets / math.log(2) / (dataset.validation.n_bytes or math.nan),
        "protocol": f"non-overlapping windows of {length} tokens over the whole validation split, float32",
        "known_text_bits_per_byte": bits_per_byte(lm, known_text()),
        "torch": torch.__version__,
        "recipe": recipe.model_dump(mode="json", exclude={"data": {"corpus"}}),
    }
    write_files(target, {"card.json": json.dumps(card, indent=2).encode() + b"\n"})
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
