"""The text on which a conversion is fitted, and the rows that are kept back to measure it on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.text.documents import open_documents
from gptlab.text.tokenizers import Tokenizer

DEFAULT_TEXT = "pydoc"
"""Python's language reference: 465,000 characters of English that every Python carries."""
TOKENS, TOKENS_PER_CHANNEL = 8192, 8
"""How much to fit on where nobody says: the larger of the two.

On the built-in model, 192 wide, ``svd`` adds less than half as much to the loss with 6,144 tokens as with 1,536.
"""
MOST_CHARACTERS = 1 << 22
"""Of a longer text only so many characters from its start are read."""
LONGEST_ROW = 2048
"""Rows are no longer than this, however long the context."""


def calibration_rows(
    tokenizer: Tokenizer, length: int, n_tokens: int, source: str | Path = DEFAULT_TEXT
) -> list[Tensor]:
    """Return rows of a text, spread evenly over it; all of them where it has fewer than asked for.

    Each document is preceded by ``<|endoftext|>``, where the tokenizer has it, as in training.

    Args:
        tokenizer: the model's.
        length: tokens of a row, T; the model's context, or less.
        n_tokens: tokens in all, rounded up to whole rows.
        source: a file, a directory, or a name such as ``pydoc`` or ``stdlib``.

    Returns:
        Tensors (T,) int64.

    Raises:
        GptlabError: no such text, one that is shorter than a row, or one that the tokenizer cannot write.
    """
    if n_tokens < 1:
        raise GptlabError(f"a calibration text has at least 1 token, got {n_tokens}")
    ids: list[int] = []
    left = MOST_CHARACTERS
    for document in open_documents([str(source)]):
        try:
            ids += [*tokenizer.between[-1:], *tokenizer.encode(document[:left]), *tokenizer.between[:-1]]
        except GptlabError as error:
            raise GptlabError(
                f"of the calibration text {source} {error}, or name another text (--calibration)"
            ) from None
        left -= len(document)
        if left <= 0:
            break
    there = len(ids) // length
    if not there:
        raise GptlabError(
            f"the calibration text {source} has {len(ids):,} tokens, fewer than the {length:,} of the model's context;"
            " give a longer one"
        )
    wanted = min(-(-n_tokens // length), there)
    starts = (i * there // wanted * length for i in range(wanted))
    return [torch.tensor(ids[start : start + length]) for start in starts]


def default_tokens(n_embd: int) -> int:
    """Return how many tokens to fit on where nobody says, for a model ``n_embd`` wide."""
    return max(TOKENS, TOKENS_PER_CHANNEL * n_embd)


def keep_back(rows: Sequence[Tensor], n_rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Divide rows into those to fit on and ``n_rows`` to measure on, spread evenly among them.

    Where there are few rows, at most half are kept back; of a single row none.
    """
    n_rows = min(n_rows, len(rows) // 2)
    kept = {(2 * i + 1) * len(rows) // (2 * n_rows) for i in range(n_rows)}
    return (
        [row for i, row in enumerate(rows) if i not in kept],
        [row for i, row in enumerate(rows) if i in kept],
    )


def sha256_of_rows(rows: Sequence[Tensor]) -> str:
    """Return a hash of token ids, and of where each row ends, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(hashlib.sha256(row.to(torch.int64).numpy().data).digest())
    return digest.hexdigest()
