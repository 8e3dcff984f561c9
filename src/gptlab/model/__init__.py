"""The architecture and nothing else: no files, no training, no printing."""

from gptlab.model.cache import Cache
from gptlab.model.gpt import GPT
from gptlab.model.linear import Linear
from gptlab.model.masks import PADDING, Tokens, Visibility

__all__ = ["GPT", "PADDING", "Cache", "Linear", "Tokens", "Visibility"]
