"""A model that no class of transformers computes: its directory carries the code, for ``trust_remote_code=True``.

`config.json` holds gptlab's own configuration whole, and the weights have gptlab's names.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.checkpoints.files import Lazy
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError

ARCHITECTURE = "GptlabForCausalLM"
POSITIONS = ("learned", "rope", "none", "blend")
"""Kinds of position that the code sent along computes."""
FILES = ("configuration_gptlab.py", "modeling_gptlab.py")


def code() -> dict[str, bytes]:
    """Return the code by the names of its files."""
    folder = importlib.resources.files("gptlab.checkpoints.huggingface") / "remote"
    return {name: (folder / f"{name}.txt").read_bytes() for name in FILES}


def read_config(path: Path, values: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that `write_config` wrote."""
    if not isinstance(values.get("gptlab"), dict):
        raise GptlabError(f"{path} is damaged (no object 'gptlab'); restore it")
    return ModelConfig.from_dict(values["gptlab"])


def read_tensors(readers: Lazy, config: ModelConfig) -> Lazy:
    """Return the tensors, whose names are gptlab's already."""
    return readers


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of any model."""
    classes = {
        "AutoConfig": "configuration_gptlab.GptlabConfig",
        "AutoModelForCausalLM": f"modeling_gptlab.{ARCHITECTURE}",
    }
    return {"auto_map": classes, "gptlab": config.to_dict()}


def write_tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors, whose names stay gptlab's."""
    return dict(state)
