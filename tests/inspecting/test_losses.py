"""Losses against transformers, effects of heads against models without them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.inspected import CONTEXT, LENGTH, Theirs, every, inspected, text
from helpers.models import close
from torch import Tensor
from torch.nn import functional as F

from gptlab import GPT, GptlabError
from gptlab.inspecting import ablated, head_effects, token_losses
from gptlab.inspecting import losses as module
from gptlab.model.quantised import quantise_model


def test_losses_are_those_of_transformers(known: tuple[GPT, Tensor, Theirs]) -> None:
    model, ids, theirs = known
    losses = token_losses(model, ids)
    assert losses.shape == (LENGTH - 1,)
    close(losses, F.cross_entropy(theirs.logits[:-1], ids[1:], reduction="none"), 2e-5)
    assert torch.equal(token_losses(model, ids.tolist()), losses)


@every
@pytest.mark.parametrize("batch_tokens", [100, 10_000])
def test_effects_are_the_losses_without_each_head(
    changes: dict[str, Any], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    model, ids = inspected(**changes), text()
    told: list[tuple[int, int]] = []
    effects = head_effects(model, ids, lambda done, total: told.append((done, total)))
    assert effects.shape == (3, 4)
    assert told[-1] == (12, 12)
    assert told == sorted(set(told))
    own = token_losses(model, ids).mean()
    for layer in range(3):
        for head in range(4):
            zeroed = copy.deepcopy(model)
            with torch.no_grad():
                zeroed.blocks[layer].attn.c_proj.weight[:, 8 * head : 8 * head + 8] = 0
            close(effects[layer, head], token_losses(zeroed, ids).mean() - own, 2e-5)
    assert effects.abs().max() > 0.01
    told.clear()
    some = head_effects(model, ids, lambda done, total: told.append((done, total)), layers=[2, 0])
    close(some, effects[[2, 0]], 1e-6)
    assert told[-1] == (8, 8)


def test_effects_of_a_model_that_lacks_something_already() -> None:
    model, ids = inspected(position="rope"), text()
    with ablated(model, heads=[(0, 1)], mlps=[2]):
        effects = head_effects(model, ids)
        own = token_losses(model, ids).mean()
    assert effects[0, 1] == pytest.approx(0.0, abs=1e-6)
    with ablated(model, heads=[(0, 1), (1, 2)], mlps=[2]):
        close(effects[1, 2], token_losses(model, ids).mean() - own, 2e-5)


def test_quantised_weights_have_losses_too() -> None:
    model, ids = inspected(), text()
    quantise_model(model, 8)
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[None])[0, :-1], ids[1:], reduction="none")
    close(token_losses(model, ids), expected, 0.05)  # the head's product is float32, the model's own may be bfloat16
    assert head_effects(model, ids).abs().max() > 0.01


def test_a_text_may_fill_the_learned_positions_and_one_token_more() -> None:
    model = inspected()
    assert token_losses(model, text(CONTEXT + 1)).shape == (CONTEXT,)
    with pytest.raises(GptlabError, match="exceed the context of 64 learned positions"):
        token_losses(model, text(CONTEXT + 2))


def test_what_has_no_loss_is_refused() -> None:
    model = inspected()
    for ids, words in (
        (text(1), "at least two tokens"),
        (text(6)[None], "take one row"),
        ([61, 0], "ids must be 0 to 60, got 61"),
        (torch.rand(5), "int64"),
        ("a text", "got str"),
    ):
        with pytest.raises(GptlabError, match=words):
            token_losses(model, ids)  # type: ignore[arg-type]
