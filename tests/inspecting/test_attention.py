"""Attention maps against transformers, and against what each query may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.inspected import LENGTH, Theirs, every, inspected, text
from helpers.models import close
from torch import Tensor

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.inspecting import attention, attention_maps, visible


def test_maps_are_those_of_transformers(known: tuple[GPT, Tensor, Theirs]) -> None:
    model, ids, theirs = known
    maps = attention_maps(model, ids)
    assert maps.dtype == torch.float32
    close(maps, theirs.maps, 1e-5)
    assert theirs.maps.amax(-1).std() > 0.1
    assert torch.equal(attention_maps(model, ids, [2, 0]), maps[[2, 0]])


@every
def test_weight_is_where_a_query_may_look_and_nowhere_else(changes: dict[str, Any]) -> None:
    model, ids = inspected(**changes), text()
    maps = attention_maps(model, ids)
    for layer in range(3):
        close(maps[layer], model.attention_maps(ids[None], layer)[0], 1e-6)
        seen = visible(model.config, layer, LENGTH)
        assert torch.equal(maps[layer] > 0, seen.expand(4, -1, -1))
    close(maps.sum(-1), torch.ones(3, 4, LENGTH))


def test_what_is_visible_by_hand() -> None:
    config = ModelConfig.preset("tiny", window=(None, 2), sinks=1, dilation=(1, 2))
    assert torch.equal(visible(config, 0, 5), torch.ones(5, 5).tril().bool())
    seen = {query: visible(config, 1, 5)[query].nonzero()[:, 0].tolist() for query in range(5)}
    assert seen == {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 1, 3], 4: [0, 2, 4]}


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = inspected(), text()
    for layers, words in (([3], "layer must be 0 to 2, got 3"), ([], "no layer to look at")):
        with pytest.raises(GptlabError, match=words):
            attention_maps(model, ids, layers)
    with pytest.raises(GptlabError, match="layer must be 0 to 2"):
        visible(model.config, 5, 4)
    with pytest.raises(GptlabError, match="at least one token"):
        visible(model.config, 0, 0)
    asked: list[int] = []
    monkeypatch.setattr(attention, "check_memory", lambda n, *_: asked.append(n))
    assert attention_maps(model, ids).nbytes == asked[0]
