"""The small parts of training: which tokens, at what rate, with which decay, against plain formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gptlab
from gptlab.text.corpora import Corpus
from gptlab.text.tokenizers import byte_tokenizer
from gptlab.training.data import Batches, tokenize, windows
from gptlab.training.loop import learning_rate, make_optimizer, mean_loss, total_loss
from gptlab.training.recipe import TrainSettings


def test_the_schedule_warms_up_and_follows_half_a_cosine() -> None:
    settings = TrainSettings(steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.2)
    assert [learning_rate(settings, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(settings, 10) == pytest.approx(1.0)
    assert learning_rate(settings, 60) == pytest.approx(0.6)  # half way, in the middle of both
    assert learning_rate(settings, 35) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(settings, 109) == pytest.approx(0.2, abs=1e-3)
    rates = [learning_rate(settings, step) for step in range(110)]
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 100), (5, 5), (3, 0)])
def test_the_schedule_of_very_short_runs(steps: int, warmup: int) -> None:
    settings = TrainSettings(steps=steps, warmup_steps=warmup, learning_rate=1e-3, final_learning_rate=1e-4)
    assert all(0 < learning_rate(settings, step) <= 1e-3 for step in range(steps))


def test_every_window_comes_once_an_epoch_and_targets_are_the_next_tokens() -> None:
    stream = np.arange(1, 102, dtype=np.uint16)  # 100 tokens to predict: 10 windows of 10
    batches = Batches(stream, length=10, batch_size=5, seed=0)
    for epoch in range(3):
        firsts = []
        for step in (2 * epoch, 2 * epoch + 1):
            ids, targets = batches[step]
            assert ids.shape == targets.shape == (5, 10)
            assert ids.dtype == targets.dtype == torch.int64
            assert torch.equal(ids + 1, targets)
            assert torch.equal(ids, ids[:, :1] + torch.arange(10))
            firsts += ids[:, 0].tolist()
        assert sorted(firsts) == list(range(1, 101, 10))


def test_an_epoch_that_is_no_whole_number_of_batches_still_shows_each_window_once() -> None:
    batches = Batches(np.arange(71, dtype=np.uint16), length=10, batch_size=3, seed=4)  # 7 windows
    firsts = [first for step in range(7) for first in batches[step][0][:, 0].tolist()]
    for epoch in range(3):
        assert sorted(firsts[7 * epoch : 7 * epoch + 7]) == list(range(0, 70, 10))


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    stream = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint16)
    in_order = Batches(stream, 16, 4, seed=3)
    expected = [in_order[step] for step in range(200)]
    again = Batches(stream, 16, 4, seed=3)
    for step in (199, 0, 123, 77, 78, 5):  # any step, in any order, over several epochs
        assert torch.equal(again[step][0], expected[step][0])
        assert torch.equal(again[step][1], expected[step][1])
    assert not torch.equal(Batches(stream, 16, 4, seed=4)[0][0], expected[0][0])
    epochs = [[expected[step][0] for step in range(i, i + 5)] for i in (0, 78)]
    assert any(not torch.equal(a, b) for a, b in zip(*epochs, strict=True))  # epochs are shuffled anew


@pytest.mark.parametrize("n_tokens", [0, 1, 40])
def test_a_corpus_too_short_for_one_batch_is_refused(n_tokens: int) -> None:
    with pytest.raises(gptlab.GptlabError, match="too few for one batch of 4 x 10"):
        Batches(np.zeros(n_tokens, dtype=np.uint16), length=10, batch_size=4, seed=0)
    Batches(np.zeros(41, dtype=np.uint16), length=10, batch_size=4, seed=0)  # just enough


@pytest.mark.parametrize("n_tokens", [1, 2, 10, 11, 12, 95, 101])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_windows_predict_every_token_but_the_first_once(n_tokens: int, batch_size: int) -> None:
    stream = np.arange(n_tokens, dtype=np.uint16)
    predicted: list[int] = []
    for ids, targets in windows(stream, 10, batch_size):
        assert ids.shape == targets.shape
        assert ids.shape[0] <= batch_size
        assert ids.shape[1] <= 10
        assert torch.equal(ids + 1, targets)
        predicted += targets.flatten().tolist()
    assert predicted == list(range(1, n_tokens))


def test_tokenize_ends_every_document() -> None:
    stream = tokenize(Corpus("x", ("ab", "c")), byte_tokenizer())
    tokenizer = byte_tokenizer()
    assert stream.tolist() == [*tokenizer.encode("ab"), 256, *tokenizer.encode("c"), 256]
    assert stream.dtype == np.uint16


def test_the_loss_is_the_mean_surprise_in_nats() -> None:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny")).eval()
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(ids[:, :-1]).detach().double()
    expected = 0.0
    for row in range(2):
        for t in range(8):
            weights = logits[row, t].exp()
            expected -= math.log(weights[ids[row, t + 1]] / weights.sum()) / 16
    assert mean_loss(model, ids[:, :-1], ids[:, 1:]).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_total_loss_counts_every_token_once(batch_size: int) -> None:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny", dropout=0.5)).train()  # evaluation switches dropout off
    stream = np.random.default_rng(1).integers(0, 256, 150).astype(np.uint16)
    found = total_loss(model, stream, 16, batch_size)
    model.eval()
    expected = 0.0
    for first in range(0, 149, 16):
        part = torch.from_numpy(stream[first : first + 17].astype(np.int64))
        expected += F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum").item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_weight_decay_falls_on_matrices_only_and_on_each_once() -> None:
    model = gptlab.GPT(gptlab.ModelConfig.preset("tiny"))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainSettings(weight_decay=0.3, beta1=0.8, beta2=0.9))
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert {name for name in spared if not name.endswith("bias")} == {
        "ln_f.weight",
        *(f"h.{i}.ln_{j}.weight" for i in (0, 1) for j in (1, 2)),
    }
    assert {"wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"} <= decayed
