"""GPT-2 as OpenAI released it: a TensorFlow checkpoint with `hparams.json`, `encoder.json` and `vocab.bpe`.

Nothing of TensorFlow is needed (see `bundle`). The projections are convolutions of width 1 there: (1, in, out).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gptlab.checkpoints.bundle import open_bundle
from gptlab.checkpoints.files import Checkpoint, Lazy, complete_state, read_json
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import read_tokenizer

ABOUT = "OpenAI's folder with model.ckpt.index and hparams.json"
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_PROJECTION = re.compile(r"h\.\d+\.(attn|mlp)\.\w+\.weight")
_LEAVES = {"w": "weight", "g": "weight", "b": "bias"}


def recognises(path: Path) -> bool:
    """Is this the index of a checkpoint, or a directory with one or with `hparams.json`?"""
    if path.is_dir():
        return (path / "hparams.json").exists() or any(path.glob("*.index"))
    return path.suffix == ".index" and path.is_file()


def read_config(path: Path) -> ModelConfig:
    """Translate `hparams.json`.

    Raises:
        GptlabError: it is missing or damaged, or its numbers are impossible.
    """
    hparams = (path if path.is_dir() else path.parent) / "hparams.json"
    values = read_json(hparams)
    if lost := [name for name in HPARAMS if name not in values]:
        raise GptlabError(f"{hparams} lacks {lost[0]}; restore it")
    try:
        return ModelConfig.from_dict({ours: values[theirs] for theirs, ours in HPARAMS.items()})
    except GptlabError as error:
        raise GptlabError(f"{hparams}: {error}") from None


def read(path: Path, dtype: torch.dtype) -> Checkpoint:
    """Read OpenAI's folder, or the one checkpoint of several in a folder whose index is named.

    What an optimizer kept beside the weights is left aside.

    Raises:
        GptlabError: files missing or damaged, a checksum that fails, tensors missing or of a wrong shape.
    """
    config = read_config(path)
    readers: Lazy = {}
    for name, get in open_bundle(_prefix(path)).items():
        ours = _translated(name)
        if ours is not None:
            readers[ours] = functools.partial(_transposed, get) if _PROJECTION.fullmatch(ours) else get
    directory = path if path.is_dir() else path.parent
    state = complete_state(config, readers, dtype, path, described_by="hparams.json")
    return Checkpoint(config, state, read_tokenizer(directory))


def _prefix(path: Path) -> Path:
    """Return what the names of a checkpoint's files begin with; the file `checkpoint` says which is the latest."""
    if path.is_file():
        return path.with_suffix("")
    indices = sorted(path.glob("*.index"))
    if (path / "checkpoint").is_file():
        try:
            latest = re.search(
                r'^model_checkpoint_path: *"([^"\x00-\x1f]+)"', (path / "checkpoint").read_text("utf-8"), re.M
            )
        except (OSError, ValueError):
            raise GptlabError(f"{path / 'checkpoint'} cannot be read; restore it, or remove it") from None
        if latest:
            # It may hold the path that the directory had on another machine; the files are here or nowhere.
            indices = [path / (re.split(r"[/\\]", latest[1])[-1] + ".index")]
    if not indices:
        raise GptlabError(f"{path} holds no TensorFlow checkpoint (no model.ckpt.index); copy it there too")
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices[:3])
        raise GptlabError(f"{path} holds several checkpoints ({names}); name one of these files")
    return indices[0].with_suffix("")


def _translated(name: str) -> str | None:
    """Return gptlab's name of a tensor, or None for what is not part of the model, such as an optimizer's averages."""
    parts = name.split("/")
    if parts[0] != "model" or parts[-1].startswith("Adam"):
        return None
    if parts[1:] in (["wte"], ["wpe"]):
        return f"{parts[1]}.weight"
    layer = re.fullmatch(r"h(\d{1,4})", parts[1]) if len(parts) > 1 else None
    names = ["h", layer[1], *parts[2:]] if layer else parts[1:]
    return ".".join([*names[:-1], _LEAVES.get(names[-1], names[-1])])


def _transposed(get: Callable[[], Tensor]) -> Tensor:
    """(1, in, out) -> (out, in); what has another shape stays as it is and is refused with the other wrong shapes."""
    tensor = get()
    return tensor[0].t() if tensor.ndim == 3 and len(tensor) == 1 else tensor
