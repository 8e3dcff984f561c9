# Fewer key/value heads: what is exact, what is optimal, and what it does to the heads of OpenAI's 124M.
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LLAMA, random_ids, same_state
from helpers.models import lively as noisy
from safetensors import safe_open
from torch import Tensor

import gptlab
from gptlab import GPT, GptlabError, ModelConfig
from gptlab.conversion.circuits import circuit_errors
from gptlab.conversion.heads import group_heads, permute_heads, regroup, repeat_heads
from gptlab.conversion.layers import Heads, read_heads, rebuild
from gptlab.conversion.statistics import Moments, assumed_statistics, collect_statistics, visit_inputs

BOTH_POSITIONS = pytest.mark.parametrize("position", ["learned", "rope"])
PAPER = ["mean", "first", "random"]


@torch.no_grad()
def apart(one: GPT, other: GPT, ids: Tensor) -> float:
    """The largest difference of two models' logits, as a share of the largest logit."""
    expected = one(ids)
    return ((other(ids) - expected).abs().max() / expected.abs().max()).item()


def qkv(model: GPT, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of ``c_attn`` with the bias as last column: (H, D, C + 1), (H_kv, D, C + 1), (H_kv, D, C + 1)."""
    config, attention = model.config, model.blocks[layer].attn
    rows = attention.c_attn.weight.detach()
    if config.bias:
        rows = torch.cat([rows, attention.c_attn.bias.detach()[:, None]], 1)
    q, k, v = rows.unflatten(0, (-1, config.head_dim)).split([config.n_head, config.kv_heads, config.kv_heads])
    return q, k, v


def by_pairs(factors: Tensor) -> Tensor:
    """Complex (D / 2,) -> the (D, D) matrix that multiplies channels (d, d + D / 2) by it, as rotary positions do."""
    matrix = torch.zeros(2 * len(factors), 2 * len(factors), dtype=torch.float64)
    for d, factor in enumerate(factors):
        e = d + len(factors)
        matrix[d, d] = matrix[e, e] = factor.real
        matrix[d, e], matrix[e, d] = -factor.imag, factor.imag
    return matrix


@torch.no_grad()
def disguised(model: GPT, seed: int = 1) -> GPT:
    """The same function with a key and value of its own for every head, each in a random gauge, heads shuffled."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    new = repeat_heads(model)
    n_head, width = config.n_head, config.head_dim

    def gauge() -> Tensor:
        return torch.randn(width, width, dtype=torch.float64, generator=generator) / 3 + torch.eye(width)

    for block in new.blocks:
        rows = block.attn.c_attn.weight.double().unflatten(0, (3, n_head, width))
        bias = block.attn.c_attn.bias
        biases = (torch.zeros(len(block.attn.c_attn.weight)) if bias is None else bias).double()
        biases = biases.unflatten(0, (3, n_head, width))
        out = block.attn.c_proj.weight.double().unflatten(1, (n_head, width))
        for h in range(n_head):
            a, b = gauge(), gauge()
            if config.position == "rope":
                angles = torch.rand(width // 2, dtype=torch.float64, generator=generator) * 6
                sizes = 0.5 + torch.rand(width // 2, dtype=torch.float64, generator=generator)
                a = by_pairs(torch.polar(sizes, angles))
            for i, g in ((0, a), (1, a.inverse().T), (2, b)):
                rows[i, h], biases[i, h] = g @ rows[i, h], g @ biases[i, h]
            out[:, h] = out[:, h] @ b.inverse()
        if config.position == "learned":
            # What the softmax does not see.
            biases[1] += torch.randn(n_head, width, dtype=torch.float64, generator=generator)
        block.attn.c_attn.weight.copy_(rows.flatten(0, 2))
        if bias is not None:
            bias.copy_(biases.flatten())
        block.attn.c_proj.weight.copy_(out.flatten(1))
    orders = [torch.randperm(n_head, generator=generator).tolist() for _ in new.blocks]
    return permute_heads(new, orders)


# What is exact


def test_permuted_heads_compute_the_same() -> None:
    model = noisy(window=9, sinks=2, position="rope")
    orders = [[2, 0, 3, 1], [3, 1, 0, 2]]
    new = permute_heads(model, orders)
    assert new.config == model.config
    assert apart(model, new, random_ids(model)) < 1e-6
    for layer, order in enumerate(orders):
        for before, after in zip(qkv(model, layer), qkv(new, layer), strict=True):
            assert torch.equal(after, before[order])
        columns = [block.attn.c_proj.weight.unflatten(1, (4, 8)) for block in (model.blocks[layer], new.blocks[layer])]
        assert torch.equal(columns[1], columns[0][:, order])


def test_heads_that_share_a_key_are_permuted_together() -> None:
    model = noisy(n_kv_head=2)
    new = permute_heads(model, [[3, 2, 0, 1], [1, 0, 2, 3]])
    assert new.config.n_kv_head == 2
    assert apart(model, new, random_ids(model)) < 1e-6
    assert torch.equal(qkv(new, 0)[1], qkv(model, 0)[1].flip(0))
    with pytest.raises(GptlabError, match=r"must stay neighbours, 2 by 2, got \[0, 2, 1, 3\]; use repeat_heads"):
        permute_heads(model, [[0, 1, 2, 3], [0, 2, 1, 3]])


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 1, 1, 3], [0, 1, 2, 4]])
def test_an_order_names_every_head_once(order: list[int]) -> None:
    with pytest.raises(GptlabError, match="must name each of 0 to 3 once"):
        permute_heads(noisy(), [order, order])


def test_there_is_an_order_for_every_layer() -> None:
    with pytest.raises(GptlabError, match="1 orders for n_layer=2"):
        permute_heads(noisy(), [[0, 1, 2, 3]])


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "window": 9, "sinks": 1}, {"bias": False}, LLAMA])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_repeated_heads_compute_the_same(n_kv_head: int, changes: dict[str, Any]) -> None:
    model = noisy(n_kv_head=n_kv_head, **changes)
    new = repeat_heads(model)
    assert new.config == ModelConfig.preset("tiny", **changes)
    assert apart(model, new, random_ids(model)) < 1e-6
    # And back: the first head, or the mean, of each group of equals is what was there.
    assert same_state(regroup(new, n_kv_head, method="first"), model)
    assert same_state(regroup(new, n_kv_head, method="mean"), model)


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"position": "none"}, {"window": 7, "sinks": 2, "dilation": 2}, {"tie_embeddings": False}],
)
@pytest.mark.parametrize("method", ["svd", "uncentred", "activations", "procrustes"])
def test_the_same_number_of_heads_in_another_gauge(method: Any, changes: dict[str, Any]) -> None:
    model = noisy(**changes)
    ids = random_ids(model)
    for statistics in (None, collect_statistics(model, ids)):
        new = regroup(model, 4, method=method, statistics=statistics)
        assert apart(model, new, ids) < 1e-5
        if method == "svd":
            assert not torch.isclose(new.blocks[0].attn.c_attn.weight, model.blocks[0].attn.c_attn.weight).all(1).any()
        if "bias" not in changes and method in ("svd", "procrustes"):
            for layer in (0, 1):
                _, k, v = qkv(new, layer)
                assert torch.equal(k[..., -1], torch.zeros(4, 8))
                assert torch.equal(v[..., -1], torch.zeros(4, 8))
                assert not torch.equal(new.blocks[layer].attn.c_proj.bias, model.blocks[layer].attn.c_proj.bias)


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_activations_is_the_truncated_svd_of_the_keys_and_values_of_a_text(n_kv_head: int) -> None:
    model = noisy()
    read: list[Tensor] = []
    visit_inputs(model, random_ids(model, 8, 40), lambda layer, z: read.append(z.flatten(0, 1).double()))
    centred = [z - z.mean(0) for z in read]
    moments = [Moments(z.mean(0), c.T @ c / len(z), len(z)) for z, c in zip(read, centred, strict=True)]
    new = regroup(model, n_kv_head, method="activations", statistics=moments)
    for layer, z in enumerate(read):
        z = torch.cat([z, z.new_ones(len(z), 1)], 1)
        (q, k, v), (new_q, new_k, new_v) = qkv(model, layer), qkv(new, layer)
        o, new_o = (read_heads(one.blocks[layer].attn).o for one in (model, new))
        group = 4 // n_kv_head
        for g in range(n_kv_head):
            heads = range(g * group, (g + 1) * group)
            for rows, shared, use, new_use in ((k, new_k, q, new_q), (v, new_v, o.mT, new_o.mT)):
                activations = torch.cat([z @ rows[h].double().T for h in heads], 1)  # (T, group D)
                u, sizes, vh = torch.linalg.svd(activations, full_matrices=False)
                kept = (u[:, :8] * sizes[:8]) @ vh[:8]
                for i, h in enumerate(heads):
                    expected = kept[:, i * 8 : i * 8 + 8] @ use[h].double()
                    actual = (z @ shared[g].double().T) @ new_use[h].double()
                    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_centring_and_use_are_worth_something() -> None:
    model = noisy()
    statistics = collect_statistics(model, random_ids(model, 8, 40))
    lost = {}
    for method in ("svd", "uncentred", "activations"):
        new = regroup(model, 1, method=method, grouping="contiguous", statistics=statistics)  # type: ignore[arg-type]
        pairs = zip(model.blocks, new.blocks, statistics, strict=True)
        lost[method] = [circuit_errors(read_heads(a.attn), read_heads(b.attn), one) for a, b, one in pairs]
    for layer in (0, 1):
        for circuit in (0, 1):
            others = (lost[method][layer][circuit] for method in ("uncentred", "activations"))
            assert lost["svd"][layer][circuit] <= min(others) + 1e-9


@pytest.mark.parametrize("method", ["svd", "uncentred", "activations"])
def test_methods_that_mix_channels_refuse_rotated_keys(method: Any) -> None:
    with pytest.raises(GptlabError, match=f"method '{method}' mixes the channels of a key freely"):
        regroup(noisy(position="rope"), 1, method=method)


@pytest.mark.parametrize("changes", [{"position": "rope"}, LLAMA], ids=["rope", "llama"])
def test_the_same_number_of_turned_heads_in_another_gauge(changes: dict[str, Any]) -> None:
    model = noisy(**changes)
    ids = random_ids(model)
    for statistics in (None, collect_statistics(model, ids)):
        new = regroup(model, 4, statistics=statistics)
        assert apart(model, new, ids) < 1e-5
        assert qkv(new, 0)[1][..., -1].abs().max() > 0.01
        assert new.config == model.config


def test_the_built_in_model_in_another_gauge() -> None:
    model = gptlab.load("pocket").model
    ids = random_ids(model, 2, 64)
    statistics = collect_statistics(model, ids)
    for new in (regroup(model, 6), regroup(model, 6, statistics=statistics), regroup(model, 6, method="procrustes")):
        assert apart(model, new, ids) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"position": "rope"}, LLAMA], ids=["learned", "rope", "llama"])
@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_heads_that_could_share_are_found_and_shared_without_loss(n_kv_head: int, changes: dict[str, Any]) -> None:
    source = noisy(n_kv_head=n_kv_head, **changes)
    ids = random_ids(source)
    model = disguised(source)
    assert apart(source, model, ids) < 1e-5
    for statistics in (None, collect_statistics(model, ids)):
        new = regroup(model, n_kv_head, statistics=statistics)
        assert new.config == source.config
        assert apart(source, new, ids) < 1e-4
    # The plain mean is far from it.
    assert apart(source, regroup(model, n_kv_head, method="mean"), ids) > 0.05


@pytest.mark.parametrize("changes", [{"position": "rope"}, LLAMA], ids=["rope", "llama"])
def test_three_keys_of_nine_heads_become_one(changes: dict[str, Any]) -> None:
    source = noisy(n_embd=36, n_head=9, n_kv_head=1, **changes)
    generator = torch.Generator().manual_seed(1)

    def in_three_gauges(_: int, heads: Heads) -> Heads:
        angles = torch.rand(3, 2, dtype=torch.float64, generator=generator) * 6
        keys = torch.stack([by_pairs(torch.polar(0.5 + angle, angle)) for angle in angles])  # (3, D, D)
        values = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator) / 5 + torch.eye(4)
        return heads._replace(
            q=keys.inverse().mT.repeat_interleave(3, 0) @ heads.q,
            k=keys @ heads.k,
            v=values @ heads.v,
            o=heads.o @ values.inverse().repeat_interleave(3, 0),
        )

    grouped, ids = rebuild(source, in_three_gauges, n_kv_head=3), random_ids(source)
    assert apart(source, grouped, ids) < 1e-5
    new = regroup(grouped, 1)
    assert new.config == source.config
    assert apart(source, new, ids) < 1e-4
    assert apart(source, regroup(grouped, 1, method="mean"), ids) > 0.05


def test_the_bias_of_values_moves_into_the_output_even_if_values_are_lost() -> None:
    model = noisy()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.c_attn.weight.zero_()
    new = regroup(model, 1)
    assert apart(model, new, random_ids(model)) < 1e-6


# What the paper's methods are


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_mean_and_first_as_the_paper_has_them(n_kv_head: int) -> None:
    model = noisy()
    means, firsts = regroup(model, n_kv_head, method="mean"), regroup(model, n_kv_head, method="first")
    rows = model.blocks[1].attn.c_attn.weight
    size = 4 // n_kv_head
    for new, pool in ((means, lambda heads: sum(heads) / size), (firsts, lambda heads: heads[0])):
        pooled = [rows[:32]]
        for part in (rows[32:64], rows[64:]):
            heads = [part[8 * h : 8 * h + 8] for h in range(4)]
            pooled += [pool(heads[g * size : (g + 1) * size]) for g in range(n_kv_head)]
        torch.testing.assert_close(new.blocks[1].attn.c_attn.weight, torch.cat(pooled), rtol=0.0, atol=1e-7)
        assert torch.equal(new.blocks[1].attn.c_proj.weight, model.blocks[1].attn.c_proj.weight)
        assert torch.equal(new.blocks[1].attn.c_proj.bias, model.blocks[1].attn.c_proj.bias)
    bias = model.blocks[1].attn.c_attn.bias[32:].view(2, n_kv_head, size, 8).mean(2).flatten()
    torch.testing.assert_close(means.blocks[1].attn.c_attn.bias[32:], bias, rtol=0.0, atol=1e-7)


def test_random_is_the_initialisation_of_a_new_model() -> None:
    model = noisy()
    new = regroup(model, 2, method="random", seed=7)
    fresh = GPT(ModelConfig.preset("tiny", n_kv_head=2), seed=7)
    for layer in (0, 1):
        actual, expected = new.blocks[layer].attn.c_attn, fresh.blocks[layer].attn.c_attn
        assert torch.equal(actual.weight[32:], expected.weight[32:])
        assert torch.equal(actual.bias[32:], torch.zeros(32))
        assert torch.equal(actual.weight[:32], model.blocks[layer].attn.c_attn.weight[:32])
    assert not same_state(new, regroup(model, 2, method="random", seed=8))


def test_procrustes_is_the_mean_of_rotated_heads() -> None:
    model = noisy()
    new = regroup(model, 2, method="procrustes", grouping="contiguous")
    scale = model.blocks[0].ln_1.weight.detach()
    (q, k, _), (new_q, new_k, _) = qkv(model, 0), qkv(new, 0)
    for group in (0, 1):
        rotations, rotated = [], []
        for h in (2 * group, 2 * group + 1):
            rotation = torch.linalg.lstsq(q[h].T, new_q[h].T).solution.T  # new_q = rotation q
            torch.testing.assert_close(rotation @ rotation.T, torch.eye(8), rtol=0.0, atol=1e-4)
            rotations.append(rotation)
            rotated.append(rotation @ k[h, :, :-1])
        torch.testing.assert_close(new_k[group, :, :-1], sum(rotated) / 2, rtol=0.0, atol=1e-4)
        # No other rotation of the second head would bring it closer to the first.
        aligned = (rotated[0] * scale) @ (rotated[1] * scale).T
        torch.testing.assert_close(aligned, aligned.T, rtol=0.0, atol=1e-3)
        assert torch.linalg.eigvalsh(aligned).min() > -1e-3


# What is optimal


def stacked(model: GPT, layer: int, n_groups: int, moments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All that the heads of each group compute, whitened, as matrices in full: written with explicit roots."""

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    q, k, v = (rows.double() for rows in qkv(model, layer))
    out = model.blocks[layer].attn.c_proj.weight.detach().double().unflatten(1, (4, 8))
    one = torch.cat([moments.mean, torch.ones(1, dtype=torch.float64)])
    covariance = torch.zeros(33, 33, dtype=torch.float64)
    covariance[:32, :32] = moments.covariance
    queries, keys = root(covariance + torch.outer(one, one)), root(moments.covariance)
    qk = [queries @ q[h].T @ k[h, :, :-1] @ keys for h in range(4)]
    ov = [out[:, h] @ v[h, :, :-1] @ keys for h in range(4)]
    size = 4 // n_groups
    return tuple([torch.cat(m[i : i + size]) for i in range(0, 4, size)] for m in (qk, ov))


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("measured", [False, True])
def test_svd_loses_exactly_what_no_shared_key_can_keep(measured: bool, n_kv_head: int) -> None:
    model = noisy()
    ids = random_ids(model, 20, 64)
    all_moments = collect_statistics(model, ids) if measured else [assumed_statistics(b) for b in model.blocks]
    new = regroup(model, n_kv_head, grouping="contiguous", statistics=all_moments if measured else None)
    for layer, moments in enumerate(all_moments):
        lost = circuit_errors(read_heads(model.blocks[layer].attn), read_heads(new.blocks[layer].attn), moments)
        before, after = stacked(model, layer, n_kv_head, moments), stacked(repeat_heads(new), layer, n_kv_head, moments)
        for error, old, changed in zip(lost, before, after, strict=True):
            size = sum(matrix.square().sum() for matrix in old)
            least = sum(torch.linalg.svdvals(matrix)[8:].square().sum() for matrix in old) / size
            direct = sum((a - b).square().sum() for a, b in zip(old, changed, strict=True)) / size
            assert 0.01 < least < 0.9
            assert direct.item() == pytest.approx(least.item(), rel=1e-4)
            assert error == pytest.approx(least.item(), rel=1e-4)


@BOTH_POSITIONS
def test_groups_are_those_that_lose_least(position: Any) -> None:
    model = noisy(position=position)
    orders = group_heads(model, 2)
    divisions = [[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]]
    assert all(order in divisions for order in orders)
    losses: list[list[float]] = [[], []]
    for division in divisions:
        source = permute_heads(model, [division, division])
        new = regroup(source, 2, grouping="contiguous")
        for layer in (0, 1):
            heads = read_heads(source.blocks[layer].attn), read_heads(new.blocks[layer].attn)
            losses[layer].append(sum(circuit_errors(*heads, assumed_statistics(model.blocks[layer]))))
    if position == "learned":  # with rotary positions the error at distance 0 is not all that is lost
        assert orders == [divisions[min(range(3), key=layer.__getitem__)] for layer in losses]
    # The order is what regroup uses.
    assert same_state(regroup(model, 2), regroup(permute_heads(model, orders), 2, grouping="contiguous"))


def test_queries_and_keys_keep_their_ratio_and_share_each_direction() -> None:
    model = noisy()
    ids = random_ids(model, 20, 64)
    statistics = collect_statistics(model, ids)
    new = regroup(model, 2, statistics=statistics, grouping="contiguous")

    def sizes(one: GPT, moments: Any) -> tuple[Tensor, Tensor]:
        """Mean squares of each channel of queries (H, D) and keys (H_kv, D), without what is the same for all keys."""
        q, k, _ = (rows.double() for rows in qkv(one, 0))
        weigh, centred = moments.uncentred, moments.centred
        return (q @ weigh @ q.mT).diagonal(dim1=1, dim2=2), (k @ centred @ k.mT).diagonal(dim1=1, dim2=2)

    (q, k), (new_q, new_k) = sizes(model, statistics[0]), sizes(new, statistics[0])
    for group in (0, 1):
        both = slice(2 * group, 2 * group + 2)
        ratio = q[both].sum() / k[both].sum()
        torch.testing.assert_close(new_q[both].mean(0) / new_k[group], ratio.expand(8), rtol=1e-3, atol=0.0)


def test_turned_keys_are_shared_pair_by_pair() -> None:
    model = noisy(position="rope")
    new = regroup(model, 2, grouping="contiguous")
    (q, k, _), (new_q, new_k, _) = qkv(model, 0), qkv(new, 0)
    moment = assumed_statistics(model.blocks[0]).uncentred
    root = torch.linalg.cholesky(moment)

    def pairs(rows: Tensor) -> Tensor:
        return torch.complex(rows[:, :4].double(), rows[:, 4:].double())  # (heads, D / 2, C + 1)

    old_q, old_k, q2, k2 = pairs(q), pairs(k), pairs(new_q), pairs(new_k).repeat_interleave(2, 0)
    factor = (q2 * old_q.conj()).sum(-1) / old_q.abs().square().sum(-1)
    torch.testing.assert_close(q2, factor[..., None] * old_q, rtol=0.0, atol=1e-5)
    # What keys became, seen from the old queries: conj(q') k' = conj(q) (conj(factor) k').
    seen = factor.conj()[..., None] * k2
    weights = (old_q @ root.to(torch.complex128)).abs().square().sum(-1).sqrt()[..., None]
    for d, group in itertools.product(range(4), range(2)):
        both = slice(2 * group, 2 * group + 2)
        before = (weights[both, d] * old_k[both, d]) @ root.to(torch.complex128)
        after = (weights[both, d] * seen[both, d]) @ root.to(torch.complex128)
        lost = torch.linalg.svdvals(before)[1:].square().sum()
        assert (before - after).abs().square().sum().item() == pytest.approx(lost.item(), rel=1e-4)


# Models of other shapes


def test_shared_heads_to_fewer() -> None:
    model = noisy(n_head=8, n_kv_head=4)
    ids = random_ids(model)
    for method in ("svd", "procrustes", *PAPER):
        new = regroup(model, 2, method=method)
        assert new.config == ModelConfig.preset("tiny", n_head=8, n_kv_head=2)
        assert torch.isfinite(new(ids)).all()
    _, k, v = qkv(model, 0)
    _, new_k, new_v = qkv(regroup(model, 2, method="mean"), 0)
    torch.testing.assert_close(new_k, k.unflatten(0, (2, 2)).mean(1), rtol=0.0, atol=1e-7)
    torch.testing.assert_close(new_v, v.unflatten(0, (2, 2)).mean(1), rtol=0.0, atol=1e-7)
    assert apart(model, regroup(model, 4), ids) < 1e-5
    # It is the same as sharing among the repeated heads.
    assert apart(regroup(repeat_heads(model), 2), regroup(model, 2), ids) < 1e-5


def test_groups_of_shared_heads_may_be_torn_apart() -> None:
    model = noisy(n_head=16, n_kv_head=8, n_embd=64)
    twelve = noisy(n_head=12, n_kv_head=6, n_embd=48)
    for source, n_kv_head in ((model, 4), (twelve, 4)):  # 6 to 4: groups of 3 heads out of groups of 2
        new = regroup(source, n_kv_head)
        assert new.config.n_kv_head == n_kv_head
        ids = random_ids(source)
        assert apart(source, new, ids) < apart(source, regroup(source, n_kv_head, method="mean"), ids)


def test_the_source_is_left_as_it_is_and_nothing_is_shared_with_it() -> None:
    model = noisy(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {tensor.data_ptr() for tensor in model.state_dict().values()}
    for new in (regroup(model, 2), regroup(model, 2, method="first"), repeat_heads(model)):
        assert new.training
        assert new.lm_head.weight is new.wte.weight
        assert not places & {tensor.data_ptr() for tensor in new.state_dict().values()}
        with torch.no_grad():
            for parameter in new.parameters():
                parameter.zero_()
    collect_statistics(model, random_ids(model))
    assert model.training
    assert not any(block.ln_1._forward_hooks for block in model.blocks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_converted_model_keeps_its_dtype_is_saved_and_converted_again(tmp_path: Path) -> None:
    model = noisy().to(torch.bfloat16)
    new = regroup(model, 2)
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    gptlab.save(gptlab.LanguageModel(new), tmp_path / "new")
    loaded = gptlab.load(tmp_path / "new", dtype=torch.bfloat16).model
    assert loaded.config == new.config
    assert same_state(loaded, new)
    assert regroup(loaded, 1).config.n_kv_head == 1


# Bad input


@pytest.mark.parametrize("n_kv_head", [0, 3, 5, 8, -1])
def test_impossible_numbers_of_heads_are_refused(n_kv_head: int) -> None:
    with pytest.raises(GptlabError, match=rf"cannot be given {n_kv_head} key/value heads; possible: 1, 2, 4$"):
        regroup(noisy(), n_kv_head)


def test_more_heads_than_there_are_is_refused() -> None:
    with pytest.raises(GptlabError, match=r"cannot be given 4 key/value heads; possible: 1, 2$"):
        regroup(noisy(n_kv_head=2), 4)


def test_svd_of_turned_keys_is_refused() -> None:
    with pytest.raises(GptlabError, match=r"rotary positions do not allow; use 'procrustes'"):
        regroup(noisy(position="rope"), 2, method="svd")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(GptlabError, match=r"got 'means' \(did you mean 'mean'\?\)"):
        regroup(noisy(), 2, method="means")  # type: ignore[arg-type]
    with pytest.raises(GptlabError, match=r"got 'fited' \(did you mean 'fitted'\?\)"):
        regroup(noisy(), 2, grouping="fited")  # type: ignore[arg-type]


def test_statistics_of_another_model_are_refused() -> None:
    model = noisy()
    other = noisy(n_layer=3)
    with pytest.raises(GptlabError, match="of another model"):
        regroup(model, 2, statistics=collect_statistics(other, random_ids(other)))


# The heads of OpenAI's 124M

REFERENCE = {  # layer: {n_kv_head: (QK, OV)} of mean, procrustes and svd, neighbours sharing, from the weights alone
    5: {
        6: {"mean": (0.477, 0.479), "procrustes": (0.249, 0.289), "svd": (0.164, 0.185)},
        4: {"mean": (0.640, 0.653), "procrustes": (0.390, 0.408), "svd": (0.256, 0.287)},
        1: {"mean": (0.906, 0.908), "procrustes": (0.624, 0.637), "svd": (0.438, 0.474)},
    },
}


def real_attention(shared: Path, *layers: int) -> GPT:
    """Attention and first norms of some layers of GPT-2 124M, one above the other, and next to nothing of the rest."""
    file = shared / "models" / "gpt2-attention" / "model.safetensors"
    if not file.exists():
        pytest.skip("../shared/models/gpt2-attention is absent")
    sizes = {"vocab_size": 1, "context_length": 1, "n_inner": 1}
    model = GPT(ModelConfig.preset("gpt2", n_layer=len(layers), **sizes))
    with safe_open(file, "pt") as real, torch.no_grad():
        for place, layer in enumerate(layers):
            for name, parameter in model.blocks[place].named_parameters():
                if name.startswith(("attn.", "ln_1.")):
                    tensor = real.get_tensor(f"h.{layer}.{name}")
                    parameter.copy_(tensor.T if tensor.ndim == 2 else tensor)  # Conv1D
    return model


def errors(model: GPT, n_kv_head: int, **how: Any) -> list[tuple[float, float]]:
    new = regroup(model, n_kv_head, **how)
    orders = group_heads(model, n_kv_head, grouping=how["grouping"])
    blocks = zip(permute_heads(model, orders).blocks, new.blocks, strict=True)
    return [circuit_errors(read_heads(a.attn), read_heads(b.attn), assumed_statistics(a)) for a, b in blocks]


@pytest.mark.parametrize("n_kv_head", [6, pytest.param(4, marks=pytest.mark.slow), 1])
def test_the_real_heads_lose_what_was_measured_before(shared: Path, n_kv_head: int) -> None:
    model = real_attention(shared, 5)
    for method, expected in REFERENCE[5][n_kv_head].items():
        lost = errors(model, n_kv_head, method=method, grouping="contiguous")
        assert lost[0] == pytest.approx(expected, abs=0.002), method
    if n_kv_head > 1:
        (qk, ov), (fitted_qk, fitted_ov) = lost[0], errors(model, n_kv_head, method="svd", grouping="fitted")[0]
        assert fitted_qk < 0.95 * qk
        assert fitted_ov < 0.95 * ov


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_head", [6, 4, 3, 2, 1])
def test_svd_is_best_on_every_real_layer(shared: Path, n_kv_head: int) -> None:
    model = real_attention(shared, *range(12))
    by_method = {
        method: errors(model, n_kv_head, method=method, grouping="contiguous")
        for method in ("svd", "procrustes", "mean", "first", "random")
    }
    fitted = errors(model, n_kv_head, method="svd", grouping="fitted")
    for layer in range(12):
        for circuit in (0, 1):
            svd, procrustes, mean, first, random = (by_method[method][layer][circuit] for method in by_method)
            assert svd < 0.9 * procrustes < procrustes < mean < random
            # In one place the first head beats the mean: values of the last layer, 0.585 against 0.652.
            assert mean < first or (procrustes < first and (n_kv_head, layer, circuit) == (3, 11, 1))
        assert sum(fitted[layer]) <= sum(by_method["svd"][layer]) + 1e-9
    everywhere = {method: sum(map(sum, layers)) for method, layers in by_method.items()}
    assert everywhere["mean"] < min(everywhere["first"], everywhere["random"])
    if n_kv_head == 4:
        assert by_method["svd"][11][1] <= 0.121 + 5e-4
        assert by_method["procrustes"][11][1] == pytest.approx(0.474, abs=0.0015)
        assert by_method["mean"][11][1] == pytest.approx(0.550, abs=0.0015)
