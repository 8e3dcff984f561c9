"""Texts that come and go in plain PyTorch: their caches are joined, so that one forward pass reads a token of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptlab.generation.compiled.step import Text
from gptlab.generation.memory import check_memory
from gptlab.generation.padded import FEWER, last_logits
from gptlab.model.cache import Cache
from gptlab.model.gpt import GPT


class Together:
    """Reads one token in each of a few sequences, on every device and for every dtype.

    The rows of a forward pass share its shapes, so a text's logits depend on the others, by rounding alone.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._texts: list[Text] = []
        self._cache: Cache | None = None

    def __call__(self, texts: Sequence[Text], ids: Sequence[int]) -> Tensor:
        """Return the logits (B, V) float32 that follow ``ids``, one new token of each text; the texts grow by it.

        Args:
            texts: those of the last step that go on, in their order, then new ones, whose caches are taken over; all
                caches of the same length.
            ids: B of them.

        Raises:
            GptlabError: more memory needed than there is.
        """
        cache = self._join(texts)
        device = self._model.wte.weight.device
        if more := cache.growth(1):
            check_memory(more, device, f"going on after {cache.layers[0].seen:,} tokens takes", FEWER)
        logits: Tensor = self._model(torch.tensor(ids, device=device)[:, None], cache=cache, head=last_logits)
        for text in texts:
            text.length += 1
        return logits

    def keep(self, texts: Sequence[Text]) -> None:
        """Let go of all texts but these."""
        kept = set(map(id, texts))
        staying = [i for i, text in enumerate(self._texts) if id(text) in kept]
        if self._cache is not None and 0 < len(staying) < len(self._texts):
            self._cache.keep(staying)
        self._texts = [self._texts[i] for i in staying]
        if not staying:
            self._cache = None

    def _join(self, texts: Sequence[Text]) -> Cache:
        """Return one cache of all texts, row by row."""
        self.keep(texts)
        new = list(texts[len(self._texts) :])
        if new:
            first, *rest = (
                [text.cache for text in new] if self._cache is None else [self._cache, *(t.cache for t in new)]
            )
            if rest:
                first.join(rest)
            self._cache = first
            for text in new:
                text.cache = first  # its own is not needed any more
            self._texts += new
        assert self._cache is not None
        return self._cache
