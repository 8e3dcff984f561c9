"""gptlab: GPT-2 from scratch in PyTorch, with the attention made a matter of configuration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.config import ModelConfig
    from gptlab.errors import GptlabError
    from gptlab.language_model import LanguageModel, load, save
    from gptlab.model.gpt import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GptlabError", "LanguageModel", "ModelConfig", "load", "save"]

_HOMES = {
    "GPT": "gptlab.model.gpt",
    "GptlabError": "gptlab.errors",
    "LanguageModel": "gptlab.language_model",
    "ModelConfig": "gptlab.config",
    "load": "gptlab.language_model",
    "save": "gptlab.language_model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `gptlab --help` need not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gptlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
