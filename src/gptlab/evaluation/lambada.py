"""Protocols of LAMBADA: the last word of a passage."""

from __future__ import annotations

import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.evaluation import data
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.pairs import encode_pair, nats, pairs_sha256
from gptlab.evaluation.protocol import Outcome, Settings, mean_and_error, perplexity
from gptlab.evaluation.scoring import Score, completion_logprobs
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
        Score(nats(answer), len(answer.ids), 1, len(word.encode()), int(answer.greedy))
        for answer, word in zip(asked, words, strict=True)
    )
    accuracy, error = mean_and_error([answer.greedy for answer in asked])
    mean = sum(score.nats for score in scores) / len(scores)
    metrics = {"accuracy": accuracy, "accuracy_error": error, "perplexity": perplexity(mean)}
    return Outcome(metrics, scores, {**source.identity(), "ids_sha256": pairs_sha256(pairs)})
