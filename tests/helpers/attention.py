# Cases of attention, and how kernels are compared with the reference.
from __future__ import annotations

import torch
from torch import Tensor

from gptlab.model import Tokens, Visibility
from gptlab.model.kernels import KERNELS, Inputs
from helpers.models import close

H, D = 6, 8


def random_case(
    batch: int, length: int, n_kv_head: int, documents: bool = False, sinks: bool = False, seed: int = 0
) -> tuple[list[Tensor], Tokens]:
    """q, k, v and, where sinks see queries of their own, q_sinks; tokens of whole sequences."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, H, length, D), (batch, n_kv_head, length, D), (batch, n_kv_head, length, D)]
    shapes += [(batch, H, length, D)] * sinks
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    numbers = torch.randint(0, 2, (batch, length), generator=generator).cumsum(1) if documents else None
    return tensors, Tokens(torch.arange(length).expand(batch, -1), numbers, plain=not documents, in_order=True)


def results(kernel: str, tensors: list[Tensor], rule: Visibility, tokens: Tokens) -> list[Tensor]:
    """The output and the gradients."""
    q, k, v, *q_sinks = tensors
    out = KERNELS[kernel](Inputs(q, k, v, rule, tokens, tokens, 0.0, *q_sinks))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * upstream).sum(), tensors)]


def assert_agrees(kernel: str, rule: Visibility, tensors: list[Tensor], tokens: Tokens) -> None:
    expected, actual = results("reference", tensors, rule, tokens), results(kernel, tensors, rule, tokens)
    close(actual[0], expected[0], 1e-5)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert torch.isfinite(one).all()
        close(one, other, 1e-4)
