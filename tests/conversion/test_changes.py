# Several changes at once: which are exact, in which order they come, and what is refused.
from __future__ import annotations

import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import lively as noisy
from helpers.models import random_ids, same_state
from torch import Tensor
from torch.nn import functional as F

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.config import RopeConfig
from gptlab.conversion.calibration import calibration_rows, keep_back, sha256_of_rows
from gptlab.conversion.context import extend_context
from gptlab.conversion.convert import Changes, convert, plan, target, why
from gptlab.conversion.drift import measure_drift
from gptlab.conversion.heads import regroup, repeat_heads
from gptlab.conversion.statistics import collect_statistics
from gptlab.conversion.windows import narrow
from gptlab.text.tokenizers import byte_tokenizer


def rows(n: int = 8, length: int = 64) -> list[Tensor]:
    return list(random_ids(256, n, length))


# Windows


@torch.no_grad()
def test_a_window_changes_no_weight_and_no_output_within_it() -> None:
    model, ids = noisy(), random_ids(256)
    new = narrow(model, 8, sinks=2)
    assert new.config == dataclasses.replace(model.config, window=8, sinks=2)
    assert same_state(new, model)
    before, after = model(ids), new(ids)
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0.0, atol=1e-5)
    assert (after[:, 12:] - before[:, 12:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_window_as_long_as_the_context_computes_the_same_and_is_named() -> None:
    model, ids = noisy(), random_ids(256, length=64)
    with pytest.warns(UserWarning, match="window=64 hides nothing within the context_length of 64"):
        new = convert(model, Changes(window=64)).model
    assert new.config.window == 64
    torch.testing.assert_close(new(ids), model(ids), rtol=0.0, atol=1e-5)
    # One that is only that long on the way gives no warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(model, Changes(window=64, context_length=100)).model.config.window == 64


def test_windows_by_layer() -> None:
    new = convert(noisy(), Changes.from_dict({"window": [8, None], "dilation": [2, 1]})).model
    assert (new.config.windows, new.config.dilations) == ((8, None), (2, 1))
    assert convert(new, Changes.from_dict({"window": [16, 16], "dilation": 1})).model.config.window == 16
    assert plan(narrow(noisy(), 8).config, Changes(window=(8, 8)), calibrated=False) == ()


# Context


@torch.no_grad()
def test_full_attention_again() -> None:
    """A window and what belongs to it go together; the weights are those of the model that never had one."""
    full, ids = noisy(), random_ids(256)
    windowed = convert(full, Changes(window=9, sinks=2, dilation=2)).model
    back = convert(windowed, Changes(window=[None])).model
    assert back.config == full.config
    assert torch.equal(back(ids), full(ids))
    with pytest.raises(GptlabError, match="no effect without a window"):
        convert(windowed, Changes(window=[None], sinks=2))


@torch.no_grad()
def test_a_longer_table_is_copies_side_by_side() -> None:
    model, ids = noisy(), random_ids(256, length=64)
    new = convert(model, Changes(context_length=150)).model
    assert new.config == dataclasses.replace(model.config, context_length=150)
    table = model.wpe.weight
    assert torch.equal(new.wpe.weight, torch.cat([table, table, table[:22]]))
    torch.testing.assert_close(new(ids), model(ids), rtol=0.0, atol=1e-6)
    assert new(random_ids(256, length=150)).shape == (3, 150, 256)


def test_a_longer_table_at_random_for_comparison() -> None:
    model = noisy()
    new = extend_context(model, 100, method="random", seed=5)
    fresh = GPT(ModelConfig.preset("tiny", context_length=100), seed=5)
    assert torch.equal(new.wpe.weight[:64], model.wpe.weight)
    assert torch.equal(new.wpe.weight[64:], fresh.wpe.weight[64:])


@torch.no_grad()
def test_without_a_table_the_context_is_a_number() -> None:
    model, ids = noisy(position="rope"), random_ids(256, length=100)
    converted = convert(model, Changes(context_length=100))
    assert same_state(converted.model, model)
    torch.testing.assert_close(converted.model(ids), model(ids), rtol=0.0, atol=1e-6)
    assert converted.steps[0].change == (
        "64 -> 100 tokens: a number, rope positions have no table; nothing is done for texts longer than the 64 tokens"
        " trained on, which --rope-scaling yarn --rope-factor 2 is for"
    )


@torch.no_grad()
def test_yarn_is_worked_out_from_the_length_trained_on_whenever_the_context_grows() -> None:
    model, ids = noisy(position="rope"), random_ids(256, length=200)
    yarn = Changes(rope_scaling="yarn", rope_factor=4.0)
    untouched = convert(model, yarn).model  # its context, that is
    expected, expected_config = untouched(ids), untouched.config.to_dict()
    longer, further = (convert(model, Changes(context_length=n)).model for n in (100, 1000))
    ways = {
        "context first": convert(longer, yarn).model,
        "context twice": convert(convert(longer, Changes(context_length=1000)).model, yarn).model,
        "both at once": convert(model, dataclasses.replace(yarn, context_length=1000)).model,
        "scaling first": convert(convert(model, yarn).model, Changes(context_length=1000)).model,
        "by hand": extend_context(convert(model, yarn).model, 1000),
    }
    for way, converted in ways.items():
        assert converted.config.trained_length == 64, way
        assert converted.config.context_length > 64, way
        assert ModelConfig.from_dict(converted.config.to_dict()) == converted.config
        torch.testing.assert_close(converted(ids), expected, rtol=0.0, atol=0.0)
    learned = noisy()
    both = Changes(position="rope", context_length=1000)
    for changes in (both, dataclasses.replace(both, rope_scaling="yarn", rope_factor=4.0)):
        converted = convert(learned, changes).model
        assert (converted.config.trained_length, target(learned.config, changes)) == (64, converted.config)
    by_context = GPT(dataclasses.replace(further.config, rope=RopeConfig(scaling="yarn", factor=4.0)))
    by_context.load_state_dict(model.state_dict())
    assert (by_context.eval()(ids) - expected).abs().max() > 1e-3  # the length does something
    assert "trained_length" not in expected_config["rope"]  # what was saved before still compares


# Heads


@torch.no_grad()
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_repetition_is_exact_and_sharing_undoes_it(position: Any) -> None:
    model, ids = noisy(n_kv_head=1, position=position), random_ids(256)
    for n_kv_head in (2, 4):
        converted = convert(model, Changes(n_kv_head=n_kv_head))
        assert converted.steps[0].exact == "all outputs"
        assert converted.model.config.n_kv_head == n_kv_head
        torch.testing.assert_close(converted.model(ids), model(ids), rtol=0.0, atol=1e-5)
        assert same_state(convert(converted.model, Changes(n_kv_head=1, method="mean")).model, model)
        back = convert(converted.model, Changes(n_kv_head=1), rows()).model
        torch.testing.assert_close(back(ids), model(ids), rtol=0.0, atol=1e-4)


# All together


def test_the_order_is_the_one_that_loses_least_and_says_why() -> None:
    changes = Changes(n_kv_head=2, position="rope", rotary="abrupt", window=8, context_length=100, refit=True)
    steps = plan(ModelConfig.preset("tiny"), changes, calibrated=True)
    assert [step.name for step in steps] == ["heads", "positions", "windows", "output projections", "context"]
    assert why(steps).startswith("heads come first: once positions rotate keys, these can be mixed only pair by pair; ")
    assert why(steps[:1]) == ""
    assert "table" not in steps[-1].exact


@pytest.mark.parametrize(
    ("position", "changes", "fitted"),
    [
        ("rope", {"n_kv_head": 2}, True),
        ("rope", {"n_kv_head": 2, "refit": False}, False),
        ("rope", {"n_kv_head": 2, "method": "mean"}, False),
        ("learned", {"n_kv_head": 2}, False),
        ("learned", {"n_kv_head": 2, "method": "procrustes"}, True),
        ("learned", {"n_kv_head": 2, "method": "procrustes", "position": "rope"}, False),
    ],
)
def test_output_projections_are_fitted_where_it_helps(position: Any, changes: dict[str, Any], fitted: bool) -> None:
    config = ModelConfig.preset("tiny", position=position)
    for calibrated in (True, False):
        asked = Changes(**changes, rotary="abrupt") if "position" in changes else Changes(**changes)
        names = [step.name for step in plan(config, asked, calibrated=calibrated)]
        assert ("output projections" in names) == (fitted and calibrated)


def test_it_is_its_steps_one_after_the_other() -> None:
    model, text = noisy(), rows()
    changes = Changes(n_kv_head=2, window=8, sinks=1, context_length=100, refit=False)
    converted = convert(model, changes, text)
    assert converted.model.config == target(model.config, changes)
    assert converted.steps == plan(model.config, changes, calibrated=True)
    by_hand = regroup(model, 2, statistics=collect_statistics(model, text))
    assert same_state(converted.model, extend_context(narrow(by_hand, 8, 1), 100))


def test_the_calibration_text_may_be_one_tensor() -> None:
    model, text = noisy(position="rope"), rows()
    asked = Changes(n_kv_head=1)
    assert same_state(convert(model, asked, torch.stack(text)).model, convert(model, asked, text).model)
    nothing = convert(model, asked, torch.empty(0, 64, dtype=torch.int64))
    assert same_state(nothing.model, convert(model, asked).model)
    assert not same_state(nothing.model, convert(model, asked, text).model)


def test_nothing_to_do_is_a_copy_without_steps() -> None:
    model = noisy(window=8)
    for changes in (Changes(), Changes(n_kv_head=4, window=8, context_length=64), Changes(window=(8, 8))):
        converted = convert(model, changes, rows())
        assert converted.steps == ()
        assert converted.model.config == model.config
        assert same_state(converted.model, model)
        assert converted.model.wte.weight.data_ptr() != model.wte.weight.data_ptr()


def test_the_source_is_left_as_it_is() -> None:
    model = noisy()
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    new = convert(model, Changes(n_kv_head=1, window=8, context_length=70, refit=True), rows()).model
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tensors().items())


def test_changes_go_through_plain_values() -> None:
    values = {"n_kv_head": 2, "window": [8, None], "rope": {"theta": 500.0, "scaling": None, "factor": 1.0}, "seed": 3}
    changes = Changes.from_dict(values)
    assert changes == Changes(n_kv_head=2, window=(8, None), rope=RopeConfig(500.0), seed=3)
    assert changes.to_dict() == values
    assert Changes().to_dict() == {}
    # TOML has no null.
    assert Changes.from_dict({"window": ["none", 8]}) == Changes(window=(None, 8))


IMPOSSIBLE = [
    ({"n_kv_head": 3}, "cannot be given 3 key/value heads; possible: 1, 2, 4"),
    ({"n_kv_head": 8}, "cannot be given 8 key/value heads by repetition; possible: 4"),
    ({"window": 0}, "window must be a whole number of at least 1"),
    ({"window": (8, 8, 8)}, "window lists 3 layers, the model has n_layer=2"),
    ({"sinks": 2}, "sinks and dilation have no effect without a window"),
    ({"context_length": 32}, "a context of 32 is shorter than the model's 64"),
    ({"context_length": 2**40}, "context_length must be at most"),
    ({"method": "svd"}, "method and grouping have no effect unless heads are to share"),
    ({"n_kv_head": 4, "grouping": "fitted"}, "method and grouping have no effect unless heads are to share"),
    ({"n_kv_head": 2, "method": "means"}, r"got 'means' \(did you mean 'mean'\?\)"),
    ({"n_kv_head": 2, "grouping": "fit"}, r"got 'fit' \(did you mean 'fitted'\?\)"),
    ({"position": "rop"}, r"position must be rope, blend or none, got 'rop' \(did you mean 'rope'\?\)"),
    ({"position": "none", "rotary": "fit"}, "rotary and rope have no effect unless positions become rotary"),
    ({"rotary": "gauge"}, "rotary and rope have no effect unless positions become rotary"),
    ({"rope": RopeConfig(500.0)}, "rotary and rope have no effect unless positions become rotary"),
    ({"position": "rope", "rotary": "gage"}, r"got 'gage' \(did you mean 'gauge'\?\)"),
    ({"extension": "copy"}, "extension has no effect unless a table of positions grows"),
    ({"context_length": 80, "extension": "copies"}, r"got 'copies' \(did you mean 'copy'\?\)"),
    ({"refit": True, "context_length": 80}, "refit has no effect unless heads, positions or windows change"),
    ({"refit": True, "window": 8}, "refit fits the output projections on a calibration text; give one"),
    ({"position": "rope", "rotary": "gauge"}, "rotary 'gauge' is fitted on a calibration text; give one"),
]


@pytest.mark.parametrize(("change", "words"), IMPOSSIBLE)
def test_what_is_impossible_or_idle_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(GptlabError, match=words):
        plan(ModelConfig.preset("tiny"), Changes(**change), calibrated=False)


def test_rotary_models_are_refused_a_table_and_svd() -> None:
    rope = ModelConfig.preset("tiny", position="rope")
    with pytest.raises(GptlabError, match="a model of rope positions cannot be given a learned table"):
        target(rope, Changes.from_dict({"position": "learned"}))
    with pytest.raises(GptlabError, match="rotary positions do not allow; use 'procrustes'"):
        target(rope, Changes(n_kv_head=2, method="svd"))
    with pytest.raises(GptlabError, match="only learned positions become blend; this model has position 'rope'"):
        target(rope, Changes(position="blend"))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(GptlabError, match=r"setting of a conversion 'n_kv_heads' \(did you mean 'n_kv_head'\?\)"):
        Changes.from_dict({"n_kv_heads": 2})
    with pytest.raises(GptlabError, match=r"unknown setting of rope 'teta' \(did you mean 'theta'\?\)"):
        Changes.from_dict({"position": "rope", "rope": {"teta": 2.0}})


# How far outputs move


@torch.no_grad()
def test_drift_is_that_of_whole_logits() -> None:
    model, ids = noisy(), random_ids(256, 5)
    new = repeat_heads(regroup(model, 1, method="mean"))
    drift = measure_drift(model, new, ids)
    p, q = (one(ids)[:, :-1].double().log_softmax(-1).flatten(0, 1) for one in (model, new))
    targets = ids[:, 1:].flatten()
    assert drift.tokens == 5 * 39
    assert drift.before == pytest.approx(F.nll_loss(p, targets).item(), abs=1e-5)
    assert drift.after == pytest.approx(F.nll_loss(q, targets).item(), abs=1e-5)
    assert drift.kl == pytest.approx(F.kl_div(q, p, reduction="batchmean", log_target=True).item(), abs=1e-5)
    assert drift.kl > 0.01
    assert measure_drift(model, model, list(ids)).kl == 0.0
    with pytest.raises(GptlabError, match="no token to predict"):
        measure_drift(model, new, ids[:, :1])


# The calibration text


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(draw.choice("abcdefgh ") for _ in range(1000)))
    return path


def test_rows_are_spread_over_the_text(text: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = [tokenizer.end_of_text, *tokenizer.encode(text.read_text())]
    assert torch.equal(
        torch.stack(calibration_rows(tokenizer, 100, 10_000, text)), torch.tensor(ids[:1000]).view(10, 100)
    )
    some = calibration_rows(tokenizer, 100, 201, text)
    assert [row.tolist() for row in some] == [ids[i : i + 100] for i in (0, 300, 600)]
    with pytest.raises(GptlabError, match=r"text.txt has 1,001 tokens, fewer than the 1,002 of the model's context"):
        calibration_rows(tokenizer, 1002, 10, text)
    with pytest.raises(GptlabError, match="no corpus at"):
        calibration_rows(tokenizer, 10, 10, text.with_name("nothing"))


def test_rows_are_kept_back_to_measure_on() -> None:
    text = rows(10, 8)
    fit, held_out = keep_back(text, 3)
    assert [any(torch.equal(row, one) for one in held_out) for row in text] == [i in (1, 5, 8) for i in range(10)]
    assert len(fit) == 7
    assert [len(part) for part in keep_back(text[:2], 5)] == [1, 1]
    assert [len(part) for part in keep_back(text[:1], 5)] == [1, 0]
    assert sha256_of_rows(text) != sha256_of_rows(text[::-1])
    assert sha256_of_rows([torch.arange(4)]) != sha256_of_rows([torch.arange(2), torch.arange(2, 4)])
