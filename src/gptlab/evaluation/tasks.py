"""The table of protocols, and the function that runs one."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptlab.errors import GptlabError, nearest
from gptlab.evaluation import hellaswag, lambada, texts
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.protocol import Outcome, Protocol, Settings
from gptlab.evaluation.scoring import Result, check_stride, window_length
from gptlab.evaluation.trigram import NAME, Trigram
from gptlab.model.cost import parameters
from gptlab.model.gpt import GPT
from gptlab.text.records import TEXT_FIELD
from gptlab.text.tokenizers import Tokenizer

_GPT2_ISSUE = "huggingface/transformers issue 13761"
_NANOGPT = "karpathy/build-nanogpt, hellaswag.py"
_HARNESS = "EleutherAI/lm-evaluation-harness issue 2159"

TASKS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "wikitext:token",
            "WikiText-2 raw test as one text, lines joined by blank lines, no de-tokenizer; loss per token",
            texts.wikitext_token,
            "wikitext",
            ("nats_per_token", "token_perplexity"),
            sliding=True,
            original={"token_perplexity": 29.94},
            source=_GPT2_ISSUE,
        ),
        Protocol(
            "wikitext:word",
            "WikiText-2 raw test, article by article, de-tokenized, each last window full; loss per"
            " word and byte of the original",
            texts.wikitext_word,
            "wikitext",
            ("word_perplexity", "bits_per_byte"),
            sliding=True,
            original={"word_perplexity": 37.37},
            source=_GPT2_ISSUE,
        ),
        Protocol(
            "lambada:last-word",
            "LAMBADA test, OpenAI's file: greedy decoding gives all tokens of the last word; perplexity of the word",
            lambada.lambada_last_word,
            "lambada",
            ("accuracy", "perplexity"),
            original={"accuracy": 0.3256, "perplexity": 40.06},
            source=_HARNESS,
        ),
        Protocol(
            "lambada:last-token",
            "LAMBADA test, OpenAI's file: the last token of the passage, given all before it; perplexity of the token",
            lambada.lambada_last_token,
            "lambada",
            ("accuracy", "perplexity"),
            original={"accuracy": 0.4667},
            source=_GPT2_ISSUE,
        ),
        Protocol(
            "lambada:last-token-stopwords",
            "as lambada:last-token, with the likeliest token that is none of 127 English stop words",
            lambada.lambada_stop_words,
            "lambada",
            ("accuracy",),
        ),
        Protocol(
            "hellaswag:completion",
            "HellaSwag validation, context and endings as they are: the ending with the least loss, and with the least"
            " loss per token (norm)",
            hellaswag.hellaswag_completion,
            "hellaswag",
            ("accuracy", "accuracy_norm"),
            original={"accuracy": 0.2859, "accuracy_norm": 0.2955},
            source=_NANOGPT,
        ),
        Protocol(
            "hellaswag:lm-eval",
            "HellaSwag validation, activity first, brackets removed: the ending with the least loss, and with the least"
            " loss per character (norm)",
            hellaswag.hellaswag_harness,
            "hellaswag",
            ("accuracy", "accuracy_norm"),
            original={"accuracy": 0.2892, "accuracy_norm": 0.3114},
            source=_NANOGPT,
        ),
    )
}
"""Protocols by name; beside them ``text:FILE`` scores any text, see `protocol_of`."""


def protocol_of(task: str) -> Protocol:
    """Return the protocol of a name.

    Args:
        task: a key of `TASKS`, or ``text:`` and the path of a file or directory.

    Raises:
        GptlabError: no such protocol.
    """
    kind, _, variant = task.partition(":")
    if kind == "text":
        if not variant:
            raise GptlabError("text: needs the path of a text after it, as in text:novel.txt")
        return Protocol(
            task,
            "every token of the text, document by document",
            functools.partial(texts.text_file, variant),
            None,
            ("nats_per_token", "token_perplexity", "word_perplexity", "bits_per_byte"),
            sliding=True,
        )
    if task in TASKS:
        return TASKS[task]
    if variants := [name for name in TASKS if name.startswith(f"{kind}:")]:
        raise GptlabError(f"{kind!r} is measured by several protocols; name one: {', '.join(variants)}")
    names = [*TASKS, "text:FILE"]
    raise GptlabError(f"unknown task {task!r}{nearest(task, names)}; there are {', '.join(names)}")


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    task: str,
    *,
    name: str = "",
    stride: int | None = None,
    context: int | None = None,
    dtype: str = "float32",
    limit: int | None = None,
    data: Mapping[str, Path] | None = None,
    text_field: str = TEXT_FIELD,
    progress: Progress | None = None,
) -> Result:
    """Measure a model by one protocol.

    Args:
        model: what to measure.
        tokenizer: the one it was trained with.
        task: see `protocol_of`.
        name: what to call the model in the result.
        stride: tokens between the starts of two windows, in protocols that score running text; by default no overlap.
        context: tokens that the model sees at most; by default its own context.
        dtype: ``float32`` or ``bfloat16``, see `token_logprobs`.
        limit: take the first so many documents only.
        data: files by name of data set, see `gptlab.evaluation.data.read`.
        text_field: of records, where the text of ``text:FILE`` is a file of them.
        progress: called with the tokens done and the tokens in all.

    Raises:
        GptlabError: an unknown task, data that is not there, a tokenizer that does not fit, impossible settings.
    """
    protocol = protocol_of(task)
    chosen: dict[str, Any] = {"context": window_length(model, context), "dtype": dtype, "limit": limit}
    if protocol.sliding:
        chosen["stride"] = check_stride(stride, chosen["context"])
    elif stride is not None:
        raise GptlabError(f"stride has no meaning in {task}; leave it out")
    settings = Settings(stride, context, dtype, limit, data or {}, text_field)
    started = time.perf_counter()
    outcome = protocol.run(model, tokenizer, settings, progress)
    seconds = time.perf_counter() - started
    return Result(
        protocol=protocol.name,
        settings=chosen,
        model=identity(model, name),
        data=outcome.data,
        metrics=_metrics(outcome, protocol),
        scores=outcome.scores,
        seconds=seconds,
    )


def evaluate_trigram(trigram: Trigram, tokenizer: Tokenizer, like: Result, text_field: str = TEXT_FIELD) -> Result:
    """Measure counts by the protocol of a model's result, on the same text in the same units.

    Args:
        trigram: counted with the same tokenizer.
        tokenizer: of the model.
        like: of the model, by ``text:FILE``.
        text_field: as for the model.

    Raises:
        GptlabError: another protocol.
    """
    kind, _, source = like.protocol.partition(":")
    if kind != "text":
        raise GptlabError(f"a trigram is measured on running text, not by {like.protocol}; give a --task text:FILE")
    settings = Settings(limit=like.settings["limit"], text_field=text_field)
    started = time.perf_counter()
    outcome = texts.text_by_counts(source, trigram, tokenizer, settings)
    return Result(
        protocol=like.protocol,
        settings=like.settings,
        model={"name": NAME, "parameters": 0, "sha256": trigram.sha256},
        data=outcome.data,
        metrics=outcome.metrics,
        scores=outcome.scores,
        seconds=time.perf_counter() - started,
    )


def _metrics(outcome: Outcome, protocol: Protocol) -> dict[str, float]:
    """Return the numbers that are finite; where the model answered nan, all numbers are that, accuracies too."""
    if any(math.isnan(score.nats) for score in outcome.scores):
        return dict.fromkeys(protocol.metrics, math.nan)
    return {key: value for key, value in outcome.metrics.items() if math.isfinite(value)}


@torch.no_grad()
def identity(model: GPT, name: str) -> dict[str, Any]:
    """Return what tells a model from others: name, number of parameters, sha256 of names and weights."""
    digest = hashlib.sha256()
    quantised = ((key, buffer) for key, buffer in model.named_buffers() if "." in key)
    for key, parameter in (*model.named_parameters(), *quantised):
        digest.update(f"{key} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {
        "name": name,
        "parameters": sum(parameters(model.config).values()),
        "sha256": digest.hexdigest(),
    }
