"""The share of positional scores that is about distance: against least squares written out, and where it is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import lively
from safetensors import safe_open
from torch import Tensor

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.inspecting import relative_shares

T = 24


def scores(model: GPT, layer: int, head: int) -> Tensor:
    """(T, T) float64, from the weights as they are stored."""
    config, block, d = model.config, model.blocks[layer], model.config.head_dim
    rows = model.wpe.weight[:T].detach().double()
    if config.norm == "layer":
        rows = rows - rows.mean(1, keepdim=True)
    rows = rows * block.ln_1.weight.detach().double()
    weight = block.attn.c_attn.weight.detach().double()
    key = config.n_embd + head * config.kv_heads // config.n_head * d
    return (rows @ weight[head * d : head * d + d].T) @ (rows @ weight[key : key + d].T).T


def by_hand(score: Tensor, functions: Tensor) -> float:
    """1 - (what is left) / (what was there), by one column for each query and one for each function of the distance."""
    pairs = [(t, s) for t in range(T) for s in range(t + 1)]
    y = torch.tensor([score[t, s] for t, s in pairs], dtype=torch.float64)
    queries = torch.tensor([[float(t == i) for i in range(T)] for t, _ in pairs], dtype=torch.float64)
    design = torch.cat([queries, torch.stack([functions[t - s] for t, s in pairs])], 1)

    def left(columns: Tensor) -> float:
        fitted = columns @ torch.linalg.lstsq(columns, y[:, None], driver="gelsd").solution
        return (y - fitted[:, 0]).square().sum().item()

    return 1 - left(design) / left(queries)


@pytest.mark.parametrize("values", [{}, {"n_kv_head": 2}, {"norm": "rms", "bias": False}], ids=str)
def test_shares_are_those_of_least_squares_written_out(values: dict[str, Any]) -> None:
    model = lively(**values)
    shares, d = relative_shares(model, T), model.config.head_dim
    angles = [10000.0 ** (-2 * i / d) for i in range(d // 2)]
    waves = torch.tensor(
        [[f(n * a) for f in (math.cos, math.sin) for a in angles] for n in range(T)], dtype=torch.float64
    )
    for layer, head in ((0, 0), (1, 3)):
        score = scores(model, layer, head)
        assert shares.distance[layer, head].item() == pytest.approx(by_hand(score, torch.eye(T).double()), abs=1e-9)
        assert shares.rotary[layer, head].item() == pytest.approx(by_hand(score, waves), abs=1e-6)
    assert (shares.rotary <= shares.distance + 1e-9).all()
    assert shares.distance.max() < 0.9  # random tables know nothing of distances


def test_scores_of_waves_are_about_distance_alone() -> None:
    model = lively(norm="rms", bias=False)
    config = model.config
    half = config.head_dim // 2
    angles = torch.arange(config.context_length)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    with torch.no_grad():
        model.wpe.weight.zero_()[:, : 2 * half] = torch.cat([angles.cos(), angles.sin()], 1)
        for block in model.blocks:
            block.ln_1.weight.fill_(1.0)
            block.attn.c_attn.weight.zero_()
            for row in (0, config.n_embd):  # the first head's queries and keys are the waves
                block.attn.c_attn.weight[row : row + 2 * half, : 2 * half] = torch.eye(2 * half)
    shares = relative_shares(model)
    assert shares.distance[0, 0].item() == pytest.approx(1, abs=1e-9)
    assert shares.rotary[0, 0].item() == pytest.approx(1, abs=1e-6)


def test_what_has_no_table_is_refused() -> None:
    with pytest.raises(GptlabError, match="this model has position='rope'"):
        relative_shares(lively(position="rope"))
    with pytest.raises(GptlabError, match="length must be 3 to 64 positions, got 65"):
        relative_shares(lively(), 65)


def test_gpt2s_first_layer_is_about_distance(shared: Path) -> None:
    file = shared / "models" / "gpt2-attention" / "model.safetensors"
    if not file.exists():
        pytest.skip("../shared/models/gpt2-attention is absent")
    model = GPT(ModelConfig.preset("gpt2", n_layer=1, vocab_size=1, n_inner=1))
    with safe_open(file, "pt") as real, torch.no_grad():
        for name in ("wpe.weight", "h.0.ln_1.weight", "h.0.attn.c_attn.weight"):
            tensor, own = real.get_tensor(name), model.get_parameter(name)
            own.copy_(tensor.T if "c_attn" in name else tensor)
    shares = relative_shares(model, 256)
    assert shares.distance.mean() > 0.6
    with torch.no_grad():
        model.blocks[0].attn.c_attn.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert relative_shares(model, 256).distance.mean() < 0.4
