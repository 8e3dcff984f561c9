"""Distillation (Hinton et al. 2015): a model learns for each token the distribution that another one gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.evaluation.tasks import identity
from gptlab.language_model import load
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.text.tokenizers import Tokenizer
from gptlab.training.data import Batch
from gptlab.training.loss import IGNORED, in_processor_cache, product_dtype, sum_in_chunks, wants_gradient
from gptlab.training.settings import DistillSettings

TeachingGradient = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor, Tensor]]
"""`teaching_gradient`, or a compiled form of it."""


def teaching_gradient(
    logits: Tensor, of_teacher: Tensor, safe: Tensor, counts: Tensor, share: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cross-entropy and the divergence from the teacher of some tokens, and the gradient of their mixture.

    Args:
        logits: (n, V) the student's, in any dtype; softmax and sums are in float32.
        of_teacher: (n, V) the teacher's.
        safe: (n, 1) int64 targets, any id where the token does not count.
        counts: (n, 1) bool: does the token count?
        share: of the divergence in the mixture, from 0 to 1.
        temperature: T, what the logits of both are divided by in the divergence.

    Returns:
        (n, 1) float32 nats of cross-entropy; (n, 1) float32 T^2 KL(teacher || student) in nats, both 0 where the token
        does not count; and (n, V) in the logits' dtype, likewise the gradient of (1 - share) times the first plus share
        times the second.
    """
    own, taught = logits.float(), of_teacher.float()
    own_log = own.log_softmax(-1)
    soft_log = own_log if temperature == 1 else (own / temperature).log_softmax(-1)
    wanted_log = (taught / temperature).log_softmax(-1)
    wanted = wanted_log.exp()
    nats = -own_log.gather(1, safe) * counts
    divergence = (wanted * (wanted_log - soft_log)).sum(-1, keepdim=True) * counts * temperature**2
    gradient = (soft_log.exp() - wanted) * (share * temperature)
    if share < 1:
        # The target's softmax less one, from the loss: nothing cancels where the model is sure.
        at_target = gradient.gather(1, safe) + torch.expm1(-nats) * (1 - share)
        gradient = (gradient + own_log.exp() * (1 - share)).scatter(1, safe, at_target)
    return nats, divergence, (gradient * counts).to(logits.dtype)


@dataclass(frozen=True)
class Teacher:
    """Whom a run learns from.

    Attributes:
        model: in evaluation mode, on the device of the run; whole on every process.
        share: of the divergence in the loss; the rest is the cross-entropy of the text.
        temperature: what the logits of both are divided by in the divergence.
        about: name, parameters and sha256, for `run.json`.
        gradient: `teaching_gradient`, or a compiled form of it.
    """

    model: GPT
    share: float
    temperature: float
    about: dict[str, Any]
    gradient: TeachingGradient = teaching_gradient

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Return what comes out of the teacher's last layer norm, (B, T, C) float32, without gradients."""
        hidden: Tensor = self.model(batch.ids, documents=batch.documents, head=lambda hidden, lm_head: hidden)
        return hidden


def load_teacher(settings: DistillSettings, config: ModelConfig, tokenizer: Tokenizer) -> Teacher:
    """Load the teacher that a recipe names.

    Args:
        settings: the recipe's.
        config: of the student.
        tokenizer: of the data.

    Raises:
        GptlabError: no such model, or one that cannot teach this student.
    """
    lm = load(settings.teacher, dtype="float32")
    name, model = settings.teacher, lm.model.eval().requires_grad_(False)
    if lm.tokenizer is not None and lm.tokenizer.sha256 != tokenizer.sha256:
        raise GptlabError(
            f"the teacher {name} has a different tokenizer from the data, so the two would speak of different tokens;"
            " choose a teacher with the tokenizer of the student"
        )
    if model.config.vocab_size != config.vocab_size:
        raise GptlabError(
            f"the teacher {name} knows {model.config.vocab_size:,} ids, the student {config.vocab_size:,}; choose a"
            " teacher with the vocabulary of the student"
        )
    if model.config.context_length < config.context_length:
        raise GptlabError(
            f"the teacher {name} has a context of {model.config.context_length:,} tokens, the student one of"
            f" {config.context_length:,}; choose a teacher that has seen texts as long"
        )
    return Teacher(model, settings.weight, settings.temperature, identity(model, name))


def distilled_loss(module: nn.Module, batch: Batch, dtype: torch.dtype, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Return the summed loss that a batch has with a teacher, and its summed cross-entropy without gradients; nats.

    Products of both models are in ``dtype``, everything else in float32.
    """
    device = batch.ids.device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        wanted = teacher.hidden(batch)

        def head(hidden: Tensor, lm_head: Linear) -> tuple[Tensor, Tensor]:
            return divergence(hidden, lm_head.weight, batch.targets, wanted, teacher)

        losses: tuple[Tensor, Tensor] = module(batch.ids, documents=batch.documents, head=head)
    return losses


def divergence(
    hidden: Tensor, weight: Tensor, targets: Tensor, of_teacher: Tensor, teacher: Teacher
) -> tuple[Tensor, Tensor]:
    """Return (1 - share) cross-entropy + share T^2 KL(teacher || student), summed, and the cross-entropy alone.

    Logits of student and teacher are computed for a few tokens at a time, and the gradients right with them, as in
    `gptlab.training.loss.cross_entropy`. T^2 keeps the size of the gradient whatever the temperature (Hinton et al.
    2015, section 2.1).

    Args:
        hidden: (..., C) what comes out of the student's last layer norm.
        weight: (V, C) its output projection.
        targets: (...) int64 ids, or `IGNORED`: such a token counts in neither part.
        of_teacher: (..., C') the same of the teacher.
        teacher: its model's output projection, share and temperature.

    Returns:
        Two float32 scalars; only the first has gradients.
    """
    with_gradient, wanted = wants_gradient(hidden, weight), targets.flatten()
    taught, low = of_teacher.flatten(0, -2), teacher.model.lm_head.weight.to(product_dtype(weight))

    def work(logits: Tensor, where: slice) -> Tensor:
        ids = wanted[where, None]
        counts = ids != IGNORED
        theirs = taught[where].to(low.dtype) @ low.T  # (n, V)
        cut = (in_processor_cache(x, logits) for x in (logits, theirs, ids.masked_fill(~counts, 0), counts))
        sums = torch.zeros(2, device=logits.device)
        for own, of_teacher, safe, count in zip(*cut, strict=True):
            nats, apart, gradient = teacher.gradient(own, of_teacher, safe, count, teacher.share, teacher.temperature)
            sums += torch.stack([((1 - teacher.share) * nats + teacher.share * apart).sum(), nats.sum()])
            if with_gradient:
                own.copy_(gradient)
        return sums

    loss, nats = sum_in_chunks(hidden, weight, work, held=2).unbind()
    return loss, nats.detach()
