"""Pairs of what is given and what is asked for, as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from gptlab.evaluation.protocol import ids_sha256
from gptlab.evaluation.scoring import Completion
from gptlab.text.tokenizers import Tokenizer

Pair = tuple[list[int], list[int]]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode a text that is given and one that is asked for, as EleutherAI's harness: together, then cut.

    White space at the end of the context goes to the continuation.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    ids = tokenizer.encode(kept)
    return ids, whole[len(ids) :]


def nats(answer: Completion) -> float:
    """Return the nats of an answer in all."""
    return -answer.logprobs.double().sum().item()


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Return the checksum of all ids."""
    return ids_sha256(ids for pair in pairs for ids in pair)
