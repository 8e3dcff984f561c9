"""The loss in chunks, against PyTorch's cross-entropy on all logits at once."""

from __future__ import annotations

import pytest
import torch
from helpers.models import near
from torch import Tensor
from torch.nn import functional as F

from gptlab.training import loss
from gptlab.training.loss import IGNORED, cross_entropy

C, V = 24, 300


def make(n_tokens: int, ignored: slice | list[int] = slice(0), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weights and targets; logits of a few units, as a trained model has."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, C, generator=draw).requires_grad_()
    weight = (torch.randn(V, C, generator=draw) / 2).requires_grad_()
    targets = torch.randint(V, (n_tokens,), generator=draw)
    targets[ignored] = IGNORED
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's loss and gradients, in float64."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    total = F.cross_entropy(x @ w.T, targets, reduction="sum", ignore_index=IGNORED)
    return total.detach(), *torch.autograd.grad(total, (x, w))


CHUNKS = 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 tokens in float32, 128 in bfloat16, a softmax of 16 and products of 128 ids at once."""
    monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", CHUNKS * V * 4)
    monkeypatch.setitem(loss.SOFTMAX_BYTES, "cpu", 16 * V * 4)
    monkeypatch.setattr(loss, "_IDS", 128)


@pytest.mark.parametrize(
    ("n_tokens", "ignored"),
    [
        (1, []),
        (CHUNKS, []),
        (CHUNKS + 1, []),
        (3 * CHUNKS - 7, []),  # several chunks and a ragged last one
        (3 * CHUNKS - 7, [0, 5, CHUNKS - 1, CHUNKS, 3 * CHUNKS - 8]),
        (3 * CHUNKS, slice(CHUNKS, 2 * CHUNKS)),  # a chunk in the middle counts nothing
        (40, slice(None)),  # nothing counts at all
    ],
)
def test_loss_and_gradients_are_pytorchs(n_tokens: int, ignored: slice | list[int]) -> None:
    hidden, weight, targets = make(n_tokens, ignored)
    total = cross_entropy(hidden, weight, targets)
    assert total.dtype == torch.float32
    expected, dhidden, dweight = exact(hidden, weight, targets)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    near(total.detach(), expected, 1e-5)
    near(hidden.grad, dhidden, 1e-5)
    near(weight.grad, dweight, 1e-5)
    assert not hidden.grad[targets == IGNORED].any()


def test_batches_of_rows_and_the_gradient_that_comes_from_above() -> None:
    hidden, weight, targets = make(60)
    (cross_entropy(hidden.view(5, 12, C), weight, targets.view(5, 12)) * 0.25).backward()
    _, dhidden, dweight = exact(hidden, weight, targets)
    assert hidden.grad is not None
    assert weight.grad is not None
    near(hidden.grad, dhidden / 4, 1e-5)
    near(weight.grad, dweight / 4, 1e-5)


def test_a_weight_that_is_used_twice_collects_both_gradients() -> None:
    # As the tied embedding is: rows looked up at the beginning, products at the end.
    _, weight, targets = make(50)
    ids = targets.roll(1)
    cross_entropy(weight[ids], weight, targets).backward()
    double = weight.detach().double().requires_grad_()
    expected = F.cross_entropy(double[ids] @ double.T, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, double)
    assert weight.grad is not None
    near(weight.grad, gradient, 1e-5)


def test_huge_logits_neither_overflow_nor_lose_their_gradient() -> None:
    hidden, weight, targets = make(30)
    total = cross_entropy(hidden * 300, weight, targets)
    expected, _, dweight = exact(hidden * 300, weight, targets)
    total.backward()
    assert weight.grad is not None
    near(total.detach(), expected, 1e-5)
    near(weight.grad, dweight, 1e-5)


def test_bfloat16_stays_within_its_rounding() -> None:
    # Products of bfloat16 have 8 bits: logits of size 8 are off by at most 2**-6, the mean loss by much less; sums and
    # softmax in float32 add nothing to that.
    hidden, weight, targets = make(2 * CHUNKS + 50, [3, CHUNKS])
    with torch.autocast("cpu", torch.bfloat16):
        total = cross_entropy(hidden, weight, targets)
    expected, dhidden, dweight = exact(hidden, weight, targets)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    near(total.detach(), expected, 1e-3)
    near(hidden.grad, dhidden, 1e-2)
    near(weight.grad, dweight, 1e-2)
    assert (total.detach() - expected).abs() > 0  # autocast was honoured


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # One product of the logits' size for evaluation, three for training, each in three parts.
    products: list[torch.Size] = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **where: products.append(a.shape) or product(a, b, **where))
    hidden, weight, targets = make(CHUNKS)
    with torch.no_grad():
        without = cross_entropy(hidden, weight, targets)
    assert len(products) == 3
    assert torch.equal(without, cross_entropy(hidden, weight, targets).detach())
    assert len(products) == 3 + 9


def test_the_size_of_a_chunk_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tokens, rows in ((8, 1), (128, 8), (16_384, 16_384)):
        monkeypatch.setitem(loss.LOGITS_BYTES, "cpu", tokens * V * 4)
        monkeypatch.setitem(loss.SOFTMAX_BYTES, "cpu", rows * V * 4)
        hidden, weight, targets = make(500, [499])
        total = cross_entropy(hidden, weight, targets)
        total.backward()
        assert weight.grad is not None
        results.append((total.detach().double(), weight.grad.double()))
    for total, gradient in results[1:]:
        near(total, results[0][0], 1e-6)
        near(gradient, results[0][1], 1e-6)
