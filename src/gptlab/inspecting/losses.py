"""What a text costs a model, token by token, and what it would cost without one of the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptlab.evaluation.batches import BATCH_TOKENS, BATCH_TOKENS_GPU, Head, Progress
from gptlab.inspecting.running import as_row, check_index, looking
from gptlab.inspecting.sites import editing
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.quantised import matrix


def token_losses(model: GPT, ids: Tensor | Sequence[int]) -> Tensor:
    """Return the loss of each token after the first, given those before it.

    Args:
        model: any variant, in any dtype; the output head is computed in float32.
        ids: (T,) int64, beginning with whatever token starts a text.

    Returns:
        (T - 1,) float32, in nats; element i is that of ``ids[i + 1]``.

    Raises:
        GptlabError: fewer than two tokens, ids that the model does not have, or more than its positions.
    """
    return losses_at(model, ids, None)


def losses_at(model: GPT, ids: Tensor | Sequence[int], positions: Tensor | None) -> Tensor:
    """Return what `token_losses` does for a text whose tokens stand at ``positions``, (T,) int64; None: from 0 on."""
    row = as_row(model, ids, least=2)
    at = None if positions is None else positions[None, :-1].to(row.device)
    with looking(model):
        losses: Tensor = model(row[:, :-1], positions=at, head=_loss(model, row[0, 1:]))
        return losses[0]


def _loss(model: GPT, targets: Tensor) -> Callable[[Tensor, Linear], Tensor]:
    """Return a head for `GPT.forward`: hidden states (B, T, C) -> losses (B, T) float32 of targets (T,)."""
    weight = matrix(model.lm_head)

    def head(hidden: Tensor, lm_head: Linear) -> Tensor:
        rows, length = hidden.shape[:2]
        places = torch.arange(rows * length, device=hidden.device)
        score = Head(weight, places, targets.repeat(rows), best=False, never=None)
        return -score(hidden, lm_head)[0].unflatten(0, (rows, length))

    return head


def head_effects(
    model: GPT,
    ids: Tensor | Sequence[int],
    progress: Progress | None = None,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Return by how much the mean loss of a text changes when one head is taken out: measured, head by head.

    A head is taken out by putting zeros in place of its output, as `gptlab.inspecting.ablated` does. What lies below a
    layer is computed once for all of its heads, and several go through the layers above it as one batch.

    Args:
        model: any variant, in any dtype.
        ids: (T,) int64.
        progress: called with the heads done so far and the heads in all, after every batch.
        layers: whose heads, in this order; None: all.

    Returns:
        (layers, n_head) float32 on the CPU, nats per token: above 0 where the text becomes harder to predict.

    Raises:
        GptlabError: as `token_losses`, or a layer that the model does not have.
    """
    row = as_row(model, ids, least=2)
    n_layer, n_head = model.config.n_layer, model.config.n_head
    chosen = [check_index(n_layer, layer, "layer") for layer in (range(n_layer) if layers is None else layers)]
    batch_tokens = BATCH_TOKENS if row.device.type == "cpu" else BATCH_TOKENS_GPU
    losses, done = torch.zeros(n_layer, n_head, dtype=torch.float64), 0
    with looking(model):
        loss = _loss(model, row[0, 1:])
        x, tokens, rotary = model.embed(row[:, :-1], None, None, None)
        for layer, block in enumerate(model.blocks):
            size = max(1, batch_tokens // row.shape[1])
            for heads in torch.arange(n_head).split(size) if layer in chosen else ():
                _, beside, turned = model.embed(row[:, :-1].expand(len(heads), -1), None, None, None)
                with editing(model, [("heads", layer, _taking_out_one_each(heads))]):
                    y = block(x.expand(len(heads), -1, -1), beside, turned)
                for above in model.blocks[layer + 1 :]:
                    y = above(y, beside, turned)
                losses[layer, heads] = loss(model.ln_f(y), model.lm_head).cpu().double().mean(1)
                done += len(heads)
                if progress is not None:
                    progress(done, len(set(chosen)) * n_head)
            x = block(x, tokens, rotary)
        whole = loss(model.ln_f(x), model.lm_head).cpu().double().mean()
    return (losses[chosen] - whole).float()


def _taking_out_one_each(heads: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that puts zeros in place of the output of ``heads[b]`` in row b of (B, T, H, D)."""

    def edit(x: Tensor) -> Tensor:
        new = x.clone()
        new[torch.arange(len(heads)), :, heads] = 0.0
        return new

    return edit
