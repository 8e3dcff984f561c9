"""One training step, and the loss over a whole stream: the arithmetic of a run, without its files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from gptlab.errors import GptlabError
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.training.data import Batch, Items, Windows
from gptlab.training.distill import Teacher, distilled_loss, teaching_gradient
from gptlab.training.loss import IGNORED, LogitsGradient, cross_entropy, softmax_gradient
from gptlab.training.parallel import Group, synchronised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def summed_loss(
    module: nn.Module, batch: Batch, dtype: torch.dtype, gradient: LogitsGradient = softmax_gradient
) -> Tensor:
    """Return the summed cross-entropy in nats of a batch, products in ``dtype``, everything else in float32.

    ``gradient`` is `softmax_gradient`, or the compiled form that `compile_step` returned.
    """
    device = batch.ids.device.type

    def head(hidden: Tensor, lm_head: Linear) -> Tensor:
        return cross_entropy(hidden, lm_head.weight, batch.targets, gradient)

    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        loss: Tensor = module(batch.ids, documents=batch.documents, head=head)
    return loss


def gradients(
    module: nn.Module,
    batch: Batch,
    micro: int | None,
    dtype: torch.dtype,
    group: Group,
    gradient: LogitsGradient = softmax_gradient,
    teacher: Teacher | None = None,
) -> Tensor:
    """Compute the gradients of a global batch's mean loss; return (2,) that loss and the cross-entropy, nats per token.

    The two differ only where there is a teacher.

    Every process takes its rows, ``micro`` at a time. The mean is over all tokens of the batch, whatever row or process
    they are on, so neither number changes the result by more than rounding.
    """
    rows = group.share(len(batch.ids))
    mine, n_targets = batch.rows(rows).to(group.device), batch.n_targets
    largest = -(-len(batch.ids) // group.size)
    micro = micro or largest
    passes = range(0, largest, micro)
    total = torch.zeros(2, device=group.device)
    for first in passes:
        part = mine.rows(slice(first, first + micro))
        if not len(part.ids):  # another process has a row more; divided parameters are put together by all or none
            part = mine.rows(slice(0, 1))
            part = replace(part, targets=torch.full_like(part.targets, IGNORED))
        with synchronised(module, first == passes[-1]):
            if teacher is None:
                loss = nats = summed_loss(module, part, dtype, gradient)
            else:
                loss, nats = distilled_loss(module, part, dtype, teacher)
            # Engines average over processes; the sum is divided by the tokens of all of them.
            (loss * (group.size / n_targets)).backward()
        total += torch.stack([loss.detach(), nats.detach()])
    return group.sum(total) / n_targets


@torch.no_grad()
def stream_loss(
    module: nn.Module,
    rows: Windows | Items,
    *,
    batch_size: int = 8,
    n_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
) -> float:
    """Return the mean cross-entropy in nats of a whole stream, in windows that do not overlap.

    The first tokens of each window have little context: a figure to compare runs by, not a model's best.

    Args:
        module: the model, or what `spread` made of it; it is left in evaluation mode.
        rows: the validation split.
        batch_size: windows at once.
        n_tokens: only that many tokens, from the beginning.
        dtype: of the products.
        group: processes that share the work.
    """
    group = group or Group(0, 1, next(module.parameters()).device)
    module.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    for i, batch in enumerate(rows.in_order(batch_size, n_tokens)):
        if i % group.size == group.rank:
            sums[0] += summed_loss(module, batch.to(group.device), dtype).item()
            sums[1] += batch.n_targets
        elif isinstance(module, FSDPModule):  # divided parameters are put together by all processes or none
            summed_loss(module, batch.rows(slice(0, 1)).to(group.device), dtype)
    if isinstance(module, FSDPModule):  # only a backward pass divides them again by itself
        module.reshard()
    sums = group.sum(sums.to(torch.float32 if group.device.type == "mps" else torch.float64).to(group.device))
    return float(sums[0] / sums[1])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what dropout draws from: a function of the step, so that a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def recompute_blocks(model: GPT) -> None:
    """Let each block keep its input alone and compute the rest again in the backward pass (Chen et al. 2016)."""
    for block in model.blocks:
        block.run = functools.partial(checkpoint, block.compute, use_reentrant=False)


def spare_embedding(model: GPT) -> None:
    """Let the gradient of a tied embedding as input come as the few rows that a batch looks up, not as a whole matrix.

    They are added in place to the gradient as output head, which is whole anyway and comes first. Not for several
    processes: their engines exchange gradients as they come.
    """
    if model.config.tie_embeddings:
        model.wte.register_forward_hook(_add_rows_in_place)


def _add_rows_in_place(embedding: nn.Module, inputs: tuple[Tensor], rows: Tensor) -> Tensor:
    """Cut the rows off from the matrix that they come from; add their gradient to its own when it arrives."""
    if not rows.requires_grad:
        return rows
    weight, (ids,) = cast(nn.Embedding, embedding).weight, inputs

    def add(gradient: Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_put_((ids,), gradient, accumulate=True)

    rows = rows.detach().requires_grad_()
    rows.register_hook(add)
    return rows


def compile_step(
    model: GPT, batch: Batch, dtype: torch.dtype, must: bool, say: Callable[[str], None], recompute: bool = False
) -> LogitsGradient | None:
    """Compile a model's blocks and its loss with ``torch.compile`` and try them; say so in words where that fails.

    All blocks of one shape share one compiled function.

    Args:
        model: on the device where it will train.
        batch: of the size that it will train with, on the same device.
        dtype: of the products.
        must: raise where compiling fails, instead of going on without.
        say: told in a sentence when the run goes on without.
        recompute: let the compiler keep about half of what the backward pass needs, and compute the cheap rest again.

    Returns:
        The compiled `softmax_gradient`, for `gradients`; None where compiling failed, and the blocks are as they were.
    """
    gradient: LogitsGradient = torch.compile(softmax_gradient)
    trial = functools.partial(summed_loss, model, batch, dtype, gradient)
    return gradient if _compiled([model], trial, must, say, recompute) else None


def compile_distillation(
    model: GPT,
    teacher: Teacher,
    batch: Batch,
    dtype: torch.dtype,
    must: bool,
    say: Callable[[str], None],
    recompute: bool = False,
) -> Teacher | None:
    """Compile the blocks of a model and of its teacher, and the loss that it has with it; else as `compile_step`.

    Returns:
        The teacher with the compiled `teaching_gradient`, for `gradients`; None where compiling failed.
    """
    compiled = replace(teacher, gradient=torch.compile(teaching_gradient))

    def trial() -> Tensor:
        return distilled_loss(model, batch, dtype, compiled)[0]

    return compiled if _compiled([model, teacher.model], trial, must, say, recompute) else None


def _compiled(
    models: list[GPT], trial: Callable[[], Tensor], must: bool, say: Callable[[str], None], recompute: bool
) -> bool:
    """Compile the blocks of the models, the first of which trains; False where the trial of a step then fails."""
    # Code compiled for an earlier run of this process, of any size, would be reused, and would add up in another order.
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    model, blocks = models[0], [block for model in models for block in model.blocks]
    model.train()
    try:
        # How much is kept is decided where the first backward pass is compiled.
        budget = torch._functorch.config.patch(activation_memory_budget=0.5 if recompute else 1.0)
        with _quiet(), budget:
            expected = _outcome_in_eager(model, trial, recompute) if model.wte.weight.device.type == "cpu" else None
            for block in blocks:
                block.run = torch.compile(block.compute)
            outcome = _outcome(model, trial)
            if expected is not None and not _alike(outcome, expected, model.config.dropout):
                # A C++ compiler that gets the widest vectors wrong. Met: GCC 12.2 where -march=native is no processor
                # that it knows, as in a virtual machine; 32 by 32 numbers in bfloat16 are then transposed wrongly.
                torch._inductor.config.cpp.simdlen = 256
                torch._dynamo.reset()
                outcome = _outcome(model, trial)
                if not _alike(outcome, expected, model.config.dropout):
                    raise ArithmeticError(f"compiled, a loss of {expected[0]:.5g} comes out as {outcome[0]:.5g}")
    except Exception as error:  # the compiler's own errors have no common type
        for block in blocks:
            block.run = None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if must:
            raise GptlabError(
                f"torch.compile does not work here ({reason}); set train.compile=false, or install "
                + ("another C++ compiler" if isinstance(error, ArithmeticError) else "a C++ compiler")
            ) from None
        say(f"torch.compile does not work here ({reason}); going on without, which is slower")
        return False
    return True


def _outcome(model: GPT, trial: Callable[[], Tensor]) -> tuple[float, float]:
    """Return the loss of a trial and the norm of its gradient, which is not kept."""
    try:
        loss = trial()
        loss.backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.stack(norms).norm().item()
    finally:
        model.zero_grad(set_to_none=True)


def _outcome_in_eager(model: GPT, trial: Callable[[], Tensor], recompute: bool) -> tuple[float, float]:
    """Return what `_outcome` must be, without compiling, and with no more memory than was asked for."""
    if recompute:
        recompute_blocks(model)
    with torch.compiler.set_stance("force_eager"):
        return _outcome(model, trial)


def _alike(outcome: tuple[float, float], expected: tuple[float, float], dropout: float) -> bool:
    """Are the two the same but for rounding? Dropout draws other numbers when compiled."""
    rel = 0.5 if dropout else 0.05
    return all(math.isclose(a, b, rel_tol=rel) for a, b in zip(outcome, expected, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import logging

    log = logging.getLogger("torch._inductor")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def worth_compiling(flops: float, device: torch.device) -> bool:
    """Is a run of so many floating-point operations long enough that compiling (half a minute or so) pays?"""
    return device.type == "cuda" or flops > 3e13
