from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from helpers.models import close, noisy, random_ids
from torch import Tensor, nn
from torch.nn import functional as F

from gptlab import GptlabError, ModelConfig
from gptlab.config import PRESETS, Activation
from gptlab.model import GPT, Linear
from gptlab.model.kernels import use


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def is_norm(name: str) -> bool:
    return ".ln_" in name or name.startswith("ln_f")


# Shapes


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 64)])
def test_logits_have_one_row_for_each_token(batch: int, length: int) -> None:
    model = noisy()
    logits = model(random_ids(model, batch, length))
    assert logits.shape == (batch, length, 256)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    "overrides",
    [
        {"bias": False},
        {"n_inner": 17},
        {"tie_embeddings": False},
        {"vocab_size": 101},
        {"n_head": 1},
        {"n_head": 32},
        {"norm": "rms", "mlp": "swiglu"},
    ],
    ids=str,
)
def test_every_plain_variant_computes_finite_logits(overrides: dict[str, Any]) -> None:
    model = noisy(**overrides)
    logits = model(random_ids(model, 2, 9))
    assert logits.shape == (2, 9, model.config.vocab_size)
    assert torch.isfinite(logits).all()


def test_without_bias_there_is_none() -> None:
    assert not [name for name in weights(noisy(bias=False)) if name.endswith("bias")]


@pytest.mark.parametrize("ids", [[[1, 2, 3]], [[5]]])
def test_int32_ids_do_as_well(ids: list[list[int]]) -> None:
    model = noisy()
    assert torch.equal(model(torch.tensor(ids, dtype=torch.int32)), model(torch.tensor(ids)))


# Initialisation


def test_parameters_start_as_the_paper_says() -> None:
    model = GPT(ModelConfig.preset("tiny", n_layer=8, n_embd=128, vocab_size=1000, tie_embeddings=False), seed=3)
    assert len(weights(model)) == 2 + 8 * 12 + 2 + 1
    for name, weight in weights(model).items():
        if name.endswith("bias"):
            assert torch.equal(weight, torch.zeros_like(weight)), name
        elif is_norm(name):
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            # N(0, 0.02), and the residual projections 0.02 / sqrt(2 * n_layer): Radford et al. 2019, section 2.3.
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            n = weight.numel()
            # Five standard errors of the mean and of the standard deviation.
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(n), name
            assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n), name


def test_no_two_parameters_start_alike() -> None:
    drawn = [w.flatten()[:1000] for n, w in weights(noisy(n_layer=3)).items() if w.numel() >= 1000]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert len(drawn) > 10
    assert correlation.abs().max() < 0.2  # chance alone gives about 1 / sqrt(1000)


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    config = ModelConfig.preset("tiny")
    torch.manual_seed(1)
    one = weights(GPT(config, seed=5))
    torch.manual_seed(2)
    again, other = weights(GPT(config, seed=5)), weights(GPT(config, seed=6))
    for name in one:
        assert torch.equal(one[name], again[name])
        if not name.endswith("bias") and not is_norm(name):
            assert not torch.equal(one[name], other[name])


def test_building_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    GPT(ModelConfig.preset("tiny"), seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_layer": 5},
        {"context_length": 32},
        {"vocab_size": 300},
        {"n_inner": 64},
        {"n_head": 2},
        {"tie_embeddings": False},
        {"dropout": 0.1},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"bias": False},
        {"norm": "rms", "mlp": "swiglu", "n_inner": 128},
    ],
    ids=str,
)
def test_what_keeps_its_name_and_shape_keeps_its_start_whatever_else_changes(overrides: dict[str, Any]) -> None:
    one = weights(GPT(ModelConfig.preset("tiny"), seed=5))
    other = weights(GPT(ModelConfig.preset("tiny", **overrides), seed=5))
    shared = [name for name in one if name in other and one[name].shape == other[name].shape]
    assert len(shared) >= 14
    for name in shared:
        # The scale of a residual projection depends on the depth, its draw does not.
        deeper = math.sqrt(overrides.get("n_layer", 2) / 2) if name.endswith("c_proj.weight") else 1.0
        torch.testing.assert_close(other[name] * deeper, one[name], rtol=1e-6, atol=0.0)


def test_the_start_does_not_depend_on_the_default_dtype() -> None:
    expected = weights(GPT(ModelConfig.preset("tiny"), seed=5))
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = weights(GPT(ModelConfig.preset("tiny"), seed=5))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight.bfloat16()), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_start_does_not_depend_on_the_device() -> None:
    expected = weights(GPT(ModelConfig.preset("tiny"), seed=5))
    with torch.device("cuda"):
        actual = weights(GPT(ModelConfig.preset("tiny"), seed=5))
    for name, weight in expected.items():
        assert actual[name].is_cuda
        assert torch.equal(actual[name].cpu(), weight), name


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_on_the_meta_device_takes_no_memory(name: str) -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig.preset(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())


def test_a_model_on_the_meta_device_has_the_names_and_shapes_of_a_real_one() -> None:
    config = ModelConfig.preset("tiny", tie_embeddings=False)
    with torch.device("meta"):
        meta = GPT(config)
    assert {n: w.shape for n, w in weights(meta).items()} == {n: w.shape for n, w in weights(GPT(config)).items()}


# The head


def test_a_tied_head_is_the_token_embedding() -> None:
    model = noisy()
    assert model.lm_head.weight is model.wte.weight
    assert not [name for name in weights(model) if name.startswith("lm_head")]


def test_an_untied_head_has_weights_of_its_own() -> None:
    model = noisy(tie_embeddings=False)
    ids = random_ids(model, 1, 5)
    before = model(ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    close(model(ids), before * 2.0)
    assert "lm_head.weight" in weights(model)


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_uses() -> None:
    tied, untied = noisy(), noisy(tie_embeddings=False)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.wte.weight})
    ids = random_ids(tied, 2, 9)
    for model in (tied, untied):
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert tied.wte.weight.grad is not None
    assert untied.wte.weight.grad is not None
    assert untied.lm_head.weight.grad is not None
    close(tied.wte.weight.grad, untied.wte.weight.grad + untied.lm_head.weight.grad, 1e-6)


def test_a_custom_head_gets_the_hidden_states_and_the_projection() -> None:
    model = noisy()
    ids = random_ids(model, 2, 9)
    seen: dict[str, Any] = {}

    def head(hidden: Tensor, lm_head: Linear) -> str:
        seen.update(hidden=hidden, lm_head=lm_head)
        return "whatever it returns"

    assert model(ids, head=head) == "whatever it returns"
    assert seen["lm_head"] is model.lm_head
    assert seen["hidden"].shape == (2, 9, 32)
    assert seen["hidden"].dtype == torch.float32
    close(seen["hidden"] @ model.wte.weight.T, model(ids))


# Bad input


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(1, 2, 5, dtype=torch.int64),
        torch.zeros(1, 5),
        torch.zeros(1, 5, dtype=torch.bool),
        torch.zeros(1, 5, dtype=torch.int16),
    ],
    ids=lambda ids: f"{tuple(ids.shape)} {ids.dtype}",
)
def test_ids_of_a_wrong_shape_or_type_are_refused(ids: Tensor) -> None:
    with pytest.raises(GptlabError, match=r"ids must be \(batch, tokens\) of int64"):
        noisy()(ids)


def test_more_tokens_than_the_context_are_refused_and_a_full_context_is_not() -> None:
    model = noisy()
    assert model(random_ids(model, 1, 64)).shape == (1, 64, 256)
    with pytest.raises(GptlabError, match="65 tokens exceed the context of 64"):
        model(random_ids(model, 1, 65))


def test_a_cache_cannot_take_more_tokens_than_the_context() -> None:
    model = noisy()
    ids = random_ids(model, 1, 65)
    cache = model.make_cache(1, 64)
    close(model(ids[:, :64], cache=cache), model(ids[:, :64]))
    with pytest.raises(GptlabError, match="the cache has 64 slots and 64 are used"):
        model(ids[:, 64:], cache=cache)
    with pytest.raises(GptlabError, match="a cache for 65 tokens exceeds the context of 64"):
        model.make_cache(1, 65)


# What each token may know


def test_a_token_moves_its_own_logits_and_those_after_it_and_none_before() -> None:
    model = noisy()
    ids = random_ids(model, 1, 24)
    before = model(ids)
    for t in range(24):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % 256
        moved = (model(changed) - before).abs().amax(-1)[0]
        assert torch.equal(moved[:t], torch.zeros(t))
        assert (moved[t:] > 1e-5).all()


def test_rows_of_a_batch_do_not_know_each_other() -> None:
    model = noisy()
    ids = random_ids(model, 3, 20)
    close(model(ids), torch.cat([model(row[None]) for row in ids]))


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_packed_documents_are_as_each_alone(kernel: str) -> None:
    model = noisy()
    lengths = [7, 1, 12, 4]
    ids = random_ids(model, 2, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with use(kernel):
        together = model(ids, positions=positions, documents=documents)
        alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], 1)
    close(together, alone)


def test_documents_without_positions_count_on_through_the_row() -> None:
    model = noisy()
    ids = random_ids(model, 1, 20)
    documents = (torch.arange(20) >= 8).long()[None]
    second = model(ids, documents=documents)[:, 8:]
    close(second, model(ids[:, 8:], positions=torch.arange(8, 20)[None]))
    assert (second - model(ids[:, 8:])).abs().max() > 1e-2


def test_each_layer_norm_centres_and_scales() -> None:
    model = GPT(ModelConfig.preset("tiny"))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * 3 + 7
    y = model.ln_f(x)
    close(y, (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())


@pytest.mark.parametrize("activation", get_args(Activation))
def test_the_feed_forward_network_is_the_formula(activation: str) -> None:
    model = noisy(activation=activation)
    mlp = model.blocks[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    u = (x @ mlp.c_fc.weight.T + mlp.c_fc.bias).double()
    formulas = {
        # Hendrycks and Gimpel 2016: the exact form, and the approximation that GPT-2 uses.
        "gelu": u / 2 * (1 + torch.erf(u / math.sqrt(2))),
        "gelu_tanh": u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
        "relu": u.clamp(min=0),
        "silu": u / (1 + torch.exp(-u)),
    }
    y = formulas[activation].float()
    close(mlp(x), y @ mlp.c_proj.weight.T + mlp.c_proj.bias, 1e-6)


def test_each_rms_norm_scales_and_does_not_centre() -> None:
    norm = noisy(norm="rms", norm_eps=1e-3).ln_f
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1 + 7
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()  # Zhang and Sennrich 2019, eq. 4
    close(norm(x.float()), expected.float())
    assert not [name for name in weights(noisy(norm="rms")) if is_norm(name) and name.endswith("bias")]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_of_a_bfloat16_model_are_float32(kind: str) -> None:
    norm = noisy(norm=kind).bfloat16().ln_f
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) + 3
    expected = noisy(norm=kind).bfloat16().float().ln_f(x)
    close(norm(x), expected)
    assert (norm(x.bfloat16()) - expected).abs().max() > 1e-3  # what a stream in bfloat16 would cost


@pytest.mark.parametrize("bias", [True, False])
def test_the_gated_network_is_the_formula(bias: bool) -> None:
    mlp = noisy(mlp="swiglu", bias=bias).double().blocks[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def affine(x: Tensor, linear: Linear) -> Tensor:
        return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)

    gate = affine(x, mlp.c_gate)
    hidden = gate / (1 + torch.exp(-gate)) * affine(x, mlp.c_fc)  # Shazeer 2020, eq. 6, beta 1
    close(mlp(x), affine(hidden, mlp.c_proj), 1e-12)


# Scores


SWITCHES: list[dict[str, Any]] = [
    {},
    {"n_kv_head": 2, "position": "rope", "window": 5, "sinks": 2, "dilation": 2},
    {"position": "blend"},
]


@torch.no_grad()
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "banded", "cached"])
def test_factors_of_scores_are_factors_of_queries(
    scale: bool, by_layer: bool, switches: dict[str, Any], kernel: str
) -> None:
    flags = {"scale_attn_weights": scale, "scale_attn_by_inverse_layer_idx": by_layer}
    model, plain = noisy(**switches, **flags), noisy(**switches)
    for layer, block in enumerate(plain.blocks):
        factor = (1 if scale else math.sqrt(8)) / (layer + 1 if by_layer else 1)
        block.attn.c_attn.weight[:32] *= factor
        block.attn.c_attn.bias[:32] *= factor
    ids = random_ids(model, 2, 30)
    with use("reference"):
        expected = plain(ids)
        if flags != {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}:
            assert (expected - noisy(**switches)(ids)).abs().max() > 1e-3
    if kernel == "cached":
        cache = model.make_cache(2, 30, chunk=7)
        actual = torch.cat([model(part, cache=cache) for part in ids.split([7, 7, 1, 1, 7, 7], dim=1)], 1)
    else:
        with use(kernel):
            actual = model(ids)
    close(actual, expected)
    close(model.attention_maps(ids, 1), plain.attention_maps(ids, 1))


# Attention maps


def block_inputs(model: GPT, ids: Tensor) -> list[dict[str, Tensor]]:
    """What goes into each block, and what its heads gather, recorded in one forward pass."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    handles = []
    for i, block in enumerate(model.blocks):
        handles.append(block.register_forward_pre_hook(lambda _, args, i=i: seen[i].update(x=args[0])))
        gathered = block.attn.c_proj.register_forward_pre_hook(lambda _, args, i=i: seen[i].update(y=args[0]))
        handles.append(gathered)
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def test_attention_maps_are_what_the_forward_pass_looks_at() -> None:
    model = noisy(n_layer=3)
    ids = random_ids(model, 2, 20)
    for layer, seen in enumerate(block_inputs(model, ids)):
        maps = model.attention_maps(ids, layer)
        assert maps.shape == (2, 4, 20, 20)
        close(maps.sum(-1), torch.ones(2, 4, 20))
        assert torch.equal(maps.triu(1), torch.zeros_like(maps))
        block = model.blocks[layer]
        _, _, v, _ = block.attn.project(block.ln_1(seen["x"]), None)
        close((maps @ v).transpose(1, 2).flatten(2), seen["y"])


@pytest.mark.parametrize("layer", [-1, 2])
def test_attention_maps_of_a_layer_that_is_not_there_are_refused(layer: int) -> None:
    model = noisy()
    with pytest.raises(GptlabError, match=f"layer must be 0 to 1, got {layer}"):
        model.attention_maps(random_ids(model, 1, 4), layer)


# Numbers of low precision


def test_bfloat16_weights_keep_the_residual_stream_and_the_logits_in_float32() -> None:
    model = noisy().bfloat16()
    ids = random_ids(model, 2, 20)
    stream = [seen["x"] for seen in block_inputs(model, ids)]
    assert [x.dtype for x in stream] == [torch.float32] * 2
    assert not torch.equal(stream[1], stream[1].bfloat16().float())  # more digits than bfloat16 has
    norms = [model.blocks[0].ln_1(stream[0]).dtype, model.ln_f(stream[1]).dtype]
    assert norms == [torch.float32] * 2
    logits = model(ids)
    assert logits.dtype == torch.float32
    # The same rounded weights, computed in float32: only the products' rounding of 2^-9 remains.
    exact = noisy().bfloat16().float()(ids)
    assert (logits - exact).norm() / exact.norm() < 0.01
    assert not torch.equal(logits, exact)


# Dropout


def test_dropout_acts_in_training_only() -> None:
    model, without = noisy(dropout=0.5), noisy()
    ids = random_ids(model, 2, 20)
    torch.manual_seed(0)
    assert torch.equal(model(ids), without(ids))
    model.train()
    assert (model(ids) - model(ids)).abs().max() > 1e-2


def test_dropout_of_zero_changes_nothing_in_training() -> None:
    model = noisy()
    ids = random_ids(model, 2, 20)
    expected = model(ids)
    assert torch.equal(model.train()(ids), expected)


@pytest.mark.parametrize("place", ["embedding", "attention weights", "attention branch", "feed-forward branch"])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_dropout_acts_in_each_of_its_places(place: str, kernel: str) -> None:
    model = noisy(dropout=0.5).train()
    places: dict[str, list[nn.Dropout]] = {
        "embedding": [model.drop],
        "attention branch": [block.attn.resid_dropout for block in model.blocks],
        "feed-forward branch": [block.mlp.dropout for block in model.blocks],
    }
    for name, modules in places.items():
        for module in modules:
            module.p = 0.5 if name == place else 0.0
    if place != "attention weights":
        for block in model.blocks:
            block.attn.dropout = 0.0
    ids = random_ids(model, 2, 20)
    torch.manual_seed(0)
    with use(kernel):
        assert (model(ids) - model(ids)).abs().max() > 1e-2


def test_dropout_of_the_embedding_drops_its_share_and_scales_the_rest() -> None:
    model = noisy(dropout=0.25).train()
    ids = random_ids(model, 8, 64)
    torch.manual_seed(0)
    x = block_inputs(model, ids)[0]["x"]
    whole = model.wte(ids) + model.wpe(torch.arange(64))
    dropped = x == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.02  # 16,384 draws: six standard errors
    close(x[~dropped], (whole / 0.75)[~dropped], 1e-6)
