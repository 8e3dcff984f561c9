"""Runs on items, as makemore's names: what is new is counted against a plain count."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from helpers.trainings import RECIPE, make_dataset, small

import gptlab
from gptlab.text.shards import Dataset
from gptlab.training.loop import train
from gptlab.training.novelty import novelty

ITEMS = RECIPE.replace('kind = "bytes"', 'kind = "chars"\n\n[data]\nitems = true').replace(
    "context_length = 32", "context_length = 8"
)


def words_dataset(out: Path) -> Dataset:
    """Half of the words of up to three vowels with an x behind each."""
    words = ["".join(f"{c}x" for c in w) for n in (1, 2, 3) for w in itertools.product("aeiou", repeat=n)]
    return make_dataset(out, words[::2], "chars", items=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return words_dataset(tmp_path_factory.mktemp("words") / "data")


def decoded(data: Dataset, part: str) -> set[str]:
    split = getattr(data, part)
    text = data.tokenizer.decode(split.read(0, split.n_tokens).tolist())
    return set(text.split("<|endoftext|>")[1:-1])


def test_what_is_new_is_counted(words: Dataset, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    result = train(small("budget.steps=60", text=ITEMS), words, tmp_path / "run", report=rows.append)
    figures = novelty(result.language_model, words, 200, seed=0)
    assert figures.items() <= result.metrics.items()
    assert figures.items() <= rows[-1].items()
    again = result.language_model.new_continuations(200)
    from gptlab.generation.sampling import Sampling

    for _ in result.language_model.continue_all([None] * 200, again, Sampling(1.0, None, None, 0), 7):
        pass
    samples = [continuation.text for continuation in again]
    assert figures["samples"] == samples[:20]
    known, held = decoded(words, "training"), decoded(words, "validation")
    assert known
    assert held
    assert figures["sampled"] == 200
    assert figures["new_share"] == sum(s not in known for s in samples) / 200
    assert figures["in_validation_share"] == sum(s in held for s in samples) / 200
    assert 0 < figures["new_share"] < 1
    # It learned what a word is: pairs of a vowel and an x. Untrained, hardly a sample is.
    assert sum(set(s[::2]) <= set("aeiou") and set(s[1::2]) == {"x"} for s in samples) > 100


def test_a_model_that_knows_one_item_only_invents_nothing(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", ["xx"] * 40 + ["xxxx"], "chars", items=True)
    result = train(small("budget.steps=80", "data.held_out=0.1", text=ITEMS), data, tmp_path / "run")
    kept = decoded(data, "training")
    assert len(kept) == 1
    expected = sum(s in kept for s in result.metrics["samples"])
    assert expected >= 18
    assert result.metrics["new_share"] < 0.1


def test_data_that_are_no_items(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(gptlab.GptlabError, match=r"is not a list of items; prepare it with gptlab prepare --per-line"):
        train(small(text=ITEMS), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
