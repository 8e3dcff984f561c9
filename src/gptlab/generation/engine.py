"""The decoding loop: prompts in, tokens out, one forward pass a token."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.generation.continuation import Continuation
from gptlab.generation.sampling import Sampling, draw, probabilities
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.masks import PADDING

CHUNK = 512
"""Tokens of a prompt that are read at once."""


def last_logits(hidden: Tensor, lm_head: Linear) -> Tensor:
    """A head for `GPT.forward`: logits of the last position only, (B, T, C) -> (B, V) float32."""
    return lm_head(hidden[:, -1]).float()


def nothing(hidden: Tensor, lm_head: Linear) -> None:
    """A head for reading a part of a prompt whose logits nobody needs."""


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids (B, T) and their positions (B, T), or None for prompts of one length, which need no padding."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in prompts], device=device)
    if all(len(row) == longest for row in prompts):
        return ids, None
    positions = [[PADDING] * (longest - len(row)) + list(range(len(row))) for row in prompts]
    return ids, torch.tensor(positions, device=device)


@torch.inference_mode()
def decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Continuation],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    vocab_size: int,
    never: Sequence[int] = (),
) -> Iterator[tuple[int, str]]:
    """Continue all prompts together; yield (row, new text) as text appears.

    A row draws from a random stream of its own, made of the seed and the row's number, so its text does not
    depend on the others. Finished rows leave the batch.

    Args:
        model: in eval mode.
        prompts: token ids of each row, at least one each.
        continuations: what grows, one a row; each ends with its `finish` set.
        sampling: how to choose tokens.
        max_new_tokens: for each row.
        vocab_size: ids that the tokenizer can decode; logits beyond it are never sampled.
        never: ids below that which it cannot decode; they are not sampled either.

    Raises:
        GptlabError: an empty prompt, or one longer than the context.
    """
    if not prompts:
        return
    # A table of positions ends; rotary ones do not, nor does a model without any.
    limit = model.config.context_length if model.config.has_table else sys.maxsize
    for prompt in prompts:
        if not prompt:
            raise GptlabError("the prompt is empty; give at least one token of text")
        if len(prompt) > limit:
            raise GptlabError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {limit}; shorten the prompt"
            )
    ids, positions = pad_left(prompts, model.wte.weight.device)
    longest = ids.shape[1]
    cache = model.make_cache(len(prompts), min(longest + max_new_tokens, limit), chunk=CHUNK)
    streams = [np.random.default_rng([sampling.seed, row]) for row in range(len(prompts))]
    active = list(range(len(prompts)))

    for start in range(0, longest - CHUNK, CHUNK):
        part = slice(start, start + CHUNK)
        model(ids[:, part], positions=None if positions is None else positions[:, part], cache=cache, head=nothing)
    rest = (longest - 1) // CHUNK * CHUNK
    ids, positions = ids[:, rest:], None if positions is None else positions[:, rest:]

    for _ in range(max_new_tokens):
        logits = model(ids, positions=positions, cache=cache, head=last_logits)[:, :vocab_size]  # (B, V)
        if never:
            logits[:, list(never)] = -torch.inf
        uniforms = torch.tensor([streams[row].random() for row in active], dtype=torch.float64, device=logits.device)
        chosen = draw(probabilities(logits, sampling), uniforms)
        for row, token in zip(active, chosen.tolist(), strict=True):
            yield row, continuations[row].add(token)
            # The token just drawn must itself be read before another can follow it.
            if len(prompts[row]) + len(continuations[row].tokens) > limit:
                yield row, continuations[row].close("context")
        staying = [i for i, row in enumerate(active) if continuations[row].finish is None]
        if not staying:
            return
        if len(staying) < len(active):
            active = [active[i] for i in staying]
            chosen = chosen[staying]
            cache.keep(staying)
        ids, positions = chosen[:, None], None
    for row in active:
        yield row, continuations[row].close("length")
