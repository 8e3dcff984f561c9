# GPT-2 of `transformers`, with random weights: what gptlab is compared with.
from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

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


def random_ids(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def positions_of(real: Tensor) -> Tensor:
    """(B, T) bool -> positions that count real tokens only, -1 for padding."""
    return torch.where(real, real.cumsum(1) - 1, -1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """The same shape and dtype, and no element further apart than the tolerance."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)


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
