# Variants to look inside, and the same model in `transformers`, its insides read by its own means.
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gptlab import GPT, ModelConfig
from gptlab.checkpoints import huggingface
from gptlab.checkpoints.files import Checkpoint
from helpers.models import LLAMA, disturb

VOCAB, CONTEXT, LENGTH = 61, 64, 40
KNOWN: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "Llama, GQA, untied": {**LLAMA, "n_kv_head": 2, "tie_embeddings": False},
    "RoPE, GQA, window": {"position": "rope", "n_kv_head": 2, "window": 9},
}
"""Variants that classes of transformers compute."""
OTHERS: dict[str, dict[str, Any]] = {
    "windows by layer, sinks, dilation": {
        "window": (5, None, 3),
        "sinks": 2,
        "dilation": (1, 1, 2),
        "position": "rope",
        "n_kv_head": 1,
    },
    "learned, window, sinks": {"window": 6, "sinks": 2},
    "no positions, exact GELU": {"position": "none", "activation": "gelu"},
    "blend": {"position": "blend"},
}
every = pytest.mark.parametrize("changes", [*KNOWN.values(), *OTHERS.values()], ids=[*KNOWN, *OTHERS])


def inspected(**changes: Any) -> GPT:
    """A small model in eval mode whose attention is far from even."""
    config = ModelConfig.from_dict(
        {"vocab_size": VOCAB, "context_length": CONTEXT, "n_layer": 3, "n_head": 4, "n_embd": 32, **changes}
    )
    return disturb(GPT(config, seed=2).eval(), 0.2)


def text(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


class Theirs:
    """What transformers computes of a model of ours on a text.

    Attributes:
        logits: (T, V).
        maps: (L, H, T, T).
        inside: by our names of places.
    """

    def __init__(self, model: GPT, ids: Tensor, directory: Path) -> None:
        huggingface.write(directory, Checkpoint(model.config, model.tensors(), None))
        judge = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        self.inside: dict[str, Tensor] = {}
        inner = judge.base_model
        config = model.config
        for i, layer in enumerate(inner.h if hasattr(inner, "h") else inner.layers):
            attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
            out = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj
            attention.register_forward_hook(self._keep(f"attention.{i}", lambda _, output: output[0][0]))
            layer.mlp.register_forward_hook(self._keep(f"mlp.{i}", lambda _, output: output[0]))
            by_head = (config.n_head, config.head_dim)
            out.register_forward_hook(self._keep(f"heads.{i}", lambda x, _, s=by_head: x[0].unflatten(-1, s)))
        final = inner.ln_f if hasattr(inner, "ln_f") else inner.norm
        final.register_forward_hook(self._keep(f"residual.{config.n_layer}", lambda x, _: x[0]))
        self._judge, self._ids, inside = judge, ids, self.inside
        self.logits, self.maps = self.at(torch.arange(len(ids)))
        self.inside = {**inside, **self._streams}

    @torch.no_grad()
    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and maps of the text at other positions (T,)."""
        made = self._judge(
            self._ids[None],
            position_ids=positions[None],
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
        self._streams = {f"residual.{i}": x[0] for i, x in enumerate(made.hidden_states[:-1])}
        return made.logits[0], torch.stack(made.attentions)[:, 0]

    def _keep(self, name: str, part: Any) -> Any:
        return lambda _, inputs, output: self.inside.update({name: part(inputs[0] if inputs else None, output)})
