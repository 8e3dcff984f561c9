"""Protocols of HellaSwag: the right one of four endings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptlab.errors import GptlabError
from gptlab.evaluation import data, detokenizers
from gptlab.evaluation.batches import Progress
from gptlab.evaluation.pairs import Pair, encode_pair, nats, pairs_sha256
from gptlab.evaluation.protocol import Outcome, Settings, mean_and_error
from gptlab.evaluation.scoring import Score, completion_logprobs
from gptlab.model.gpt import GPT
from gptlab.text.tokenizers import Tokenizer


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
        losses = [nats(answer) for answer in asked[part]]
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
    return Outcome(metrics, tuple(scores), {**source.identity(), "ids_sha256": pairs_sha256(pairs)})


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
