"""Writing a directory that transformers loads: configuration, weights in one file or shards, tokenizer, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from gptlab.checkpoints.card import make_card
from gptlab.checkpoints.files import Checkpoint, write_files
from gptlab.checkpoints.huggingface import bigcode, custom, gpt2, llama, mistral, starcoder2
from gptlab.checkpoints.huggingface.homes import Home, home_of, move_in, obstacle
from gptlab.config import ModelConfig
from gptlab.errors import GptlabError
from gptlab.text.tokenizers import TOKENIZER_FILES, Tokenizer

SHARD = "50GB"
"""Weights beyond this are split, as transformers 5 does by default."""
_FAMILIES = {"gpt2": gpt2, "gpt_bigcode": bigcode, "starcoder2": starcoder2, "llama": llama, "mistral": mistral}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def plan(config: ModelConfig, custom_code: bool = False) -> Home:
    """Say where a model will live in transformers, before any weight is read.

    Args:
        config: the model's configuration.
        custom_code: where no class of transformers computes it, send code of its own along.

    Raises:
        GptlabError: no class computes it, and ``custom_code`` is false; or the code of its own does not either.
    """
    if config.position not in custom.POSITIONS:
        raise GptlabError(
            f"position={config.position!r} cannot be written for transformers, which has no class for it; keep the"
            " model in gptlab's own format"
        )
    reason = obstacle(config)
    if reason is None:
        return home_of(config)
    if not custom_code:
        raise GptlabError(
            f"no class of transformers computes this model exactly: in the way is {reason}; with --custom-code its own"
            " code is sent along, which transformers loads with trust_remote_code=True"
        )
    return Home("gptlab", (f"code of its own is sent along: in the way of any class is {reason}",))


def write(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    custom_code: bool = False,
    max_shard_size: str = SHARD,
    facts: Mapping[str, Any] | None = None,
) -> Home:
    """Write a model for transformers, in the class that computes exactly this; an earlier one there is replaced whole.

    Args:
        directory: made when it does not exist.
        checkpoint: the model; its tensors are stored in the dtype that they have.
        custom_code: see `plan`.
        max_shard_size: most bytes of a file of weights, as ``500MB``; a larger tensor has a file of its own.
        facts: for the model card, as `card.read_facts` gives them.

    Returns:
        Where it lives.

    Raises:
        GptlabError: no class computes it, or the directory cannot be written.
    """
    limit = size_of(max_shard_size)
    home = plan(checkpoint.config, custom_code)
    family = _FAMILIES.get(home.family)
    files: dict[str, bytes | Callable[[Path], None]] = {}
    if family is None:
        moved, values = checkpoint, custom.write_config(checkpoint.config)
        tensors, architecture = custom.write_tensors(checkpoint.state, checkpoint.config), custom.ARCHITECTURE
        files.update(custom.code())
    else:
        moved = move_in(checkpoint, home.family)
        values = family.write_config(moved.config)
        tensors, architecture = family.write_tensors(moved.state, moved.config), family.ARCHITECTURE
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    dtype = str(checkpoint.state["wte.weight"].dtype).removeprefix("torch.")
    tokens = _tokens(checkpoint.tokenizer, moved.config.vocab_size)
    header = {
        "architectures": [architecture],
        "model_type": home.family,
        **values,
        "tie_word_embeddings": moved.config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        **tokens,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name in transformers 4
    }
    files.update(_tokenizer_files(checkpoint.tokenizer, moved.config, tokens))
    files["generation_config.json"] = _json({**tokens, "_from_model_config": True})
    files["README.md"] = _card(checkpoint.config, home, architecture, facts or {}).encode()
    weights = _weight_files(tensors, limit)
    files.update(weights)
    files["config.json"] = _json(header)
    write_files(directory, files, stale=[name for name in _earlier(directory) if name not in files])
    return home


def _card(config: ModelConfig, home: Home, architecture: str, facts: Mapping[str, Any]) -> str:
    """The model card, with the header that the hub reads."""
    loading = ", trust_remote_code=True" if home.family == "gptlab" else ""
    opening = (
        f"A causal language model exported by gptlab as `{architecture}`.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{loading})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("."{loading})\n```'
    )
    tags = f"- gptlab\n- {home.family if home.family in ('llama', 'mistral') else 'gpt2'}\n"
    header = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}---\n\n"
    return header + make_card(config, facts, opening=opening, rewritten=home.rewritten, lost=home.lost)


def size_of(text: str) -> int:
    """Return the bytes of a size such as ``500MB`` or ``5GiB``.

    Raises:
        GptlabError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise GptlabError(f"{text!r} is not a size of a file; write it as 500MB or 5GB")
    return size


def _weight_files(tensors: Mapping[str, Tensor], limit: int) -> dict[str, bytes | Callable[[Path], None]]:
    """One file, or shards and their index, by the names that transformers gives them."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": _saver(shards[0])}
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        },
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    files: dict[str, bytes | Callable[[Path], None]] = {
        file: _saver(shard) for file, shard in zip(names, shards, strict=True)
    }
    return {**files, "model.safetensors.index.json": _json(index)}


def _saver(shard: Mapping[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(dict(shard), path, {"format": "pt"})


def _earlier(directory: Path) -> list[str]:
    """Names of an earlier save that must not be taken for a part of this one."""
    patterns = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", *custom.FILES)
    names = {path.name for pattern in patterns for path in directory.glob(pattern)}
    return sorted(names | {name for name in TOKENIZER_FILES if (directory / name).exists()})


def _tokens(tokenizer: Tokenizer | None, rows: int) -> dict[str, Any]:
    """Where texts begin and end, by the ids that the model has rows for."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    start, ends = tokenizer.start_of_text, sorted(token for token in tokenizer.ends if token < rows)
    end = ends[0] if len(ends) == 1 else ends or None
    return {
        "bos_token_id": start if start is not None and start < rows else None,
        "eos_token_id": end,
        "pad_token_id": None,
    }


def _tokenizer_files(tokenizer: Tokenizer | None, config: ModelConfig, tokens: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer as transformers reads it: `tokenizer.json` whole, and which of its tokens begin and end a text."""
    if tokenizer is None:
        return {}
    files = dict(tokenizer.files())
    names = {token: content for content, token in tokenizer.special_tokens.items()}
    end = tokens["eos_token_id"]
    first_end = tokenizer.end_of_text if isinstance(end, list) else end
    special = {
        "bos_token": names.get(tokens["bos_token_id"]),
        "eos_token": None if first_end is None else names.get(first_end),
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length if config.has_table else 10**30,
        **{name: content for name, content in special.items() if content is not None},
        **({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}),
    }
    files["tokenizer_config.json"] = _json(about)
    return files


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"
