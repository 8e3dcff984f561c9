"""Writing GGUF: where a model lives in llama.cpp, and what it is called there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptlab.checkpoints.card import make_card
from gptlab.checkpoints.files import Checkpoint, write_files
from gptlab.checkpoints.gguf.names import ARCHITECTURES, NAMES, interleaved
from gptlab.checkpoints.gguf.vocabulary import add_vocabulary
from gptlab.config import ModelConfig, RopeConfig
from gptlab.errors import GptlabError
from gptlab.model.rope import frequencies

TYPES = ("f32", "f16", "bf16", "q8_0")
LARGEST_F16 = 65504.0


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a model lives in llama.cpp.

    Attributes:
        family: the architecture there.
        config: of the model as it is written.
        rewritten: what is written otherwise than it was, with the same function.
        lost: what llama.cpp does not have.
    """

    family: str
    config: ModelConfig
    rewritten: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def plan(config: ModelConfig, *, type: str = "f32", context: int | None = None) -> Home:
    """Say how a model lives in llama.cpp, before any weight is read.

    Args:
        config: the model's configuration.
        type: of the weights, one of `TYPES`.
        context: cap the context at so many tokens.

    Raises:
        GptlabError: llama.cpp would compute something else; it names the feature.
    """
    if type not in TYPES:
        raise GptlabError(f"--type must be one of {', '.join(TYPES)}, got {type!r}")
    if context is not None and not 1 <= context <= config.context_length:
        raise GptlabError(f"--context must be 1 to {config.context_length}, the model's own, got {context}")
    length = context or config.context_length
    rewritten, lost = [], []
    if obstacle := _obstacle(config):
        raise GptlabError(f"llama.cpp cannot compute this model: in the way is {obstacle}")
    narrow = [w for w in config.windows if w is not None and w < length]
    if narrow:
        raise GptlabError(
            f"llama.cpp ignores windows and would attend to everything: cap the context at the window with --context"
            f" {min(narrow)}, or convert the model to full attention: gptlab convert MODEL --window none"
        )
    family = _family(config)
    needs_biases = family != "llama"
    values: dict[str, Any] = {**config.to_dict(), "context_length": length, "dropout": 0.0}
    values["bias"] = config.bias or needs_biases
    if any(w is not None for w in config.windows):
        rewritten.append(f"within {length} tokens the window hides nothing and is left out")
        lost.append(f"texts of more than {length} tokens")
        values |= {"window": None, "sinks": 0}
    elif length < config.context_length:
        lost.append(f"texts of more than {length} tokens")
    if needs_biases and not config.bias:
        rewritten.append("biases of zero where the model has none")
    if config.rope is not None and config.rope.scaling == "ntk":
        theta = config.rope.theta * config.rope.factor ** (config.head_dim / (config.head_dim - 2))
        rewritten.append(f"NTK scaling as a base of {theta:g}")
        values["rope"] = {"theta": theta}
    assert family is not None
    return Home(family, ModelConfig.from_dict(values), tuple(rewritten), tuple(lost))


def _family(config: ModelConfig) -> str | None:
    """Return the architecture of this form, or None."""
    kinds = ARCHITECTURES.items()
    return next((name for name, kind in kinds if all(getattr(config, key) == kind[key] for key in kind)), None)


def _obstacle(config: ModelConfig) -> str | None:
    if config.position not in {kind["position"] for kind in ARCHITECTURES.values()}:
        return f"position={config.position!r} (it has learned and rotary positions)"
    if _family(config) is None:
        return (
            f"norm={config.norm!r} and mlp={config.mlp!r} with {config.position} positions (its Llama has RMSNorm,"
            " SwiGLU and rotary positions, its GPT-2 and StarCoder2 have neither of the first two)"
        )
    if config.activation != "gelu_tanh":
        return f"activation={config.activation!r} (it computes gelu_tanh)"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "its way to scale attention scores"
    if any(dilation != 1 for dilation in config.dilations):
        return "dilation, which hides keys at any distance"
    if config.rope is not None and config.rope.scaling == "yarn":
        return "YaRN scaling, for which nobody has compared the two"
    if config.rope is not None and config.rope.scaling == "llama3" and _family(config) != "llama":
        return "Llama 3's scaling (its Llama alone has it)"
    return None


def write(
    path: Path,
    checkpoint: Checkpoint,
    *,
    type: str = "f32",
    context: int | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Home:
    """Write a GGUF file, replacing an earlier one only once it is wholly on disk.

    Args:
        path: the file.
        checkpoint: the model; without a tokenizer llama.cpp takes token ids alone.
        type: of the matrices; norms, biases and positions are float32. With q8_0 a matrix whose rows are not a multiple
            of 32 is f16.
        context: see `plan`.
        facts: for the model card, as `card.read_facts` gives them; ``name`` is written as the model's. The card is the
            file's ``general.description``.

    Returns:
        How it lives in llama.cpp.

    Raises:
        GptlabError: the `gguf` package is missing, llama.cpp would compute something else, numbers too large for f16,
            or the file cannot be written.
    """
    home = plan(checkpoint.config, type=type, context=context)
    try:
        import gguf
    except ImportError:
        raise GptlabError("writing GGUF needs the gguf package: pip install 'gptlab[gguf]'") from None

    def fill(temporary: Path) -> None:
        writer = gguf.GGUFWriter(temporary, home.family)
        try:
            _add_card(writer, checkpoint.config, home, type, {"name": path.stem, **(facts or {})})
            _add_metadata(writer, home.config, type)
            add_vocabulary(writer, checkpoint.tokenizer, home.config.vocab_size)
            for name, tensor in _tensors(checkpoint, home).items():
                numbers = tensor.detach().float().numpy()
                kind = _type_of(name, tensor, type)
                if kind == "f16" and np.abs(numbers).max(initial=0.0) > LARGEST_F16:
                    raise GptlabError(f"{name} holds numbers too large for f16; use --type bf16 or f32")
                stored = gguf.GGMLQuantizationType[kind.upper()]
                writer.add_tensor(name, gguf.quants.quantize(numbers, stored), raw_dtype=stored)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    write_files(path.parent, {path.name: fill})
    return home


def _type_of(name: str, tensor: Tensor, type: str) -> str:
    if tensor.ndim == 1 or name == NAMES["wpe.weight"]:
        return "f32"
    return "f16" if type == "q8_0" and tensor.shape[-1] % 32 else type


def _add_card(writer: Any, config: ModelConfig, home: Home, type: str, facts: Mapping[str, Any]) -> None:
    opening = f"A causal language model exported by gptlab for llama.cpp, as `{home.family}` with weights in {type}."
    writer.add_name(str(facts["name"]))
    writer.add_description(make_card(config, facts, opening=opening, rewritten=home.rewritten, lost=home.lost))
    writer.add_tags(["gptlab", "text-generation"])


def _add_metadata(writer: Any, config: ModelConfig, type: str) -> None:
    import gguf

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[type]])
    if type == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    (writer.add_layer_norm_rms_eps if config.norm == "rms" else writer.add_layer_norm_eps)(config.norm_eps)
    if config.has_rotation:
        rope = config.rope
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(10000.0 if rope is None else rope.theta)
        if rope is not None and rope.scaling == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.factor)


def _tensors(checkpoint: Checkpoint, home: Home) -> dict[str, Tensor]:
    """Return the model's tensors under llama.cpp's names, with zeros where it asks for a bias that the model lacks."""
    source, config = checkpoint.state, home.config
    state = dict(source)
    for name in source:
        if home.family != "llama" and name.startswith(("h.", "ln_f.")) and name.endswith(".weight"):
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(source[name])))
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: config.context_length]
    width, kv = config.n_embd, config.kv_heads * config.head_dim
    renamed: dict[str, Tensor] = {}
    if config.rope is not None and config.rope.scaling == "llama3":
        plain, scaled = (
            frequencies(rope, config.head_dim, checkpoint.config.trained_length)[0]
            for rope in (RopeConfig(theta=config.rope.theta), config.rope)
        )
        renamed["rope_freqs.weight"] = (plain / scaled).float()
    for name, tensor in state.items():
        if not name.startswith("h."):
            stem, _, leaf = name.rpartition(".")
            renamed[NAMES.get(name) or f"{NAMES[stem]}.{leaf}"] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        stem, _, leaf = rest.rpartition(".")
        if stem == "attn.c_attn" and config.has_rotation:
            for letter, part in zip("qkv", tensor.split([width, kv, kv]), strict=True):
                pairs = home.family == "llama" and letter != "v"
                renamed[f"blk.{layer}.attn_{letter}.{leaf}"] = interleaved(part, config.head_dim) if pairs else part
        else:
            renamed[f"blk.{layer}.{NAMES[stem]}.{leaf}"] = tensor
    return renamed
