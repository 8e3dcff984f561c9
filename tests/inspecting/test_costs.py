"""What a step costs, by hand."""

from __future__ import annotations

import pytest

from gptlab import GptlabError, ModelConfig
from gptlab.inspecting import costs
from gptlab.roofline import Machine

SMALL = ModelConfig(
    vocab_size=10, context_length=8, n_layer=2, n_head=2, n_embd=4, n_inner=12, bias=False, window=(3, None), sinks=1
)


def test_a_window_is_read_in_part_and_held_in_part() -> None:
    short, long = costs(SMALL, [3, 8], Machine(bandwidth=100.0, flops=1e9), batch=3, dtype="float32")
    token = 2 * 4 * 4 * 3  # a key and a value of 4 numbers of 4 bytes, in 3 sequences
    assert (short.context, short.cache_bytes, short.step.cache_bytes) == (3, 6 * token, 6 * token)
    # The windowed layer: a sink and three slots; the other: all.
    assert (long.context, long.cache_bytes, long.step.cache_bytes) == (8, 12 * token, 12 * token)
    assert long.step.cache_seconds == 12 * token / 100
    assert long.step.tokens_per_second == 3 / (long.step.weight_seconds + long.step.cache_seconds)


def test_nothing_costs_nothing_to_ask() -> None:
    machine = Machine(1.0, 1.0)
    assert costs(SMALL, [], machine) == []
    for contexts, batch in (([0], 1), ([4], 0)):
        with pytest.raises(GptlabError, match="at least 1"):
            costs(SMALL, contexts, machine, batch=batch)
    with pytest.raises(GptlabError, match="'int3'"):
        costs(SMALL, [4], machine, dtype="int3")
