"""Generation step by step against the decoding loop, full forward passes, and rings filled by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.models import disturb, tiny_lm

from gptlab import GptlabError, LanguageModel
from gptlab.generation.engine import decode
from gptlab.generation.sampling import Sampling
from gptlab.inspecting import ablated, generation_steps
from gptlab.model import cost
from gptlab.model.gpt import GPT

PROMPT = list(b"once upon a time")
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rings with sinks": {"position": "rope", "n_kv_head": 2, "window": (4, None), "sinks": 2},
}
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def lm(**changes: Any) -> LanguageModel:
    made = tiny_lm(**changes)
    disturb(made.model.eval(), 0.2)
    return made


@variants
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 20}, {"top_p": 0.9}], ids=str)
def test_the_tokens_are_those_of_generate(changes: dict[str, Any], settings: dict[str, Any]) -> None:
    model = lm(**changes)
    steps = list(generation_steps(model, PROMPT, 30, seed=5, **settings))
    continuations = model.new_continuations(1)
    sampling = Sampling(seed=5, **settings)
    for _ in decode(
        model.model, [PROMPT], continuations, sampling=sampling, max_new_tokens=30, compiled=False, **model.vocabulary()
    ):
        pass
    assert [step.chosen.token for step in steps if not step.ends] == continuations[0].tokens
    assert len({step.chosen.token for step in steps}) > 3 or settings == {"temperature": 0.0}
    assert all(step.seconds > 0 for step in steps)


@variants
@torch.no_grad()
def test_candidates_are_the_best_of_what_the_model_says(changes: dict[str, Any]) -> None:
    model = lm(**changes)
    ids = list(PROMPT)
    for step in generation_steps(model, ids.copy(), 12, seed=1, temperature=0.5, top_k=8, top=5, chunk=3):
        logits = model.model(torch.tensor([ids]))[0, -1].double()
        logits[model.needs_tokenizer().vocab_size :] = -torch.inf
        probabilities = logits.softmax(-1)
        best = logits.topk(8).indices.tolist()
        chances = (logits[best] / 0.5).softmax(-1)
        assert [one.token for one in step.candidates] == best[:5]
        for one, chance in zip(step.candidates, chances, strict=False):
            assert one.probability == pytest.approx(probabilities[one.token].item(), abs=1e-5)
            assert one.chance == pytest.approx(chance.item(), abs=1e-5)
            assert one.text == model.needs_tokenizer().decode([one.token])
        assert step.chosen.token in best
        assert step.chosen.probability == pytest.approx(probabilities[step.chosen.token].item(), abs=1e-5)
        ids.append(step.chosen.token)


def test_a_rings_slots_are_overwritten_in_turn_and_its_sinks_are_kept() -> None:
    model = lm(position="rope", window=(3, None), sinks=1)
    slots = [step.slots for step in generation_steps(model, [1, 2, 3], 6, seed=0, chunk=1)]
    # The worked example of gptlab/model/cache.py: window 3, one sink, four slots.
    rings = [(0, 1, 2), (0, 1, 2, 3), (0, 4, 2, 3), (0, 4, 5, 3), (0, 4, 5, 6), (0, 7, 5, 6)]
    assert [ring for ring, _ in slots] == rings
    assert [full for _, full in slots] == [tuple(range(n)) for n in range(3, 9)]


def test_bytes_of_the_cache_are_those_of_the_model_of_costs() -> None:
    for changes in VARIANTS.values():
        model = lm(**changes)
        for n, step in enumerate(generation_steps(model, PROMPT, 8, seed=0, chunk=1), start=len(PROMPT)):
            assert step.cache_bytes == cost.cache_bytes(model.config, n, 4)


@variants
def test_generation_sees_what_is_taken_out(changes: dict[str, Any]) -> None:
    model, zeroed, prompt = lm(**changes), lm(**changes), bytes(PROMPT).decode()
    with torch.no_grad():
        zeroed.model.blocks[0].mlp.c_proj.weight.zero_()
        zeroed.model.blocks[0].mlp.c_proj.bias.zero_()
    expected, own = (one.generate(prompt, max_new_tokens=20, seed=4) for one in (zeroed, model))
    with ablated(model.model, mlps=[0]):
        assert model.generate(prompt, max_new_tokens=20, seed=4) == expected
        steps = generation_steps(model, PROMPT, 20, seed=4)
        tokens = [step.chosen.token for step in steps if not step.ends]
    assert model.needs_tokenizer().decode(tokens) == expected[0] != own[0]
    assert model.generate(prompt, max_new_tokens=20, seed=4) == own


def test_texts_end() -> None:
    model = lm()
    room = model.config.context_length - len(PROMPT)
    endless = list(generation_steps(model, PROMPT, 1000, temperature=1e6, seed=3))
    assert len(endless) == room + 1 or endless[-1].ends
    end = model.needs_tokenizer().end_of_text
    assert end is not None
    with torch.no_grad():
        model.model.lm_head.weight = torch.nn.Parameter(model.model.lm_head.weight.clone() * 0)
        model.model.lm_head.weight[end] = model.model(torch.tensor([PROMPT]), head=lambda x, _: x)[0, -1]
    steps = list(generation_steps(model, PROMPT, 10, temperature=0.0))
    assert [(step.chosen.token, step.ends) for step in steps] == [(end, True)]
    assert steps[0].chosen.chance == 1.0


def test_seeds() -> None:
    model = lm(position="rope")
    texts = [[step.chosen.token for step in generation_steps(model, PROMPT, 20, seed=s)] for s in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert all(a != b for a, b in itertools.combinations(texts[1:], 2))


def test_what_cannot_be_continued_is_refused_at_once() -> None:
    model = lm()
    for ids, n, settings, words in (
        (PROMPT, 0, {}, "max_new_tokens must be at least 1"),
        ([0] * 65, 1, {}, "context holds 64"),
        (PROMPT, 1, {"top": 0}, "top and chunk must be at least 1"),
        (PROMPT, 1, {"temperature": -1.0}, "temperature must be 0"),
        ([999], 1, {}, "the model has 0 to 256"),
    ):
        with pytest.raises(GptlabError, match=words):
            generation_steps(model, ids, n, **settings)
    with pytest.raises(GptlabError, match="without a tokenizer"):
        generation_steps(LanguageModel(GPT(model.config)), PROMPT, 1)
