"""Models on disk and on the hub: one module per format, and `read`, which finds the right one."""

from __future__ import annotations

from pathlib import Path

import torch

from gptlab.checkpoints import huggingface, native
from gptlab.checkpoints.files import Checkpoint, read_json
from gptlab.config import ModelConfig

__all__ = ["Checkpoint", "read", "read_config"]


def read(directory: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a model directory in any supported format; every tensor in ``dtype``, in memory of its own.

    Raises:
        GptlabError: no checkpoint there, or one that is damaged, incomplete or of another architecture.
    """
    values = read_json(directory / "config.json")
    return (native if native.recognises(values) else huggingface).read(directory, values, dtype)


def read_config(directory: Path) -> ModelConfig:
    """Read only the configuration of a model directory."""
    values = read_json(directory / "config.json")
    return (native if native.recognises(values) else huggingface).config_of(directory, values)
