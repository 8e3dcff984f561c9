# Paired comparison: coverage on data whose truth is known, the usual formula, scipy, and what is refused.
from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from gptlab import GptlabError
from gptlab.evaluation import compare
from gptlab.evaluation.compare import paired_difference, resampled_ratios
from gptlab.evaluation.scoring import Result, Score


def result(nats: Any, tokens: Any, name: str = "a", correct: Any = None, **changes: Any) -> Result:
    answers = [None] * len(nats) if correct is None else correct
    scores = tuple(
        Score(float(n), int(t), 1, 1, None if c is None else int(c))
        for n, t, c in zip(nats, tokens, answers, strict=True)
    )
    made = Result(
        protocol="text:novel.txt",
        settings={"stride": 512, "context": 1024, "dtype": "float32", "limit": None},
        model={"name": name, "parameters": 1, "sha256": name},
        data={"name": "novel", "sha256": "text", "ids_sha256": "ids"},
        metrics={},
        scores=scores,
        seconds=1.0,
    )
    return dataclasses.replace(made, **changes)


TRUE = -0.02


def simulated(draw: np.random.Generator, n: int) -> tuple[Result, Result]:
    """Documents of very different lengths and difficulty; ``b`` is worse by 0.02 nats per token on average."""
    tokens = draw.integers(50, 500, n)
    difficulty = 3 + draw.exponential(1.0, n)
    gap = TRUE + draw.normal(0, 0.1, n)  # of this document
    return result(tokens * (difficulty + gap), tokens), result(tokens * difficulty, tokens, "b")


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    covered = []
    for i in range(400):
        difference = paired_difference(*simulated(draw, 60), seed=i, resamples=1000)
        assert difference.low < difference.mean < difference.high
        covered.append(difference.low <= TRUE <= difference.high)
    # 95% but for the percentile interval's known shortfall at 60 documents, and 3 standard errors of 400 trials.
    assert 0.905 <= np.mean(covered) <= 0.98


def test_documents_are_paired() -> None:
    a, b = simulated(np.random.default_rng(1), 200)
    difference = paired_difference(a, b)
    tokens = np.array([score.tokens for score in a.scores])
    gap = np.array([x.nats - y.nats for x, y in zip(a.scores, b.scores, strict=True)])
    assert difference.mean == pytest.approx(gap.sum() / tokens.sum(), rel=1e-12)
    assert difference.n_documents == 200
    # The delta method for a ratio of sums; the difficulty of documents, ten times as large, cancels.
    error = np.sqrt(np.sum((gap - difference.mean * tokens) ** 2)) / tokens.sum()
    assert difference.low == pytest.approx(difference.mean - 1.96 * error, abs=0.1 * error)
    assert difference.high == pytest.approx(difference.mean + 1.96 * error, abs=0.1 * error)


@pytest.mark.slow  # their import alone
def test_the_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    a, b = simulated(np.random.default_rng(2), 50)
    difference = paired_difference(a, b)
    gap = np.array([x.nats - y.nats for x, y in zip(a.scores, b.scores, strict=True)])
    tokens = np.array([score.tokens for score in a.scores])
    theirs = stats.bootstrap(
        (gap, tokens),
        lambda gap, tokens, axis: gap.sum(axis) / tokens.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert difference.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert difference.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_identical_models_differ_by_exactly_nothing() -> None:
    a, _ = simulated(np.random.default_rng(3), 30)
    difference = paired_difference(a, dataclasses.replace(a, model={"name": "again"}))
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_exchanging_the_models_turns_the_sign_and_the_seed_settles_the_rest() -> None:
    a, b = simulated(np.random.default_rng(4), 30)
    difference, other = paired_difference(a, b), paired_difference(b, a)
    assert other.mean == -difference.mean
    assert (other.low, other.high) == pytest.approx((-difference.high, -difference.low), abs=1e-12)
    assert paired_difference(a, b) == difference
    assert paired_difference(a, b, seed=1).low != difference.low


def test_many_documents_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, weights = np.arange(7.0), np.arange(1.0, 8.0)
    whole = resampled_ratios(sums, weights, 0, 100)
    monkeypatch.setattr(compare, "AT_ONCE", 21)
    pieces = resampled_ratios(sums, weights, 0, 100)
    assert np.array_equal(whole, pieces)
    assert len(np.unique(whole)) > 20
    monkeypatch.setattr(compare, "AT_ONCE", 3)  # fewer than one resample
    assert np.array_equal(resampled_ratios(sums, weights, 0, 100), whole)


def test_one_document_has_a_difference_but_no_interval() -> None:
    difference = paired_difference(result([30.0], [10]), result([20.0], [10], "b"))
    assert difference.mean == 1.0
    assert difference.n_documents == 1
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)
    assert str(difference) == (
        "+1.0000 nats per token (no interval: a single document cannot be resampled; use a text of several)"
    )


def test_documents_without_tokens_do_not_count() -> None:
    difference = paired_difference(result([30.0, 0.0], [10, 0]), result([20.0, 0.0], [10, 0], "b"))
    assert (difference.mean, difference.n_documents) == (1.0, 1)
    with pytest.raises(GptlabError, match="no token was scored"):
        paired_difference(result([0.0], [0]), result([0.0], [0], "b"))


def test_accuracy_is_compared_where_there_are_answers() -> None:
    draw = np.random.default_rng(5)
    right = draw.random((2, 400)) < [[0.5], [0.4]]
    a, b = (result(np.ones(400), np.full(400, 3), name, one) for name, one in zip("ab", right, strict=True))
    difference = paired_difference(a, b, measure="accuracy")
    gap = right[0].astype(float) - right[1]
    error = gap.std() / 20
    assert difference.mean == pytest.approx(gap.mean())
    assert difference.low == pytest.approx(gap.mean() - 1.96 * error, abs=0.1 * error)
    assert str(difference).startswith(f"{gap.mean():+.4f} accuracy (95% interval ")
    assert str(difference).endswith(", 400 documents or parts)")
    with pytest.raises(GptlabError, match="asks for no answers"):
        paired_difference(result([1.0], [1]), result([1.0], [1]), measure="accuracy")


A = result([30.0, 20.0], [10, 9], "one")


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"protocol": "wikitext:word"}, "text:novel.txt and wikitext:word are different protocols"),
        ({"settings": {**A.settings, "stride": 256}}, r"one and b were evaluated .* \(stride 512 and 256\)"),
        ({"settings": {**A.settings, "extra": 1}}, r"\(extra None and 1\)"),
        ({"data": {**A.data, "sha256": "x", "ids_sha256": "y"}}, "one and b were evaluated on different texts"),
        ({"data": {**A.data, "ids_sha256": "y"}}, "different tokenizers.*bits per byte"),
    ],
)
def test_unlike_results_are_refused_in_words(other: dict[str, Any], sentence: str) -> None:
    b = dataclasses.replace(A, model={"name": "b"}, **other)
    with pytest.raises(GptlabError, match=sentence):
        paired_difference(A, b)
    with pytest.raises(GptlabError):
        paired_difference(b, A)


def test_different_token_counts_and_wrong_arguments_are_refused() -> None:
    with pytest.raises(GptlabError, match="different numbers of tokens"):
        paired_difference(A, result([30.0, 20.0], [10, 8], "b"))
    with pytest.raises(GptlabError, match=r"one of nats_per_token, accuracy \(did you mean 'accuracy'\?\)"):
        paired_difference(A, A, measure="acuracy")  # type: ignore[arg-type]
    with pytest.raises(GptlabError, match="resamples must be at least 1"):
        paired_difference(A, A, resamples=0)


def test_the_dtype_may_differ() -> None:
    low = dataclasses.replace(A, settings={**A.settings, "dtype": "bfloat16"})
    assert paired_difference(A, low).mean == 0.0
