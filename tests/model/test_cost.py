from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptlab import ModelConfig
from gptlab.config import PRESETS
from gptlab.model import GPT, cost

PARTS = {
    "token embedding": r"wte\.weight",
    "position embedding": r"wpe\.weight",
    "attention: queries, keys, values": r"h\.\d+\.attn\.c_attn\.(weight|bias)",
    "attention: output": r"h\.\d+\.attn\.c_proj\.(weight|bias)",
    "feed-forward": r"h\.\d+\.mlp\.c_(fc|proj)\.(weight|bias)",
    "layer norms": r"(h\.\d+\.ln_[12]|ln_f)\.(weight|bias)",
    "output head": r"lm_head\.weight",
}


def counted(config: ModelConfig) -> dict[str, int]:
    """The parameters of a real model, part by part."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in GPT(config).named_parameters()}
    parts = {part: [n for name, n in sizes.items() if re.fullmatch(p, name)] for part, p in PARTS.items()}
    assert sum(map(len, parts.values())) == len(sizes)
    return {part: sum(found) for part, found in parts.items() if found}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_those_of_the_modules(name: str) -> None:
    config = ModelConfig.preset(name)
    assert cost.parameters(config) == counted(config)


@settings(max_examples=50, deadline=None)
@given(
    vocab=st.integers(1, 1000),
    context=st.integers(1, 1000),
    n_layer=st.integers(1, 5),
    n_head=st.integers(1, 8),
    head_dim=st.integers(1, 16),
    inner=st.none() | st.integers(1, 500),
    bias=st.booleans(),
    tie=st.booleans(),
)
def test_parameters_of_any_configuration_are_those_of_the_modules(
    vocab: int, context: int, n_layer: int, n_head: int, head_dim: int, inner: int | None, bias: bool, tie: bool
) -> None:
    config = ModelConfig(
        vocab_size=vocab,
        context_length=context,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * head_dim,
        n_inner=inner,
        bias=bias,
        tie_embeddings=tie,
    )
    assert cost.parameters(config) == counted(config)


def test_the_released_models_have_their_known_sizes() -> None:
    # OpenAI's checkpoints, counted tensor by tensor.
    known = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert {name: sum(cost.parameters(ModelConfig.preset(name)).values()) for name in known} == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_cache_bytes_are_those_of_a_real_cache(name: str, dtype: torch.dtype) -> None:
    config = ModelConfig.preset(name)
    with torch.device("meta"):
        cache = GPT(config).make_cache(3, 50, dtype=dtype)
    assert cost.cache_bytes_per_token(config, dtype.itemsize) * 3 * 50 == cache.nbytes


def test_the_cache_of_gpt2_at_its_full_context_is_36_mib_in_bfloat16() -> None:
    # 2 (k, v) x 12 layers x 768 numbers x 2 bytes x 1024 tokens.
    assert cost.cache_bytes_per_token(ModelConfig.preset("gpt2"), 2) * 1024 == 36 * 2**20
