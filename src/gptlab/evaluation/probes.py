"""What perplexity hides: can a model find again what it has just read?

Text has so much local structure that a model may lose its grip on the distant past and hardly pay for it in
perplexity. Random tokens can only be predicted by copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation.scoring import completion_logprobs, token_logprobs
from gptlab.model.gpt import GPT


@dataclass(frozen=True)
class Copying:
    """How well random strings were reproduced that stood a distance ago.

    Attributes:
        distance: tokens from a token to its repetition.
        accuracy: share of the tokens for which the model's likeliest one was right.
        logprob: mean natural log-probability of the right token.
        accuracy_without: the same when another string stood there: chance.
        logprob_without: likewise.
        tokens: predictions that went into each.
    """

    distance: int
    accuracy: float
    logprob: float
    accuracy_without: float
    logprob_without: float
    tokens: int


@dataclass(frozen=True)
class Induction:
    """How a model takes a random sequence that comes twice.

    Attributes:
        first: mean loss of the first pass in nats per token, its first token left out.
        second: mean loss of the second pass, its first token left out.
        prefix_matching: (L, H) for each head, the mean weight with which a token of the second pass attends to the
            token *after* its own first occurrence (Olsson et al. 2022): near 1 for an induction head.
    """

    first: float
    second: float
    prefix_matching: Tensor


def copy_at_distance(
    model: GPT,
    distances: Sequence[int],
    *,
    n: int = 32,
    length: int = 16,
    seed: int = 0,
    filler: Sequence[int] | None = None,
    vocabulary: Sequence[int] | None = None,
    dtype: str = "float32",
) -> list[Copying]:
    """Show a random string, other text, and the string again; score its repetition from the second token on.

    The tokens of a string differ from each other and from those of random filler, so that it is never in doubt what
    follows which. The same strings and fillers serve at every distance, as far as they reach.

    Args:
        model: a window W in each of L layers lets through nothing from further than L (W - 1) tokens.
        distances: tokens from the start of a string to the start of its repetition; at least ``length``.
        n: strings at each distance.
        length: tokens of a string, at least 2.
        seed: of strings and fillers.
        filler: token ids of a real text; each string gets a passage from a random place. None: random tokens.
        vocabulary: ids to draw from; by default all that the model has. Without the end of text, if documents matter.
        dtype: as in `token_logprobs`.

    Returns:
        One `Copying` for each distance, in the order given.

    Raises:
        GptlabError: impossible lengths or distances, too few ids to draw from, a filler that is too short, or more
            tokens than the model has learned positions.
    """
    if n < 1 or length < 2:
        raise GptlabError(f"copying needs at least one string of at least 2 tokens, got n={n} and length={length}")
    ids = _ids(model, vocabulary)
    if len(ids) <= 2 * length:
        raise GptlabError(
            f"two strings of {length} different tokens and a filler need more than {2 * length} ids to draw from,"
            f" there are {len(ids)}; shorten the strings"
        )
    for d in distances:
        if d < length:
            raise GptlabError(
                f"a string of {length} tokens cannot begin again after {d}; the distance is at least {length}"
            )
        if filler is not None and len(filler) < d - length:
            raise GptlabError(
                f"a distance of {d} needs {d - length} tokens of filler, there are {len(filler)}; give a longer text"
            )
    return [_copying(model, d, n, length, seed, filler, ids, dtype) for d in distances]


def _copying(
    model: GPT,
    distance: int,
    n: int,
    length: int,
    seed: int,
    filler: Sequence[int] | None,
    vocabulary: np.ndarray,
    dtype: str,
) -> Copying:
    pairs = []
    for i in range(n):
        # A generator for each string, so that neither n nor the distance changes the others.
        draw = np.random.default_rng([seed, i])
        string, other, rest = np.split(draw.permutation(vocabulary), [length, 2 * length])
        if filler is None:
            between = draw.choice(rest, distance - length)
        else:
            start = int(draw.integers(len(filler) - (distance - length) + 1))
            between = np.asarray(filler[start : start + distance - length], dtype=np.int64)
        pairs += [(np.concatenate([begin, between, string[:1]]), string[1:]) for begin in (string, other)]
    completions = completion_logprobs(model, pairs, context=distance + length - 1, dtype=dtype)
    logprobs = torch.stack([one.logprobs for one in completions]).view(n, 2, -1).mean((0, 2))
    right = torch.stack([one.best == one.ids for one in completions]).view(n, 2, -1).double().mean((0, 2))
    return Copying(distance, right[0].item(), logprobs[0].item(), right[1].item(), logprobs[1].item(), n * (length - 1))


def induction(
    model: GPT, *, period: int, n: int = 16, seed: int = 0, vocabulary: Sequence[int] | None = None
) -> Induction:
    """Show random sequences twice in a row; return the losses of both passes and each head's prefix matching.

    Args:
        model: a layer whose window is not longer than ``period`` - 1 has no prefix matching.
        period: different tokens of a sequence, at least 2.
        n: sequences.
        seed: of the sequences.
        vocabulary: as in `copy_at_distance`.

    Raises:
        GptlabError: an impossible period, too few ids, or more tokens than the model has learned positions.
    """
    ids = _ids(model, vocabulary)
    if n < 1 or not 2 <= period <= len(ids):
        raise GptlabError(
            f"induction needs at least one sequence of 2 to {len(ids)} different tokens, got n={n}, period={period}"
        )
    once = np.stack([np.random.default_rng([seed, i]).permutation(ids)[:period] for i in range(n)])
    twice = np.concatenate([once, once], axis=1)  # (n, 2 * period)
    losses = -torch.stack(token_logprobs(model, list(twice), context=2 * period))  # (n, 2 * period - 1), of tokens 1 on
    # The first token of the second pass cannot be foreseen: nothing says that the sequence begins again.
    first, second = losses[:, : period - 1].mean().item(), losses[:, period:].mean().item()
    return Induction(first, second, prefix_matching(model, torch.from_numpy(twice), period))


def prefix_matching(model: GPT, ids: Tensor, period: int) -> Tensor:
    """Return the (L, H) mean attention from each token to the one after its previous occurrence.

    Args:
        model: whose `attention_maps` to look at.
        ids: (n, T) int64, sequences that repeat after ``period`` tokens.
        period: tokens of a repetition.
    """
    ids = ids.to(model.wte.weight.device)
    scores = []
    for layer in range(model.config.n_layer):
        rows = []
        for row in ids.split(1):  # one at a time: the maps of a sequence take 4 H T^2 bytes
            maps = model.attention_maps(row, layer)[0]  # (H, T, T)
            # The query at q repeats the token at q - period, which q - period + 1 came after.
            rows.append(maps[:, period:].diagonal(1, dim1=1, dim2=2).mean(-1))
        scores.append(torch.stack(rows).mean(0))
    return torch.stack(scores).cpu()


def _ids(model: GPT, vocabulary: Sequence[int] | None) -> np.ndarray:
    if vocabulary is None:
        return np.arange(model.config.vocab_size)
    return np.unique(np.asarray(vocabulary, dtype=np.int64))
