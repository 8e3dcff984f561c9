# What layers read, against the inputs of their projections collected by hand.
from __future__ import annotations

import pytest
import torch
from helpers.models import disturb
from torch import Tensor

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.conversion.statistics import assumed_statistics, batches, collect_statistics


@pytest.fixture(scope="module", params=["layer", "rms"])
def model(request: pytest.FixtureRequest) -> GPT:
    norm = request.param
    return disturb(GPT(ModelConfig.preset("tiny", dropout=0.5, norm=norm, bias=norm == "layer")).eval(), 0.3)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(256, (70, 64), generator=torch.Generator().manual_seed(1))


def inputs_of(model: GPT, rows: Tensor) -> list[Tensor]:
    """(tokens, C) float64 for each layer."""
    inputs: list[Tensor] = []
    handles = [
        block.attn.c_attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    return inputs


def test_moments_of_a_text(model: GPT, ids: Tensor) -> None:
    n = ids.numel()
    for block, moments, z in zip(model.blocks, collect_statistics(model, ids), inputs_of(model, ids), strict=True):
        # The assumption counts as C tokens of its mean and covariance.
        assumed = assumed_statistics(block)
        weight = 32 / (n + 32)
        mean = (1 - weight) * z.mean(0) + weight * assumed.mean
        second = (1 - weight) * z.T @ z / n + weight * (assumed.covariance + torch.outer(assumed.mean, assumed.mean))
        assert moments.tokens == n
        torch.testing.assert_close(moments.mean, mean, rtol=0.0, atol=1e-6)
        torch.testing.assert_close(moments.covariance, second - torch.outer(mean, mean), rtol=0.0, atol=1e-5)
        assert torch.equal(moments.centred[:-1, :-1], moments.covariance)
        assert not moments.centred[-1].any()
        assert not moments.centred[:, -1].any()
        torch.testing.assert_close(moments.uncentred[:-1, :-1], second, rtol=0.0, atol=1e-5)
        assert torch.equal(moments.uncentred[-1, :-1], moments.mean)
        assert moments.uncentred[-1, -1] == 1


def test_rows_of_any_lengths_on_their_own_or_in_batches(model: GPT, ids: Tensor) -> None:
    rows = [ids[0], ids[1], ids[2, :10], ids[3, :0], ids[4, :10], ids[5, :1]]
    assert [tuple(batch.shape) for batch in batches(rows)] == [(2, 64), (2, 10), (1, 1)]
    assert [tuple(batch.shape) for batch in batches(ids)] == [(16, 64)] * 4 + [(6, 64)]
    assert torch.equal(torch.cat(list(batches(ids))), ids)
    for layer, moments in enumerate(collect_statistics(model, rows)):
        z = torch.cat([inputs_of(model, row[None])[layer] for row in rows if len(row)])
        assert moments.tokens == len(z) == 149
        mean = (z.sum(0) + 32 * assumed_statistics(model.blocks[layer]).mean) / (149 + 32)
        torch.testing.assert_close(moments.mean, mean, rtol=0.0, atol=1e-6)


def test_what_the_layer_norm_alone_tells(model: GPT) -> None:
    norm = model.blocks[1].ln_1
    moments = assumed_statistics(model.blocks[1])
    normal = torch.randn(200_000, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = norm(normal).double()
    torch.testing.assert_close(moments.mean, z.mean(0), rtol=0.0, atol=0.02)
    torch.testing.assert_close(moments.covariance, torch.cov(z.T), rtol=0.0, atol=0.1)
    assert moments.tokens == 0


def test_without_biases_the_mean_is_0() -> None:
    model = GPT(ModelConfig.preset("tiny", bias=False))
    assert not assumed_statistics(model.blocks[0]).mean.any()
    assert collect_statistics(model, torch.zeros(1, 5, dtype=torch.int64))[0].tokens == 5


@pytest.mark.parametrize("rows", [[], torch.zeros(0, 64, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)])
def test_an_empty_text_is_refused(model: GPT, rows: Tensor) -> None:
    with pytest.raises(GptlabError, match="calibration text is empty"):
        collect_statistics(model, rows)
