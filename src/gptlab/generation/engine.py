"""The decoding loop: prompts in, tokens out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.generation.compiled.decoder import Compiled, serves
from gptlab.generation.continuation import Continuation
from gptlab.generation.memory import check_memory, is_shortage
from gptlab.generation.padded import CHUNK, FEWER, Padded
from gptlab.generation.sampling import Sampling, choose, penalised
from gptlab.model.cost import cache_bytes
from gptlab.model.gpt import GPT


class Decoder(Protocol):
    """What computes the logits of a batch that grows token by token."""

    def read(self) -> Tensor:
        """Read the prompts; return (B, V) float32 logits of what follows."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token (B,) of every row; return as `read`."""

    def keep(self, rows: list[int]) -> None:
        """Go on with some rows only."""


@contextlib.contextmanager
def shortage_in_words() -> Iterator[None]:
    """Turn a want of memory into a `GptlabError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        raise GptlabError(f"the memory does not suffice to go on; {FEWER}") from None


def memory_of_text(model: GPT, length: int, n_prompt: int) -> tuple[int, int]:
    """Return the bytes of a cache for ``length`` tokens, and what is needed for a moment besides, from below."""
    config = model.config
    # One chunk of the prompt passes through a layer, then the logits through the sampling, which is in float64.
    layer = min(n_prompt, CHUNK) * (config.n_embd + config.inner * (1 + (config.mlp == "swiglu"))) * 4
    logits = config.vocab_size * 3 * 8
    return cache_bytes(config, length, model.cache_dtype.itemsize, chunk=CHUNK), max(layer, logits)


def check_batch(model: GPT, n_rows: int, n_tokens: int) -> None:
    """Refuse a batch whose beginning alone needs more memory than there is.

    Args:
        model: what is to generate.
        n_rows: texts at a time.
        n_tokens: of the longest prompt.

    Raises:
        GptlabError: too many texts or tokens, with an estimate from below of the memory that they take.
    """
    held, passing = memory_of_text(model, n_tokens + 1, n_tokens)
    texts = "1 text" if n_rows == 1 else f"{n_rows:,} texts"
    said = f"{texts} at once, {n_tokens:,} tokens each to begin with, take{'s' * (n_rows == 1)}"
    check_memory(n_rows * (held + passing), model.wte.weight.device, said, FEWER)


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
    streams: Sequence[int] | None = None,
    compiled: bool | None = None,
) -> Iterator[tuple[int, str]]:
    """Continue all prompts together; yield (row, new text) as text appears.

    A row draws from a random stream of its own, made of the seed and the row's number, and finished rows leave the
    batch: its text does not depend on the others (docs/generation.md has the exception).

    The model computes in eval mode and is left in its own after every token. The cache grows with the text.

    Args:
        model: what computes the logits.
        prompts: token ids of each row, at least one each.
        continuations: what grows, one a row; each ends with its `finish` set.
        sampling: how to choose tokens.
        max_new_tokens: for each row.
        vocab_size: ids that the tokenizer can decode; logits beyond it are never sampled.
        never: ids below that which it cannot decode; they are not sampled either.
        streams: numbers of the rows' random streams, in place of their own.
        compiled: whether to use the compiled step; None: where it serves.

    Raises:
        GptlabError: an empty prompt, one longer than the context, ids that the model does not have, or more memory
            needed than there is.
    """
    if not prompts:
        return
    limit = longest_text(model.config)
    for prompt in prompts:
        check_prompt(prompt, model.config)
    longest = max(map(len, prompts))
    device = model.wte.weight.device
    check_batch(model, len(prompts), longest)
    kind = Compiled if (serves(model, max_new_tokens) if compiled is None else compiled) else Padded
    with shortage_in_words():
        decoder: Decoder = kind(model, prompts, min(longest + max_new_tokens, limit))
    numbers = range(len(prompts)) if streams is None else streams
    randoms = [random_stream(sampling, number) for number in numbers]
    active = list(range(len(prompts)))
    present = tokens_of(prompts, model.config.vocab_size, device) if sampling.repetition_penalty != 1 else None
    chosen = torch.empty(0)

    for i in range(max_new_tokens):
        with shortage_in_words():
            logits = decoder.step(chosen) if i else decoder.read()  # (B, V)
            if present is not None:
                logits = penalised(logits, present, sampling.repetition_penalty)
            logits = allowed(logits, vocab_size, never)
            uniforms = torch.tensor([randoms[row].random() for row in active], dtype=torch.float64, device=device)
            chosen = choose(logits, sampling, uniforms)
        if present is not None:
            present.scatter_(1, chosen[:, None], True)
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
            present = None if present is None else present[staying]
            decoder.keep(staying)
    for row in active:
        yield row, continuations[row].close("length")


def longest_text(config: ModelConfig) -> int:
    """Tokens that a text may have: a table of positions ends, rotary ones do not, nor does a model without any."""
    return config.context_length if config.has_table else sys.maxsize


def check_prompt(prompt: Sequence[int], config: ModelConfig) -> None:
    """Raise a `GptlabError` where a model cannot continue these ids."""
    if not prompt:
        raise GptlabError("the prompt is empty; give at least one token of text")
    if len(prompt) > (limit := longest_text(config)):
        raise GptlabError(f"the prompt has {len(prompt)} tokens, the model's context holds {limit}; shorten the prompt")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
        raise GptlabError(
            f"the prompt has the id {low if low < 0 else high}, the model has 0 to {config.vocab_size - 1};"
            " encode it with the model's own tokenizer"
        )


def check_new_tokens(n: Any) -> None:
    """Raise a `GptlabError` where this is not how many tokens to add."""
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise GptlabError(f"max_new_tokens must be at least 1, got {n!r}")


def random_stream(sampling: Sampling, number: int) -> np.random.Generator:
    """Return what a text of this number draws from, whichever texts are beside it."""
    return np.random.default_rng([sampling.seed, number])


def allowed(logits: Tensor, vocab_size: int, never: Sequence[int]) -> Tensor:
    """Return the logits of what may be drawn, as `decode` has it."""
    logits = logits[:, :vocab_size]
    if never:
        logits[:, list(never)] = -torch.inf
    return logits


def tokens_of(prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Return (B, V) bool: is the token in the prompt?"""
    present = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in zip(present, prompts, strict=True):
        row[list(prompt)] = True
    return present.to(device)
