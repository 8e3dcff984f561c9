# Probes on models whose answers are known: stubs that copy perfectly, not at all, or within a window.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptlab import GPT, GptlabError, ModelConfig
from gptlab.evaluation.probes import copy_at_distance, induction, prefix_matching
from gptlab.model.linear import Linear

V = 256
Rule = Callable[[Tensor], Tensor]


class Stub(nn.Module):
    """What the probes use of a `GPT`; a rule takes the place of the layers. It keeps the ids that it was shown."""

    def __init__(self, rule: Rule, maps: Tensor | None = None, **overrides: Any) -> None:
        super().__init__()
        self.config = ModelConfig.preset("tiny", **{"position": "rope", **overrides})
        self.wte = nn.Embedding(V, 1)
        self.lm_head = Linear(V, V, bias=False)
        nn.init.eye_(self.lm_head.weight)
        self.rule, self.maps = rule, maps
        self.shown: list[Tensor] = []

    def forward(self, ids: Tensor, *, head: Callable[[Tensor, Linear], Any]) -> Any:
        self.shown.append(ids)
        return head(self.rule(ids), self.lm_head)

    def attention_maps(self, ids: Tensor, layer: int) -> Tensor:
        assert self.maps is not None
        return self.maps[layer][None]  # (1, H, T, T)


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, V)


def copying(window: int | None = None) -> Rule:
    """Predicts what followed the last occurrence of the same token, where the window still shows it; else nothing."""

    def rule(ids: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, V)
        for row, tokens in enumerate(ids.tolist()):
            last: dict[int, int] = {}
            for t, token in enumerate(tokens):
                followed = last.get(token, t) + 1
                if followed <= t and (window is None or t - followed < window):
                    logits[row, t, tokens[followed]] = 50.0
                last[token] = t
        return logits

    return rule


def test_a_model_that_copies_scores_one() -> None:
    for score in copy_at_distance(Stub(copying()), [8, 20, 100], n=4, length=8):
        assert score.accuracy == 1.0
        assert score.logprob == pytest.approx(0.0, abs=1e-6)
        assert score.accuracy_without < 0.1
        assert score.logprob_without == pytest.approx(-math.log(V), abs=1e-5)
        assert score.tokens == 4 * 7


def test_a_uniform_model_scores_chance() -> None:
    (score,) = copy_at_distance(Stub(uniform), [30], n=64, length=16)
    assert score.logprob == score.logprob_without == pytest.approx(-math.log(V), abs=1e-5)
    # The likeliest of equals is token 0, which a string holds once in 16 and which is not always its first.
    assert score.accuracy == pytest.approx(1 / V, abs=3 * (1 / V / score.tokens) ** 0.5)


def test_a_window_ends_the_copying() -> None:
    at = copy_at_distance(Stub(copying(window=24)), [16, 24, 25, 64], n=8, length=8)
    assert [one.distance for one in at] == [16, 24, 25, 64]
    assert [one.accuracy > 0.9 for one in at] == [True, True, False, False]
    assert [one.accuracy for one in at[:2]] == [1.0, 1.0]
    for one in at[2:]:
        assert one.accuracy < 0.1
        assert one.logprob == pytest.approx(-math.log(V), abs=1e-5)


def shown(model: Stub) -> Tensor:
    return torch.cat(model.shown)


def test_the_string_stands_where_it_should_and_nowhere_else() -> None:
    model = Stub(uniform)
    copy_at_distance(model, [20], n=3, length=6)
    rows = shown(model)  # (6, 25): with and without, in turn; the last token is a target only
    assert rows.shape == (6, 25)
    for row, control in zip(rows[::2], rows[1::2], strict=True):
        assert torch.equal(row[:5], row[20:25])
        assert torch.equal(row[6:], control[6:])
        string = row[:6].tolist()
        assert len(set(string)) == 6
        assert not set(string) & set(control[:20].tolist())
        assert not set(string) & set(row[6:20].tolist())
    assert len({tuple(row.tolist()) for row in rows}) == 6


def test_the_same_strings_serve_at_every_distance_and_number() -> None:
    model = Stub(uniform)
    copy_at_distance(model, [30], n=2, length=6, seed=1)
    copy_at_distance(model, [9], n=4, length=6, seed=1)
    copy_at_distance(model, [9], n=4, length=6, seed=2)
    two, four, other = model.shown
    assert torch.equal(two[:, :6], four[:4, :6])
    assert not torch.equal(other[:, :6], four[:, :6])


def test_filler_is_a_passage_of_the_text_given() -> None:
    model, text = Stub(uniform), list(range(100, 180))
    copy_at_distance(model, [30], n=5, length=4, filler=text, vocabulary=range(50))
    rows = shown(model)
    between = rows[:, 4:30]
    assert torch.equal(between - between[:, :1], torch.arange(26).expand(10, 26))
    assert between.min() >= 100
    assert between.max() < 180
    assert len(between[:, 0].unique()) > 1
    assert torch.cat([rows[:, :4], rows[:, 30:]], 1).max() < 50
    copy_at_distance(model, [84], n=1, length=4, filler=text)
    assert torch.equal(model.shown[-1][:, 4:84], torch.tensor([text, text]))


def test_what_copying_refuses() -> None:
    model = Stub(uniform)
    with pytest.raises(GptlabError, match="cannot begin again after 15; the distance is at least 16"):
        copy_at_distance(model, [15])
    with pytest.raises(GptlabError, match="at least 2 tokens"):
        copy_at_distance(model, [15], length=1)
    with pytest.raises(GptlabError, match="more than 32 ids to draw from, there are 20"):
        copy_at_distance(model, [16], vocabulary=range(20))
    with pytest.raises(GptlabError, match="needs 14 tokens of filler, there are 3"):
        copy_at_distance(model, [30], filler=[1, 2, 3])
    learned = GPT(ModelConfig.preset("tiny"))  # 64 positions
    assert copy_at_distance(learned, [49], n=1)[0].tokens == 15
    with pytest.raises(GptlabError, match="64 learned positions"):
        copy_at_distance(learned, [50], n=1)


def attending(at: Callable[[int], int], n: int) -> Tensor:
    return torch.eye(n)[[max(at(t), 0) for t in range(n)]]


def test_induction_of_a_model_that_copies() -> None:
    period = 12
    everywhere = torch.ones(24, 24).tril() / torch.arange(1.0, 25)[:, None]
    inducing = attending(lambda t: t - period + 1, 24)
    before = attending(lambda t: t - 1, 24)
    # The token's own occurrence, and one too far: off by one on either side.
    same, late = attending(lambda t: t - period, 24), attending(lambda t: t - period + 2, 24)
    maps = torch.stack([torch.stack([everywhere, inducing, before]), torch.stack([same, late, inducing])])
    score = induction(Stub(copying(), maps), period=period, n=3)
    assert score.first == pytest.approx(math.log(V), abs=1e-5)
    assert score.second == pytest.approx(0.0, abs=1e-6)
    mean = sum(1 / (t + 1) for t in range(12, 24)) / 12
    torch.testing.assert_close(score.prefix_matching, torch.tensor([[mean, 1.0, 0.0], [0.0, 0.0, 1.0]]))


def test_induction_of_a_uniform_model() -> None:
    score = induction(Stub(uniform, torch.zeros(2, 1, 8, 8)), period=4, n=2)
    assert score.first == score.second == pytest.approx(math.log(V), abs=1e-5)
    assert torch.equal(score.prefix_matching, torch.zeros(2, 1))


def test_prefix_matching_of_a_real_model_is_the_mean_over_its_maps() -> None:
    model = GPT(ModelConfig.preset("tiny", position="rope", window=[None, 7])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    once = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:8] for i in range(3)])
    ids = once.repeat(1, 2)
    scores = prefix_matching(model, ids, 8)
    maps = model.attention_maps(ids, 0)
    expected = torch.stack([maps[:, :, q, q - 8 + 1] for q in range(8, 16)]).mean((0, 1))
    torch.testing.assert_close(scores[0], expected)
    assert expected.max() > 1.5 * expected.min()
    # A window of 7 does not reach back to the token after the first occurrence.
    assert torch.equal(scores[1], torch.zeros(4))


def test_induction_measures_both_passes_of_the_same_sequences() -> None:
    model = GPT(ModelConfig.preset("tiny")).eval()
    score = induction(model, period=32, n=2, vocabulary=range(100))  # fills the 64 positions
    assert score.prefix_matching.shape == (2, 4)
    assert score.first == pytest.approx(math.log(V), abs=0.3)
    with pytest.raises(GptlabError, match="64 learned positions"):
        induction(model, period=33)
    with pytest.raises(GptlabError, match="2 to 100 different tokens, got n=16, period=101"):
        induction(model, period=101, vocabulary=range(100))
