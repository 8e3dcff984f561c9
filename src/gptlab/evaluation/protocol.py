"""What a protocol is: how text becomes questions to a model, and answers become numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gptlab.errors import GptlabError
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.scoring import Ids, Score
from gptlab.model.gpt import GPT
from gptlab.text.records import TEXT_FIELD
from gptlab.text.tokenizers import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a user may choose within a protocol.

    Attributes:
        stride: tokens between the starts of two windows; None is the window itself: no overlap.
        context: tokens of a window; None is the model's own context.
        dtype: ``float32`` or ``bfloat16``.
        limit: the first so many documents, passages or items only; None is all.
        paths: files by name of data set, see `gptlab.evaluation.data.read`.
        text_field: of records, where a text is a file of them.
    """

    stride: int | None = None
    context: int | None = None
    dtype: str = "float32"
    limit: int | None = None
    paths: Mapping[str, Path] = field(default_factory=dict)
    text_field: str = TEXT_FIELD

    def first(self, documents: Sequence[T]) -> Sequence[T]:
        """Return the documents that `limit` leaves.

        Raises:
            GptlabError: a limit below one.
        """
        if self.limit is not None and self.limit < 1:
            raise GptlabError(f"limit must be at least 1, got {self.limit}")
        return documents[: self.limit]


class Outcome(NamedTuple):
    """What a protocol's function returns; `gptlab.evaluation.tasks.evaluate` makes a `Result` of it."""

    metrics: dict[str, float]
    scores: tuple[Score, ...]
    data: dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """A way to obtain numbers.

    Attributes:
        name: ``task:variant``.
        definition: in one sentence, what is asked and what is divided by what.
        run: does it.
        data: name of the data set, a key of `gptlab.evaluation.data.SOURCES`; None where the name has a path.
        metrics: names of the numbers, in the order in which to show them.
        sliding: whether stride and context have a meaning in it.
        original: what OpenAI's 124M gives with the default settings, by metric.
        source: who published that.
    """

    name: str
    definition: str
    run: Callable[[GPT, Tokenizer, Settings, Progress | None], Outcome]
    data: str | None
    metrics: tuple[str, ...]
    sliding: bool = False
    original: Mapping[str, float] = field(default_factory=dict)
    source: str = ""


def ids_sha256(sequences: Iterable[Ids]) -> str:
    """Return a hash of token ids and of where each sequence ends, in hexadecimal."""
    digest = hashlib.sha256()
    for ids in sequences:
        array = np.asarray(ids, dtype="<i8")
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def perplexity(nats: float) -> float:
    """Return e to the power of a mean loss; infinity where no float is large enough."""
    return math.exp(nats) if nats < 709 else math.inf
