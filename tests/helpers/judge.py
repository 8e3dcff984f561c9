# GPT-2 of `transformers`, with random weights: what gptlab is compared with.
from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import gptlab
from helpers.models import random_ids

UNCLEAR = 1e-4
"""Two best logits closer than this may change places by rounding alone."""


def judge(seed: int = 0, noise: float = 0.1, **overrides: Any) -> transformers.GPT2LMHeadModel:
    """Their model in eval mode; every parameter, biases and norms too, far enough from its start to matter."""
    settings: dict[str, Any] = {
        "vocab_size": 257,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    config = transformers.GPT2Config(**{**settings, **overrides}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def positions_of(real: Tensor) -> Tensor:
    """(B, T) bool -> positions that count real tokens only, -1 for padding."""
    return torch.where(real, real.cumsum(1) - 1, -1)


@torch.no_grad()
def greedy_until_unclear(model: transformers.GPT2LMHeadModel, prompt: list[int], n: int) -> tuple[list[int], int]:
    """Their greedy continuation without its end-of-text, and how many of its tokens lead clearly."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=n,
        output_logits=True,
        return_dict_in_generate=True,
    )
    text = [token for token in made.sequences[0, len(prompt) :].tolist() if token != model.config.eos_token_id]
    best = torch.cat(made.logits).topk(2).values
    unclear = ((best[:, 0] - best[:, 1]) < UNCLEAR).nonzero()
    return text, min(len(text), int(unclear[0]) if len(unclear) else len(text))


@torch.no_grad()
def assert_computes_the_same(ours: gptlab.GPT, theirs: Any) -> None:
    """Whole, cached past any window, and left-padded, on as many tokens as the learned positions and 200 allow."""
    text = random_ids(ours.config.vocab_size, 2, 200, seed=1)
    mask = torch.ones_like(text)
    expected = ours(text)
    assert expected.std() > 0.5  # near zero, anything would agree
    torch.testing.assert_close(theirs(text, attention_mask=mask).logits, expected, rtol=0.0, atol=1e-5)
    cache, chunks = None, []
    for end in (50, 51, 52, 90, 150, 200):
        start = sum(part.shape[1] for part in chunks)
        out = theirs(text[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chunks.append(out.logits)
    torch.testing.assert_close(torch.cat(chunks, 1), expected, rtol=0.0, atol=2e-5)
    padded = torch.nn.functional.pad(text[:1, :60], (40, 0))
    real = (torch.arange(100) >= 40).long()[None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = theirs(padded, attention_mask=real, position_ids=positions).logits[:, 40:]
    torch.testing.assert_close(logits, expected[:1, :60], rtol=0.0, atol=2e-5)


def assert_generates_the_same(lm: gptlab.LanguageModel, theirs: Any) -> None:
    """Greedy, with their cache, far past every window."""
    prompt = random_ids(lm.config.vocab_size, 1, 10, seed=1)
    made = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert made.shape[1] == 70
    with torch.no_grad():
        best, second = lm.model(made)[0, 9:-1].topk(2).values.unbind(-1)
        clear = best - second > 1e-4
        assert clear.sum() > 50
        assert torch.equal(lm.model(made)[0, 9:-1].argmax(-1)[clear], made[0, 10:][clear])
