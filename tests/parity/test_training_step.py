"""One step of training, against `transformers`' GPT-2 with PyTorch's AdamW."""

from __future__ import annotations

import pytest
import torch
from helpers.judge import judge
from helpers.models import close, random_ids
from torch import Tensor
from torch.nn import functional as F

import gptlab
from gptlab.training.data import Batch
from gptlab.training.optimizer import clip, make_optimizers
from gptlab.training.parallel import Group
from gptlab.training.settings import OptimizerSettings
from gptlab.training.step import gradients

LR, DECAY, BETAS = 6e-4, 0.1, (0.9, 0.95)


def to_ours(name: str, tensor: Tensor) -> Tensor:
    """Their Conv1D weights are (in, out)."""
    return tensor.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("most", [1e9, 0.5])  # gradients as they are, and clipped
def test_gradients_and_one_step_of_adamw(micro: int | None, most: float) -> None:
    theirs = judge(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0).train()
    config = gptlab.ModelConfig(vocab_size=257, context_length=64, n_layer=3, n_head=4, n_embd=32)
    ours = gptlab.GPT(config)
    named = {name.removeprefix("transformer."): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.copy_(to_ours(name, named[name]))
    ids = random_ids(257, 3, 61)
    batch = Batch(ids[:, :-1], ids[:, 1:], None, torch.arange(3))

    expected = F.cross_entropy(theirs(batch.ids).logits.flatten(0, 1), batch.targets.flatten())
    expected.backward()
    actual = gradients(ours, batch, micro, torch.float32, Group(0, 1, torch.device("cpu")))
    assert actual[0].item() == pytest.approx(expected.item(), abs=1e-5)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), most)
    assert clip(list(ours.parameters()), most).item() == pytest.approx(norm.item(), rel=1e-5)
    by_name = {name: p.grad for name, p in ours.named_parameters()}
    assert by_name.keys() == named.keys()
    for name, p in named.items():
        assert p.grad is not None
        gradient = by_name[name]
        assert gradient is not None
        close(gradient, to_ours(name, p.grad))

    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=LR, betas=BETAS).step()
    settings = OptimizerSettings(learning_rate=LR, weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1])
    for optimizer in make_optimizers(ours, settings):
        optimizer.step()
    compared = 0
    for name, p in ours.named_parameters():
        gradient = by_name[name]
        assert gradient is not None
        # AdamW's first step is the learning rate times the gradient's sign. Where the gradient is nothing but
        # rounding, as for the keys' biases, on which a softmax does not depend, the sign is anybody's guess.
        clear = gradient.abs() > 1e-6
        close(p.detach()[clear], to_ours(name, named[name]).detach()[clear])
        close(p.detach(), to_ours(name, named[name]).detach(), 2 * LR)
        compared += int(clear.sum())
    assert compared > 0.98 * sum(p.numel() for p in ours.parameters())
