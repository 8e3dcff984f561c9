"""Continuous batching against one text at a time."""

import itertools
import resource
import weakref

import pytest
import torch
from helpers.models import lively
from helpers.steps import HOW, needs_step

from gptlab.errors import GptlabError
from gptlab.generation import batch, rows
from gptlab.generation.batch import complete, plan
from gptlab.generation.continuation import Continuation
from gptlab.generation.engine import decode
from gptlab.generation.sampling import Sampling
from gptlab.text.tokenizers import byte_tokenizer

RAGGED = [1, 60, 7, 33, 2, 64, 20, 5, 5, 48, 63, 11, 3, 1, 29, 40, 17, 9]
VARIED = Sampling(1.0, top_k=40, top_p=0.99, seed=7, repetition_penalty=1.1)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def prompts_of(lengths, vocab_size=257, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {i: torch.randint(vocab_size, (n,), generator=draw).tolist() for i, n in enumerate(lengths)}


def begin():
    return Continuation(byte_tokenizer(), stop=list("\0\n aeiouABCDE"))  # some texts are short


def answers(model, prompts, sampling=VARIED, n=20, **settings):
    """Texts by number, in the order in which they were done."""
    settings = {"vocab_size": 257, "never": [256], "sampling": sampling, "max_new_tokens": n} | settings
    found = list(complete(model, prompts, begin, **settings))
    assert len({number for number, _ in found}) == len(found)
    return {number: (grown.tokens, grown.text, grown.finish) for number, grown in found}


def one_at_a_time(model, prompts, sampling=VARIED, n=20, compiled=True):
    found = {}
    for number, prompt in prompts.items():
        grown = begin()
        settings = {"sampling": sampling, "max_new_tokens": n, "vocab_size": 257, "never": [256]}
        for _ in decode(model, [prompt], [grown], streams=[number], compiled=compiled, **settings):
            pass
        found[number] = grown.tokens, grown.text, grown.finish
    return found


@HOW
@pytest.mark.parametrize("switches", [{}, {"position": "rope", "n_kv_head": 2, "window": 9, "sinks": 2}], ids=str)
def test_texts_are_those_of_one_prompt_at_a_time(switches, compiled):
    model = lively(vocab_size=257, **switches)
    prompts = prompts_of(RAGGED)
    alone = one_at_a_time(model, prompts, compiled=compiled)
    assert len({len(tokens) for tokens, _, _ in alone.values()}) > 5
    if model.config.has_table:
        assert {finish for _, _, finish in alone.values()} == {"stop", "length", "context"}
    for slots in (1, 4, 32):
        assert answers(model, prompts, compiled=compiled, slots=slots) == alone
    backwards = dict(reversed(prompts.items()))
    assert answers(model, backwards, compiled=compiled, slots=3) == alone


@HOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_done_is_left_out_and_the_rest_comes_out_the_same(dtype, compiled):
    model = lively(vocab_size=257, position="rope").to(dtype)
    prompts = prompts_of(RAGGED)
    whole = answers(model, prompts, compiled=compiled, slots=4)
    for done in ([], list(whole)[:1], list(whole)[:7], list(whole)[3:], list(whole)):
        rest = answers(model, prompts, compiled=compiled, slots=4, done=done)
        assert rest == {number: text for number, text in whole.items() if number not in done}


@needs_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_changes_no_bit_of_what_is_drawn(dtype):
    model = lively(vocab_size=257, position="rope").to(dtype)
    prompts = prompts_of(RAGGED)
    alone = one_at_a_time(model, prompts)
    assert answers(model, prompts, compiled=True, slots=5) == alone
    assert answers(model, {n: prompts[n] for n in (9, 2)}, compiled=True) == {n: alone[n] for n in (9, 2)}


@needs_step
def test_a_text_that_is_done_gives_its_place_to_the_next_at_once():
    model = lively(vocab_size=257, position="rope")
    counts = [0]
    found = answers(model, prompts_of(RAGGED), compiled=True, slots=4, report=lambda row: counts.append(row["tokens"]))
    rows = [after - before for before, after in itertools.pairwise(counts)]
    busy = len(rows) - rows[::-1].index(4)
    assert rows == [4] * busy + sorted(rows[busy:], reverse=True)
    assert len(rows) - busy <= 20
    assert len({len(tokens) for tokens, _, _ in found.values()}) > 5


@needs_step
def test_the_caches_of_texts_that_are_done_are_let_go(monkeypatch):
    alive, most = weakref.WeakSet(), []
    read_prompt = rows.read_prompt

    def watched(*arguments, **options):
        text, after = read_prompt(*arguments, **options)
        alive.add(text)
        most.append(len(alive))
        return text, after

    monkeypatch.setattr(rows, "read_prompt", watched)
    answers(lively(vocab_size=257, position="rope"), prompts_of(RAGGED), compiled=True, slots=3)
    assert len(most) == len(RAGGED)
    assert max(most) <= 4  # one of those before is still in the hands of the loop


def deviation(counts, weights):
    """How many standard deviations counts (S, V) are off the distributions (S, V): chi-square, Wilson-Hilferty."""
    expected = counts.sum(-1, keepdim=True) * weights
    assert expected.min() > 5
    statistic, freedom = ((counts - expected) ** 2 / expected).sum().item(), counts.shape[0] * (counts.shape[1] - 1)
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5


@HOW
def test_100000_draws_follow_the_models_distribution(compiled):
    # Attention is silent and there are no positions: what follows depends on the token before alone.
    model = lively(vocab_size=13, n_layer=1, position="none")
    with torch.no_grad():
        for parameter in model.h[0].attn.c_proj.parameters():
            parameter.zero_()
    n_draws, n_texts = 100_000 if compiled else 20_000, 64
    counts = torch.zeros(13, 13, dtype=torch.float64)
    settings = {"vocab_size": 13, "sampling": Sampling(2.0, seed=1), "max_new_tokens": n_draws // n_texts + 1}
    start = {i: [i % 13] for i in range(n_texts)}
    found = complete(
        model, start, lambda: Continuation(byte_tokenizer(), ends=()), slots=64, compiled=compiled, **settings
    )
    for number, grown in found:
        ids = torch.tensor([number % 13, *grown.tokens])
        counts.index_put_((ids[:-1], ids[1:]), torch.ones((), dtype=torch.float64), accumulate=True)
    assert counts.sum() >= n_draws
    with torch.no_grad():
        logits = model(torch.arange(13)[:, None])[:, 0].double()
    assert abs(deviation(counts, torch.softmax(logits / 2, -1))) < 4
    assert deviation(counts, torch.softmax(logits / 2.5, -1)) > 4  # a slightly other distribution is told apart


def test_a_prompt_that_cannot_be_continued_is_refused_before_any_is():
    model = lively(vocab_size=257)
    for bad, said in (([], "is empty"), ([1] * 65, "has 65 tokens"), ([257], "has the id 257")):
        with pytest.raises(GptlabError, match=said):
            answers(model, {0: [1], 1: bad})


@pytest.mark.parametrize(
    ("free", "slots", "expected"),
    [(None, None, 32), (10**12, None, 32), (10**6, None, 6), (100_000, None, 1), (10**12, 900, 900), (10**6, 13, 13)],
)
def test_as_many_texts_as_fit_into_half_of_the_memory(free, slots, expected, monkeypatch):
    # 64 tokens: 2 layers x 2 x 64 x 64 x 4 bytes; besides, the logits of 257 tokens, three times in 8 bytes.
    model, prompts = lively(vocab_size=257, n_layer=2, n_embd=64, n_head=4), {i: [1, 2, 3, 4] for i in range(1000)}
    monkeypatch.setattr(batch, "available_memory", lambda device: free)
    made = plan(model, prompts, 500, slots)
    assert made.text_bytes == 65_536
    assert (made.slots, made.length) == (expected, 64)


@pytest.mark.parametrize(
    ("free", "slots", "said"),
    [
        (
            60_000,
            None,
            "1 text at a time takes 70.0 KiB when the longest has 64 tokens, and 58.6 KiB are free; ask for",
        ),
        (10**6, 20, "20 texts at a time take 1.37 MiB .* free; take at most 13 at a time, or ask for fewer new tokens"),
        (10**9, 0, "the batch size must be at least 1, got 0"),
    ],
)
def test_what_cannot_fit_is_refused_in_words(free, slots, said, monkeypatch):
    model, prompts = lively(vocab_size=257, n_layer=2, n_embd=64, n_head=4), {i: [1, 2, 3, 4] for i in range(1000)}
    monkeypatch.setattr(batch, "available_memory", lambda device: free)
    with pytest.raises(GptlabError, match=said):
        plan(model, prompts, 500, slots)


@pytest.mark.slow
@needs_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_500_prompts_of_1_to_900_tokens_have_the_log_probabilities_of_one_at_a_time(dtype, monkeypatch):
    model = lively(vocab_size=257, context_length=1024, n_layer=2, n_kv_head=1).to(dtype)
    lengths = torch.randint(1, 901, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = prompts_of([1, 900, *lengths[2:]])
    choose = rows.choose

    def logged(logits, sampling, uniforms):
        chosen = choose(logits, sampling, uniforms)
        likely = torch.log_softmax(logits, -1).gather(-1, chosen[:, None])[:, 0]
        # A number is drawn but once, so it says which text and where.
        seen.update(zip(uniforms.tolist(), likely.tolist(), strict=True))
        return chosen

    runs = []
    for module in ("rows", "engine"):
        monkeypatch.setattr(f"gptlab.generation.{module}.choose", logged)
    sampling = Sampling(1.0, seed=3)
    for run in (answers, one_at_a_time):
        seen = {}
        runs.append((run(model, prompts, sampling, n=100, compiled=True), seen))
    (together, logs), (alone, logs_alone) = runs
    assert together == alone
    assert logs == logs_alone
    assert len(logs) > 10_000
    if dtype == torch.float32:  # and they are the plain model's
        n = 0
        for number, (tokens, _, _) in together.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompts[number] + tokens]))[0, len(prompts[number]) - 1 : -1, :257]
            logits[:, 256] = -torch.inf
            mine = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            stream = rows.random_stream(sampling, number)
            theirs = torch.tensor([logs[stream.random()] for _ in tokens])
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)
            n += len(tokens)
        assert n > 10_000


@pytest.mark.slow
@needs_step
def test_memory_stays_flat_over_many_texts():
    model = lively(vocab_size=257, position="rope", n_layer=4)
    lengths = torch.randint(1, 900, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    peaks = []
    settings = {"vocab_size": 257, "sampling": Sampling(1.0, seed=3), "max_new_tokens": 50, "compiled": True}
    for i, _ in enumerate(complete(model, prompts_of(lengths), begin, **settings)):
        if i in (300, 1499):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    one_text = 4 * 2 * 950 * 64 * 4
    assert peaks[1] - peaks[0] < 8 * one_text  # of 1,200 more
