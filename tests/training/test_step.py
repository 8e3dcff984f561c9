"""The arithmetic of a step: what may change without changing the result."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training.data import Batch, Batches, Windows
from gptlab.training.loss import LogitsGradient, softmax_gradient
from gptlab.training.optimizer import clip
from gptlab.training.parallel import Group
from gptlab.training.step import (
    compile_step,
    gradients,
    recompute_blocks,
    seed_step,
    spare_embedding,
    stream_loss,
    summed_loss,
    worth_compiling,
)

ALONE = Group(0, 1, torch.device("cpu"))
VARIANTS: list[dict[str, Any]] = [{}, {"position": "rope", "n_kv_head": 2, "window": 8}]


def make(**overrides: Any) -> gptlab.GPT:
    return gptlab.GPT(gptlab.ModelConfig.preset("tiny", vocab_size=257, context_length=32, **overrides))


def run(
    data: Dataset,
    model: gptlab.GPT,
    *,
    micro: int | None = None,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    gradient: LogitsGradient = softmax_gradient,
) -> tuple[list[float], list[Tensor]]:
    """Some steps at batch 6; the losses and the weights after them.

    By plain gradient descent: AdamW blows the rounding of a gradient near zero up to the size of the learning rate.
    """
    batches = Batches(Windows(data.training, 32), 6, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()
    losses = []
    for step in range(steps):
        seed_step(0, step, 0)
        losses.append(gradients(model, batches[step], micro, dtype, ALONE, gradient)[0].item())
        clip(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, [p.detach() for p in model.parameters()]


def assert_alike(
    actual: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]], by: float
) -> None:
    assert actual[0] == pytest.approx(expected[0], abs=by)
    for a, b in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=by)


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_summed_surprise_in_nats(variant: dict[str, Any]) -> None:
    model = make(**variant).eval()
    ids = torch.randint(257, (3, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, torch.arange(3))
    chances = model(batch.ids).double().softmax(-1).gather(-1, batch.targets[..., None])
    assert summed_loss(model, batch, torch.float32).item() == pytest.approx(-chances.log().sum().item(), rel=1e-6)


def test_bfloat16_is_near_float32_and_leaves_weights_and_gradients_in_float32() -> None:
    model = make()
    ids = torch.randint(257, (3, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, torch.arange(3))
    exact, low = (gradients(model, batch, None, dtype, ALONE)[0].item() for dtype in (torch.float32, torch.bfloat16))
    assert low == pytest.approx(exact, rel=1e-3)
    assert low != exact
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("n_tokens", [None, 100])
def test_the_loss_of_a_stream_counts_every_token_once(data: Dataset, batch_size: int, n_tokens: int | None) -> None:
    model = make(dropout=0.5).train()  # evaluation switches dropout off
    split = data.validation
    actual = stream_loss(model, Windows(split, 16), batch_size=batch_size, n_tokens=n_tokens)
    assert not model.training
    ids = torch.from_numpy(split.read(0, n_tokens or split.n_tokens).astype("int64"))
    expected = 0.0
    with torch.no_grad():
        for first in range(0, len(ids) - 1, 16):
            part = ids[first : first + 17]
            expected += F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum").item()
    assert actual == pytest.approx(expected / (len(ids) - 1), rel=1e-6)


def test_an_evaluation_keeps_no_gradients(data: Dataset) -> None:
    model = make()
    stream_loss(model, Windows(data.validation, 16), n_tokens=100)
    assert all(p.grad is None for p in model.parameters())


# --- what changes memory or speed only ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("micro", [1, 4, 6, 100])
def test_micro_batches_change_rounding_only(data: Dataset, variant: dict[str, Any], micro: int) -> None:
    expected = run(data, make(**variant))
    assert_alike(run(data, make(**variant), micro=micro), expected, 1e-6)


def test_micro_batches_are_weighted_by_their_tokens() -> None:
    # The mean over all tokens of a batch, not the mean of its rows' means.
    model = make()
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    for row, n in enumerate((32, 2, 17, 1)):
        targets[row, n:] = -100
    batch = Batch(ids[:, :-1], targets, None, torch.arange(4))
    logits = model(batch.ids).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten())
    by_autograd = torch.autograd.grad(expected, list(model.parameters()))
    for micro in (None, 1, 3):
        model.zero_grad()
        actual = gradients(model, batch, micro, torch.float32, ALONE).tolist()
        assert actual == pytest.approx([expected.item()] * 2, rel=1e-6)
        for p, gradient in zip(model.parameters(), by_autograd, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [*VARIANTS, {"dropout": 0.2}])
def test_recomputing_blocks_changes_nothing(data: Dataset, variant: dict[str, Any]) -> None:
    # Dropout too: the second forward pass draws what the first one drew.
    expected = run(data, make(**variant))
    model = make(**variant)
    recompute_blocks(model)
    assert_alike(run(data, model), expected, 1e-6)


def test_rows_of_a_gradient_in_place_of_a_matrix_change_rounding_only(data: Dataset) -> None:
    ids = torch.tensor([[5, 5, 6]])
    expected = run(data, make(), micro=2)
    model = make()
    spare_embedding(model)
    assert_alike(run(data, model, micro=2), expected, 1e-6)
    model.zero_grad()
    rows = model.wte(ids)
    assert rows.grad_fn is None  # nothing of the matrix's size comes back this way
    rows.sum().backward()
    assert model.wte.weight.grad is not None
    assert model.wte.weight.grad[:, 0].nonzero().flatten().tolist() == [5, 6]
    assert model.wte.weight.grad[5, 0] == 2
    with torch.no_grad():
        assert not model.wte(ids).requires_grad
    model.wte.weight.requires_grad_(False)
    assert not model.wte(ids).requires_grad
    untied = make(tie_embeddings=False)
    spare_embedding(untied)
    assert untied.wte(ids).grad_fn is not None  # there is no other gradient that it could be added to


def test_recomputing_keeps_less() -> None:
    ids = torch.randint(257, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, torch.arange(4))
    kept = []
    for recompute in (False, True):
        model = make()
        if recompute:
            recompute_blocks(model)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            summed_loss(model, batch, torch.float32)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_compiling_changes_rounding_only(data: Dataset, variant: dict[str, Any], recompute: bool) -> None:
    expected = run(data, make(**variant))
    model = make(**variant)
    batch = Batches(Windows(data.training, 32), 6, seed=0)[0]
    gradient = compile_step(model, batch, torch.float32, must=True, say=pytest.fail, recompute=recompute)
    assert gradient is not None
    assert_alike(run(data, model, gradient=gradient), expected, 1e-5)
    whole = Windows(data.validation, 32)
    assert stream_loss(model, whole) == pytest.approx(stream_loss(_like(model, make(**variant)), whole), abs=1e-5)


@pytest.mark.slow
def test_compiling_in_bfloat16_stays_within_its_rounding(data: Dataset) -> None:
    expected = run(data, make(), dtype=torch.bfloat16)
    model = make()
    batch = Batches(Windows(data.training, 32), 6, seed=0)[0]
    gradient = compile_step(model, batch, torch.bfloat16, must=True, say=pytest.fail)
    assert gradient is not None
    losses, _ = run(data, model, dtype=torch.bfloat16, gradient=gradient)
    assert losses == pytest.approx(expected[0], rel=2e-3)


def _like(model: gptlab.GPT, other: gptlab.GPT) -> gptlab.GPT:
    other.load_state_dict({name: p.detach() for name, p in model.named_parameters()}, strict=False)
    return other


def test_where_nothing_compiles_training_goes_on_in_words(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no C++ compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    expected = run(data, make(), steps=1)
    model, said = make(), list[str]()
    batch = Batches(Windows(data.training, 32), 6, seed=0)[0]
    assert compile_step(model, batch, torch.float32, must=False, say=said.append) is None
    assert said == ["torch.compile does not work here (no C++ compiler); going on without, which is slower"]
    assert_alike(run(data, model, steps=1), expected, 0)
    with pytest.raises(gptlab.GptlabError, match=r"\(no C\+\+ compiler\); set train\.compile=false"):
        compile_step(model, batch, torch.float32, must=True, say=pytest.fail)


def test_a_compiler_that_computes_wrongly_is_found_out(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = [False]

    @contextlib.contextmanager
    def stance(name: str) -> Iterator[None]:
        eager[0] = True
        yield
        eager[0] = False

    def compile(function: Any) -> Any:
        return lambda *args: function(*args) if eager[0] or function is softmax_gradient else function(*args) * 1.5

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    model, said = make(), list[str]()
    batch = Batches(Windows(data.training, 32), 6, seed=0)[0]
    with torch._inductor.config.patch({"cpp.simdlen": None}):  # put back afterwards
        assert compile_step(model, batch, torch.float32, must=False, say=said.append) is None
    assert len(said) == 1
    assert re.search(r"\(compiled, a loss of [\d.]+ comes out as [\d.]+\); going on without", said[0])
    assert all(block.run is None for block in model.blocks)
    message = r"train\.compile=false, or install another C"
    with torch._inductor.config.patch({"cpp.simdlen": None}), pytest.raises(gptlab.GptlabError, match=message):
        compile_step(model, batch, torch.float32, must=True, say=pytest.fail)


def test_auto_compiles_long_runs_only() -> None:
    cpu = torch.device("cpu")
    assert not worth_compiling(1e12, cpu)
    assert worth_compiling(1e15, cpu)
    assert worth_compiling(1e12, torch.device("cuda"))


# --- random state and shares ----------------------------------------------------------------------------------


def test_dropout_is_a_function_of_seed_step_and_process() -> None:
    def draw(*key: int) -> list[float]:
        seed_step(*key)
        return torch.rand(3).tolist()

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({tuple(draw(*key)) for key in ((1, 2, 0), (2, 1, 0), (12, 0, 0), (1, 20, 0), (1, 2, 1))}) == 5


@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 2), (7, 3), (2, 2), (10, 4)])
def test_processes_share_a_batch_without_rest(n: int, size: int) -> None:
    parts = [range(n)[replace(ALONE, rank=rank, size=size).share(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
