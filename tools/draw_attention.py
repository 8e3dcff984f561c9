"""Draw what every head of the built-in model looks at while it reads one sentence.

python tools/draw_attention.py docs/images/attention.png
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm

import gptlab

SENTENCE = "The river flows into the sea, and the river is the longest in the country."


def main(path: str) -> None:
    lm = gptlab.load("pocket")
    tokenizer = lm.needs_tokenizer()
    ids = tokenizer.encode(SENTENCE)
    words = [tokenizer.decode([i]).replace(" ", "") for i in ids]
    n_layer, n_head = lm.config.n_layer, lm.config.n_head
    hidden = torch.ones(len(ids), len(ids)).triu(1).bool()  # what causality forbids stays blank
    figure, axes = plt.subplots(n_layer, n_head, figsize=(13.5, 9.4), layout="constrained")
    for layer in range(n_layer):
        maps = lm.model.attention_maps(torch.tensor([ids]), layer)[0]
        for head, axis in enumerate(axes[layer]):
            seen = maps[head].masked_fill(hidden, torch.nan)
            image = axis.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks(range(len(words)) if head == 0 else [], words if head == 0 else [], fontsize=6)
            axis.tick_params(length=0)
            axis.set_title(f"layer {layer}, head {head}", fontsize=8)
    figure.colorbar(image, ax=axes, label="share of attention (square-root scale)", shrink=0.4, pad=0.01)
    figure.suptitle(
        "Every head of the built-in model reading one sentence.  Row: the token that reads; column: what it reads from."
    )
    figure.savefig(path, dpi=110, metadata={"Software": ""})


if __name__ == "__main__":
    main(sys.argv[1])
