"""What llama.cpp calls the architectures that are read and written, and their parts."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

ARCHITECTURES = MappingProxyType(
    {
        "gpt2": {"position": "learned", "norm": "layer", "mlp": "gelu"},
        "starcoder2": {"position": "rope", "norm": "layer", "mlp": "gelu"},
        "llama": {"position": "rope", "norm": "rms", "mlp": "swiglu"},
    }
)
"""The architectures, each with the fields of `ModelConfig` that it is told by."""
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "lm_head.weight": "output.weight",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_gate": "ffn_gate",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
"""Parts of a model and theirs; those of a layer without its number."""


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Return the rows of queries or keys as `llama` has them: the two channels of a rotated pair side by side.

    Args:
        rows: (heads * head_dim, ...) with the first channels of all pairs of a head before the second ones, as here.
        head_dim: channels of a head.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, head_dim: int) -> Tensor:
    """Return what `interleaved` was given."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
