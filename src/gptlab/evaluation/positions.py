"""Loss as a function of position: does a model use its context, and what does it do beyond it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.protocol import Settings
from gptlab.evaluation.scoring import Ids, as_ids, token_logprobs, window_length
from gptlab.model.gpt import GPT
from gptlab.text.documents import open_documents
from gptlab.text.records import TEXT_FIELD
from gptlab.text.tokenizers import Tokenizer

BEYOND = 16
"""How many times its trained length a model without learned positions is followed."""


@dataclass(frozen=True)
class Position:
    """Mean loss at a range of positions.

    Attributes:
        first: least number of tokens that the model had seen before its prediction.
        last: largest number.
        nats: mean loss per token.
        error: standard error of that mean, over pieces of text; nan for a single piece.
        tokens: predictions that went into it.
    """

    first: int
    last: int
    nats: float
    error: float
    tokens: int


def loss_by_position(
    model: GPT,
    sequences: Sequence[Ids],
    *,
    length: int,
    batch_tokens: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> list[Position]:
    """Return the mean loss for ranges of positions: 1 to 16 tokens seen, 17 to 32, and on in powers of two.

    All ranges are measured on the same pieces of text, each of ``length + 1`` tokens, cut from the sequences one after
    the other; what is left at the end of a sequence is not used. The model's own ``context_length`` is the end of a
    range, so that no range mixes what it was trained on with what it was not.

    Args:
        model: as in `token_logprobs`.
        sequences: token ids of each.
        length: tokens of the longest context; beyond the model's own only without learned positions.
        batch_tokens: as in `token_logprobs`.
        dtype: as in `token_logprobs`.
        progress: as in `token_logprobs`.

    Raises:
        GptlabError: no sequence is long enough, or the model cannot read that far.
    """
    length = window_length(model, length)
    arrays = [as_ids(model, ids) for ids in sequences]
    pieces = [ids[i : i + length + 1] for ids in arrays for i in range(0, len(ids) - length, length)]
    if not pieces:
        longest = max(map(len, arrays), default=0)
        raise GptlabError(
            f"no document has the {length + 1:,} tokens that a position of {length:,} needs (the longest has"
            f" {longest:,}); ask for fewer positions, or bring a longer text"
        )
    logprobs = token_logprobs(model, pieces, context=length, batch_tokens=batch_tokens, dtype=dtype, progress=progress)
    nats = -torch.stack(logprobs).double()  # (pieces, length); column p was predicted from p + 1 tokens
    ends = [end for end in (16 << i for i in range(64)) if end < length]
    ends = sorted({*ends, *[end for end in [model.config.context_length] if end < length], length})
    ranges = zip([0, *ends], ends, strict=False)
    return [_position(nats[:, first:last], first, last) for first, last in ranges]


def _position(nats: Tensor, first: int, last: int) -> Position:
    means = nats.mean(1)  # one for each piece: losses within a piece are not independent
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Position(first + 1, last, means.mean().item(), error, nats.numel())


def positions_in_text(
    model: GPT,
    tokenizer: Tokenizer,
    source: str,
    *,
    context: int | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    text_field: str = TEXT_FIELD,
    progress: Progress | None = None,
) -> list[Position]:
    """Return `loss_by_position` for a text file or directory.

    Args:
        model: as in `token_logprobs`.
        tokenizer: its own.
        source: as in `gptlab.text.documents.open_documents`.
        context: tokens of the longest context. By default 16 times the model's own, or the model's own where positions
            are learned, halved until a document is long enough.
        limit: take the first so many documents only.
        dtype: as in `token_logprobs`.
        text_field: of records, where the text is a file of them.
        progress: as in `token_logprobs`.
    """
    before = [] if tokenizer.start_of_text is None else [tokenizer.start_of_text]
    documents = Settings(limit=limit).first(tuple(open_documents([source], text_field=text_field)))
    sequences = [before + ids for ids in tokenizer.encode_batch(documents)]
    if context is None:
        context = model.config.context_length * (1 if model.config.has_table else BEYOND)
        longest = max(map(len, sequences))
        while context >= longest and context > 1:
            context //= 2
    return loss_by_position(model, sequences, length=context, dtype=dtype, progress=progress)
