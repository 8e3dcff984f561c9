"""A plain training loop: one process, AdamW, warm-up and cosine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab.errors import GptlabError
from gptlab.language_model import LanguageModel
from gptlab.model.gpt import GPT
from gptlab.text.corpora import Corpus
from gptlab.text.tokenizers import make_tokenizer
from gptlab.training.data import Batches, tokenize, windows
from gptlab.training.recipe import Recipe, TrainSettings

Report = Callable[[dict[str, Any]], None]
Keep = Callable[[LanguageModel], None]


@dataclass
class Result:
    """What a run leaves.

    Attributes:
        language_model: the trained model with its tokenizer.
        metrics: final figures, plain values for JSON.
        history: one row per evaluation.
    """

    language_model: LanguageModel
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def mean_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of ``targets`` (B, T) given ``ids`` (B, T)."""
    loss: Tensor = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    return loss


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Linear warm-up, then half a cosine from ``learning_rate`` to ``final_learning_rate``."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    swing = 0.5 * (1 + math.cos(math.pi * share))
    return settings.final_learning_rate + swing * (settings.learning_rate - settings.final_learning_rate)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves biases and norms alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def total_loss(model: nn.Module, stream: np.ndarray, length: int, batch_size: int = 8) -> float:
    """Return the summed cross-entropy in nats of every token of ``stream`` but the first.

    Windows of ``length`` do not overlap, so the first tokens of each have little context.
    """
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for ids, targets in windows(stream, length, batch_size):
            total += mean_loss(model, ids, targets).double().item() * targets.numel()
    return total


def train(recipe: Recipe, corpus: Corpus, report: Report = lambda row: None, keep: Keep = lambda lm: None) -> Result:
    """Train a model from scratch.

    Args:
        recipe: model, tokenizer and loop.
        corpus: the texts; a part of it is held out for evaluation.
        report: called with plain values before the first step, at every evaluation, and every ten steps.
        keep: called with the model as it is at every evaluation, so that an interrupted run leaves something.

    Raises:
        GptlabError: a corpus too small for the recipe, or a loss that is no number.
    """
    settings = recipe.train
    training, held_out = corpus.split(settings.held_out)
    # An alphabet must hold the characters of both parts; merges are learned from the training part alone.
    texts = corpus if recipe.tokenizer.kind == "chars" else training
    tokenizer = make_tokenizer(recipe.tokenizer.kind, texts.documents, recipe.tokenizer.vocab_size)
    stream, held = tokenize(training, tokenizer), tokenize(held_out, tokenizer)
    config = recipe.model_for(tokenizer.vocab_size)
    batches = Batches(stream, config.context_length, settings.batch_size, settings.seed)
    model = GPT(config, seed=settings.seed)
    torch.manual_seed(settings.seed)  # dropout
    lm = LanguageModel(model, tokenizer)

    def evaluate() -> float:
        keep(lm)
        sample = held[: settings.evaluate_tokens]
        return total_loss(model, sample, config.context_length) / (len(sample) - 1)

    history = _run(model, batches, settings, evaluate, report)

    nats = total_loss(model, held, config.context_length)
    metrics = {
        "corpus": corpus.name,
        "corpus_sha256": corpus.sha256,
        "training_documents": len(training.documents),
        "held_out_documents": len(held_out.documents),
        "held_out_bytes": held_out.n_bytes,
        "held_out_tokens": len(held),
        "training_tokens_available": len(stream),
        "tokens_trained": settings.steps * settings.batch_size * config.context_length,
        "held_out_nats_per_token": nats / (len(held) - 1),
        "held_out_bits_per_byte": nats / math.log(2) / held_out.n_bytes,
        "protocol": f"non-overlapping windows of {config.context_length} tokens over the whole held-out part, float32",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": history[-1]["seconds"],
    }
    return Result(lm, metrics, history)


def _run(
    model: GPT, batches: Batches, settings: TrainSettings, evaluate: Callable[[], float], report: Report
) -> list[dict[str, Any]]:
    """Take ``settings.steps`` steps; return a row per evaluation."""
    step_model: nn.Module = torch.compile(model) if settings.compile else model  # type: ignore[assignment]
    optimizer = make_optimizer(model, settings)
    autocast: Any = contextlib.nullcontext
    if settings.dtype == "bfloat16":
        autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    tokens_per_step = settings.batch_size * batches.length
    report({"event": "start", "steps": settings.steps, "tokens": settings.steps * tokens_per_step})
    history: list[dict[str, Any]] = []
    started = time.perf_counter()
    for step in range(settings.steps):
        model.train()
        ids, targets = batches[step]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        with autocast():
            loss = mean_loss(step_model, ids, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done, last = step + 1, step + 1 == settings.steps
        if done % 10 == 0 or last or done % settings.evaluate_every == 0:
            row: dict[str, Any] = {
                "event": "step",
                "step": done,
                "tokens": done * tokens_per_step,
                "loss": loss.item(),
                "gradient_norm": norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - started,
            }
            if not math.isfinite(row["loss"]):
                raise GptlabError(f"the loss is {row['loss']} at step {done}; lower train.learning_rate")
            if done % settings.evaluate_every == 0 or last:
                row["event"] = "evaluate"
                row["held_out_loss"] = evaluate()
                history.append(row)
            report(row)
    return history
