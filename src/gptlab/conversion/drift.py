"""How far the outputs of a converted model moved from those of its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.conversion.statistics import batches
from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT

HEAD_ROWS = 256
"""Positions whose logits are held at once, of both models: 100 MB with GPT-2's vocabulary."""


@dataclass(frozen=True)
class Drift:
    """Means over the predicted tokens of a text: all but the first of each row.

    Attributes:
        tokens: how many were predicted.
        before: nats per token of the source.
        after: nats per token of the converted model.
        kl: KL(source || converted) in nats per token, over the whole vocabulary.
    """

    tokens: int
    before: float
    after: float
    kl: float


@torch.no_grad()
def measure_drift(source: GPT, converted: GPT, rows: Tensor | Sequence[Tensor]) -> Drift:
    """Compare what two models predict on a text, dropout off; sums in float64.

    Args:
        source: the model as it was.
        converted: what became of it.
        rows: (N, T) int64 token ids, or sequences (T,) that both models can read; not those of the fit.

    Raises:
        GptlabError: nothing to predict.
    """
    modes = source.training, converted.training
    source.eval(), converted.eval()
    count = 0
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        for ids in batches(rows):
            ids = ids.to(source.wte.weight.device)
            old, new = (model(ids, head=lambda hidden, _: hidden)[:, :-1] for model in (source, converted))
            targets = ids[:, 1:].flatten()
            pieces = zip(
                old.flatten(0, 1).split(HEAD_ROWS),
                new.flatten(0, 1).split(HEAD_ROWS),
                targets.split(HEAD_ROWS),
                strict=True,
            )
            for x, y, target in pieces:
                p = source.lm_head(x).float().log_softmax(-1)
                q = converted.lm_head(y).float().log_softmax(-1)
                sums[0] -= p.gather(1, target[:, None]).double().sum().cpu()
                sums[1] -= q.gather(1, target[:, None]).double().sum().cpu()
                sums[2] += (p.exp() * (p - q)).sum(-1).double().sum().cpu()
            count += len(targets)
    finally:
        source.train(modes[0]), converted.train(modes[1])
    if count == 0:
        raise GptlabError("there is no token to predict; give rows of at least two tokens")
    before, after, kl = (sums / count).tolist()
    return Drift(count, before, after, kl)
