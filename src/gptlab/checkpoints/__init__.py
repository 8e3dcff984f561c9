"""Models on disk and on the hub: one module per format, all with the same functions, and `read`, which picks one.

Adding a format is one module and one line in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch

from gptlab.checkpoints import gguf, huggingface, llama2c, nanogpt, native, tensorflow
from gptlab.checkpoints.diagnosis import diagnose
from gptlab.checkpoints.files import Checkpoint
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.placeholders import refuse_placeholder

__all__ = ["FORMATS", "Checkpoint", "Format", "format_of", "name_of", "read", "read_config"]


class Format(Protocol):
    """What the module of a format offers. Those that can also be written have a `write(path, checkpoint, ...)`.

    Attributes:
        ABOUT: what it reads, in a few words for messages.
    """

    ABOUT: str

    def recognises(self, path: Path) -> bool:
        """Is this file or directory meant to be of this format? It may still be damaged."""

    def read_config(self, path: Path) -> ModelConfig:
        """Read only the configuration; GptlabError where it is damaged or describes what gptlab does not compute."""

    def read(self, path: Path, dtype: torch.dtype) -> Checkpoint:
        """Read all of it, every tensor in ``dtype`` and in memory of its own; GptlabError as `read_config`.

        gptlab's own format also takes None, for weights in whole numbers as they are.
        """


FORMATS: Mapping[str, Format] = MappingProxyType(
    {"gptlab": native, "hf": huggingface, "openai": tensorflow, "nanogpt": nanogpt, "gguf": gguf, "llama2c": llama2c}
)
"""The formats by their names on the command line, in the order in which a path is shown to them."""


def format_of(path: Path) -> Format:
    """Return the format of a file or a directory.

    Raises:
        GptlabError: it holds no model that gptlab can read.
    """
    for candidate in FORMATS.values():
        if candidate.recognises(path):
            return candidate
    readable = "; ".join(candidate.ABOUT for candidate in FORMATS.values())
    if path.is_file():
        refuse_placeholder(path)
        raise GptlabError(f"{path} is a file that gptlab cannot read; it reads {readable}")
    if not path.is_dir():
        raise GptlabError(f"no file or directory {path}; check the path")
    if problem := diagnose(path):
        raise GptlabError(problem)
    raise GptlabError(
        f"{path} is not a model directory: it has no config.json; name a model such as 'pocket' or 'gpt2', or"
        f" {readable}"
    )


def name_of(chosen: Format) -> str:
    """Return the name of a format in `FORMATS`."""
    return next(name for name, module in FORMATS.items() if module is chosen)


def read(path: Path, dtype: torch.dtype | None = torch.float32) -> Checkpoint:
    """Read a model in any supported format, a directory or a file; every tensor in ``dtype``, in memory of its own.

    None is float32, but leaves weights that were saved as whole numbers what they are (`Checkpoint.bits`).

    Raises:
        GptlabError: no checkpoint there, or one that is damaged, incomplete or of another architecture.
    """
    chosen = format_of(path)
    if dtype is None and chosen is native:
        return native.read(path, None)
    return chosen.read(path, dtype or torch.float32)


def read_config(path: Path) -> ModelConfig:
    """Read only the configuration of a model; arguments and errors as `read`."""
    return format_of(path).read_config(path)
