from __future__ import annotations

import dataclasses
import importlib
import math
import re
from typing import Any

import pytest
import torch
from helpers.models import noisy, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gptlab import ModelConfig
from gptlab.config import PRESETS
from gptlab.model import GPT, Tokens, Visibility, cost
from gptlab.model.kernels import use

PARTS = {
    "token embedding": r"wte\.weight",
    "position embedding": r"wpe\.weight",
    "attention: queries, keys, values": r"h\.\d+\.attn\.c_attn\.(weight|bias)",
    "attention: output": r"h\.\d+\.attn\.c_proj\.(weight|bias)",
    "feed-forward": r"h\.\d+\.mlp\.c_(gate|fc|proj)\.(weight|bias)",
    "layer norms": r"(h\.\d+\.ln_[12]|ln_f)\.(weight|bias)",
    "output head": r"lm_head\.weight",
}


def counted(config: ModelConfig) -> dict[str, int]:
    """The parameters of a real model, part by part."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in GPT(config).named_parameters()}
    parts = {part: [n for name, n in sizes.items() if re.fullmatch(p, name)] for part, p in PARTS.items()}
    assert sum(map(len, parts.values())) == len(sizes)
    return {part: sum(counts) for part, counts in parts.items() if counts}


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
    norm=st.sampled_from(["layer", "rms"]),
    mlp=st.sampled_from(["gelu", "swiglu"]),
    tie=st.booleans(),
)
def test_parameters_of_any_configuration_are_those_of_the_modules(
    vocab: int, context: int, n_layer: int, n_head: int, head_dim: int, inner: int | None, tie: bool, **switches: Any
) -> None:
    config = ModelConfig(
        vocab_size=vocab,
        context_length=context,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * head_dim,
        n_inner=inner,
        tie_embeddings=tie,
        **switches,
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


# The three changes

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"position": "rope"},
    "none": {"position": "none", "tie_embeddings": False, "bias": False},
    "multi-query": {"n_kv_head": 1},
    "grouped": {"n_kv_head": 2},
    "window": {"window": 7},
    "sinks": {"window": 5, "sinks": 3, "position": "rope", "n_kv_head": 2},
    "dilation": {"window": 4, "dilation": 3, "position": "rope"},
    "per layer": {"window": (4, None), "dilation": (2, 1), "sinks": 2, "position": "rope", "n_kv_head": 1},
    "rms": {"norm": "rms"},
    "swiglu": {"mlp": "swiglu", "n_inner": 72},
    "llama": {"norm": "rms", "mlp": "swiglu", "bias": False, "position": "rope", "n_kv_head": 2},
    "per layer, all": {"window": (3, 9), "dilation": (5, 2), "sinks": 6, "position": "none"},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str) -> ModelConfig:
    return ModelConfig.preset("tiny", **VARIANTS[variant])


@variants
def test_parameters_of_every_variant_are_those_of_the_modules(variant: str) -> None:
    values = VARIANTS[variant]
    configs = [tiny(variant)]
    if not any(isinstance(value, tuple) for value in values.values()):  # those list two layers
        configs.append(ModelConfig.preset("gpt2", **values))
    for config in configs:
        nothing = {} if config.position == "learned" else {"position embedding": 0}
        assert cost.parameters(config) == counted(config) | nothing


@variants
def test_the_visibilities_are_those_of_the_modules(variant: str) -> None:
    tokens = Tokens(torch.arange(40)[None])
    for ours, block in zip(cost.visibilities(tiny(variant)), GPT(tiny(variant)).blocks, strict=True):
        assert torch.equal(ours.visible(tokens, tokens), block.attn.visibility.visible(tokens, tokens))


@settings(deadline=None)
@given(window=st.none() | st.integers(1, 12), sinks=st.integers(0, 8), dilation=st.integers(1, 5))
def test_visible_keys_are_those_that_the_mask_shows(window: int | None, sinks: int, dilation: int) -> None:
    rule = Visibility(window, sinks, dilation) if window else Visibility()
    tokens = Tokens(torch.arange(80)[None])
    expected = rule.visible(tokens, tokens)[0].sum(-1).tolist()
    assert [cost.visible_keys(rule, position) for position in range(80)] == expected


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 120),
    window=st.none() | st.integers(1, 12),
    sinks=st.integers(0, 8),
    dilation=st.integers(1, 5),
)
def test_a_forward_pass_costs_what_its_tokens_cost(length: int, window: int | None, sinks: int, dilation: int) -> None:
    settings = {"window": window, "sinks": sinks, "dilation": dilation} if window else {}
    config = ModelConfig.preset("tiny", context_length=200, **settings)
    tokens = [cost.token_flops(config, position) for position in range(length)]
    whole = cost.forward_flops(config, length)
    assert whole.blocks == sum(token.blocks for token in tokens)
    assert whole.attention == sum(token.attention for token in tokens)
    assert whole.head == sum(token.head for token in tokens)
    assert cost.training_flops(config, length) == 3 * whole.total


def fused_flops(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
    """The two products of the CPU's fused attention, which torch's counter does not know; arguments are shapes."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def counted_flops(model: GPT, ids: torch.Tensor, **rest: Any) -> int:
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_flops}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        model(ids, **rest)
    return counter.get_total_flops()


@variants
def test_forward_flops_are_those_that_torch_counts_in_the_products(variant: str) -> None:
    config, length = tiny(variant), 40
    model, expected = GPT(config).eval(), cost.forward_flops(config, length)
    ids = torch.zeros(1, length, dtype=torch.int64)
    square = 4 * config.n_embd * config.n_layer * length**2
    with use("reference"):
        operations = counted_flops(model, ids)
    # The reference multiplies every query with every key, the hidden ones too; all else is exactly ours. Sinks that
    # see queries of their own are a second product of scores.
    again = square // 2 if config.sinks and config.position == "rope" else 0
    layers = [1 if w is not None else 0 for w in config.windows]
    assert operations == expected.blocks + expected.head + square + again * sum(layers) // config.n_layer
    assert expected.attention < square


@pytest.mark.parametrize("values", [{"window": 7}, {"window": 3, "dilation": 4}, {"window": (5, 2), "n_kv_head": 2}])
def test_banded_computes_what_the_cost_model_says(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Queries one by one: a larger block also multiplies the corners of its band that no query sees.
    monkeypatch.setattr(importlib.import_module("gptlab.model.kernels.banded"), "BLOCK", 1)
    config = ModelConfig.preset("tiny", **values)
    ids = torch.zeros(1, 50, dtype=torch.int64)
    with use("banded"):
        assert counted_flops(GPT(config).eval(), ids) == cost.forward_flops(config, 50).total


@pytest.mark.parametrize("variant", ["plain", "rope", "none", "multi-query", "grouped", "window", "llama"])
@pytest.mark.parametrize("position", [0, 6, 30])
def test_token_flops_are_those_of_a_decoding_step(variant: str, position: int) -> None:
    # A ring of one-token chunks without sinks or dilation holds exactly the visible keys.
    config = tiny(variant)
    model = GPT(config).eval()
    cache = model.make_cache(1, 40, chunk=1)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(position):
            model(ids, cache=cache)
    with use("reference"):
        assert counted_flops(model, ids, cache=cache) == cost.token_flops(config, position).total


@variants
@pytest.mark.parametrize(("length", "chunk"), [(50, 1), (50, 8), (64, 64), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_of_every_variant_are_those_of_a_real_cache(
    variant: str, length: int, chunk: int, dtype: torch.dtype
) -> None:
    config = tiny(variant)
    cache = GPT(config).make_cache(3, length, chunk=chunk, dtype=dtype)
    assert cost.cache_bytes(config, length, dtype.itemsize, batch=3, chunk=chunk) == cache.nbytes
    if config.window is None:
        assert cache.nbytes == 3 * length * cost.cache_bytes_per_token(config, dtype.itemsize)


@variants
@pytest.mark.parametrize("position", [0, 4, 33])
@pytest.mark.parametrize("batch", [1, 5])
def test_decode_bytes_are_those_of_the_tensors_that_a_step_reads(variant: str, position: int, batch: int) -> None:
    config = tiny(variant)
    model = GPT(config).eval()
    cache = model.make_cache(batch, 40, chunk=1)
    with torch.no_grad():
        for _ in range(position + 1):
            model(torch.zeros(batch, 1, dtype=torch.int64), cache=cache)
    # The whole model once, but of the embedding tables only the rows looked up, beside the head's own use.
    tables = [model.wte, model.wpe] if config.position == "learned" else [model.wte]
    blocks = sum(p.nbytes for p in model.h.parameters()) + sum(p.nbytes for p in model.ln_f.parameters())
    expected = blocks + model.lm_head.weight.nbytes + sum(batch * table.weight[0].nbytes for table in tables)
    last, keys = Tokens(torch.full((batch, 1), position)), 0
    for layer, block in zip(cache.layers, model.blocks, strict=True):
        seen = block.attn.visibility.visible(last, Tokens(layer.positions))[:, 0]  # (B, slots)
        keys += sum(t.transpose(1, 2)[seen].nbytes for t in (layer.k, layer.v))
    assert cost.decode_bytes(config, position, 4, batch=batch) == (expected, keys)


def reached(config: ModelConfig, length: int) -> list[int]:
    """How far before the last token the inputs stand that its output depends on, by the gradient."""
    model = noisy(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    inputs: list[torch.Tensor] = []

    def keep(_: object, __: object, embedded: torch.Tensor) -> torch.Tensor:
        inputs.append(embedded.detach().requires_grad_())
        return inputs[0]

    model.wte.register_forward_hook(keep)
    hidden = model(random_ids(model, 1, length), head=lambda hidden, lm_head: hidden)
    upstream = torch.randn(config.n_embd, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((hidden[0, -1] * upstream).sum(), inputs)
    return [length - 1 - int(t) for t in gradient[0].abs().amax(-1).nonzero()[:, 0]]


@pytest.mark.parametrize("position", ["rope", "none"])
@pytest.mark.parametrize(
    "values",
    [
        {"window": 1},
        {"window": 4},
        {"window": (2, 7)},
        {"window": 5, "n_layer": 4, "n_kv_head": 2},
        {"window": 3, "dilation": 2},
        {"window": (3, 4), "dilation": (1, 3)},
        {"window": 2, "dilation": 4, "n_layer": 3},
    ],
    ids=str,
)
def test_the_receptive_field_is_where_the_gradient_reaches(position: str, values: dict[str, Any]) -> None:
    config = ModelConfig.preset("tiny", position=position, **values)
    field = cost.receptive_field(config)
    assert field is not None
    distances = {0}
    for window, dilation in zip(config.windows, config.dilations, strict=True):
        distances = {d + i * dilation for d in distances for i in range(window or 0)}
    actual = reached(config, field + 9)
    assert sorted(actual) == sorted(distances)
    assert field == max(actual) + 1
    if set(config.dilations) == {1}:
        assert sorted(actual) == list(range(field))


def test_one_layer_without_a_window_reaches_everything() -> None:
    for window in (None, (4, None), (None, 4)):
        config = ModelConfig.preset("tiny", position="rope", window=window)
        assert cost.receptive_field(config) is None
        assert sorted(reached(config, 30)) == list(range(30))


# Known figures (124M)


def test_operations_per_token_at_the_full_context_are_the_published_ones() -> None:
    per_token = {}
    for name, values in {"full": {}, "window": {"window": 256}}.items():
        flops = cost.forward_flops(ModelConfig.preset("gpt2", **values), 1024)
        per_token[name] = [round(n / 1024 / 1e6, 1) for n in (flops.blocks, flops.head, flops.attention)]
    assert per_token == {"full": [169.9, 77.2, 18.9], "window": [169.9, 77.2, 8.3]}


def test_parameters_and_cache_by_number_of_key_heads_are_the_published_ones() -> None:
    table = {12: (124.44, 36), 6: (117.35, 18), 4: (114.99, 12), 3: (113.81, 9), 2: (112.63, 6), 1: (111.45, 3)}
    for n_kv_head, (millions, mebibytes) in table.items():
        config = ModelConfig.preset("gpt2", n_kv_head=n_kv_head)
        assert round(sum(cost.parameters(config).values()) / 1e6, 2) == millions
        assert cost.cache_bytes(config, 1024, 2) == mebibytes * 2**20


def test_what_rope_and_windows_change_in_gpt2() -> None:
    plain = ModelConfig.preset("gpt2")
    rope, window = ModelConfig.preset("gpt2", position="rope"), ModelConfig.preset("gpt2", window=256)
    assert sum(cost.parameters(plain).values()) - sum(cost.parameters(rope).values()) == 786_432
    assert cost.parameters(window) == cost.parameters(plain)
    assert cost.receptive_field(window) == 12 * 255 + 1
    # The cache outgrows the weights, both in bfloat16, at about 6.6 sequences of 1,024 tokens.
    weights = 2 * sum(cost.parameters(plain).values())
    assert weights / cost.cache_bytes(plain, 1024, 2) == pytest.approx(6.6, abs=0.05)
