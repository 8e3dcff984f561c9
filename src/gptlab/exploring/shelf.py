"""The models of the page: loaded when they are first asked for, and converted ones as long as they are looked at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

import gptlab
from gptlab.devices import find_device
from gptlab.errors import GptlabError
from gptlab.inspecting import Sharing, share_keys
from gptlab.inspecting.attention import LayerInputs, layer_inputs
from gptlab.language_model import LanguageModel
from gptlab.model.gpt import GPT

MOST_BYTES = 2**29
"""Of converted models that are kept, and of what layers read; the last one is kept in any case."""

Key = TypeVar("Key")
Kept = TypeVar("Kept")


class Shelf:
    """Holds models; only one thread may ask it.

    Args:
        names: as `gptlab.load` takes them. No other model can be asked for.
        device: where to compute.

    Attributes:
        device: the same.
    """

    def __init__(self, names: Sequence[str], device: str = "cpu") -> None:
        self._names = tuple(names)
        self.device: torch.device = find_device(device)
        self._loaded: dict[str, LanguageModel] = {}
        self._shared: OrderedDict[tuple[str, int], tuple[tuple[int, ...], Sharing]] = OrderedDict()
        self._inputs: OrderedDict[tuple[str, tuple[int, ...]], LayerInputs] = OrderedDict()

    def get(self, name: str) -> LanguageModel:
        """Return a model, loaded at the first call.

        Raises:
            GptlabError: a name that is not on the shelf, a model that cannot be loaded, or one without a tokenizer.
        """
        if name not in self._names:
            raise GptlabError(f"there is no model {name!r:.100} on this page; name it with --model when you start it")
        if name not in self._loaded:
            lm = gptlab.load(name, device=self.device)
            lm.needs_tokenizer()
            lm.model.eval()
            self._loaded[name] = lm
        return self._loaded[name]

    def shared(self, name: str, n_kv_head: int, ids: Sequence[int]) -> Sharing:
        """Return a model with fewer key/value heads, and what that does to a text.

        Raises:
            GptlabError: as `share_keys`.
        """
        key, text = (name, n_kv_head), tuple(ids)
        before, sharing = self._shared.get(key, (None, None))
        if sharing is None:
            sharing = share_keys(self.get(name).model, n_kv_head, ids)
        elif before != text:
            sharing = sharing.on(ids)
        _keep(self._shared, key, (text, sharing), lambda kept: _bytes_of(kept[1].model))
        return sharing

    def inputs(self, name: str, ids: Sequence[int]) -> LayerInputs:
        """Return what the attention of every layer of a model reads of a text, for maps of one layer after the other.

        Raises:
            GptlabError: as `get`.
        """
        key = name, tuple(ids)
        inputs = self._inputs.get(key) or layer_inputs(self.get(name).model, ids)
        _keep(self._inputs, key, inputs, lambda kept: kept.n_bytes)
        return inputs


def _keep(shelf: OrderedDict[Key, Kept], key: Key, kept: Kept, size: Callable[[Kept], int]) -> None:
    """Put something on a shelf as the newest, and take off the oldest that are too many."""
    shelf[key] = kept
    shelf.move_to_end(key)
    while len(shelf) > 1 and sum(map(size, shelf.values())) > MOST_BYTES:
        shelf.popitem(last=False)


def _bytes_of(model: GPT) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
