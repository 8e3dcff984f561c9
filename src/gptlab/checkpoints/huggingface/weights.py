"""Opening the weights of a directory as transformers leaves them: one file, shards, prefixes, heads of other tasks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

from gptlab.checkpoints.diagnosis import diagnose
from gptlab.checkpoints.files import Lazy, open_safetensors, read_json
from gptlab.checkpoints.pickles import open_pickle
from gptlab.errors import GptlabError

# Wrappers that put their name before, or inside, the name of every tensor that they hold.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = re.compile(r"^((module|model|transformer|base_model|pretrained_model|gpt2|decoder)\.)+")
_HEADS = {
    "multiple_choice_head": "multiple choice",
    "summary": "multiple choice",
    "score": "sequence classification",
    "classifier": "classification",
    "qa_outputs": "question answering",
    "v_head": "a value of reinforcement learning",
    "value_head": "a value of reinforcement learning",
}
_OTHERS = {
    "tf_model.h5": "TensorFlow's",
    "flax_model.msgpack": "Flax's",
    "rust_model.ot": "Rust's",
    "model.onnx": "ONNX's",
    "zero_to_fp32.py": "DeepSpeed's",
}


def open_weights(directory: Path) -> Lazy:
    """Open all tensors of a directory, by their names without prefixes; heads of other tasks are left aside, in words.

    Raises:
        GptlabError: no weights, damaged ones, or two of the same name.
    """
    tensors: Lazy = {}
    aside: dict[str, str] = {}
    for key, get in _open_files(directory).items():
        name = _PREFIX.sub("", _WRAPPERS.sub("", key))
        if ".lora_" in name or ".base_layer." in name:
            raise GptlabError(
                f"the checkpoint {directory} holds {key}, a LoRA adapter that is not merged; merge it in peft with"
                " merge_and_unload() and save that model"
            )
        if name in tensors:
            raise GptlabError(f"the checkpoint {directory} holds {name} twice, with and without a prefix; restore it")
        task = _HEADS.get(name.split(".")[0])
        if task is None:
            tensors[name] = get
        else:
            aside[name] = task
    if aside:
        tasks = " and ".join(dict.fromkeys(aside.values()))
        warnings.warn(
            f"{directory} has a head for {tasks} ({', '.join(sorted(aside))}), which is left aside: the language model"
            " alone is read",
            stacklevel=4,
        )
    return tensors


def _open_files(directory: Path) -> Lazy:
    if (directory / "model.safetensors").exists():
        return open_safetensors(directory / "model.safetensors")[0]
    if (directory / "model.safetensors.index.json").exists():
        return _merge(directory, "model.safetensors.index.json", lambda path: open_safetensors(path)[0])
    if (directory / "pytorch_model.bin").exists():
        return open_pickle(directory / "pytorch_model.bin")
    if (directory / "pytorch_model.bin.index.json").exists():
        return _merge(directory, "pytorch_model.bin.index.json", open_pickle)
    if problem := diagnose(directory):
        raise GptlabError(problem)
    there = [f"{name} ({whose} own format)" for name, whose in _OTHERS.items() if (directory / name).exists()]
    there += [path.name for path in sorted(directory.glob("*.safetensors"))]
    raise GptlabError(
        f"{directory} holds no weights; it needs model.safetensors, model.safetensors.index.json with its"
        " shards, or pytorch_model.bin" + (f", and has only {', '.join(there[:3])}" if there else "")
    )


def _merge(directory: Path, index: str, open_one: Callable[[Path], Lazy]) -> Lazy:
    """Open the shards that an index names; each tensor must be in the shard that the index says."""
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GptlabError(f"{directory / index} is damaged (no weight_map); restore it")
    merged: Lazy = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard in ("", "..") or Path(shard).name != shard:
            raise GptlabError(f"{directory / index} names the shard {shard!r}, which is not a file's name; restore it")
        if not (directory / shard).is_file():
            raise GptlabError(f"{directory / index} names the shard {shard!r}, which is not there; copy it too")
        opened = open_one(directory / shard)
        merged.update({name: get for name, get in opened.items() if weight_map.get(name, shard) == shard})
    if lost := sorted(set(weight_map) - set(merged)):
        raise GptlabError(f"the shards in {directory} lack {lost[0]}, which {index} promises; copy them again")
    return merged
