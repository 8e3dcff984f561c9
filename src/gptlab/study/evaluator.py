"""What every model of a study is asked: the same text, the same strings, the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.conversion.drift import measure_drift
from gptlab.errors import GptlabError
from gptlab.evaluation.heads import diagnose
from gptlab.evaluation.positions import loss_by_position
from gptlab.evaluation.probes import copy_at_distance, induction
from gptlab.evaluation.scoring import Result, Score
from gptlab.evaluation.tasks import evaluate as run_task
from gptlab.evaluation.tasks import evaluate_trigram
from gptlab.language_model import LanguageModel
from gptlab.study.directory import cached, key
from gptlab.study.results import AttentionMap, ByPosition, Copy, Heads, Induction, LayerHeads, Sample
from gptlab.study.settings import EvaluationSettings
from gptlab.text.documents import open_documents, sha256_of_documents
from gptlab.text.shards import Dataset
from gptlab.text.tokenizers import Tokenizer
from gptlab.training.counts import count_read
from gptlab.training.data import Items, Windows

STRING = 16
"""Tokens of a string that is to be copied."""
TEMPERATURE, TOP_K, SAMPLE_SEED = 0.8, 50, 0
HEAD_TOKENS = 256
MAP_TOKENS = 320
"""At most so many tokens of an attention map."""
DIVERGENCE_ROWS = 16
"""Windows for the divergence where a study does not say."""


class Evaluator:
    """The same text, strings and prompts for every model of a study; each result is kept.

    Every method takes a model and its `gptlab.study.directory.model_key`.

    Args:
        text: the held-out text, a file of documents.
        name: what to call it.
        settings: of the study.
        length: tokens of a window, which all models of the study can read.
        cache: the directory of results.
    """

    def __init__(self, text: Path, name: str, settings: EvaluationSettings, length: int, cache: Path) -> None:
        self.text, self.name, self.settings, self.length, self.cache = text, name, settings, length, cache
        self.documents = tuple(open_documents([str(text)]))
        self.sha256 = sha256_of_documents(self.documents)

    @property
    def protocol(self) -> str:
        """How the held-out text is scored, in words."""
        return (
            f"every token, each document from <|endoftext|>, windows of {self.length} tokens without overlap,"
            f" {self.settings.dtype}"
        )

    def score(self, lm: LanguageModel, model: str, length: int | None = None) -> Result:
        """Return the model's score on the text, in windows of ``length`` tokens, None the study's."""
        length = length or self.length

        def compute() -> dict[str, Any]:
            task = f"text:{self.text}"
            result = run_task(lm.model, lm.needs_tokenizer(), task, context=length, dtype=self.settings.dtype)
            return result.to_dict() | {"protocol": "text", "seconds": 0.0}

        return _result(self._cached("quality", model, compute, length=length, text=self.sha256, **self._dtype))

    def score_counts(self, dataset: Dataset, rows: Windows | Items, tokens: int, seed: int, like: Result) -> Result:
        """Return the score of a trigram on the text, in the units of a model's result.

        Args:
            dataset: that the models were trained on.
            rows: of its training part.
            tokens: of them that are counted.
            seed: of the run whose first rows these are.
            like: of a model.
        """

        def compute() -> dict[str, Any]:
            trigram = count_read(dataset, rows, tokens, seed)
            result = evaluate_trigram(trigram, dataset.tokenizer, replace(like, protocol=f"text:{self.text}"))
            return result.to_dict() | {"protocol": "text", "seconds": 0.0}

        parts = {"data": dataset.sha256, "length": rows.length, "tokens": tokens, "seed": seed, "text": self.sha256}
        return _result(self._cached("trigram", "", compute, **parts, **self._dtype))

    def divergence(self, base: LanguageModel, before: str, lm: LanguageModel, model: str) -> tuple[float, int]:
        """Return the mean KL(base || converted) in nats per token over the beginning of the text, and its tokens."""
        n_rows = self.settings.divergence

        def compute() -> dict[str, Any]:
            stream = self._stream(base.needs_tokenizer())[: n_rows * self.length]
            rows = torch.tensor(stream[: len(stream) // self.length * self.length]).view(-1, self.length)
            drift = measure_drift(base.model, lm.model, rows)
            return {"nats": drift.kl, "tokens": drift.tokens}

        settings = {"base": before, "length": self.length, "text": self.sha256}
        settings |= {"rows": n_rows} if n_rows != DIVERGENCE_ROWS else {}
        values = self._cached("divergence", model, compute, **settings)
        return values["nats"], values["tokens"]

    def by_position(self, lm: LanguageModel, model: str) -> ByPosition | None:
        """Return the loss by position, to several times the trained length; None where the text is too short.

        All models read the same pieces of text. One with learned positions reads the beginning of each, as far as its
        positions go: wherever two models are compared, they have seen and predict the same tokens.
        """
        settings, config = self.settings, lm.config

        def compute() -> dict[str, Any]:
            stream = self._stream(lm.needs_tokenizer())
            length = self.length * min(settings.positions, (len(stream) - 1) // self.length)
            if not length:
                return {}
            starts = range(0, len(stream) - length, length)[: settings.pieces]
            reach = min(length, config.context_length) if config.has_table else length
            inputs = [stream[i : i + reach + 1] for i in starts]
            rows = loss_by_position(lm.model, inputs, length=reach, dtype=settings.dtype)
            pieces = f"{len(starts)} piece{'s' * (len(starts) > 1)} of {length:,} tokens"
            return {
                "protocol": f"the same {pieces} for every model, cut from the documents one after the other and read as"
                f" far as its positions go, {settings.dtype}",
                "buckets": [[row.first, row.last] for row in rows],
                "nats": [row.nats for row in rows],
                "trained_length": config.context_length,
            }

        parts = {"length": self.length, "positions": settings.positions, "pieces": settings.pieces}
        values = self._cached("by_position", model, compute, text=self.sha256, **parts, **self._dtype)
        return ByPosition.model_validate_json(json.dumps(values)) if values else None

    def copying(self, lm: LanguageModel, model: str) -> list[Copy]:
        """Return how well random strings are reproduced, by distance."""
        distances = self.settings.distances
        if distances is None:
            distances = [STRING << i for i in range(32) if (STRING << i) + STRING <= self.length]
        n, words = self.settings.strings, _words(lm)
        length = min(STRING, (len(words) - 1) // 2)  # two strings and something between them, of different tokens
        if length < 2:
            return []

        def compute() -> dict[str, Any]:
            names = ("distance", "accuracy", "logprob", "accuracy_without", "logprob_without")
            dtype = self.settings.dtype
            copies = copy_at_distance(lm.model, distances, n=n, length=length, vocabulary=words, dtype=dtype)
            return {"rows": [dict(zip(Copy.model_fields, (getattr(c, n) for n in names), strict=True)) for c in copies]}

        parts = {"distances": distances, "n": n, "length": length}
        return [Copy(**row) for row in self._cached("copy", model, compute, **parts, **self._dtype)["rows"]]

    def induction(self, lm: LanguageModel, model: str) -> Induction:
        """Return the losses over random sequences that come twice, and the best induction head."""
        values = self._passes(lm, model)
        given = {name: values[name] for name in Induction.model_fields}
        return Induction(**given | {"best_head": tuple(values["best_head"])})

    def _passes(self, lm: LanguageModel, model: str) -> dict[str, Any]:
        n, words = self.settings.strings, _words(lm)
        period = max(min(64, self.length // 4, len(words)), 2)

        def compute() -> dict[str, Any]:
            losses = induction(lm.model, period=period, n=n, vocabulary=words)
            return {
                "first": losses.first,
                "second": losses.second,
                "best_head_score": losses.prefix_matching.max().item(),
                "best_head": list(divmod(int(losses.prefix_matching.argmax()), lm.config.n_head)),
                "period": period,
                "prefix_matching": _rounded(losses.prefix_matching),
            }

        return self._cached("induction", model, compute, period=period, n=n)

    def heads(self, lm: LanguageModel, model: str) -> Heads:
        """Return what the heads do on the beginning of the text, and how well each matches prefixes."""
        tokens = min(HEAD_TOKENS, self.length)

        def compute() -> dict[str, Any]:
            stream = self._stream(lm.needs_tokenizer())[:tokens]
            layers = diagnose(lm.model, torch.tensor([stream], device=lm.model.wte.weight.device))
            return {"layers": [{name: _rounded(value) for name, value in vars(layer).items()} for layer in layers]}

        layers = self._cached("heads", model, compute, tokens=tokens, text=self.sha256)["layers"]
        matching = self._passes(lm, model)["prefix_matching"]
        rows = [LayerHeads(**layer, prefix_matching=row) for layer, row in zip(layers, matching, strict=True)]
        return Heads(tokens=tokens, layers=rows)

    def samples(self, lm: LanguageModel, model: str) -> list[Sample]:
        """Return continuations of the study's prompts, or else of the first words of three documents."""
        beginnings = [_first_words(text, lm.needs_tokenizer(), self.length // 2) for text in self.documents[:3]]
        prompts = self.settings.prompts or beginnings

        def compute() -> dict[str, Any]:
            n = self.settings.sample_tokens
            texts = lm.generate(prompts, max_new_tokens=n, temperature=TEMPERATURE, top_k=TOP_K, seed=SAMPLE_SEED)
            return {"rows": [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]}

        parts = {"temperature": TEMPERATURE, "top_k": TOP_K, "seed": SAMPLE_SEED, "n": self.settings.sample_tokens}
        rows = self._cached("samples", model, compute, prompts=prompts, **parts)["rows"]
        return [Sample(**row) for row in rows]

    def attention_map(self, lm: LanguageModel, model: str, layer: int, head: int, tokens: int) -> AttentionMap | None:
        """Return what one head attends to on the beginning of the text; None where the model has no such head."""
        if layer >= lm.config.n_layer or head >= lm.config.n_head:
            return None
        tokens = min(tokens, self.length, MAP_TOKENS)

        def compute() -> dict[str, Any]:
            tokenizer = lm.needs_tokenizer()
            ids = self._stream(tokenizer)[:tokens]
            maps = lm.model.attention_maps(torch.tensor([ids], device=lm.model.wte.weight.device), layer)[0, head]
            weights = [[round(w, 3) for w in row[: i + 1]] for i, row in enumerate(maps.tolist())]
            return {"layer": layer, "head": head, "tokens": [tokenizer.decode([i]) for i in ids], "weights": weights}

        parts = {"layer": layer, "head": head, "tokens": tokens, "text": self.sha256}
        return AttentionMap(**self._cached("map", model, compute, **parts))

    @property
    def _dtype(self) -> dict[str, Any]:
        """What the dtype adds to the keys of results; nothing for float32, which needs no mention."""
        return {} if self.settings.dtype == "float32" else {"dtype": self.settings.dtype}

    def _cached(self, what: str, model: str, compute: Callable[[], dict[str, Any]], **parts: Any) -> dict[str, Any]:
        return cached(self.cache, key("evaluate", what=what, model=model, **parts), compute)

    def _stream(self, tokenizer: Tokenizer) -> list[int]:
        """The documents one after the other, as in training."""
        before, after = tokenizer.between[-1:], tokenizer.between[:-1]
        texts = tokenizer.encode_batch(list(self.documents))
        return [token for ids in texts for token in (*before, *ids, *after)]


def check_settings(settings: EvaluationSettings, length: int, tokenizer: Tokenizer | None) -> None:
    """Refuse, before anything is trained, what models of this length and with this tokenizer cannot be asked.

    Args:
        settings: of the study.
        length: tokens that all of its models can read.
        tokenizer: of those that are trained, or None where none is.
    """
    for distance in settings.distances or ():
        if not STRING <= distance <= length - STRING:
            raise GptlabError(
                f"evaluate.distances has {distance}, but strings of {STRING} tokens in a context of {length} can stand"
                f" {STRING} to {length - STRING} tokens from each other"
            )
    for prompt in settings.prompts if tokenizer is not None else ():
        try:
            n_tokens = len(tokenizer.encode(prompt)) if tokenizer is not None else 0
        except GptlabError as error:
            raise GptlabError(f"evaluate.prompts has {prompt!r}, which cannot be encoded: {error}") from None
        if not 0 < n_tokens < length:
            raise GptlabError(f"evaluate.prompts has {prompt!r} of {n_tokens} tokens; the context holds {length}")


def _result(values: dict[str, Any]) -> Result:
    columns = values["scores"]
    scores = tuple(Score(*row) for row in zip(*(columns[name] for name in Score.__annotations__), strict=True))
    return Result(**{**values, "scores": scores})


def _words(lm: LanguageModel) -> Sequence[int]:
    """The ids that stand for text."""
    tokenizer = lm.needs_tokenizer()
    return [i for i in tokenizer.known_ids(lm.config.vocab_size) if i != tokenizer.end_of_text]


def _first_words(text: str, tokenizer: Tokenizer, n_tokens: int, most: int = 40) -> str:
    """The beginning of a text, in whole words where there is more than one, and in at most so many tokens."""
    start = text.lstrip()[:most]
    while len(start) > 1 and (len(start) == most or len(tokenizer.encode(start)) > n_tokens):
        words = start.rsplit(None, 1)
        start = words[0] if len(words) > 1 else start[:-1]
    return start


def _rounded(values: Tensor) -> Any:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda x: round(float(x), 5))
