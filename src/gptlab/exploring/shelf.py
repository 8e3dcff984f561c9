"""The models of the page: loaded when they are first asked for, and converted ones as long as they are looked at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

import gptlab
from gptlab.devices import find_device
from gptlab.errors import GptlabError
from gptlab.inspecting import Sharing, share_keys
from gptlab.language_model import LanguageModel

MOST_CONVERTED = 2
"""Converted models that are kept."""


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
        self._shared: OrderedDict[tuple[str, int, tuple[int, ...]], Sharing] = OrderedDict()

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
        key = name, n_kv_head, tuple(ids)
        if key not in self._shared:
            self._shared[key] = share_keys(self.get(name).model, n_kv_head, ids)
            if len(self._shared) > MOST_CONVERTED:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key]
