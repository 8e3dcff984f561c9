"""What a step does to the weights, and at what rate, against plain formulas and the optimizers' own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from helpers.trainings import small
from torch import Tensor

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training.loop import train
from gptlab.training.optimizer import clip, learning_rate_share, make_optimizers
from gptlab.training.settings import OptimizerSettings, ScheduleSettings


def shares(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleSettings(**settings)  # type: ignore[arg-type]
    return [learning_rate_share(schedule, step, steps) for step in range(steps)]


def test_a_warm_up_and_half_a_cosine() -> None:
    rates = shares(110, kind="cosine", warmup_steps=10, final_share=0.2)
    assert [rates[step] for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rates[60] == pytest.approx(0.6)  # half way, in the middle of both
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[109] == pytest.approx(0.2, abs=1e-3)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_warm_up_stable_decay() -> None:
    rates = shares(1000, kind="wsd", warmup_steps=100, final_share=0.0, decay_share=0.2)
    assert set(rates[99:820]) == {1.0}  # the last fifth of the 900 after the warm-up falls
    assert rates[910] == pytest.approx(0.5)
    assert rates[955] == pytest.approx(0.25)
    assert rates[999] == pytest.approx(1 / 180)
    assert shares(1000, kind="wsd", warmup_steps=0, final_share=0.1)[900] == pytest.approx(0.55)


def test_constant() -> None:
    assert shares(20, kind="constant", warmup_steps=4, final_share=0.0) == [0.25, 0.5, 0.75] + [1.0] * 17


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 100), (5, 5), (3, 0), (5, 4)])
def test_very_short_runs(kind: str, steps: int, warmup: int) -> None:
    assert all(0 < share <= 1 for share in shares(steps, kind=kind, warmup_steps=warmup, final_share=0.0))


# --- groups ---------------------------------------------------------------------------------------------------


def names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]


def test_weight_decay_falls_on_matrices_only_and_on_each_once() -> None:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny"))
    settings = OptimizerSettings(learning_rate=0.5, weight_decay=0.3, beta1=0.8, beta2=0.9)
    (optimizer,) = make_optimizers(model, settings)
    assert type(optimizer) is torch.optim.AdamW
    decayed, spared = names_of(model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.5 for group in optimizer.param_groups)
    assert decayed | spared == {name for name, _ in model.named_parameters()}
    assert not decayed & spared
    assert spared == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"} <= decayed


@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_the_matrices_of_the_blocks(tie: bool) -> None:
    config = gptlab.ModelConfig.preset("tiny", position="rope", n_kv_head=2, tie_embeddings=tie, bias=False)
    model = gptlab.GPT(config)
    adamw, muon = make_optimizers(model, OptimizerSettings(name="muon", weight_decay=0.3, momentum=0.8))
    assert type(muon) is torch.optim.Muon
    blocks = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert names_of(model, muon) == [{f"h.{i}.{part}.weight" for i in (0, 1) for part in blocks}]
    assert [group["weight_decay"] for group in muon.param_groups] == [0.3]
    decayed, spared = names_of(model, adamw)
    assert decayed == ({"wte.weight"} if tie else {"wte.weight", "lm_head.weight"})
    assert spared == {"ln_f.weight", *(f"h.{i}.ln_{j}.weight" for i in (0, 1) for j in (1, 2))}


def test_muon_moves_a_matrix_as_far_as_adamw_would() -> None:
    # Liu et al. 2025: AdamW's updates have a root mean square of about 0.2 of the learning rate, so Muon's get it too.
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny"))
    settings = OptimizerSettings(name="muon", learning_rate=0.1, weight_decay=0.0)
    _, muon = make_optimizers(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    for name, p in model.named_parameters():
        moved = (p.detach() - before[name]).square().mean().sqrt().item()
        if p.ndim == 2 and name.startswith("h."):
            assert moved == pytest.approx(0.1 * 0.2, rel=0.25), name  # the orthogonalisation is a rough one
        else:
            assert moved == 0, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_attention_may_have_a_learning_rate_of_its_own(name: str, data: Dataset, tmp_path: Path) -> None:
    settings = ["budget.steps=1", "schedule.warmup_steps=0", "optimizer.weight_decay=0", f"optimizer.name={name}"]

    def moved(factor: float) -> dict[str, Tensor]:
        recipe = small(f"optimizer.attention_factor={factor}", "optimizer.learning_rate=1e-3", *settings)
        model = train(recipe, data, tmp_path / str(factor)).language_model.model
        start = gptlab.GPT(model.config, recipe.train.seed)
        pairs = zip(model.named_parameters(), start.parameters(), strict=True)
        return {n: p.detach() - q.detach() for (n, p), q in pairs}

    plain, faster = moved(1), moved(4)
    attention = {n for n in plain if ".attn." in n or ".ln_1." in n}
    assert len(attention) == 6 * 2  # two layers of weights and biases
    for n, change in plain.items():
        times = 4 if n in attention else 1
        torch.testing.assert_close(faster[n], times * change, atol=2e-7, rtol=1e-5)
        assert change.abs().max() > 0


def test_clipping_scales_all_gradients_alike() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for p in parameters:
        p.grad = torch.full(p.shape, 2.0)
    norm = clip(parameters, 1.0)
    assert norm.item() == pytest.approx(2 * 7**0.5)
    for p in parameters:
        assert p.grad is not None
        assert torch.allclose(p.grad, torch.full(p.shape, 1 / 7**0.5), atol=1e-6)
    assert clip(parameters, 5.0).item() == pytest.approx(1.0, abs=1e-5)
    assert parameters[0].grad is not None
    assert torch.allclose(parameters[0].grad, torch.full((3,), 1 / 7**0.5), atol=1e-6)  # short enough: left alone
