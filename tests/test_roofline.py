"""The prediction against hand calculation."""

from __future__ import annotations

import pytest
import torch

from gptlab import roofline
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.model import cost
from gptlab.roofline import Machine, predict

SMALL = ModelConfig(vocab_size=10, context_length=8, n_layer=2, n_head=2, n_embd=4, n_inner=12, bias=False)


def test_a_step_by_hand() -> None:
    # Per layer: c_attn 12 x 4, c_proj 4 x 4, mlp 2 x 12 x 4, two norms of 4; then a norm, the head 10 x 4, and for
    # each of 3 sequences a row of either embedding.
    weights = 2 * (48 + 16 + 96 + 8) + 4 + 40 + 3 * 2 * 4
    # Keys and values of 5 tokens, 2 layers of width 4, for each of 3 sequences.
    cache = 2 * 5 * 2 * 4 * 3
    products = 3 * 2 * (2 * (48 + 16 + 96) + 40)
    attention = 3 * 2 * 2 * (2 * 5 * 4)  # scores and their sum, in 2 layers
    step = predict(SMALL, Machine(bandwidth=100.0, flops=1e9), context=5, batch=3, dtype="bfloat16")
    assert (step.weight_bytes, step.cache_bytes) == (2 * weights, 2 * cache)
    assert step.weight_seconds == 2 * weights / 100
    assert step.cache_seconds == 2 * cache / 100
    assert step.seconds == pytest.approx(2 * (weights + cache) / 100, rel=1e-15)
    assert step.tokens_per_second == 3 / step.seconds
    slow = predict(SMALL, Machine(bandwidth=1e9, flops=10.0), context=5, batch=3, dtype="bfloat16")
    assert (slow.weight_seconds, slow.cache_seconds) == (products / 10, attention / 10)


def test_each_half_takes_the_longer_of_reading_and_computing() -> None:
    # Between the intensities of the two halves: the products wait for arithmetic, attention for the memory.
    step = predict(SMALL, Machine(bandwidth=1.0, flops=2.0), context=5, batch=3, dtype="bfloat16")
    flops = cost.token_flops(SMALL, 4)
    assert step.weight_seconds == 3 * (flops.blocks + flops.head) / 2.0 > step.weight_bytes
    assert step.cache_seconds == step.cache_bytes > 3 * flops.attention / 2.0


def test_what_a_step_waits_for() -> None:
    gpt2 = ModelConfig.preset("gpt2")
    machine = Machine(3e10, 2e11)
    assert predict(gpt2, machine, context=1024, batch=1, dtype="bfloat16").limit == "weights"
    assert predict(gpt2, machine, context=16384, batch=1, dtype="bfloat16").limit == "cache"
    assert predict(gpt2, machine, context=16, batch=64, dtype="bfloat16").limit == "arithmetic"


def test_124m_at_batch_1_runs_at_the_bandwidth_over_its_bytes() -> None:
    step = predict(ModelConfig.preset("gpt2"), Machine(3.2e10, 1e12), context=1, batch=1, dtype="bfloat16")
    # All parameters but the position table, at two bytes; one row of each embedding is read on top.
    assert step.weight_bytes == 2 * (124_439_808 - 1024 * 768 + 2 * 768)
    assert step.tokens_per_second == pytest.approx(129.4, rel=1e-3)


def test_key_heads_and_windows_shrink_what_they_should() -> None:
    machine = Machine(3e10, 2e11)
    plain, grouped, windowed = (
        predict(ModelConfig.preset("gpt2", **changes), machine, context=4096, batch=8, dtype="float32")
        for changes in ({}, {"n_kv_head": 3}, {"window": 256})
    )
    assert plain.cache_bytes == 4 * grouped.cache_bytes == 16 * windowed.cache_bytes
    assert plain.weight_bytes == windowed.weight_bytes > grouped.weight_bytes


def test_the_cache_outweighs_the_weights_from_so_many_sequences_on() -> None:
    gpt2 = ModelConfig.preset("gpt2")
    sequences = roofline.balance(gpt2, 1024)
    assert sequences == pytest.approx(6.55, abs=0.005)
    for dtype in roofline.BYTES:
        before, after = (predict(gpt2, Machine(1, 1), context=1024, batch=b, dtype=dtype) for b in (6, 7))
        assert before.cache_bytes < before.weight_bytes
        assert after.cache_bytes > after.weight_bytes


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(GptlabError, match=r"'bflot16'.*did you mean 'bfloat16'"):
        predict(SMALL, Machine(1, 1), context=1, batch=1, dtype="bflot16")


def test_a_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25, *[1.0] * 5, 2.0, *[4.0] * 6])
    monkeypatch.setattr(roofline, "timed", lambda step, device: (step(), next(seconds))[1])
    monkeypatch.setattr(roofline, "_probe", lambda device: (1000, 8))
    assert roofline.measure(torch.device("cpu"), "bfloat16") == Machine(4000 / 0.25, 2 * 8**3 / 2.0)
    with pytest.raises(GptlabError, match=r"'int8' to measure.*float32, bfloat16, float16"):
        roofline.product_rate(torch.device("cpu"), "int8")


def test_the_words_on_how_a_machine_is_measured() -> None:
    said = roofline.how_measured(torch.device("cpu"))
    assert said == "the best of 7: a sum over 256 MiB of float32, products of 1024 x 1024 matrices"
