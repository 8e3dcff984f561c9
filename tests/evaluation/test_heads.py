# Head diagnostics against the formulas on maps whose answers are known, and on GPT-2's own key projections.
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.models import noisy
from safetensors import safe_open
from torch import Tensor

from gptlab import GPT, ModelConfig
from gptlab.evaluation import heads


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def uniform(n: int) -> Tensor:
    return torch.ones(n, n).tril() / torch.arange(1.0, n + 1)[:, None]


def looking_back(n: int, by: int) -> Tensor:
    """One-hot: each token looks at the one ``by`` before it, and as far as there is one."""
    return torch.eye(n)[(torch.arange(n) - by).clamp(min=0)]


@pytest.fixture
def maps() -> Tensor:
    """(1, 3, 7, 7): everything alike, the token itself, the token before."""
    return torch.stack([uniform(7), looking_back(7, 0), looking_back(7, 1)])[None]


def random_maps(n_head: int = 4, n: int = 9, batch: int = 2) -> Tensor:
    scores = torch.randn(batch, n_head, n, n, generator=torch.Generator().manual_seed(0)) * 3
    return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def test_entropy_of_uniform_and_of_one_hot_attention(maps: Tensor) -> None:
    entropy = heads.entropy(maps)
    close(entropy[0, 0], torch.arange(1.0, 8).log())
    close(entropy[0, 1:], torch.zeros(2, 7))


def test_distance_of_uniform_and_of_one_hot_attention(maps: Tensor) -> None:
    distance = heads.distance(maps)
    places = torch.arange(7.0)
    close(distance[0], torch.stack([places / 2, torch.zeros(7), places.clamp(max=1)]))


def test_divergence_is_zero_for_equal_maps_and_log_2_for_disjoint_ones(maps: Tensor) -> None:
    apart = maps[:, :, 1:]  # the first token can only look at itself
    divergence = heads.divergence(apart)
    close(divergence.diagonal(), torch.zeros(3))
    assert divergence[1, 2].item() == pytest.approx(math.log(2), abs=1e-6)
    close(heads.divergence(apart[:, [1, 1]]), torch.zeros(2, 2))


def test_divergence_is_the_mean_of_two_kullback_leibler_divergences() -> None:
    maps = random_maps().double()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for h in range(4):
        for g in range(4):
            mixture = (maps[:, h] + maps[:, g]) / 2
            for one in (maps[:, h], maps[:, g]):
                terms = torch.where(one > 0, one * (one / mixture).log(), 0.0)
                expected[h, g] += terms.sum(-1).mean() / 2
    close(heads.divergence(maps), expected, 1e-12)


def turned(keys: Tensor) -> Tensor:
    """The same subspace in another basis: what the queries of a head can undo."""
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(len(keys), len(keys), generator=generator, dtype=keys.dtype)).Q
    return 3 * rotation @ keys


def test_cosines_of_subspaces_that_are_equal_orthogonal_and_at_a_known_angle() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    angle = 0.3
    tilted = torch.stack([axes[0], math.cos(angle) * axes[1] + math.sin(angle) * axes[2]])
    keys = torch.stack([axes[:2], turned(axes[:2]), axes[4:], tilted])
    cosines = heads.key_cosines(keys)
    assert cosines.shape == (4, 4, 2)
    close(cosines[0, 1], torch.ones(2, dtype=torch.float64), 1e-12)
    close(cosines[0, 2], torch.zeros(2, dtype=torch.float64), 1e-12)
    close(cosines[1, 3], torch.tensor([1.0, math.cos(angle)], dtype=torch.float64), 1e-12)
    close(cosines, cosines.transpose(0, 1), 1e-12)


def test_cosines_are_those_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy is not installed")
    keys = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cosines = heads.key_cosines(keys)
    for h in range(3):
        for g in range(3):
            angles = torch.from_numpy(linalg.subspace_angles(keys[h].T.numpy(), keys[g].T.numpy()))
            close(cosines[h, g], angles.cos().sort(descending=True).values, 1e-12)


def test_similarity_is_the_linear_cka_of_the_keys_themselves() -> None:
    generator = torch.Generator().manual_seed(3)
    read = torch.randn(50, 8, dtype=torch.float64, generator=generator) @ torch.diag(torch.arange(1.0, 9).double())
    read = read - read.mean(0)
    weights = torch.randn(3, 4, 8, dtype=torch.float64, generator=generator)
    made = read @ weights.mT  # (H, N, D): the keys of each head
    gram = made @ made.mT  # (H, N, N); Kornblith's first form, on the examples
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for h in range(3):
        for g in range(3):
            expected[h, g] = (gram[h] * gram[g]).sum() / (gram[h].norm() * gram[g].norm())
    close(heads.key_similarity(weights, read.T @ read), expected, 1e-12)
    whitened = heads.key_similarity(weights, torch.eye(8, dtype=torch.float64))
    close(heads.key_similarity(weights), whitened, 1e-12)


def test_similarity_does_not_see_what_the_queries_can_undo() -> None:
    keys = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    similarity = heads.key_similarity(torch.stack([keys[0], turned(keys[0]), keys[1]]))
    close(similarity[0], similarity[1], 1e-12)
    assert similarity[0, 1].item() == pytest.approx(1.0)
    assert similarity[0, 2] < 0.9


def test_key_weights_are_what_the_model_multiplies() -> None:
    model = noisy(noise=0.3, n_kv_head=2)
    block = model.blocks[1]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        _, keys, _, _ = block.attn.project(block.ln_1(x), None)  # (1, 2, 5, 8)
        normal = torch.nn.functional.layer_norm(x, (32,))
        products = normal[0] @ heads.key_weights(model, 1).mT  # (2, 5, 8)
    # All but the same addition to every key.
    close(products - products[:, :1], keys[0] - keys[0][:, :1], 1e-4)


def test_diagnosis_of_a_model_is_the_formulas_on_its_maps() -> None:
    model = noisy(noise=0.3, n_kv_head=2, window=5, position="rope")
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(6))
    layers = heads.diagnose(model, ids)
    assert len(layers) == 2
    places = torch.arange(12.0)
    for layer, one in enumerate(layers):
        maps = model.attention_maps(ids, layer)
        surprise = torch.where(maps > 0, -maps.log(), 0.0)
        close(one.entropy, (maps * surprise).sum(-1).mean((0, 2)), 1e-5)
        close(one.distance, (maps * (places[:, None] - places)).sum(-1).mean((0, 2)), 1e-5)
        close(one.divergence, heads.divergence(maps), 1e-5)
        assert one.distance.max() < 5
        assert one.divergence.shape == (4, 4)
        assert one.key_similarity.shape == one.key_overlap.shape == (2, 2)


@pytest.mark.parametrize("layer", [0, 5])
def test_keys_of_the_real_gpt2(shared: Path, layer: int) -> None:
    file = shared / "models" / "gpt2-attention" / "model.safetensors"
    if not file.exists():
        pytest.skip("../shared/models/gpt2-attention is absent")
    model = GPT(ModelConfig.preset("gpt2", n_layer=1, vocab_size=1))
    with safe_open(file, "pt") as real, torch.no_grad():
        norm = real.get_tensor(f"h.{layer}.ln_1.weight")
        projection = real.get_tensor(f"h.{layer}.attn.c_attn.weight")  # (768, 3 * 768): Conv1D
        model.blocks[0].ln_1.weight.copy_(norm)
        model.blocks[0].attn.c_attn.weight.copy_(projection.T)
    keys = heads.key_weights(model, 0)
    close(keys[7], (norm[:, None] * projection[:, 768 + 7 * 64 : 768 + 8 * 64]).T)
    cosines, similarity = heads.key_cosines(keys), heads.key_similarity(keys)
    overlap = cosines.square().mean(-1)
    assert cosines.shape == (12, 12, 64)
    for matrix in (similarity, overlap):
        close(matrix, matrix.T, 1e-5)
        close(matrix.diagonal(), torch.ones(12), 1e-5)
        assert matrix.min() >= 0
        assert matrix.max() <= 1 + 1e-5
    # Heads of one layer read the same stream: they share more than random subspaces do, and far from everything.
    assert 64 / 768 < overlap[torch.ones(12, 12).triu(1).bool()].mean().item() < 0.5
