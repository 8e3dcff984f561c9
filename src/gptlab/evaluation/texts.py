"""Protocols that score running text: every token given those before it, in sliding windows."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation import data, detokenizers
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.protocol import Outcome, Settings, ids_sha256, perplexity
from gptlab.evaluation.scoring import Score, token_logprobs, window_length
from gptlab.evaluation.trigram import Trigram
from gptlab.model.gpt import GPT
from gptlab.text.documents import open_documents, sha256_of_documents
from gptlab.text.tokenizers import Tokenizer

FEW = 20
"""With fewer documents than this, each is divided into parts: a bootstrap over two documents says nothing."""
PART = 4096
"""Bytes of a part: bytes, so that models with different tokenizers are compared on the same parts."""


@dataclass(frozen=True)
class Document:
    """A text to be scored, and what its loss is divided by.

    Attributes:
        text: what the model is asked.
        words: of the original.
        bytes: of the original in UTF-8.
        original: whether ``text`` is itself the original.
    """

    text: str
    words: int
    bytes: int
    original: bool


def text_file(source: str, model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``text:FILE``: documents, each from the token on that begins a text, where the tokenizer has one."""
    documents, identity = _read_text(source, settings)
    scores, hashed = _score(model, tokenizer, documents, settings, progress)
    return _outcome(scores, {**identity, "ids_sha256": hashed, "from": start_of(tokenizer)})


def text_by_counts(source: str, trigram: Trigram, tokenizer: Tokenizer, settings: Settings) -> Outcome:
    """``text:FILE`` as `text_file`, by counts in place of a model; windows have no meaning for these."""
    documents, identity = _read_text(source, settings)
    before = [tokenizer.start_of_text] if tokenizer.start_of_text is not None else []
    texts = tokenizer.encode_batch([document.text for document in documents])
    sequences = [np.array(before + ids) for ids in texts]
    logprobs = [torch.from_numpy(trigram.logprobs(ids)) for ids in sequences]
    scores = _scores(documents, tokenizer, texts, logprobs)
    return _outcome(scores, {**identity, "ids_sha256": ids_sha256(sequences), "from": start_of(tokenizer)})


def _read_text(source: str, settings: Settings) -> tuple[list[Document], dict[str, object]]:
    """Return the documents of a text that are to be scored, and what tells it from others."""
    corpus = open_documents([source], text_field=settings.text_field)
    texts = tuple(corpus)
    documents = [_plain(text) for text in settings.first(texts)]
    unit = "part of a document" if len(documents) < FEW else "document"
    return documents, {"name": corpus.name, "sha256": sha256_of_documents(texts), "unit": unit}


def wikitext_token(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``wikitext:token``: the whole file as one text, as in Hugging Face's guide to perplexity."""
    source = data.read("wikitext", settings.paths)
    text = source.text()
    if settings.limit is not None:
        text = "\n".join(settings.first(list(detokenizers.pages(text))))
    document = _plain(detokenizers.wikitext_lines(text))
    scores, hashed = _score(model, tokenizer, [document], settings, progress, start=False)
    return _outcome(scores, {**source.identity(), "ids_sha256": hashed})


def wikitext_word(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``wikitext:word``: article by article, de-tokenized, as EleutherAI's harness."""
    source = data.read("wikitext", settings.paths)
    pages = settings.first(list(detokenizers.pages(source.text())))
    documents = [
        # The harness's count of words: a page begins with a space, and the nothing before it counts as one.
        Document(detokenizers.wikitext(page), len(re.split(r"\s+", page)), len(page.encode()), original=False)
        for page in pages
    ]
    scores, hashed = _score(model, tokenizer, documents, settings, progress, full_last=True)
    return _outcome(scores, {**source.identity(), "ids_sha256": hashed, "from": start_of(tokenizer)})


def start_of(tokenizer: Tokenizer) -> str | None:
    """Return the token from which each document is read, as text; None where the tokenizer has none."""
    return None if tokenizer.start_of_text is None else tokenizer.decode([tokenizer.start_of_text])


def _plain(text: str) -> Document:
    """Return a text that is its own original; a word is what white space surrounds."""
    encoded = text.encode()
    return Document(text, len(encoded.split()), len(encoded), original=True)


def _score(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    settings: Settings,
    progress: Progress | None,
    *,
    start: bool = True,
    full_last: bool = False,
) -> tuple[tuple[Score, ...], str]:
    """Return the score of each document, or of parts of few documents, and the hash of the ids.

    Args:
        model: what to measure.
        tokenizer: its own.
        documents: what to measure it on.
        settings: stride, context and dtype.
        progress: told how far it is.
        start: predict the first token too, from the one that begins a text, if the tokenizer has one.
        full_last: see `token_logprobs`.
    """
    before = [tokenizer.start_of_text] if start and tokenizer.start_of_text is not None else []
    texts = tokenizer.encode_batch([document.text for document in documents])
    sequences = [np.array(before + ids) for ids in texts]
    length = window_length(model, settings.context)
    if settings.stride is not None and max(map(len, sequences)) - 1 <= length:
        warnings.warn(f"stride {settings.stride} has no effect: every text fits into one window", stacklevel=2)
    logprobs = token_logprobs(
        model,
        sequences,
        stride=settings.stride,
        context=settings.context,
        full_last=full_last,
        dtype=settings.dtype,
        progress=progress,
    )
    return _scores(documents, tokenizer, texts, logprobs), ids_sha256(sequences)


def _scores(
    documents: Sequence[Document], tokenizer: Tokenizer, texts: Sequence[Sequence[int]], logprobs: Sequence[Tensor]
) -> tuple[Score, ...]:
    """Return the score of each document, or of parts of few, from the log-probabilities of its tokens."""
    scores: list[Score] = []
    for document, ids, values in zip(documents, texts, logprobs, strict=True):
        if document.original and len(documents) < FEW:
            scores += _parts(document.text, tokenizer, ids, values)
        else:
            scores.append(Score(-values.double().sum().item(), len(values), document.words, document.bytes))
    if not sum(score.tokens for score in scores):
        raise GptlabError("the text is a single token, of which nothing can be predicted; give more text")
    return tuple(scores)


def _parts(text: str, tokenizer: Tokenizer, ids: Sequence[int], logprobs: Tensor) -> list[Score]:
    """Divide the score of a document: a token or word belongs to the part in which its first byte is.

    The bytes of a first token that was not predicted are not counted.
    """
    content = np.frombuffer(text.encode(), dtype=np.uint8)
    sizes = [len(tokenizer.decode_bytes([token])) for token in ids]
    unscored = len(ids) - len(logprobs)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    space = np.isin(content, np.frombuffer(b" \t\n\r\x0b\x0c", dtype=np.uint8))
    word_starts = np.flatnonzero(~space & np.concatenate([[True], space[:-1]]))
    n = -(-len(content) // PART)
    # Tokens may stand for other bytes than the text's: an unknown token, a space that the tokenizer puts in front.
    tokens = torch.from_numpy(np.minimum(offsets[unscored:-1], len(content) - 1) // PART)
    nats = torch.zeros(n, dtype=torch.float64).index_add_(0, tokens, -logprobs.double()).tolist()
    n_tokens = torch.bincount(tokens, minlength=n).tolist()
    words = np.bincount(word_starts // PART, minlength=n).tolist()
    ends = [min((i + 1) * PART, len(content)) for i in range(n)]
    begin = min(int(offsets[unscored]), len(content) - 1)
    n_bytes = [end - max(i * PART, begin) for i, end in enumerate(ends)]
    return [Score(*values) for values in zip(nats, n_tokens, words, n_bytes, strict=True)]


def _outcome(scores: tuple[Score, ...], identity: dict[str, object]) -> Outcome:
    nats = sum(score.nats for score in scores)
    tokens, words, n_bytes = (sum(getattr(score, name) for score in scores) for name in ("tokens", "words", "bytes"))
    metrics = {
        "nats_per_token": nats / tokens,
        "token_perplexity": perplexity(nats / tokens),
        "word_perplexity": perplexity(nats / words),
        "bits_per_byte": nats / math.log(2) / n_bytes,
    }
    return Outcome(metrics, scores, identity)
