"""Table 3 of the GPT-2 paper (Radford et al. 2019), for the smallest model, and what can be set beside it."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One number of the table.

    Attributes:
        dataset: its column in the paper.
        unit: what the number is.
        paper: zero-shot, "117M" parameters (124M, counted right).
        protocol: the nearest one of `gptlab.evaluation.tasks.TASKS`, or None.
        metric: of that protocol.
        scale: by which the metric is multiplied to be in the paper's unit.
        why: why there is no protocol, or how the nearest one differs.
    """

    dataset: str
    unit: str
    paper: float
    protocol: str | None
    metric: str
    scale: float
    why: str


def _absent(dataset: str, unit: str, paper: float, why: str) -> Row:
    return Row(dataset, unit, paper, None, "", 1.0, why)


TABLE_3 = (
    Row("LAMBADA", "perplexity", 35.13, "lambada:last-token", "perplexity", 1.0, "the paper does not define its own"),
    Row("LAMBADA", "accuracy, %", 45.99, "lambada:last-token", "accuracy", 100.0, "the paper does not define its own"),
    _absent("CBT-CN", "accuracy, %", 87.65, "no protocol here: cloze questions over ten candidates"),
    _absent("CBT-NE", "accuracy, %", 83.4, "no protocol here: cloze questions over ten candidates"),
    Row(
        "WikiText-2",
        "perplexity",
        29.41,
        "wikitext:token",
        "token_perplexity",
        1.0,
        "the paper has de-tokenizers and divides by the original tokens",
    ),
    _absent("PTB", "perplexity", 65.85, "no protocol here: the text is under licence, the de-tokenizer unpublished"),
    _absent("enwik8", "bits per byte", 1.16, "no protocol here: for a file of yours, --task text:FILE"),
    _absent("text8", "bits per character", 1.17, "no protocol here: for a file of yours, --task text:FILE"),
    Row(
        "WikiText-103",
        "perplexity",
        37.50,
        "wikitext:word",
        "word_perplexity",
        1.0,
        "the test articles are WikiText-2's",
    ),
    _absent("1BW", "perplexity", 75.20, "no protocol here: the de-tokenizer is unpublished"),
)
"""The paper's columns, in its order."""
