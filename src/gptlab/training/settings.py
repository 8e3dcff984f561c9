"""The sections of a recipe: their settings, defaults and limits."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Refuses unknown settings, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerSettings(Section):
    """Which tokenizer, where the data or the base model do not bring one; `vocab_size` counts for ``bpe`` only."""

    kind: Literal["gpt2", "bytes", "chars", "bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=257)


class DataSettings(Section):
    """How a corpus becomes batches.

    Attributes:
        corpus: what `gptlab train` prepares where it is given neither prepared data nor a corpus.
        held_out: share of the documents kept for validation; counts where the corpus is not prepared already.
        items: every line is a document and a row of its own, as in makemore's names.
        documents: attention stays inside documents where a window holds several.
    """

    corpus: list[str] = Field(default_factory=lambda: ["stdlib"], min_length=1)
    held_out: float = Field(0.01, gt=0, lt=0.5)
    items: bool = False
    documents: bool = False


class BatchSettings(Section):
    """The global batch, in windows of one length.

    Attributes:
        size: windows of one step, over all processes.
        length: tokens of a window; None is the model's context, which may be more than a machine can train on.
        micro: windows at once on one process; None is all of its share. Changes memory, and results by rounding only.
    """

    size: int = Field(8, ge=1)
    length: int | None = Field(None, ge=1)
    micro: int | None = Field(None, ge=1)


class OptimizerSettings(Section):
    """AdamW (Loshchilov and Hutter 2019), or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for the rest.

    Muon's update is scaled to the size of AdamW's (Liu et al. 2025, *Muon is scalable for LLM training*), so that one
    learning rate serves both.

    Attributes:
        name: which of the two.
        learning_rate: at its highest; the schedule has the shares of it.
        weight_decay: of matrices; biases and norms have none.
        beta1: of AdamW.
        beta2: of AdamW.
        momentum: of Muon.
        clip_norm: the most that the gradient's norm may be.
        attention_factor: learning rate of attention (its projections and the norm before them), as a multiple of the
            others'. A converted model has most to learn there.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.95, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    attention_factor: float = Field(1.0, gt=0, allow_inf_nan=False)


class ScheduleSettings(Section):
    """The learning rate over the run: a linear warm-up, then ``kind``.

    Attributes:
        kind: ``cosine`` to the end; ``wsd``, constant with a linear decay at the end (Hu et al. 2024, *MiniCPM*); or
            ``constant``.
        warmup_steps: steps of the warm-up.
        final_share: the rate at the end, as a share of the full one.
        decay_share: share of the run that ``wsd`` decays in.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(100, ge=0)
    final_share: float = Field(0.1, ge=0, le=1)
    decay_share: float = Field(0.2, gt=0, le=1)


class BudgetSettings(Section):
    """How long to train: exactly one of steps, tokens, epochs and share.

    Attributes:
        steps: of the optimizer.
        tokens: that are predicted.
        epochs: passes over the training data.
        share: of the tokens that the base was trained on, as in the GQA paper's uptraining (alpha = 0.05 there).
        of: how many those are; None asks the base (see `gptlab.training.budget.with_count`).
    """

    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    share: float | None = Field(None, gt=0, allow_inf_nan=False)
    of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> BudgetSettings:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            one_of = " and ".join([", ".join(f"budget.{name}" for name in KINDS[:-1]), f"budget.{KINDS[-1]}"])
            raise ValueError(f"give one of {one_of}, got {' and '.join(given) or 'none'}")
        if self.of is not None and self.share is None:
            raise ValueError("budget.of is what budget.share is a share of, and has no effect without it")
        return self


KINDS = ("steps", "tokens", "epochs", "share")
"""Of budgets."""


class TrainSettings(Section):
    """The loop.

    Attributes:
        seed: of the initialisation, the order of the data and dropout.
        dtype: of the products; weights, gradients and optimizer state are float32 in any case.
        compile: ``auto`` compiles where the run is long enough to pay for it, and goes on without where it fails.
        recompute: compute each block again in the backward pass instead of keeping what is inside it.
        evaluate_every: steps from one evaluation on the validation stream to the next.
        evaluate_tokens: evaluate on that many tokens of it only, always the first; None is all.
        save_every: steps from one checkpoint to the next; None is ``evaluate_every``.
        keep_last: how many of the latest checkpoints stay; the best one stays in any case.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    compile: Literal["auto"] | bool = "auto"
    recompute: bool = False
    evaluate_every: int = Field(500, ge=1)
    evaluate_tokens: int | None = Field(None, ge=2)  # the first one is not predicted
    save_every: int | None = Field(None, ge=1)
    keep_last: int = Field(2, ge=1)


class DistillSettings(Section):
    """A teacher (Hinton et al. 2015): the loss is (1 - weight) cross-entropy + weight T^2 KL(teacher || student).

    Attributes:
        teacher: a model by name or directory, with the student's tokenizer and at least its context.
        weight: share of the divergence in the loss.
        temperature: T, what the logits of both are divided by in the divergence.
    """

    teacher: str
    weight: float = Field(0.5, gt=0, le=1)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)


class BlendSettings(Section):
    """From learned positions to rotary ones, for a base of position ``blend``; the last model has position ``rope``.

    Attributes:
        ramp: ``geometric`` rotates all pairs together, from 2^-12 of their angle to all of it; ``pairs`` one after the
            other, from the slowest to the fastest, each in the same way.
        rope_end: share of the run at which rotation is whole.
        wpe_start: share of the run until which the learned positions stay whole.
        wpe_end: share of the run at which they are gone.
    """

    ramp: Literal["geometric", "pairs"] = "geometric"
    rope_end: float = Field(0.4, gt=0, le=1)
    wpe_start: float = Field(0.2, ge=0, lt=1)
    wpe_end: float = Field(0.6, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> BlendSettings:
        if self.wpe_start >= self.wpe_end:
            raise ValueError(
                f"blend.wpe_start={self.wpe_start} must lie before blend.wpe_end={self.wpe_end}: the learned positions"
                " fall from whole to nothing between the two"
            )
        return self


class NarrowSettings(Section):
    """Wider windows at the beginning; evaluation sees the model's own all the time.

    Attributes:
        first: the window to begin with, in tokens that it reaches back; None is the context.
        stages: windows before the model's own, each smaller than the one before by the same factor; None halves.
        end: share of the run at which the model's own windows are reached.
    """

    first: int | None = Field(None, ge=2)
    stages: int | None = Field(None, ge=1)
    end: float = Field(0.5, gt=0, le=1)
