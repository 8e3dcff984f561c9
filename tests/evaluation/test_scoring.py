# Log-probabilities against `transformers`, and against the plain logits of our own models where it has no such model.
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.models import close
from helpers.theirs import by_windows, one_by_one, random_ids, small, theirs

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.evaluation import batches
from gptlab.evaluation.scoring import Completion, completion_logprobs, token_logprobs
from gptlab.model import kernels
from gptlab.text.tokenizers import GPT2Tokenizer

CONTEXT = 16  # of the small model
LENGTHS = [1, 2, 9, 16, 17, 18, 45, 3]


@pytest.fixture(scope="module")
def model() -> GPT:
    return small(context_length=CONTEXT)


@pytest.fixture(scope="module")
def judge(model: GPT) -> transformers.GPT2LMHeadModel:
    return theirs(model)


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    return [random_ids(n, seed) for seed, n in enumerate(LENGTHS)]


# --- tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 8, 5, 1])
def test_every_token_against_a_pass_of_its_own(
    model: GPT, judge: transformers.GPT2LMHeadModel, sequences: list[list[int]], stride: int | None
) -> None:
    logprobs = token_logprobs(model, sequences, stride=stride, batch_tokens=50)
    assert [len(f) for f in logprobs] == [n - 1 for n in LENGTHS]
    for f, ids in zip(logprobs, sequences, strict=True):
        if len(ids) > 1:
            close(f, one_by_one(judge, ids, CONTEXT, stride or CONTEXT))
    assert all(f.dtype == torch.float32 for f in logprobs)


def test_a_shorter_window(model: GPT, judge: transformers.GPT2LMHeadModel) -> None:
    ids = random_ids(30)
    close(token_logprobs(model, [ids], context=7, stride=5)[0], one_by_one(judge, ids, 7, 5))


@pytest.mark.parametrize("n", [10, 17, 18, 25, 32, 33, 34, 50])
def test_the_last_window_may_be_full(model: GPT, judge: transformers.GPT2LMHeadModel, n: int) -> None:
    ids = random_ids(n)
    logprobs = token_logprobs(model, [ids], full_last=True)[0]
    # Windows from the start, one after the other; what is left is read with as much context as there is.
    cut = (n - 1) // CONTEXT * CONTEXT
    if n > CONTEXT:
        close(logprobs[:cut], one_by_one(judge, ids[: cut + 1], CONTEXT, CONTEXT))
    begin = max(0, n - 1 - CONTEXT)
    rest = one_by_one(judge, ids[begin:], CONTEXT, CONTEXT)
    close(logprobs[cut:], rest[cut - begin :])


@pytest.mark.parametrize("batch_tokens", [1, 16, 33, 100_000])
def test_batches_change_nothing(model: GPT, sequences: list[list[int]], batch_tokens: int) -> None:
    alone = [token_logprobs(model, [ids])[0] for ids in sequences]
    for actual, expected in zip(token_logprobs(model, sequences, batch_tokens=batch_tokens), alone, strict=True):
        close(actual, expected)


def test_a_batch_holds_no_more_tokens_than_asked(model: GPT, sequences: list[list[int]]) -> None:
    shapes = []
    with model.register_forward_pre_hook(lambda _, ids: shapes.append(tuple(ids[0].shape))):
        token_logprobs(model, sequences, batch_tokens=33)
    assert all(b * t <= 33 for b, t in shapes)
    assert shapes[0] == (2, 16)  # the longest first
    assert len(shapes) < len(sequences)


def test_no_more_than_a_few_rows_of_logits_at_once(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "HEAD_ROWS", 7)
    seen = []
    linear = batches.F.linear

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(weight) == model.config.vocab_size:
            seen.append(tuple(x.shape[:-1]))
        return linear(x, weight, *rest)

    monkeypatch.setattr(batches.F, "linear", spy)
    ids = random_ids(CONTEXT + 1)
    actual = token_logprobs(model, [ids])[0]
    assert seen == [(7,), (7,), (2,)]
    close(actual, torch.log_softmax(model(torch.tensor([ids[:-1]]))[0], -1)[range(CONTEXT), ids[1:]].detach())


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"window": 9}, {"window": [9, 20], "sinks": 2}])
def test_beyond_the_trained_length(changes: dict[str, object]) -> None:
    model = small(position="rope", **changes)
    ids = random_ids(400)
    actual = token_logprobs(model, [ids, ids[:350]], context=400)
    with torch.no_grad(), kernels.use("reference"):
        expected = torch.log_softmax(model(torch.tensor([ids]))[0, :-1], -1)[range(399), ids[1:]]
    close(actual[0], expected)
    close(actual[1], expected[:349])


def test_arrays_are_ids_too(model: GPT) -> None:
    ids = random_ids(12)
    for kind in (np.int64, np.uint16, np.int32):
        assert torch.equal(token_logprobs(model, [np.array(ids, dtype=kind)])[0], token_logprobs(model, [ids])[0])


def test_bfloat16_rounds_the_blocks_and_not_the_logits() -> None:
    # Logits of -100 as GPT-2 has them: in bfloat16 their steps are 0.5, and a loss would be off by as much.
    model = small(tie_embeddings=False)
    with torch.no_grad():
        model.ln_f.bias[0] = 10.0
        model.lm_head.weight[:, 0] = -10.0
    ids = random_ids(60)
    exact = token_logprobs(model, [ids])[0]
    rounded = token_logprobs(model, [ids], dtype="bfloat16")[0]
    assert model(torch.tensor([ids])).max() < -50
    assert 0 < (rounded - exact).abs().max() < 0.15
    assert abs((rounded - exact).mean()) < 0.02
    loaded_so = small(tie_embeddings=False).to(torch.bfloat16)
    loaded_so.load_state_dict(model.state_dict())
    assert torch.equal(token_logprobs(loaded_so, [ids], dtype="bfloat16")[0], rounded)


def test_the_model_is_left_as_it_was() -> None:
    model = small(dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = random_ids(30)
    first, second = token_logprobs(model, [ids]), token_logprobs(model, [ids])
    assert torch.equal(first[0], second[0])  # no dropout
    token_logprobs(model, [ids], dtype="bfloat16")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_progress_ends_at_the_total(model: GPT, sequences: list[list[int]]) -> None:
    told: list[tuple[int, int]] = []
    token_logprobs(model, sequences, batch_tokens=16, progress=lambda done, total: told.append((done, total)))
    total = sum(n - 1 for n in LENGTHS)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


# --- completions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_completion(judge: transformers.GPT2LMHeadModel, before: list[int], after: list[int]) -> Completion:
    ids = (before + after)[-CONTEXT - 1 :]
    logprobs = torch.log_softmax(judge(torch.tensor([ids[:-1]])).logits[0, -len(after) :], -1)
    return Completion(logprobs[range(len(after)), after], logprobs.argmax(-1), torch.tensor(after))


def test_completions(model: GPT, judge: transformers.GPT2LMHeadModel) -> None:
    pairs = [(random_ids(n, n), random_ids(m, 99 + m)) for n, m in [(1, 1), (9, 4), (15, 1), (20, 16), (5, 2)]]
    for before, _ in list(pairs):  # and some that greedy decoding does produce
        likeliest = judge(torch.tensor([before[-CONTEXT:]])).logits[0, -1].argmax().item()
        pairs.append((before[-CONTEXT:], [int(likeliest)]))
    completions = completion_logprobs(model, pairs, batch_tokens=30)
    for (before, after), completion in zip(pairs, completions, strict=True):
        expected = expected_completion(judge, before, after)
        close(completion.logprobs, expected.logprobs)
        assert torch.equal(completion.best, expected.best)
        assert torch.equal(completion.ids, expected.ids)
    assert [completion.greedy for completion in completions] == [False] * 5 + [True] * 5


def test_tokens_that_are_never_the_best(model: GPT) -> None:
    pair = (random_ids(10), random_ids(3))
    free = completion_logprobs(model, [pair])[0]
    never = torch.zeros(257, dtype=torch.bool)
    never[free.best] = True
    held = completion_logprobs(model, [pair], never=never)[0]
    assert torch.equal(held.logprobs, free.logprobs)
    logits = model(torch.tensor([pair[0] + pair[1][:-1]]))[0, -3:]
    second = logits.masked_fill(never, -torch.inf).argmax(-1)
    assert torch.equal(held.best, second)


# --- what cannot be scored ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sequences": [[]]}, "empty"),
        ({"sequences": [[1, 257]]}, "the model has 257"),
        ({"sequences": [[1, -1]]}, "from -1"),
        ({"stride": 0}, "stride must be 1 to 16"),
        ({"stride": 17}, "stride must be 1 to 16"),
        ({"stride": 11, "context": 10}, "stride must be 1 to 10"),
        ({"context": 17}, "exceeds the 16 learned positions"),
        ({"context": 0}, "context must be at least 1"),
        ({"dtype": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_refused(model: GPT, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(GptlabError, match=words):
        token_logprobs(model, **{"sequences": [[1, 2, 3]], **arguments})


@pytest.mark.parametrize(
    ("pair", "words"), [(([], [1]), "context"), (([1], []), "continuation"), (([1], [1] * 17), "17 tokens")]
)
def test_completions_refused(model: GPT, pair: tuple[list[int], list[int]], words: str) -> None:
    with pytest.raises(GptlabError, match=words):
        completion_logprobs(model, [pair])


# --- at GPT-2's size ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> tuple[GPT, transformers.GPT2LMHeadModel]:
    model = GPT(ModelConfig.preset("gpt2"), seed=1).eval()
    with torch.no_grad():  # loss well away from ln V, so that an error shows
        model.wte.weight.mul_(3)
    return model, theirs(model)


def five_digits(logprobs: torch.Tensor) -> str:
    return f"{torch.exp(-logprobs.double().mean()).item():.4e}"


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1024, 512])
def test_wikitext_at_124m(full: tuple[GPT, transformers.GPT2LMHeadModel], shared: Path, stride: int) -> None:
    text = (shared / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    ids = GPT2Tokenizer().encode(text[:12_000])[:2600]
    assert len(ids) == 2600
    actual, expected = token_logprobs(full[0], [ids], stride=stride)[0], by_windows(full[1], ids, 1024, stride)
    close(actual, expected, 1e-4)
    assert five_digits(actual) == five_digits(expected)


@pytest.mark.slow
def test_lambada_at_124m(full: tuple[GPT, transformers.GPT2LMHeadModel], shared: Path) -> None:
    lines = (shared / "data" / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    passages = GPT2Tokenizer().encode_batch([json.loads(line)["text"] for line in lines])
    actual = token_logprobs(full[0], passages)
    expected = [by_windows(full[1], ids, 1024, 1024) for ids in passages]
    for ours, its in zip(actual, expected, strict=True):
        close(ours, its, 1e-4)
    assert five_digits(torch.cat(actual)) == five_digits(torch.cat(expected))
    asked = completion_logprobs(full[0], [(ids[:-2], ids[-2:]) for ids in passages])
    for completion, its in zip(asked, expected, strict=True):
        close(completion.logprobs, its[-2:], 1e-4)
