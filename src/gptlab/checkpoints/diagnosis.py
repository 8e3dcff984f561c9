"""What a directory is that holds no whole model, in words."""

from __future__ import annotations

import json
import re
from pathlib import Path


def diagnose(directory: Path) -> str | None:
    """Say what a directory without a model is and which way leads to one; None where nothing in it tells."""
    return _adapter(directory) or _trainer(directory) or _several(directory)


def _adapter(directory: Path) -> str | None:
    path = directory / "adapter_config.json"
    if not path.exists():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    of = f"of {base}" if base else "of a model that it does not name"
    return (
        f"{directory} holds a LoRA adapter alone, not a model: what peft trained beside the weights {of}; merge the two"
        " in peft with merge_and_unload(), save the result and name that directory"
    )


def _trainer(directory: Path) -> str | None:
    numbered = {
        int(name[1]): path
        for path in directory.glob("checkpoint-*")
        if path.is_dir() and (name := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not numbered:
        return None
    return (
        f"{directory} holds the checkpoints of a trainer, not a model itself; name one of them: the last is"
        f" {numbered[max(numbered)]}" + (f", the first {numbered[min(numbered)]}" if len(numbered) > 1 else "")
    )


def _several(directory: Path) -> str | None:
    files = sorted(directory.glob("*.gguf"))
    return f"{directory} holds {len(files)} GGUF files; name one of them, as {files[0]}" if len(files) > 1 else None
