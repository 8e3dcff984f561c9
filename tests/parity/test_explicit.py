"""Per-layer windows, capped sinks and dilation have no outside judge: an explicit model, query by query, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.models import disturb
from torch import Tensor
from torch.nn import functional as F

import gptlab
from gptlab.model.kernels import use

VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 53, 24, 4, 3, 40


def ours(**overrides: Any) -> gptlab.GPT:
    values = {"vocab_size": VOCAB, "context_length": CONTEXT, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH}
    config = gptlab.ModelConfig.from_dict({**values, **overrides})
    return disturb(gptlab.GPT(config, seed=3).eval(), 0.15)


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def turned(k: Tensor, by: int, theta: float = 10000.0) -> Tensor:
    """A key (D,) as a query ``by`` positions later sees it: pairs (i, i + D/2) turned backwards, as complex numbers."""
    half = len(k) // 2
    angles = torch.tensor([by * theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    pairs = torch.complex(k[:half], k[half:]) * torch.polar(torch.ones_like(angles), -angles)
    return torch.cat([pairs.real, pairs.imag])


def explicit(model: gptlab.GPT, tokens: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The logits (T, V) and the attention weights (H, T, T) of every layer."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    n, d, group = len(tokens), c.head_dim, c.n_head // c.kv_heads
    windows = c.window if isinstance(c.window, tuple) else [c.window] * c.n_layer
    dilations = c.dilation if isinstance(c.dilation, tuple) else [c.dilation] * c.n_layer

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (c.n_embd,), w[f"{name}.weight"], w[f"{name}.bias"], c.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x, maps = w["wte.weight"][tokens], []
    if c.position == "learned":
        x = x + w["wpe.weight"][:n]
    for layer in range(c.n_layer):
        window, step = windows[layer], dilations[layer]
        rows = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn")
        q, k, v = rows.split([c.n_embd, c.kv_heads * d, c.kv_heads * d], dim=-1)
        out, weights = torch.zeros(n, c.n_embd, dtype=torch.float64), torch.zeros(c.n_head, n, n, dtype=torch.float64)
        for head, i in itertools.product(range(c.n_head), range(n)):
            mine, theirs = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
            seen = range(i + 1)
            if window is not None:
                seen = sorted(
                    {i - m * step for m in range(window) if i - m * step >= 0} | set(range(min(c.sinks, i + 1)))
                )
            scores = []
            for j in seen:
                distance = i - j
                if window is not None and j < c.sinks:
                    # As if the sinks stood right before the window's oldest position.
                    distance = min(distance, (window - 1) * step + c.sinks - j)
                key = turned(k[j, theirs], distance) if c.position == "rope" else k[j, theirs]
                scores.append(q[i, mine] @ key / math.sqrt(d))
            weights[head, i, list(seen)] = torch.softmax(torch.stack(scores), 0)
            out[i, mine] = weights[head, i] @ v[:, theirs]
        maps.append(weights)
        x = x + linear(out, f"h.{layer}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, f"h.{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T, maps


WINDOWS: list[dict[str, Any]] = [
    {},
    {"window": 5},
    {"window": 5, "sinks": 3},
    {"window": 4, "sinks": 2, "dilation": 3},
    {"window": (3, None, 6)},
    {"window": (3, None, 6), "sinks": 2},
    {"window": (2, 5, 3), "dilation": (1, 2, 4), "sinks": 4},
]


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@torch.no_grad()
def test_logits_and_attention_maps_are_those_of_the_explicit_model(
    position: str, n_kv_head: int, windows: dict[str, Any]
) -> None:
    model = ours(position=position, n_kv_head=n_kv_head, **windows)
    tokens = ids(31, batch=1)
    logits, maps = explicit(model, tokens[0].tolist())
    torch.testing.assert_close(model(tokens)[0].double(), logits, atol=1e-5, rtol=0)
    if windows and model.config.windows.count(None) == 0:
        with use("banded"):
            torch.testing.assert_close(model(tokens)[0].double(), logits, atol=1e-5, rtol=0)
    cache = model.make_cache(1, 31, chunk=3)
    actual = torch.cat([model(part, cache=cache) for part in tokens.split([3, 3, 1, 1, 3] + [1] * 20, dim=1)], 1)
    torch.testing.assert_close(actual[0].double(), logits, atol=1e-5, rtol=0)
    for layer, expected in enumerate(maps):
        actual = model.attention_maps(tokens, layer)
        assert actual.shape == (1, 4, 31, 31)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual[0].double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(actual[0] > 0, expected > 0)


@torch.no_grad()
def test_attention_maps_of_grouped_queries_are_what_the_forward_pass_gathers() -> None:
    model = ours(position="rope", n_kv_head=2, window=(3, None, 6), sinks=1)
    tokens = ids(30)
    for layer, block in enumerate(model.blocks):
        kept: dict[str, Tensor] = {}
        hooks = [
            block.attn.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(x=args[0], rotary=args[2])),
            block.attn.c_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.update(y=args[0])),
        ]
        model(tokens)
        for hook in hooks:
            hook.remove()
        _, _, v, _ = block.attn.project(kept["x"], kept["rotary"])  # type: ignore[arg-type]
        gathered = model.attention_maps(tokens, layer) @ v.repeat_interleave(2, dim=1)
        torch.testing.assert_close(gathered.transpose(1, 2).flatten(2), kept["y"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_gradients_of_a_windowed_model_are_those_of_the_explicit_attention(position: str) -> None:
    # Training goes through `banded` (forced here; a long sequence chooses it): every parameter against `reference`.
    tokens, gradients = ids(37), []
    model = ours(position=position, n_kv_head=2, window=(3, 7, 6), sinks=2, dilation=(1, 1, 3)).train()
    for kernel in ("reference", "banded", "sdpa"):
        model.zero_grad()
        with use(kernel):
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_documents_in_one_row_are_each_alone() -> None:
    model = ours(position="rope", n_kv_head=2, window=(3, None, 6), dilation=(2, 1, 1))
    lengths = [7, 1, 12, 4]
    tokens = ids(sum(lengths))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], 1)
    for kernel in ("reference", "sdpa"):
        with use(kernel):
            # Rotary scores depend on distances alone, so that documents need no positions of their own.
            torch.testing.assert_close(model(tokens, documents=documents), alone, atol=1e-5, rtol=0)
    windowed = ours(position="rope", window=5)
    alone = torch.cat([windowed(part) for part in tokens.split(lengths, dim=1)], 1)
    with use("banded"):
        torch.testing.assert_close(windowed(tokens, documents=documents), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_sinks_belong_to_each_document_where_its_positions_begin_again() -> None:
    model = ours(position="rope", n_kv_head=2, window=3, sinks=2)
    lengths = [9, 14]
    tokens = ids(23)
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], 1)
    torch.testing.assert_close(model(tokens, positions=positions, documents=documents), alone, atol=1e-5, rtol=0)
