"""A count trigram: what a language model must beat before it has learned more than which tokens follow which.

Interpolated absolute discounting (Ney, Essen and Kneser 1994; as in Chen and Goodman 1999, section 2.7). With c the
counts of a training text, T(h) the number of different tokens seen after h, and h' = h without its first token:

    P(w | h) = max(c(hw) - D, 0) / c(h) + D T(h) / c(h) P(w | h')          where h was seen, else P(w | h')
    P(w)     = max(c(w) - D, 0) / N + D T / N 1/V

D is n1 / (n1 + 2 n2) for each length, n1 and n2 being the numbers of n-grams that were seen once and twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gptlab.errors import GptlabError

NAME = "trigram"
DEFINITION = (
    "trigram: counts, interpolated absolute discounting (Ney, Essen and Kneser 1994), of as many tokens of the training"
    " data; each token given the two before it in its document"
)
_MOST_IDS = 2_097_151
"""Of three ids in 63 bits."""


class _Order(NamedTuple):
    """The n-grams of one length. Numbers are the ids of an n-gram as the digits of one, to the base V.

    Attributes:
        grams: their numbers, ascending, (n,) int64.
        counts: of each, (n,) int64.
        contexts: the numbers of all but the last ids, ascending, (m,) int64.
        totals: how often each context was followed by anything, (m,) int64.
        kinds: by how many different tokens, (m,) int64.
        discount: D.
    """

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float

    def probabilities(self, grams: np.ndarray, contexts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Return P of n-grams' last tokens, given P after the shorter contexts: (n,) float64."""
        counts = _look_up(grams, self.grams, self.counts)
        totals = _look_up(contexts, self.contexts, self.totals)
        kinds = _look_up(contexts, self.contexts, self.kinds)
        seen = (np.maximum(counts - self.discount, 0) + self.discount * kinds * shorter) / np.maximum(totals, 1)
        return np.where(totals > 0, seen, shorter)


class Trigram(NamedTuple):
    """Counts of one, two and three tokens in a row.

    Attributes:
        vocab_size: V.
        n_tokens: of the text that was counted.
        orders: for n-grams of length 1, 2 and 3.
    """

    vocab_size: int
    n_tokens: int
    orders: tuple[_Order, _Order, _Order]

    @property
    def sha256(self) -> str:
        """What tells these counts from others, in hexadecimal."""
        digest = hashlib.sha256(f"{self.vocab_size} {self.n_tokens}".encode())
        for order in self.orders:
            digest.update(order.grams.astype("<i8").tobytes() + order.counts.astype("<i8").tobytes())
        return digest.hexdigest()

    def logprobs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the log-probability of every token but the first, given the two before it: (n - 1,) float64."""
        tokens = _checked(ids, self.vocab_size)
        unigram, bigram, trigram = self.orders
        last, before = tokens[1:], tokens[:-1]
        uniform = np.full(len(last), 1 / self.vocab_size)
        one = unigram.probabilities(last, np.zeros_like(last), uniform)
        two = bigram.probabilities(before * self.vocab_size + last, before, one)
        pairs = before[:-1] * self.vocab_size + before[1:]
        three = trigram.probabilities(pairs * self.vocab_size + last[1:], pairs, two[1:])
        values: np.ndarray = np.log(np.concatenate([two[:1], three]))
        return values


def count(rows: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> Trigram:
    """Count the n-grams of token sequences; none reaches from one sequence into the next.

    Args:
        rows: ids of each.
        vocab_size: V, so many ids there are.

    Raises:
        GptlabError: no tokens, ids that are not below V, or a V whose third power has no room in 63 bits.
    """
    if vocab_size > _MOST_IDS:
        raise GptlabError(f"a trigram counts at most {_MOST_IDS:,} different ids, the tokenizer has {vocab_size:,}")
    grams: tuple[list[np.ndarray], ...] = ([], [], [])
    for row in rows:
        gram = tokens = _checked(row, vocab_size)
        for n, of_length in enumerate(grams):
            if n:
                gram = gram[:-1] * vocab_size + tokens[n:]
            of_length.append(gram)
    n_tokens = sum(map(len, grams[0]))
    if not n_tokens:
        raise GptlabError("there is no text to count a trigram on; name data with at least one token to train on")
    one, two, three = (_order(np.concatenate(of_length), vocab_size) for of_length in grams)
    return Trigram(vocab_size, n_tokens, (one, two, three))


def _order(grams: np.ndarray, vocab_size: int) -> _Order:
    numbers, counts = np.unique(grams, return_counts=True)
    contexts, firsts, kinds = np.unique(numbers // vocab_size, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, firsts) if len(firsts) else counts
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    # Without n-grams that were seen once there is no estimate, and yet something must be left for what was not seen.
    discount = once / (once + 2 * twice) if once else 0.5
    return _Order(numbers, counts, contexts, totals, kinds, min(discount, 1.0))


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values of keys, which ascend; 0 where there is no such key."""
    if not len(keys):
        return np.zeros_like(wanted)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _checked(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    tokens = np.asarray(ids, dtype=np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise GptlabError(f"ids from {tokens.min()} to {tokens.max()} do not fit a vocabulary of {vocab_size:,}")
    return tokens
