"""What a model of single items, such as names, invents."""

from __future__ import annotations

from typing import Any

from gptlab.generation.sampling import Sampling
from gptlab.language_model import LanguageModel
from gptlab.text.shards import Dataset


def novelty(lm: LanguageModel, dataset: Dataset, n: int, seed: int) -> dict[str, Any]:
    """Sample items at temperature 1 and count those that are new.

    Args:
        lm: a model trained on items.
        dataset: what it was trained on.
        n: how many to sample.
        seed: of the samples.

    Returns:
        ``sampled``, ``new_share`` (not in the training data), ``in_validation_share`` and the first 20 ``samples``.
    """
    tokenizer = lm.needs_tokenizer()
    continuations = lm.new_continuations(n)
    for _ in lm.continue_all([None] * n, continuations, Sampling(1.0, None, None, seed), lm.config.context_length - 1):
        pass
    samples = [continuation.text for continuation in continuations]
    known = [
        {tokenizer.decode(ids.tolist()) for ids in split.documents()}
        for split in (dataset.training, dataset.validation)
    ]
    return {
        "sampled": n,
        "new_share": sum(sample not in known[0] for sample in samples) / n,
        "in_validation_share": sum(sample in known[1] for sample in samples) / n,
        "samples": samples[:20],
    }
