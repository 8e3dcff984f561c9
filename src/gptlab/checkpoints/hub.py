"""From the name of a model to where it lies: built-in, here, or on the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from gptlab.checkpoints.runs import is_run, model_of
from gptlab.errors import GptlabError, nearest

ORIGINALS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
"""OpenAI's released models, by the names that everyone uses, and where they live."""

_SAFE = [
    "config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def built_in() -> dict[str, Path]:
    """The models that the package carries."""
    assets = Path(str(importlib.resources.files("gptlab"))) / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob("*/model.safetensors"))}


def locate(name: str) -> Path:
    """Return the directory or file of a model, downloading it when it is a name on the hub.

    Args:
        name: a built-in model, a directory, a file, a training run (``runs/a`` is its best checkpoint,
            ``runs/a@last`` the last), ``gpt2`` ... ``gpt2-xl``, or ``owner/name``. What is here comes before a name
            on the hub; built-in names come first (write ``./pocket`` for a directory).

    Raises:
        GptlabError: nothing of that name, or the hub cannot be reached.
    """
    if not name:  # as a path it would be the current directory
        raise GptlabError("the name of the model is empty; give a directory, or a name such as 'pocket' or 'gpt2'")
    if name in built_in():
        return built_in()[name]
    directory, at, which = name.rpartition("@")
    if at and is_run(Path(directory)):
        return model_of(Path(directory), which)
    if Path(name).is_dir():
        return model_of(Path(name)) if is_run(Path(name)) else Path(name)
    if Path(name).exists():
        return Path(name)
    if name in ORIGINALS:
        return download(name, ORIGINALS[name])
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return download(name, name)
    if "/" in name or name.startswith("."):
        raise GptlabError(f"no file or directory {name}; check the path")
    known = [*built_in(), *ORIGINALS]
    raise GptlabError(
        f"no model {name!r}{nearest(name, known)}; give a directory, one of {', '.join(known)}, or owner/name"
    )


def download(name: str, repository: str) -> Path:
    """Fetch a model from the hub, or find it in the hub's cache; shows a progress bar.

    Raises:
        GptlabError: `huggingface_hub` is missing, the hub cannot be reached, or it has no such model.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise GptlabError(
            f"{name} is on the Hugging Face hub, which needs huggingface_hub: pip install 'gptlab[hub]'"
        ) from None
    folder = Path(name.split("/")[-1])
    by_hand = (
        f"to use it offline, put config.json, model.safetensors, vocab.json and merges.txt of {repository} into the"
        f" folder {folder} and run the same command with ./{folder} for the model; the built-in model 'pocket' needs"
        " no network"
    )
    try:
        directory = Path(snapshot_download(repository, allow_patterns=_SAFE))
        if not list(directory.glob("model*.safetensors")):
            directory = Path(snapshot_download(repository, allow_patterns=[*_SAFE, *_PICKLED]))
    except RepositoryNotFoundError:
        raise GptlabError(f"there is no directory {name} here and no public model {repository} on the hub") from None
    except Exception as error:  # whatever the network libraries below raise, the way out is the same
        here = "" if name in ORIGINALS else f"there is no directory {name} here, and "
        raise GptlabError(
            f"{here}the Hugging Face hub cannot be reached for {repository} ({type(error).__name__}); {by_hand}"
        ) from None
    return directory
