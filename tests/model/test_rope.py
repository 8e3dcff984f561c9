"""Rotary positions: the angles, the relative property, the scalings, the layouts."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import gptlab
from gptlab.config import RopeConfig
from gptlab.model.rope import Rotary, frequencies

HEAD_DIM, TRAINED = 64, 1024


def scaled(kind, factor):
    names = {None: "default", "linear": "linear", "yarn": "yarn", "ntk": "default", "llama3": "llama3"}
    base = 10000.0 * factor ** (HEAD_DIM / (HEAD_DIM - 2)) if kind == "ntk" else 10000.0
    parameters = {"rope_type": names[kind], "rope_theta": base}
    if kind in ("linear", "yarn", "llama3"):
        parameters["factor"] = factor
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = TRAINED
    return LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=TRAINED * (int(factor) if kind == "yarn" else 1),
        rope_parameters=parameters,
    )


@pytest.mark.parametrize(
    ("kind", "factor"),
    [(None, 1.0), ("linear", 4.0), ("ntk", 4.0), ("yarn", 4.0), ("yarn", 16.0), ("llama3", 8.0), ("llama3", 32.0)],
)
def test_frequencies_are_those_of_transformers(kind, factor):
    per_position, attention_factor = frequencies(RopeConfig(scaling=kind, factor=factor), HEAD_DIM, TRAINED)
    judge = LlamaRotaryEmbedding(scaled(kind, factor))
    torch.testing.assert_close(per_position.float(), judge.inv_freq, atol=0, rtol=1e-5)
    assert attention_factor == pytest.approx(judge.attention_scaling, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "factor"), [(None, 1.0), ("linear", 4.0), ("ntk", 4.0), ("yarn", 4.0), ("llama3", 8.0)]
)
def test_turned_vectors_are_those_of_transformers_below_4096(kind, factor):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 4096, HEAD_DIM, generator=generator)
    positions = torch.arange(4096)[None]
    cos, sin = LlamaRotaryEmbedding(scaled(kind, factor))(q, positions)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(positions, *frequencies(RopeConfig(scaling=kind, factor=factor), HEAD_DIM, TRAINED))
    # transformers' angles are float32: at position 4,095 half a unit in the last place is 1.2e-4 of a radian.
    torch.testing.assert_close(rotary.rotate(q)[:, :, :64], expected_q[:, :, :64], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotary.rotate(k), expected_k, atol=1e-3, rtol=0)


def test_scores_depend_on_the_distance_alone_up_to_a_million():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, HEAD_DIM, generator=generator)
    rope = frequencies(RopeConfig(), HEAD_DIM, TRAINED)

    def score(at_query, at_key):
        return (
            Rotary(torch.tensor([[at_query]]), *rope).rotate(q) * Rotary(torch.tensor([[at_key]]), *rope).rotate(k)
        ).sum()

    for distance in (0, 1, 17, 1000):
        expected = score(distance, 0)
        for key in (1, 999, 12_345, 100_000, 1_000_000 - distance):
            assert abs(score(key + distance, key) - expected) < 1e-4


def test_a_model_in_bfloat16_keeps_its_angles():
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", position="rope"))
    before = model.frequencies[0].clone()
    model = model.to(torch.bfloat16)
    assert model.frequencies[0].dtype == torch.float64
    assert torch.equal(model.frequencies[0], before)
    cos, _ = Rotary(torch.tensor([[50_000]]), *model.frequencies)._table(None)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos.flatten().double(), (50_000 * before).cos(), atol=1e-7, rtol=0)


def test_the_interleaved_layout_means_the_same_rotation():
    def half_from_interleaved(rows: torch.Tensor, n_head: int) -> torch.Tensor:
        return rows.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)

    generator = torch.Generator().manual_seed(2)
    n_head, width = 3, 20
    weight = torch.randn(n_head * 8, width, generator=generator)
    bias = torch.randn(n_head * 8, generator=generator)
    # An interleaved projection, its pairs (2i, 2i + 1) rotated as complex numbers, against ours after the permutation.
    x = torch.randn(5, width, generator=generator)
    per_position, _ = frequencies(RopeConfig(), 8, TRAINED)
    q = (x @ weight.T + bias).unflatten(-1, (n_head, 8)).transpose(0, 1)  # (H, T, 8)
    angles = torch.arange(5)[:, None] * per_position
    rotated = torch.view_as_real(
        torch.view_as_complex(q.double().unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    )
    ours = x @ half_from_interleaved(weight, n_head).T + half_from_interleaved(bias, n_head)
    ours = Rotary(torch.arange(5)[None], per_position).rotate(ours.unflatten(-1, (n_head, 8)).transpose(0, 1)[None])[0]
    # the same numbers, at the places that the half layout gives them
    expected = torch.cat([rotated[..., 0], rotated[..., 1]], dim=-1).float()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_sinks_see_a_query_no_farther_than_the_window_reaches():
    rope = frequencies(RopeConfig(), 8, TRAINED)
    x = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 5, 11, 5000]])
    actual = Rotary(positions, *rope, limits=[11]).rotate(x, at_most=11)
    expected = Rotary(positions.clamp(max=11), *rope).rotate(x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_keeps_lengths_and_the_dtype_and_is_computed_in_float32(dtype):
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(4)).to(dtype)
    positions = torch.tensor([[0, 1, 300, 70_000, 1_000_000], [5, 5, 5, 5, -1]])
    rotary = Rotary(positions, *frequencies(RopeConfig(), 8, TRAINED))
    rotated = rotary.rotate(x)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rotary.rotate(x.float()).to(dtype))
    torch.testing.assert_close(rotary.rotate(x.float()).norm(dim=-1), x.float().norm(dim=-1), atol=1e-5, rtol=0)
    assert torch.equal(rotated[0, :, 0], x[0, :, 0])  # position 0 is rotated by nothing


def test_pairs_rotate_by_the_angles_of_the_paper():
    # Pair i of position p is rotated by p * theta^(-2i/D): a unit vector shows the angle itself.
    per_position, factor = frequencies(RopeConfig(theta=100.0), 4, TRAINED)
    assert per_position.dtype == torch.float64
    assert per_position.tolist() == pytest.approx([1.0, 0.1])
    assert factor == 1.0
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)
    rotated = Rotary(torch.tensor([[3]]), per_position).rotate(x).flatten().double()
    angles = torch.tensor([3.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(rotated, torch.cat([angles.cos(), angles.sin()]), atol=1e-7, rtol=0)


def test_the_angles_are_no_part_of_the_state_and_follow_no_default_dtype():
    config = gptlab.ModelConfig.preset("tiny", position="rope")
    model = gptlab.GPT(config)
    assert not [name for name in model.state_dict() if "freq" in name or "wpe" in name]
    with torch.device("meta"):
        assert gptlab.GPT(config).frequencies[0].device.type == "cpu"
    torch.set_default_dtype(torch.float64)
    try:
        again = gptlab.GPT(config).frequencies[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, model.frequencies[0])


def test_a_model_without_positions_sees_a_set_and_rope_sees_an_order():
    # One layer over a permuted past: without positions the last token's output cannot tell.
    for position, tells in (("none", False), ("rope", True)):
        model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", position=position, n_layer=1), seed=1).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
            ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
            other = torch.tensor([[5, 3, 1, 4, 2, 6]])
            apart = (model(ids)[0, -1] - model(other)[0, -1]).abs().max()
        assert (apart > 1e-3) == tells
        assert tells or apart < 1e-5
