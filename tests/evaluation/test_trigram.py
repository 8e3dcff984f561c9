"""The count trigram against a slow one written from the formula, and against what probabilities must be."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers.models import tiny_lm

from gptlab.errors import GptlabError
from gptlab.evaluation.compare import paired_difference
from gptlab.evaluation.tasks import evaluate, evaluate_trigram
from gptlab.evaluation.trigram import Trigram, count

VOCABULARY = 7


def rows(seed: int, n: int = 5, length: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.choices(range(VOCABULARY - 1), [30, 9, 5, 2, 1, 1])[0] for _ in range(length)] for _ in range(n)]


def by_the_formula(texts: list[list[int]], context: tuple[int, ...], token: int) -> float:
    """P(w | h) as the module's docstring has it, from dictionaries, one n-gram at a time."""
    n = len(context) + 1
    grams = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
    frequencies = Counter(grams.values())
    discount = frequencies[1] / (frequencies[1] + 2 * frequencies[2]) if frequencies[1] else 0.5
    after = {gram[-1]: c for gram, c in grams.items() if gram[:-1] == context}
    shorter = by_the_formula(texts, context[1:], token) if context else 1 / VOCABULARY
    if not after:
        return shorter
    total = sum(after.values())
    return (max(after.get(token, 0) - discount, 0) + discount * len(after) * shorter) / total


@pytest.mark.parametrize("seed", range(3))
def test_against_the_formula(seed: int) -> None:
    texts = rows(seed)
    trigram = count(texts, VOCABULARY)
    asked = [*rows(seed + 100, 1)[0], 6, 6, 0, 6]  # an id that was never seen, alone and after itself
    expected = [math.log(by_the_formula(texts, tuple(asked[max(i - 2, 0) : i]), w)) for i, w in enumerate(asked)][1:]
    assert trigram.logprobs(asked).tolist() == pytest.approx(expected, rel=1e-12)
    assert trigram.n_tokens == 300


def test_probabilities_add_up_to_one_after_every_context() -> None:
    trigram = count(rows(0), VOCABULARY)
    for u in range(VOCABULARY):
        for v in range(VOCABULARY):
            total = sum(math.exp(trigram.logprobs([u, v, w])[1]) for w in range(VOCABULARY))
            assert total == pytest.approx(1, abs=1e-12)
    assert sum(math.exp(trigram.logprobs([3, w])[0]) for w in range(VOCABULARY)) == pytest.approx(1, abs=1e-12)


def test_it_approaches_the_entropy_of_a_process_of_second_order() -> None:
    """Each token depends on the two before it; counts of enough of it come to its entropy, and no model below."""
    draw = np.random.default_rng(0)
    table = draw.dirichlet(np.full(5, 0.5), (5, 5))
    sums = table.cumsum(-1)

    def text(n: int) -> list[int]:
        ids = [0, 0]
        for x in draw.random(n).tolist():
            ids.append(min(int(np.searchsorted(sums[ids[-2], ids[-1]], x)), 4))
        return ids

    held_out = text(20_000)
    truth = -np.mean([math.log(table[u, v, w]) for u, v, w in zip(held_out, held_out[1:], held_out[2:], strict=False)])
    losses = [-count([text(n)], 5).logprobs(held_out)[1:].mean() for n in (200, 2000, 40_000)]
    assert losses[0] > losses[1] > losses[2] > truth - 0.005
    assert losses[2] == pytest.approx(truth, abs=0.01)


def test_no_gram_reaches_into_the_next_row() -> None:
    whole, cut = count([[0, 1, 2, 3]], 5), count([[0, 1], [2, 3], []], 5)
    assert [len(order.grams) for order in whole.orders] == [4, 3, 2]
    assert [len(order.grams) for order in cut.orders] == [4, 2, 0]
    assert whole.sha256 != cut.sha256
    assert np.isfinite(cut.logprobs([0, 1, 2, 3])).all()


def test_what_cannot_be_counted() -> None:
    for texts, size, said in (
        ([], 5, "no text to count"),
        ([[5]], 5, "ids from 5 to 5"),
        ([[0]], 3_000_000, "at most"),
    ):
        with pytest.raises(GptlabError, match=said):
            count(texts, size)
    with pytest.raises(GptlabError, match="do not fit a vocabulary"):
        count([[0, 1]], 2).logprobs([1, 2])


@pytest.mark.parametrize("documents", [3, 25])
def test_beside_a_model_on_the_same_units(documents: int, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>\n".join(f"the cat {i} sees the dog\n" for i in range(documents)))
    lm = tiny_lm()
    tokenizer = lm.needs_tokenizer()
    model = evaluate(lm.model, tokenizer, f"text:{path}")
    trigram: Trigram = count([tokenizer.encode("the cat sees the dog and the dog sees the cat")], tokenizer.vocab_size)
    result = evaluate_trigram(trigram, tokenizer, model)
    assert [(s.tokens, s.words, s.bytes) for s in result.scores] == [(s.tokens, s.words, s.bytes) for s in model.scores]
    assert result.data == model.data
    assert model.data["unit"] == ("document" if documents > 20 else "part of a document")
    start = [tokenizer.start_of_text] if tokenizer.start_of_text is not None else []
    ids = [start + tokenizer.encode(f"the cat {i} sees the dog\n") for i in range(documents)]
    total = -sum(trigram.logprobs(row).sum() for row in ids)
    assert sum(score.nats for score in result.scores) == pytest.approx(total)
    assert paired_difference(result, model).n_documents == documents
    with pytest.raises(GptlabError, match="on running text, not by wikitext:token"):
        evaluate_trigram(trigram, tokenizer, type(model)(**{**vars(model), "protocol": "wikitext:token"}))
