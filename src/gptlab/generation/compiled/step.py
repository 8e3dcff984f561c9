"""Decoding by the C++ step: sequences that share nothing but the reading of the weights."""

from __future__ import annotations

import ctypes
import operator
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gptlab.errors import GptlabError
from gptlab.generation.compiled.layout import Layout
from gptlab.generation.compiled.library import library
from gptlab.model.cache import Cache, Ring
from gptlab.model.gpt import GPT

SLOTS = np.dtype([("k", "u8"), ("v", "u8"), ("positions", "u8"), ("stride", "i8"), ("capacity", "i8")])
"""A layer of a cache as step.cpp has it."""


def n_threads() -> int:
    """Return how many threads compute a step: PyTorch's number, but never more than there are cores, as they spin."""
    if hasattr(os, "sched_getaffinity"):
        return min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    return torch.get_num_threads()


class Text:
    """One growing sequence with a cache of its own.

    Attributes:
        cache: of one row, which holds the tokens so far.
        length: how many they are.
        slots: (n_layer,) `SLOTS`, where the cache lies.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.length = cache.layers[0].seen
        self.slots = np.empty(len(cache.layers), SLOTS)
        self._locate()

    def _locate(self) -> None:
        for i, layer in enumerate(self.cache.layers):
            addresses = layer.k.data_ptr(), layer.v.data_ptr(), layer.positions.data_ptr()
            self.slots[i] = (*addresses, layer.k.shape[2], min(layer.capacity, 2**62))
        # A ring that has all its slots comes round for ever.
        ends = [
            layer.k.shape[2]
            for layer in self.cache.layers
            if not isinstance(layer, Ring) or layer.k.shape[2] < layer.capacity
        ]
        self._room = min(ends, default=None)

    @property
    def is_full(self) -> bool:
        """Whether a layer must grow before one more token fits."""
        return self.length == self._room

    def growth(self) -> int:
        """Return the bytes that must be free before one more token fits: mostly 0, see `Cache.growth`."""
        if not self.is_full:
            return 0
        self._count()
        return self.cache.growth(1)

    def _count(self) -> None:
        """Tell the cache of the tokens that the step has stored in it."""
        self.cache.advance(self.length - self.cache.layers[0].seen)

    def make_room(self) -> bool:
        """See to it that one more token fits; return whether anything has moved.

        Raises:
            GptlabError: the cache must not become any longer.
        """
        if not self.is_full:
            return False
        self._count()
        self.cache.check_room(1)
        self.cache.make_room(1)
        self._locate()
        return True


class CompiledStep:
    """Reads one token in each of a few sequences.

    Args:
        model: on the CPU; it must not change afterwards.
    """

    def __init__(self, model: GPT) -> None:
        self._library, self._cache_dtype = library(), model.cache_dtype
        self._layout = Layout(model)
        self._n_vocab = model.config.vocab_size
        self._largest = int(self._library.gptlab_largest_batch())
        self._texts: list[Text] = []
        self._slots = np.empty((0, model.config.n_layer), SLOTS)

    def __call__(self, texts: Sequence[Text], ids: Sequence[int]) -> Tensor:
        """Return the logits (B, V) float32 that follow ``ids``, one new token of each text; the texts grow by it."""
        moved = [text.make_room() for text in texts]
        if any(moved) or len(texts) != len(self._texts) or any(map(operator.is_not, texts, self._texts)):
            if any(text.cache.layers[0].k.dtype != self._cache_dtype for text in texts):
                raise GptlabError("the model was given another dtype while it generated; begin again")
            self._texts = list(texts)
            self._slots = np.stack([text.slots for text in texts])
        rows = np.array([(token, text.length) for token, text in zip(ids, texts, strict=True)], dtype=np.int64)
        logits = torch.empty(len(texts), self._n_vocab)
        for first in range(0, len(texts), self._largest):
            part = slice(first, first + self._largest)
            failed = self._library.gptlab_step(
                ctypes.byref(self._layout.struct),
                rows[part].ctypes.data_as(ctypes.c_void_p),
                self._slots[part].ctypes.data_as(ctypes.c_void_p),
                len(rows[part]),
                n_threads(),
                ctypes.c_void_p(logits[part].data_ptr()),
            )
            if failed:
                raise MemoryError
        for text in texts:
            text.length += 1
        return logits

    def release(self) -> None:
        """Let go of the texts of the last step, which are kept because most often they are those of the next."""
        self._texts = []
