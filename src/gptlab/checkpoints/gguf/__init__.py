"""GGUF, the format of llama.cpp: its architectures `gpt2` (learned positions), `starcoder2` (rotary ones) and `llama`.

All honour fewer key/value heads than query heads. None knows windows: llama.cpp loads a windowed StarCoder2 and
attends to everything, so that a model with windows is written only with its context capped at the window, where the
two are the same.
"""

from __future__ import annotations

from gptlab.checkpoints.gguf.read import read, read_card, read_config, read_tokenizer, recognises
from gptlab.checkpoints.gguf.write import Home, plan, write

__all__ = ["ABOUT", "Home", "plan", "read", "read_card", "read_config", "read_tokenizer", "recognises", "write"]

ABOUT = "a GGUF file"
