"""Generation step by step: what could have come, what was chosen, and what the cache holds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.generation.engine import allowed, check_new_tokens, check_prompt, longest_text, random_stream
from gptlab.generation.padded import evaluating, last_logits, nothing
from gptlab.generation.sampling import Sampling, choose, probabilities
from gptlab.inspecting.running import as_row
from gptlab.language_model import LanguageModel
from gptlab.model.cache import Cache
from gptlab.model.gpt import GPT


@dataclass(frozen=True)
class Candidate:
    """A token that might have come.

    Attributes:
        token: its id.
        text: what it stands for; U+FFFD where it is a part of a character.
        probability: the model's own, 0 to 1.
        chance: with which it was drawn: the temperature and the rest of `Sampling` applied.
    """

    token: int
    text: str
    probability: float
    chance: float


@dataclass(frozen=True)
class GenerationStep:
    """One token, and what stood behind it.

    Attributes:
        candidates: the likeliest tokens, the best first.
        chosen: the token that was drawn; it may be none of the candidates.
        slots: for each layer the position that each slot of its cache holds, -1 for an empty one: what the model had
            read when it chose. A window's cache is a ring whose slots are overwritten in turn, the sinks' own excepted.
        cache_bytes: of the keys and values in the slots that are filled.
        seconds: that reading and choosing took; the first step reads the whole prompt.
        ends: whether the token ends the text.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    slots: tuple[tuple[int, ...], ...]
    cache_bytes: int
    seconds: float
    ends: bool


def generation_steps(
    lm: LanguageModel,
    ids: Tensor | Sequence[int],
    n: int,
    *,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    top: int = 10,
    chunk: int = 16,
) -> Iterator[GenerationStep]:
    """Continue a text one token at a time and show each step; the tokens are those of `LanguageModel.generate`.

    Steps are computed in plain PyTorch. The compiled decoder of `generate` is faster, and rounds otherwise: where two
    tokens are as likely as makes no difference, its text may differ.

    Args:
        lm: a model with its tokenizer.
        ids: (T,) int64, the prompt.
        n: most tokens to add; a token that ends texts ends it sooner, and so do learned positions.
        seed: as in `LanguageModel.generate`; None takes a new one.
        temperature: as in `Sampling`, and so for the next two.
        top_k: see there.
        top_p: see there.
        top: how many candidates to show.
        chunk: tokens of the prompt that are read at once. The ring of a layer with a window of W has W - 1 + ``chunk``
            slots beside those of the sinks, as long as the text is longer than that.

    Raises:
        GptlabError: no tokenizer, a prompt that the model cannot continue, or impossible settings.
    """
    row = as_row(lm.model, ids)
    lm.needs_tokenizer()
    check_prompt(row[0].tolist(), lm.config)
    check_new_tokens(n)
    if top < 1 or chunk < 1:
        raise GptlabError(f"top and chunk must be at least 1, got {top} and {chunk}")
    sampling = Sampling(temperature, top_k, top_p, secrets.randbits(32) if seed is None else seed)
    return _steps(lm, row, n, sampling, top, chunk)


@torch.no_grad()
def _steps(
    lm: LanguageModel, row: Tensor, n: int, sampling: Sampling, top: int, chunk: int
) -> Iterator[GenerationStep]:
    tokenizer, model, vocabulary = lm.needs_tokenizer(), lm.model, lm.vocabulary()
    random, length, limit = random_stream(sampling, 0), row.shape[1], longest_text(lm.config)
    cache = model.make_cache(1, min(length + n, limit), chunk=chunk)
    new = row
    for _ in range(min(n, limit - length + 1)):
        start = time.perf_counter()
        logits = allowed(_read(model, new, cache, chunk), vocabulary["vocab_size"], vocabulary["never"])
        uniform = torch.tensor([random.random()], dtype=torch.float64, device=logits.device)
        token = int(choose(logits, sampling, uniform))
        seconds = time.perf_counter() - start
        own, drawn = (probabilities(logits, how)[0] for how in (Sampling(), sampling))
        likeliest = own.topk(min(top, len(own))).indices.tolist()
        shown = {
            one: Candidate(one, tokenizer.decode([one]), own[one].item(), drawn[one].item())
            for one in [*likeliest, token]
        }
        yield GenerationStep(
            candidates=tuple(shown[one] for one in likeliest),
            chosen=shown[token],
            slots=tuple(tuple(layer.positions[0, : layer.used].tolist()) for layer in cache.layers),
            cache_bytes=_filled(cache),
            seconds=seconds,
            ends=token in tokenizer.ends,
        )
        if token in tokenizer.ends:
            return
        new = torch.tensor([[token]], device=row.device)


def _read(model: GPT, ids: Tensor, cache: Cache, chunk: int) -> Tensor:
    """Read ids (1, T) piece by piece; return the logits (1, V) of what follows."""
    *before, last = ids.split(chunk, dim=1)
    with evaluating(list(model.modules())):
        for piece in before:
            model(piece, cache=cache, head=nothing)
        logits: Tensor = model(last, cache=cache, head=last_logits)
    return logits


def _filled(cache: Cache) -> int:
    """Return the bytes of the keys and values in filled slots."""
    return sum(
        2 * int((layer.positions >= 0).sum()) * layer.k.shape[1] * layer.k.shape[3] * layer.k.itemsize
        for layer in cache.layers
    )
