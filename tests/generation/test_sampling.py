import itertools
import math

import pytest
import torch

from gptlab.errors import GptlabError
from gptlab.generation.sampling import Sampling, choose, draw, penalised, probabilities

LAST_UNIFORM = math.nextafter(1.0, 0.0)  # the largest number below 1


def random_logits(seed, *shape, scale=4.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def judged(logits, temperature, top_k, top_p, min_p=None):
    """The same distribution by transformers' logits warpers, in the order of its `generate`."""
    transformers = pytest.importorskip("transformers")
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    if min_p is not None:
        scores = transformers.MinPLogitsWarper(min_p)(None, scores)
    return torch.softmax(scores, -1)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    list(itertools.product([0.1, 1.0, 2.5], [None, 1, 2, 40, 300, 9999], [None, 0.01, 0.3, 0.9, 0.999, 1.0])),
)
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = random_logits(int(temperature * 10), 8, 300)
    ours = probabilities(logits, Sampling(temperature, top_k, top_p))
    torch.testing.assert_close(ours, judged(logits, temperature, top_k, top_p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 0, 20])
@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("min_p", [0, 1e-3, 0.05, 0.5, 1.0])
def test_min_p_equals_transformers(temperature, top_k, top_p, min_p):
    logits = random_logits(9, 8, 300)
    ours = probabilities(logits, Sampling(temperature, top_k, top_p, min_p=min_p))
    torch.testing.assert_close(ours, judged(logits, temperature, top_k or None, top_p, min_p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 10.0])
def test_the_repetition_penalty_equals_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(10, 4, 50).float()
    logits[:, 3], logits[:, 4] = 0.0, -math.inf
    ids = torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(1))
    present = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    before, expected = logits.clone(), transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalised(logits, present, penalty), expected)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarse_logits_are_sampled_in_float64(dtype):
    # Coarse logits are full of equal values, and top-k keeps all that tie with the k-th, as transformers does.
    logits = random_logits(0, 8, 300).to(dtype)
    ours = probabilities(logits, Sampling(0.8, 40))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, judged(logits.double(), 0.8, 40, None), rtol=0, atol=1e-12)


def test_any_leading_shape():
    logits = random_logits(1, 3, 5, 50)
    sampling = Sampling(0.7, 10, 0.8)
    whole = probabilities(logits, sampling)
    assert whole.shape == logits.shape
    torch.testing.assert_close(whole[2, 3], probabilities(logits[2, 3], sampling), rtol=0, atol=1e-15)
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_logits_are_left_alone():
    logits = random_logits(2, 4, 50)
    before = logits.clone()
    for sampling in (Sampling(0), Sampling(0.5, 3, 0.5)):
        probabilities(logits, sampling)
        assert torch.equal(logits, before)


def test_top_k_keeps_the_ties_with_the_kth():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = probabilities(logits, Sampling(top_k=2)) > 0
    assert kept.tolist() == [[False, True, True, True, True, False]]


def test_top_p_keeps_the_token_that_crosses_p():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    # 0.5, then 0.75, 0.9 and 1 in all.
    for p, kept in {0.2: 1, 0.49: 1, 0.51: 2, 0.74: 2, 0.76: 3, 0.89: 3, 0.91: 4, 1.0: 4}.items():
        weights = probabilities(logits, Sampling(top_p=p))
        assert int((weights > 0).sum()) == kept, p
        best = torch.tensor([0.5, 0.25, 0.15, 0.1])[:kept].double()
        torch.testing.assert_close(weights.sort(descending=True).values[0, :kept], best / best.sum())


def test_top_p_comes_after_top_k_and_both_after_temperature():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two best, 0.4 / 0.7 = 0.57 of the probability: alone it reaches 0.55. Of all four it would not.
    assert probabilities(logits, Sampling(1.0, 2, 0.55)).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    # At temperature 0.5 the best has 0.16 / 0.30 = 0.53.
    assert int((probabilities(logits, Sampling(0.5, None, 0.5)) > 0).sum()) == 1


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-math.inf, -9.0, -8.0, -math.inf]])
    for sampling in (Sampling(0), Sampling(0, top_k=3, top_p=0.5), Sampling(0.0, seed=9)):
        weights = probabilities(logits, sampling)
        assert weights.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
        assert draw(weights, torch.tensor([0.0, LAST_UNIFORM], dtype=torch.float64)).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature):
    logits = random_logits(3, 8, 300, scale=1e4)
    assert torch.equal(probabilities(logits, Sampling(temperature)), probabilities(logits, Sampling(0)))


def test_a_huge_temperature_is_uniform():
    weights = probabilities(random_logits(4, 8, 300), Sampling(1.7e308))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 300), rtol=0, atol=1e-15)


def test_impossible_tokens_stay_impossible():
    logits = random_logits(5, 4, 100)
    logits[:, ::2] = -math.inf
    for sampling in (Sampling(), Sampling(1.5, 80, 0.99), Sampling(1e5)):
        weights = probabilities(logits, sampling)
        assert weights[:, ::2].eq(0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_draw_finds_the_interval_that_holds_the_number():
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    expected = {0.0: 1, 0.1: 1, 0.2499: 1, 0.25: 3, 0.5: 3, 0.7499: 3, 0.75: 4, 0.9: 4, LAST_UNIFORM: 4}
    uniforms = torch.tensor(list(expected), dtype=torch.float64)
    assert draw(weights.expand(len(expected), -1), uniforms).tolist() == list(expected.values())


@pytest.mark.parametrize("uniform", [0.0, 1e-320, 0.5, LAST_UNIFORM])
def test_draw_never_takes_a_token_without_probability(uniform):
    # Whatever the rounding of the sums: the last tokens of most of these rows have no probability.
    for seed in range(50):
        weights = probabilities(random_logits(seed, 40, 97), Sampling(1.0 + seed / 10, 2 + seed))
        chosen = draw(weights, torch.full((40,), uniform, dtype=torch.float64))
        assert weights.gather(1, chosen[:, None]).gt(0).all()


def test_draws_have_the_frequencies_of_the_distribution():
    weights = probabilities(random_logits(6, 1, 20, scale=1.5), Sampling(0.9, 12, 0.97))[0]
    n = 200_000
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    counts = torch.bincount(draw(weights.expand(n, -1), uniforms), minlength=20)
    deviation = (weights * (1 - weights) / n).sqrt()
    assert (counts / n - weights).abs().le(5 * deviation).all()
    assert counts[weights == 0].sum() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or a positive number, got -0.1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": -5}, "top_k must be a whole number, 0 to allow every token, got -5"),
        ({"top_k": 2.5}, "top_k must be"),
        ({"top_k": True}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0; leave it out"),
        ({"top_p": 1.0001}, "top_p must be"),
        ({"top_p": -1}, "top_p must be"),
        ({"top_p": math.nan}, "top_p must be"),
        ({"min_p": -0.1}, "min_p must be 0 to 1, 0 to allow every token, got -0.1"),
        ({"min_p": 1.01}, "min_p must be"),
        ({"min_p": math.nan}, "min_p must be"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, 1 for none, got 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be"),
        ({"repetition_penalty": "strong"}, "repetition_penalty must be above 0, 1 for none, got 'strong'"),
        ({"temperature": "hot"}, "temperature must be .* got 'hot'"),
        ({"seed": -1}, "seed must be a whole number of at least 0 and below 2..63, got -1"),
        ({"seed": 1.5}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
    ],
)
def test_absurd_values_are_refused(values, message):
    with pytest.raises(GptlabError, match=message):
        Sampling(**values)


def test_the_extremes_that_are_allowed():
    assert Sampling(0, 1, 1.0, 2**63 - 1) == Sampling(temperature=0, top_k=1, top_p=1, seed=2**63 - 1)


@pytest.mark.parametrize("top_k", [None, 1, 2, 40, 299, 300])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.7, 0.95])
@pytest.mark.parametrize("min_p", [None, 0.1])
@pytest.mark.parametrize("scale", [0.5, 4.0, 0.0, 1.0])
def test_choosing_among_candidates_is_drawing_from_all(top_k, top_p, min_p, scale, monkeypatch):
    monkeypatch.setattr("gptlab.generation.sampling.CANDIDATES", 30)
    logits = random_logits(3, 200, 300, scale=scale).float()
    if scale == 1:
        logits = logits.round()  # most tie
        logits[::2, 10:] = -math.inf
    uniforms = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (0, 0.7, 1.0):
        sampling = Sampling(temperature, top_k, top_p, min_p=min_p)
        assert torch.equal(choose(logits, sampling, uniforms), draw(probabilities(logits, sampling), uniforms))
