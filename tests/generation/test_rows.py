"""Texts that come and go against one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from helpers.models import lively, random_ids
from helpers.steps import HOW

from gptlab.evaluation.scoring import token_logprobs
from gptlab.generation import rows as module
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.rows import Prompt, Row, Rows
from gptlab.generation.sampling import Sampling
from gptlab.text.tokenizers import byte_tokenizer

WAYS = [
    Sampling(0.0),
    Sampling(1.0, top_k=40, seed=3),
    Sampling(0.7, top_p=0.9, seed=4, repetition_penalty=1.3),
    Sampling(0.0, repetition_penalty=1.2),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def begin() -> Continuation:
    return Continuation(byte_tokenizer(), stop=list("\0\n aeiouABCDE"))


@HOW
@pytest.mark.parametrize("switches", [{}, {"position": "rope", "n_kv_head": 2, "window": 9, "sinks": 2}], ids=str)
def test_rows_come_and_go_and_each_is_as_if_alone(switches, compiled):
    model = lively(vocab_size=257, **switches)
    ids = random_ids(257, 12, 30).tolist()
    waiting = [
        Row(Prompt(ids[i][: 5 + 2 * i]), begin(), WAYS[i % 4], i, 3 + 2 * i, top=i % 3 or None) for i in range(12)
    ]
    rows = Rows(model, vocab_size=257, never=[256], compiled=compiled)
    left, texts = waiting[7], {}
    left.grown = Continuation(byte_tokenizer(), ends=[])
    for row in waiting:
        rows.admit(row)
        if row is waiting[9]:
            rows.drop([left])
        for stepped, text in rows.step() if row.number % 2 else []:
            texts[stepped] = texts.get(stepped, "") + text
    while len(rows):
        for stepped, text in rows.step():
            texts[stepped] = texts.get(stepped, "") + text
    assert left.grown.finish is None
    for row in waiting:
        if row is left:
            continue
        alone, settings = begin(), {"max_new_tokens": row.max_new_tokens, "vocab_size": 257, "never": [256]}
        for _ in decode(
            model, [row.prompt.ids], [alone], sampling=row.sampling, streams=[row.number], compiled=compiled, **settings
        ):
            pass
        assert (row.grown.tokens, row.grown.text, row.grown.finish) == (alone.tokens, alone.text, alone.finish)
        assert texts[row] == alone.text
        assert len(row.scores) == (len(row.drawn) if row.top else 0)


@HOW
def test_scores_are_those_of_the_whole_text_at_once(compiled, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    model = lively(vocab_size=257, position="rope", window=11)
    ids = random_ids(257, 1, 29)[0].tolist()
    prompt = Prompt(ids, rows=2, top=3)
    pair = [Row(prompt, Continuation(byte_tokenizer(), ends=[]), Sampling(1.5, seed=1), i, 6, top=4) for i in range(2)]
    rows = Rows(model, vocab_size=257, never=[5, 256], compiled=compiled)
    for row in pair:
        rows.admit(row)
    while len(rows):
        rows.step()
    assert pair[0].drawn != pair[1].drawn
    for row in pair:
        whole = [*ids, *row.drawn]
        scores = [*prompt.scores, *row.scores]
        expected = token_logprobs(model, [whole])[0]
        torch.testing.assert_close(torch.tensor([s.logprob for s in scores]), expected, rtol=0, atol=1e-5)
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole]))[0, :-1].log_softmax(-1)
            logprobs[:, [5, 256]] = -torch.inf
        for place, score in enumerate(scores):
            best = logprobs[place].topk(3 if place < len(ids) - 1 else 4)
            assert [token for token, _ in score.top] == best.indices.tolist()
            assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_no_new_tokens_only_read_the_prompt():
    rows = Rows(lively(vocab_size=257), vocab_size=257, compiled=False)
    row = Row(Prompt([1, 2, 3], top=0), begin(), Sampling(), 0, 0)
    rows.admit(row)
    assert (row.grown.finish, len(rows), len(row.prompt.scores)) == ("length", 0, 2)


def test_without_the_compiled_step_a_step_is_one_forward_pass():
    model = lively(vocab_size=257, position="rope", window=9)
    rows = Rows(model, vocab_size=257, compiled=False)
    for i in range(5):
        rows.admit(Row(Prompt(list(range(1, 8 + 4 * i))), Continuation(byte_tokenizer(), ends=[]), Sampling(), i, 4))
    rows.step()  # by the logits of the prompts
    batches = []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(tuple(inputs[0].shape)))
    rows.step()
    rows.step()
    assert batches == [(5, 1), (5, 1)]
