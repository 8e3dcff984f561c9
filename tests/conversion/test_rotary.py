# Learned positions to rotary ones: what is exact, what is fitted, and what is refused.
from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import lively as noisy
from helpers.models import same_state
from torch import Tensor

import gptlab
from gptlab import GPT, GptlabError
from gptlab.config import RopeConfig
from gptlab.conversion.calibration import calibration_rows
from gptlab.conversion.convert import Changes
from gptlab.conversion.convert import convert as convert_all
from gptlab.conversion.drift import measure_drift
from gptlab.conversion.gauge import Gauge, key_bias, spend_gauge
from gptlab.conversion.layers import read_heads, rebuild
from gptlab.conversion.rotary import best_rotary, finish_blend, to_blend, to_rope, without_positions

CONTEXT = 64
VARIANTS: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2},
    {"window": 9, "sinks": 2},
    {"tie_embeddings": False},
    {"bias": False, "n_kv_head": 1},
    {"bias": False, "norm": "rms", "mlp": "swiglu"},
]
variants = pytest.mark.parametrize("values", VARIANTS, ids=str)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "pocket" not in request.node.name and "closer" not in request.node.name:
        monkeypatch.setattr("gptlab.conversion.gauge.STEPS", 12)
        monkeypatch.setattr("gptlab.conversion.gauge.ROW_STEPS", 12)


def random_ids(model: GPT, batch: int = 4, length: int = CONTEXT, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


@torch.no_grad()
def logprobs(model: GPT, ids: Tensor) -> Tensor:
    return model(ids).log_softmax(-1)


# Exact: the mean of the table, any gauge, a blend at its start and at its end


@variants
@pytest.mark.parametrize("method", ["abrupt", "gauge"])
def test_a_blend_starts_with_the_probabilities_of_its_source(values: dict[str, Any], method: Any) -> None:
    model = noisy(**values)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blend = to_blend(model, method=method, rows=random_ids(model), rope=RopeConfig(theta=100.0))
    assert blend.config.position == "blend"
    assert blend.config.rope == RopeConfig(theta=100.0)
    ids = random_ids(model, seed=1)
    torch.testing.assert_close(logprobs(blend, ids), logprobs(model, ids), rtol=0, atol=1e-4)
    if not model.config.tie_embeddings:  # a tied head adds one number to all logits of a position
        torch.testing.assert_close(blend(ids), model(ids), rtol=0, atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert blend.wpe.weight.mean(0).abs().max() < 1e-6


@variants
def test_without_positions_only_the_mean_of_the_table_is_left(values: dict[str, Any]) -> None:
    model = noisy(**values)
    bare = without_positions(model)
    assert bare.config.position == "none"
    constant = copy.deepcopy(model)  # a table that says the same of every position
    with torch.no_grad():
        constant.wpe.weight[:] = model.wpe.weight.mean(0)
    ids = random_ids(model)
    torch.testing.assert_close(logprobs(bare, ids), logprobs(constant, ids), rtol=0, atol=1e-5)
    assert (logprobs(bare, ids) - logprobs(model, ids)).abs().max() > 0.01


def test_without_positions_nothing_is_rotated() -> None:
    model = noisy(position="rope", rope=RopeConfig(theta=100.0))
    converted = convert_all(model, Changes(position="none"))
    assert [step.change for step in converted.steps] == ["rope -> none"]
    assert converted.model.config.rope is None
    assert same_state(converted.model, model)
    swapped = random_ids(model, 1, 9)[:, [1, 0, *range(2, 9)]]
    last = [converted.model(ids)[:, -1] for ids in (swapped, swapped[:, [1, 0, *range(2, 9)]])]
    one_layer = without_positions(noisy(position="rope", n_layer=1))
    single = [one_layer(ids)[:, -1] for ids in (swapped, swapped[:, [1, 0, *range(2, 9)]])]
    torch.testing.assert_close(*single, rtol=0, atol=1e-5)  # one layer reads a set; more tell order by the mask
    assert (last[0] - last[1]).abs().max() > 1e-4


def test_a_blend_keeps_its_positions() -> None:
    with pytest.raises(GptlabError, match="convert the model that it came from"):
        without_positions(to_blend(noisy(), method="abrupt"))
    with pytest.raises(GptlabError, match="convert the model that it came from"):
        convert_all(to_blend(noisy(), method="abrupt"), Changes(position="none"))


def test_a_tied_head_adds_one_number_to_all_logits_of_a_position() -> None:
    model = noisy()
    ids = random_ids(model)
    with torch.no_grad():
        more = to_blend(model, method="abrupt")(ids) - model(ids)
    assert more.abs().max() > 0.01
    torch.testing.assert_close(more, more[..., :1].expand_as(more), rtol=0, atol=1e-5)


@variants
def test_any_gauge_leaves_the_function_alone(values: dict[str, Any]) -> None:
    model = noisy(**values)
    config, generator = model.config, torch.Generator().manual_seed(3)
    shape = (config.kv_heads, config.head_dim, config.head_dim)

    def gauge(_: int) -> Gauge:
        mix = torch.randn(shape, dtype=torch.float64, generator=generator) + 2 * torch.eye(config.head_dim)
        return Gauge(mix, torch.randn(shape[:2], dtype=torch.float64, generator=generator) * config.bias)

    changed = rebuild(model, lambda layer, heads: gauge(layer).apply(heads))
    ids = random_ids(model)
    torch.testing.assert_close(logprobs(changed, ids), logprobs(model, ids), rtol=0, atol=1e-4)
    assert not torch.allclose(read_heads(changed.blocks[0].attn).q, read_heads(model.blocks[0].attn).q, atol=0.1)


@variants
def test_abrupt_is_the_same_weights_with_the_mean_position_in_every_token(values: dict[str, Any]) -> None:
    model = noisy(**values)
    rope = to_rope(model, method="abrupt", rope=RopeConfig(theta=77.0))
    assert (rope.config.position, rope.config.rope) == ("rope", RopeConfig(theta=77.0))
    theirs, ours = dict(model.named_parameters()), dict(rope.named_parameters())
    mean = theirs.pop("wpe.weight").mean(0)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours.pop("wte.weight"), theirs["wte.weight"] + mean)
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    assert (rope.lm_head.weight is rope.wte.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("method", ["abrupt", "gauge"])
def test_a_finished_blend_is_what_a_switch_at_once_gives(method: Any) -> None:
    model = noisy(n_kv_head=2)
    rows = random_ids(model)
    blend = to_blend(model, method=method, rows=rows)
    blend.rope_scale.fill_(1.0)
    blend.wpe_scale.fill_(0.0)
    finished = finish_blend(blend)
    assert finished.config == to_rope(model, method=method, rows=rows).config
    assert same_state(finished, to_rope(model, method=method, rows=rows))
    ids = random_ids(model, seed=1)
    torch.testing.assert_close(logprobs(finished, ids), logprobs(blend, ids), rtol=0, atol=1e-5)
    assert finished.wte.weight.data_ptr() != blend.wte.weight.data_ptr()


# Fitted


@variants
@pytest.mark.parametrize("method", ["gauge", "fit"])
def test_on_the_calibration_text_nothing_is_worse_than_abrupt(values: dict[str, Any], method: Any) -> None:
    model = noisy(**values)
    rows = random_ids(model, 6)
    fitted, abrupt = to_rope(model, method=method, rows=rows), to_rope(model, method="abrupt")
    drift = measure_drift(abrupt, fitted, rows)
    assert drift.after <= drift.before


@pytest.mark.parametrize("method", ["gauge", "fit"])
def test_where_it_would_be_worse_nothing_is_done(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.conversion.gauge.RATE", 50.0)
    monkeypatch.setattr("gptlab.conversion.gauge.ROW_RATE", 50.0)
    lm = gptlab.load("pocket")
    rows = calibration_rows(lm.needs_tokenizer(), 64, 128)
    converted = convert_all(lm.model, Changes(position="rope", rotary=method), rows)
    assert same_state(converted.model, to_rope(lm.model, method="abrupt"))
    said = f"learned -> rope, abrupt: {method} would have more nats per token on the calibration text"
    assert [step.change for step in converted.steps] == [said]  # what was done, not what was tried


def test_the_gauge_brings_attention_closer_to_the_source() -> None:
    model = noisy(n_kv_head=2, window=(None, 20), sinks=2)
    rows = random_ids(model, 8)
    rotated, fresh = to_rope(model, method="abrupt"), random_ids(model, 4, seed=9)

    @torch.no_grad()
    def far(converted: GPT) -> list[float]:
        divergences = []
        for layer in range(model.config.n_layer):
            a, b = (m.attention_maps(fresh, layer) for m in (model, converted))
            divergences.append((a * (a.clamp(min=1e-20).log() - b.clamp(min=1e-20).log())).sum(-1).mean().item())
        return divergences

    before = far(rotated)
    spend_gauge(model, rotated, rows)
    after = far(rotated)
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.8 * before[1]


def test_what_the_gauge_returns_is_what_it_did() -> None:
    model = noisy(n_kv_head=2)
    rotated = to_rope(model, method="abrupt")
    again = rebuild(rotated, lambda _, heads: heads)
    gauges = spend_gauge(model, rotated, random_ids(model))
    assert same_state(rebuild(again, lambda layer, heads: gauges[layer].apply(heads)), rotated)
    assert any(key_bias(block.attn).abs().max() > 0.01 for block in rotated.blocks)


def test_of_a_long_text_rows_spread_over_it_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptlab.conversion.rotary.MOST_TOKENS", 3 * CONTEXT + 10)
    model = noisy()
    rows = random_ids(model, 7)
    assert same_state(to_rope(model, rows=rows), to_rope(model, rows=rows[[0, 2, 4]]))
    assert not same_state(to_rope(model, rows=rows), to_rope(model, rows=rows[[0, 1, 2]]))
    one = to_rope(model, rows=rows[:1])
    monkeypatch.setattr("gptlab.conversion.rotary.MOST_TOKENS", 5)
    assert same_state(to_rope(model, rows=rows), one)


@pytest.mark.parametrize("method", ["gauge", "fit"])
def test_the_same_seed_gives_the_same_model_in_any_dtype(method: Any) -> None:
    model = noisy()
    rows = [*random_ids(model, 3), random_ids(model, 1, 30)[0]]  # of different lengths
    one = to_rope(model, method=method, rows=rows, seed=5)
    assert same_state(one, to_rope(model, method=method, rows=rows, seed=5))
    assert not same_state(one, to_rope(model, method=method, rows=rows, seed=6))
    low = to_rope(model.bfloat16().train(), method=method, rows=rows)
    assert low.wte.weight.dtype == torch.bfloat16
    assert low.training


def test_on_pocket_a_gauge_is_exact_and_loses_far_less() -> None:
    lm = gptlab.load("pocket")
    rows = calibration_rows(lm.needs_tokenizer(), 256, 4096)
    fit, held_out = rows[::2], rows[1::2][:4]
    blend = to_blend(lm.model, rows=fit)
    ids = held_out[0][None]
    torch.testing.assert_close(logprobs(blend, ids), logprobs(lm.model, ids), rtol=0, atol=1e-4)
    blend.rope_scale.fill_(1.0)
    blend.wpe_scale.fill_(0.0)
    gauge = measure_drift(lm.model, finish_blend(blend), held_out)
    abrupt = measure_drift(lm.model, to_rope(lm.model, method="abrupt"), held_out)
    assert gauge.kl < 0.5 * abrupt.kl


@pytest.mark.slow
def test_on_pocket_fitted_rows_lose_less_than_a_gauge() -> None:
    lm = gptlab.load("pocket")
    rows = calibration_rows(lm.needs_tokenizer(), 512, 16384)
    fit, held_out = rows[::2], rows[1::2]
    gauge, fitted = (measure_drift(lm.model, to_rope(lm.model, method=m, rows=fit), held_out) for m in ("gauge", "fit"))
    assert fitted.kl < 0.9 * gauge.kl


# Afterwards it is a model like any other


@pytest.mark.parametrize("convert", [to_rope, to_blend])
def test_it_is_saved_and_loaded(convert: Callable[..., GPT], tmp_path: Path) -> None:
    model = convert(noisy(), method="abrupt")
    gptlab.save(gptlab.LanguageModel(model), tmp_path)
    again = gptlab.load(tmp_path).model
    assert again.config == model.config
    assert same_state(again, model)


# Bad input


@pytest.mark.parametrize("convert", [to_rope, to_blend])
def test_what_cannot_be_converted_is_refused(convert: Callable[..., GPT]) -> None:
    rows = random_ids(noisy())
    for position in ("rope", "none"):
        with pytest.raises(GptlabError, match=f"only learned positions .* position='{position}'"):
            convert(noisy(position=position), rows=rows)
    with pytest.raises(GptlabError, match="a blend already"):
        convert(noisy(position="blend"), rows=rows)
    with pytest.raises(GptlabError, match="head_dim is 3, an odd number"):
        convert(noisy(n_embd=12), method="abrupt")
    with pytest.raises(GptlabError, match=r"got 'guage'.*gauge"):
        convert(noisy(), method="guage", rows=rows)
    nothing: Any
    for nothing in (None, [], rows[:0]):
        with pytest.raises(
            GptlabError, match="'gauge' looks at a calibration text; give it rows of tokens, or choose 'abrupt'"
        ):
            convert(noisy(), method="gauge", rows=nothing)
    with pytest.raises(GptlabError, match="exceed the context of 64"):
        convert(noisy(), rows=random_ids(noisy(), 1, 65))
    with pytest.raises(GptlabError, match="theta"):
        convert(noisy(), method="abrupt", rope=RopeConfig(theta=0.5))


def test_a_blend_is_not_fitted_beyond_its_gauge() -> None:
    assert (best_rotary("rope"), best_rotary("blend")) == ("fit", "gauge")
    with pytest.raises(GptlabError, match="'fit' changes what a model computes"):
        to_blend(noisy(), method="fit", rows=random_ids(noisy()))


@pytest.mark.parametrize(("rope", "wpe"), [(0.0, 1.0), (1.0, 0.5), (0.999, 0.0)])
def test_a_blend_is_finished_only_at_its_end(rope: float, wpe: float) -> None:
    blend = to_blend(noisy(), method="abrupt")
    blend.rope_scale[1:].fill_(1.0)
    blend.rope_scale[:1].fill_(rope)
    blend.wpe_scale.fill_(wpe)
    with pytest.raises(GptlabError, match="the blend is not at its end"):
        finish_blend(blend)
    with pytest.raises(GptlabError, match="only a model with position='blend'"):
        finish_blend(noisy())
