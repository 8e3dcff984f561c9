"""Protocols that ask for an answer: the last word of a passage, the right one of four endings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation import data, detokenizers
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.protocol import Outcome, Settings, ids_sha256, mean_and_error, perplexity
from gptlab.evaluation.scoring import Completion, Score, completion_logprobs
from gptlab.model.gpt import GPT
from gptlab.text.tokenizers import Tokenizer

# NLTK's first English list, which those who evaluated GPT-2 on LAMBADA used; the paper does not name its own.
_STOP_WORDS = """
    a about above after again against all am an and any are as at be because been before being below between both but
    by can did do does doing don down during each few for from further had has have having he her here hers herself him
    himself his how i if in into is it its itself just me more most my myself no nor not now of off on once only or
    other our ours ourselves out over own s same she should so some such t than that the their theirs them themselves
    then there these they this those through to too under until up very was we were what when where which while who
    whom why will with you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

Pair = tuple[list[int], list[int]]


def lambada_last_word(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``lambada:last-word``: all tokens of the last word, as EleutherAI's harness asks for it."""
    return _lambada(model, tokenizer, settings, progress, whole_word=True)


def lambada_last_token(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``lambada:last-token``: the last token alone, given those of the same word before it."""
    return _lambada(model, tokenizer, settings, progress, whole_word=False)


def lambada_stop_words(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``lambada:last-token-stopwords``: the likeliest last token that is not a stop word."""
    # Ids beyond the tokenizer's, in a vocabulary padded for speed, are not words at all.
    never = torch.ones(model.config.vocab_size, dtype=torch.bool)
    for token in tokenizer.known_ids(len(never)):
        never[token] = tokenizer.decode([token]).strip() in STOP_WORDS
    outcome = _lambada(model, tokenizer, settings, progress, whole_word=False, never=never)
    del outcome.metrics["perplexity"]  # the filter changes no probability: it is that of lambada:last-token
    return outcome


def hellaswag_completion(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``hellaswag:completion``: the text as it is, mean loss per token, as nanoGPT's author does it."""
    source, items = _hellaswag_items(settings)
    pairs = [
        (tokenizer.encode(item["ctx"]), tokenizer.encode(" " + ending)) for item in items for ending in item["endings"]
    ]
    sizes = [len(ending) for _, ending in pairs]
    return _choose(model, settings, progress, source, items, pairs, sizes)


def hellaswag_harness(model: GPT, tokenizer: Tokenizer, settings: Settings, progress: Progress | None) -> Outcome:
    """``hellaswag:lm-eval``: activity and cleaned text, mean loss per character, as EleutherAI's harness."""
    source, items = _hellaswag_items(settings)
    pairs, sizes = [], []
    for number, item in enumerate(items, 1):
        context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
        for ending in map(detokenizers.hellaswag, item["endings"]):
            if not ending.strip():
                raise GptlabError(
                    f"item {number} of {source.file} has an ending with nothing outside its brackets, which this"
                    " protocol removes; leave the item out, or measure hellaswag:completion"
                )
            pairs.append(encode_pair(tokenizer, detokenizers.hellaswag(context), " " + ending))
            sizes.append(len(ending))
    return _choose(model, settings, progress, source, items, pairs, sizes)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode a text that is given and one that is asked for, as EleutherAI's harness: together, then cut.

    White space at the end of the context goes to the continuation.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    ids = tokenizer.encode(kept)
    return ids, whole[len(ids) :]


def _lambada(
    model: GPT,
    tokenizer: Tokenizer,
    settings: Settings,
    progress: Progress | None,
    *,
    whole_word: bool,
    never: Tensor | None = None,
) -> Outcome:
    source = data.read("lambada", settings.paths)
    passages = [item["text"] for item in settings.first(source.items({"text": str}))]
    words = [text.split(" ")[-1] for text in passages]
    for number, (text, word) in enumerate(zip(passages, words, strict=True), 1):
        if not word.strip():
            raise GptlabError(f"passage {number} of {source.file} ends in white space, not in a word; remove that")
        if not text[: len(text) - len(word)].strip():
            raise GptlabError(f"passage {number} of {source.file} has no words before its last one; leave it out")
    if whole_word:
        contexts = [text[: len(text) - len(word) - 1] for text, word in zip(passages, words, strict=True)]
        pairs = [encode_pair(tokenizer, c, " " + word) for c, word in zip(contexts, words, strict=True)]
    else:
        pairs = [(ids[:-1], ids[-1:]) for ids in tokenizer.encode_batch(passages)]
    for number, (context, answer) in enumerate(pairs, 1):
        if not context or not answer:
            raise GptlabError(f"passage {number} of {source.file} has no words before its last one; leave it out")
    asked = completion_logprobs(
        model, pairs, context=settings.context, dtype=settings.dtype, never=never, progress=progress
    )
    scores = tuple(
        Score(_nats(answer), len(answer.ids), 1, len(word.encode()), int(answer.greedy))
        for answer, word in zip(asked, words, strict=True)
    )
    accuracy, error = mean_and_error([answer.greedy for answer in asked])
    mean = sum(score.nats for score in scores) / len(scores)
    metrics = {"accuracy": accuracy, "accuracy_error": error, "perplexity": perplexity(mean)}
    return Outcome(metrics, scores, {**source.identity(), "ids_sha256": _hash(pairs)})


def _hellaswag_items(settings: Settings) -> tuple[data.Data, Sequence[dict[str, Any]]]:
    source = data.read("hellaswag", settings.paths)
    text = dict.fromkeys(("ctx", "ctx_a", "ctx_b", "activity_label"), str)
    items = settings.first(source.items({**text, "endings": list, "label": (int, str)}))
    for number, item in enumerate(items, 1):
        for which, ending in enumerate(item["endings"], 1):
            if not isinstance(ending, str) or not ending.strip():
                raise GptlabError(
                    f"item {number} of {source.file} has {ending!r} as its ending {which}, which is not text; mend the"
                    " item, or leave it out"
                )
        if not item["ctx"].strip():
            raise GptlabError(f"item {number} of {source.file} has no context; mend the item, or leave it out")
        if str(item["label"]) not in map(str, range(len(item["endings"]))):
            raise GptlabError(
                f"item {number} of {source.file} names no right ending; only labelled items can be scored"
            )
    return source, items


def _choose(
    model: GPT,
    settings: Settings,
    progress: Progress | None,
    source: data.Data,
    items: Sequence[dict[str, Any]],
    pairs: Sequence[Pair],
    sizes: Sequence[int],
) -> Outcome:
    """Let the model choose the likeliest ending of each item: by whole loss, and by loss divided by ``sizes``."""
    asked = completion_logprobs(model, pairs, context=settings.context, dtype=settings.dtype, progress=progress)
    plain, scores, end = [], [], 0
    for item in items:
        part = slice(end, end := end + len(item["endings"]))
        losses = [_nats(answer) for answer in asked[part]]
        per_size = [loss / size for loss, size in zip(losses, sizes[part], strict=True)]
        right = int(item["label"])
        plain.append(_least(losses) == right)
        ending = item["endings"][right]
        correct = int(_least(per_size) == right)
        n_tokens = len(asked[part][right].ids)
        scores.append(Score(losses[right], n_tokens, len(ending.split()), len(ending.encode()), correct))
    accuracy, error = mean_and_error(plain)
    normalised, normalised_error = mean_and_error([score.correct or 0 for score in scores])
    metrics = {
        "accuracy": accuracy,
        "accuracy_error": error,
        "accuracy_norm": normalised,
        "accuracy_norm_error": normalised_error,
    }
    return Outcome(metrics, tuple(scores), {**source.identity(), "ids_sha256": _hash(pairs)})


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _nats(answer: Completion) -> float:
    return -answer.logprobs.double().sum().item()


def _hash(pairs: Sequence[Pair]) -> str:
    return ids_sha256(ids for pair in pairs for ids in pair)
